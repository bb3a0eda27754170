"""Measures as a user's package would have them, for tests of the evaluator `python`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workers.functions import Cancelled, measure

Row = Mapping[str, Any]


@measure({"loss": "minimise", "length": "maximise"})
def likelihood(
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    cancelled: Callable[[], bool],
) -> dict[str, Any]:
    """Mean negative log-likelihood of each text's tokens but the first, weighted by their number; and that number."""
    losses: list[torch.Tensor] = []
    lengths: list[int] = []
    for first in range(0, len(rows), batch_size):
        if cancelled():
            raise Cancelled("called off")
        for row in rows[first : first + batch_size]:
            ids = torch.tensor([tokenizer.encode(row["text"], add_special_tokens=False)], device=model.device)
            logits = model(input_ids=ids).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
            lengths.append(ids.shape[1] - 1)
    total = torch.stack(losses)
    return {"loss": (total, lengths), "length": torch.tensor(lengths) + total * 0}


@measure({"seen": "maximise"})
def echo(rows: Sequence[Row], found: Any, weights: Any = None, **more: Any) -> dict[str, Any]:
    """What the job's arguments say, whatever the model; tests make it return nonsense."""
    if found == "raise":
        raise ValueError("no such luck")
    if found == "words":
        return {"seen": [len(str(row["word"])) for row in rows]}
    if found == "more":
        return {"seen": [float(len(more))] * len(rows)}
    return {"seen": found} if weights is None else {"seen": (found, weights)}


def other(found: Any) -> Any:
    """As `echo`, declared without importing mergeopt, and returning whatever it is told to."""
    return found


other.mergeopt_measure = {"metrics": {"seen": "minimise"}, "auto_class": "AutoModelForSequenceClassification"}  # type: ignore[attr-defined]


@measure({"norm": "minimise", "layers": "maximise"}, aggregate=True)
def whole(model: PreTrainedModel) -> dict[str, Any]:
    """One number for each metric."""
    return {"norm": next(model.parameters()).norm(), "layers": model.config.num_hidden_layers}


@measure({"seen": "maximise"})
def positional(model: PreTrainedModel, /) -> dict[str, Any]:
    """A parameter that has no name to its callers."""
    return {"seen": [model.dtype]}


def undeclared(rows: Sequence[Row]) -> dict[str, Any]:
    """No measure."""
    return {"seen": [0.0] * len(rows)}


@measure({"seen": "sideways"}, auto_class="AutoModelForNothing")  # type: ignore[dict-item]
def wrongly_declared(rows: Sequence[Row]) -> dict[str, Any]:
    """A direction that does not exist."""
    return {"seen": [0.0] * len(rows)}


@measure({"seen": "maximise"})
def hangs(rows: Sequence[Row]) -> dict[str, Any]:
    """Never returns."""
    while True:
        time.sleep(1)
