"""What a broken chain needs, to go on where it was. Pure: no sockets, no clock.

A chain is a row of logs. Each hop keeps the outputs of its steps (`protocol.journal.StepLog`) for the hop after it; the
client keeps its own inputs for the first hop. A hop needs its predecessor's outputs from its own `next_step` on: 0 for
a replacement, which is told everything; one of the steps on their way for a hop that survived. So recovery is one
question per edge, asked from the end of the chain: can the hop before it still give what is needed? If not, that hop
must be told everything itself, and computes it again. With the steps 7 and 8 on their way:

             client            p1               p2 (new)           p3
    has      inputs 0..8       outputs 0..8     nothing            outputs 0..6
    lacks                      nothing          all                step 7 and on
    edge           -, nothing  ->    0..8, by push  ->   7, 8, by push  ->   7, 8 to the client
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.messages import Opened


def lacking(state: Opened, step_id: int, *, stateless: bool) -> int:
    """The first step whose input a hop lacks, when the client lacks the results from `step_id` on."""
    return max(state.next_step, step_id) if stateless else state.next_step


def to_renew(states: Sequence[Opened], step_id: int, *, stateless: bool = False) -> tuple[int, ...]:
    """Which hops must begin anew, so that every hop can be told what it lacks by the one before it.

    Args:
        states: of all hops of the chain, in order, new ones among them.
        step_id: the first step whose result the client lacks.

    Returns:
        indices of hops, which have no cache any more when this is done; a chain in which there are none can go on.
    """
    renewed = []
    wanted = step_id  # the first step whose output the next hop lacks
    for index in reversed(range(len(states))):
        state = states[index]
        lacks = lacking(state, step_id, stateless=stateless)
        # A replay that was broken off is begun again: its parts are joined differently each time.
        half_told = 0 < state.next_step < step_id and not stateless
        if half_told or wanted < state.kept_from:
            renewed.append(index)
            lacks = 0
        wanted = lacks
    return tuple(sorted(renewed))
