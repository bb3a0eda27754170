"""The search as a fold: interruptions, arrival orders and enqueued candidates never change what is proposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.algorithms import ALGORITHMS, Outcome, Proposal
from optimizer.errors import InvalidInput, JobError
from optimizer.fitness.aggregate import ItemScores
from optimizer.ports import Candidate, Evaluation, Failure
from optimizer.recipe import Recipe
from optimizer.search import Search
from optimizer.spec import CandidateInput, JobSpec
from tests.factories import make_problem, make_spec
from tests.optimizer.toys import World

SEARCHES = [name for name in ALGORITHMS if name != "auto"]  # it is whichever it chooses
MERGE = {"operator": "task_arithmetic", "granularity": {"layers": "groups", "group_size": 2}}
# What some algorithms need to be merged.
MERGES: dict[str, dict[str, Any]] = {
    "evo_merging": MERGE | {"operator": "lora_factors"},
    "rmm": {"operator": "task_arithmetic", "space": "actions"},
}
PHASES = [
    {"algorithm": "random", "share": 0.3},
    {"algorithm": "cma_es", "keep_experts": 1},
    {"algorithm": "nsga2", "share": 0.4, "patience": 9},
]


def spec_of(algorithm: str, **changes: Any) -> JobSpec:
    return make_spec(
        **{
            "algorithm": {"name": algorithm},
            "merge": MERGES.get(algorithm, MERGE),
            "budget": {"evaluations": 40},
            "parallel_evaluations": 3,
            **changes,
        },
    )


def phased(**changes: Any) -> JobSpec:
    spec = spec_of("random", **changes).model_dump(mode="json", exclude={"algorithm"})
    return JobSpec.model_validate(spec | {"phases": PHASES})


class Log:
    """What a store would hold."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.world = World(spec)
        self.problem = self.world.problem
        self.candidates: list[Candidate] = []
        self.evaluations: dict[int, Evaluation] = {}

    def items(self, index: int) -> Mapping[str, ItemScores]:
        return self.evaluations[index].items

    def open(self) -> Search:
        search = Search(self.spec, self.problem, self.items)
        search.replay(self.candidates, self.evaluations)
        if not self.candidates:
            self.add(search, search.first())
        return search

    def add(self, search: Search, new: list[Candidate]) -> None:
        self.candidates += new
        search.add(new)

    def evaluate(self, search: Search, candidate: Candidate) -> None:
        self.evaluations[candidate.index] = self.world.evaluate(candidate)
        search.record(self.evaluations[candidate.index])

    def rows(self) -> list[tuple[Any, ...]]:
        return [
            (
                c.index,
                c.generation,
                c.told,
                c.origin,
                c.label,
                c.duplicate_of,
                c.phase,
                c.items,
                c.genome.tobytes() if c.genome is not None else c.fingerprint,
            )
            for c in self.candidates
        ]

    def values(self) -> dict[int, tuple[float, ...] | None]:
        return {index: evaluation.values for index, evaluation in self.evaluations.items()}


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


# Those that fit a model at every proposal fit all of them again at every replay.
COSTLY = {"bayesian", "map", "rmm"}


@pytest.mark.parametrize(
    "spec",
    [
        *(pytest.param(spec_of(name), marks=[pytest.mark.slow] * (name in COSTLY)) for name in SEARCHES),
        phased(),
    ],
    ids=[*SEARCHES, "phases"],
)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_interruptions_and_arrival_order_change_nothing(spec: JobSpec, data: st.DataObject) -> None:
    whole = run(spec)
    order = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    broken = run(spec, choose=lambda count: int(order.integers(count)), crash=lambda: bool(order.random() < 0.1))
    assert broken.rows() == whole.rows()
    assert broken.values() == whole.values()


@pytest.mark.parametrize(
    "spec",
    [
        *map(spec_of, SEARCHES),
        phased(),
        phased(asynchronous=True),
        *(
            pytest.param(spec_of(name, asynchronous=True), marks=[pytest.mark.slow] * (name in COSTLY))
            for name in SEARCHES
        ),
    ],
    ids=[*SEARCHES, "phases", "asynchronous phases", *(f"asynchronous {name}" for name in SEARCHES)],
)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_replay_continues_exactly_also_with_enqueued_candidates(spec: JobSpec, seed: int) -> None:
    order = np.random.default_rng(seed)
    log = Log(spec)
    search = log.open()
    for _ in range(200):
        if search.finished:
            break
        if order.random() < 0.1 and search.accepts_more:
            low, high = search.space.low, search.space.high
            genome = low + order.integers(2) * 0.3 * (high - low)
            log.add(search, [search.enqueued(CandidateInput(genome=genome.tolist(), label="mine"))])
        pump(log, search)
        if order.random() < 0.2:
            again = log.open()
            assert [c.index for c in again.waiting] == [c.index for c in search.waiting]
            search = again
        if search.waiting:
            log.evaluate(search, search.waiting[int(order.integers(min(3, len(search.waiting))))])
    assert search.finished
    assert search.algorithm.stop_reason or sum(c.duplicate_of is None for c in log.candidates) == 40


def test_last_bits_of_recorded_genomes_do_not_break_replay() -> None:
    spec = spec_of("cma_es")
    log = run(spec)
    half = [c for c in log.candidates if c.generation < 2]
    nudged = [
        Candidate(**{**vars(c), "genome": np.nextafter(c.genome, 2.0)}) if c.genome is not None else c for c in half
    ]
    search = Search(spec, log.problem, log.items)
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


def test_an_asynchronous_job_tells_outcomes_as_they_come() -> None:
    log = Log(spec_of("random", asynchronous=True))
    search = log.open()
    told: list[int] = []
    search.algorithm.tell = lambda outcome: told.append(outcome.index)  # type: ignore[method-assign]
    for index in (2, 0, 3, 1):
        log.evaluate(search, log.candidates[index])
    pump(log, search)
    assert told == [2, 0, 3, 1]
    known = log.candidates[5].genome
    assert known is not None
    log.add(search, [search.enqueued(CandidateInput(genome=known.tolist()))])
    assert log.candidates[-1].duplicate_of == 5
    for index in (6, 5, 4):
        log.evaluate(search, log.candidates[index])
    pump(log, search)
    assert told[4:8] == [6, 5, log.candidates[-1].index if len(told) < 8 else told[6], 4]


def test_phases_follow_one_another_and_begin_from_what_is_known() -> None:
    log = run(phased())
    own = [c for c in log.candidates if c.origin == "algorithm"]
    assert [c.phase for c in own] == sorted(c.phase for c in own)
    counts = [sum(c.phase == phase and c.duplicate_of is None for c in log.candidates) for phase in range(3)]
    assert counts[0] == 12
    assert counts[1] == 12
    assert sum(counts) == 40 or counts[2] >= 9
    assert {len(Recipe.parse(dict(c.recipe)).used - {"base"}) for c in own if c.phase == 1} == {1}
    handed_over = [c for c in log.candidates if c.phase > 0 and c.origin == "warm_start"]
    assert handed_over, "the front stood on two experts"
    assert all(c.label and c.label.startswith("like candidate") for c in handed_over)


def test_a_later_phase_is_told_of_the_candidates_before_it() -> None:
    log = Log(phased())
    search = log.open()
    seen: dict[int, list[Outcome]] = {}
    begin = search._begin

    def spying(number: int) -> Any:
        stage = begin(number)
        tell = stage.algorithm.tell
        again = type(stage.algorithm)(stage.algorithm.context, stage.algorithm.options)
        seen[number] = []
        again.tell = lambda outcome: (seen[number].append(outcome), tell(outcome))  # type: ignore[assignment,func-returns-value,method-assign]
        return stage

    search._begin = spying  # type: ignore[method-assign]
    while not search.finished and search.phase < 2:
        pump(log, search)
        for candidate in search.waiting[:1]:
            log.evaluate(search, candidate)
    stage = search._stage
    assert stage.number == 2
    assert stage.algorithm.context.budget is not None
    assert stage.algorithm.context.budget < 40
    best = search._recipe(search.candidates[search.best[0]])
    adopted = stage.space.adopt(best)
    assert adopted is not None
    np.testing.assert_allclose(stage.algorithm.context.start, stage.space.clip(adopted))


def test_slopes_are_those_towards_the_experts_that_are_left() -> None:
    spec = JobSpec.model_validate(
        phased().model_dump(mode="json")
        | {"phases": [{"algorithm": "random", "share": 0.3}, {"algorithm": "frank_wolfe", "keep_experts": 1}]}
    )
    log = run(spec)
    told = [c for c in log.candidates if c.phase == 1 and c.slopes and log.evaluations.get(c.index)]
    told = [c for c in told if log.evaluations[c.index].slopes is not None]
    assert told
    search = log.open()
    slopes = log.evaluations[told[0].index].slopes
    outcome = search._outcome(search._stage, told[0], log.evaluations[told[0].index])
    assert slopes is not None
    assert outcome is not None
    assert outcome.slopes is not None
    kept = list(search._stage.space.problem.models)
    place = list(log.problem.models).index(kept[1])
    np.testing.assert_array_equal(outcome.slopes, slopes[..., [0, place, 3]])


def test_partial_evaluations_join_no_front_and_are_no_duplicates_of_full_ones() -> None:
    log = Log(spec_of("random"))
    search = log.open()
    for candidate in search.waiting:
        log.evaluate(search, candidate)
    search.next()
    front = list(search._front.indices)
    genome = search.space.uniform()

    def ask(count: int) -> list[Proposal]:
        return [Proposal(genome, items=5), Proposal(genome, items=5), Proposal(genome), Proposal(genome, slopes=True)]

    search.algorithm.ask = ask  # type: ignore[method-assign]
    new = search.next()
    log.add(search, new)
    uniform = next(c.index for c in log.candidates if c.label == "uniform")
    assert [c.duplicate_of for c in new] == [None, new[0].index, uniform, None]
    assert [c.items for c in new] == [5, 5, None, None]
    log.evaluations[new[0].index] = Evaluation(new[0].index, (1e9, -1e9))
    search.record(log.evaluations[new[0].index])
    search.algorithm.ask = lambda count: []  # type: ignore[method-assign]
    search.next()
    assert search._front.indices == front


def test_an_algorithm_that_has_nothing_more_to_say_ends_the_job() -> None:
    search = Log(spec_of("random")).open()
    type(search.algorithm).stop_reason = property(lambda self: "all is said")  # type: ignore[assignment,method-assign]
    try:
        assert search.next() == []
        assert search.stop_reason == "all is said"
    finally:
        del type(search.algorithm).stop_reason


def test_what_only_constrains_or_is_reported_is_no_axis() -> None:
    spec = make_spec(
        objectives=[
            {"name": "language", "evaluator": "text_classification", "metric": "loss", "data": {"path": "a.jsonl"}},
            {
                "name": "safety",
                "evaluator": "text_classification",
                "metric": "accuracy",
                "data": {"path": "b.jsonl"},
                "use": "constraint",
                "constraint": {"at_least": 0.5},
            },
            {
                "name": "length",
                "evaluator": "text_classification",
                "metric": "loss",
                "data": {"path": "c.jsonl"},
                "use": "report",
            },
        ],
        algorithm={"name": "cma_es"},
        warm_starts={"base": False, "experts": False, "uniform": False},
    )
    search = Search(spec, make_problem(spec))
    assert search.algorithm.context.objectives == 1
    search.add(search.next())
    # The second is worse in what is only reported, and better where it counts.
    search.record(Evaluation(0, (0.5, 0.9, 0.1)))
    search.record(Evaluation(1, (0.4, 0.9, 9.0)))
    search.next()
    assert search._front.indices == [1]
    assert search._front.losses.tolist() == [[0.4]]
