"""The algorithm for those who do not want to choose one: it becomes the phases that measurements speak for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from optimizer.algorithms.base import ALGORITHMS, Algorithm, AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.expert_scales import SHARE, expert_columns
from optimizer.fitness.racing import Rivals
from optimizer.problem import PlannedPhase, Problem
from optimizer.space import SearchSpace, make_space
from optimizer.spec import AlgorithmSpec, JobSpec

_FEW_VARIABLES = 100
_UNKNOWN_BUDGET = 2500
_MANY_EXPERTS = 12
_KEPT_EXPERTS = 8
_MANY_OBJECTIVES = 5
"""Five on digits-8, two digits each; hypervolume after 50 and 200, two seeds: `moead` .53 and .83, `trust_region`
.39 and .71, `nsga3` .40 and .57, `bayesian` .37 and .51."""
_BASELINES_SHARE = 0.03
"""Models learn more from as many evaluations of their own: with a greedy soup first, which took 8 % of 50 and 4 % of 200
evaluations, the loss was 0.457 for 0.424 on digits-4 and 0.319 for 0.280 on digits-8; with all of it, which took 14 %, a
front of four objectives had 0.48 for 0.89 of the hypervolume on digits-4."""
_MODELLED_VARIABLES = 30
"""By global models of several objectives; hypervolume after 200 evaluations of 12, 24 and 48 variables: `bayesian` .96, .80
and .67, `trust_region` .92, .73 and .92, `moead` .91, .48 and .78."""
_MANY_IN_FLIGHT = 16
"""With 32 at once CMA-ES beats local models, which then know little of what they step from; with 8 these are ahead."""
_FOR_FEW = {"bayesian": 250, "trust_region": 1000}
"""Searches that stop paying after so many evaluations."""


@dataclass(frozen=True)
class _Features:
    """What the choice depends on.

    Attributes:
        objectives, variables, experts: how many there are.
        discrete: how many of the variables are integers or choices.
        races: whether candidates are to be stopped early.
        evaluations: the budget.
        differentiable: whether all objectives have slopes.
        asynchronous: whether outcomes are told in any order.
        columns: how many experts have coefficients of their own, which are probed; 0 where none have.
        parallel: evaluations in flight at once.
    """

    objectives: int
    variables: int
    experts: int
    evaluations: int
    differentiable: bool
    asynchronous: bool = False
    columns: int = 0
    parallel: int = 1
    discrete: int = 0
    races: bool = False


@algorithm("auto")
class Auto(Algorithm):
    """Chooses one algorithm, or several phases, before a job begins; the job's page says why.

    Put into a plain box (another program's, or a phase of its own) it is the one algorithm that fits it best.
    """

    summary = "Chooses algorithms and phases by objectives, variables, experts and budget, and says in the job why."
    reference = "mergeopt 2026; figures in tests/benchmarks/README.md"
    multi_objective = True
    races = True

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        space = context.space
        features = _Features(
            objectives=context.objectives,
            variables=space.dim,
            experts=0,
            evaluations=context.budget or _UNKNOWN_BUDGET,
            differentiable=False,
            parallel=context.parallel,
            discrete=_discrete(space),
        )
        cls = ALGORITHMS[_search(features)[0].name]
        self._inner = cls(context, cls.Options())

    @classmethod
    def phases(cls, spec: JobSpec, problem: Problem, options: Any, evaluations: int) -> list[PlannedPhase] | None:
        """See `Algorithm.phases`."""
        del options
        space = make_space(spec, problem)
        columns = expert_columns(space)
        return _plan(
            _Features(
                objectives=len(problem.axes),
                variables=space.dim,
                experts=len(problem.experts) if spec.merge.space is None else 0,
                evaluations=evaluations,
                differentiable=all(objective.differentiable for objective in problem.axes),
                asynchronous=spec.asynchronous,
                columns=0 if columns is None else int(columns.max()) + 1,
                parallel=spec.in_flight,
                discrete=_discrete(space),
                races=spec.fitness.racing.enabled,
            )
        )

    @property
    def stop_reason(self) -> str | None:
        """That of the algorithm it chose."""
        return self._inner.stop_reason

    @property
    def batch_size(self) -> int:
        """That of the algorithm it chose."""
        return self._inner.batch_size

    def rivals(self) -> Rivals | None:
        """Those of the algorithm it chose."""
        return self._inner.rivals()

    def ask(self, count: int) -> list[Proposal]:
        """See the algorithm it chose."""
        return self._inner.ask(count)

    def tell(self, outcome: Outcome) -> None:
        """See the algorithm it chose."""
        self._inner.tell(outcome)


def _discrete(space: SearchSpace) -> int:
    return sum(variable.kind != "real" for variable in space.variables)


def _plan(features: _Features) -> list[PlannedPhase]:
    phases: list[PlannedPhase] = []
    left = features.evaluations
    kept: int | None = None
    first = _baselines(features)
    if first is not None:
        phases.append(first)
        left -= first.evaluations
    if features.experts >= _MANY_EXPERTS and features.differentiable and left >= 4 * features.experts:
        spent = max(1, left // 4)
        why = f"Frank-Wolfe chooses among {features.experts} experts by one backward pass for each step"
        phases.append(PlannedPhase(algorithm=AlgorithmSpec(name="frank_wolfe"), evaluations=spent, why=why))
        left -= spent
        kept = _KEPT_EXPERTS
        features = replace(features, columns=min(features.columns, kept))
    for chosen, spent, why in _searches(replace(features, evaluations=left)):
        phases.append(PlannedPhase(algorithm=chosen, evaluations=spent, keep_experts=kept, why=why))
    return phases


def _baselines(features: _Features) -> PlannedPhase | None:
    """The merges that people try by hand, all of them or a greedy soup alone, where they cost little."""
    for cost, options in (
        (2 * features.experts + 20, {}),
        # Each expert alone is among the usual warm starts.
        (features.experts, {"include": ["models", "uniform", "greedy_soup"]}),
    ):
        if features.experts and cost <= _BASELINES_SHARE * features.evaluations:
            return PlannedPhase(
                algorithm=AlgorithmSpec(name="baselines", options=options),
                evaluations=cost + features.experts + 2,
                why=f"what people try by hand costs at most {cost} of {features.evaluations} evaluations: a good beginning",
            )
    return None


def _searches(features: _Features) -> list[tuple[AlgorithmSpec, int, str]]:
    """The main searches, how many evaluations each gets, and why; those that sketch are followed by one that polishes."""
    chosen, why = _search(features)
    if chosen.name not in _FOR_FEW:
        return [(chosen, features.evaluations, why)]
    spent = min(features.evaluations, _FOR_FEW[chosen.name])
    found = [(chosen, spent, why)]
    left = features.evaluations - spent
    if left:
        reason = f"{left} more evaluations than a model needs: evolution goes on from what it found"
        found.append((_evolution(features), left, reason))
    return found


def _search(features: _Features) -> tuple[AlgorithmSpec, str]:
    """The search to begin with, and why."""
    size = f"{features.variables} variables and {features.evaluations} evaluations"
    objectives = "one objective" if features.objectives == 1 else f"{features.objectives} objectives"
    why = f"{objectives}, {size}"
    if features.objectives >= _MANY_OBJECTIVES:
        return _evolution(features), why
    single, discrete = features.objectives == 1, 2 * features.discrete > features.variables
    many = features.parallel > _MANY_IN_FLIGHT
    modelled = features.variables <= (_FEW_VARIABLES if single else _MODELLED_VARIABLES)
    if modelled and (not single or (discrete and not many)):
        return AlgorithmSpec(name="bayesian"), f"{why}: a model of the objectives finds good merges in few evaluations"
    if features.variables <= _FEW_VARIABLES and many:
        return _evolution(features), f"{why}, {features.parallel} evaluations at once"
    if features.variables > _FEW_VARIABLES or discrete:
        return _evolution(features), why
    probes = features.columns + 1
    if features.columns >= 2 and probes <= SHARE * features.evaluations:
        why = f"{why}: each of {features.columns} experts is probed, as one that does not belong spoils every merge"
    return AlgorithmSpec(name="trust_region"), f"{why}; local models find good merges in few evaluations"


def _evolution(features: _Features) -> AlgorithmSpec:
    if features.objectives > 1:
        racing = "nsga3" if features.objectives >= _MANY_OBJECTIVES else "nsga2"
        return AlgorithmSpec(name=racing if features.races else "moead")
    # Where outcomes come in any order, a generation need not wait for the slowest quarter.
    return AlgorithmSpec(name="cma_es", options={"close_after": 0.75} if features.asynchronous else {})
