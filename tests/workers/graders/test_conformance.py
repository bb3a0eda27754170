"""What every grader must do; a new one needs only a case in cases.py."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from optimizer.errors import InvalidData, InvalidInput
from tests.workers.graders.cases import CASES, WHERE, grade, make
from workers.evaluators.generation import Generation
from workers.graders.base import GRADERS

every_grader = pytest.mark.parametrize("name", sorted(CASES))

HOSTILE = ["", " ", "\x00", "é猫🎉\u202e", "{" * 20_000, "[" * 20_000, "1" * 20_000, "a" * 30_000 + "!", "-" * 5_000]


def test_every_grader_has_a_case() -> None:
    assert set(CASES) == set(GRADERS)


@every_grader
def test_right_answers_score_and_wrong_ones_do_not(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = make(name, case.rows, tmp_path, **case.options)
    first = grade(found, case.right)
    assert all(score > 0.99 for score in first), first
    if name != "classifier":  # whose case takes every answer for one of the class
        assert all(score < 0.5 for score in grade(found, case.wrong))
    assert grade(found, case.right) == first


@every_grader
def test_any_answer_has_a_finite_score_in_bounded_time(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = make(name, [case.rows[0]] * len(HOSTILE), tmp_path, **case.options)
    begin = time.monotonic()
    scores = grade(found, HOSTILE)
    assert time.monotonic() - begin < 120
    assert len(scores) == len(HOSTILE)
    assert all(math.isfinite(score) and 0 <= score <= 1 for score in scores)


@every_grader
def test_bad_rows_are_named(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for role, values in case.bad.items():
        for value in [*values, None]:
            rows = [dict(row) for row in case.rows]
            rows[1] |= {role: value}
            with pytest.raises(InvalidData) as caught:
                make(name, rows, tmp_path, **case.options)
            assert caught.value.field == f"objectives.0.data.columns.{role}", value
            assert "line 2:" in caught.value.message, value


@every_grader
def test_unknown_options_are_named(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with pytest.raises(InvalidInput, match="not permitted") as caught:
        make(name, case.rows, tmp_path, **case.options, nonsense=1)
    assert caught.value.field == f"{WHERE}.options.nonsense"


@every_grader
def test_options_and_columns_are_described(name: str) -> None:
    cls = GRADERS[name]
    schema = cls.Options.model_json_schema()
    assert all(part.get("description") for part in schema.get("properties", {}).values())
    assert schema["additionalProperties"] is False
    assert cls.summary.endswith(".")
    assert set(cls.columns) <= set(Generation.columns)
    assert set(CASES[name].bad) <= set(cls.columns)


def test_an_unknown_grader_lists_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="exact_match") as caught:
        make("astrology", [{}], tmp_path)
    assert caught.value.field == f"{WHERE}.name"
