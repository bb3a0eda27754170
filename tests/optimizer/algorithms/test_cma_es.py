"""What CMA-ES does beyond the contract: its start, bounds, discrete variables, restarts, guests, several objectives."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.algorithms import Outcome
from optimizer.space import Genome, SearchSpace, Variable
from tests.optimizer.algorithms.driving import (
    Case,
    best_loss,
    clean,
    drive,
    make_context,
    mixed,
    outcomes_of,
    proposals_of,
    reals,
    same,
    smooth,
)

CMA = Case("cma_es")


def first_mean(foreign: list[Outcome]) -> Genome:
    """Where a search starts: with a tiny step size every proposal lies there."""
    algorithm = Case("cma_es", {"sigma0": 1e-9}).make(make_context(reals(2)))
    for outcome in foreign:
        algorithm.tell(outcome)
    return np.asarray(np.mean([proposal.genome for proposal in algorithm.ask(20)], axis=0))


def guest(index: int, genome: list[float], loss: float | None) -> Outcome:
    return Outcome(index, np.array(genome), None if loss is None else np.array([loss]), own=False)


def test_starts_at_the_given_start_when_nothing_is_known() -> None:
    context = make_context(reals(2))
    np.testing.assert_allclose(first_mean([]), context.start, atol=1e-6)
    np.testing.assert_allclose(first_mean([guest(0, [0.0, 0.0], None)]), context.start, atol=1e-6)


def test_starts_at_the_best_of_two_or_three() -> None:
    np.testing.assert_allclose(first_mean([guest(0, [0.5, 1.0], 1.0)]), [0.5, 1.0], atol=1e-6)
    known = [guest(0, [0.0, 0.0], 3.0), guest(1, [1.0, 0.5], 1.0), guest(2, [1.0, 1.0], 2.0)]
    np.testing.assert_allclose(first_mean(known), [1.0, 0.5], atol=1e-6)


def test_starts_at_the_weighted_mean_of_the_better_half() -> None:
    known = [guest(0, [0.0, 0.0], 9.0), guest(1, [1.0, 0.0], 2.0), guest(2, [0.0, 1.0], 1.0), guest(3, [1.0, 1.0], 5.0)]
    weights = np.log(2.5) - np.log([1, 2])
    expected = weights @ np.array([[0.0, 1.0], [1.0, 0.0]]) / weights.sum()
    np.testing.assert_allclose(first_mean(known), expected, atol=1e-6)


def test_starts_inside_the_bounds_from_a_warm_start_outside() -> None:
    np.testing.assert_allclose(first_mean([guest(0, [7.0, -7.0], 1.0)]), [1.5, -0.5], atol=1e-6)


@pytest.mark.parametrize(
    ("dim", "parallel", "expected"), [(1, 1, 4), (35, 1, 14), (35, 4, 16), (35, 64, 64), (35, 14, 14)]
)
def test_population_fills_the_workers(dim: int, parallel: int, expected: int) -> None:
    algorithm = CMA.make(make_context(reals(dim), parallel=parallel))
    assert algorithm.batch_size == expected
    assert len(algorithm.ask(1000)) == expected


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_finds_an_optimum_at_the_bounds(covariance: str) -> None:
    space = reals(8)
    optimum = np.where(np.arange(8) % 2, space.low, 0.7 * space.high)

    def losses(genome: Genome) -> NDArray[np.float64]:
        return np.array([np.square(genome - optimum).sum()])

    log = drive(Case("cma_es", {"covariance": covariance}).make(make_context(space)), clean(losses), 1200)
    assert best_loss(log) < 1e-4


def test_discrete_variables_never_freeze() -> None:
    space = mixed()

    def losses(genome: Genome) -> NDArray[np.float64]:
        return np.array([np.square(genome - space.low - 0.3 * (space.high - space.low)).sum()])

    log = drive(CMA.make(make_context(space, budget=None)), clean(losses), 3000)
    late = np.array([proposal.genome for proposal in proposals_of(log)][-1000:]).T
    for variable, column in zip(space.variables, late, strict=True):
        if variable.kind != "real":
            assert len({variable.read(float(number)) for number in column}) > 1, variable.name


def generation_sizes(options: dict[str, Any], count: int) -> list[int]:
    algorithm = Case("cma_es", {"population": 6, "sigma0": 0.3, **options}).make(make_context(reals(2), budget=None))
    log = drive(algorithm, clean(smooth(reals(2))), count)
    return list(Counter(proposal.generation for proposal in proposals_of(log)).values())[:-1]


def test_restarts_with_the_same_population_by_default() -> None:
    assert set(generation_sizes({}, 4000)) == {6}


def test_ipop_doubles_the_population_up_to_its_limit() -> None:
    sizes = generation_sizes({"restarts": "ipop", "max_restarts": 2}, 12000)
    assert sizes == sorted(sizes)
    assert set(sizes) == {6, 12, 24}


def test_bipop_alternates_large_and_small_populations() -> None:
    sizes = generation_sizes({"restarts": "bipop"}, 12000)
    assert {6, 12, 24} <= set(sizes)
    assert sizes != sorted(sizes), "a small run follows a large one"


def test_a_restart_leaves_the_old_optimum() -> None:
    log = drive(CMA.make(make_context(reals(2), budget=None)), clean(smooth(reals(2))), 4000)
    losses = [float(outcome.losses[0]) for outcome in outcomes_of(log) if outcome.losses is not None]
    converged = int(np.argmax(np.array(losses) < 1e-10))
    assert 0 < converged < len(losses)
    assert max(losses[converged:]) > 1e-3


def test_a_failed_generation_leaves_the_distribution_alone() -> None:
    space = reals(5)
    algorithm = CMA.make(make_context(space, parallel=200))
    spreads = []
    index = 0
    for _ in range(4):
        batch = algorithm.ask(500)
        spreads.append(np.std([proposal.genome for proposal in batch], axis=0))
        for proposal in batch:
            algorithm.tell(Outcome(index, proposal.genome, None))
            index += 1
    np.testing.assert_allclose(spreads, np.full((4, 5), 0.1 * 2.0), rtol=0.25)


def test_a_good_guest_draws_the_search_to_it() -> None:
    space = reals(12)
    losses = smooth(space)
    optimum = space.low + 0.3 * (space.high - space.low)

    def run(visited: bool) -> float:
        algorithm = CMA.make(make_context(space))
        index = 0
        for _ in range(4):
            batch = algorithm.ask(100)
            if visited:
                algorithm.tell(Outcome(index, optimum, losses(optimum), own=False))
                index += 1
            for proposal in batch:
                algorithm.tell(Outcome(index, proposal.genome, losses(proposal.genome)))
                index += 1
        return float(np.mean([losses(proposal.genome)[0] for proposal in algorithm.ask(100)]))

    assert run(visited=True) < 0.8 * run(visited=False)


def test_scales_of_objectives_do_not_count_when_normalised() -> None:
    space = reals(4)
    losses = smooth(space, 2)

    def proposals(options: dict[str, Any], scale: float) -> list[Any]:
        # A power of two scales exactly.
        algorithm = Case("cma_es", options).make(make_context(space, objectives=2))
        return proposals_of(drive(algorithm, clean(lambda genome: losses(genome) * [1.0, scale]), 60))

    for method in ("weighted_sum", "tchebycheff"):
        assert same(proposals({"scalarisation": method}, 1.0), proposals({"scalarisation": method}, 1024.0))
        plain = {"scalarisation": method, "normalise": False}
        assert not same(proposals(plain, 1.0), proposals(plain, 1024.0))


def test_weights_count() -> None:
    space = reals(4)
    context = make_context(space, objectives=2)
    found = []
    for weights in ([100.0, 1.0], [1.0, 100.0]):
        algorithm = CMA.make(replace(context, weights=np.array(weights)))
        last = proposals_of(drive(algorithm, clean(smooth(space, 2)), 300))[-8:]
        unit = (np.array([proposal.genome for proposal in last]) - space.low) / (space.high - space.low)
        found.append(unit.mean())
    np.testing.assert_allclose(found, [0.3, 0.4], atol=0.01)


@pytest.mark.parametrize(
    ("dim", "budget", "expected"), [(4, 199, "diagonal"), (4, 200, "full"), (4, None, "full"), (201, None, "diagonal")]
)
def test_automatic_covariance(dim: int, budget: int | None, expected: str) -> None:
    space = reals(dim)

    def proposals(covariance: str) -> list[Any]:
        algorithm = Case("cma_es", {"covariance": covariance}).make(make_context(space, budget=budget))
        return proposals_of(drive(algorithm, clean(smooth(space)), 80))

    other = "full" if expected == "diagonal" else "diagonal"
    assert same(proposals("auto"), proposals(expected))
    assert not same(proposals("auto"), proposals(other))


def test_full_covariance_learns_dependencies() -> None:
    space = reals(4)
    rotation, _ = np.linalg.qr(np.random.Generator(np.random.PCG64(0)).normal(size=(4, 4)))

    def losses(genome: Genome) -> NDArray[np.float64]:
        return np.array([np.square(rotation @ (genome - 0.4)) @ [1.0, 10.0, 100.0, 1000.0]])

    best = {
        covariance: best_loss(
            drive(Case("cma_es", {"covariance": covariance}).make(make_context(space)), clean(losses), 1000)
        )
        for covariance in ("full", "diagonal")
    }
    assert best["full"] < 1e-3 * best["diagonal"]


def test_no_file_in_the_working_directory_steers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cma_signals.in").write_text('{"maxiter": 1, "timeout": 0}')
    expected = proposals_of(drive(CMA.make(make_context(reals(3))), clean(smooth(reals(3))), 60))
    monkeypatch.chdir(tmp_path)
    assert same(proposals_of(drive(CMA.make(make_context(reals(3))), clean(smooth(reals(3))), 60)), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["cma_signals.in"]


# --- what earlier searches found ----------------------------------------------------------------------------------------


def earlier(spread: float, count: int = 200) -> list[Outcome]:
    """Candidates around (0.2, 0.8), five times as wide along the first axis as are the lines of equal loss."""
    random = np.random.Generator(np.random.PCG64(0))
    centre = np.array([0.2, 0.8])
    steps = spread * random.standard_normal((count, 2))
    return [guest(k, list(centre + step * [1.0, 0.2]), float(np.square(step).sum())) for k, step in enumerate(steps)]


def first_generation(options: dict[str, Any], known: list[Outcome]) -> Genome:
    algorithm = Case("cma_es", {"population": 1000, **options}).make(make_context(reals(2)))
    for outcome in known:
        algorithm.tell(outcome)
    return np.array([proposal.genome for proposal in algorithm.ask(1000)])


def test_an_earlier_search_gives_mean_and_spread() -> None:
    stds = {
        option: first_generation({"warm_start": option}, earlier(0.3)).std(axis=0)
        for option in ("mean", "distribution")
    }
    np.testing.assert_allclose(stds["mean"], 0.2, rtol=0.25)
    assert (stds["distribution"] < 0.6 * stds["mean"]).all(), "the best lie closer together than the first step"
    assert stds["distribution"][0] > 1.1 * stds["distribution"][1]
    for option in ("mean", "distribution"):
        np.testing.assert_allclose(
            first_generation({"warm_start": option}, earlier(0.3)).mean(axis=0), [0.2, 0.8], atol=0.06
        )


def test_the_spread_never_exceeds_sigma0_and_needs_enough() -> None:
    wide = first_generation({"warm_start": "distribution", "sigma0": 0.05}, earlier(3.0))
    assert np.sqrt(np.square(wide.std(axis=0)).mean()) < 0.13, "0.05 of a range of 2"
    few = earlier(0.01, count=40)
    assert (
        first_generation({"warm_start": "distribution"}, few) == first_generation({"warm_start": "mean"}, few)
    ).all()


def test_full_covariance_begins_with_the_directions_of_the_best() -> None:
    random = np.random.Generator(np.random.PCG64(1))
    along = 0.05 * random.standard_normal(300)
    rows = np.stack([0.5 + along, 0.5 + along + 0.002 * random.standard_normal(300)], axis=1)
    known = [guest(k, list(row), float(abs(row[0] - 0.5) < 0.02)) for k, row in enumerate(rows)]
    genomes = first_generation({"covariance": "full"}, known)
    assert np.corrcoef(genomes.T)[0, 1] > 0.1


def test_what_is_known_can_be_left_aside() -> None:
    start = make_context(reals(2)).start
    np.testing.assert_allclose(first_generation({"warm_start": "none"}, earlier(0.01)).mean(axis=0), start, atol=0.06)


def test_the_spread_helps_to_go_on_from_a_search_that_came_close() -> None:
    space = reals(8)
    rotation, _ = np.linalg.qr(np.random.Generator(np.random.PCG64(0)).normal(size=(8, 8)))

    def losses(genome: Genome) -> NDArray[np.float64]:
        return np.array([np.square(rotation @ (genome - 0.4)) @ np.logspace(0, 3, 8)])

    def best(option: str, seed: int) -> float:
        context = make_context(space, seed=seed, budget=300)
        known = outcomes_of(drive(CMA.make(context), clean(losses), 300))
        algorithm = Case("cma_es", {"warm_start": option}).make(replace(context, seed=seed + 100, budget=100))
        for outcome in known:
            algorithm.tell(replace(outcome, own=False))
        return best_loss(drive(algorithm, clean(losses), 100))

    found = {option: float(np.median([best(option, seed) for seed in range(5)])) for option in ("mean", "distribution")}
    assert found["distribution"] < 0.7 * found["mean"]


def test_partial_outcomes_of_others_are_ignored() -> None:
    space = reals(3)
    plain, told = CMA.make(make_context(space)), CMA.make(make_context(space))
    for index in range(60):
        told.tell(replace(guest(index, [1.0, 1.0, 1.0], -9.0), items=20))
    assert same(plain.ask(7), told.ask(7))


# --- generations that do not wait ---------------------------------------------------------------------------------------


def test_a_generation_closes_after_its_share_once_all_are_out() -> None:
    space = reals(3)
    losses = smooth(space)
    algorithm = Case("cma_es", {"population": 10, "close_after": 0.7}).make(make_context(space))
    first = algorithm.ask(8)
    for index in range(7):
        algorithm.tell(Outcome(index, first[index].genome, losses(first[index].genome)))
    assert [proposal.generation for proposal in algorithm.ask(9)] == [0, 0], "the rest of it goes out first"
    assert [proposal.generation for proposal in algorithm.ask(4)] == [1, 1, 1, 1]


def test_more_than_half_is_always_awaited() -> None:
    space = reals(3)
    algorithm = Case("cma_es", {"population": 10, "close_after": 0.5}).make(make_context(space))
    batch = algorithm.ask(10)
    for index in range(5):
        algorithm.tell(Outcome(index, batch[index].genome, np.array([1.0 + index])))
    assert algorithm.ask(1) == []
    algorithm.tell(Outcome(5, batch[5].genome, np.array([9.0])))
    assert len(algorithm.ask(1)) == 1


def test_latecomers_count_in_the_next_generation() -> None:
    """Whether the last three of the first generation were good or bad shows only after the second."""
    space = reals(3)

    def third(late: float) -> list[Any]:
        algorithm = Case("cma_es", {"population": 10, "close_after": 0.7}).make(make_context(space))
        first = algorithm.ask(10)
        for index in range(7):
            algorithm.tell(Outcome(index, first[index].genome, np.array([1.0 + index])))
        second = algorithm.ask(10)
        for index in range(7, 10):
            algorithm.tell(Outcome(index, first[index].genome, np.array([late])))
        for index in range(7):
            algorithm.tell(Outcome(10 + index, second[index].genome, np.array([1.0 + index])))
        return [*second, *algorithm.ask(10)]

    good, bad = third(-5.0), third(50.0)
    assert same(good[:10], bad[:10])
    assert not same(good[10:], bad[10:])


def test_any_order_of_outcomes_works() -> None:
    """As asynchronous jobs tell them, with some that take very long."""
    space = reals(6)
    losses = smooth(space)
    for share in (1.0, 0.75):
        algorithm = Case("cma_es", {"close_after": share}).make(make_context(space, parallel=6))
        random = np.random.Generator(np.random.PCG64(0))
        flying: list[tuple[float, int, Genome]] = []
        index, time, best = 0, 0.0, np.inf
        while index < 500:
            for proposal in algorithm.ask(6 - len(flying)):
                flying.append((time + float(random.lognormal()), index, proposal.genome))
                index += 1
            time, number, genome = flying.pop(flying.index(min(flying, key=lambda entry: entry[0])))
            best = min(best, float(losses(genome)[0]))
            algorithm.tell(Outcome(number, genome, losses(genome)))
        assert best < 1e-4


# --- many variables, integers, choices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "expected"), [(10, 0.1), (150, 0.1), (600, 0.05), (2400, 0.025)])
def test_first_step_shrinks_with_many_variables(dim: int, expected: float) -> None:
    space = reals(dim, 0.0, 1.0)
    proposals = CMA.make(make_context(space, parallel=32)).ask(32)
    assert np.std([proposal.genome for proposal in proposals], axis=0).mean() == pytest.approx(expected, rel=0.1)


def test_choices_are_learned_without_an_order() -> None:
    """The best choice of ten stands between bad ones, differently for each variable."""
    best = [4, 0, 2, 3, 1, 4, 2, 0, 1, 3]
    words = ("a", "b", "c", "d", "e")
    space = SearchSpace((*(Variable(f"c{k}", 0.0, 5.0, "choice", words) for k in range(10)), Variable("x", 0.0, 1.0)))

    def losses(genome: Genome) -> NDArray[np.float64]:
        wrong = np.floor(genome[:10]) != best
        return np.array([wrong.sum() + abs(genome[10] - 0.7)])

    log = drive(CMA.make(make_context(space, budget=400)), clean(losses), 400)
    assert best_loss(log) < 1.0
    assert all((proposal.genome[:10] % 1 == 0.5).all() for proposal in proposals_of(log))


def test_choices_alone() -> None:
    space = SearchSpace(tuple(Variable(f"c{k}", 0.0, 2.0, "choice", (False, True)) for k in range(20)))
    log = drive(CMA.make(make_context(space, budget=300)), clean(lambda genome: np.array([(genome < 1).sum()])), 300)
    assert best_loss(log) == 0.0


def test_integers_at_the_bounds_keep_their_margin() -> None:
    """All losses pull towards an outermost value."""
    space = SearchSpace((*(Variable(f"i{k}", 0.0, 1.0, "integer") for k in range(4)), Variable("x", 0.0, 1.0)))

    def losses(genome: Genome) -> NDArray[np.float64]:
        return np.array([np.round(genome[:4]).sum() + abs(genome[4] - 0.5)])

    log = drive(CMA.make(make_context(space, budget=None)), clean(losses), 1200)
    late = np.round([proposal.genome[:4] for proposal in proposals_of(log)[-600:]])
    assert (late.max(axis=0) == 1).all(), "no value is lost for good"
    assert late.mean() < 0.2
