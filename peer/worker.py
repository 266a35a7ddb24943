"""The steps themselves: bytes -> tensors -> cache operations -> blocks -> tensors -> bytes.

`admit` looks at a step before it waits, in the event loop; `run` makes one pass, in the compute thread. The one thread
is what makes steps idempotent and sessions isolated: a step that is sent again finds the result of the first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from peer.session import Session, tokens_after
from peer.table import SessionTable
from peer.work import Work, shape_of
from protocol.errors import BadMessage, PeerFault, PeerFull, PotluckError, SessionLost, StaleEpoch
from protocol.journal import Entry, Part
from protocol.limits import MAX_BATCH
from protocol.messages import ATTENTION_MASK, HIDDEN, POSITION_IDS, HopTrace, Step, TensorSpec, token_axis
from protocol.messages import CacheOp as WireOp
from protocol.receipts import Line, digest
from slicing import CacheOp, PagedCache, RaggedSpan, SpanCache, SpanModel, Stretch
from slicing.plausible import check_plausible
from tensor_codecs import codec, dtype_name, dtype_of

logger = logging.getLogger(__name__)


class Worker:
    """Executes steps of sessions on one span.

    Args:
        model: the loaded span.
        ragged: packs steps of several sessions; None: each has a pass of its own.
        sessions: whose budget the steps grow, and whose codecs are taken.
        max_tokens: rows x tokens of one step.
    """

    def __init__(self, model: SpanModel, ragged: RaggedSpan | None, sessions: SessionTable, max_tokens: int) -> None:
        self._model = model
        self._ragged = ragged
        self._sessions = sessions
        self._max_tokens = max_tokens
        self._inputs = {HIDDEN, ATTENTION_MASK, POSITION_IDS, *model.extras}
        self._leading = tuple(model.example_inputs(1)[0].shape[:-3])  # of hidden states, before rows and tokens

    # ------------------------------------------------------------------ before it waits: nothing is changed

    def admit(self, session: Session, step: Step) -> bool:
        """Can the step be computed? False: it was applied before (law 3), its output is kept, or was taken.

        Raises:
            StaleEpoch, SessionLost: the session has moved on, or is gone.
            BadMessage: the step does not fit the session or the model.
        """
        if step.epoch < session.epoch:
            raise StaleEpoch(f"the session is at epoch {session.epoch} already, not {step.epoch}")
        if session.broken:
            raise SessionLost("a step of that session failed before, or it was dropped; replay it")
        if step.step_id < session.next_step:
            return False
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
        return True

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

    def packs(self, session: Session, step: Step) -> bool:
        """Can the step share a pass with others? Rows, padding and odd positions need one of their own."""
        return (
            isinstance(session.cache, PagedCache)
            and shape_of(step)[0] == 1
            and all(spec.name == HIDDEN for spec in step.tensors)
            and all(PagedCache.takes(_cache_op(op)) for op in step.ops)
        )

    # ------------------------------------------------------------------ one pass

    def run(self, pieces: Sequence[tuple[Work, int]]) -> None:
        """Computes so many tokens per row of each work. What is through has a `cost` then, and its session the output;
        what failed has an `error`. A failure is that of its own step alone (law 7).

        Args:
            pieces: one that cannot be packed is the only one.
        """
        begun = [piece for piece in pieces if self._guarded(piece[0], self._begin, breaks=False)]
        begun = [piece for piece in begun if self._guarded(piece[0], self._apply_packed)]
        if any(not work.packs for work, _ in begun):
            for work, _ in begun:
                self._guarded(work, self._run_single)
        elif begun:
            self._run_packed(begun)
        for work, _ in begun:
            if work.error is None and work.computed == work.tokens:
                self._guarded(work, self._finish)

    def _guarded(self, work: Work, part: Callable[[Work], None], *, breaks: bool = True) -> bool:
        """Runs a part of a step. `breaks`: where it fails, the cache can no longer be trusted: the session must be
        replayed."""
        try:
            part(work)
        except BaseException as error:  # noqa: BLE001  # for its own client, and no other
            self._fail(work, error, breaks=breaks)
            return False
        return True

    def _fail(self, work: Work, error: BaseException, *, breaks: bool) -> None:
        work.session.broken = work.session.broken or breaks
        work.error = _fault(error)

    def _begin(self, work: Work) -> None:
        """Is the session as it was when the step came? The first piece makes tensors of bytes, too."""
        session, step = work.session, work.step
        if step.epoch < session.epoch:
            raise StaleEpoch(f"the session is at epoch {session.epoch} already, not {step.epoch}")
        if session.broken:
            raise SessionLost("the session was dropped while its step waited; replay it")
        if not work.began_s:
            work.began_s = time.perf_counter()
            work.inputs = self._decode(step)
            if work.packs and self._ragged is not None:
                self._ragged.check(self._stretch(work, work.tokens))

    def _apply_packed(self, work: Work) -> None:
        if work.packs and not work.computed:
            assert work.cache is not None
            for op in work.step.ops:
                work.cache.apply(_cache_op(op))

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
        check_plausible(inputs[HIDDEN])
        return inputs

    def _run_packed(self, pieces: Sequence[tuple[Work, int]]) -> None:
        assert self._ragged is not None
        stretches = [self._stretch(work, tokens) for work, tokens in pieces]
        try:
            outputs = self._ragged.run(stretches)
        except Exception as error:
            if len(pieces) == 1:
                self._fail(pieces[0][0], error, breaks=True)
                return
            logger.exception("a pass of %d steps failed; each is tried alone", len(pieces))
            for piece in pieces:
                self._run_packed([piece])
            return
        for (work, tokens), output in zip(pieces, outputs, strict=True):
            work.outputs.append(output)
            work.computed += tokens

    def _stretch(self, work: Work, tokens: int) -> Stretch:
        assert isinstance(work.cache, PagedCache)
        hidden = work.inputs[HIDDEN].narrow(-2, work.computed, tokens)
        return Stretch(work.cache, hidden, work.step.position + work.computed)

    def _run_single(self, work: Work) -> None:
        session, inputs, cache = work.session, dict(work.inputs), work.cache
        if isinstance(cache, PagedCache):
            assert self._ragged is not None
            cache = self._ragged.unpacked(cache)
            self._sessions.replace_cache(session, cache)
        hidden = inputs.pop(HIDDEN)
        if cache is not None:
            for op in work.step.ops:
                self._apply(session, cache, op)
            self._sessions.ensure_room(session, hidden.shape[-3], cache.n_tokens + hidden.shape[-2])
        output = self._model.step(
            hidden,
            cache,
            span=session.span,
            attention_mask=inputs.pop(ATTENTION_MASK, None),
            position_ids=inputs.pop(POSITION_IDS, None),
            extras=inputs,
        )
        work.outputs.append(output)
        work.computed = work.tokens

    def _apply(self, session: Session, cache: SpanCache, op: WireOp) -> None:
        if op.kind == "repeat" and cache.batch is not None:  # the only operation that makes a cache larger
            rows = cache.batch * op.values[0]
            if rows > MAX_BATCH:
                raise BadMessage(f"a cache of {rows} rows; {MAX_BATCH} at most")
            self._sessions.ensure_room(session, rows, cache.n_tokens)
        cache.apply(_cache_op(op))

    def _finish(self, work: Work) -> None:
        """The step is through: keeps its output, counts it as applied."""
        session, step = work.session, work.step
        hidden = work.outputs[0] if len(work.outputs) == 1 else torch.cat(work.outputs, dim=-2)
        output = self._onward(session, step, hidden)
        if work.packs:
            assert isinstance(work.cache, PagedCache)
            work.cache.advance(work.tokens)
        cost = HopTrace(
            start=session.span.start,
            queue_ms=max(0.0, work.began_s - work.arrived_s) * 1e3,
            compute_ms=(time.perf_counter() - work.began_s) * 1e3,
            kv_tokens_left=self._sessions.tokens_left,
            epoch=step.epoch,
            received=digest(step.position, step.parts()),
            sent=output.digest(),
        )
        session.lines.append(Line(step.step_id, step.epoch, cost.received, cost.sent))
        session.next_step = step.step_id + 1
        self._sessions.remember(session, replace(output, trace=(*step.trace, cost)))
        work.cost = cost
        work.inputs.clear()
        work.outputs.clear()

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
    """What a failure of a step is for the client: the tree's own errors as they are, all else typed. Without its
    traceback, which knows the step, in a cycle that would keep both."""
    if isinstance(error, PotluckError):
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return PeerFull("this peer ran out of memory in the step; the session must be replayed elsewhere")
    logger.error("a step failed", exc_info=error)
    return PeerFault(f"the step failed on this peer: {type(error).__name__}")
