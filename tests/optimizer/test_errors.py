"""The exception tree: as drawn, through process borders, with the field and the remedy."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest
from pydantic import BaseModel, Field, ValidationError

from optimizer import errors
from optimizer.errors import InvalidInput, InvalidProblems, MergeoptError, NotFound, from_validation


def tree(cls: type[MergeoptError]) -> dict[str, str]:
    """Every class of the tree with the name of its parent."""
    out = {}
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            out[child.__name__] = cls.__name__
            out |= tree(child)
    return out


def drawn() -> dict[str, str]:
    """The same, read off the drawing in the docstring."""
    out: dict[str, str] = {}
    path: list[str] = ["MergeoptError"]
    for match in re.finditer(r"^ {4}([ │├└─]*)── (\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(match[1]) // 4 + 1
        path[depth:] = [match[2]]
        out[match[2]] = path[depth - 1]
    return out


CLASSES = [getattr(errors, name) for name in sorted(drawn())]


def test_the_drawing_is_the_tree() -> None:
    # What validation raises is an InvalidInput with all its problems; nobody needs to tell the two apart.
    assert drawn() == {name: parent for name, parent in tree(MergeoptError).items() if name != "InvalidProblems"}


def test_drawn_statuses_are_right() -> None:
    for name, status in re.findall(r"── (\w+) .*\((\d{3})\)$", errors.__doc__ or "", re.MULTILINE):
        assert getattr(errors, name).status == int(status), name


def test_codes_are_unique_but_for_the_problems() -> None:
    codes = [cls.code for cls in [MergeoptError, *CLASSES]]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)


@pytest.mark.parametrize("cls", CLASSES)
def test_survives_pickling(cls: type[MergeoptError]) -> None:
    error = cls("it broke", field="merge.operator", remedy="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (again.message, again.field, again.remedy) == ("it broke", "merge.operator", "mend it")
    assert str(again) == str(error) == "merge.operator: it broke (mend it)"
    assert again.args == error.args


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_says_when_it_is_raised(cls: type[MergeoptError]) -> None:
    assert inspect.getdoc(cls)
    assert cls.__doc__ is not None


def test_text_without_field_and_remedy() -> None:
    assert str(NotFound("no job 'x'")) == "no job 'x'"


class Part(BaseModel):
    size: int = Field(ge=1)


class Whole(BaseModel):
    parts: list[Part]


def test_validation_errors_keep_every_problem_and_its_path() -> None:
    with pytest.raises(ValidationError) as caught:
        Whole.model_validate({"parts": [{"size": 0}, {"size": "many"}, {}]})
    error = from_validation(caught.value, "job")
    assert isinstance(error, InvalidInput)
    assert error.field == "job.parts.0.size"
    assert isinstance(error, InvalidProblems)
    assert [field for field, _ in error.problems] == ["job.parts.0.size", "job.parts.1.size", "job.parts.2.size"]
    assert error.message == error.problems[0][1]


def test_problems_survive_pickling() -> None:
    error = InvalidProblems("first", field="a")
    error.problems = [("a", "first"), ("b", "second")]
    again = pickle.loads(pickle.dumps(error))
    assert again.problems == error.problems
