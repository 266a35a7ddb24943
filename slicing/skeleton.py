"""A model's full skeleton with holes: modules that a span, or a client's head, does not own become parameter-less.

The configuration stays as it is, so block indices, layer types and every per-block rule of the architecture remain
right, and the architecture's own code runs unchanged around the holes. The holes are made in `__init__`, on the meta
device, before transformers loads weights: so only what is left is loaded.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from protocol.errors import NoBlockStack
from slicing.config import hidden_size, n_blocks, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Hole(nn.Module):
    """Stands where a module was, without its parameters. Called as a block, it hands its first argument on.

    Args:
        replaced: the module that was here; its plain attributes (`attention_type`, `layer_idx`, ...) stay readable,
            because some decoders read them in their loop, and so do its non-persistent buffers, because some
            architectures write to them when they initialise.
        returns_tuple: do the blocks of this architecture return a tuple, hidden states first?
    """

    def __init__(self, replaced: nn.Module, *, returns_tuple: bool = False) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        copy_plain_attributes(replaced, self)
        for path, buffer in list(replaced.named_buffers()):
            *parents, name = path.split(".")
            owner: nn.Module = replaced.get_submodule(".".join(parents))
            if name in owner._non_persistent_buffers_set:
                _submodule(self, parents).register_buffer(name, buffer, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        return (hidden, None) if self.returns_tuple else hidden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Without nn.Module's hooks, which nobody puts on a hole: each step calls every hole, and this halves its cost.
        return self.forward(*args, **kwargs)


class Blocks(nn.ModuleList):
    """A ModuleList that is itself when all of it is asked for: decoders loop over `self.layers[:n]` in each step."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index == slice(None, len(self), None):
            return self
        return super().__getitem__(index)


@dataclass(frozen=True, slots=True)
class BlockStack:
    """Where a model keeps its blocks.

    Attributes:
        path: name of the decoder, the module whose forward runs the blocks; "" is the model itself.
        attribute: name of the ModuleList of blocks in the decoder.
        returns_tuple: do the blocks return a tuple, hidden states first?
        embedding_size: the width of token embeddings, which in a few models (opt-350m) is not that of hidden states.
    """

    path: str
    attribute: str
    returns_tuple: bool
    embedding_size: int

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.path)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        return cast(nn.ModuleList, getattr(self.decoder(model), self.attribute))


def find_block_stack(model: PreTrainedModel) -> BlockStack:
    """Find the decoder's list of blocks, in a model that may have towers for other things beside it.

    Raises:
        NoBlockStack: no module with `n_blocks` blocks can be started from hidden states (`inputs_embeds`).
    """
    from transformers import PreTrainedModel

    n = n_blocks(model.config)
    text: nn.Module = cast(Any, model).get_decoder()
    found: list[tuple[bool, int, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n:
            path = name.rpartition(".")[0]
            parent = model.get_submodule(path)
            if "inputs_embeds" in forward_parameters(parent):
                within_text = any(inner is parent for inner in text.modules())
                found.append((within_text, sum(p.numel() for p in module.parameters()), name))
    if not found:
        raise NoBlockStack(
            f"architecture {model.config.model_type!r} has no stack of {n} decoder blocks that starts from embeddings"
        )
    path, _, attribute = max(found)[2].rpartition(".")
    decoder = model.get_submodule(path)
    embedding = decoder.get_input_embeddings() if isinstance(decoder, PreTrainedModel) else None
    size = embedding.embedding_dim if isinstance(embedding, nn.Embedding) else hidden_size(model.config)
    return BlockStack(path, attribute, _blocks_return_tuple(decoder, attribute), size)


def punch_holes(model: PreTrainedModel, stack: BlockStack, owned: Collection[int]) -> None:
    """Replace every block outside `owned` by a Hole."""
    blocks = [
        block if i in owned else Hole(block, returns_tuple=stack.returns_tuple)
        for i, block in enumerate(stack.blocks(model))
    ]
    setattr(stack.decoder(model), stack.attribute, Blocks(blocks))


def drop_all_but_blocks(model: PreTrainedModel, stack: BlockStack) -> None:
    """Replace what surrounds the decoder (head, vision tower) and its token embeddings by Holes.

    Small things of the decoder stay (norms, rotary and position embeddings): its forward uses them.
    """
    inner: nn.Module = model
    for part in stack.path.split(".") if stack.path else []:
        for name, child in list(inner.named_children()):
            if name != part:
                setattr(inner, name, Hole(child))
        inner = inner.get_submodule(part)
    vocabulary = text_config(model.config).vocab_size
    for name, child in list(inner.named_children()):
        if isinstance(child, nn.Embedding) and child.num_embeddings >= vocabulary:
            setattr(inner, name, Hole(child))


def forget_broken_ties(model: PreTrainedModel) -> None:
    """Drop the tied-weight entries of which one end is in a hole now: transformers would look for it."""
    from transformers import PreTrainedModel

    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules():
        ties = getattr(module, "all_tied_weights_keys", None)
        if isinstance(module, PreTrainedModel) and ties:
            dot = f"{prefix}." if prefix else ""
            kept = {a: b for a, b in ties.items() if dot + a in there and dot + b in there}
            cast(Any, module).all_tied_weights_keys = kept


def holed_class(
    base: type[PreTrainedModel], hollow: Callable[[PreTrainedModel], None], *mixins: type
) -> type[PreTrainedModel]:
    """A subclass of `base` of the same name whose instances are made, then passed to `hollow`.

    The name stays because transformers goes by it (`"mamba" in type(model).__name__.lower()`).
    """

    def initialise(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        cast(Any, base).__init__(self, *args, **kwargs)
        hollow(self)
        forget_broken_ties(self)

    namespace = {"__init__": initialise, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return cast("type[PreTrainedModel]", type(base.__name__, (*mixins, base), namespace))


def forward_parameters(module: nn.Module) -> list[str]:
    """The names of the parameters of the module's forward, `self` first, seen through transformers' decorators."""
    return list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)


def copy_plain_attributes(source: nn.Module, target: nn.Module) -> None:
    """Copy the public attributes that are plain values, `training` excepted."""
    for name, value in vars(source).items():
        if not name.startswith("_") and name != "training" and isinstance(value, str | int | float | bool | None):
            setattr(target, name, value)


def _submodule(module: nn.Module, path: list[str]) -> nn.Module:
    """The submodule at `path`, made of empty modules where it is not there yet."""
    for name in path:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = cast(nn.Module, module._modules[name])
    return module


def _blocks_return_tuple(decoder: nn.Module, attribute: str) -> bool:
    """Does the decoder's loop take `[0]` of, or unpack, what a block returns? Read from its source.

    The loop is `for ... block ... in ... self.<attribute> ...:` with `x = block(...)` somewhere in its body.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(decoder).forward))))
    except (OSError, TypeError) as error:
        raise NoBlockStack(f"the source of {type(decoder).__name__} is not there to be read") from error
    for loop in (node for node in ast.walk(tree) if isinstance(node, ast.For)):
        if not any(isinstance(node, ast.Attribute) and node.attr == attribute for node in ast.walk(loop.iter)):
            continue
        names = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
        for node in ast.walk(loop):
            if isinstance(node, ast.Assign) and _calls(node.value, names, attribute):
                target = node.targets[0]
                if isinstance(target, ast.Tuple):
                    return True
                if isinstance(target, ast.Name):
                    return any(_takes_first(other, target.id) for other in ast.walk(loop))
    return False


def _calls(node: ast.expr, names: set[str], attribute: str) -> bool:
    """Is `node` the call of a loop variable, or of `self.<attribute>[...]`?"""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name):
        return node.func.id in names
    return (
        isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Attribute)
        and node.func.value.attr == attribute
    )


def _takes_first(node: ast.AST, name: str) -> bool:
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
        and isinstance(node.slice, ast.Constant)
        and node.slice.value == 0
    )


def meta_skeleton(cls: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """An instance of `cls` without memory for its weights: names, shapes and dtypes only."""
    with torch.device("meta"):
        return cls(config)
