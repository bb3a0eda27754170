"""Consistency of what a language model writes with what the experts write, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel

from optimizer.errors import InvalidInput
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.evaluators.base import Batch, Inputs, Scores, evaluator, never
from workers.evaluators.likelihood import UNSCORED, LikelihoodScorer, Scored
from workers.evaluators.reference import Answers, Ragged, ReferenceEvaluator, ReferenceOptions


@evaluator("consistency")
class Consistency(ReferenceEvaluator):
    """Each text is a prompt, which every expert goes on with, most likely token by most likely token. Averaged over them:

    - ``consistency``: 1 if the model writes exactly the same, else 0;
    - ``prefix``: the share of the expert's tokens before the first that the model would not write;
    - ``loss``: the mean negative log-likelihood of the expert's tokens under the model, in nats: smooth.

    AdaMMS (Du et al., arXiv 2503.23733) chooses the coefficient whose generations change least from one merge to its
    neighbours. An evaluator sees one candidate at a time, so here the experts stand for the neighbours. What a model would
    write is read off one forward pass over prompt and expert's text: greedy writing follows it until the first token that
    is not the most likely one.
    """

    summary: ClassVar[str] = "How often a language model writes what the experts write (as AdaMMS); needs no labels."
    metrics: Mapping[str, Direction] = {"consistency": "maximise", "prefix": "maximise", "loss": "minimise"}
    columns: ClassVar[dict[str, str]] = {"text": "What the model is to go on with."}
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    uses_head: ClassVar[bool] = False

    class Options(ReferenceOptions):
        """Options of consistency."""

        max_new_tokens: int = Field(default=32, ge=1, le=100_000, description="Most tokens that an expert writes.")

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs, room=options.max_new_tokens)
        if self.kind != "causal_lm":
            raise InvalidInput(
                f"{self.name} needs a language model, not one for {self.kind}",
                field=f"{inputs.field}.evaluator",
                remedy="`divergence` has the metric `agreement` for classifiers",
            )
        self._ends = _ends(inputs.model_dir, self.config)
        self._scorers: list[LikelihoodScorer] = []

    def observe(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> dict[str, Tensor]:
        """See `ReferenceEvaluator.observe`."""
        return self._gather(model, lambda batch: {"written": self._write(model, batch)}, cancelled)

    def refer(self, answers: Mapping[str, Answers]) -> None:
        """See `ReferenceEvaluator.refer`."""
        super().refer(answers)
        written = [Ragged.read(found, "written").split() for found in answers.values()]
        self._scorers = [self._scorer(texts) for texts in written]
        self.tokens = sum(scorer.tokens for scorer in self._scorers)

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a causal language model."""
        experts = len(self.answers)
        found = sum(scorer.scores(model, _compare, cancelled) for scorer in self._scorers) / experts
        columns = zip(self.metrics, np.asarray(found, dtype=np.float32), strict=True)
        return self.scored({metric: ItemScores(values) for metric, values in columns})

    def _scorer(self, written: Sequence[Tensor]) -> LikelihoodScorer:
        sequences = [Scored(ids + text.tolist(), len(ids)) for ids, text in zip(self._prompts(), written, strict=True)]
        made = self._inputs
        return LikelihoodScorer(sequences, self.config, made.model_dir, made.field, self.options.batch_size)

    def _prompts(self) -> list[list[int]]:
        out: list[list[int]] = [[]] * len(self)
        for batch in self._batches:
            for item, ids in zip(batch.items, batch.inputs["input_ids"], strict=True):
                out[item] = ids[: self._lengths[item]].tolist()
        return out

    def _write(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Let a model go on with a batch's prompts; returns the tokens one text after the other, and their counts."""
        lengths = self._lengths[batch.items]
        width = batch.inputs["input_ids"].shape[1]
        # On the left, so that every row's next token stands behind its last.
        ids = torch.stack(
            [row.roll(width - int(length)) for row, length in zip(batch.inputs["input_ids"], lengths, strict=True)]
        )
        mask = torch.arange(width) >= width - torch.from_numpy(lengths)[:, None]
        fill = self._ends[0] if self._ends else 0
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.options.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self._ends or None,
            pad_token_id=fill,
        )
        found: Any = model.generate(  # type: ignore[operator]
            ids.to(model.device), attention_mask=mask.long().to(model.device), generation_config=config
        )
        texts = [_until(row, self._ends) for row in found[:, width:].cpu()]
        return torch.cat(texts).int(), torch.tensor([len(text) for text in texts])


def _compare(logits: Tensor, targets: Tensor) -> Tensor:
    """Return consistency, shared prefix and mean loss of a batch, shape (3, batch)."""
    scored = targets != UNSCORED
    counts = scored.sum(dim=1)
    nats = cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="none").view(
        targets.shape
    )
    sound = (logits.isfinite().all(dim=-1) | ~scored).all(dim=1)
    right = (logits.argmax(dim=-1) == targets) & scored
    agreed = ((right | ~scored).long().cumprod(dim=1) * scored).sum(dim=1)
    loss = nats.double().sum(dim=1) / counts
    text = torch.stack([(agreed == counts).double(), agreed / counts.double()]).where(sound, torch.nan)
    return torch.cat([text, loss[None]])


def _until(written: Tensor, ends: Sequence[int]) -> Tensor:
    """Return a text up to the first token that ends it, that one included."""
    found = torch.isin(written, torch.tensor(ends, dtype=written.dtype)).nonzero()
    return written[: int(found[0]) + 1] if len(found) else written


def _ends(model_dir: Path, config: Any) -> list[int]:
    """Return the tokens that end a text: those of ``generation_config.json``, else of the config."""
    found = config.get_text_config().eos_token_id
    if (model_dir / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(str(model_dir)).eos_token_id or found
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]
