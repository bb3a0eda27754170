"""Scores on data that no search ever saw, and the baselines that people merge by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimizer.errors import InfeasibleCandidate
from optimizer.fitness.aggregate import aggregate
from optimizer.ports import Task as Evaluation
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.spec import JobSpec
from workers.prepare import prepare
from workers.roots import Roots
from workers.worker import EvaluationWorker

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Coefficients that task arithmetic is tuned over, by its scores on the search split (Ilharco et al., 2212.04089)."""


class Scorer:
    """Scores recipes on one split in this process.

    Args:
        spec: a job whose objectives are the measures.
        root: directory of its models and data.
    """

    def __init__(self, spec: JobSpec, root: Path) -> None:
        roots = Roots([root])
        self.problem: Problem = prepare(spec, roots)
        self._worker = EvaluationWorker(spec, self.problem, roots, "scorer")

    def __call__(self, recipe: Recipe) -> list[float]:
        """Return the value of each objective, in order; raises `InfeasibleCandidate` if there is none."""
        result = self._worker.evaluate(Evaluation(0, recipe.to_json()))
        if result.failure is not None:
            raise InfeasibleCandidate(result.failure.message)
        return aggregate(self.problem.objectives, result.scores)


@dataclass(frozen=True)
class Baseline:
    """A merge without a search.

    Attributes:
        name: as the table shows it.
        recipes: the merge, or what to choose from by the mean score on the search split.
    """

    name: str
    recipes: Sequence[Recipe]


def baselines(problem: Problem) -> list[Baseline]:
    """Return the base, each expert, the uniform soup, tuned task arithmetic, and TIES at its paper's defaults."""
    experts = [name for name in problem.models if name != "base"]
    uniform = _merge(problem, "task_arithmetic", 1 / len(experts))
    return [
        Baseline("base", [Recipe(models=problem.models, root=Leaf(model="base"))]),
        *(Baseline(f"expert {name}", [Recipe(models=problem.models, root=Leaf(model=name))]) for name in experts),
        Baseline("uniform soup", [uniform]),
        Baseline("task arithmetic, grid", [_merge(problem, "task_arithmetic", value) for value in GRID]),
        # Yadav et al., 2306.01708: keep the top 20 %, λ = 1.
        Baseline("TIES, defaults", [_merge(problem, "ties", 1.0, density=0.2)]),
    ]


def choose(baseline: Baseline, score: Callable[[Recipe], list[float]]) -> Recipe:
    """Return the baseline's recipe with the best mean by ``score``, of which more is better."""
    if len(baseline.recipes) == 1:
        return baseline.recipes[0]
    return max(baseline.recipes, key=lambda recipe: sum(score(recipe)))


def _merge(problem: Problem, operator: str, coefficient: float, **options: float) -> Recipe:
    experts = [name for name in problem.models if name != "base"]
    return Recipe(
        models=problem.models,
        root=Merge(
            operator=operator,
            options=dict(options),
            base=Leaf(model="base"),
            inputs=[Leaf(model=name) for name in experts],
            groups=[Selector()],
            coefficients=[[coefficient] * len(experts)],
        ),
    )
