"""The step itself: bytes -> tensors -> cache operations -> blocks -> tensors -> bytes. Runs in the compute thread.

The one thread is what makes steps idempotent and sessions isolated: a step that is sent again waits for the first to
end, and then finds its result.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from peer.session import Session, SessionTable, tokens_after
from protocol.errors import BadMessage, PeerFault, PeerFull, PotluckError, SessionLost, StaleEpoch
from protocol.journal import Entry, Part
from protocol.limits import MAX_BATCH
from protocol.messages import ATTENTION_MASK, HIDDEN, POSITION_IDS, HopTrace, Step, TensorSpec, token_axis
from protocol.messages import CacheOp as WireOp
from slicing import CacheOp, SpanCache, SpanModel
from tensor_codecs import codec, dtype_name, dtype_of

logger = logging.getLogger(__name__)

TYPICAL_SHARE = 0.1  # of the newest step in the running mean of steps' times


class Worker:
    """Executes steps of sessions on one span.

    Args:
        model: the loaded span.
        sessions: whose budget the steps grow, and whose codecs are taken.
        max_tokens: rows x tokens of one step.
    """

    def __init__(self, model: SpanModel, sessions: SessionTable, max_tokens: int) -> None:
        self._model = model
        self._sessions = sessions
        self._max_tokens = max_tokens
        self.typical_ms = 0.0  # of one step, lately
        self._inputs = {HIDDEN, ATTENTION_MASK, POSITION_IDS, *model.extras}
        self._leading = tuple(model.example_inputs(1)[0].shape[:-3])  # of hidden states, before rows and tokens

    def execute(self, session: Session, step: Step, arrived_s: float) -> HopTrace | None:
        """Applies `step` and keeps its output in the session. Returns what it cost; None if it was applied before
        (law 3): its output is kept, or was taken.

        Args:
            arrived_s: `time.perf_counter()` when the step had arrived.

        Raises:
            StaleEpoch, SessionLost: the session has moved on, or is gone.
            BadMessage, BadPayload, PeerFull, PeerFault: the step could not be done. If it had begun to change the
                cache, the session is broken and must be replayed.
        """
        started_s = time.perf_counter()
        if step.epoch < session.epoch:
            raise StaleEpoch(f"the session is at epoch {session.epoch} already, not {step.epoch}")
        if session.broken:
            raise SessionLost("a step of that session failed before, or it was dropped; replay it")
        if step.step_id < session.next_step:
            return None
        inputs = self._checked_inputs(session, step)
        try:
            hidden = self._run(session, step, inputs)
            output = self._onward(session, step, hidden)
        except BaseException as error:
            session.broken = True
            raise _fault(error) from error
        ended_s = time.perf_counter()
        cost = HopTrace(
            start=session.span.start,
            queue_ms=max(0.0, started_s - arrived_s) * 1e3,
            compute_ms=(ended_s - started_s) * 1e3,
            kv_tokens_left=self._sessions.budget.tokens_left,
        )
        self.typical_ms += TYPICAL_SHARE * (cost.compute_ms - self.typical_ms)
        session.next_step = step.step_id + 1
        self._sessions.remember(session, replace(output, trace=(*step.trace, cost)))
        return cost

    # ------------------------------------------------------------------ checks: nothing is changed before they pass

    def _checked_inputs(self, session: Session, step: Step) -> dict[str, Tensor]:
        cache = session.cache
        if cache is not None and step.position != (held := tokens_after(cache.n_tokens, step.ops)):
            raise BadMessage(f"the step starts at token {step.position}, the session is at {held}")
        rows_x_tokens = 0
        for spec in step.tensors:
            self._check(spec)
            if spec.name == HIDDEN:
                rows_x_tokens += spec.shape[-3] * (spec.keep or spec.shape[-2])
        if not 1 <= rows_x_tokens <= self._max_tokens:
            raise BadMessage(
                f"a step of {rows_x_tokens} tokens; this peer takes 1 to {self._max_tokens}: "
                "send the prompt in smaller chunks"
            )
        return self._decode(step)

    def _check(self, spec: TensorSpec) -> None:
        if spec.name not in self._inputs:
            raise BadMessage(f"this model has no input named {spec.name!r}")
        if spec.codec not in self._sessions.codecs:
            raise BadMessage(f"codec {spec.codec!r} was not agreed on")
        fewest = 3 if spec.name == HIDDEN else 2
        if len(spec.shape) < fewest or spec.keep > spec.shape[token_axis(spec.name)]:
            raise BadMessage(f"tensor {spec.name!r} of shape {spec.shape} with {spec.keep} tokens to keep")
        if spec.name == HIDDEN and (spec.shape[:-3] != self._leading or spec.shape[-1] != self._model.hidden_size):
            wanted = ", ".join(map(str, (*self._leading, "rows", "tokens", self._model.hidden_size)))
            raise BadMessage(f"hidden states are [{wanted}] here, not {spec.shape}")
        expected = codec(spec.codec).nbytes(spec.shape, dtype_of(spec.dtype))
        if spec.nbytes != expected:
            raise BadMessage(f"tensor {spec.name!r} of shape {spec.shape} has {expected} bytes, not {spec.nbytes}")

    def _decode(self, step: Step) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for spec, payload in step.parts():
            tensor = codec(spec.codec).decode(payload, spec.shape, dtype_of(spec.dtype), self._model.device)
            kept = tensor.narrow(token_axis(spec.name), 0, spec.keep) if spec.keep else tensor
            parts.setdefault(spec.name, []).append(kept)
        inputs = {name: _joined(name, tensors) for name, tensors in parts.items()}
        for name in inputs.keys() - {ATTENTION_MASK, POSITION_IDS}:
            if inputs[name].dtype not in self._model.hidden_dtypes:  # a client that computes in another format
                inputs[name] = inputs[name].to(self._model.dtype)
        return inputs

    # ------------------------------------------------------------------ the work

    def _run(self, session: Session, step: Step, inputs: dict[str, Tensor]) -> Tensor:
        hidden, cache = inputs.pop(HIDDEN), session.cache
        if cache is not None:
            for op in step.ops:
                self._apply(session, cache, op)
            self._sessions.ensure_room(session, hidden.shape[-3], cache.n_tokens + hidden.shape[-2])
        return self._model.step(
            hidden,
            cache,
            span=session.span,
            attention_mask=inputs.pop(ATTENTION_MASK, None),
            position_ids=inputs.pop(POSITION_IDS, None),
            extras=inputs,
        )

    def _apply(self, session: Session, cache: SpanCache, op: WireOp) -> None:
        if op.kind == "repeat" and cache.batch is not None:  # the only operation that makes a cache larger
            rows = cache.batch * op.values[0]
            if rows > MAX_BATCH:
                raise BadMessage(f"a cache of {rows} rows; {MAX_BATCH} at most")
            self._sessions.ensure_room(session, rows, cache.n_tokens)
        cache.apply(_cache_op(op))

    def _onward(self, session: Session, step: Step, hidden: Tensor) -> Entry:
        """What the next hop is told: the hidden states that came out, with the step's other inputs and operations.
        After the model's last block nobody needs these."""
        payload = codec(session.codec).encode(hidden)
        spec = TensorSpec(HIDDEN, session.codec, dtype_name(hidden.dtype), tuple(hidden.shape), len(payload))
        parts, ops = [Part(spec, payload)], step.ops
        if session.span.stop == self._sessions.n_blocks:
            ops = ()
        else:
            parts += [Part(spec, bytes(data)) for spec, data in step.parts() if spec.name != HIDDEN]
        return Entry(step.position, hidden.shape[-2], hidden.shape[-3], tuple(parts), ops, step.step_id)


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """The parts of a replayed input, along its token axis."""
    if len(parts) == 1:
        return parts[0]
    try:
        return torch.cat(parts, dim=token_axis(name))
    except RuntimeError as error:
        raise BadMessage(f"the parts of {name!r} do not fit together") from error


def _cache_op(op: WireOp) -> CacheOp:
    kind = cast(Literal["crop", "reorder", "repeat", "select", "reset", "record_past"], op.kind)
    if kind in ("crop", "repeat"):
        return CacheOp(kind, op.values[0])
    return CacheOp(kind, op.values or None)


def _fault(error: BaseException) -> PotluckError:
    """What a failure in the middle of a step is for the client: the tree's own errors as they are, all else typed."""
    if isinstance(error, PotluckError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return PeerFull("this peer ran out of memory in the step; the session must be replayed elsewhere")
    logger.error("a step failed", exc_info=error)
    return PeerFault(f"the step failed on this peer: {type(error).__name__}")
