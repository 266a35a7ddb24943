"""A client that asks checked questions until its input ends: `python -m tests.chaos.soak_client CASES MADDR...`.

It writes one line of JSON for each answer: what was asked, what was wrong ("" if nothing), seconds, reroutes.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from client.model import SwarmModel, SwarmModelForCausalLM
from protocol.errors import PotluckError
from tests.chaos.arena import CLIENT, PREFILL_TOKENS
from tests.chaos.cases import CODECS, MODEL, Case, ask
from tests.e2e.support import answers_at_length


def main(cases_file: str, *join: str) -> None:
    torch.set_num_threads(1)
    cases = [Case.from_json(content) for content in json.loads(Path(cases_file).read_text())]
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    rng = random.Random()
    with SwarmModelForCausalLM.from_pretrained(
        MODEL, join=join, codec=CODECS[0], prefill_tokens=PREFILL_TOKENS, **CLIENT
    ) as first:
        others = [
            SwarmModelForCausalLM.from_pretrained(
                MODEL, swarm=first.swarm, codec=codec, prefill_tokens=PREFILL_TOKENS, **CLIENT
            )
            for codec in CODECS[1:]
        ]
        models = dict(zip(CODECS, [first, *others], strict=True))
        for model in models.values():
            answers_at_length(model)
        while not stop.is_set():
            case = rng.choice(cases)
            print(json.dumps(checked(models[case.codec], case)), flush=True)


def checked(model: SwarmModel, case: Case) -> dict[str, Any]:
    """One answer."""
    began_s = time.monotonic()
    trouble = ""
    try:
        if not torch.equal(ask(model, case), case.expected):
            trouble = "another answer"
    except PotluckError as error:
        trouble = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - began_s
    return {"asked": case.name, "trouble": trouble, "s": seconds, "reroutes": model.blocks.last_stats.reroutes}


if __name__ == "__main__":
    main(*sys.argv[1:])
