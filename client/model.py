"""`SwarmModelForCausalLM`: a Hugging Face causal language model whose blocks are served by a swarm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from client.chain import Link
from client.config import ClientConfig
from client.conversation import GenerationSession, max_cached
from client.corrections import MOST_TRIES, Seed, Tracked
from client.drafters import Draft, Drafter, Lookup, is_plain_draft, load_draft
from client.lm_head import SharedHead
from client.own_blocks import OwnBlocks
from client.remote import RemoteBlocks, Reservation
from client.speculation import Loop, can_speculate
from client.stats import SessionStats
from client.swarm import Swarm
from client.trace import Trace
from client.window import Window
from protocol.errors import ConfigError, Doubted
from slicing import (
    Head,
    ModelSource,
    Progress,
    RemoteCache,
    fingerprint,
    hasten,
    is_routed,
    load_config,
    load_head,
    n_blocks,
    resolve,
)
from slicing.skeleton import forward_parameters

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)


class _Here(threading.local):
    """What belongs to one of the threads that use a model."""

    session: GenerationSession | None = None
    cache: RemoteCache | None = None  # of the answer under way


class SwarmModel(Head):  # type: ignore[no-untyped-call]  # transformers' __init_subclass__
    """What `SwarmModelForCausalLM.from_pretrained` gives: an instance of the architecture's class, and of this one.

    `generate`, `forward` and the rest are Hugging Face's. Use it as a context manager, or `close` it. Several threads
    may generate at the same time: the swarm, and the head where it can, compute their answers together.

    Attributes:
        speculates: may steps carry guesses at the next tokens? See `ClientConfig.speculate`.
        draft: a local model that makes the guesses; None: they are looked up in the text so far.
    """

    swarm: Swarm
    source: ModelSource
    blocks: RemoteBlocks
    speculates: bool
    draft: PreTrainedModel | None
    _window: Window
    _owns_swarm: bool
    _here: _Here

    @contextmanager
    def session(self, max_tokens: int = 0) -> Iterator[GenerationSession]:
        """Within this context `generate` goes on where it was: only tokens that the peers do not have are sent.

        That is so in the thread that opened it; in others, `generate(..., session=...)` takes it.

        Args:
            max_tokens: per row, over the whole conversation; reserved on the peers at the start. 0: as it grows.

        Raises:
            RuntimeError: this thread has opened a session of this model already.
        """
        if self._here.session is not None:
            raise RuntimeError("a session of this model is open already; use one at a time")
        self._here.session = session = GenerationSession(max_tokens, max_cached(self.config))
        try:
            yield session
        finally:
            self._here.session = None
            self.blocks.release(session.cache)

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        *,
        session: GenerationSession | None = None,
        corrects: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's `generate`; within `session()` it continues the session.

        Where a peer is found to lie, the answer is made again by others, from the same random numbers. `on_event` is
        told which token is the first one in doubt, and a streamer as `client.corrections.Tracked` says.

        Args:
            session: to be continued, where another thread has opened it.
            corrects: make the answer again; false: raise `Doubted`.

        Raises:
            Doubted: the answer is wrong, and cannot be made again: the caller's own cache is in doubt, or it was made
                anew often enough.
        """
        name = "cache_params" if "cache_params" in forward_parameters(self) else "past_key_values"  # mamba's
        given = inputs if inputs is not None else kwargs.get("input_ids")
        session = session or self._here.session
        if name in kwargs or not corrects:
            return self._answer(inputs, given, name, session, kwargs)
        seed, tracked = Seed(self.device), None
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = tracked = Tracked(kwargs["streamer"])
        for left in reversed(range(MOST_TRIES)):
            try:
                return self._answer(inputs, given, name, session, kwargs)
            except Doubted as doubt:
                if not left:
                    raise
                first = max(0, doubt.position + 1 - (0 if given is None else given.shape[1]))
                self.blocks.on_event(f"the answer is wrong from its token {first} on, and is made again")
                if tracked is not None:
                    tracked.begin_anew(first)
            seed.restore()
        raise AssertionError("the last try returns or raises")

    def _answer(
        self, inputs: Tensor | None, given: Tensor | None, name: str, session: GenerationSession | None, kwargs: Any
    ) -> Any:
        """One answer, of which nothing is known that speaks against it."""
        try:
            output = self._continued(inputs, given, name, session, kwargs)
            if self._here.cache is not None:
                self.blocks.settle(self._here.cache)
            return output
        except Doubted:
            if session is not None:
                self.blocks.release(session.cache)
                session.note(None)
            raise
        finally:
            self._here.cache = None

    def _continued(
        self, inputs: Tensor | None, given: Tensor | None, name: str, session: GenerationSession | None, kwargs: Any
    ) -> Any:
        generate = cast(Any, super()).generate
        if session is None or given is None or name in kwargs:
            return generate(inputs, **kwargs)
        output = generate(inputs, **{name: session.align(given)}, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        session.note(sequences if self._rows_kept(sequences, given, kwargs) else None)
        return output

    def _rows_kept(self, sequences: Tensor, given: Tensor, kwargs: dict[str, Any]) -> bool:
        """Is row i of the peers' caches still row i of the answer? Not after beam search."""
        config: GenerationConfig = kwargs.get("generation_config") or self.generation_config
        beams = kwargs.get("num_beams") or config.num_beams or 1
        return beams == 1 and sequences.shape[0] == given.shape[0]

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        for cache in model_kwargs.values():
            if isinstance(cache, RemoteCache):
                self._here.cache = cache
                cache.handle = cache.handle or Reservation(int(generation_config.max_length or 0))

    # ------------------------------------------------------------------ decoding; transformers' names, semi-private

    def _sample(self, input_ids: Tensor, **arguments: Any) -> Any:  # type: ignore[override]
        """transformers' greedy and sampling loop; ours where guesses may save round trips."""
        return self._decode(input_ids, self.draft, cast(Any, super())._sample, arguments)

    def _assisted_decoding(  # type: ignore[override]
        self, input_ids: Tensor, inputs_tensor: Tensor | None = None, assistant_model: Any = None, **arguments: Any
    ) -> Any:
        """transformers' assisted loop; ours for a greedy answer that a draft model with the same tokenizer assists."""
        config = arguments["generation_config"]
        assisted = cast(Any, super())._assisted_decoding
        others = (config.prompt_lookup_num_tokens, config.assistant_early_exit, config.assistant_ensemble_weight)
        if (
            config.do_sample
            or config.use_mtp
            or assistant_model is None
            or any(other is not None for other in others)
            or arguments.get("assistant_tokenizer") is not None
            or not is_plain_draft(assistant_model)
        ):
            return assisted(input_ids, inputs_tensor=inputs_tensor, assistant_model=assistant_model, **arguments)

        def plain(input_ids: Tensor, **arguments: Any) -> Any:
            return assisted(input_ids, inputs_tensor=inputs_tensor, assistant_model=assistant_model, **arguments)

        return self._decode(input_ids, assistant_model, plain, arguments)

    def _decode(self, input_ids: Tensor, draft: Any, plain: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The speculating loop where it can make this answer, else `plain`."""
        config, synced = arguments["generation_config"], bool(arguments.get("synced_gpus"))
        most = max_cached(self.config)
        if not self.speculates or most == 0 or not can_speculate(self, input_ids, config, arguments, synced):
            return plain(input_ids, **arguments)
        rest = dict(arguments)
        processor, criteria = rest.pop("logits_processor"), rest.pop("stopping_criteria")
        streamer = rest.pop("streamer", None)
        for name in ("generation_config", "synced_gpus", "tokenizer"):
            rest.pop(name, None)
        drafter: Drafter = Lookup()
        if draft is not None and rest.get("inputs_embeds") is None:
            drafter = Draft(draft)
        loop = Loop(self._window.begin(), drafter, self._stats_of, most)
        return loop.run(self, input_ids, processor, criteria, config, streamer, rest)

    def _stats_of(self, cache: RemoteCache) -> SessionStats | None:
        session = self.blocks.session_of(cache)
        return None if session is None else session.stats

    @property
    def chain(self) -> tuple[Link, ...]:
        """The chain that answered last; of several answers at once, any."""
        return self.blocks.last_chain

    def summary(self) -> str:
        """One sentence on the session that was used last: its chain, steps, time per step, reroutes."""
        return self.blocks.summary()

    def trace(self) -> Trace:
        """What became of the steps of the session that was used last, hop by hop."""
        return self.blocks.last_record.trace()

    def close(self) -> None:
        """Leaves the swarm, if this model joined it by itself."""
        if self._owns_swarm:
            self.swarm.close()

    def __enter__(self) -> SwarmModel:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class SwarmModelForCausalLM:
    """Makes Hugging Face models whose blocks are remote; named as transformers' auto classes are."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        *,
        join: Sequence[str] = (),
        swarm: Swarm | None = None,
        config: ClientConfig | None = None,
        progress: Progress | None = None,
        on_event: Callable[[str], None] = logger.info,
        **settings: Any,
    ) -> SwarmModel:
        """A model of a swarm, ready to `generate`.

        Args:
            model: hub id, local folder or potluck-demo; None: the swarm's only model.
            join: addresses of the swarm; none: as found, see `dht.locate`.
            swarm: a swarm that is joined already; it stays open when the model is closed.
            config: all settings at once; or single ones as keywords (`codec="none"`, `avoid=["aB3dEf9h"]`, ...).
            progress: told as the head's tensors are read.
            on_event: told, in one sentence, when a chain changes or when a session waits for peers.

        Raises:
            SwarmNotFound: no swarm was named or found.
            ModelError: the model cannot be used; or none was named and the swarm has not just one.
            ConfigError: a setting is unknown or out of range, or the draft model does not fit.
        """
        try:
            listed: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
            config = replace(config or ClientConfig(), **listed).with_lists()
        except TypeError as error:
            raise ConfigError(f"unknown setting: {error}") from error
        config = replace(config, join=tuple(join) or config.join, model=model or config.model)
        joined = swarm or Swarm.connect(config)
        try:
            return _build(joined, config, progress, on_event, owns_swarm=swarm is None)
        except BaseException:
            if swarm is None:
                joined.close()
            raise


def _build(
    swarm: Swarm,
    config: ClientConfig,
    progress: Progress | None,
    on_event: Callable[[str], None],
    *,
    owns_swarm: bool,
) -> SwarmModel:
    source = resolve(config.model or swarm.only_model())
    dtype = None if config.dtype == "auto" else cast(torch.dtype, getattr(torch, config.dtype))
    head = load_head(source, dtype=dtype, device=config.device, progress=progress)
    architecture = load_config(source)
    total, own = n_blocks(architecture), None
    if config.audit_blocks is not None:
        own = OwnBlocks.load(source, config.audit_blocks, total, dtype, config.device, progress)
    blocks = RemoteBlocks(swarm, fingerprint(source), total, config, on_event, own, is_routed=is_routed(architecture))
    hasten(head, torch.get_num_threads())
    head.attach(blocks)
    # The architecture's class first in name, SwarmModel first in behaviour.
    kind = type(head)
    head.__class__ = type(kind.__name__, (SwarmModel, kind), {"__module__": kind.__module__})
    model = cast(SwarmModel, head)
    model.swarm, model.source, model.blocks = swarm, source, blocks
    model._owns_swarm, model._here = owns_swarm, _Here()
    shared = SharedHead.of(model)
    if shared is not None:
        blocks.on_results = shared.expect
    model.speculates, model.draft, model._window = config.speculate == "auto", None, Window()
    if config.draft is not None:
        model.draft = load_draft(config.draft, model)
    return model
