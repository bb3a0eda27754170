"""The search as a fold: interruptions, arrival orders and enqueued candidates never change what is proposed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.algorithms import Outcome
from optimizer.errors import InvalidInput, JobError
from optimizer.fitness.aggregate import ItemScores
from optimizer.ports import Candidate, Evaluation, Failure
from optimizer.search import Search
from optimizer.spec import CandidateInput, JobSpec
from tests.factories import make_problem, make_spec

ALGORITHMS = ["random", "cma_es", "nsga2", "nevergrad"]


def spec_of(algorithm: str, **changes: Any) -> JobSpec:
    return make_spec(
        algorithm={"name": algorithm},
        merge={"operator": "task_arithmetic", "granularity": {"layers": "groups", "group_size": 2}},
        **{"budget": {"evaluations": 40}, "parallel_evaluations": 3, **changes},
    )


def score(candidate: Candidate) -> Evaluation:
    """A deterministic outcome: two conflicting quadratics; some regions fail."""
    assert candidate.genome is not None
    x = candidate.genome
    if x[0] > 0.95 and x[1] < 0.5:
        return Evaluation(candidate.index, None, failure=Failure("infeasible", "NaN loss"))
    return Evaluation(candidate.index, (float(1 - ((x - 0.3) ** 2).mean()), float(((x - 0.7) ** 2).mean())))


class Log:
    """What a store would hold."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.problem = make_problem(spec)
        self.candidates: list[Candidate] = []
        self.evaluations: dict[int, Evaluation] = {}

    def open(self) -> Search:
        search = Search(self.spec, self.problem)
        search.replay(self.candidates, self.evaluations)
        if not self.candidates:
            self.add(search, search.first())
        return search

    def add(self, search: Search, new: list[Candidate]) -> None:
        self.candidates += new
        search.add(new)

    def evaluate(self, search: Search, candidate: Candidate) -> None:
        self.evaluations[candidate.index] = score(candidate)
        search.record(self.evaluations[candidate.index])

    def rows(self) -> list[tuple[Any, ...]]:
        return [
            (
                c.index,
                c.generation,
                c.told,
                c.origin,
                c.duplicate_of,
                c.genome.tobytes() if c.genome is not None else b"",
            )
            for c in self.candidates
        ]


def pump(log: Log, search: Search) -> None:
    while new := search.next():
        log.add(search, new)


def run(spec: JobSpec, choose: Any = None, crash: Any = lambda: False) -> Log:
    log = Log(spec)
    search = log.open()
    while True:
        if crash():
            search = log.open()
        pump(log, search)
        if search.finished:
            return log
        dispatched = search.waiting[: spec.in_flight]
        log.evaluate(search, dispatched[choose(len(dispatched))] if choose else dispatched[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_interruptions_and_arrival_order_change_nothing(algorithm: str, data: st.DataObject) -> None:
    spec = spec_of(algorithm)
    whole = run(spec)
    order = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    broken = run(spec, choose=lambda count: int(order.integers(count)), crash=lambda: bool(order.random() < 0.3))
    assert broken.rows() == whole.rows()
    assert broken.evaluations == whole.evaluations


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_replay_continues_exactly_also_with_enqueued_candidates(algorithm: str, seed: int) -> None:
    spec = spec_of(algorithm)
    order = np.random.default_rng(seed)
    log = Log(spec)
    search = log.open()
    for _ in range(200):
        if search.finished:
            break
        if order.random() < 0.1 and search.accepts_more:
            log.add(search, [search.enqueued(CandidateInput(genome=[0.25] * search.space.dim, label="mine"))])
        pump(log, search)
        again = Search(spec, log.problem)
        again.replay(log.candidates, log.evaluations)
        assert [c.index for c in again.waiting] == [c.index for c in search.waiting]
        waiting = search.waiting
        if waiting:
            log.evaluate(search, waiting[int(order.integers(min(3, len(waiting))))])
            again.record(log.evaluations[max(log.evaluations, key=lambda i: i)])
    assert search.finished
    assert sum(c.duplicate_of is None for c in log.candidates) == spec.budget.evaluations


def test_last_bits_of_recorded_genomes_do_not_break_replay() -> None:
    spec = spec_of("cma_es")
    log = run(spec)
    half = [c for c in log.candidates if c.generation < 2]
    nudged = [
        Candidate(**{**vars(c), "genome": np.nextafter(c.genome, 2.0)}) if c.genome is not None else c for c in half
    ]
    search = Search(spec, log.problem)
    search.replay(nudged, {i: e for i, e in log.evaluations.items() if i < len(half)})
    assert [c.genome.tobytes() for c in search.candidates if c.genome is not None] == [
        c.genome.tobytes() for c in nudged if c.genome is not None
    ]


def test_duplicates_cost_no_evaluation_and_share_the_outcome() -> None:
    spec = spec_of("random", budget={"evaluations": 6})
    log = Log(spec)
    search = log.open()
    known = log.candidates[1]
    assert known.genome is not None
    log.add(search, [search.enqueued(CandidateInput(genome=known.genome.tolist()))])
    copy = log.candidates[-1]
    assert copy.duplicate_of == 1
    assert copy.fingerprint == known.fingerprint
    assert copy.index not in [c.index for c in search.waiting]
    for candidate in search.waiting:
        log.evaluate(search, candidate)
    pump(log, search)
    assert search.told == 5


def test_one_slow_candidate_does_not_idle_the_other_workers() -> None:
    log = Log(spec_of("random", warm_starts={"base": False, "experts": False, "uniform": False}))
    search = log.open()
    pump(log, search)
    for candidate in search.waiting[1:3]:
        log.evaluate(search, candidate)
    pump(log, search)
    assert len(search.waiting) >= 3, "two more besides the slow one"


def test_a_users_repeats_do_not_exhaust_the_space() -> None:
    log = Log(spec_of("random"))
    search = log.open()
    genome = [0.25] * search.space.dim
    for _ in range(300):
        log.add(search, [search.enqueued(CandidateInput(genome=genome))])
    assert search.stop_reason is None


def test_what_is_done_holds_no_items_and_no_recipe() -> None:
    log = run(spec_of("random"))
    search = log.open()
    search.record(Evaluation(3, (0.5, 0.5), items={"language": ItemScores(np.zeros(4, dtype=np.float32))}))
    assert search.evaluations[3].items == {}
    assert search.candidates[3].recipe == {}


def test_warm_starts_come_first_and_are_told_before_the_algorithm_proposes() -> None:
    search = Log(spec_of("random")).open()
    assert [c.label for c in search.candidates] == ["base", "language", "polarity", "uniform"]
    assert all(c.origin == "warm_start" for c in search.candidates)
    assert search.next() == []


def test_a_tiny_space_is_exhausted_instead_of_searched_forever() -> None:
    spec = make_spec(
        algorithm={"name": "random"},
        experts=[{"name": name, "path": name} for name in ("language", "polarity")],
        merge={
            "operator": "task_arithmetic",
            "granularity": {"layers": "whole"},
            "bounds": {"low": 0.0, "high": 1e-300},
        },
        budget={"evaluations": 100_000, "patience": 50},
        warm_starts={"base": False, "experts": False, "uniform": False},
    )
    log = run(spec)
    assert len(log.candidates) < 1000


def test_patience_counts_evaluations_without_a_better_front() -> None:
    spec = spec_of("random", budget={"evaluations": 5000, "patience": 25})
    log = Log(spec)
    search = log.open()
    while not search.finished:
        pump(log, search)
        for candidate in search.waiting[:1]:
            log.evaluations[candidate.index] = Evaluation(candidate.index, (0.5, 0.5))
            search.record(log.evaluations[candidate.index])
    assert search.stop_reason == "the front has not improved for 25 evaluations"
    assert len(log.candidates) <= 26 + 2 * spec.in_flight


@pytest.mark.parametrize(
    ("given_input", "field"),
    [
        (CandidateInput(genome=[0.1]), "genome"),
        (CandidateInput(genome=[99.0] * 8), "genome"),
        (CandidateInput(coefficients={"nobody": 1.0}), "coefficients"),
        (CandidateInput(coefficients={"language": [1.0]}), "coefficients.language"),
        (CandidateInput(recipe={"format": 1, "models": {}, "root": {"model": "base"}}), "recipe"),
    ],
)
def test_bad_candidates_are_refused_by_field(given_input: CandidateInput, field: str) -> None:
    search = Log(spec_of("random")).open()
    with pytest.raises(InvalidInput) as caught:
        search.enqueued(given_input)
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)


def test_a_log_that_this_search_cannot_have_written_is_refused() -> None:
    log = run(spec_of("random", budget={"evaluations": 10}))
    search = Search(log.spec, log.problem)
    with pytest.raises(JobError, match="lacks the outcome"):
        search.replay(log.candidates, {})


def test_an_algorithm_that_learns_from_items_gets_them_also_of_duplicates_and_after_a_replay() -> None:
    spec = spec_of("random", warm_starts={"base": False, "experts": False, "uniform": False})
    scores = {
        "language": ItemScores(np.array([1, 0], dtype=np.float32)),
        "polarity": ItemScores(np.array([0.5], dtype=np.float32)),
    }
    asked: list[int] = []

    def items(index: int) -> dict[str, ItemScores]:
        asked.append(index)
        return scores

    def search() -> tuple[Search, list[Outcome]]:
        made = Search(spec, make_problem(spec), items)
        told: list[Outcome] = []
        made.algorithm.needs_items = True  # type: ignore[misc]  # this instance's only
        made.algorithm.tell = told.append  # type: ignore[assignment,method-assign]
        return made, told

    first, told = search()
    genome = [0.5] * first.space.dim
    for index in range(3):
        new = first.enqueued(CandidateInput(genome=genome if index < 2 else [0.1] * first.space.dim))
        first.add([new])
        if new.duplicate_of is None:
            values = (0.5, 0.5) if index == 0 else None
            first.record(Evaluation(index, values, failure=None if values else Failure("infeasible", "no")))
    first.next()
    assert [tuple(gain.tolist() for gain in outcome.gains) for outcome in told] == [
        ([1.0, 0.0], [-0.5]),
        ([1.0, 0.0], [-0.5]),
        (),
    ]
    second, told_again = search()
    second.replay(first.candidates[:3], first.evaluations)
    second.next()
    assert [outcome.index for outcome in told_again] == [0, 1, 2]
    np.testing.assert_equal([o.gains for o in told_again], [o.gains for o in told])
    assert asked == [0, 0, 0, 0]
