"""Jobs as the API sees them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import delete, select, tuple_
from sqlalchemy.exc import IntegrityError

from api.store import cursors, events, lifecycle, rendering
from api.store.columns import utc_now
from api.store.engine import Database
from api.store.models import ExportRow, JobRow
from api.views import EventView, JobSummary, JobView, ObjectiveView, Page
from optimizer.errors import Conflict, InvalidInput
from optimizer.ports import JobState, Request
from optimizer.spec import JobSpec, RaisedBudget

_ORDER = "jobs"


class Jobs(Database):
    """Submits, lists and steers jobs."""

    def create_job(
        self, spec: JobSpec, idempotency_key: str | None = None, cloned_from: str | None = None
    ) -> tuple[JobView, bool]:
        """Record a new job and return it with True; a key used before returns the earlier job with False.

        Raises:
            Conflict: the key was used with a different spec.
            NotFound: ``cloned_from`` is no job.
        """
        try:
            return self._create_job(spec, idempotency_key, cloned_from)
        except IntegrityError:
            # Somebody used the same key at the same moment, and is found now.
            return self._create_job(spec, idempotency_key, cloned_from)

    def _create_job(self, spec: JobSpec, key: str | None, cloned_from: str | None) -> tuple[JobView, bool]:
        with self.write() as session:
            if key is not None:
                earlier = session.scalar(select(JobRow).where(JobRow.idempotency_key == key))
                if earlier is not None:
                    return _same_job(earlier, spec), False
            if cloned_from is not None:
                lifecycle.find_job(session, cloned_from)
            job = _new_job(spec, key, cloned_from)
            session.add(job)
            events.append(session, job.id, ("job.state", {"state": job.state, "reason": None}))
            return rendering.job_view(job), True

    def list_jobs(
        self, *, state: JobState | None = None, name: str | None = None, cursor: str | None = None, limit: int = 50
    ) -> Page[JobSummary]:
        """Return jobs, newest first; ``name`` filters by substring, whatever the case.

        Raises:
            InvalidInput: a malformed cursor, or a limit out of range.
        """
        cursors.check_limit(limit)
        query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit + 1)
        if state is not None:
            query = query.where(JobRow.state == state)
        if name is not None:
            query = query.where(JobRow.name.icontains(name, autoescape=True))
        if cursor is not None:
            query = query.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(*_position(cursor)))
        with self.read() as session:
            rows, more = cursors.split(session.scalars(query).all(), limit)
            return Page[JobSummary](
                items=[rendering.job_summary(row) for row in rows],
                next_cursor=cursors.encode(_ORDER, rows[-1].created_at.isoformat(), rows[-1].id) if more else None,
            )

    def get_job(self, job_id: str) -> JobView:
        """Return one job; raises `NotFound`."""
        with self.read() as session:
            return rendering.job_view(lifecycle.find_job(session, job_id))

    def request(self, job_id: str, request: Request, budget: RaisedBudget | None = None) -> JobView:
        """Ask a job to run, pause or cancel.

        A controller that runs the job carries it out; where none does (queued, paused, or the controller is gone and its
        lease has expired), it takes effect at once. Until a request is carried out, a later one replaces it. A failed job
        may run again, since its cause may be mended.

        Args:
            job_id: the job.
            request: what to do.
            budget: what it may spend from now on; only for a job that nobody runs, lest it be at two budgets.

        Raises:
            NotFound: no such job.
            Conflict: the job is over, or is running and should get another budget.
            InvalidInput: as much as the budget is spent already.
        """
        with self.write() as session:
            job = lifecycle.lock_job(session, job_id)
            if job is None:
                raise lifecycle.no_job(job_id)
            if job.state in lifecycle.ENDED and (job.state, request) != ("failed", "run"):
                raise Conflict(f"the job is {job.state}", remedy="clone it")
            now = self.now(session)
            if budget is not None and (changes := budget.model_dump(exclude_none=True)):
                if job.state not in ("paused", "failed") or lifecycle.is_held(job, now):
                    raise Conflict("the job is not paused", remedy="pause it first, then resume it with another budget")
                _check_raised(changes, job.cost or {})
                job.spec = {**job.spec, "budget": {**job.spec["budget"], **changes}}
            job.requested = request
            if not lifecycle.is_held(job, now):
                lifecycle.carry_out(session, job, now)
            return rendering.job_view(job)

    def delete_job(self, job_id: str) -> None:
        """Delete a job with all that belongs to it.

        Raises:
            NotFound: no such job.
            Conflict: it is running, or a controller is preparing it. One whose controller is gone, and which was to
                pause or cancel, runs no more.
        """
        with self.write() as session:
            # Exports before the job: the order of locks that export workers keep.
            session.execute(delete(ExportRow).where(ExportRow.job_id == job_id))
            job = lifecycle.lock_job(session, job_id)
            if job is None:
                raise lifecycle.no_job(job_id)
            goes_on = job.state == "running" and job.requested == "run"
            if goes_on or lifecycle.is_held(job, self.now(session)):
                raise Conflict("the job is running", remedy="cancel it first")
            session.execute(delete(JobRow).where(JobRow.id == job_id))

    def events(self, job_id: str | None, after: int, limit: int = 500) -> list[EventView]:
        """Return events with an id above ``after``, oldest first; of all jobs when ``job_id`` is None.

        Raises:
            NotFound: no such job.
        """
        cursors.check_limit(limit, highest=10_000)
        with self.read() as session:
            if job_id is not None:
                lifecycle.find_job(session, job_id)
            return events.read(session, job_id, after, limit)


def _check_raised(budget: Mapping[str, float], spent: Mapping[str, float]) -> None:
    for part, amount in budget.items():
        if amount <= spent.get(part, 0.0):
            raise InvalidInput(
                f"{spent[part]:g} of {amount:g} are spent, so the job could not go on",
                field=f"budget.{part}",
                remedy=f"give more than {spent[part]:g}",
            )


def _new_job(spec: JobSpec, key: str | None, cloned_from: str | None) -> JobRow:
    shown = [
        ObjectiveView(
            name=o.name, evaluator=o.evaluator, metric=o.metric, direction=o.direction, use=o.use, weight=o.weight
        )
        for o in spec.objectives
    ]
    # Every column is given: what the first view shows is then not read back.
    return JobRow(
        id=secrets.token_hex(8),
        name=spec.name,
        state="queued",
        requested="run",
        reason=None,
        algorithm=" → ".join(phase.algorithm.name for phase in spec.phases) or spec.algorithm.name,
        operator="parameters" if spec.parameters else spec.merge.operator,
        objectives=[objective.model_dump(mode="json") for objective in shown],
        spec=spec.model_dump(mode="json"),
        problem=None,
        budget=spec.budget.evaluations,
        proposed=0,
        completed=0,
        failed=0,
        duplicates=0,
        front=0,
        best=[None] * len(spec.objectives),
        elapsed_s=0.0,
        cost={},
        to_verify=0,
        verified=0,
        created_at=utc_now(),
        started_at=None,
        finished_at=None,
        cloned_from=cloned_from,
        idempotency_key=key,
    )


def _same_job(earlier: JobRow, spec: JobSpec) -> JobView:
    # Compared as specs, not as stored: a later version may have added fields with defaults.
    if JobSpec.model_validate(earlier.spec) != spec:
        raise Conflict(
            f"the key was used for job {earlier.id}, with a different spec",
            field="Idempotency-Key",
            remedy="use a new key for a new job",
        )
    return rendering.job_view(earlier)


def _position(cursor: str) -> tuple[datetime, str]:
    created, job_id = cursors.decode(cursor, _ORDER, str, str)
    try:
        # Ours has a time zone; a forged one without is refused too.
        position = datetime.fromisoformat(created)
        if position.tzinfo is None:
            raise cursors.bad_cursor()
    except ValueError:
        raise cursors.bad_cursor() from None
    return position, job_id
