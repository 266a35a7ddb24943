"""A 2,048-token prompt arrives while seven sessions decode: how long they wait, and how long it takes."""

from __future__ import annotations

import time

from benchmarks.arena import CROWD, START_TOGETHER_S, Subject, arena, prompt
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import Answer, Spread, p99

DECODING = 7
WAIT_BAR = 4.0
RATE_BAR = 0.5
PROMPT_TOKENS = 8

NOTES = """\
`{model}`, 1 peer, float32. Quiet: the long prompt alone, and {n} clients decoding alone. Then both: the prompt is
sent when all {n} have had {begun} tokens; what counts are their times between tokens from then until its first token
comes. Each client has a key of its own, and so its fair part.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    model, tokens, repeats, n = ("llama-tiny", 256, 2, 2) if quick else ("llama-small", 2047, 3, DECODING)
    begun, quiet_new, new = (4, 16, 400) if quick else (4, 24, 800)
    folder = str(folder_of(model))
    quiet_p99_ms: list[float] = []
    busy_p99_ms: list[float] = []
    quiet_s: list[float] = []
    busy_s: list[float] = []
    with arena(CROWD) as place:
        place.peers(folder, [f"0:{SHAPES[model].layers}"])
        long, *decoding = place.clients(1 + n)
        place.joined([long, *decoding], folder, 1, keep_key=False)
        _decode(decoding, begun, begun)
        for client in decoding:
            client.answer()
        for seed in range(repeats):
            quiet_s.append(long.generate(prompt(tokens, seed), 1).first_s)
            _decode(decoding, quiet_new, begun)
            quiet_p99_ms.append(1e3 * p99([gap for client in decoding for gap in client.answer().gaps_s[begun:]]))
            _decode(decoding, new, begun)
            asked = long.generate(prompt(tokens, seed + repeats), 1)
            busy_s.append(asked.first_s)
            for client in decoding:
                client.stop()
            answers = [client.answer() for client in decoding]
            busy_p99_ms.append(1e3 * p99([gap for answer in answers for gap in _during(answer, asked)]))
    waits = [busy / quiet for busy, quiet in zip(busy_p99_ms, quiet_p99_ms, strict=True)]
    rates = [quiet / busy for busy, quiet in zip(busy_s, quiet_s, strict=True)]
    bars = [
        Bar("p99 between tokens during a long prompt, over quiet", Spread.of(waits).median, "at most", WAIT_BAR),
        Bar("rate of the prompt beside sessions, over quiet", Spread.of(rates).median, "at least", RATE_BAR),
    ]
    rows = [
        (
            "p99 between tokens, ms",
            Spread.of(quiet_p99_ms).show(".0f"),
            Spread.of(busy_p99_ms).show(".0f"),
            Spread.of(waits).show(),
        ),
        (f"first token of {tokens}, s", Spread.of(quiet_s).show(), Spread.of(busy_s).show(), Spread.of(rates).show()),
    ]
    table = Table(("", "quiet", "both at once", "ratio"), rows)
    notes = NOTES.format(model=model, n=n, begun=begun)
    return Result(
        "interference",
        "A long prompt beside sessions that decode",
        notes,
        bars,
        [table],
        raw={"waits": waits, "rates": rates},
    )


def _decode(clients: list[Subject], new: int, begun: int) -> None:
    """All begin; returns when each has had `begun` tokens."""
    at_s = time.monotonic() + START_TOGETHER_S
    for seed, client in enumerate(clients):
        client.ask(prompt(PROMPT_TOKENS, seed), new, at_s=at_s, say_at=begun)
    for client in clients:
        client.reply()


def _during(answer: Answer, other: Answer) -> list[float]:
    """The gaps of an answer that overlap with another one."""
    ends = zip(answer.stamps_s, answer.stamps_s[1:], strict=False)
    return [end - start for start, end in ends if end > other.started_s and start < other.ended_s]
