"""What two runs of one job must have in common."""

from __future__ import annotations

from typing import Any

from api.store.sql import SqlStore

Rows = list[tuple[Any, ...]]


def history(url: str, job_id: str) -> Rows:
    """Return the sequence of candidates of a job with genomes, parents, scores and verifications, bit for bit."""
    store = SqlStore(url)
    try:
        count = store.get_job(job_id).progress.proposed
        return [_row(store, job_id, index) for index in range(count)]
    finally:
        store.close()


def _row(store: SqlStore, job_id: str, index: int) -> tuple[Any, ...]:
    found = store.get_candidate(job_id, index)
    return (
        found.index,
        found.generation,
        found.origin,
        found.label,
        tuple(found.genome or ()),
        found.fingerprint,
        found.duplicate_of,
        tuple(found.parents),
        found.failure and found.failure["code"],
        found.partial,
        found.stopped,
        None if found.errors is None else tuple(found.errors),
        found.verification and found.verification.model_dump(exclude={"seconds", "finished_at"}),
        str(found.test_items),
        None if found.values is None else tuple(found.values),
    )
