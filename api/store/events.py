"""The event log: written in the transaction of what it tells, read by id.

A reader that has seen event 7 asks for what follows 7, and so must never find out later that there was a 6. On SQLite
one writer commits after the other. On PostgreSQL ids come from a sequence, and transactions become visible in the order
of their commits: 7 could appear before 6. So every transaction that writes events takes one advisory lock first and
holds it until it has committed; ids then become visible in their order, over all jobs. It is the last lock a transaction
takes (after rows of exports and jobs, in this order), so nobody waits in a circle, and it is held for one insert
and the commit.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from api.store.columns import utc_now
from api.store.models import EventRow
from api.views import EventView

# Any fixed number will do; "mergeopt" in ASCII.
_LOCK = 0x6D657267656F7074

Event = tuple[str, dict[str, Any]]


def append(session: Session, job_id: str, *events: Event) -> None:
    """Write events, given as (type, data); the last thing a transaction does before it commits."""
    if not events:
        return
    session.flush()
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    now = utc_now()
    session.execute(
        insert(EventRow), [{"job_id": job_id, "type": kind, "data": data, "at": now} for kind, data in events]
    )


def read(session: Session, job_id: str | None, after: int, limit: int) -> list[EventView]:
    """Return events with an id above ``after``, oldest first."""
    query = select(EventRow).where(EventRow.id > after).order_by(EventRow.id).limit(limit)
    if job_id is not None:
        query = query.where(EventRow.job_id == job_id)
    return [
        EventView(id=row.id, job_id=row.job_id, type=row.type, data=row.data, at=row.at)
        for row in session.scalars(query)
    ]
