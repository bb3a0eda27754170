"""Regular expression: whether a pattern is found in an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from optimizer.errors import InvalidInput
from workers.graders.base import Answers, Grader, GraderInputs, grader
from workers.graders.patterns import compiled, search


@grader("regex")
class RegularExpression(Grader):
    """1 if the pattern is found, else 0, or the other way round; 0 where a search does not end within a second."""

    summary: ClassVar[str] = "Whether a regular expression is found in the answer; one for all items or one each."
    columns: ClassVar[dict[str, str]] = {"pattern": "A regular expression (only where the option gives none)."}

    class Options(Grader.Options):
        """Options of the regular expression."""

        pattern: str | None = Field(
            default=None, description="The pattern for all items; the column `pattern` has them without it."
        )
        ignore_case: bool = Field(default=False, description="Search without case.")
        whole: bool = Field(
            default=False, description="The pattern must match the whole answer, spaces at its ends apart."
        )
        absent: bool = Field(default=False, description="Score 1 where the pattern is not found.")

    options: Options

    def __init__(self, options: Options, inputs: GraderInputs) -> None:
        super().__init__(options, inputs)
        if options.pattern is not None:
            one = compiled(options.pattern, f"{inputs.field}.options.pattern", ignore_case=options.ignore_case)
            self._patterns = [one] * len(inputs.rows)
            return
        self._patterns = []
        for row, text in enumerate(inputs.rows.texts("pattern")):
            try:
                self._patterns.append(compiled(text, "pattern", ignore_case=options.ignore_case))
            except InvalidInput as error:
                raise inputs.rows.error("pattern", row, error.message) from error

    def grade(self, answers: Answers) -> Sequence[float]:
        """See `Grader.grade`."""
        pairs = zip(self._patterns, answers.texts, strict=True)
        return [
            float(search(one, text.strip(), whole=self.options.whole) != self.options.absent) for one, text in pairs
        ]
