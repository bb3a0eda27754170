"""Scores of items that are kept across candidates and jobs, until the job that paid for them is deleted."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sqlalchemy import and_, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from api.store.models import ItemListRow, JobRow, RememberedRow
from optimizer.fitness.aggregate import ItemScores
from optimizer.ports import Remembered


def recall(session: Session, measures: Sequence[str], fingerprint: str) -> list[Remembered]:
    """Return what is kept of these measures of a merge, in an order that does not change."""
    rows = session.execute(
        select(RememberedRow, ItemListRow.items)
        .join(
            ItemListRow,
            and_(ItemListRow.job_id == RememberedRow.job_id, ItemListRow.digest == RememberedRow.item_list),
        )
        .where(RememberedRow.fingerprint == fingerprint, RememberedRow.measure.in_(measures))
        .order_by(RememberedRow.measure, RememberedRow.item_list)
    )
    return [Remembered(row.measure, fingerprint, items, ItemScores(row.values, row.weights)) for row, items in rows]


def keep(session: Session, job: JobRow, remembered: Sequence[Remembered]) -> None:
    """Keep scores until the locked job is deleted; what is kept already stays. Call it before events are written."""
    if not remembered:
        return
    lists = {hashlib.sha256(part.items).hexdigest(): part.items for part in remembered}
    mine = select(ItemListRow.digest).where(ItemListRow.job_id == job.id, ItemListRow.digest.in_(lists))
    new = set(lists) - set(session.scalars(mine))
    if new:
        session.execute(
            insert(ItemListRow), [{"job_id": job.id, "digest": key, "items": lists[key]} for key in sorted(new)]
        )
    rows = [
        {
            "fingerprint": part.fingerprint,
            "measure": part.measure,
            "item_list": hashlib.sha256(part.items).hexdigest(),
            "job_id": job.id,
            "values": part.scores.values,
            "weights": part.scores.weights,
        }
        # In one order for all jobs: two that keep the same then never wait for each other.
        for part in sorted(remembered, key=lambda part: (part.fingerprint, part.measure, part.items))
    ]
    # Another job may have kept the same in the meantime: its scores are as good.
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    session.execute(dialect.insert(RememberedRow).on_conflict_do_nothing(), rows)
