"""Mixing what several models hold likely of a few possible answers: output-space merging, where weights are out of reach.

Source: opinion pools, linear (Stone, "The Opinion Pool", Ann. Math. Statist. 32, 1961) and logarithmic (Genest and Zidek,
"Combining Probability Distributions", Statist. Sci. 1, 1986).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InfeasibleCandidate

Pool = Literal["linear", "logarithmic"]

_LEAST = 1e-6  # probability that even an impossible answer is given, so that logarithms stay finite


def by_likelihood(first: Sequence[tuple[str, float]], labels: Sequence[str]) -> NDArray[np.float64]:
    """Return the probability of each label from a model's most likely first tokens, shape (labels,), summing to 1.

    A token counts for a label where it is the label, or the beginning of it alone; spaces around it do not matter. A label
    that is not among the tokens gets the least of their probabilities, which bounds its own from above.

    Args:
        first: tokens with their log-probabilities in nats, at least one.
        labels: the possible answers.
    """
    found = np.zeros(len(labels))
    for token, logprob in first:
        place = _label_of(token.strip(), labels)
        if place is not None:
            found[place] += np.exp(min(0.0, logprob))
    least = np.exp(min(0.0, min(logprob for _, logprob in first)))
    found[found == 0] = least
    return _normalised(found)


def vote(text: str, labels: Sequence[str]) -> NDArray[np.float64]:
    """Return an answer's vote, shape (labels,): 1 for the label that it names first, as words of their own; else zeros."""
    found = np.zeros(len(labels))
    places = [
        (match.start(), -len(label), number) for number, label in enumerate(labels) if (match := _word(label, text))
    ]
    if places:
        found[min(places)[2]] = 1
    return found


def by_votes(votes: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the share of votes for each label, shape (labels,), with one vote more that is spread over all of them."""
    return _normalised(np.sum(votes, axis=0) + 1 / len(votes[0]))


def mix(probabilities: NDArray[np.float64], weights: NDArray[np.float64], pool: Pool) -> NDArray[np.float64]:
    """Return the mixture of models' probabilities, shape (labels,), summing to 1.

    Args:
        probabilities: shape (models, labels), rows summing to 1.
        weights: shape (models,), not all 0; a linear pool wants none below 0.
        pool: ``linear``: Σ w p / Σ w; ``logarithmic``: Π p^w, normalised, whose weights need not sum to 1.
    """
    bounded = np.maximum(probabilities, _LEAST)
    if pool == "linear":
        return _normalised(weights @ bounded)
    logs = weights @ np.log(bounded)
    return _normalised(np.exp(logs - logs.max()))


def check_weights(weights: NDArray[np.float64], pool: Pool, what: str, field: str) -> None:
    """Raise `InfeasibleCandidate` where weights cannot be mixed with."""
    if not np.isfinite(weights).all() or not weights.any() or (pool == "linear" and (weights < 0).any()):
        raise InfeasibleCandidate(
            f"{what}: the weights {weights.round(4).tolist()} cannot mix",
            field=field,
            remedy="some must not be 0, and none below 0 in a linear pool",
        )


def _label_of(token: str, labels: Sequence[str]) -> int | None:
    if token in labels:
        return list(labels).index(token)
    begun = [number for number, label in enumerate(labels) if token and label.startswith(token)]
    return begun[0] if len(begun) == 1 else None


def _word(label: str, text: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE)


def _normalised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = values / values.sum()
    return out
