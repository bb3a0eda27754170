"""Regression against plain transformers, one item at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from optimizer.errors import InvalidCheckpoint, JobError
from tests.workers.evaluators.cases import FIELD, Row, as_rows, build, open_model, words
from tests.workers.models import tiny_bert, tiny_vit
from workers.evaluators.regression import item_scores, labels_of

NAME = "text_regression"
ROWS: list[Row] = [{"text": words(2 + n, n), "text_pair": words(1 + n, 30 + n), "label": n / 4} for n in range(7)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), labels=1)


def outputs(model: PreTrainedModel, checkpoint: Path) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with torch.no_grad():
        return [
            float(model(**tokenizer(row["text"], row["text_pair"], return_tensors="pt")).logits[0, 0]) for row in ROWS
        ]


def test_equals_a_hand_computation(bert: Path) -> None:
    model = open_model(NAME, bert)
    scores = build(NAME, bert, ROWS, batch_size=3).evaluate(model)
    found, labels = np.array(outputs(model, bert)), np.array([row["label"] for row in ROWS])
    np.testing.assert_allclose(scores["squared_error"].values, (found - labels) ** 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores["absolute_error"].values, abs(found - labels), rtol=1e-4, atol=1e-6)
    assert scores["pearson"].mean() == pytest.approx(stats.pearsonr(found, labels).statistic, abs=1e-4)
    assert scores["spearman"].mean() == pytest.approx(stats.spearmanr(found, labels).statistic, abs=1e-4)
    r2 = 1 - ((found - labels) ** 2).sum() / ((labels - labels.mean()) ** 2).sum()
    assert scores["r2"].mean() == pytest.approx(r2, rel=1e-4)
    assert scores.cost.items == len(ROWS)
    assert scores.cost.tokens > 0


def test_labels_may_be_texts(bert: Path) -> None:
    rows = [{"label": value} for value in (" 1.5 ", "-2", 3, 0.25)]
    assert labels_of(as_rows(rows)).tolist() == [1.5, -2.0, 3.0, 0.25]


def test_outputs_that_are_all_the_same_have_no_correlation() -> None:
    scores = item_scores(np.ones(3), np.array([0.0, 1.0, 2.0]))
    assert np.isnan(scores["pearson"].values).all()
    assert np.isnan(scores["spearman"].values).all()
    assert np.isfinite(scores["r2"].values).all()


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="must have one output; it has 3") as caught:
        build(NAME, tiny_bert(tmp_path / "bert"), ROWS)
    assert caught.value.field == f"{FIELD}.evaluator"
    with pytest.raises(InvalidCheckpoint, match="must have one output"):
        build("image_regression", tiny_vit(tmp_path / "vit"), ROWS)


def test_a_head_of_another_size_fails_the_job(bert: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert(tmp_path))
    with pytest.raises(JobError, match="has 3 outputs, but its head's config names 1"):
        build(NAME, bert, ROWS).evaluate(model)
