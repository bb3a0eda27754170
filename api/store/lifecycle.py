"""How a job's row is found, locked and moved from state to state; shared by the controller's and the API's side.

Locks are taken in the order export, job, events (see `api.store.events`). The job's lock is FOR NO KEY UPDATE: it orders
all who change the job, yet lets an export worker insert events that refer to it.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api.store import events
from api.store.models import CandidateRow, JobRow
from optimizer.errors import NotFound
from optimizer.ports import JobState

ENDED: tuple[JobState, ...] = ("completed", "failed", "cancelled")


def find_job(session: Session, job_id: str) -> JobRow:
    """Return the job, or raise `NotFound`."""
    job = session.get(JobRow, job_id)
    if job is None:
        raise no_job(job_id)
    return job


def lock_job(session: Session, job_id: str) -> JobRow | None:
    """Return the job, locked until the transaction ends, or None."""
    return session.scalar(select(JobRow).where(JobRow.id == job_id).with_for_update(key_share=True))


def no_job(job_id: str) -> NotFound:
    """Return the error for a job that does not exist."""
    return NotFound(f"there is no job {job_id!r}", field="job_id")


def is_held(job: JobRow, now: datetime) -> bool:
    """Whether a controller's lease on the job is live."""
    return job.lease_owner is not None and job.lease_expires_at is not None and job.lease_expires_at > now


def drop_lease(job: JobRow) -> None:
    """End the lease; whoever held it can write no more."""
    job.lease_owner = None
    job.lease_expires_at = None


def carry_out(session: Session, job: JobRow, now: datetime) -> None:
    """Do what the user wants of a locked job that no controller holds; call it last in a transaction."""
    if job.requested == "cancel":
        change_state(session, job, "cancelled", None, now)
    elif job.requested == "pause":
        if job.state != "paused":
            change_state(session, job, "paused", None, now)
    elif job.state in ("paused", "failed"):
        change_state(session, job, "queued", None, now)


def change_state(session: Session, job: JobRow, state: JobState, reason: str | None, now: datetime) -> None:
    """Move a locked job to ``state`` and say so in an event; call it last in a transaction.

    A job that stops gives up its lease. One that is over for good takes its pending candidates with it; those of a failed
    one stay, as it may be resumed.
    """
    changed = (job.state, job.reason) != (state, reason)
    job.state, job.reason = state, reason
    job.finished_at = now if state in ENDED else None
    if state == "running" and job.started_at is None:
        job.started_at = now
    if state == "paused" or state in ENDED:
        drop_lease(job)
    if state in ("completed", "cancelled"):
        session.execute(
            update(CandidateRow)
            .where(CandidateRow.job_id == job.id, CandidateRow.state == "pending")
            .values(state="cancelled", finished_at=now)
            .execution_options(synchronize_session=False)
        )
    if changed:
        events.append(session, job.id, ("job.state", {"state": state, "reason": reason}))
