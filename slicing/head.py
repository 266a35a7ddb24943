"""The client's side: a Hugging Face model whose blocks are elsewhere.

`load_head` gives the model's own class with every block a hole, but for block 0, which hands the hidden states to a
`Remote` and gives on what comes back. Embeddings, final norm and LM head are here, and so is everything that
`generate` does: transformers' code for it runs unmodified. It sees a `RemoteCache`, which counts tokens and turns what
`generate` does to a cache (crop, reorder, ...) into `CacheOp`s that ride on the next step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from protocol.errors import ModelError, PeerFault
from slicing.config import hidden_dtypes, load_config, model_class, text_config
from slicing.cuts import check_architecture
from slicing.loading import LoadReport, Progress, load
from slicing.remote import Remote, RemoteCache
from slicing.skeleton import (
    BlockStack,
    Hole,
    find_block_stack,
    forward_parameters,
    holed_class,
    punch_holes,
)

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    from slicing.source import ModelSource

    class _HeadBase(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
        """What a head is besides: an instance of the architecture's own class."""
else:
    _HeadBase = object

_OTHER_THAN_TEXT = ("pixel_", "image_", "video_", "audio_", "input_features")
"""How the inputs of composite models begin that are not text."""

_USED_BEFORE_OR_SENT = {
    "input_ids",
    "inputs_embeds",
    "token_type_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "per_layer_inputs",
    "logits_to_keep",
}
"""The tensors in the call of a decoder that are used before the blocks or after them, or are sent with each step."""


class _Calls(threading.local):
    """The forward that runs in this thread; several threads may use one head.

    Attributes:
        decoder, outer: arguments of the decoder's forward, and of the whole model's, of which it is a part.
        extras: tensors that the blocks need beside the hidden states.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.decoder: dict[str, Any] = {}
        self.outer: dict[str, Any] = {}
        self.extras: dict[str, Tensor] = {}


class RemoteStack(Hole):
    """Block 0 of a head: all blocks, through a Remote."""

    def __init__(self, replaced: nn.Module, stack: BlockStack) -> None:
        super().__init__(replaced, returns_tuple=stack.returns_tuple)
        self.remote: Remote | None = None
        self._dtypes: frozenset[torch.dtype] = frozenset()
        self._calls = _Calls()

    def expect(self, dtypes: frozenset[torch.dtype]) -> None:
        """Take hidden states of these dtypes from the remote blocks."""
        self._dtypes = dtypes

    def begin(self, call: dict[str, Any]) -> None:
        """Note the arguments of the decoder's forward that is about to reach this block."""
        self._calls.decoder = call
        self._calls.extras = {}

    def begin_outer(self, call: dict[str, Any]) -> None:
        """Note the arguments of the whole model's forward, of which the decoder's is a part."""
        self._calls.outer = call

    def add_extra(self, name: str, tensor: Tensor) -> None:
        self._calls.extras[name] = tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        try:
            output = self._run(hidden)
        finally:
            # What is kept here would keep the call's cache alive, and with it the peers' memory.
            self._calls.clear()
        return (output, None) if self.returns_tuple else output

    def _run(self, hidden: Tensor) -> Tensor:
        if self.remote is None:
            raise RuntimeError("this head has no blocks yet: call attach(remote) first")
        call = self._calls.decoder
        _refuse_what_cannot_be_sent(call)
        cache = _remote_cache(call)
        mask = _padding_mask(call.get("attention_mask"), self._calls.outer)
        output = self.remote.run(
            hidden,
            cache=cache,
            ops=tuple(cache.pending) if cache is not None else (),
            attention_mask=mask,
            position_ids=_odd_positions(call.get("position_ids"), cache, mask),
            extras=self._calls.extras,
        )
        if output.shape != hidden.shape or output.dtype not in self._dtypes:
            raise PeerFault(f"the chain gave {tuple(output.shape)} of {output.dtype} for {tuple(hidden.shape)}")
        if cache is not None:
            cache.pending.clear()
            cache.n_tokens += hidden.shape[-2]
        return output


class Head(_HeadBase):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """Mixed into the architecture's class by `load_head`: use it like any Hugging Face model, after `attach`."""

    _remote_stack: RemoteStack
    report: LoadReport

    def attach(self, remote: Remote) -> None:
        """Use these blocks from now on."""
        self._remote_stack.remote = remote

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[Any, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Called by `generate`, to put a cache into `model_kwargs`: ours, whatever `cache_implementation` says."""
        name = "cache_params" if "cache_params" in forward_parameters(self) else "past_key_values"
        cache = model_kwargs.get(name)
        if cache is None and generation_config.use_cache is not False:
            cache = model_kwargs[name] = RemoteCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()
        elif cache is not None:
            cache._is_user_defined = True


def load_head(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Head:
    """The model without its blocks: embeddings, final norm, LM head, generation. Give it blocks with `attach`.

    Args:
        dtype: of weights and hidden states; None: the model's own.
        progress: told as tensors are read.

    Returns:
        an instance of the architecture's own class (`LlamaForCausalLM`, ...), which is a `Head` too, in eval mode.

    Raises:
        NoBlockStack, RemoteCodeRefused, ModelError: the architecture cannot be sliced.
        BrokenCheckpoint: weights are missing or damaged.
        UnknownModel: the hub cannot be reached.
    """
    config = load_config(source)
    check_architecture(config)
    cls = holed_class(model_class(config), _make_head, Head)
    model, report = load(cls, config, source, f"head of {source.name}", dtype=dtype, device=device, progress=progress)
    head = cast(Head, model)
    head.report = report
    head._remote_stack.expect(hidden_dtypes(head.config))
    for part in (head.config, text_config(head.config)):
        # No attention runs here, and decoders make no masks for an implementation that transformers does not know.
        # Eager-only architectures (mpt) rely on having a mask.
        if part._attn_implementation == "sdpa":
            cast(Any, part)._attn_implementation_internal = "remote"
    generation = source.find("generation_config.json")
    if generation is not None:
        head.generation_config = GenerationConfig.from_pretrained(generation.parent)
    return head


def _make_head(model: PreTrainedModel) -> None:
    """Make every block a hole, block 0 a RemoteStack, and let the stack see what the decoder is called with."""
    stack = find_block_stack(model)
    decoder = stack.decoder(model)
    remote = RemoteStack(stack.blocks(model)[0], stack)
    punch_holes(model, stack, range(0))
    stack.blocks(model)[0] = remote
    # Not as a submodule: the stack is one already, where block 0 was.
    object.__setattr__(model, "_remote_stack", remote)
    names = forward_parameters(decoder)
    cache_name = "cache_params" if "cache_params" in names else "past_key_values"

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        use_cache = call.get("use_cache")
        if use_cache is None:
            use_cache = getattr(text_config(model.config), "use_cache", True)
        if use_cache and call.get(cache_name) is None:
            # The decoder would make a cache of its own here (a plain forward, the second branch of CFG).
            call[cache_name] = RemoteCache()
        remote.begin(call)
        return (), call

    outer_names = forward_parameters(model)

    def before_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        remote.begin_outer({**dict(zip(outer_names[1:], args, strict=False)), **kwargs})

    decoder.register_forward_pre_hook(before, with_kwargs=True)
    if decoder is not model:
        model.register_forward_pre_hook(before_all, with_kwargs=True)
    project = getattr(decoder, "project_per_layer_inputs", None)
    if project is not None:
        setattr(decoder, "project_per_layer_inputs", _noting(project, remote))  # noqa: B010 (mypy forbids assignment)


def _noting(project: Callable[..., Tensor | None], remote: RemoteStack) -> Callable[..., Tensor | None]:
    """`project`, of which the result goes to the remote blocks too."""

    def noting(*args: Any, **kwargs: Any) -> Tensor | None:
        result = project(*args, **kwargs)
        if result is not None:
            remote.add_extra("per_layer_inputs", result)
        return result

    return noting


def _refuse_what_cannot_be_sent(call: dict[str, Any]) -> None:
    """Decoders of composite models may be given tensors for use between blocks (qwen3_vl: image features)."""
    for name, value in call.items():
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, Tensor) and name not in _USED_BEFORE_OR_SENT:
            raise ModelError(f"{name} goes to the blocks in a way that cannot be sent to other peers; use text alone")


def _remote_cache(call: dict[str, Any]) -> RemoteCache | None:
    cache = call.get("past_key_values")
    if cache is None:
        cache = call.get("cache_params")
    if cache is not None and not isinstance(cache, RemoteCache):
        raise TypeError(
            f"a head's cache must be a RemoteCache, not {type(cache).__name__}: the states are on the peers"
        )
    return cache


def _padding_mask(mask: Any, outer: dict[str, Any]) -> Tensor | None:
    """The mask as bool where it masks anything, else None.

    Composite models make masks of their own for their decoder, a dict; for text alone these say what the mask says that
    the whole model was called with.
    """
    if isinstance(mask, dict):
        if any(value is not None and name.startswith(_OTHER_THAN_TEXT) for name, value in outer.items()):
            raise ModelError("this architecture masks images in a way that cannot be sent to the blocks of other peers")
        mask = outer.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ModelError("only masks of padding, [rows, tokens], can be sent to the blocks of other peers")
    kept = mask.to(torch.bool)
    return None if bool(kept.all()) else kept


def _odd_positions(position_ids: Tensor | None, cache: RemoteCache | None, mask: Tensor | None) -> Tensor | None:
    """The positions where the blocks would not come to the same by themselves, else None."""
    if position_ids is None or mask is not None:
        return position_ids
    seen = cache.n_tokens if cache is not None else 0
    usual = torch.arange(seen, seen + position_ids.shape[-1], device=position_ids.device)
    return None if bool((position_ids == usual).all()) else position_ids
