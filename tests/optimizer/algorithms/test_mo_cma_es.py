"""What MO-CMA-ES does by itself: selection, step sizes, covariances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.algorithms import Outcome
from optimizer.algorithms.mo_cma_es import MoCmaEs, _Adaptation, _Individual
from optimizer.space import Genome
from tests.optimizer.algorithms.driving import (
    Case,
    best_loss,
    clean,
    drive,
    make_context,
    mixed,
    proposals_of,
    reals,
    same,
    smooth,
)


def mo_cma(options: dict[str, Any], dim: int = 2, budget: int | None = 200, objectives: int = 2) -> MoCmaEs:
    algorithm = Case("mo_cma_es", options).make(make_context(reals(dim), objectives=objectives, budget=budget))
    assert isinstance(algorithm, MoCmaEs)
    return algorithm


def outcome(index: int, *losses: float, violation: float = 0.0) -> Outcome:
    return Outcome(index, np.full(2, 0.1 * index), np.array(losses), violation, own=False)


def survivors(algorithm: MoCmaEs, outcomes: list[Outcome]) -> set[int]:
    for each in outcomes:
        algorithm.tell(each)
    return {one.outcome.index for one in algorithm._population}


def test_the_least_contribution_leaves() -> None:
    front = [outcome(0, 0.0, 1.0), outcome(1, 0.45, 0.5), outcome(2, 0.5, 0.45), outcome(3, 1.0, 0.0)]
    assert survivors(mo_cma({"population": 4}), [*front, outcome(4, 0.2, 0.7)]) in ({0, 1, 3, 4}, {0, 2, 3, 4})


def test_the_last_front_leaves_first_and_violations_before_it() -> None:
    feasible = [outcome(0, 0.0, 1.0), outcome(1, 1.0, 0.0), outcome(2, 1.0, 1.0)]
    violating = [outcome(3, 0.0, 0.0, violation=2.0), outcome(4, -1.0, -1.0, violation=3.0)]
    assert survivors(mo_cma({"population": 4}), [*violating, *feasible]) == {0, 1, 2, 3}
    assert survivors(mo_cma({"population": 2}), [*violating, *feasible]) == {0, 1}


def test_of_equals_the_youngest_leaves() -> None:
    assert survivors(mo_cma({"population": 2}), [outcome(index, 1.0, 1.0) for index in range(4)]) == {0, 1}


def individual(dim: int, *, diagonal: bool) -> tuple[_Adaptation, _Individual]:
    adaptation = _Adaptation(dim, diagonal=diagonal)
    return adaptation, adaptation.founder(Outcome(0, np.zeros(dim), np.zeros(1)), np.zeros(dim), 0.1)


def test_step_size_keeps_at_the_target_and_follows_success() -> None:
    adaptation, one = individual(4, diagonal=False)
    for _ in range(20):
        adaptation.step_size(one, success=True)
    assert one.sigma > 0.15
    for _ in range(200):
        adaptation.step_size(one, success=False)
    assert one.sigma < 0.05


@pytest.mark.parametrize("diagonal", [False, True])
def test_covariance_grows_along_good_steps(diagonal: bool) -> None:
    adaptation, one = individual(4, diagonal=diagonal)
    for _ in range(60):
        adaptation.covariance(one, np.array([2.0, 2.0, 0.0, 0.0]))
    assert one.stds[0] > 2 * one.stds[2]
    if not diagonal:
        random = np.random.Generator(np.random.PCG64(0))
        steps = np.array([one.draw(random) for _ in range(500)])
        assert np.corrcoef(steps[:, 0], steps[:, 1])[0, 1] > 0.8


def test_full_covariance_learns_dependencies() -> None:
    rotation, _ = np.linalg.qr(np.random.Generator(np.random.PCG64(0)).normal(size=(4, 4)))

    def losses(genome: Genome) -> NDArray[np.float64]:
        return np.array([np.square(rotation @ (genome - 0.4)) @ [1.0, 10.0, 100.0, 1000.0]])

    def best(covariance: str) -> float:
        return best_loss(drive(mo_cma({"covariance": covariance}, 4, objectives=1), clean(losses), 1500))

    assert best("full") < 1e-2 * best("diagonal")


@pytest.mark.parametrize(
    ("dim", "budget", "expected"), [(4, 199, "diagonal"), (4, 200, "full"), (4, None, "full"), (101, None, "diagonal")]
)
def test_automatic_covariance(dim: int, budget: int | None, expected: str) -> None:
    space = reals(dim)

    def proposals(covariance: str) -> list[Any]:
        algorithm = mo_cma({"covariance": covariance, "population": 4}, dim, budget)
        return proposals_of(drive(algorithm, clean(smooth(space, 2)), 100))

    assert same(proposals("auto"), proposals(expected))


def test_discrete_variables_never_freeze() -> None:
    space = mixed()

    def losses(genome: Genome) -> NDArray[np.float64]:
        return np.array([np.square(genome - space.low - 0.3 * (space.high - space.low)).sum()])

    log = drive(Case("mo_cma_es").make(make_context(space, budget=None)), clean(losses), 2000)
    late = np.array([proposal.genome for proposal in proposals_of(log)][-500:]).T
    for variable, column in zip(space.variables, late, strict=True):
        if variable.kind != "real":
            assert len({variable.read(float(number)) for number in column}) > 1, variable.name


def test_a_failed_child_shortens_its_parents_step() -> None:
    algorithm = mo_cma({"population": 1})
    algorithm.tell(outcome(0, 1.0, 1.0))
    before = algorithm._population[0].sigma
    [proposal] = algorithm.ask(1)
    assert proposal.parents == (0,)
    algorithm.tell(Outcome(1, proposal.genome, None))
    assert algorithm._population[0].sigma < before
    assert len(algorithm._population) == 1
