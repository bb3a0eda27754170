"""Reads a job's log for a controller that resumes it: as few objects and as little parsing as 100,000 candidates allow."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, Text, and_, cast, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from api.store.models import CandidateRow, JobRow, RecipeRow
from optimizer.ports import Candidate, Evaluation, Failure, JobLog
from optimizer.problem import Problem
from optimizer.spec import JobSpec


class StoredRecipe(Mapping[str, Any]):
    """A recipe whose JSON is parsed when somebody reads it: of a long log, hardly any is. Pickles as a plain dict.

    Args:
        text: the JSON.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self._text)
        return data

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __reduce__(self) -> tuple[Any, ...]:
        return json.loads, (self._text,)

    def __repr__(self) -> str:
        return self._text


def read_log(session: Session, job: JobRow) -> JobLog:
    """Return the job's log. Recipes that are still to be evaluated are plain dicts, the others `StoredRecipe`."""
    with _no_garbage_collection():
        return JobLog(
            spec=JobSpec.model_validate(job.spec),
            problem=None if job.problem is None else Problem.model_validate(job.problem),
            candidates=_candidates(session, job.id),
            evaluations=_evaluations(session, job.id),
            elapsed_s=job.elapsed_s,
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


def _candidates(session: Session, job_id: str) -> list[Candidate]:
    row, heavy = CandidateRow, RecipeRow
    # On the connection: the session would wrap every row once more.
    rows = (
        session.connection()
        .execute(
            select(
                row.index,
                row.generation,
                row.told,
                row.origin,
                row.label,
                heavy.genome,
                _text(heavy.recipe),
                row.fingerprint,
                _text(row.parents),
                row.duplicate_of,
                row.state,
            )
            .join(heavy, and_(heavy.job_id == row.job_id, heavy.index == row.index))
            .where(row.job_id == job_id)
            .order_by(row.index)
        )
        .all()
    )
    all_parents = _parse([parents for *_, parents, _, _ in rows])
    return [
        Candidate(
            index,
            generation,
            told,
            origin,
            label,
            genome,
            json.loads(recipe) if state == "pending" else StoredRecipe(recipe),
            fingerprint,
            tuple(parents),
            duplicate_of,
        )
        for (
            index,
            generation,
            told,
            origin,
            label,
            genome,
            recipe,
            fingerprint,
            _,
            duplicate_of,
            state,
        ), parents in zip(rows, all_parents, strict=True)
    ]


def _evaluations(session: Session, job_id: str) -> dict[int, Evaluation]:
    row = CandidateRow
    rows = (
        session.connection()
        .execute(
            select(row.index, _text(row.values), row.violation, _text(row.failure), _text(row.seconds), row.worker)
            .where(row.job_id == job_id, row.state.in_(("completed", "failed")), row.duplicate_of.is_(None))
            .order_by(row.index)
        )
        .all()
    )
    values, failures, seconds = (_parse([record[column] for record in rows]) for column in (1, 3, 4))
    return {
        record[0]: Evaluation(
            record[0],
            None if numbers is None else tuple(numbers),
            record[2],
            {},
            None if failure is None else Failure(**failure),
            taken,
            record[5],
        )
        for record, numbers, failure, taken in zip(rows, values, failures, seconds, strict=True)
    }


def _text(column: InstrumentedAttribute[Any]) -> ColumnElement[Any]:
    return cast(column, Text)


def _parse(texts: Sequence[str | None]) -> list[Any]:
    """Parse many small JSON texts in one go, several times faster than one by one."""
    parsed: list[Any] = json.loads(f"[{','.join(text or 'null' for text in texts)}]")
    return parsed
