"""Exact match: whether an answer is, begins with or contains a right one."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence
from typing import ClassVar, Literal

import regex
from pydantic import Field

from workers.graders.base import Answers, Grader, GraderInputs, grader, references
from workers.graders.patterns import compiled, last_group

_ARTICLES = regex.compile(r"\b(a|an|the)\b", regex.IGNORECASE)
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation))


@grader("exact_match")
class ExactMatch(Grader):
    """1 if the answer equals any of the row's right answers, else 0, both normalised alike.

    With ``ignore_case``, ``ignore_punctuation`` and ``ignore_articles`` it is the exact match of SQuAD.
    """

    summary: ClassVar[str] = "Whether the answer is a right one, after normalisation; any of several counts."
    columns: ClassVar[dict[str, str]] = {"answer": "The right answer: a text or number, or a list of which any counts."}

    class Options(Grader.Options):
        """Options of the exact match."""

        where: Literal["whole", "start", "anywhere"] = Field(
            default="whole", description="Where the right answer must stand: it is all, the beginning, or somewhere."
        )
        extract: str | None = Field(
            default=None,
            description="Regular expression whose last match in the answer is compared: its first group, if it has any.",
            examples=[r"answer is (\w+)"],
        )
        ignore_case: bool = Field(default=False, description="Compare without case.")
        ignore_punctuation: bool = Field(default=False, description="Compare without ASCII punctuation.")
        ignore_articles: bool = Field(default=False, description="Compare without a, an, the.")
        ignore_spaces: bool = Field(
            default=True, description="Compare without spaces at the ends, and with one for several in a row."
        )

    options: Options

    def __init__(self, options: Options, inputs: GraderInputs) -> None:
        super().__init__(options, inputs)
        self._right = [{self._normal(text) for text in texts} for texts in references(inputs.rows)]
        field = f"{inputs.field}.options.extract"
        self._extract = None if options.extract is None else compiled(options.extract, field)

    def grade(self, answers: Answers) -> Sequence[float]:
        """See `Grader.grade`."""
        return [float(self._right_one(text, right)) for text, right in zip(answers.texts, self._right, strict=True)]

    def _right_one(self, text: str, right: set[str]) -> bool:
        found = text if self._extract is None else last_group(self._extract, text)
        if found is None:
            return False
        given = self._normal(found)
        if self.options.where == "whole":
            return given in right
        if self.options.where == "start":
            return any(given.startswith(one) for one in right)
        return any(one in given for one in right)

    def _normal(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        if self.options.ignore_case:
            text = text.casefold()
        if self.options.ignore_punctuation:
            text = text.translate(_PUNCTUATION)
        if self.options.ignore_articles:
            text = _ARTICLES.sub(" ", text)
        return " ".join(text.split()) if self.options.ignore_spaces or self.options.ignore_articles else text
