"""`python -m tests.reach.asker TOKENS PEER WAY MADDR...`: a client that writes each token of a long answer as it comes.

WAY is `direct` or `relayed`: may it do without a relay?

Run in a network namespace by `test_nat`; uses that one peer. What happens to its chain goes to stderr.
"""

from __future__ import annotations

import sys

import torch
from transformers.generation.streamers import BaseStreamer

from client.model import SwarmModelForCausalLM
from tests.e2e.support import answers_at_length


class Writer(BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        if value.numel() == 1:  # not the prompt
            print(int(value), flush=True)

    def end(self) -> None:
        print("end", flush=True)


def main(tokens: str, peer: str, way: str, *join: str) -> None:
    torch.set_num_threads(1)
    with SwarmModelForCausalLM.from_pretrained(
        join=join,
        route=(peer,),
        direct=way == "direct",
        speculate="off",
        on_event=lambda text: print(text, file=sys.stderr, flush=True),
    ) as model:
        answers_at_length(model)
        prompt = torch.tensor([[5, 17, 80, 33, 61]])
        model.generate(prompt, max_new_tokens=int(tokens), do_sample=False, streamer=Writer())
        print(f"{model.summary()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
