"""What a grader is: it reads its references once, and scores any number of answers to the same items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field, ValidationError, model_validator

from optimizer.errors import InvalidInput, from_validation
from optimizer.problem import GraderInfo
from optimizer.registry import Registry
from optimizer.spec import Direction, Strict
from workers.data import Rows, is_text
from workers.policy import Policy
from workers.roots import Roots


@dataclass(frozen=True)
class GraderInputs:
    """What a grader is made from, beside its options.

    Attributes:
        rows: the items.
        field: dotted path of the grader in the job: ``objectives.0.options.graders.score``.
        policy: what the server allows.
        roots: where checkpoints may be.
    """

    rows: Rows
    field: str
    policy: Policy
    roots: Roots


@dataclass(frozen=True)
class Answers:
    """What a model wrote, one text an item, in the order of the rows.

    Attributes:
        texts: shape (items,).
        cancelled: whether the grading is called off; asked at least every few seconds by graders that take longer.
        device: where a grader that is a model itself may compute.
    """

    texts: Sequence[str]
    cancelled: Callable[[], bool]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Grader(ABC):
    """Scores answers, each by itself.

    The contract (tests/workers/graders/test_conformance.py runs it over every grader): the constructor checks every row it
    reads and raises `InvalidData` that names the row; `grade` returns one finite score an answer, whatever the answer is,
    in bounded time; the same answers give the same scores.

    Attributes:
        direction: of its scores.
        columns: role of each data column that it reads to its description.
        digest: of what it grades with besides options and rows, as hexadecimal digits; empty where there is nothing.
    """

    digest: str = ""
    name: ClassVar[str]
    summary: ClassVar[str]
    direction: ClassVar[Direction] = "maximise"
    columns: ClassVar[dict[str, str]] = {}

    class Options(Strict):
        """Options of the grader; subclasses add fields with bounds and descriptions."""

    def __init__(self, options: Any, inputs: GraderInputs) -> None:
        """Prepare the references.

        Raises:
            InvalidData: a row does not fit; names the column's field and the row.
            InvalidInput: an option does not fit, or the server does not allow it.
        """
        self.options = options
        self.inputs = inputs

    @classmethod
    def info(cls) -> GraderInfo:
        """Return what the API tells of this grader."""
        return GraderInfo(
            name=cls.name,
            summary=cls.summary,
            direction=cls.direction,
            columns=cls.columns,
            options_schema=cls.Options.model_json_schema(),
        )

    @abstractmethod
    def grade(self, answers: Answers) -> Sequence[float]:
        """Return a score for each answer.

        Raises:
            RetryableError: called off, or this machine cannot grade now.
        """


GRADERS: Registry[type[Grader]] = Registry("grader", "workers.graders")

G = TypeVar("G", bound=type[Grader])


def grader(name: str) -> Callable[[G], G]:
    """Register a grader under ``name``: ``@grader("exact_match")``."""

    def decorate(cls: G) -> G:
        cls.name = name
        GRADERS.register(name)(cls)
        return cls

    return decorate


class GraderSpec(Strict):
    """A grader with its options; a bare string is its name."""

    name: str = Field(description="Name of the grader.", examples=["exact_match"])
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the grader.")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def make_grader(spec: GraderSpec, inputs: GraderInputs) -> Grader:
    """Find a grader, check its options and prepare it; raises what its constructor does, and `InvalidInput`."""
    cls = GRADERS.find(spec.name, f"{inputs.field}.name")
    try:
        options = cls.Options.model_validate(dict(spec.options))
    except ValidationError as error:
        raise from_validation(error, f"{inputs.field}.options") from error
    return cls(options, inputs)


def references(rows: Rows, role: str = "answer") -> list[list[str]]:
    """Return the right answers of each row: a text, a number, or a list of them of which any counts.

    Raises:
        InvalidData: a row has none, or something else.
    """
    return [_texts(value, row, role, rows) for row, value in enumerate(rows.values(role))]


def _texts(value: Any, row: int, role: str, rows: Rows) -> list[str]:
    found = value if isinstance(value, list) else [value]
    if not found or not all(is_text(one) or _is_number(one) for one in found):
        raise rows.error(
            role,
            row,
            "a text, a number, or a list of them is needed",
            remedy='for example "Paris" or ["Paris", "paris"]',
        )
    return [str(one) for one in found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def needs(package: str, extra: str, field: str) -> InvalidInput:
    """Return the error about a package of an extra that is not installed."""
    return InvalidInput(
        f"this needs the package {package}, which the server does not have",
        field=field,
        remedy=f"have the extra installed: pip install 'mergeopt[{extra}]'",
    )
