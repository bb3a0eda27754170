"""What text and image regression share: labels, metrics and scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from optimizer.errors import InvalidCheckpoint, JobError
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.data import Rows
from workers.evaluators import contributions

METRICS: dict[str, Direction] = {
    "squared_error": "minimise",
    "absolute_error": "minimise",
    "pearson": "maximise",
    "spearman": "maximise",
    "r2": "maximise",
}
WHOLE_ONLY = frozenset({"pearson", "spearman", "r2"})
LABEL = "The right number, on the scale of the model's output."

_LARGEST = 1e15  # its square still has room in float32


def check_config(config: PreTrainedConfig, field: str) -> None:
    """Raise `InvalidCheckpoint` where a model does not have one output."""
    count = config.num_labels or 0
    if count != 1 or config.problem_type not in (None, "regression"):
        raise InvalidCheckpoint(
            f"the model must have one output; it has {count} for {config.problem_type or 'as many classes'}",
            field=f"{field}.evaluator",
            remedy="name the expert with such a head, or measure classification",
        )


def labels_of(rows: Rows, role: str = "label") -> NDArray[np.float64]:
    """Return each row's number, shape (items,); raises `InvalidData` naming the first row that has none."""
    return np.array([_number(value, row, rows, role) for row, value in enumerate(rows.values(role))])


def outputs_of(logits: Tensor) -> Tensor:
    """Return the outputs of a batch, shape (1, batch), float32; raises `JobError` where there are several an item."""
    if logits.shape[-1] != 1:
        raise JobError(f"the model has {logits.shape[-1]} outputs, but its head's config names 1")
    return logits.float().T


def item_scores(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, ItemScores]:
    """Return the item scores by metric:

    - ``squared_error``, ``absolute_error``: of each item;
    - ``pearson``, ``spearman``, ``r2``: what each item contributes to the correlation, rank correlation and coefficient of
      determination of all items (`workers.evaluators.contributions`). Without a value where labels or outputs are all
      the same.

    Args:
        predicted, labels: shape (items,).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        scores = {
            "squared_error": np.square(predicted - labels),
            "absolute_error": np.abs(predicted - labels),
            "pearson": contributions.pearson(predicted, labels),
            "spearman": contributions.spearman(predicted, labels),
            "r2": contributions.determination(predicted, labels),
        }
        return {metric: ItemScores(values.astype(np.float32)) for metric, values in scores.items()}


def _number(value: Any, row: int, rows: Rows, role: str) -> float:
    number = math.nan
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not abs(number) <= _LARGEST:
        raise rows.error(role, row, f"{str(value)[:100]!r} is no finite number", remedy="give a number for each row")
    return number
