"""Prediction entropy: how sure a model is of its predictions, without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.evaluators.base import Batch, Inputs, Scores, evaluator, log_softmax, never, run
from workers.evaluators.reference import item_means
from workers.evaluators.unlabelled import Unlabelled, UnlabelledOptions


@evaluator("entropy")
class Entropy(Unlabelled):
    """With H the Shannon entropy of a prediction in nats, per item:

    - ``entropy``: H of a classifier; of a language model the mean over the text's tokens, weight: their number. The label-
      free objective of AdaMerging (Yang et al., arXiv 2310.02575);
    - ``confidence``: the mean probability of the most likely class or token.

    A model that is sure of one and the same class everywhere has the lowest entropy of all: search within bounds, or beside
    a measure that notices (`divergence`).
    """

    summary: ClassVar[str] = "How unsure a classifier or language model is of what it predicts (AdaMerging); no labels."
    metrics: Mapping[str, Direction] = {"entropy": "minimise", "confidence": "maximise"}

    class Options(UnlabelledOptions):
        """Options of prediction entropy."""

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a classifier or a causal language model."""
        found = run(model, self._batches, self._score, cancelled).astype(np.float32)
        weights = self.weights()
        scores = {metric: ItemScores(row, weights) for metric, row in zip(self.metrics, found, strict=True)}
        return self.scored(scores)

    def _score(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        outputs = self.outputs(model, batch)
        likelihoods = log_softmax(outputs.logits)
        shares = likelihoods.exp()
        entropy = -(shares * likelihoods.clamp_min(-math.inf if likelihoods.isnan().any() else -1e4)).sum(dim=-1)
        return torch.stack([item_means(values, outputs.counts) for values in (entropy, shares.max(dim=-1).values)])
