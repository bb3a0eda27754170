"""From per-item scores to objective values, losses and constraint violations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InfeasibleCandidate
from optimizer.problem import ResolvedObjective


@dataclass(frozen=True)
class ItemScores:
    """Scores of one objective, item by item.

    Attributes:
        values: shape (items,), float32: the metric of each item.
        weights: shape (items,) or None: what an item counts in the mean (bytes, for bits per byte).
    """

    values: NDArray[np.float32]
    weights: NDArray[np.float32] | None = None

    def mean(self) -> float:
        """Return the weighted mean over the items, computed in float64."""
        values = self.values.astype(np.float64)
        if self.weights is None:
            return float(values.mean())
        return float(np.average(values, weights=self.weights.astype(np.float64)))


def aggregate(objectives: Sequence[ResolvedObjective], scores: Mapping[str, ItemScores]) -> list[float]:
    """Return the value of each objective, in order.

    Raises:
        InfeasibleCandidate: a score is missing, or NaN or infinite.
    """
    values = []
    for objective in objectives:
        if objective.name not in scores:
            raise InfeasibleCandidate("the evaluator returned no score", field=f"objectives.{objective.name}")
        value = scores[objective.name].mean()
        if not np.isfinite(value):
            bad = int((~np.isfinite(scores[objective.name].values)).sum())
            raise InfeasibleCandidate(
                f"{objective.metric} is {value}: {bad} of {len(scores[objective.name].values)} items have no finite score",
                field=f"objectives.{objective.name}",
            )
        values.append(value)
    return values


def to_losses(objectives: Sequence[ResolvedObjective], values: Sequence[float]) -> NDArray[np.float64]:
    """Return the values of the axes among the objectives as losses, shape (axes,): maximised ones negated."""
    return np.array(
        [
            value if objective.direction == "minimise" else -value
            for objective, value in zip(objectives, values, strict=True)
            if objective.use == "objective"
        ]
    )


def to_gains(
    objectives: Sequence[ResolvedObjective], scores: Mapping[str, ItemScores]
) -> tuple[NDArray[np.float32], ...]:
    """Return each axis's per-item scores, shape (items,), such that more is better: minimised ones negated."""
    return tuple(
        scores[objective.name].values if objective.direction == "maximise" else -scores[objective.name].values
        for objective in objectives
        if objective.use == "objective"
    )


def violation(objectives: Sequence[ResolvedObjective], values: Sequence[float]) -> float:
    """Return by how much the constraints are violated in sum; 0 when all hold."""
    total = 0.0
    for objective, value in zip(objectives, values, strict=True):
        if objective.at_least is not None:
            total += max(0.0, objective.at_least - value)
        if objective.at_most is not None:
            total += max(0.0, value - objective.at_most)
    return total
