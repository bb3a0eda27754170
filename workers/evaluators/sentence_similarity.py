"""Sentence similarity: whether the cosines of embeddings follow scores that people gave to pairs of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field
from transformers import PreTrainedModel

from optimizer.errors import InvalidInput
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.evaluators import contributions
from workers.evaluators.base import Evaluator, Inputs, Scores, evaluator, never
from workers.evaluators.embedding import Embedder, EmbeddingOptions
from workers.evaluators.regression import labels_of


@evaluator("sentence_similarity")
class SentenceSimilarity(Evaluator):
    """Each pair of texts is an item. With s the cosine of its embeddings:

    - ``spearman``, ``pearson``: what the pair contributes to the correlation, of ranks or of values, between s and the
      scores (`workers.evaluators.contributions`); STS benchmarks report Spearman's;
    - ``loss``: (s − t)², where t is the score brought from [``low``, ``high``] to [0, 1]: smooth, and a mean over pairs, as
      sentence-transformers' cosine similarity loss.
    """

    summary: ClassVar[str] = "Whether embeddings of two texts are as similar as people found the texts to be (STS)."
    metrics: Mapping[str, Direction] = {"spearman": "maximise", "pearson": "maximise", "loss": "minimise"}
    whole_only = frozenset({"spearman", "pearson"})
    columns: ClassVar[dict[str, str]] = {
        "text": "The first text.",
        "text_pair": "The second text.",
        "score": "How similar they are: a number from `low` to `high`.",
    }
    auto_class: ClassVar[str] = "AutoModel"
    uses_head: ClassVar[bool] = False

    class Options(EmbeddingOptions):
        """Options of sentence similarity."""

        prefix: str = Field(default="", max_length=10_000, description="Stands before each text.", examples=["query: "])
        low: float = Field(default=0.0, ge=-1e6, le=1e6, description="Score of texts that have nothing in common.")
        high: float = Field(default=5.0, ge=-1e6, le=1e6, description="Score of texts that mean the same.")

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        if options.low >= options.high:
            raise InvalidInput(
                f"the lowest score, {options.low:g}, must be below the highest, {options.high:g}",
                field=f"{inputs.field}.options.low",
            )
        rows = inputs.rows
        scores = labels_of(rows, "score")
        for row, score in enumerate(scores):
            if not options.low <= score <= options.high:
                raise rows.error(
                    "score",
                    row,
                    f"{score:g} is not from {options.low:g} to {options.high:g}",
                    remedy="set the options `low` and `high` to the scale of the scores",
                )
        self._scores = (scores - options.low) / (options.high - options.low)
        pairs = [rows.texts(role) for role in ("text", "text_pair")]
        texts = [options.prefix + text for texts in pairs for text in texts]
        self._embedder = Embedder(texts, options, inputs, self.config)
        for number, length in enumerate(self._embedder.lengths):
            if not length:
                role = ("text", "text_pair")[number // len(rows)]
                raise rows.error(role, number % len(rows), "the text has no tokens")
        self.tokens = int(self._embedder.lengths.sum())

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score an encoder."""
        first, second = np.split(self._embedder.embed(model, cancelled), 2)
        lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        cosines = (first * second).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
        scores = {
            "spearman": contributions.spearman(cosines, self._scores),
            "pearson": contributions.pearson(cosines, self._scores),
            "loss": np.square(cosines - self._scores),
        }
        return self.scored({metric: ItemScores(values.astype(np.float32)) for metric, values in scores.items()})
