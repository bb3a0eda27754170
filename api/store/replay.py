"""Reads a job's log for a controller that resumes it: as few objects and as little parsing as 100,000 candidates allow."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Text, and_, cast, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from api.store import verifications
from api.store.models import CandidateRow, JobRow, RecipeRow, SlopesRow
from optimizer.fitness.cost import FREE, Cost
from optimizer.fitness.racing import Rivals
from optimizer.ports import Candidate, Evaluation, Failure, JobLog
from optimizer.problem import Problem
from optimizer.spec import JobSpec

_Record = Sequence[Any]


class StoredRecipe(Mapping[str, Any]):
    """The recipe of an evaluated candidate, read when somebody looks at it: a controller that resumes hardly ever does.

    Pickles as a plain dict.

    Args:
        read: returns the recipe of an index.
        index: the candidate's.
    """

    __slots__ = ("_index", "_read", "_recipe")

    def __init__(self, read: Callable[[int], dict[str, Any]], index: int) -> None:
        self._read = read
        self._index = index
        self._recipe: dict[str, Any] | None = None

    @property
    def _data(self) -> dict[str, Any]:
        if self._recipe is None:
            self._recipe = self._read(self._index)
        return self._recipe

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._data,)

    def __repr__(self) -> str:
        return repr(self._data)


def read_log(session: Session, job: JobRow, read_recipe: Callable[[int], dict[str, Any]]) -> JobLog:
    """Return the job's log. Recipes still to be evaluated are plain dicts, the others come through ``read_recipe``."""
    with _no_garbage_collection():
        rows = _rows(session, job.id)
        return JobLog(
            spec=JobSpec.model_validate(job.spec),
            problem=None if job.problem is None else Problem.model_validate(job.problem | {"grams": job.grams}),
            candidates=_candidates(rows, _pending_recipes(session, job.id), read_recipe),
            evaluations=_evaluations(rows, _slopes(session, job.id)),
            elapsed_s=job.elapsed_s,
            verified=verifications.states(session, job.id),
            cost=Cost.of(job.cost),
            anchors=job.anchors,
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A million new objects that all stay: looking through them for garbage, again and again, takes half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _rows(session: Session, job_id: str) -> Sequence[_Record]:
    row = CandidateRow
    query = select(
        row.index,
        row.generation,
        row.told,
        row.origin,
        row.label,
        row.genome,
        row.fingerprint,
        row.duplicate_of,
        row.phase,
        row.items,
        row.slopes,
        _text(row.parents),
        row.state,
        row.violation,
        row.worker,
        row.recorded,
        _text(row.values),
        _text(row.failure),
        _text(row.seconds),
        _text(row.cost),
        row.stopped,
        _text(row.errors),
        _text(row.rivals),
        row.estimated,
    )
    # On the connection: the session would wrap every row once more.
    return session.connection().execute(query.where(row.job_id == job_id).order_by(row.index)).all()


def _candidates(
    rows: Sequence[_Record],
    pending: dict[int, dict[str, Any]],
    read_recipe: Callable[[int], dict[str, Any]],
) -> list[Candidate]:
    all_parents, all_rivals = (_parse([row[column] for row in rows]) for column in (11, 22))
    # Unpacked by position: looking up columns by name would take as long again.
    return [
        Candidate(
            index,
            generation,
            told,
            origin,
            label,
            genome,
            pending.get(index) or StoredRecipe(read_recipe, index),
            fingerprint,
            tuple(parents),
            duplicate_of,
            phase,
            None if stopped else items,
            slopes,
            estimated,
            None if rivals is None else Rivals.of(rivals),
        )
        for (
            index,
            generation,
            told,
            origin,
            label,
            genome,
            fingerprint,
            duplicate_of,
            phase,
            items,
            slopes,
            *_,
            stopped,
            _errors,
            _rivals,
            estimated,
        ), parents, rivals in zip(rows, all_parents, all_rivals, strict=True)
    ]


def _pending_recipes(session: Session, job_id: str) -> dict[int, dict[str, Any]]:
    rows = session.scalars(
        select(RecipeRow)
        .join(CandidateRow, and_(CandidateRow.job_id == RecipeRow.job_id, CandidateRow.index == RecipeRow.index))
        .where(CandidateRow.job_id == job_id, CandidateRow.state == "pending")
    )
    return {row.index: row.recipe for row in rows}


def _evaluations(rows: Sequence[_Record], slopes: Mapping[int, NDArray[np.float64]]) -> dict[int, Evaluation]:
    own = [row for row in rows if row[7] is None and row[12] in ("completed", "failed")]
    own.sort(key=lambda row: row[15] or 0)  # those from before there were numbers stay in front, by index
    parsed = [_parse([row[column] for row in own]) for column in (16, 17, 18, 19, 21)]
    return {
        row[0]: Evaluation(
            row[0],
            None if values is None else tuple(values),
            row[13],
            {},
            None if failure is None else Failure(**failure),
            seconds,
            row[14],
            slopes.get(row[0]),
            Cost(**cost) if cost else FREE,
            row[9] if row[20] else None,
            tuple(errors or ()),
        )
        for row, values, failure, seconds, cost, errors in zip(own, *parsed, strict=True)
    }


def _slopes(session: Session, job_id: str) -> dict[int, NDArray[np.float64]]:
    rows = session.execute(select(SlopesRow.index, SlopesRow.shape, SlopesRow.values).where(SlopesRow.job_id == job_id))
    return {index: values.reshape(shape) for index, shape, values in rows}


def _text(column: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    return cast(column, Text)


def _parse(texts: Sequence[str | None]) -> list[Any]:
    """Parse many small JSON texts in one go, several times faster than one by one."""
    parsed: list[Any] = json.loads(f"[{','.join(text or 'null' for text in texts)}]")
    return parsed
