"""What text and image classification share: options, labels, metrics and scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig

from optimizer.errors import InvalidCheckpoint, InvalidData, JobError
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.data import Rows
from workers.evaluators import contributions
from workers.evaluators.base import Evaluator, Prediction, log_softmax

METRICS: dict[str, Direction] = {
    "accuracy": "maximise",
    "loss": "minimise",
    "top_k_accuracy": "maximise",
    "balanced_accuracy": "maximise",
    "macro_f1": "maximise",
}
WHOLE_ONLY = frozenset({"macro_f1"})
LABEL = "The class: its name in the model's config, or its index."


class ClassificationOptions(Evaluator.Options):
    """Options of classification."""

    k: int = Field(
        default=5,
        ge=2,
        le=1000,
        description="How many classes `top_k_accuracy` looks at; there is none where the model has no more than these.",
        examples=[5],
    )


def metrics_of(classes: int, k: int) -> dict[str, Direction]:
    """Return the metrics of a model with so many classes: whether the label is among all of them says nothing."""
    return {metric: way for metric, way in METRICS.items() if metric != "top_k_accuracy" or k < classes}


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


def scores_of(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return accuracy, cross-entropy (nats), top-k accuracy and the predicted class of each item, shape (4, batch), float32.

    Args:
        logits: shape (batch, classes).
        labels: shape (batch,).
        k: see `ClassificationOptions`; of classes that are equally likely, the label is the last.
    """
    logits = logits.float()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    predicted = logits.argmax(dim=1)
    within = (logits >= logits.gather(1, labels[:, None])).sum(dim=1) <= k
    # The largest of NaNs is an arbitrary class: such an item has no accuracy.
    known = torch.stack([predicted == labels, within, predicted]).float().where(logits.isfinite().all(dim=1), torch.nan)
    return torch.stack([known[0], loss, known[1], known[2]])


def predictions_of(logits: Tensor, labels: Tensor) -> Iterator[Prediction]:
    """Yield the prediction of each item of a batch; the arguments are those of `scores_of`."""
    for number, (row, label) in enumerate(zip(log_softmax(logits), labels, strict=True), start=1):
        yield Prediction(row[None], label[None], last=number == len(labels))


def check_outputs(logits: Tensor, classes: int) -> None:
    """Raise `JobError` where a model's outputs are not the classes of the config that the labels were read with."""
    if logits.shape[-1] != classes:
        raise JobError(f"the model scores {logits.shape[-1]} classes, but its head's config names {classes}")


def item_scores(scores: NDArray[np.float64], labels: Tensor, classes: int, k: int) -> dict[str, ItemScores]:
    """Return the item scores by metric:

    - ``accuracy``: 1 if the label is the most likely class, else 0;
    - ``loss``: the cross-entropy in nats;
    - ``top_k_accuracy``: 1 if the label is among the k most likely classes;
    - ``balanced_accuracy``: accuracy, with weights by which every class in the data counts the same;
    - ``macro_f1``: what an item contributes to the mean F1 of the classes (`contributions.macro_f1`).

    Args:
        scores: from `scores_of`, of all items: shape (4, items).
        labels: shape (items,).
        classes: of the model.
        k: see `ClassificationOptions`.
    """
    correct, loss, within, predicted = scores.astype(np.float32)
    observed = labels.numpy()
    found = {
        "accuracy": ItemScores(correct),
        "loss": ItemScores(loss),
        "top_k_accuracy": ItemScores(within),
        "balanced_accuracy": ItemScores(correct, contributions.balanced_weights(observed).astype(np.float32)),
        "macro_f1": ItemScores(_f1(predicted, observed, classes)),
    }
    return {metric: found[metric] for metric in metrics_of(classes, k)}


def _f1(predicted: NDArray[np.float32], observed: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Contributions to macro-F1; items without a prediction have none, which leaves the measure without a value."""
    out = np.full(predicted.shape, np.nan, dtype=np.float32)
    known = np.isfinite(predicted)
    if known.any():
        out[known] = contributions.macro_f1(predicted[known].astype(np.int64), observed[known], classes)
    return out


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
