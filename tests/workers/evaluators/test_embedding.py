"""Retrieval and sentence similarity against plain transformers and measures computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer, PreTrainedModel

from optimizer.errors import InvalidData, InvalidInput
from tests.workers.evaluators.cases import FIELD, Row, build, open_model, words
from tests.workers.models import tiny_bert_base, tiny_llama
from workers.evaluators.embedding import saved_pooling
from workers.evaluators.retrieval import Retrieval

RETRIEVAL, SIMILARITY = "retrieval", "sentence_similarity"
PAIRS: list[Row] = [{"text": words(3 + n, n), "text_pair": words(9 - n, 30 + n), "score": n / 2} for n in range(8)]
QUERIES: list[Row] = [
    {
        "query": words(2 + n, n),
        "positive": [words(3 + n, 50 + n), words(7, 60 + n)][: 1 + n % 2],
        "negative": [words(5, 40 + n + m) for m in range(n % 3)],
    }
    for n in range(9)
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert_base(tmp_path_factory.mktemp("bert"))


def embedding(model: PreTrainedModel, checkpoint: Path, text: str, pooling: str = "mean") -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.no_grad():
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].double().numpy()
    pooled = {"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}[pooling]
    out: np.ndarray = pooled / np.linalg.norm(pooled)
    return out


# --- sentence similarity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_cosines_are_those_of_plain_transformers(pooling: str, bert: Path) -> None:
    model = open_model(SIMILARITY, bert)
    scores = build(SIMILARITY, bert, PAIRS, pooling=pooling, prefix="w3 ", batch_size=3).evaluate(model)
    found = np.array(
        [
            embedding(model, bert, "w3 " + row["text"], pooling)
            @ embedding(model, bert, "w3 " + row["text_pair"], pooling)
            for row in PAIRS
        ]
    )
    expected = np.array([row["score"] for row in PAIRS])
    np.testing.assert_allclose(scores["loss"].values, (found - expected / 5) ** 2, rtol=1e-4, atol=1e-5)
    assert scores["spearman"].mean() == pytest.approx(stats.spearmanr(found, expected).statistic, abs=1e-4)
    assert scores["pearson"].mean() == pytest.approx(stats.pearsonr(found, expected).statistic, abs=1e-4)


def test_cosines_do_not_depend_on_normalisation(bert: Path) -> None:
    model = open_model(SIMILARITY, bert)
    one, two = (build(SIMILARITY, bert, PAIRS, normalise=choice).evaluate(model) for choice in (True, False))
    np.testing.assert_allclose(one["loss"].values, two["loss"].values, rtol=1e-5)


def test_scores_have_a_scale(bert: Path) -> None:
    rows = [{**row, "score": row["score"] * 10 - 20} for row in PAIRS]
    model = open_model(SIMILARITY, bert)
    found = build(SIMILARITY, bert, rows, low=-20, high=30).evaluate(model)
    np.testing.assert_allclose(found["loss"].values, build(SIMILARITY, bert, PAIRS).evaluate(model)["loss"].values)
    with pytest.raises(InvalidInput, match="must be below the highest") as caught:
        build(SIMILARITY, bert, PAIRS, low=5, high=5)
    assert caught.value.field == f"{FIELD}.options.low"


def test_a_pooler_that_nobody_has_is_not_read(bert: Path) -> None:
    model = open_model(SIMILARITY, bert)
    expected = build(SIMILARITY, bert, PAIRS).evaluate(model)
    with torch.no_grad():
        for parameter in model.get_submodule("pooler").parameters():
            parameter.fill_(torch.nan)
    found = build(SIMILARITY, bert, PAIRS).evaluate(model)
    np.testing.assert_array_equal(found["loss"].values, expected["loss"].values)


def test_decoders_embed_texts_too(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    model = open_model(SIMILARITY, path)
    scores = build(SIMILARITY, path, PAIRS, pooling="last").evaluate(model)
    cosine = embedding(model, path, PAIRS[3]["text"], "last") @ embedding(model, path, PAIRS[3]["text_pair"], "last")
    assert scores["loss"].values[3] == pytest.approx((cosine - PAIRS[3]["score"] / 5) ** 2, abs=1e-5)


@pytest.mark.parametrize(
    ("saved", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "mean"),
        ([], "mean"),
        (None, "mean"),
    ],
)
def test_the_pooling_is_what_the_checkpoint_says(saved: Any, pooling: str, tmp_path: Path) -> None:
    if saved is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(saved))
    assert saved_pooling(tmp_path) == pooling


# --- retrieval ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corpus", ["all", "own"])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_ranks_are_those_of_a_hand_computation(corpus: str, k: int, bert: Path) -> None:
    rows = [row for row in QUERIES if row["negative"]] if corpus == "own" else QUERIES
    model = open_model(RETRIEVAL, bert)
    scores = build(RETRIEVAL, bert, rows, k=k, corpus=corpus, query_prefix="w1 ", passage_prefix="w2 ").evaluate(model)
    everything = dict.fromkeys(text for row in rows for text in [*row["positive"], *row["negative"]])
    for n, row in enumerate(rows):
        passages = list(everything) if corpus == "all" else [*row["positive"], *row["negative"]]
        query = embedding(model, bert, "w1 " + row["query"])
        products = {text: float(query @ embedding(model, bert, "w2 " + text)) for text in passages}
        ranked = sorted(passages, key=lambda text: -products[text])
        ranks = [rank for rank, text in enumerate(ranked, 1) if text in row["positive"]]
        ideal = sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(ranks)) + 1))
        ndcg = sum(1 / math.log2(1 + rank) for rank in ranks if rank <= k) / ideal
        assert scores["ndcg"].values[n] == pytest.approx(ndcg, abs=1e-6)
        assert scores["recall"].values[n] == pytest.approx(np.mean([rank <= k for rank in ranks]), abs=1e-6)
        assert scores["mrr"].values[n] == pytest.approx(1 / ranks[0], abs=1e-6)
        others = sum(math.exp(products[text] / 0.05) for text in passages if text not in row["positive"])
        own = [math.exp(products[text] / 0.05) for text in row["positive"]]
        loss = np.mean([-math.log(one / (one + others)) for one in own])
        assert scores["loss"].values[n] == pytest.approx(loss, rel=1e-3, abs=1e-4)


def test_a_model_that_embeds_all_texts_alike_ranks_worst(bert: Path) -> None:
    model = open_model(RETRIEVAL, bert)
    with torch.no_grad():
        last: Any = model.get_submodule("encoder.layer.1.output.LayerNorm")
        last.weight.zero_()
        last.bias.fill_(1.0)
    scores = build(RETRIEVAL, bert, QUERIES, k=3).evaluate(model)
    assert scores["recall"].values.tolist() == [0.0] * len(QUERIES)


def test_a_part_of_the_queries_is_ranked_among_all_passages(bert: Path) -> None:
    model = open_model(RETRIEVAL, bert)
    whole = build(RETRIEVAL, bert, QUERIES)
    part = whole.subset([7, 2]).subset([1])
    assert isinstance(part, Retrieval)
    assert len(part) == 1
    assert part.digest != whole.digest
    expected = whole.evaluate(model)
    assert part.tokens < whole.tokens
    for metric, items in part.evaluate(model).items():
        np.testing.assert_allclose(items.values, expected[metric].values[[2]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "options", "words_", "role"),
    [
        ({"query": "w1", "positive": "w2"}, {"corpus": "own"}, "no negative passage", "negative"),
        ({"query": "w1", "positive": ["w2"], "negative": "w2"}, {}, "both a positive and a negative", "negative"),
        ({"query": "w1", "positive": ["w2"], "negative": 3}, {}, "a list of texts", "negative"),
    ],
)
def test_bad_rows_are_named(row: Row, options: dict[str, Any], words_: str, role: str, bert: Path) -> None:
    with pytest.raises(InvalidData, match=words_) as caught:
        build(RETRIEVAL, bert, [{"query": "w1", "positive": "w5", "negative": ["w6"]}, row], **options)
    assert caught.value.field == f"{FIELD}.data.columns.{role}"
    assert "line 2" in caught.value.message
