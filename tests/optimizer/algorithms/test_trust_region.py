"""What the trust region does beyond the contract: few evaluations, strangers, failures, discrete variables."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.algorithms import Algorithm, Outcome
from optimizer.expert_scales import Probes, expert_columns
from optimizer.pareto import front_mask, hypervolume
from optimizer.space import Genome
from tests.optimizer.algorithms.driving import (
    Case,
    Evaluate,
    best_loss,
    drive,
    make_context,
    mixed,
    outcomes_of,
    proposals_of,
    reals,
)
from tests.optimizer.test_expert_scales import evaluate as with_strangers
from tests.optimizer.test_expert_scales import space, warm

TRUST = Case("trust_region")


def valley(dim: int, seed: int = 0) -> Evaluate:
    """A quadratic with interactions and unlike curvatures, whose minimum lies at 0.9."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.standard_normal((dim, dim)))[0]
    hessian = turn @ np.diag(np.geomspace(1, 20, dim)) @ turn.T

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        away = genome - 0.9
        return Outcome(index, genome, np.array([float(away @ hessian @ away)]), own=own)

    return evaluate


@pytest.mark.parametrize("dim", [6, 40])
def test_smooth_losses_take_about_as_many_evaluations_as_there_are_variables(dim: int) -> None:
    evaluate, count = valley(dim), 3 * dim
    context = make_context(reals(dim), budget=count)
    begin = float(evaluate(0, context.start, True).losses[0])  # type: ignore[index]
    found = {name: best_loss(drive(Case(name).make(context), evaluate, count)) for name in ("trust_region", "cma_es")}
    assert found["trust_region"] < 0.15 * begin
    assert found["trust_region"] < 0.4 * found["cma_es"]


def test_several_objectives_are_followed_in_turn() -> None:
    """Three quadratics with minima of their own: the whole front, not only where the weighted sum is least."""
    where = reals(12)
    places = np.eye(3).repeat(4, axis=1) * 0.6 + 0.2

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        return Outcome(index, genome, np.square(genome - places).sum(axis=1), own=own)

    volumes = {}
    for weightings in (1, 10):
        algorithm = Case("trust_region", {"weightings": weightings}).make(make_context(where, objectives=3, budget=120))
        log = drive(algorithm, evaluate, 120, foreign=[where.low, where.high, where.low + 0.3])
        losses = np.array([outcome.losses for outcome in outcomes_of(log)])
        volumes[weightings] = hypervolume(losses[front_mask(losses)], np.full(3, 4.0))
    assert volumes[10] > 1.1 * volumes[1]


def test_it_steps_before_all_axes_are_known() -> None:
    context = make_context(reals(30), budget=40)
    log = outcomes_of(drive(TRUST.make(context), valley(30), 30))
    losses = [float(o.losses[0]) for o in log if o.losses is not None]
    assert min(losses[:16]) < 0.9 * losses[0]


def test_an_expert_that_does_not_belong_is_moved_less() -> None:
    where = space()
    context = make_context(where, budget=150)
    found = {}
    for probed in (True, False):
        algorithm = Case("trust_region", {"probe_experts": probed}).make(context)
        found[probed] = best_loss(drive(algorithm, with_strangers, 90, foreign=warm(where)))
    assert found[True] < 0.7 * found[False]


def test_the_first_proposals_are_the_probes() -> None:
    where = space()
    columns = expert_columns(where)
    assert columns is not None
    context = make_context(where, budget=100)
    algorithm = TRUST.make(context)
    start = np.full(where.dim, 0.25)
    algorithm.tell(Outcome(0, start, np.array([1.0]), own=False))
    expected = Probes(where, columns, start).genomes[1:]
    found = [proposal.genome for proposal in algorithm.ask(len(expected))]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def fails_beyond(limit: float) -> Evaluate:
    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        outcome = valley(len(genome))(index, genome, own)
        return outcome if genome[0] < limit else Outcome(index, genome, None, own=own)

    return evaluate


def test_where_evaluations_fail_it_goes_on_elsewhere() -> None:
    context = make_context(reals(5), budget=80)
    log = drive(TRUST.make(context), fails_beyond(0.5), 60)
    genomes = np.array([proposal.genome for proposal in proposals_of(log)])
    assert len(np.unique(genomes.round(9), axis=0)) == len(genomes)
    best = min((o for o in outcomes_of(log) if o.losses is not None), key=lambda o: float(o.losses[0]))  # type: ignore[index]
    assert 0.4 < best.genome[0] < 0.5


def switched(index: int, genome: Genome, own: bool) -> Outcome:
    """Best with the second word, the switch on, and many at 7."""
    word, switch = int(genome[5]), int(genome[4])
    loss = (genome[0] - 0.7) ** 2 + (genome[1] - 1) ** 2 + abs(round(genome[3]) - 7) / 10
    return Outcome(index, genome, np.array([loss + (word != 1) + (switch != 1)]), own=own)


def test_integers_and_choices_are_found_too() -> None:
    log = drive(TRUST.make(make_context(mixed(), budget=200)), switched, 150)
    best = min(outcomes_of(log), key=lambda o: float(o.losses[0]))  # type: ignore[index]
    assert (int(best.genome[4]), int(best.genome[5])) == (1, 1)
    assert float(best.losses[0]) < 0.5  # type: ignore[index]


def radius_of(algorithm: Algorithm) -> float:
    return float(algorithm._aims[0].radius)  # type: ignore[attr-defined]


def test_a_radius_that_has_shrunk_to_nothing_begins_anew() -> None:
    algorithm = TRUST.make(make_context(reals(2), budget=400))
    seen = []

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        seen.append(radius_of(algorithm))
        return valley(2)(index, genome, own)

    drive(algorithm, evaluate, 150)
    assert min(seen) < 0.02
    assert seen.count(0.25) > 2
