"""1 to 16 requests at once through one API process: their answers share passes of the peer and products of the head."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from benchmarks.arena import READY_S, START_TOGETHER_S, Arena, MeasurementFailed, Process, Subject, arena, prompt, spans
from benchmarks.loads import Load, Loads, table
from benchmarks.models import SHAPES, with_tokenizer
from benchmarks.result import Bar, Plot, Result
from benchmarks.timing import Answer
from peer.loading import multiplies_bfloat16

PROMPT_TOKENS = 8
AT = 8  # requests, for which the bars are
OVER_ONE = {"float32": 3.5, "bfloat16": 4.0}
LOOK_S = 0.2
CLIENT, UNSPLIT = "1 client", "unsplit"

NOTES = """\
`{model}`, greedy, prompts of {prompt} tokens, {new} new ones, streamed by `/v1/completions` of one `client api` in
front of one peer, all asked for in the same moment; who asks shares the cores with both. *Total* is all tokens over the
time from the first question to the last token. Peer and head compute in the number format that is named.
*1 client* is `generate` in a process without HTTP.
"""


class Api(Process):
    """A `client api` of the arena's swarm, that listens and sees a whole chain."""

    def __init__(self, place: Arena, folder: str, *options: str) -> None:
        where = ["--model", folder, "--join", str(place.maddr), "--port", "0", *options]
        tuning = place.tuning
        super().__init__(place, tuning.api_threads, tuning.client_passive, ["client", "api", *where], talks=False)
        self.address = urlsplit(self.says(r"^api of .* at (http://\S+)/v1$")[1]).netloc
        deadline_s = time.monotonic() + READY_S
        while self._health() != 200:
            if time.monotonic() > deadline_s:
                raise self.failed("sees no whole chain")
            time.sleep(LOOK_S)

    def _health(self) -> int:
        connection = http.client.HTTPConnection(self.address, timeout=READY_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        finally:
            connection.close()

    def together(self, prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
        """Answers that were all asked for in the same moment."""
        at_s = time.monotonic() + START_TOGETHER_S
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda ids: self._ask(ids, new, at_s), prompts))

    def _ask(self, ids: Sequence[int], new: int, at_s: float) -> Answer:
        """One streamed answer: when each of its chunks came."""
        body = {"prompt": list(ids), "max_tokens": new, "temperature": 0, "stream": True}
        connection = http.client.HTTPConnection(self.address, timeout=READY_S)
        stamps_s: list[float] = []
        try:
            connection.connect()
            time.sleep(max(0.0, at_s - time.monotonic()))
            started_s = time.monotonic()
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            while line := reply.readline():
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["text"]:
                    stamps_s.append(time.monotonic())
        finally:
            connection.close()
        if len(stamps_s) != new:
            raise MeasurementFailed(f"{len(stamps_s)} tokens came instead of {new}")
        return Answer(started_s, tuple(stamps_s), (0,) * new, (), new)


def setting(model: str, dtype: str, numbers: tuple[int, ...], new: int, repeats: int) -> Loads:
    """Measures one API process; in each round every number of requests has a turn, and the two single streams.

    It is named for its number format.
    """
    folder = str(with_tokenizer(model))
    found = Loads(dtype, {CLIENT: [], UNSPLIT: []}, {n: Load() for n in numbers})
    with arena() as place:
        unsplit = place.unsplit(folder)
        place.peers(folder, spans(SHAPES[model].layers, 1), "--dtype", dtype)
        client = place.client(folder, 1, dtype=dtype)
        api = Api(place, folder, "--dtype", dtype)
        prompts = [prompt(PROMPT_TOKENS, seed) for seed in range(max(numbers))]
        _warm(unsplit, client, api, prompts)
        for _ in range(repeats):
            found.alone[UNSPLIT].append(unsplit.generate(prompts[0], new))
            found.alone[CLIENT].append(client.generate(prompts[0], new))
            for n in numbers:
                found.loads[n].rounds.append(api.together(prompts[:n], new))
    return found


def _warm(unsplit: Subject, client: Subject, api: Api, prompts: Sequence[Sequence[int]]) -> None:
    unsplit.generate(prompts[0], 8)
    client.generate(prompts[0], 8)
    api.together(prompts, 4)


def bars_of(found: Loads) -> list[Bar]:
    """What many requests gain over one stream."""
    if AT not in found.loads:
        return []
    over, limit = f"{AT} requests over", OVER_ONE[found.name]
    return [
        Bar(f"{over} 1, {found.name}", found.total(AT) / found.total(1), "at least", limit),
        Bar(f"{over} 1 client, {found.name}", found.over(AT, CLIENT), "at least", limit),
    ]


def measure(quick: bool) -> Result:
    """See the module."""
    model, new, repeats = ("llama-tiny", 8, 2) if quick else ("llama-small", 32, 3)
    numbers = (1, 2) if quick else (1, 2, 4, 8, 16)
    wanted = [dtype for dtype in OVER_ONE if dtype == "float32" or (not quick and multiplies_bfloat16())]
    found = [setting(model, dtype, numbers, new, repeats) for dtype in wanted]
    plot = Plot(
        "all requests' tokens/s", "requests", "over 1 client", [each.curve(CLIENT) for each in found], log_x=True
    )
    raw = {
        each.name: {
            "unsplit": [answer.tokens_per_s for answer in each.alone[UNSPLIT]],
            "client": [answer.tokens_per_s for answer in each.alone[CLIENT]],
            "requests": {str(n): load.totals for n, load in each.loads.items()},
        }
        for each in found
    }
    notes = NOTES.format(model=model, prompt=PROMPT_TOKENS, new=new)
    bars = [bar for each in found for bar in bars_of(each)]
    return Result(
        "api", "Many requests through one API process", notes, bars, [table(found, "numbers", "request")], [plot], raw
    )
