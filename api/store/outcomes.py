"""What follows from one outcome, in its transaction: the front, counters, best values, duplicates, the event."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session

from api.store import events, memory, rendering
from api.store.columns import utc_now
from api.store.models import CandidateRow, ImprovementRow, ItemScoresRow, JobRow, ObjectiveValueRow, SlopesRow
from optimizer.errors import Conflict, InvalidInput, NotFound
from optimizer.fitness.cost import Cost
from optimizer.pareto import update_front
from optimizer.ports import Evaluation, Remembered

# What a duplicate shows of its original; it is never on the front and cost no time itself.
_SHARED = ("state", "values", "errors", "stopped", "violation", "failure", "finished_at")
_PENDING: dict[str, Any] = {
    "state": "pending",
    "values": None,
    "errors": None,
    "stopped": False,
    "violation": 0.0,
    "failure": None,
    "finished_at": None,
}


def record(session: Session, job: JobRow, evaluation: Evaluation, remembered: Sequence[Remembered] = ()) -> bool:
    """Record an outcome under the locked job, and keep what is to be remembered; return whether there was none before."""
    candidate = session.get(CandidateRow, (job.id, evaluation.index))
    if candidate is None:
        raise NotFound(f"the job has no candidate {evaluation.index}", field="candidate")
    if candidate.duplicate_of is not None:
        raise Conflict(f"candidate {evaluation.index} shares the outcome of {candidate.duplicate_of}")
    if candidate.state != "pending":
        return False
    _check(job, evaluation)
    _fill(candidate, evaluation)
    if evaluation.values is None:
        job.failed += 1
    else:
        job.completed += 1
        # What was measured on some items only is no match for what was measured on all.
        if evaluation.violation <= 0 and candidate.items is None:
            candidate.on_front = _join_front(session, job, list(evaluation.values))
            _note_improvement(session, job, evaluation.index, list(evaluation.values))
    candidate.recorded = job.completed + job.failed
    job.cost = (Cost.of(job.cost) + evaluation.cost).to_json()
    _insert_items(session, job, evaluation)
    _insert_slopes(session, job, evaluation)
    memory.keep(session, job, remembered)
    _share(session, job, candidate)
    events.append(session, job.id, _evaluated(job, candidate))
    return True


def shared(original: CandidateRow | None) -> dict[str, Any]:
    """Return the outcome columns of a new candidate: its original's, or those of one that waits."""
    if original is None:
        return dict(_PENDING)
    found = {name: getattr(original, name) for name in _SHARED}
    return found | {"items": original.items} if original.stopped else found


def insert_values(session: Session, job: JobRow, values: dict[int, list[float]]) -> None:
    """Insert the objective values of candidates, by index."""
    rows = [
        {"job_id": job.id, "objective": objective, "index": index, "value": value}
        for index, row in values.items()
        for objective, value in enumerate(row)
    ]
    if rows:
        session.execute(insert(ObjectiveValueRow), rows)


def signs(job: JobRow) -> NDArray[np.float64]:
    """Return what turns values into losses, shape (objectives,): -1 where more is better, 0 for no axis of the front."""
    return np.array([_sign(objective) for objective in job.objectives])


def _sign(objective: dict[str, Any]) -> float:
    if objective.get("use", "objective") != "objective":
        return 0.0
    return -1.0 if objective["direction"] == "maximise" else 1.0


def _better(objective: dict[str, Any], value: float, old: float | None) -> bool:
    """Whether a value is better than the one before, by the objective's own direction."""
    if old is None:
        return True
    return value > old if objective["direction"] == "maximise" else value < old


def mean_loss(job: JobRow, values: Sequence[float]) -> float:
    """Return the weighted mean of the axes of the front, maximised ones negated."""
    of = signs(job)
    weights = np.array([objective["weight"] for objective in job.objectives]) * np.abs(of)
    return float(np.average(np.array(values) * of, weights=weights))


def _check(job: JobRow, evaluation: Evaluation) -> None:
    if any(objective["direction"] is None for objective in job.objectives):
        raise Conflict("the job was never started")
    values, names = evaluation.values, _names(job)
    if (values is None) == (evaluation.failure is None):
        raise InvalidInput("an outcome has either values or a failure", field="values")
    if values is not None and len(values) != len(names):
        raise InvalidInput(f"{len(values)} values for {len(names)} objectives", field="values")
    if len(evaluation.errors) not in (0, len(names)):
        raise InvalidInput(f"{len(evaluation.errors)} errors for {len(names)} objectives", field="errors")
    if not all(math.isfinite(number) for number in (evaluation.violation, *evaluation.errors, *(values or ()))):
        raise InvalidInput("not all values are finite", field="values", remedy="record a failure")
    unknown = sorted(set(evaluation.items) - set(names))
    if unknown:
        raise InvalidInput(f"scores of unknown objectives: {', '.join(unknown)}", field="items")
    slopes = evaluation.slopes
    axes = int(np.abs(signs(job)).sum())
    if slopes is not None and (slopes.ndim != 4 or slopes.shape[:2] != (2, axes)):
        raise InvalidInput(f"slopes of shape {slopes.shape} for {axes} objectives", field="slopes")


def _names(job: JobRow) -> list[str]:
    return [objective["name"] for objective in job.objectives]


def _fill(candidate: CandidateRow, evaluation: Evaluation) -> None:
    failure = evaluation.failure
    candidate.state = "completed" if failure is None else "failed"
    candidate.values = None if evaluation.values is None else list(evaluation.values)
    candidate.errors = list(evaluation.errors) or None
    candidate.violation = evaluation.violation
    if evaluation.stopped is not None:
        candidate.items, candidate.stopped = evaluation.stopped, True
    candidate.failure = None if failure is None else {"code": failure.code, "message": failure.message}
    candidate.seconds = dict(evaluation.seconds)
    candidate.cost = evaluation.cost.to_json()
    candidate.worker = evaluation.worker
    candidate.finished_at = utc_now()


def _join_front(session: Session, job: JobRow, values: list[float]) -> bool:
    """Let a feasible candidate join the front if it may, and take out whom it dominates; return whether it joined."""
    front = session.execute(
        select(CandidateRow.index, CandidateRow.values).where(CandidateRow.job_id == job.id, CandidateRow.on_front)
    ).all()
    losses = np.array([row for _, row in front], dtype=np.float64).reshape(len(front), len(values)) * signs(job)
    joins, pushed_out = update_front(losses, np.array(values) * signs(job))
    if not joins:
        return False
    removed = [index for (index, _), out in zip(front, pushed_out, strict=True) if out]
    if removed:
        session.execute(
            update(CandidateRow)
            .where(CandidateRow.job_id == job.id, CandidateRow.index.in_(removed))
            .values(on_front=False)
            .execution_options(synchronize_session=False)
        )
    job.front += 1 - len(removed)
    return True


def _note_improvement(session: Session, job: JobRow, index: int, values: list[float]) -> None:
    """Keep the best value of each objective and the lowest mean loss, and where one improved: the progression curve."""
    best = [
        value if _better(objective, value, old) else old
        for objective, value, old in zip(job.objectives, values, job.best, strict=True)
    ]
    loss = mean_loss(job, values)
    lowest = loss if job.best_loss is None else min(loss, job.best_loss)
    if (best, lowest) != (job.best, job.best_loss):
        job.best, job.best_loss = list(best), lowest
        session.add(ImprovementRow(job_id=job.id, completed=job.completed, index=index, best=best, loss=lowest))


def _insert_items(session: Session, job: JobRow, evaluation: Evaluation) -> None:
    rows = [
        {
            "job_id": job.id,
            "index": evaluation.index,
            "objective": _names(job).index(name),
            "values": scores.values,
            "weights": scores.weights,
        }
        for name, scores in evaluation.items.items()
    ]
    if rows:
        session.execute(insert(ItemScoresRow), rows)


def _insert_slopes(session: Session, job: JobRow, evaluation: Evaluation) -> None:
    slopes = evaluation.slopes
    if slopes is not None:
        row = {"job_id": job.id, "index": evaluation.index, "shape": list(slopes.shape), "values": slopes}
        session.execute(insert(SlopesRow), row)


def _share(session: Session, job: JobRow, original: CandidateRow) -> None:
    """Give the outcome to the duplicates that waited for it, and make all of them sortable by value."""
    duplicates = session.scalars(
        update(CandidateRow)
        .where(CandidateRow.job_id == job.id, CandidateRow.duplicate_of == original.index)
        .values(shared(original))
        .returning(CandidateRow.index)
        .execution_options(synchronize_session=False)
    ).all()
    if original.values is not None and original.items is None:
        insert_values(session, job, dict.fromkeys((original.index, *duplicates), original.values))


def _evaluated(job: JobRow, candidate: CandidateRow) -> events.Event:
    data = {
        "index": candidate.index,
        "state": candidate.state,
        "values": candidate.values,
        "violation": candidate.violation,
        "on_front": candidate.on_front,
        "label": candidate.label,
        "partial": candidate.items,
        "stopped": candidate.stopped,
        "errors": candidate.errors,
        "progress": rendering.progress(job).model_dump(mode="json"),
    }
    return "candidate.evaluated", data
