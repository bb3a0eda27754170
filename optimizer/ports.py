"""What the controller needs from the outside: a run store and an evaluation pool. Plain data crosses both.

Store rules that every implementation keeps (tests/api/store/test_conformance.py):

- A candidate is committed before it is dispatched; a whole generation in one transaction.
- A candidate has at most one outcome. Recording a second one changes nothing and says so.
- Every write under a lease checks the lease's token in the same transaction and raises `LeaseLost` if another
  controller has taken the job since (a fencing token: it grows with every claim).
- Indices of candidates are 0, 1, 2, … without gaps.
- A job that is to pause or cancel does so even if its controller is gone: when the lease is given up, or at the next claim
  after it expired.
- Every method raises `Unavailable` while the store cannot be reached. Only a call whose connection broke as it was being
  committed may have taken effect nevertheless.
- Nothing stored is a pickle. Genomes and item scores are little-endian arrays, the rest JSON and numbers.
- Implementations are safe to use from several threads and processes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import FREE, Cost
from optimizer.fitness.intervals import Interval
from optimizer.fitness.racing import Rivals, Terms
from optimizer.problem import Problem
from optimizer.space import Genome
from optimizer.spec import CandidateInput, JobSpec

JobState = Literal["queued", "running", "paused", "completed", "failed", "cancelled"]
FinalState = Literal["completed", "failed", "cancelled"]
Request = Literal["run", "pause", "cancel"]
Origin = Literal["algorithm", "warm_start", "user"]
Split = Literal["search", "test"]


@dataclass(frozen=True)
class Lease:
    """The right to run a job until it expires.

    Attributes:
        job_id: the job.
        owner: who holds it, for humans.
        token: the fencing token; a later claim has a higher one.
    """

    job_id: str
    owner: str
    token: int


@dataclass(frozen=True)
class Candidate:
    """A proposal as recorded.

    Attributes:
        index: number in the job, from 0.
        generation: the algorithm's generation; -1 for warm starts and the user's.
        told: how many outcomes the algorithm had been told when this was proposed: replay puts it back there.
        origin: who proposed it.
        label: the user's or warm start's name for it, or None.
        genome: shape (dim,), or None for a foreign recipe.
        recipe: canonical plain data.
        fingerprint: of the recipe.
        parents: indices of the candidates it descends from.
        duplicate_of: index of the earlier candidate with the same fingerprint, whose outcome it shares, or None.
        phase: number of the job's phase that it belongs to, from 0.
        items: how many items of each objective it is measured on; None for all.
        slopes: whether `Evaluation.slopes` are wanted.
        estimated: whether it is measured on anchor items only, and its values estimated from them.
        rivals: whom it must not lose to, lest its evaluation be stopped; None where it is measured as asked.
    """

    index: int
    generation: int
    told: int
    origin: Origin
    label: str | None
    genome: Genome | None
    recipe: Mapping[str, Any]
    fingerprint: str
    parents: tuple[int, ...] = ()
    duplicate_of: int | None = None
    phase: int = 0
    items: int | None = None
    slopes: bool = False
    estimated: bool = False
    rivals: Rivals | None = None


@dataclass(frozen=True)
class Failure:
    """Why an evaluation has no score: the error's code and message."""

    code: str
    message: str


@dataclass(frozen=True)
class Evaluation:
    """The outcome of a candidate.

    Attributes:
        index: the candidate's.
        values: one for each objective in the job's order, in the metric's own direction; None when it failed.
        violation: of the constraints, 0 when they hold.
        items: per-item scores by objective name; empty when it failed, or when loaded without them.
        failure: why there are no values, or None.
        seconds: what the evaluation took, by part, e.g. ``{"merge": 0.05, "evaluate": 0.7}``.
        worker: who did it.
        slopes: see `optimizer.algorithms.Outcome`; None where they were not asked for, or could not be had.
        cost: what it took beside time.
        stopped: after how many items of each objective it had lost to one of its rivals, which ended the evaluation; its
            values are estimates then. None if it was measured as asked.
        errors: standard errors of values that are estimates; empty where they are measured.
    """

    index: int
    values: tuple[float, ...] | None
    violation: float = 0.0
    items: Mapping[str, ItemScores] = field(default_factory=dict)
    failure: Failure | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    worker: str = ""
    slopes: NDArray[np.float64] | None = None
    cost: Cost = FREE
    stopped: int | None = None
    errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Verification:
    """What a candidate comes to on all items of the search and on the test items.

    Attributes:
        index: the candidate's.
        search: by objective, on all of its search items.
        test: by objective that has test items.
        overfitted: objectives by which it is worse on the test items, see `optimizer.fitness.intervals.overfitted`.
        items: per-item scores of the test items, by objective.
        failure: why there are no values, or None.
        seconds: what it took, by part.
        worker: who did it.
        cost: of what was measured.
    """

    index: int
    search: Mapping[str, Interval] = field(default_factory=dict)
    test: Mapping[str, Interval] = field(default_factory=dict)
    overfitted: tuple[str, ...] = ()
    items: Mapping[str, ItemScores] = field(default_factory=dict)
    failure: Failure | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    worker: str = ""
    cost: Cost = FREE


@dataclass(frozen=True)
class Remembered:
    """Scores of items under one merge, kept beyond the candidate they were measured for.

    Attributes:
        measure: what was measured, see `optimizer.problem.ResolvedObjective.measure`.
        fingerprint: of the recipe that was measured.
        items: 16 bytes for each item, see `ResolvedObjective.item_digests`; each once.
        scores: of these items, in the same order.
    """

    measure: str
    fingerprint: str
    items: bytes
    scores: ItemScores

    def split(self) -> list[bytes]:
        """Return the items' digests one by one."""
        return [self.items[first : first + 16] for first in range(0, len(self.items), 16)]


@dataclass(frozen=True)
class Enqueued:
    """A candidate that a user enqueued and no controller has taken up yet."""

    id: int
    candidate: CandidateInput


@dataclass(frozen=True)
class JobLog:
    """All that a controller needs to resume: the log, without per-item scores.

    Attributes:
        problem: None until the inputs have been looked at.
        candidates: in order of their index, without gaps.
        evaluations: by candidate index, in the order in which they were recorded; a duplicate has none of its own.
        elapsed_s: running time so far.
        verified: by index of the candidates whose verification was begun, in that order, whether it is over.
        cost: what the job cost so far, evaluations that were interrupted counted.
        anchors: what `RunStore.set_anchors` kept, or None.
    """

    spec: JobSpec
    problem: Problem | None
    candidates: Sequence[Candidate]
    evaluations: Mapping[int, Evaluation]
    elapsed_s: float
    verified: Mapping[int, bool] = field(default_factory=dict)
    cost: Cost = FREE
    anchors: Mapping[str, Any] | None = None


class RunStore(Protocol):
    """The controller's side of the store."""

    def claim(self, owner: str, ttl_s: float, job_id: str | None = None) -> Lease | None:
        """Take the oldest job that wants to run and that nobody holds (or whose lease expired); None if there is none.

        Before that, jobs that nobody holds and that were to pause or cancel do. With ``job_id``, only that job is looked at.
        """

    def renew(self, lease: Lease, ttl_s: float, elapsed_s: float) -> Request:
        """Extend the lease, record the running time so far, and return what the user wants now. Raises `LeaseLost`."""

    def load(self, lease: Lease) -> JobLog:
        """Return the job's log."""

    def items(self, lease: Lease, first: int, count: int) -> Mapping[int, Mapping[str, ItemScores]]:
        """Return the per-item scores, by objective, of the evaluated candidates from ``first`` on, ``count`` at most."""

    def start(self, lease: Lease, problem: Problem) -> None:
        """Record the job's inputs as found (the first time) and that it is running."""

    def enqueued(self, lease: Lease) -> list[Enqueued]:
        """Return what users have enqueued and nobody has taken up, oldest first."""

    def add_candidates(self, lease: Lease, candidates: Sequence[Candidate], taken: Sequence[int] = ()) -> None:
        """Commit candidates in one transaction, and mark the enqueued ids in ``taken`` as taken up."""

    def reject_enqueued(self, lease: Lease, enqueued_id: int, failure: Failure) -> None:
        """Mark an enqueued candidate as unusable, with the reason."""

    def remembered(self, lease: Lease, measures: Sequence[str], fingerprint: str) -> list[Remembered]:
        """Return what any job that still exists has kept of these measures of a merge, in the order of keeping."""

    def add_evaluation(self, lease: Lease, evaluation: Evaluation, remembered: Sequence[Remembered] = ()) -> bool:
        """Commit an outcome, update the front and the counters; False if the candidate has an outcome already.

        In the same transaction ``remembered`` is kept until the job is deleted.
        """

    def begin_verification(self, lease: Lease, indices: Sequence[int]) -> None:
        """Commit that these candidates are to be verified, in this order; those that are already stay as they are."""

    def add_verification(self, lease: Lease, verification: Verification, remembered: Sequence[Remembered] = ()) -> bool:
        """Commit a verification that was begun, and keep ``remembered``; False if it is over already."""

    def set_anchors(self, lease: Lease, anchors: Mapping[str, Any]) -> None:
        """Commit which items stand for all, and the models that estimates are made with; plain data, once for the job."""

    def add_cost(self, lease: Lease, cost: Cost) -> None:
        """Add what an evaluation cost that was interrupted, and so has no outcome, to the job's cost."""

    def set_state(self, lease: Lease, state: JobState, reason: str | None = None) -> None:
        """Record a new state; a paused or final one also gives up the lease.

        A job that the user has meanwhile cancelled is cancelled instead of paused.
        """

    def release(self, lease: Lease) -> None:
        """Give up the lease, so that any controller may go on at once; a job that is to pause or cancel does so."""


@dataclass(frozen=True)
class Task:
    """A candidate to evaluate.

    Attributes:
        index: the candidate's.
        recipe: plain data.
        items: as in `Candidate`.
        slopes: as in `Candidate`.
        places: by objective, which of its items to measure, in this order (maybe none); None for those that ``items`` says.
        test: by objective, which of its test items to measure.
        race: when to stop before all items are measured; ``places`` are then in the shared order.
        allowance: most that it may cost; None where nothing bounds it.
    """

    index: int
    recipe: Mapping[str, Any]
    items: int | None = None
    slopes: bool = False
    places: Mapping[str, NDArray[np.int64]] | None = None
    test: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    race: Terms | None = None
    allowance: Cost | None = None


@dataclass(frozen=True)
class Result:
    """What a worker found: per-item scores, a failure, or why the job has to pause. Aggregation is the controller's.

    Attributes:
        test: per-item scores of test items.
        stopped: after how many items of the shared order the race was lost; None if it was not.
        lost_to: number of the reference in the race.
        pause: why the candidate cannot be evaluated until somebody does something; it then has no outcome yet.
    """

    index: int
    scores: Mapping[str, ItemScores] = field(default_factory=dict)
    failure: Failure | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    worker: str = ""
    slopes: NDArray[np.float64] | None = None
    cost: Cost = FREE
    test: Mapping[str, ItemScores] = field(default_factory=dict)
    stopped: int | None = None
    lost_to: int = 0
    pause: str | None = None


class EvaluationPool(Protocol):
    """Workers of one job. A task that is submitted comes back exactly once, scored or failed, in any order.

    A pool retries what may succeed elsewhere (lost workers, timeouts) by itself, up to the job's attempts.
    """

    def submit(self, task: Task) -> None:
        """Hand over a task; returns at once."""

    def wait(self, timeout_s: float) -> list[Result]:
        """Return results that are ready, waiting up to ``timeout_s`` for the first one.

        Raises:
            JobError, UserError: no worker can do this job (its inputs are gone, no node has what a worker needs).
            JobPaused: somebody has to do something before it can go on.
        """

    def withdraw(self) -> list[int]:
        """Take back the tasks that no worker has begun; return the indices of their candidates."""

    def close(self) -> None:
        """Drop all tasks and release the workers."""


class PoolFactory(Protocol):
    """Where pools come from."""

    def prepare(self, spec: JobSpec) -> Problem:
        """Look at the job's checkpoints and data; raises `InvalidInput` where they do not fit together."""

    def open(self, spec: JobSpec, problem: Problem) -> EvaluationPool:
        """Start the workers of a job whose inputs were prepared."""

    def close(self) -> None:
        """Let go of whatever the factory holds; pools must be closed before."""
