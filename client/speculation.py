"""Several tokens per round trip: the decode loop that lets the swarm check guesses; `client.drafters` makes them.

The one place that knows transformers' decode loop from within (`GenerationMixin._prefill`,
`prepare_inputs_for_generation`, `_update_model_kwargs_for_generation`, all semi-private). Its own assisted decoding is
not used: here each token is chosen, streamed and checked against the stopping criteria by itself, in order, as in the
plain loop. So an answer is the plain loop's token for token, a sampled one from the same seed too: a guess is kept if
it is what would have been drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from client.drafters import Drafter
from client.stats import SessionStats
from client.window import MOST_GUESSES, Window
from slicing import RemoteCache


def can_speculate(model: Any, ids: Tensor, config: Any, kwargs: dict[str, Any], synced_gpus: bool) -> bool:
    """Is this an answer that `Loop` can make: one row, a cache that can be cropped, nothing asked for but its tokens?

    Scores and states are left to the plain loop: their last bits depend on how many tokens a step has.
    """
    wants_more = config.return_dict_in_generate and (
        config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states
    )
    return (
        ids.shape[0] == 1
        and isinstance(kwargs.get("past_key_values"), RemoteCache)
        and bool(kwargs.get("use_cache"))
        and not (synced_gpus or wants_more or config.is_assistant or model._is_stateful)
    )


@dataclass
class Loop:
    """One answer's decode loop.

    Attributes:
        window: the rule for this answer, which learns.
        drafter: who guesses.
        stats: what the session did so far; asked before and after each step.
        max_cached: from so many tokens on the cache cannot be cropped; None: it always can.
    """

    window: Window
    drafter: Drafter
    stats: Callable[[RemoteCache], SessionStats | None]
    max_cached: int | None = None
    _step_s: float = field(default=0.0, init=False)  # of the last step
    _work_s: float = field(default=0.0, init=False)  # of these, computation

    def run(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """As `GenerationMixin._sample`, for one row: int64 [1, n], or transformers' output where that is asked for."""
        cache: RemoteCache = model_kwargs["past_key_values"]
        eos = getattr(generation_config, "_eos_token_tensor", None)
        ends = frozenset(() if eos is None else eos.flatten().tolist())
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        guessed: list[int] = []
        is_first = True
        while True:
            logits = outputs.logits[:, -len(guessed) - 1 :].to(copy=True, dtype=torch.float32, device=input_ids.device)
            chosen: list[int] = []
            finished = False
            for index in range(len(guessed) + 1):
                scores = logits_processor(input_ids, logits[:, index])
                token = _choose(scores, sample=bool(generation_config.do_sample))
                input_ids = torch.cat([input_ids, token[:, None]], dim=-1)
                chosen.append(int(token))
                finished = bool(stopping_criteria(input_ids, None).all())
                if streamer is not None:
                    streamer.put(token.cpu())
                if finished or index == len(guessed) or chosen[-1] != guessed[index]:
                    break
            right = len(chosen) - 1
            if right < len(guessed):
                cache.crop(right - len(guessed))
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=len(chosen)
            )
            if not is_first:
                self._learn(chosen, guessed, finished)
            if finished:
                break
            is_first = False
            guessed = self._guess(input_ids, cache, generation_config.max_length, ends)
            outputs = self._step(model, input_ids, guessed, cache, model_kwargs)
        if streamer is not None:
            streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=cast(Any, input_ids), past_key_values=cache)
        return input_ids

    def _guess(self, ids: Tensor, cache: RemoteCache, max_length: int, ends: frozenset[int]) -> list[int]:
        """Nothing is guessed beyond the answer's longest length, an end, or what can be cropped."""
        limit = min(MOST_GUESSES, max_length - ids.shape[1] - 1)
        if self.max_cached is not None:
            limit = min(limit, self.max_cached - cache.n_tokens - 2)
        tokens = self.drafter.guess(ids, self.window, max(0, limit))
        first_end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[: first_end + 1]

    def _step(self, model: Any, ids: Tensor, guessed: list[int], cache: RemoteCache, kwargs: dict[str, Any]) -> Any:
        before, started_s = self._busy(cache), time.perf_counter()
        length = len(guessed) + 1
        if guessed:
            ids = torch.cat([ids, torch.tensor([guessed], dtype=ids.dtype, device=ids.device)], dim=-1)
            kwargs = _longer(kwargs, len(guessed))
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=length, **kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = length
        outputs = model(**inputs, return_dict=True)
        self._step_s = time.perf_counter() - started_s
        after = self._busy(cache)
        network_s = (after[0] - before[0]) - (after[1] - before[1])
        self._work_s = min(max(0.0, self._step_s - network_s), self._step_s)
        return outputs

    def _busy(self, cache: RemoteCache) -> tuple[float, float]:
        """Seconds in steps so far, and of these in the peers' computation."""
        stats = self.stats(cache)
        return (0.0, 0.0) if stats is None else (stats.busy_s, stats.compute_s)

    def _learn(self, chosen: list[int], guessed: list[int], finished: bool) -> None:
        right = len(chosen) - 1
        self.window.note_step(len(guessed), right, self._step_s, self._work_s, self.drafter.draft_s)
        # An answer that ended among right guesses says nothing against those after its end.
        was_right = right + int(finished and right < len(guessed) and chosen[-1] == guessed[right])
        judged = was_right if finished and was_right > right else len(guessed)
        self.drafter.learn(self.window, chosen, judged, was_right)


def _choose(scores: Tensor, *, sample: bool) -> Tensor:
    """The next token, int64 [1], of scores [1, vocabulary]; drawn as the plain loop draws it."""
    if sample:
        return torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
    return scores.argmax(dim=-1)


def _longer(kwargs: dict[str, Any], guesses: int) -> dict[str, Any]:
    """The loop's keywords for a step with so many more tokens; what was given stays as it is."""
    longer = dict(kwargs)
    if (mask := kwargs.get("attention_mask")) is not None:
        longer["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], guesses))], dim=-1)
    if (positions := kwargs.get("position_ids")) is not None:
        shape = [1] * (positions.dim() - 1) + [-1]
        more = torch.arange(1, guesses + 1, dtype=positions.dtype, device=positions.device).view(shape)
        longer["position_ids"] = torch.cat([positions, positions[..., -1:] + more], dim=-1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if (types := kwargs.get(name)) is not None:
            last = types[:, -1:] if name == "token_type_ids" else types.new_zeros((types.shape[0], 1))
            longer[name] = torch.cat([types, last.expand(-1, guesses)], dim=-1)
    return longer
