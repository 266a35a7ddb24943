"""Gates: where hidden states enter the blocks of a span, and where they leave.

A decoder runs all its blocks from embeddings. Each block that a span owns gets a gate around its forward: outside the
part that is to run it passes on what comes, at the first block of the part it puts the received hidden states in the
place of what the decoder made of a dummy, and after the last one it keeps what came out. What the decoder does before
and after (embedding scale, position embeddings, norm) therefore does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from protocol.span import Span


@dataclass(slots=True)
class Pass:
    """What the gates of one SpanModel share during one step: which blocks run, what goes in, what came out."""

    returns_tuple: bool
    active: Span | None = None
    incoming: Tensor | None = None
    outgoing: Tensor | None = None

    def begin(self, span: Span, hidden: Tensor) -> None:
        self.active, self.incoming, self.outgoing = span, hidden, None

    def output(self) -> Tensor:
        if self.outgoing is None:
            raise RuntimeError("the decoder did not run the last block of the span")
        return self.outgoing

    def end(self) -> None:
        self.active = self.incoming = self.outgoing = None


def gate(state: Pass, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a block's forward: a hole outside the active span, entry at its first block, exit at its last."""

    def gated(*args: Any, **kwargs: Any) -> Any:
        span = state.active
        if span is None or index not in span:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, None) if state.returns_tuple else hidden
        if index == span.start:
            if args:
                args = (state.incoming, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": state.incoming}
        output = forward(*args, **kwargs)
        if index == span.stop - 1:
            state.outgoing = output[0] if isinstance(output, tuple | list) else output
        return output

    return gated
