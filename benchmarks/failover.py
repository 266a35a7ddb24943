"""One of two replicas is killed, or freezes, at token 64 of 128: is the answer the same, and how much later?"""

from __future__ import annotations

import signal
from statistics import median

from benchmarks.arena import arena, prompt
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Result, Table
from benchmarks.timing import Spread

BARS_S = {"kill -9": 1.0, "SIGSTOP": 3.0}
STRIKES = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
PROMPT_TOKENS = 8
AVOID_S = 120.0  # longer than a record lives: no later answer begins with a peer that was killed

NOTES = """\
`{model}`, two peers that both have all blocks; at token {at} of {new} the one in use gets the signal, with all its
processes. Extra time is the longest pause between two tokens from there on, less the median one. Whole answers differ
by as much from one to the next on a shared machine, so their difference is only given beside it. Petals as released
never recovered.
"""


def measure(quick: bool) -> Result:
    """See the module."""
    model, new, repeats = ("llama-tiny", 24, 1) if quick else ("llama-small", 128, 3)
    folder, span = str(folder_of(model)), f"0:{SHAPES[model].layers}"
    extra_s: dict[str, list[float]] = {name: [] for name in STRIKES}
    longer_s: dict[str, list[float]] = {name: [] for name in STRIKES}
    undisturbed_s: list[float] = []
    same = 0
    with arena() as place:
        place.bootstrap()
        peers = {peer.peer_id: peer for peer in place.peers(folder, [span, span])}
        client = place.client(folder, 2, avoid_s=AVOID_S)
        client.generate(prompt(PROMPT_TOKENS), 8)
        for seed in range(repeats):
            for name, number in STRIKES.items():
                ids = prompt(PROMPT_TOKENS, seed)
                before = client.generate(ids, new)
                client.ask(ids, new, say_at=new // 2)
                struck = peers.pop(client.reply()["chain"][0])
                struck.signal(number)
                after = client.answer()
                struck.kill()
                extra_s[name].append(max(after.gaps_s[new // 2 - 1 :]) - median(after.gaps_s))
                longer_s[name].append(after.total_s - before.total_s)
                undisturbed_s.append(before.total_s)
                same += before.tokens == after.tokens
                fresh = place.start_peer(folder, span).ready()
                peers[fresh.peer_id] = fresh
                client.do("see", ids=list(peers))
    strikes = repeats * len(STRIKES)
    bars = [
        Bar(f"extra time after {name}", Spread.of(extra_s[name]).median, "at most", limit, "s")
        for name, limit in BARS_S.items()
    ]
    bars.append(Bar("same answer", same / strikes, "at least", 1.0))
    rows = [(name, Spread.of(values).show(), str(len(values))) for name, values in extra_s.items()]
    rows += [(f"{name}: the whole answer longer by", Spread.of(v).show(), str(len(v))) for name, v in longer_s.items()]
    rows.append(("undisturbed: the whole answer", Spread.of(undisturbed_s).show(), str(strikes)))
    table = Table(("", "extra time, s", "times"), rows)
    notes = NOTES.format(model=model, at=new // 2, new=new)
    return Result(
        "failover", "A peer is lost", notes, bars, [table], raw={"extra_s": extra_s, "longer_s": longer_s, "same": same}
    )
