"""Retrieval: whether a query's embedding is nearest to those of the passages that answer it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedModel

from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.data import Rows, digest_of, is_text
from workers.evaluators.base import Evaluator, Inputs, Scores, evaluator, never
from workers.evaluators.embedding import Embedder, EmbeddingOptions

Vector = NDArray[np.float64]


@evaluator("retrieval")
class Retrieval(Evaluator):
    """Each query is an item. The passages are ranked by the products of their embeddings with the query's; of equals,
    those that answer it come last. With r the ranks, from 1, of its P positive passages:

    - ``ndcg``: Σ 1 / log₂(1 + r) over the r ≤ ``k``, by the same sum for ranks 1, 2, …, min(P, k): nDCG@k;
    - ``recall``: the share of positives with r ≤ ``k``;
    - ``mrr``: 1 / the lowest r;
    - ``loss``: the mean over the positives of −log softmax(product / ``temperature``) among themselves and all passages
      that are no positives (InfoNCE), in nats.

    The corpus is the same for all queries, so that these are means over independent items: a part of the queries is
    ranked among the passages of all.
    """

    summary: ClassVar[str] = "Whether a query's embedding is nearest to those of the passages that answer it."
    metrics: Mapping[str, Direction] = {
        "ndcg": "maximise",
        "recall": "maximise",
        "mrr": "maximise",
        "loss": "minimise",
    }
    columns: ClassVar[dict[str, str]] = {
        "query": "The query.",
        "positive": "A passage that answers it, or a list of such passages.",
        "negative": "A passage that does not answer it, or a list of such passages (optional).",
    }
    auto_class: ClassVar[str] = "AutoModel"
    uses_head: ClassVar[bool] = False
    remembered: ClassVar[bool] = False  # a query's score depends on the passages of all rows

    class Options(EmbeddingOptions):
        """Options of retrieval."""

        k: int = Field(default=10, ge=1, le=10_000, description="How many ranks `ndcg` and `recall` look at.")
        corpus: Literal["all", "own"] = Field(
            default="all",
            description="Rank the passages of all rows, or only the positives and negatives of the query's own row.",
        )
        query_prefix: str = Field(
            default="", max_length=10_000, description="Stands before each query.", examples=["query: "]
        )
        passage_prefix: str = Field(
            default="", max_length=10_000, description="Stands before each passage.", examples=["passage: "]
        )
        temperature: float = Field(default=0.05, gt=0, le=1000, description="Of the softmax in `loss`.")

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        rows = inputs.rows
        queries = rows.texts("query")
        corpus = _Corpus(rows)
        if options.corpus == "own":
            corpus.check_own(rows)
        self._positives, self._candidates = corpus.positives, corpus.candidates
        self._texts = [options.query_prefix + query for query in queries]
        self._queries = Embedder(self._texts, options, inputs, self.config)
        _check_tokens(self._queries.lengths, [("query", row) for row in range(len(rows))], rows)
        passages = [options.passage_prefix + text for text in corpus.texts]
        self._passages = Embedder(passages, options, inputs, self.config)
        _check_tokens(self._passages.lengths, corpus.places, rows)
        self._chosen = list(range(len(rows)))
        self._count()

    def subset(self, items: Sequence[int]) -> Self:
        """See `Evaluator.subset`; the corpus stays."""
        part = copy.copy(self)
        part._chosen = [self._chosen[item] for item in items]
        part._items = len(part._chosen)
        part.digest = digest_of(self._inputs.rows.items[item] for item in part._chosen)
        part._queries = Embedder([self._texts[item] for item in part._chosen], self.options, self._inputs, self.config)
        part._count()
        return part

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score an encoder."""
        queries = self._queries.embed(model, cancelled)
        passages = self._passages.embed(model, cancelled)
        scores = np.array(
            [self._score(query @ passages.T, item) for query, item in zip(queries, self._chosen, strict=True)]
        )
        columns = zip(self.metrics, scores.T.astype(np.float32), strict=True)
        return self.scored({metric: ItemScores(values) for metric, values in columns})

    def _count(self) -> None:
        self.tokens = int(self._queries.lengths.sum() + self._passages.lengths.sum())

    def _score(self, products: Vector, item: int) -> tuple[float, float, float, float]:
        """Return a query's scores in the order of the metrics."""
        if self.options.corpus == "own":
            products = products[self._candidates[item]]
            positive = np.isin(self._candidates[item], self._positives[item])
        else:
            positive = np.zeros(len(products), dtype=bool)
            positive[self._positives[item]] = True
        if not np.isfinite(products).all():
            return (np.nan,) * 4
        order = np.lexsort((positive, -products))
        ranks = np.flatnonzero(positive[order]) + 1
        within = ranks[ranks <= self.options.k]
        ideal = np.arange(1, min(len(ranks), self.options.k) + 1)
        ndcg = (1 / np.log2(1 + within)).sum() / (1 / np.log2(1 + ideal)).sum()
        return float(ndcg), len(within) / len(ranks), 1 / float(ranks[0]), self._loss(products, positive)

    def _loss(self, products: Vector, positive: NDArray[np.bool_]) -> float:
        scaled = (products - products.max()) / self.options.temperature
        others = np.exp(scaled[~positive]).sum()
        return float((np.log(np.exp(scaled[positive]) + others) - scaled[positive]).mean())


class _Corpus:
    """The passages of all rows, each once.

    Attributes:
        texts: the passages.
        places: the role and the row in which each was first seen.
        positives: for each row the numbers of those that answer its query.
        candidates: for each row the numbers of all that it names.
    """

    def __init__(self, rows: Rows) -> None:
        self.texts: list[str] = []
        self.places: list[tuple[str, int]] = []
        self._numbers: dict[str, int] = {}
        positives = [_passages(value, row, rows, "positive") for row, value in enumerate(rows.values("positive"))]
        negatives = [
            [] if value is None else _passages(value, row, rows, "negative")
            for row, value in enumerate(rows.optional("negative"))
        ]
        self.positives = [self._add(texts, "positive", row) for row, texts in enumerate(positives)]
        self.candidates = [
            np.unique(np.concatenate([self.positives[row], self._add(texts, "negative", row)]))
            for row, texts in enumerate(negatives)
        ]
        for row, texts in enumerate(negatives):
            if set(texts) & set(positives[row]):
                raise rows.error("negative", row, "a passage is both a positive and a negative one")

    def check_own(self, rows: Rows) -> None:
        """Raise `InvalidData` where a row has nothing to rank its positives against."""
        for row, (positives, candidates) in enumerate(zip(self.positives, self.candidates, strict=True)):
            if len(positives) == len(candidates):
                raise rows.error(
                    "negative", row, "there is no negative passage", remedy="name some, or use the option `corpus: all`"
                )

    def _add(self, texts: Sequence[str], role: str, row: int) -> NDArray[np.int64]:
        for text in texts:
            if text not in self._numbers:
                self._numbers[text] = len(self.texts)
                self.texts.append(text)
                self.places.append((role, row))
        return np.unique(np.array([self._numbers[text] for text in texts], dtype=np.int64))


def _passages(value: Any, row: int, rows: Rows, role: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(is_text(text) for text in texts):
        raise rows.error(role, row, "a text, or a list of texts, is needed")
    if role == "positive" and not texts:
        raise rows.error(role, row, "there is no passage", remedy="name at least one, or leave the query out")
    return texts


def _check_tokens(lengths: NDArray[np.int64], places: Sequence[tuple[str, int]], rows: Rows) -> None:
    for length, (role, row) in zip(lengths, places, strict=True):
        if not length:
            raise rows.error(role, row, "a text has no tokens")
