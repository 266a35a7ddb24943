"""A chain of spans in this process: what a client does over the network, without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from protocol.span import Span
from slicing import CacheOp, ModelSource, RemoteCache, SpanCache, SpanModel, load_span


@dataclass
class LocalChain:
    """A `Remote` over models in this process.

    Attributes:
        hops: models with the part of each that is used.
        calls: what each call of `run` was given, to be looked at by tests.
    """

    hops: Sequence[tuple[SpanModel, Span]]
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def load(cls, source: ModelSource, cuts: Sequence[int]) -> LocalChain:
        """The whole model in spans between `cuts`."""
        spans = [Span(start, stop) for start, stop in pairwise(cuts)]
        return cls([(load_span(source, span), span) for span in spans])

    def run(
        self,
        hidden: Tensor,
        *,
        cache: RemoteCache | None,
        ops: tuple[CacheOp, ...],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        extras: dict[str, Tensor],
    ) -> Tensor:
        self.calls.append(Call(hidden.shape[-2], ops, attention_mask, position_ids, extras))
        caches: list[SpanCache | None] = [None] * len(self.hops)
        if cache is not None:
            if cache.handle is None:
                cache.handle = [model.new_cache(span) for model, span in self.hops]
            assert isinstance(cache.handle, list)
            caches = cache.handle
        for (model, span), of_hop in zip(self.hops, caches, strict=True):
            if of_hop is not None:
                for op in ops:
                    of_hop.apply(op)
            hidden = model.step(
                hidden,
                of_hop,
                span=span,
                attention_mask=attention_mask,
                position_ids=position_ids,
                extras=extras,
            )
        return hidden

    @property
    def tokens(self) -> int:
        """How many tokens were sent."""
        return sum(call.tokens for call in self.calls)


@dataclass(frozen=True)
class Call:
    """What one call of `run` was given."""

    tokens: int
    ops: tuple[CacheOp, ...]
    attention_mask: Tensor | None
    position_ids: Tensor | None
    extras: dict[str, Tensor]
