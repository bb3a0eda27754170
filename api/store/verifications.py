"""Verifications: what the best candidates of a finished search come to on test items, each recorded once."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from api.store import events, memory, rendering
from api.store.columns import utc_now
from api.store.models import CandidateRow, JobRow, TestScoresRow, VerificationRow
from api.views import VerificationView
from optimizer.errors import InvalidInput, NotFound
from optimizer.fitness.cost import Cost
from optimizer.fitness.intervals import Interval
from optimizer.ports import Remembered, Verification


def begin(session: Session, job: JobRow, indices: Sequence[int]) -> None:
    """Record under the locked job that these candidates are to be verified; those that are already stay."""
    known = states(session, job.id)
    new = [index for index in dict.fromkeys(indices) if index not in known]
    found = select(CandidateRow.index).where(CandidateRow.job_id == job.id, CandidateRow.index.in_(new))
    unknown = set(new) - set(session.scalars(found))
    if unknown:
        raise NotFound(f"the job has no candidate {min(unknown)}", field="candidate")
    if not new:
        return
    empty: dict[str, Any] = {
        "state": "waiting",
        "search": {},
        "test": {},
        "overfitted": [],
        "failure": None,
        "seconds": {},
        "cost": {},
    }
    session.execute(
        insert(VerificationRow),
        [
            {"job_id": job.id, "index": index, "place": place, "worker": "", "finished_at": None, **empty}
            for place, index in enumerate(new, start=len(known))
        ],
    )
    job.to_verify += len(new)
    events.append(session, job.id, ("job.verifying", {"candidates": new, "to_verify": job.to_verify}))


def record(session: Session, job: JobRow, verification: Verification, remembered: Sequence[Remembered] = ()) -> bool:
    """Record a verification under the locked job; return whether it was not over before."""
    row = session.get(VerificationRow, (job.id, verification.index))
    if row is None:
        raise NotFound(f"candidate {verification.index} was not to be verified", field="candidate")
    if row.state != "waiting":
        return False
    names = [objective["name"] for objective in job.objectives]
    _check(verification, names)
    failure = verification.failure
    row.state = "completed" if failure is None else "failed"
    row.search = {name: asdict(found) for name, found in verification.search.items()}
    row.test = {name: asdict(found) for name, found in verification.test.items()}
    row.overfitted = list(verification.overfitted)
    row.failure = None if failure is None else {"code": failure.code, "message": failure.message}
    row.seconds = dict(verification.seconds)
    row.cost = verification.cost.to_json()
    row.worker = verification.worker
    row.finished_at = utc_now()
    job.verified += 1
    job.cost = (Cost.of(job.cost) + verification.cost).to_json()
    scores = [
        {
            "job_id": job.id,
            "index": verification.index,
            "objective": names.index(name),
            "values": found.values,
            "weights": found.weights,
        }
        for name, found in verification.items.items()
    ]
    if scores:
        session.execute(insert(TestScoresRow), scores)
    memory.keep(session, job, remembered)
    data = {
        "index": row.index,
        "state": row.state,
        "search": {name: found.value for name, found in verification.search.items()},
        "test": {name: found.value for name, found in verification.test.items()},
        "overfitted": row.overfitted,
        "progress": rendering.progress(job).model_dump(mode="json"),
    }
    events.append(session, job.id, ("candidate.verified", data))
    return True


def states(session: Session, job_id: str) -> dict[int, bool]:
    """Return by index of the candidates that were to be verified, in their order, whether that is over."""
    rows = session.execute(
        select(VerificationRow.index, VerificationRow.state)
        .where(VerificationRow.job_id == job_id)
        .order_by(VerificationRow.place)
    )
    return {index: state != "waiting" for index, state in rows}


def views(session: Session, job_id: str, indices: Collection[int]) -> dict[int, VerificationView]:
    """Return the verifications of these candidates."""
    if not indices:
        return {}
    # A job has few of them, and there may be more candidates than a statement takes parameters.
    rows = session.scalars(select(VerificationRow).where(VerificationRow.job_id == job_id))
    wanted = set(indices)
    return {row.index: _view(row) for row in rows if row.index in wanted}


def test_items(session: Session, job: JobRow, index: int) -> dict[str, list[float]]:
    """Return a candidate's scores of test items, by objective."""
    rows = session.scalars(
        select(TestScoresRow)
        .where(TestScoresRow.job_id == job.id, TestScoresRow.index == index)
        .order_by(TestScoresRow.objective)
    )
    return {job.objectives[row.objective]["name"]: row.values.tolist() for row in rows}


def _view(row: VerificationRow) -> VerificationView:
    return VerificationView(
        state=row.state,
        search=row.search,
        test=row.test,
        overfitted=row.overfitted,
        failure=row.failure,
        seconds=row.seconds,
        finished_at=row.finished_at,
    )


def _check(verification: Verification, names: Collection[str]) -> None:
    intervals: list[tuple[str, Interval]] = [*verification.search.items(), *verification.test.items()]
    given = {name for name, _ in intervals} | set(verification.items) | set(verification.overfitted)
    unknown = sorted(given - set(names))
    if unknown:
        raise InvalidInput(f"values of unknown objectives: {', '.join(unknown)}", field="test")
    if not all(math.isfinite(number) for _, found in intervals for number in (found.value, found.low, found.high)):
        raise InvalidInput("not all values are finite", field="test", remedy="record a failure")
