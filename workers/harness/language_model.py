"""The harness's Hugging Face language model over a model that is in memory already, and stays the caller's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from workers.evaluators.base import Cancelled, inference, never

Encoded = tuple[Any, list[int], list[int]]
"""A request as the harness encodes it: what it was made from, tokens of the context, tokens that are scored."""


class ResidentLM(HFLM):  # type: ignore[misc]
    """Scores and generates with whatever model `on` lends it; what does not depend on weights is done once.

    Only what surrounds the harness's own computations is added: texts are tokenised once, `Cancelled` is raised between
    batches and between generated tokens, tokens are counted, and progress bars are off. Log-softmax is in float32 for models
    in half precision; in float32 that is what the harness does anyway.

    Args:
        tokenizer: the checkpoint's; it may get a padding token.
        config: the checkpoint's.
        model_dir: where its generation config may be.
        batch_size: most requests in a batch.
        max_length: longest sequence in tokens; the model's limit by default.
        add_bos_token: whether texts begin with the BOS token; what the tokenizer does by default.

    Attributes:
        tokens: that the model lent last has read and written, padding not counted.
        broken: whether it predicted NaN while it generated.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PreTrainedConfig,
        model_dir: Path,
        batch_size: int,
        max_length: int | None,
        add_bos_token: bool | None,
    ) -> None:
        self._absent = SimpleNamespace(config=config, device=torch.device("cpu"))
        super().__init__(
            pretrained=self._absent,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
            softmax_dtype="float32",
        )
        written = (model_dir / "generation_config.json").is_file()
        self._generation = GenerationConfig.from_pretrained(model_dir) if written else None
        self._encoded: dict[tuple[Any, ...], list[int]] = {}
        self._cancelled: Callable[[], bool] = never
        self.tokens = 0
        self.broken = False

    @contextmanager
    def on(self, model: PreTrainedModel, cancelled: Callable[[], bool]) -> Iterator[None]:
        """Use a model while the block runs; it is left as it was."""
        self._model: Any = model
        self._device, self._cancelled = model.device, cancelled
        self.tokens, self.broken = 0, False
        try:
            with inference(model):
                yield
        finally:
            self._model = self._absent
            self._device, self._cancelled = self._absent.device, never

    def encoded(self) -> Collection[list[int]]:
        """Return the tokens of all texts so far."""
        return self._encoded.values()

    def check_generation(self, arguments: dict[str, Any]) -> None:
        """Raise ValueError where an answer of that length leaves no room for the question."""
        asked = normalize_gen_kwargs(arguments, self.max_gen_toks)["max_gen_toks"]
        if not 0 < asked < self.max_length:
            raise ValueError(f"an answer of {asked} tokens leaves no room within the model's {self.max_length}")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """See the harness; the tokens of a text are kept."""
        key = (string, add_special_tokens, left_truncate_len, *kwargs.items())
        if key not in self._encoded:
            self._encoded[key] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return list(self._encoded[key])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: ARG002
        """See the harness."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """See the harness."""
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """See the harness."""
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Encoded],
        disable_tqdm: bool = True,  # noqa: ARG002
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # The model reads once what several requests have in common up to the last token.
        read = {tuple(context + scored[:-1]) for _, context, scored in requests}
        self.tokens += sum(min(len(ids), self.max_length) for ids in read)
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=True, override_bs=override_bs
        )
        return answers

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self._check()
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **arguments: Any) -> Tensor:
        self._check()
        watch = _Watch(self._check)
        if self._generation is not None:
            arguments["generation_config"] = self._generation
        out: Tensor = super()._model_generate(
            context, max_length, stop, logits_processor=LogitsProcessorList([watch]), **arguments
        )
        ends = torch.tensor(sorted({self.tokenizer.pad_token_id, self.eot_token_id}), device=out.device)
        going = ~torch.isin(out[:, context.shape[1] :], ends)
        written = going.long().cumprod(dim=1).sum() + (~going).any(dim=1).sum()
        self.tokens += int(arguments["attention_mask"].sum() + written)
        self.broken = self.broken or watch.broken
        return out

    def _check(self) -> None:
        if self._cancelled():
            raise Cancelled("the evaluation was called off")


class _Watch(LogitsProcessor):
    """Changes nothing: looks for NaN, and whether the evaluation was called off, before every token."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._found: Tensor | None = None
        self._steps = 0

    def __call__(self, _: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._steps:  # the first token's batch was checked when it began
            self._check()
        self._steps += 1
        found = scores.isnan().any()
        self._found = found if self._found is None else self._found | found
        return scores

    @property
    def broken(self) -> bool:
        """Whether a prediction was NaN."""
        return self._found is not None and bool(self._found)
