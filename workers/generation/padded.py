"""Answers in batches of prompts of similar length, padded on the left, through `generate` of transformers.

When half of a batch's answers have ended, the others go on without them: their keys and values stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from workers.evaluators.base import Cancelled, by_length
from workers.generation.answers import Answer, Decoding, item_seed

_MAX_PADDED = 2**17
"""Most tokens of a batch, answers counted at their longest: keys and values take the memory."""


@dataclass
class _Row:
    """An answer that is being written.

    Attributes:
        noise: of sampling; None takes the most likely token.
        end: how many tokens it has, once it ended.
    """

    item: int
    prompt: Sequence[int]
    noise: torch.Generator | None
    end: int | None = None
    finished: bool = False
    sound: bool = True
    written: list[int] = field(default_factory=list)


@dataclass
class _State:
    """What the processors and criteria of one call of `generate` share.

    Attributes:
        rows: those of the batch, in its order.
        start: tokens before the answers, padding counted.
        droppable: whether a batch may stop early to go on without the rows that ended.
    """

    rows: list[_Row]
    start: int
    decoding: Decoding
    tokenizer: PreTrainedTokenizerBase
    cancelled: Callable[[], bool]
    droppable: bool


class PaddedWriter:
    """See the module.

    Args:
        decoding: how.
        tokenizer: reads stop texts.
    """

    def __init__(self, decoding: Decoding, tokenizer: PreTrainedTokenizerBase) -> None:
        self._decoding = decoding
        self._tokenizer = tokenizer

    def __call__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], cancelled: Callable[[], bool]
    ) -> list[Answer]:
        """See `Writer`."""
        lengths = [len(prompt) + self._decoding.max_new_tokens for prompt in prompts]
        out: dict[int, Answer] = {}
        for items in by_length(lengths, self._decoding.batch_size, _MAX_PADDED):
            if cancelled():
                raise Cancelled("the evaluation was called off")
            rows = [_Row(int(item), prompts[item], self._noise(prompts[item])) for item in items]
            self._write(model, rows, cancelled)
            out |= {row.item: Answer(row.written, row.finished, row.sound) for row in rows}
        return [out[item] for item in range(len(prompts))]

    def _noise(self, prompt: Sequence[int]) -> torch.Generator | None:
        if not self._decoding.temperature:
            return None
        return torch.Generator().manual_seed(item_seed(self._decoding.seed, prompt))

    def _write(self, model: PreTrainedModel, rows: list[_Row], cancelled: Callable[[], bool]) -> None:
        """Let all rows be written; the results stay in them."""
        ids, mask = _left_padded([row.prompt for row in rows], self._decoding.pad, model.device)
        start, cache, droppable = ids.shape[1], None, _droppable(model)
        while rows:
            state = _State(rows, start, self._decoding, self._tokenizer, cancelled, droppable)
            found: Any = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                generation_config=self._config(start + self._decoding.max_new_tokens - ids.shape[1]),
                logits_processor=LogitsProcessorList(self._processors(state)),
                stopping_criteria=StoppingCriteriaList([_Progress(state)]),
                **({} if cache is None else {"past_key_values": cache}),
            )
            ids = found.sequences
            keep = [number for number, row in enumerate(rows) if row.end is None]
            for row, line in zip(rows, ids[:, start:].tolist(), strict=True):
                row.written = line[: row.end]
            if not keep or ids.shape[1] - start >= self._decoding.max_new_tokens:
                return
            chosen = torch.tensor(keep, device=ids.device)
            rows, ids = [rows[number] for number in keep], ids[chosen]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], ids.shape[1] - mask.shape[1])], dim=1)[chosen]
            cache = found.past_key_values
            cache.batch_select_indices(chosen)

    def _config(self, tokens: int) -> GenerationConfig:
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=True,
            repetition_penalty=1.0,
            eos_token_id=list(self._decoding.end) or None,
            pad_token_id=self._decoding.pad,
        )

    def _processors(self, state: _State) -> list[LogitsProcessor]:
        out: list[LogitsProcessor] = [_Soundness(state)]
        if not self._decoding.temperature:
            return out
        out.append(TemperatureLogitsWarper(self._decoding.temperature))
        if self._decoding.top_k:
            out.append(TopKLogitsWarper(self._decoding.top_k))
        if self._decoding.top_p < 1:
            out.append(TopPLogitsWarper(self._decoding.top_p))
        return [*out, _Noise(state)]


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids.to(device), mask.to(device)


def _droppable(model: PreTrainedModel) -> bool:
    """Whether rows can be taken out of what a model keeps of its past: plain attention, no recurrent states."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    plain = all(str(kind).endswith("attention") and not str(kind).startswith("linear") for kind in kinds)
    return plain and "past_key_values" in inspect.signature(model.forward).parameters


class _Soundness(LogitsProcessor):
    """Notes rows whose scores are not numbers: their most likely token is an arbitrary one."""

    def __init__(self, state: _State) -> None:
        self._state = state

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `LogitsProcessor`."""
        del input_ids
        bad = scores.isnan().any(dim=1) | (scores.amax(dim=1) == torch.inf)
        for row, broken in zip(self._state.rows, bad.tolist(), strict=True):
            row.sound &= not broken or row.end is not None
        return scores


class _Noise(LogitsProcessor):
    """Adds Gumbel noise to scores, so that the highest one is a sample of their softmax: each row has its own generator.

    On the CPU, so that every device draws the same.
    """

    def __init__(self, state: _State) -> None:
        self._state = state

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `LogitsProcessor`."""
        del input_ids
        uniform = torch.stack([torch.rand(scores.shape[1], generator=row.noise) for row in self._state.rows])
        gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))
        return scores.float() + gumbel.to(scores.device)


class _Progress(StoppingCriteria):
    """Notes which answers have ended, and ends the call when enough have; raises `Cancelled`."""

    def __init__(self, state: _State) -> None:
        self._state = state
        decoding = state.decoding
        # A token stands for a byte at least, so a stop text that has just been written is within so many tokens.
        self._window = max((len(text.encode()) for text in decoding.stop), default=0) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """See `StoppingCriteria`."""
        del scores, kwargs
        state = self._state
        if state.cancelled():
            raise Cancelled("the evaluation was called off")
        count = input_ids.shape[1] - state.start
        lines = input_ids[:, -min(count, self._window) :].tolist()
        for row, line in zip(state.rows, lines, strict=True):
            if row.end is None and (line[-1] in state.decoding.end or self._stopped(line)):
                row.end, row.finished = count, True
        ended = [row.end is not None for row in state.rows]
        if state.droppable and 2 * sum(ended) >= len(ended):
            ended = [True] * len(ended)
        return torch.tensor(ended, device=input_ids.device)

    def _stopped(self, line: list[int]) -> bool:
        if not self._state.decoding.stop:
            return False
        text = self._state.tokenizer.decode(line, skip_special_tokens=True)
        return any(stop in text for stop in self._state.decoding.stop)
