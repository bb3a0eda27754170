"""Measures that some service takes: they look at what a candidate is, not at a model in this process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from transformers import PreTrainedModel

from optimizer.errors import InvalidInput
from optimizer.recipe import Recipe
from workers.evaluators.base import Evaluator, Scores, never


class ServiceEvaluator(Evaluator):
    """A measure that asks a service.

    It serves jobs without checkpoints, whose candidates are values (`Recipe.values`), and jobs that merge: the service
    then gets the recipe as data.
    """

    auto_class: ClassVar[str] = ""
    remembered: ClassVar[bool] = (
        False  # the service may change behind its address; evaluators keep its answers themselves
    )
    uses_head: ClassVar[bool] = False

    @abstractmethod
    def score(self, recipe: Recipe, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a candidate; see `Evaluator.evaluate`.

        Raises:
            ServiceUnavailable: the service does not answer now; the same may succeed later.
            JobPaused: somebody has to do something first: renew a token, raise a budget, restart a service.
            InfeasibleCandidate: the service says that this candidate has no score.
        """

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Refuse: there is nothing it could do with a model."""
        del model, cancelled
        raise InvalidInput(f"{self.name} asks a service and scores no models", field="evaluator")
