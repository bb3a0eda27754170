"""Divergence of a model's predictions from those of the experts, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.evaluators.base import Batch, Inputs, Scores, evaluator, log_softmax, never, run
from workers.evaluators.reference import Ragged, ReferenceEvaluator, ReferenceOptions, item_means

_LEAST = 1e-12  # probability that all the classes that are not kept have at least; logarithms stay finite


@evaluator("divergence")
class Divergence(ReferenceEvaluator):
    """With p an expert's distribution over the classes (of a language model: over the next token, at each token of the
    text) and q the model's, in nats and averaged over the experts, and over a text's tokens:

    - ``js_divergence``: ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q), from 0 to ln 2: the objective of DivMerge (Touayouch
      et al., arXiv 2509.02108);
    - ``kl_divergence``: KL(p ‖ q), as in distillation;
    - ``agreement``: the share of predictions whose most likely class is the expert's.

    A text's weight is its number of tokens. Of vocabularies larger than ``top``, the expert's most likely tokens count one
    by one and all others as one: the divergences are then bounded from below, closely where an expert is sure.
    """

    summary: ClassVar[str] = "How far predictions are from those of the experts (DivMerge); needs no labels."
    metrics: Mapping[str, Direction] = {
        "js_divergence": "minimise",
        "kl_divergence": "minimise",
        "agreement": "maximise",
    }

    class Options(ReferenceOptions):
        """Options of divergence."""

        top: int | None = Field(
            default=1024,
            ge=1,
            le=1_000_000,
            description=(
                "Most classes or tokens of which a probability is kept for each prediction, 8 bytes each; all others count "
                "as one. None: all."
            ),
        )
        positions: int | None = Field(
            default=None,
            ge=1,
            le=1_000_000,
            description="Most tokens of a text at which predictions are compared, spread evenly; all by default.",
        )

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)

    def observe(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> dict[str, Tensor]:
        """See `ReferenceEvaluator.observe`."""
        return self._gather(model, lambda batch: self._look(model, batch), cancelled)

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a classifier or a causal language model."""
        answers = [(Ragged.read(found, "tokens"), Ragged.read(found, "likelihoods")) for found in self.answers.values()]
        found = run(model, self._batches, lambda model, batch: self._score(model, batch, answers), cancelled)
        weights = self.weights(self.options.positions)
        columns = zip(self.metrics, found.astype(np.float32), strict=True)
        return self.scored({metric: ItemScores(values, weights) for metric, values in columns})

    def _look(self, model: PreTrainedModel, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        outputs = self.outputs(model, batch, self.options.positions)
        likelihoods = log_softmax(outputs.logits)
        kept = min(self.options.top or likelihoods.shape[-1], likelihoods.shape[-1])
        values, tokens = likelihoods.topk(kept, dim=-1)
        return {"likelihoods": (values, outputs.counts), "tokens": (tokens.int(), outputs.counts)}

    def _score(self, model: PreTrainedModel, batch: Batch, answers: list[tuple[Ragged, Ragged]]) -> Tensor:
        outputs = self.outputs(model, batch, self.options.positions)
        likelihoods = log_softmax(outputs.logits)
        best = likelihoods.argmax(dim=-1)
        sound = likelihoods.isfinite().all(dim=-1)
        sums = torch.zeros(3, len(batch.items), dtype=torch.float64, device=likelihoods.device)
        for kept, values in answers:
            tokens = kept.take(batch.items).values.to(likelihoods.device, torch.int64)
            theirs = values.take(batch.items).values.to(likelihoods.device)
            whole = tokens.shape[-1] == likelihoods.shape[-1]
            p, q = (_with_rest(part.double(), whole) for part in (theirs, likelihoods.gather(-1, tokens)))
            middle = torch.logaddexp(p, q) - np.log(2)
            js = (_divergence(p, middle) + _divergence(q, middle)) / 2
            same = (best == tokens[:, 0]).double().where(sound, torch.nan)
            sums += torch.stack([item_means(part, outputs.counts) for part in (js, _divergence(p, q), same)])
        return sums / len(answers)


def _with_rest(likelihoods: Tensor, whole: bool) -> Tensor:
    """Add a last class for all that are missing; shape (predictions, classes), log-probabilities."""
    if whole:
        return likelihoods
    rest = (1 - likelihoods.exp().sum(dim=-1, keepdim=True)).clamp_min(_LEAST)
    return torch.cat([likelihoods, rest.log()], dim=-1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of each prediction, from log-probabilities."""
    return (p.exp() * (p - q)).sum(dim=-1)
