"""Three hops over links of 5, 25 and 50 ms and 100 Mbit/s: what a step takes, and what prompt lookup gains."""

from __future__ import annotations

from typing import Any

from benchmarks.arena import Arena, Subject, arena, prompt, spans
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Curve, Plot, Result, Table
from benchmarks.timing import Answer, Spread

HOPS = 3
BYTES_PER_S = 100e6 / 8
BAR = 1.1
LOOKUP_DELAY_S = 0.05
COPY_BAR, OTHERS_BAR = 2.0, 0.95
SPECULATION = "speculate"  # of `ClientConfig`, where it has that
OFF, ON = "off", "auto"
LOOKUP: dict[str, Any] = {"prompt_lookup_num_tokens": 8}
"""For `generate`, where the client has no such setting."""
SEED = 5

NOTES = """\
A proxy stands before each peer's port and delays what passes, in each direction; a step over {hops} hops takes
{trips} one-way trips. *Compute* is the same step over the same links without delay. The proxy hides what TCP itself
does on a long line.

Lookup: questions to `potluck-demo` over three peers and {ms:.0f} ms links, answered in turns with and without it;
per task the time of all answers without it over the time with it.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    model, delays_ms, new, repeats = ("llama-tiny", (0, 5), 8, 1) if quick else ("llama-small", (0, 5, 25, 50), 16, 3)
    steps = _steps(model, delays_ms, new, repeats)
    gains, same = _lookup(1 if quick else 4, ("copying", "capitals") if quick else None)
    compute_ms = Spread.of(steps[0]).median
    bounds_ms = {ms: (HOPS + 1) * ms + compute_ms for ms in delays_ms if ms}
    over = {ms: Spread.of(steps[ms]).median / bound for ms, bound in bounds_ms.items()}
    bars = [
        Bar(f"step at {ms} ms, over (S + 1) x one-way + compute", value, "at most", BAR) for ms, value in over.items()
    ]
    bars.append(Bar("lookup: copying", gains["copying"], "at least", COPY_BAR))
    bars += [Bar(f"lookup: {task}", gain, "at least", OTHERS_BAR) for task, gain in gains.items() if task != "copying"]
    rows = [
        (str(ms), Spread.of(values).show(".1f"), f"{bounds_ms.get(ms, compute_ms):.1f}", f"{over.get(ms, 1.0):.2f}")
        for ms, values in steps.items()
    ]
    tables = [
        Table(("one-way, ms", "ms per token", "(S + 1) x one-way + compute", "over"), rows, f"{model}, {HOPS} hops"),
        Table(("task", "gain"), [(t, f"{g:.2f}") for t, g in gains.items()], f"prompt lookup; {same} answers the same"),
    ]
    bound = {ms: [value] for ms, value in bounds_ms.items()}
    plot = Plot(
        "a step over 3 hops", "one-way, ms", "ms per token", [Curve.of("measured", steps), Curve.of("bound", bound)]
    )
    notes = NOTES.format(hops=HOPS, trips=HOPS + 1, ms=LOOKUP_DELAY_S * 1e3)
    return Result("wan", "Long lines", notes, bars, tables, [plot], {"ms": steps, "gains": gains})


def _steps(model: str, delays_ms: tuple[int, ...], new: int, repeats: int) -> dict[int, list[float]]:
    """Milliseconds per token at each delay, without speculation."""
    folder = str(folder_of(model))
    found: dict[int, list[float]] = {ms: [] for ms in delays_ms}
    with arena() as place:
        place.peers(folder, spans(SHAPES[model].layers, HOPS), far=True)
        client = place.client(folder, HOPS, **no_speculation())
        client.generate(prompt(8), 4)
        for seed in range(repeats):
            for ms in delays_ms:
                _delay(place, ms / 1e3)
                found[ms].append(client.generate(prompt(8, seed), new).ms_per_token)
    return found


def _lookup(n: int, tasks: tuple[str, ...] | None) -> tuple[dict[str, float], str]:
    """Per task of the demo model, the time without lookup over that with it; and how many answers were the same."""
    from transformers import AutoTokenizer

    from demo.evaluate import MODEL
    from demo.world import TASK_NAMES, questions

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    gains: dict[str, float] = {}
    same = asked = 0
    with arena() as place:
        place.peers("potluck-demo", spans(24, HOPS), far=True)
        plain, looking = place.clients(2)
        place.joined([plain], "potluck-demo", HOPS, **no_speculation())
        place.joined([looking], "potluck-demo", HOPS, **_speculation(ON))
        options = {} if has_speculation() else LOOKUP
        _delay(place, LOOKUP_DELAY_S)
        for client in (plain, looking):
            client.generate(prompt(8, vocabulary=400), 4)
        for task in tasks or TASK_NAMES:
            took_s = [0.0, 0.0]
            for question in questions(SEED, n, "held_out", task):
                message = [{"role": "user", "content": question.text}]
                ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
                answers = [_answer(plain, ids), _answer(looking, ids, **options)]
                took_s = [took + answer.total_s for took, answer in zip(took_s, answers, strict=True)]
                same += answers[0].tokens == answers[1].tokens
                asked += 1
            gains[task] = took_s[0] / took_s[1]
    return gains, f"{same} of {asked}"


def _answer(client: Subject, ids: list[int], **options: Any) -> Answer:
    return client.generate(ids, 64, **options)


def _delay(place: Arena, delay_s: float) -> None:
    for line in place.links:
        line.delay_s, line.bytes_per_s = delay_s, BYTES_PER_S if delay_s else None


def has_speculation() -> bool:
    """Has this checkout's client the setting?"""
    from dataclasses import fields

    from client.config import ClientConfig

    return SPECULATION in {field.name for field in fields(ClientConfig)}


def no_speculation() -> dict[str, str]:
    """Settings of a client that sends each token by itself."""
    return _speculation(OFF)


def _speculation(value: str) -> dict[str, str]:
    return {SPECULATION: value} if has_speculation() else {}
