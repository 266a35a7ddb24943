"""What peers of the demo model compute, recorded, and the ways in which one may lie about it.

Each peer gets the same bytes: the hidden states of an honest chain, encoded. Audited peers compute tokens one by one,
as in an answer; auditors compute many at once, as they do. What they give is encoded, and decoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, cast

import torch
from torch import Tensor

from client.shadow import PASS_TOKENS
from client.tolerance import Kind
from demo.chains import run_chain
from demo.evaluate import load
from demo.swarm import MODEL, uneven_spans
from demo.world import questions
from protocol.span import Span
from slicing import SpanModel, load_span, resolve
from slicing.quantized import Quantization
from tensor_codecs import codec

FLOAT32: Final = Kind("float32", "none")
BFLOAT16: Final = Kind("bfloat16", "none")
KINDS: Final = (
    FLOAT32,
    Kind("float16", "none"),
    BFLOAT16,
    *(Kind(dtype, weights) for weights in ("int8", "nf4") for dtype in ("float32", "bfloat16")),
)
PROMPT_TOKENS: Final = 24  # at once, before the tokens that come one by one
AT_ONCE: Final = 4  # sessions in a pass, as peers do it with tokens of several
SEED: Final = 23

Lie = Callable[["Recording", Kind], Tensor]
"""What a liar that says it is of this kind gives in place of honest outputs, float32 [sessions, tokens, H]."""


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """What went into one span and came out, of all sessions.

    Attributes:
        inputs: as the peers decode them, float32 [sessions, tokens, H].
        single: what each kind of peer gives that computes token by token, decoded.
        bulk: what each kind gives that computes many tokens at once, decoded.
        smaller: what a model gives in which every third block is left out, decoded.
    """

    span: Span
    inputs: Tensor
    single: dict[Kind, Tensor]
    bulk: dict[Kind, Tensor]
    smaller: Tensor


def name_of(kind: Kind) -> str:
    """As tables show it."""
    return kind.dtype if kind.quantization in ("", "none") else f"{kind.quantization}, {kind.dtype}"


@torch.inference_mode()
def record(sessions: int, tokens: int, codec_name: str) -> list[Recording]:
    """Has the demo model compute so many sessions of so many tokens, span by span."""
    hidden, found = embedded(sessions, tokens), []
    for span in uneven_spans():
        inputs = crossed(hidden, codec_name)
        single, bulk = {}, {}
        for kind in KINDS:
            single[kind], bulk[kind] = computed(span, kind, inputs, codec_name)
        whole, _ = load()
        order = tuple(i for i in range(span.start, span.stop) if (i - span.start) % 3 != 2)
        *_, smaller = run_chain(whole, inputs, order)
        found.append(Recording(span, inputs, single, bulk, crossed(smaller, codec_name)))
        hidden = single[FLOAT32]
    return found


@torch.inference_mode()
def computed(span: Span, kind: Kind, inputs: Tensor, codec_name: str) -> tuple[Tensor, Tensor]:
    """What a peer makes of sessions token by token, and many tokens at once; both as the other side sees it."""
    model = _span_model(span, kind)
    single = torch.cat([_token_by_token(model, part) for part in inputs.split(AT_ONCE)])
    bulk = torch.stack([_many_at_once(model, row) for row in inputs])
    return crossed(single, codec_name), crossed(bulk, codec_name)


@torch.inference_mode()
def embedded(sessions: int, tokens: int) -> Tensor:
    """What enters the first block in long conversations: float32 [sessions, tokens, H]."""
    model, tokenizer = load()
    rows = []
    for session in range(sessions):
        ids: list[int] = []
        for question in questions(SEED + session, tokens // 4, "held_out"):
            message = [{"role": "user", "content": question.text}]
            text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            ids += tokenizer.encode(text + question.answer + str(tokenizer.eos_token))
            if len(ids) >= tokens:
                break
        rows.append(ids[:tokens])
    return cast(Tensor, model.model.embed_tokens(torch.tensor(rows)))


def crossed(hidden: Tensor, codec_name: str) -> Tensor:
    """As the other side sees it."""
    using, values = codec(codec_name), hidden.contiguous()
    return using.decode(using.encode(values), values.shape, values.dtype).float()


@cache
def _span_model(span: Span, kind: Kind) -> SpanModel:
    quantization = cast(Quantization, kind.quantization)
    return load_span(resolve(MODEL), span, dtype=getattr(torch, kind.dtype), quantization=quantization)


def _token_by_token(model: SpanModel, sessions: Tensor) -> Tensor:
    kv, hidden = model.new_cache(), sessions.to(model.dtype)
    parts = [hidden[:, :PROMPT_TOKENS], *hidden[:, PROMPT_TOKENS:].split(1, dim=1)]
    return torch.cat([model.step(part, kv) for part in parts], dim=-2)


def _many_at_once(model: SpanModel, row: Tensor) -> Tensor:
    kv = model.new_cache()
    return torch.cat([model.step(part, kv) for part in row[None].to(model.dtype).split(PASS_TOKENS, dim=1)], dim=-2)[0]


# ---------------------------------------------------------------------------------------------------- the ways to lie


def _noise(recording: Recording, kind: Kind) -> Tensor:
    honest = recording.single[kind]
    noise = torch.randn(honest.shape, generator=torch.Generator().manual_seed(SEED))
    return noise * honest.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)


def _faint_noise(recording: Recording, kind: Kind) -> Tensor:
    return recording.single[kind] + 0.3 * _noise(recording, kind)


def _sign_flips(recording: Recording, kind: Kind) -> Tensor:
    honest = recording.single[kind]
    flips = torch.rand(honest.shape, generator=torch.Generator().manual_seed(SEED)) < 0.25
    return torch.where(flips, -honest, honest)


def _stale(recording: Recording, kind: Kind) -> Tensor:
    return recording.single[kind].roll(1, dims=1)


def _smaller(recording: Recording, kind: Kind) -> Tensor:
    return recording.smaller


def _with_weights(quantization: str) -> Lie:
    return lambda recording, kind: recording.single[Kind(kind.dtype, quantization)]


LIES: Final[dict[str, Lie]] = {
    "noise": _noise,
    "faint noise": _faint_noise,
    "sign flips": _sign_flips,
    "stale outputs": _stale,
    "a smaller model's outputs": _smaller,
    "nf4 weights": _with_weights("nf4"),
    "int8 weights": _with_weights("int8"),
}
WHAT: Final[dict[str, str]] = {
    "noise": "Gaussian noise of the output's norm in its place",
    "faint noise": "Gaussian noise of 0.3 of the output's norm added to it",
    "sign flips": "one value in four with the other sign",
    "stale outputs": "the output of the token before",
    "a smaller model's outputs": "every third block left out",
    "nf4 weights": "honestly computed, with weights of 4 bits, where none are announced",
    "int8 weights": "the same with 8 bits",
}


def rows(recordings: list[Recording]) -> Iterator[tuple[Recording, slice]]:
    """The tokens of each recording that came one by one."""
    for recording in recordings:
        yield recording, slice(PROMPT_TOKENS, recording.inputs.shape[1])
