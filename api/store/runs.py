"""The controller's side: leases, the log of candidates, and their outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import groupby
from typing import Any

from sqlalchemy import Select, insert, or_, select, update
from sqlalchemy.orm import Session

from api.store import events, lifecycle, memory, outcomes, replay, verifications
from api.store.columns import utc_now
from api.store.engine import Database, expiry
from api.store.models import CandidateRow, EnqueuedRow, ItemScoresRow, JobRow, RecipeRow
from api.views import ObjectiveView
from optimizer.errors import Conflict, LeaseLost
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import Cost
from optimizer.ports import (
    Candidate,
    Enqueued,
    Evaluation,
    Failure,
    JobLog,
    JobState,
    Lease,
    Remembered,
    Request,
    Verification,
)
from optimizer.problem import Problem
from optimizer.space import make_space
from optimizer.spec import CandidateInput, JobSpec


class Runs(Database):
    """What controllers do, see `optimizer.ports.RunStore`."""

    def claim(self, owner: str, ttl_s: float, job_id: str | None = None) -> Lease | None:
        """Take the oldest job that wants to run and that nobody holds (or whose lease expired); None if there is none.

        Before that, jobs that nobody holds and that were to pause or cancel do: their controllers are gone.

        Args:
            owner: who asks, for humans.
            ttl_s: seconds until the lease expires unless renewed.
            job_id: take this job or none, and look at no other.
        """
        while True:
            # One transaction a job: none may lock a second one after the events of the first.
            with self.write("claim") as session:
                now = self.now(session)
                query = _free_jobs(now)
                if job_id is not None:
                    query = query.where(JobRow.id == job_id)
                # Whoever asks for any job passes over those that others are just taking; who asks for one waits for it.
                job = session.scalar(query.with_for_update(key_share=True, skip_locked=job_id is None))
                if job is None:
                    return None
                if job.requested == "run":
                    return _take_lease(session, job, owner, now, ttl_s)
                lifecycle.carry_out(session, job, now)

    def renew(self, lease: Lease, ttl_s: float, elapsed_s: float) -> Request:
        """Extend the lease, record the running time so far, and return what the user wants now. Raises `LeaseLost`."""
        with self._leased(lease, "renew") as (session, job):
            job.lease_expires_at = expiry(self.now(session), ttl_s)
            job.elapsed_s = elapsed_s
            return job.requested

    def load(self, lease: Lease) -> JobLog:
        """Return the job's log, without per-item scores. Raises `LeaseLost`.

        Recipes of evaluated candidates are read when they are looked at, which raises `NotFound` once the job is deleted.
        """
        with self.read() as session:
            job = _check_lease(session.get(JobRow, lease.job_id), lease)
            return replay.read_log(session, job, partial(self._recipe, job.id))

    def items(self, lease: Lease, first: int, count: int) -> dict[int, dict[str, ItemScores]]:
        """Return the per-item scores of evaluated candidates, by index and objective. Raises `LeaseLost`."""
        with self.read() as session:
            job = _check_lease(session.get(JobRow, lease.job_id), lease)
            names = [objective["name"] for objective in job.objectives]
            rows = session.scalars(
                select(ItemScoresRow).where(
                    ItemScoresRow.job_id == job.id, ItemScoresRow.index >= first, ItemScoresRow.index < first + count
                )
            )
            found: dict[int, dict[str, ItemScores]] = {}
            for row in rows:
                found.setdefault(row.index, {})[names[row.objective]] = ItemScores(row.values, row.weights)
            return found

    def start(self, lease: Lease, problem: Problem) -> None:
        """Record the job's inputs as found (the first time) and that it is running.

        Raises:
            LeaseLost: another controller has the job.
            InvalidInput: the spec makes no search space of the problem.
        """
        with self._leased(lease, "start") as (session, job):
            if job.problem is None:
                spec = JobSpec.model_validate(job.spec)
                make_space(spec, problem)  # every later view of the job relies on it
                job.problem = problem.model_dump(mode="json", exclude={"grams"})
                job.grams = None if problem.grams is None else problem.grams.model_dump(mode="json")
                job.objectives = _resolved(spec, problem)
            lifecycle.change_state(session, job, "running", None, utc_now())

    def enqueued(self, lease: Lease) -> list[Enqueued]:
        """Return what users have enqueued and nobody has taken up, oldest first. Raises `LeaseLost`."""
        with self.read() as session:
            _check_lease(session.get(JobRow, lease.job_id), lease)
            rows = session.scalars(
                select(EnqueuedRow)
                .where(EnqueuedRow.job_id == lease.job_id, EnqueuedRow.state == "waiting")
                .order_by(EnqueuedRow.number)
            )
            return [Enqueued(row.number, CandidateInput.model_validate(row.candidate)) for row in rows]

    def add_candidates(self, lease: Lease, candidates: Sequence[Candidate], taken: Sequence[int] = ()) -> None:
        """Commit candidates in one transaction, and mark the enqueued ids in ``taken`` as taken up.

        Raises:
            LeaseLost: another controller has the job.
            Conflict: the indices do not go on where the job's end, a duplicate does not repeat an earlier original that
                was measured on as many items at least, or an enqueued candidate does not wait.
        """
        with self._leased(lease, "add_candidates") as (session, job):
            expected = range(job.proposed, job.proposed + len(candidates))
            if [candidate.index for candidate in candidates] != list(expected):
                raise Conflict(f"the job's next candidates are {expected.start} to {expected.stop - 1}")
            _take(session, job, taken)
            _insert(session, job, candidates)
            job.proposed += len(candidates)
            job.duplicates += sum(candidate.duplicate_of is not None for candidate in candidates)
            events.append(session, job.id, *_proposed(candidates))

    def reject_enqueued(self, lease: Lease, enqueued_id: int, failure: Failure) -> None:
        """Mark an enqueued candidate as unusable, with the reason.

        Raises:
            LeaseLost: another controller has the job.
            Conflict: the candidate does not wait.
        """
        with self._leased(lease, "reject_enqueued") as (session, job):
            row = session.get(EnqueuedRow, (job.id, enqueued_id))
            if row is None or row.state != "waiting":
                raise Conflict(f"the enqueued candidate {enqueued_id} does not wait")
            row.state = "rejected"
            row.failure = {"code": failure.code, "message": failure.message}
            events.append(session, job.id, ("candidate.rejected", {"queued": enqueued_id, **row.failure}))

    def remembered(self, lease: Lease, measures: Sequence[str], fingerprint: str) -> list[Remembered]:
        """Return what any job that still exists has kept of these measures of a merge. Raises `LeaseLost`."""
        with self.read() as session:
            _check_lease(session.get(JobRow, lease.job_id), lease)
            return memory.recall(session, measures, fingerprint)

    def add_evaluation(self, lease: Lease, evaluation: Evaluation, remembered: Sequence[Remembered] = ()) -> bool:
        """Commit an outcome, update the front and the counters; False if the candidate has an outcome already.

        In the same transaction ``remembered`` is kept until the job is deleted.

        Raises:
            LeaseLost: another controller has the job.
            NotFound: no such candidate.
            Conflict: the candidate is a duplicate, or the job was never started.
            InvalidInput: values that are missing, too many, or not finite; scores of an unknown objective.
        """
        with self._leased(lease, "add_evaluation") as (session, job):
            return outcomes.record(session, job, evaluation, remembered)

    def begin_verification(self, lease: Lease, indices: Sequence[int]) -> None:
        """Commit that these candidates are to be verified, in this order; those that are already stay as they are.

        Raises:
            LeaseLost: another controller has the job.
            NotFound: no such candidate.
        """
        with self._leased(lease, "begin_verification") as (session, job):
            verifications.begin(session, job, indices)

    def add_verification(self, lease: Lease, verification: Verification, remembered: Sequence[Remembered] = ()) -> bool:
        """Commit a verification that was begun, and keep ``remembered``; False if it is over already.

        Raises:
            LeaseLost: another controller has the job.
            NotFound: it was never begun.
            InvalidInput: scores of an unknown objective, or numbers that are not finite.
        """
        with self._leased(lease, "add_verification") as (session, job):
            return verifications.record(session, job, verification, remembered)

    def set_anchors(self, lease: Lease, anchors: Mapping[str, Any]) -> None:
        """Commit the job's anchors; what was committed before stays. Raises `LeaseLost`."""
        with self._leased(lease, "set_anchors") as (_, job):
            if job.anchors is None:
                job.anchors = dict(anchors)

    def add_cost(self, lease: Lease, cost: Cost) -> None:
        """Add what an interrupted evaluation cost to the job's cost. Raises `LeaseLost`."""
        with self._leased(lease, "add_cost") as (_, job):
            job.cost = (Cost.of(job.cost) + cost).to_json()

    def set_state(self, lease: Lease, state: JobState, reason: str | None = None) -> None:
        """Record a new state; a paused or final one also gives up the lease. Raises `LeaseLost`.

        A job that the user has meanwhile cancelled is cancelled instead of paused.
        """
        with self._leased(lease, "set_state") as (session, job):
            if state == "paused" and reason is not None and job.requested == "run":
                job.requested = (
                    "pause"  # not the user's wish, but nobody is to take it up before the user does something
                )
            if state == "paused" and job.requested == "cancel":
                lifecycle.carry_out(session, job, utc_now())
            else:
                lifecycle.change_state(session, job, state, reason, utc_now())

    def release(self, lease: Lease) -> None:
        """Give up the lease, so that any controller may go on at once. Raises `LeaseLost`.

        The state stays as it is, unless the job is to pause or cancel: it does.
        """
        with self._leased(lease, "release") as (session, job):
            lifecycle.drop_lease(job)
            if job.requested != "run":
                lifecycle.carry_out(session, job, utc_now())

    def _recipe(self, job_id: str, index: int) -> dict[str, Any]:
        with self.read() as session:
            row = session.get(RecipeRow, (job_id, index))
            if row is None:
                raise lifecycle.no_job(job_id)
            return row.recipe

    @contextmanager
    def _leased(self, lease: Lease, operation: str) -> Iterator[tuple[Session, JobRow]]:
        """A writing transaction in which the job is locked and the lease is known to be good."""
        with self.write(operation) as session:
            yield session, _check_lease(lifecycle.lock_job(session, lease.job_id), lease)


def _check_lease(job: JobRow | None, lease: Lease) -> JobRow:
    # An expired lease that nobody has taken since is still good: only a second writer is a danger.
    if job is None or job.lease_owner is None or job.lease_token != lease.token:
        raise LeaseLost(f"{lease.owner} no longer holds job {lease.job_id}")
    return job


def _free_jobs(now: datetime) -> Select[JobRow]:
    """The first job that nobody holds: one that was to pause or cancel, else the oldest that wants to run."""
    wants_to_run = JobRow.requested == "run"
    return (
        select(JobRow)
        .where(
            JobRow.state.in_(("queued", "paused", "running")),
            or_(JobRow.requested != "pause", JobRow.state != "paused"),
            or_(JobRow.lease_expires_at.is_(None), JobRow.lease_expires_at <= now),
        )
        .order_by(wants_to_run, JobRow.created_at, JobRow.id)
        .limit(1)
    )


def _take_lease(session: Session, job: JobRow, owner: str, now: datetime, ttl_s: float) -> Lease:
    job.lease_owner = owner
    job.lease_token += 1
    job.lease_expires_at = expiry(now, ttl_s)
    if job.state == "running":
        events.append(session, job.id, ("job.note", {"message": f"{owner} goes on with the job"}))
    return Lease(job.id, owner, job.lease_token)


def _resolved(spec: JobSpec, problem: Problem) -> list[dict[str, object]]:
    evaluators = {objective.name: objective.evaluator for objective in spec.objectives}
    views = [
        ObjectiveView(
            name=o.name,
            evaluator=evaluators[o.name],
            metric=o.metric,
            direction=o.direction,
            use=o.use,
            weight=o.weight,
        )
        for o in problem.objectives
    ]
    return [view.model_dump(mode="json") for view in views]


def _take(session: Session, job: JobRow, numbers: Sequence[int]) -> None:
    if not numbers:
        return
    taken = session.scalars(
        update(EnqueuedRow)
        .where(EnqueuedRow.job_id == job.id, EnqueuedRow.number.in_(numbers), EnqueuedRow.state == "waiting")
        .values(state="taken")
        .returning(EnqueuedRow.number)
        .execution_options(synchronize_session=False)
    ).all()
    if set(taken) != set(numbers):
        raise Conflict(f"these enqueued candidates do not wait: {sorted(set(numbers) - set(taken))}")


def _insert(session: Session, job: JobRow, candidates: Sequence[Candidate]) -> None:
    if not candidates:
        return
    originals = _originals(session, job, candidates)
    now = utc_now()
    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        row: dict[str, Any] = {
            "job_id": job.id,
            "index": candidate.index,
            "generation": candidate.generation,
            "told": candidate.told,
            "origin": candidate.origin,
            "label": candidate.label,
            "fingerprint": candidate.fingerprint,
            "parents": list(candidate.parents),
            "genome": candidate.genome,
            "duplicate_of": candidate.duplicate_of,
            "phase": candidate.phase,
            "items": candidate.items,
            "slopes": candidate.slopes,
            "estimated": candidate.estimated,
            "rivals": None if candidate.rivals is None else candidate.rivals.to_json(),
            "created_at": now,
        }
        # All rows of one statement have the same columns, so all name those of the outcome.
        rows.append(row | outcomes.shared(originals.get(candidate.duplicate_of)))
    session.execute(insert(CandidateRow), rows)
    session.execute(
        insert(RecipeRow),
        [{"job_id": job.id, "index": c.index, "recipe": dict(c.recipe)} for c in candidates],
    )
    outcomes.insert_values(session, job, {row["index"]: row["values"] for row in rows if _is_whole(row, originals)})


def _is_whole(row: Mapping[str, Any], originals: Mapping[int | None, CandidateRow]) -> bool:
    """Whether a new candidate shares values that were measured on all items."""
    return row["values"] is not None and originals[row["duplicate_of"]].items is None


def _originals(session: Session, job: JobRow, candidates: Sequence[Candidate]) -> dict[int | None, CandidateRow]:
    """Return the originals among the recorded candidates by index, having checked that each duplicate has one."""
    wanted = {c.duplicate_of for c in candidates if c.duplicate_of is not None and c.duplicate_of < job.proposed}
    rows = (
        session.scalars(select(CandidateRow).where(CandidateRow.job_id == job.id, CandidateRow.index.in_(wanted)))
        if wanted
        else ()
    )
    found: dict[int | None, CandidateRow] = {row.index: row for row in rows}
    known = {
        row.index: (row.fingerprint, None if row.stopped else row.items)
        for row in found.values()
        if row.duplicate_of is None
    }
    for candidate in candidates:
        if candidate.duplicate_of is None:
            known[candidate.index] = (candidate.fingerprint, candidate.items)
        elif not _repeats(candidate, known.get(candidate.duplicate_of)):
            raise Conflict(f"candidate {candidate.index} repeats no original {candidate.duplicate_of}")
    return found


def _repeats(candidate: Candidate, original: tuple[str, int | None] | None) -> bool:
    """Whether the original, given by fingerprint and items, is the same merge and measured on enough items."""
    if original is None or original[0] != candidate.fingerprint:
        return False
    return original[1] is None or (candidate.items is not None and candidate.items <= original[1])


def _proposed(candidates: Sequence[Candidate]) -> list[events.Event]:
    """One event for each run of candidates of the same phase, generation and origin."""
    out: list[events.Event] = []
    for (phase, generation, origin), group in groupby(candidates, key=lambda c: (c.phase, c.generation, c.origin)):
        run = list(group)
        place = {"phase": phase, "generation": generation, "origin": origin}
        data = {"first": run[0].index, "count": len(run), **place}
        out.append(("candidates.proposed", data))
    return out
