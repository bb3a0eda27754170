"""Finding evaluators and metrics by an objective's words, and batching."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.spec import DataSpec, Objective
from workers.evaluators.base import EVALUATORS, by_length, pad, parse_evaluator, resolve_metric
from workers.evaluators.text_classification import TextClassification


def objective(**changes: Any) -> Objective:
    parts = {"name": "language", "evaluator": "text_classification", "data": DataSpec(path="data.jsonl")}
    return Objective(**(parts | changes))


def test_parses_an_objective() -> None:
    cls, options = parse_evaluator(objective(options={"max_length": 64}), 3)
    assert cls is TextClassification
    assert options == TextClassification.Options(max_length=64)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"evaluator": "astrology"}, "objectives.3.evaluator", "text_classification"),
        ({"options": {"max_length": 1}}, "objectives.3.options.max_length", "greater than or equal to 8"),
        ({"options": {"nonsense": 1}}, "objectives.3.options.nonsense", "not permitted"),
    ],
)
def test_refuses_by_field(changes: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_evaluator(objective(**changes), 3)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_metric_and_direction_have_defaults() -> None:
    assert resolve_metric(objective(), TextClassification, 0) == ("accuracy", "maximise")
    assert resolve_metric(objective(metric="loss"), TextClassification, 0) == ("loss", "minimise")
    assert resolve_metric(objective(metric="loss", direction="maximise"), TextClassification, 0) == ("loss", "maximise")


@pytest.mark.parametrize("name", sorted(EVALUATORS))
def test_an_unknown_metric_lists_those_that_exist(name: str) -> None:
    cls = EVALUATORS[name]
    with pytest.raises(InvalidInput) as caught:
        resolve_metric(objective(evaluator=name, metric="charm"), cls, 2)
    assert caught.value.field == "objectives.2.metric"
    assert caught.value.remedy == f"use one of: {', '.join(cls.metrics)}"


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    max_padded=st.none() | st.integers(1, 1000),
)
def test_batches_cover_every_position_once_within_the_bounds(
    lengths: list[int], batch_size: int, max_padded: int | None
) -> None:
    batches = by_length(lengths, batch_size, max_padded)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for items in batches:
        longest = max(lengths[item] for item in items)
        assert len(items) <= batch_size
        assert max_padded is None or len(items) == 1 or len(items) * longest <= max_padded
    firsts = [lengths[items[0]] for items in batches]
    assert firsts == sorted(firsts, reverse=True)


def test_pads_on_the_right() -> None:
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
