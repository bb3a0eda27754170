"""`auto` chooses by what a job is, says why, and its choice is stored with the job."""

from __future__ import annotations

from typing import Any

import pytest

from optimizer.algorithms import ALGORITHMS
from optimizer.algorithms.auto import Auto
from optimizer.errors import InvalidInput
from optimizer.phases import plan
from optimizer.problem import PlannedPhase
from tests.factories import make_problem, make_spec
from tests.optimizer.algorithms.driving import make_context, mixed, reals


def planned(experts: int = 2, objectives: int = 1, evaluations: int = 200, **changes: Any) -> list[PlannedPhase]:
    names = [f"e{number}" for number in range(experts)]
    one = make_spec().objectives[0].model_dump(mode="json") | {"head": names[0]}
    spec = make_spec(
        algorithm="auto",
        experts=[{"name": name, "path": name} for name in names],
        objectives=[one | {"name": f"o{number}"} for number in range(objectives)],
        budget={"evaluations": evaluations},
        **changes,
    )
    problem = make_problem(spec)
    found = problem.model_copy(
        update={"objectives": [o.model_copy(update={"differentiable": True}) for o in problem.objectives]}
    )
    return plan(spec, found)


def names(phases: list[PlannedPhase]) -> list[str]:
    return [phase.algorithm.name for phase in phases]


@pytest.mark.parametrize("objectives", [1, 2, 5])
@pytest.mark.parametrize("experts", [2, 8, 40])
@pytest.mark.parametrize("evaluations", [1, 12, 50, 200, 1000, 100_000])
def test_every_plan_spends_the_budget_and_says_why(experts: int, objectives: int, evaluations: int) -> None:
    phases = planned(experts, objectives, evaluations)
    assert all(phase.why for phase in phases)
    assert sum(phase.evaluations for phase in phases) >= evaluations
    assert "auto" not in names(phases)


@pytest.mark.parametrize("objectives", [1, 2])
def test_by_hand_first_where_it_costs_little(objectives: int) -> None:
    assert names(planned(2, objectives, 100))[0] == "baselines"
    assert "baselines" not in names(planned(8, objectives, 200))
    greedy = ["models", "uniform", "greedy_soup"]
    assert planned(8, objectives, 300)[0].algorithm.options["include"] == greedy
    assert planned(8, objectives, 2000)[0].algorithm.options == {}


def test_frank_wolfe_chooses_among_many_experts() -> None:
    phases = planned(experts=40, evaluations=1000)
    assert "frank_wolfe" in names(phases)
    assert phases[-1].keep_experts == 8
    assert "frank_wolfe" not in names(planned(experts=4, evaluations=1000))


def test_local_models_first_and_evolution_for_long_budgets() -> None:
    assert names(planned(evaluations=200))[-1] == "trust_region"
    assert names(planned(evaluations=2000))[-2:] == ["trust_region", "cma_es"]
    assert names(planned(objectives=2, evaluations=200))[-1] == "bayesian"
    assert names(planned(objectives=2, evaluations=2000))[-2:] == ["bayesian", "moead"]
    assert names(planned(experts=16, objectives=2, evaluations=200))[-1] == "trust_region", "many variables"
    assert names(planned(objectives=5, evaluations=2000))[-1] == "moead"
    assert planned(evaluations=2000, asynchronous=True)[-1].algorithm.options == {"close_after": 0.75}
    many = planned(experts=80, evaluations=200, merge={"operator": "task_arithmetic"})
    assert names(many)[-1] == "cma_es"


@pytest.mark.parametrize("objectives", [1, 2, 5])
@pytest.mark.parametrize("experts", [2, 8, 80])
def test_what_is_to_be_raced_is_searched_by_what_races(experts: int, objectives: int) -> None:
    found = names(planned(experts, objectives, 3000, fitness={"racing": {"enabled": True}}))
    assert {name for name in found if not ALGORITHMS[name].races} <= {"baselines", "frank_wolfe"}


def test_races_need_an_algorithm_that_has_some() -> None:
    racing = {"racing": {"enabled": True}}
    for changes in ({"algorithm": "random"}, {"phases": [{"algorithm": "m2n2"}, {"algorithm": "random"}]}):
        spec = make_spec(**changes, fitness=racing)
        with pytest.raises(InvalidInput, match=r"measures? every candidate on all items") as caught:
            plan(spec, make_problem(spec))
        assert caught.value.field == "fitness.racing.enabled"
        assert "cma_es" in str(caught.value)
    mixed_phases = make_spec(phases=[{"algorithm": "random"}, {"algorithm": "cma_es"}], fitness=racing)
    assert len(plan(mixed_phases, make_problem(mixed_phases))) == 2


def test_evolution_where_very_many_are_evaluated_at_once() -> None:
    at_once = planned(evaluations=200, parallel_evaluations=32)
    assert names(at_once)[-1] == "cma_es"
    assert "32 evaluations at once" in at_once[-1].why
    assert names(planned(evaluations=200, parallel_evaluations=8))[-1] == "trust_region"


def test_choices_are_modelled_in_full() -> None:
    found = Auto(make_context(mixed(), budget=50), Auto.Options())
    assert isinstance(found._inner, ALGORITHMS["bayesian"])


@pytest.mark.parametrize("experts", [4, 6, 8])
def test_experts_are_probed_where_there_are_several(experts: int) -> None:
    phases = planned(experts=experts, evaluations=200)
    assert names(phases)[-1] == "trust_region"
    assert f"each of {experts} experts is probed" in phases[-1].why
    few = planned(experts=8, evaluations=20)
    assert names(few) == ["trust_region"]
    assert "probed" not in few[0].why, "too few evaluations to probe eight experts"


def test_probes_are_of_the_experts_that_are_kept() -> None:
    phases = planned(experts=40, evaluations=1000, merge={"operator": "task_arithmetic"})
    assert all("40 experts is probed" not in phase.why for phase in phases)


def test_in_a_plain_box_it_is_the_algorithm_that_fits() -> None:
    few = Auto(make_context(reals(5), budget=50), Auto.Options())
    many = Auto(make_context(reals(500), budget=50), Auto.Options())
    assert few.ask(3)
    assert few.batch_size == 1
    assert many.batch_size > 1
    assert few.stop_reason is None
