"""BLEU, chrF and ROUGE: how much of the references' wording an answer has, from 0 to 1 an item."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from workers.graders.base import Answers, Grader, GraderInputs, grader, needs, references

_ANSWER = {"answer": "The reference: a text, or a list of texts."}


class _Overlap(Grader):
    """What the three share: the references, and an optional package."""

    columns: ClassVar[dict[str, str]] = _ANSWER
    package: ClassVar[str]

    def __init__(self, options: Any, inputs: GraderInputs) -> None:
        super().__init__(options, inputs)
        self._references = references(inputs.rows)
        try:
            self._measure = self._load(importlib.import_module(self.package))
        except ImportError as error:
            raise needs(self.package.partition(".")[0], "text", f"{inputs.field}.name") from error

    def grade(self, answers: Answers) -> Sequence[float]:
        """See `Grader.grade`."""
        return [self._score(text, right) for text, right in zip(answers.texts, self._references, strict=True)]

    @abstractmethod
    def _load(self, package: Any) -> Any:
        """Return what scores sentences."""

    def _score(self, text: str, right: list[str]) -> float:
        return float(self._measure.sentence_score(text, right).score) / 100


@grader("bleu")
class Bleu(_Overlap):
    """Sentence BLEU (Papineni et al., 2002) as sacrebleu computes it, with its effective order, over 100.

    The mean over items is not the BLEU of the corpus, which counts n-grams of all items together.
    """

    summary: ClassVar[str] = "BLEU of each answer against its references (sacrebleu), from 0 to 1."
    package: ClassVar[str] = "sacrebleu.metrics"

    class Options(Grader.Options):
        """Options of BLEU."""

        tokenize: Literal["13a", "intl", "char", "none"] = Field(default="13a", description="sacrebleu's tokeniser.")
        lowercase: bool = Field(default=False, description="Compare without case.")

    options: Options

    def _load(self, package: Any) -> Any:
        return package.BLEU(tokenize=self.options.tokenize, lowercase=self.options.lowercase, effective_order=True)


@grader("chrf")
class ChrF(_Overlap):
    """chrF (Popović, 2015) as sacrebleu computes it, over 100; with ``word_order`` 2 it is chrF++."""

    summary: ClassVar[str] = "chrF of each answer against its references (sacrebleu), from 0 to 1."
    package: ClassVar[str] = "sacrebleu.metrics"

    class Options(Grader.Options):
        """Options of chrF."""

        word_order: int = Field(default=0, ge=0, le=4, description="Longest word n-grams; 2 is chrF++.")
        lowercase: bool = Field(default=False, description="Compare without case.")

    options: Options

    def _load(self, package: Any) -> Any:
        return package.CHRF(word_order=self.options.word_order, lowercase=self.options.lowercase)


@grader("rouge")
class Rouge(_Overlap):
    """ROUGE (Lin, 2004) as rouge-score computes it: the F1 of the best reference. Letters outside ASCII do not count."""

    summary: ClassVar[str] = "ROUGE-1, -2 or -L (F1) of each answer against the best of its references, from 0 to 1."
    package: ClassVar[str] = "rouge_score.rouge_scorer"

    class Options(Grader.Options):
        """Options of ROUGE."""

        variant: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = Field(
            default="rougeL", description="Which ROUGE."
        )
        stem: bool = Field(default=False, description="Compare stems of English words (Porter).")

    options: Options

    def _load(self, package: Any) -> Any:
        return package.RougeScorer([self.options.variant], use_stemmer=self.options.stem)

    def _score(self, text: str, right: list[str]) -> float:
        return float(self._measure.score_multi(right, text)[self.options.variant].fmeasure)
