"""The worker of a job without checkpoints: it holds no model, and asks the services that the objectives name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from optimizer.errors import InvalidInput
from optimizer.ports import Result, Task
from optimizer.problem import Problem
from optimizer.recipe import Recipe
from optimizer.spec import JobSpec
from workers.evaluation import Later, measure, result_of, unseen_measures
from workers.evaluators.base import Evaluator, Scores
from workers.evaluators.service import ServiceEvaluator
from workers.measuring import Measure, attempt, check_data, measures_of, one_by_one, timed
from workers.merging.cache import Cache
from workers.prepare import make_evaluators
from workers.roots import Roots
from workers.services.sharing import Services


class ServiceWorker:
    """Evaluates candidates by asking services.

    Args:
        spec: the job.
        problem: its inputs as found when it was prepared.
        roots: where data may be, and which services may be asked.
        name: how the worker is called in results.
        cache: where services' answers are kept; in memory by default.
    """

    def __init__(self, spec: JobSpec, problem: Problem, roots: Roots, name: str, cache: Cache | None = None) -> None:
        self._name = name
        self._services = Services.of(spec.workers.count, cache)
        evaluators = make_evaluators(spec, roots, {}, self._services)
        check_data(problem.objectives, evaluators)
        self._measures = measures_of(spec, problem, dict(enumerate(evaluators)))
        self._tests = Later(partial(unseen_measures, spec, problem, roots, {}, self._services))

    def evaluate(self, task: Task, cancelled: Callable[[], bool] = lambda: False) -> Result:
        """Return the per-item scores of a candidate, or why it has none; raises as `attempt` does."""
        return attempt(task, self._name, partial(self._evaluate, task, cancelled), self._services.meter)

    def _evaluate(self, task: Task, cancelled: Callable[[], bool], seconds: dict[str, float]) -> Result:
        recipe = Recipe.parse(task.recipe)

        def score(_: Measure[Evaluator], evaluator: Evaluator) -> Scores:
            if not isinstance(evaluator, ServiceEvaluator):
                raise InvalidInput(f"{evaluator.name} looks at a model, and there is none", field="evaluator")
            return evaluator.score(recipe, cancelled)

        with timed(seconds, "evaluate"):
            found = measure(task, self._measures, self._tests, one_by_one(score))
        return result_of(task, found, self._name, seconds)
