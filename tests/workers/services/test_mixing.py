"""What a mixture of models' outputs is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from optimizer.errors import InfeasibleCandidate
from workers.services.mixing import Pool, by_likelihood, by_votes, check_weights, mix, vote

LABELS = ["A", "B", "maybe"]


def test_likelihoods_of_labels() -> None:
    first = [
        (" A", math.log(0.5)),
        ("A", math.log(0.1)),
        ("B", math.log(0.2)),
        (" may", math.log(0.1)),
        ("C", math.log(0.05)),
    ]
    np.testing.assert_allclose(by_likelihood(first, LABELS), np.array([0.6, 0.2, 0.1]) / 0.9)
    rest = [("A", math.log(0.7)), ("x", math.log(0.1))]
    np.testing.assert_allclose(by_likelihood(rest, LABELS), np.array([0.7, 0.1, 0.1]) / 0.9)
    np.testing.assert_allclose(by_likelihood([("x", -1.0)], LABELS), np.full(3, 1 / 3))
    assert by_likelihood([("A", -math.inf), ("B", 0.0)], LABELS)[1] == 1
    ambiguous = by_likelihood([("may", 0.0), ("x", -9.0)], ["maybe", "mayor"])
    np.testing.assert_allclose(ambiguous, [0.5, 0.5])


def test_votes() -> None:
    texts = ["A", "the answer is B, not A", "b.", "Because", "Maybe!", ""]
    votes = [vote(text, LABELS) for text in texts]
    assert np.sum(votes, axis=0).tolist() == [1, 2, 1]
    np.testing.assert_allclose(by_votes(votes), (np.array([1, 2, 1]) + 1 / 3) / 5)
    assert vote("yes and no", ["yes", "yes and no"]).tolist() == [0, 1]


PROBABILITIES = arrays(np.float64, (3, 4), elements=st.floats(0.001, 1)).map(
    lambda found: found / found.sum(1, keepdims=True)
)
WEIGHTS = arrays(np.float64, 3, elements=st.floats(0.01, 5))


@given(PROBABILITIES, WEIGHTS, st.sampled_from(["linear", "logarithmic"]))
def test_mixtures(probabilities: NDArray[np.float64], weights: NDArray[np.float64], pool: Pool) -> None:
    found = mix(probabilities, weights, pool)
    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    same = np.tile(probabilities[0], (3, 1))
    np.testing.assert_allclose(mix(same, weights / weights.sum(), pool), probabilities[0], rtol=1e-6)
    alone = np.array([0.0, 1.0, 0.0])
    np.testing.assert_allclose(mix(probabilities, alone, pool), probabilities[1], rtol=1e-6)
    order = [2, 0, 1]
    np.testing.assert_allclose(mix(probabilities[order], weights[order], pool), found, rtol=1e-9)
    if pool == "linear":
        np.testing.assert_allclose(mix(probabilities, weights * 7, pool), found, rtol=1e-9)
        assert (found <= probabilities.max(0) + 1e-9).all()


@pytest.mark.parametrize(
    ("weights", "pool", "fine"),
    [
        ([0, 0], "linear", False),
        ([1, -0.1], "linear", False),
        ([1, -0.1], "logarithmic", True),
        ([1, 0], "linear", True),
        ([math.nan, 1], "logarithmic", False),
        ([math.inf, 1], "linear", False),
    ],
)
def test_weights_that_cannot_mix(weights: list[float], pool: Pool, fine: bool) -> None:
    if fine:
        check_weights(np.array(weights, dtype=float), pool, "line 1", "f")
        return
    with pytest.raises(InfeasibleCandidate, match="line 1") as caught:
        check_weights(np.array(weights, dtype=float), pool, "line 1", "f")
    assert caught.value.field == "f"
