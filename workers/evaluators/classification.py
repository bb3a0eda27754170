"""What text and image classification share: labels, metrics and scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from optimizer.errors import InvalidCheckpoint, InvalidData, JobError
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.data import Rows
from workers.evaluators.base import Prediction, log_softmax

METRICS: dict[str, Direction] = {"accuracy": "maximise", "loss": "minimise"}
LABEL = "The class: its name in the model's config, or its index."


def class_count(config: PreTrainedConfig, field: str) -> int:
    """Return a classifier's number of classes; raises `InvalidCheckpoint` where it does not choose one of several."""
    count = config.num_labels or 0
    if count < 2 or config.problem_type not in (None, "single_label_classification"):
        raise InvalidCheckpoint(
            f"the model must choose one of several classes; it has {count} outputs for {config.problem_type or 'one value'}",
            field=f"{field}.evaluator",
        )
    return count


def labels_of(rows: Rows, config: PreTrainedConfig, field: str) -> list[int]:
    """Return the class index of each row.

    A text is the name of a class in the model's config (``id2label``, ``label2id``), else an index in digits; a number
    is an index. Where the data names the classes behind its indices (`datasets`, image folders), those names are looked
    up in the config too; if the config knows none of them and there are as many as the model has classes, the data's
    indices are taken for the model's.

    Raises:
        InvalidData: a row's label is none of these.
        InvalidCheckpoint: the model is no classifier with one label an item.
    """
    count = class_count(config, field)
    names = {str(name): int(index) for index, name in (config.id2label or {}).items()}
    names |= {str(name): int(index) for name, index in (config.label2id or {}).items()}
    classes = rows.class_names("label")
    order = None if classes is None else _class_order(classes, names, count, rows)
    return [_index(value, row, rows, names, count, order) for row, value in enumerate(rows.values("label"))]


def scores_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return accuracy and cross-entropy (nats) of each item, shape (2, batch), float32.

    Args:
        logits: shape (batch, classes).
        labels: shape (batch,).
    """
    logits = logits.float()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    # The largest of NaNs is an arbitrary class: such an item has no accuracy.
    correct = (logits.argmax(dim=1) == labels).float().where(logits.isfinite().all(dim=1), torch.nan)
    return torch.stack([correct, loss])


def predictions_of(logits: Tensor, labels: Tensor) -> Iterator[Prediction]:
    """Yield the prediction of each item of a batch; the arguments are those of `scores_of`."""
    for number, (row, label) in enumerate(zip(log_softmax(logits), labels, strict=True), start=1):
        yield Prediction(row[None], label[None], last=number == len(labels))


def check_outputs(logits: Tensor, classes: int) -> None:
    """Raise `JobError` where a model's outputs are not the classes of the config that the labels were read with."""
    if logits.shape[-1] != classes:
        raise JobError(f"the model scores {logits.shape[-1]} classes, but its head's config names {classes}")


def item_scores(scores: NDArray[np.float64]) -> dict[str, ItemScores]:
    """Return what `scores_of` computed, shape (2, items), by metric."""
    return {metric: ItemScores(row.astype(np.float32)) for metric, row in zip(METRICS, scores, strict=True)}


def _class_order(classes: Sequence[str], names: dict[str, int], count: int, rows: Rows) -> list[int] | None:
    """Return the model's index for each of the data's, or None where they are the same."""
    found = [_parse(name, names, count) for name in classes]
    order = [index for index in found if index is not None]
    if len(order) == len(classes):
        return order
    if not order and len(classes) == count:
        return None
    raise InvalidData(
        f"the model has no class named {classes[found.index(None)]!r}",
        field=f"{rows.field}.columns.label",
        remedy=f"its classes are: {_listed(names)}",
    )


def _parse(value: Any, names: dict[str, int], count: int) -> int | None:
    if isinstance(value, str):
        digits = value.strip()
        value = names.get(value, int(digits) if digits.isdecimal() and len(digits) < 10 else None)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        return None
    return value


def _index(value: Any, row: int, rows: Rows, names: dict[str, int], count: int, order: list[int] | None) -> int:
    index = _parse(value, names, count if order is None else len(order))
    if index is None:
        raise rows.error(
            "label",
            row,
            f"the label {str(value)[:100]!r} is none of the model's {count} classes",
            remedy=f"use an index from 0 to {count - 1}, or a name: {_listed(names)}",
        )
    return index if order is None else order[index]


def _listed(names: dict[str, int]) -> str:
    return ", ".join(list(names)[:20]) + (" …" if len(names) > 20 else "")
