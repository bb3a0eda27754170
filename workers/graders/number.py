"""Numeric answers: whether the number that an answer ends with is the right one."""

from __future__ import annotations

import decimal
from collections.abc import Sequence
from decimal import Decimal
from typing import ClassVar, Literal

import regex
from pydantic import Field

from workers.graders.base import Answers, Grader, GraderInputs, grader, references
from workers.graders.patterns import compiled, last_group

_NUMBER = regex.compile(
    r"[-+−]?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)?(?:(?<=\d)\.\d++|\.\d++)?(?<=\d)(?:[eE][-+]?\d{1,4}+)?"
)
_MAX_DIGITS = 400


@grader("number")
class Number(Grader):
    """1 if a number is within the tolerance of any of the row's right ones, else 0.

    Commas between thousands, signs, decimals and exponents are understood; units and currency signs are passed over. The
    reference is read alike, so that the last number of a worked solution may stand for it.
    """

    summary: ClassVar[str] = "Whether the last number of the answer is the right one, within a tolerance."
    columns: ClassVar[dict[str, str]] = {"answer": "The right answer: a text or number, or a list of which any counts."}

    class Options(Grader.Options):
        """Options of numeric answers."""

        which: Literal["last", "first"] = Field(default="last", description="Which number of the answer counts.")
        extract: str | None = Field(
            default=None,
            description="Regular expression; only its last match in the answer is read: its first group, if it has any.",
            examples=[r"#### (.+)"],
        )
        relative: float = Field(
            default=1e-6, ge=0, le=1, description="Largest difference, relative to the right number."
        )
        absolute: float = Field(default=0.0, ge=0, description="Largest difference; the wider of the two counts.")

    options: Options

    def __init__(self, options: Options, inputs: GraderInputs) -> None:
        super().__init__(options, inputs)
        field = f"{inputs.field}.options.extract"
        self._extract = None if options.extract is None else compiled(options.extract, field)
        self._right = []
        for row, texts in enumerate(references(inputs.rows)):
            found = [number_in(text, "last") for text in texts]
            numbers = [number for number in found if number is not None]
            if len(numbers) < len(texts):
                raise inputs.rows.error("answer", row, f"there is no number in {str(texts)[:100]}")
            self._right.append(numbers)

    def grade(self, answers: Answers) -> Sequence[float]:
        """See `Grader.grade`."""
        return [float(self._right_one(text, right)) for text, right in zip(answers.texts, self._right, strict=True)]

    def _right_one(self, text: str, right: list[Decimal]) -> bool:
        found = text if self._extract is None else last_group(self._extract, text)
        given = None if found is None else number_in(found, self.options.which)
        return given is not None and any(self._close(given, one) for one in right)

    def _close(self, given: Decimal, right: Decimal) -> bool:
        with decimal.localcontext(prec=2 * _MAX_DIGITS):
            allowed = max(Decimal(self.options.absolute), Decimal(self.options.relative) * abs(right))
            return abs(given - right) <= allowed


def number_in(text: str, which: Literal["last", "first"]) -> Decimal | None:
    """Return the last or first number of a text; None where there is none, or one of absurd length."""
    found = [match for match in (one[0] for one in _NUMBER.finditer(text)) if match]
    if not found:
        return None
    digits = found[-1 if which == "last" else 0].replace(",", "").replace("−", "-")
    return Decimal(digits) if len(digits) <= _MAX_DIGITS else None
