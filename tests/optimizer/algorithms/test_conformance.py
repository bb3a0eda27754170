"""What every algorithm must do, whoever wrote it. A new one is tested here by being registered."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import get_args

import nevergrad  # noqa: F401  its import draws from the global generator, once
import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.algorithms import ALGORITHMS, Outcome
from optimizer.algorithms.base import parse_options
from optimizer.algorithms.nevergrad_search import Nevergrad, OptimizerName
from optimizer.errors import InvalidInput
from optimizer.space import Genome, SearchSpace, Variable
from optimizer.spec import AlgorithmSpec
from tests.marks import quick_or_slow
from tests.optimizer.algorithms.driving import (
    Case,
    Log,
    best_loss,
    clean,
    drive,
    make_context,
    mixed,
    outcomes_of,
    proposals_of,
    reals,
    replay,
    same,
    smooth,
    troubled,
)

DEFAULT_OPTIMIZER = Nevergrad.Options().optimizer
# `auto` is whichever it chooses.
DEFAULTS = [Case(name) for name in ALGORITHMS if name != "auto"]
# Proposals that take milliseconds each: fewer of them where the number does not matter.
SLOW = {"bayesian", "forest", "map", "rmm"}
VARIANTS = [
    Case("cma_es", {"covariance": "full"}),
    Case("cma_es", {"covariance": "diagonal", "restarts": "bipop", "population": 5}),
    Case("cma_es", {"scalarisation": "tchebycheff", "normalise": False}),
    Case("cma_es", {"close_after": 0.75, "warm_start": "none"}),
    Case("nsga2", {"population": 7}),
    Case("nsga3", {"population": 7}),
    Case("moead", {"decomposition": "tchebycheff", "variation": "differential"}),
    Case("mo_cma_es", {"covariance": "full", "population": 3}),
    *(Case("nevergrad", {"optimizer": name}) for name in get_args(OptimizerName) if name != DEFAULT_OPTIMIZER),
]
CASES = [*DEFAULTS, *VARIANTS]


def count_for(case: Case, count: int, share: int = 4) -> int:
    return count // share if case.name in SLOW else count


QUICK = [*map(str, DEFAULTS), *(str(case) for case in VARIANTS if case.name != "nevergrad"), "nevergrad-SQOPSO"]
# The optimizers of nevergrad differ in nothing that is ours.
every_case = pytest.mark.parametrize("case", quick_or_slow(CASES, *QUICK), ids=str)
every_default = pytest.mark.parametrize("case", DEFAULTS, ids=str)


@pytest.fixture(autouse=True)
def global_generators_untouched() -> Iterator[None]:
    """Whatever a test here does, numpy's and Python's global generators stay as they were."""
    before = np.random.get_state(legacy=False), random.getstate()
    yield
    after = np.random.get_state(legacy=False), random.getstate()
    assert before[1] == after[1]
    np.testing.assert_equal(after[0], before[0])


@every_default
def test_describes_itself(case: Case) -> None:
    cls = ALGORITHMS[case.name]
    assert cls.name == case.name
    assert cls.summary.endswith(".") and len(cls.summary) < 150
    assert any(character.isdigit() for character in cls.reference), "a reference has a year"
    for name, field in cls.Options.model_json_schema().get("properties", {}).items():
        assert field.get("description"), f"option {name} has no description"


@every_default
def test_refuses_unknown_options(case: Case) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_options(AlgorithmSpec(name=case.name, options={"no_such": 1}))
    assert caught.value.field == "algorithm.options.no_such"


def test_unknown_name_lists_what_exists() -> None:
    with pytest.raises(InvalidInput, match=", ".join(ALGORITHMS)) as caught:
        parse_options(AlgorithmSpec(name="no_such"))
    assert caught.value.field == "algorithm.name"


@pytest.mark.parametrize(("dim", "parallel"), [(1, 1), (2, 7), (35, 1), (35, 64)])
@every_case
def test_survives_every_kind_of_outcome_and_replays(case: Case, dim: int, parallel: int) -> None:
    space = reals(dim)
    context = make_context(space, parallel=parallel, objectives=2)
    foreign = [space.low, space.high, context.start, space.high + 1.0]
    log = drive(case.make(context), troubled(smooth(space, 2)), count_for(case, 90), foreign=foreign, every=11)
    assert_inside(log, space.low, space.high)
    replay(case.make(context), log)


@every_case
def test_replays_at_every_prefix(case: Case) -> None:
    space = reals(3)
    context = make_context(space, parallel=3)
    log = drive(case.make(context), clean(smooth(space)), 40, foreign=[space.low, context.start], every=9)
    for end in range(0, len(log), 16 if case.name in SLOW else 4):
        replay(case.make(context), log[: end + 1])


@every_case
def test_what_a_log_recalls_leaves_it_as_it_was(case: Case) -> None:
    space = reals(4)
    context = make_context(space, parallel=3, objectives=2)
    lived, resumed = case.make(context), case.make(context)
    log = drive(lived, troubled(smooth(space, 2)), 40, foreign=[space.low, context.start], every=9)
    for entry in log:
        if isinstance(entry, Outcome):
            resumed.tell(entry)
        else:
            resumed.recall([proposal.genome for proposal in entry.proposals])
    assert same(resumed.ask(7), lived.ask(7))


@every_case
def test_many_proposals_are_those_asked_one_by_one(case: Case) -> None:
    context = make_context(reals(5), parallel=4)
    at_once, singly = case.make(context), case.make(context)
    together = at_once.ask(12)
    one_by_one = [proposal for _ in together for proposal in singly.ask(1)]
    assert same(together, one_by_one)


@pytest.mark.parametrize("count", [1, 3, 16, 64])
@every_case
def test_proposes_in_batches_of_any_size(case: Case, count: int) -> None:
    space = reals(4)
    context = make_context(space, parallel=count)
    log = drive(case.make(context), clean(smooth(space)), count_for(case, 130), window=count)
    assert_inside(log, space.low, space.high)


@every_case
def test_empty_asks_change_nothing(case: Case) -> None:
    space = reals(4)
    context = make_context(space)
    plain, nagged = case.make(context), case.make(context)
    losses = smooth(space)
    index = 0
    for _ in range(6):
        batch = plain.ask(plain.batch_size)
        assert nagged.ask(0) == []
        assert same(nagged.ask(nagged.batch_size), batch)
        for proposal in batch:
            assert nagged.ask(0) == []
            outcome = Outcome(index, proposal.genome, losses(proposal.genome))
            plain.tell(outcome)
            nagged.tell(outcome)
            index += 1


@every_case
def test_a_generation_under_way_waits_without_a_trace(case: Case) -> None:
    space = reals(4)
    algorithm = case.make(make_context(space))
    losses = smooth(space)
    batch = algorithm.ask(algorithm.batch_size)
    if algorithm.ask(1):
        return  # it never waits
    other = case.make(make_context(space))
    other.ask(other.batch_size)
    for index, proposal in enumerate(batch):
        if early := algorithm.ask(5):
            assert same(early, other.ask(5))
            assert index >= case.options["close_after"] * len(batch), "a generation closes when so many are told"
            return
        for each in (algorithm, other):
            each.tell(Outcome(index, proposal.genome, losses(proposal.genome)))
    assert same(algorithm.ask(50), other.ask(50))


@every_case
def test_instances_and_global_generators_do_not_disturb_each_other(case: Case) -> None:
    space = reals(4)
    losses = smooth(space)
    context = make_context(space)
    log = drive(case.make(context), clean(losses), count_for(case, 60, 2))
    algorithm, neighbour = case.make(context), case.make(make_context(space, seed=8))
    state, others = np.random.get_state(), random.getstate()
    np.random.seed(len(str(case)))
    random.seed(99)
    for number, entry in enumerate(log):
        for proposal in neighbour.ask(1):
            neighbour.tell(Outcome(number, proposal.genome, losses(proposal.genome)))
        np.random.random(3)
        replay(algorithm, [entry])
    np.random.set_state(state)
    random.setstate(others)


@every_case
def test_seeds_differ(case: Case) -> None:
    space = reals(4)
    logs = [drive(case.make(make_context(space, seed=seed)), clean(smooth(space)), 30) for seed in (0, 1, 2**32 - 1)]
    assert len({tuple(p.genome.tobytes() for p in proposals_of(log)) for log in logs}) == 3


@pytest.mark.parametrize("trouble", ["failed", "nan", "violating"])
@every_case
def test_recovers_from_a_long_run_of_failures(case: Case, trouble: str) -> None:
    space = reals(3)
    losses = smooth(space)

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        if index >= count_for(case, 100):
            return Outcome(index, genome, losses(genome), own=own)
        values = {"failed": None, "nan": np.array([np.nan]), "violating": losses(genome)}[trouble]
        return Outcome(index, genome, values, violation=1.0 if trouble == "violating" else 0.0, own=own)

    algorithm = case.make(make_context(space, parallel=4, budget=None))
    log = drive(algorithm, evaluate, count_for(case, 220), foreign=[space.low])
    assert_inside(log, space.low, space.high)
    assert best_loss(log) < 0.2, "it went on to search"


@pytest.mark.parametrize("objectives", [1, 2])
@every_case
def test_losers_of_races_are_taken_in(case: Case, objectives: int) -> None:
    """Whoever names rivals gets losers told: they must not stop it, mislead it, or change what it would replay."""
    space = reals(3)
    losses = smooth(space, objectives)
    algorithm = case.make(make_context(space, objectives=objectives, parallel=2))
    whole: dict[int, NDArray[np.float64]] = {}
    lost = 0

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        nonlocal lost
        rivals, values = algorithm.rivals(), losses(genome)
        assert rivals == algorithm.rivals()
        if rivals is not None and own:
            assert set(rivals.references) <= set(whole), "a reference that was not measured on all items"
            assert len(rivals.weights) == objectives
            worse = [values - whole[reference] for reference in rivals.references]
            if any((gap > 0).all() if rivals.rule == "each" else gap @ rivals.weights > 0 for gap in worse):
                lost += 1
                return Outcome(index, genome, values, own=own, items=5, lost=True)
        whole[index] = values
        return Outcome(index, genome, values, own=own)

    log = drive(algorithm, evaluate, count_for(case, 150), foreign=[space.low])
    replay(case.make(make_context(space, objectives=objectives, parallel=2)), log)
    raced = ALGORITHMS[case.name].races and case.options.get("scalarisation") != "tchebycheff"
    assert (lost > 10) == raced
    assert min(float(found.sum()) for found in whole.values()) < 0.3 * objectives


@every_case
def test_last_bits_of_recorded_genomes_do_not_matter(case: Case) -> None:
    """On another kind of CPU replayed proposals differ in their last bits from the recorded ones."""
    space = reals(6)
    losses = smooth(space)
    context = make_context(space)
    log = drive(case.make(context), clean(losses), count_for(case, 60, 2))
    algorithm = case.make(context)
    for entry in log:
        if isinstance(entry, Outcome):
            nudged = np.nextafter(entry.genome, np.where(entry.index % 2, np.inf, -np.inf))
            algorithm.tell(Outcome(entry.index, nudged, entry.losses, own=entry.own))
            continue
        for proposal, recorded in zip(algorithm.ask(entry.count), entry.proposals, strict=True):
            np.testing.assert_allclose(proposal.genome, recorded.genome, rtol=0, atol=1e-6)


@every_case
def test_recorded_genomes_that_are_not_its_own_are_taken_in(case: Case) -> None:
    """The recorded genome is authoritative, however far it lies from what this process would have proposed."""
    space = reals(6)
    losses = smooth(space)
    other = np.random.Generator(np.random.PCG64(1))

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        recorded = space.clip(genome + other.normal(scale=0.2, size=genome.shape))
        return Outcome(index, recorded, losses(recorded), own=own)

    context = make_context(space)
    log = drive(case.make(context), evaluate, count_for(case, 80, 2))
    assert_inside(log, space.low, space.high)
    replay(case.make(context), log)


@pytest.mark.parametrize("dim", [1, 3])
@every_case
def test_constant_losses_do_not_stop_it(case: Case, dim: int) -> None:
    space = reals(dim)
    algorithm = case.make(make_context(space, parallel=2))
    log = drive(
        algorithm, lambda index, genome, own: Outcome(index, genome, np.array([0.5]), own=own), count_for(case, 400)
    )
    assert_inside(log, space.low, space.high)


@every_case
def test_a_single_choice(case: Case) -> None:
    space = SearchSpace((Variable("operator", 0.0, 3.0, "choice", ("a", "b", "c")),))
    context = make_context(space)
    log = drive(case.make(context), clean(lambda genome: np.array([float(genome[0] < 2)])), count_for(case, 200))
    assert_inside(log, space.low, space.high)
    assert best_loss(log) == 0.0


@every_case
def test_a_budget_of_one(case: Case) -> None:
    space = reals(3)
    log = drive(case.make(make_context(space, budget=1)), clean(smooth(space)), 1, window=1)
    assert len(proposals_of(log)) == 1
    assert_inside(log, space.low, space.high)


@every_case
def test_goes_on_beyond_its_budget(case: Case) -> None:
    """Duplicates cost no evaluation, so more may be asked than the budget says."""
    space = reals(3)
    algorithm = case.make(make_context(space, budget=20))
    log = drive(algorithm, clean(smooth(space)), 60)
    assert len(proposals_of(log)) == 60 or algorithm.stop_reason


@pytest.mark.parametrize(
    "case",
    [Case(name) for name in ("random", "cma_es", "nsga2", "nsga3", "moead", "mo_cma_es", "nevergrad", "m2n2")],
    ids=str,
)
def test_six_hundred_variables(case: Case) -> None:
    space = reals(600)
    context = make_context(space, parallel=8)
    log = drive(case.make(context), troubled(smooth(space)), 60, foreign=[space.low, space.high])
    assert_inside(log, space.low, space.high)
    replay(case.make(context), log)


@every_case
def test_integers_and_choices(case: Case) -> None:
    space = mixed()
    context = make_context(space, parallel=2)
    losses = smooth(space)
    log = drive(case.make(context), clean(losses), count_for(case, 150), foreign=[space.high])
    assert_inside(log, space.low, space.high)
    for variable, column in zip(space.variables, np.array([p.genome for p in proposals_of(log)]).T, strict=True):
        seen = {variable.read(float(number)) for number in column}
        assert len(seen) > 1, f"{variable.name} never varies"
    replay(case.make(context), log)


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "random"], ids=str)
@pytest.mark.slow
def test_beats_random_search(case: Case) -> None:
    space, count = reals(10), count_for(case, 300)

    def median(case: Case) -> float:
        contexts = [make_context(space, seed=seed, budget=count) for seed in range(3)]
        return float(np.median([best_loss(drive(case.make(each), clean(smooth(space)), count)) for each in contexts]))

    assert median(case) < 0.7 * median(Case("random"))


def assert_inside(log: Log, low: Genome, high: Genome) -> None:
    genomes = np.array([proposal.genome for proposal in proposals_of(log)])
    assert np.isfinite(genomes).all()
    assert (genomes >= low).all() and (genomes <= high).all()
    assert outcomes_of(log)
