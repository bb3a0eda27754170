"""The measures that text and image classification share, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score, top_k_accuracy_score

from workers.evaluators.classification import item_scores, metrics_of, scores_of


@given(items=st.integers(1, 60), classes=st.integers(3, 8), seed=st.integers(0, 99))
def test_equals_scikit_learn(items: int, classes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits, labels = random.normal(size=(items, classes)), random.integers(0, classes, items)
    targets = torch.from_numpy(labels)
    found = scores_of(torch.from_numpy(logits), targets, 2).double().numpy()
    scores = item_scores(found, targets, classes, 2)
    guesses = logits.argmax(axis=1)
    assert list(scores) == list(metrics_of(classes, 2))
    assert scores["accuracy"].mean() == pytest.approx((guesses == labels).mean())
    expected = top_k_accuracy_score(labels, logits, k=2, labels=np.arange(classes))
    assert scores["top_k_accuracy"].mean() == pytest.approx(expected)
    expected = recall_score(labels, guesses, labels=np.unique(labels), average="macro")
    assert scores["balanced_accuracy"].mean() == pytest.approx(expected, abs=1e-6)
    assert scores["macro_f1"].mean() == pytest.approx(f1_score(labels, guesses, average="macro"), abs=1e-6)


def test_of_equals_the_label_comes_last() -> None:
    labels = torch.tensor([0, 3])
    _, _, within, _ = scores_of(torch.zeros(2, 4), labels, 3)
    assert within.tolist() == [0.0, 0.0]


def test_among_all_classes_there_is_no_top_k() -> None:
    assert "top_k_accuracy" not in metrics_of(5, 5)
    assert "top_k_accuracy" in metrics_of(6, 5)


def test_items_without_a_prediction_have_no_scores() -> None:
    labels = torch.tensor([0, 1, 1])
    logits = torch.tensor([[1.0, 0.0, 0.0], [torch.nan, 0.0, 0.0], [0.0, 1.0, 0.0]])
    scores = item_scores(scores_of(logits, labels, 2).double().numpy(), labels, 3, 2)
    for metric, items in scores.items():
        assert np.isfinite(items.values).tolist() == [True, False, True], metric
