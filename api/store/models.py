"""The tables of the run store.

Every row belongs to a job and goes with it: children refer to the job alone, so that deleting a job of 100,000
candidates is one statement a table. What pages and plots read is narrow (`CandidateRow`); what only one candidate's
page or a resuming controller reads stands apart (`RecipeRow`, `ItemScoresRow`, `SlopesRow`).

Three things are kept twice, because they are read far more often than written, always in the transaction of the outcome
they come from: counters and best values on the job, objective values as rows of their own (sorting by any objective),
and the points where a best value improved (the progression curve).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Text,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from api.store.columns import FloatArray, RowId, UtcDateTime
from api.views import CandidateState, ExportState, VerificationState
from optimizer.ports import JobState, Origin, Request

Json = JSON(none_as_null=True)
ID_LENGTH = 32


class Base(DeclarativeBase):
    """Base of all tables; every constraint and index has a name that migrations can refer to."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        float: Double,
        dict[str, Any]: Json,
        dict[str, str]: Json,
        dict[str, float]: Json,
        list[int]: Json,
        list[float]: Json,
        list[str]: Json,
        list[float | None]: Json,
        list[dict[str, Any]]: Json,
    }


def _one_of(column: str, values: Any) -> CheckConstraint:
    allowed = ", ".join(f"'{value}'" for value in get_args(values))
    return CheckConstraint(f"{column} IN ({allowed})", name=column)


def _job_key(*, primary_key: bool = True) -> Mapped[str]:
    return mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=primary_key)


class JobRow(Base):
    """A job: what the user submitted, where it stands, and who runs it.

    ``lease_token`` only grows; a lease is held while ``lease_owner`` is set, live until ``lease_expires_at``.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        _one_of("state", JobState),
        _one_of("requested", Request),
        Index(None, "created_at", "id"),
        Index(None, "state", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    state: Mapped[JobState] = mapped_column(String(16))
    requested: Mapped[Request] = mapped_column(String(16))
    reason: Mapped[str | None] = mapped_column(Text)
    algorithm: Mapped[str] = mapped_column(Text)
    operator: Mapped[str] = mapped_column(Text)
    # What lists show of the objectives; metric and direction are null until the job was prepared.
    objectives: Mapped[list[dict[str, Any]]]
    spec: Mapped[dict[str, Any]] = mapped_column(deferred=True)
    # The inputs as found; their inner products stand apart, megabytes that only searches read.
    problem: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)
    grams: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)

    # Which items stand for all, where candidates are estimated from them: `optimizer.estimating`.
    anchors: Mapped[dict[str, Any] | None] = mapped_column(deferred=True)

    budget: Mapped[int] = mapped_column(Integer)
    proposed: Mapped[int] = mapped_column(Integer, default=0)
    completed: Mapped[int] = mapped_column(Integer, default=0)
    failed: Mapped[int] = mapped_column(Integer, default=0)
    duplicates: Mapped[int] = mapped_column(Integer, default=0)
    front: Mapped[int] = mapped_column(Integer, default=0)
    best: Mapped[list[float | None]]
    best_loss: Mapped[float | None]
    elapsed_s: Mapped[float] = mapped_column(default=0.0)
    cost: Mapped[dict[str, float] | None] = mapped_column(default=dict)  # null before migration 0004
    to_verify: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    verified: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))

    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    cloned_from: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"), index=True)
    idempotency_key: Mapped[str | None] = mapped_column(Text, unique=True)

    lease_owner: Mapped[str | None] = mapped_column(Text)
    lease_token: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_expires_at: Mapped[datetime | None]


class CandidateRow(Base):
    """A proposal and its outcome, as tables and plots show it. A duplicate's outcome is a copy of its original's."""

    __tablename__ = "candidates"
    __table_args__ = (
        _one_of("state", CandidateState),
        _one_of("origin", Origin),
        Index(
            "ix_candidates_front",
            "job_id",
            "index",
            sqlite_where=text("on_front = 1"),
            postgresql_where=text("on_front"),
        ),
        Index(
            "ix_candidates_baselines",
            "job_id",
            "index",
            sqlite_where=text("origin != 'algorithm' OR label IS NOT NULL"),
            postgresql_where=text("origin != 'algorithm' OR label IS NOT NULL"),
        ),
        Index(
            "ix_candidates_duplicates",
            "job_id",
            "duplicate_of",
            sqlite_where=text("duplicate_of IS NOT NULL"),
            postgresql_where=text("duplicate_of IS NOT NULL"),
        ),
        Index(
            "ix_candidates_partial",
            "job_id",
            "index",
            sqlite_where=text("items IS NOT NULL"),
            postgresql_where=text("items IS NOT NULL"),
        ),
    )

    job_id: Mapped[str] = _job_key()
    index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    generation: Mapped[int] = mapped_column(Integer)
    told: Mapped[int] = mapped_column(Integer)
    origin: Mapped[Origin] = mapped_column(String(16))
    label: Mapped[str | None] = mapped_column(Text)
    fingerprint: Mapped[str] = mapped_column(String(64))
    parents: Mapped[list[int]]
    genome: Mapped[NDArray[np.float64] | None] = mapped_column(FloatArray(64), deferred=True)
    duplicate_of: Mapped[int | None] = mapped_column(Integer)
    phase: Mapped[int] = mapped_column(SmallInteger, default=0, server_default=text("0"))
    estimated: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    # How many items it was to be measured on, or after how many it was stopped, in which case `stopped` is set.
    items: Mapped[int | None] = mapped_column(Integer)
    slopes: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    rivals: Mapped[dict[str, Any] | None]  # `optimizer.fitness.racing.Rivals`
    created_at: Mapped[datetime]

    state: Mapped[CandidateState] = mapped_column(String(16), default="pending")
    values: Mapped[list[float] | None]
    stopped: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    errors: Mapped[list[float] | None]  # standard errors of the values, where these are estimates
    violation: Mapped[float] = mapped_column(default=0.0)
    on_front: Mapped[bool] = mapped_column(default=False)
    failure: Mapped[dict[str, str] | None]
    seconds: Mapped[dict[str, float]] = mapped_column(default=dict)
    cost: Mapped[dict[str, float] | None] = mapped_column(default=dict)  # null before migration 0004
    worker: Mapped[str] = mapped_column(Text, default="")
    finished_at: Mapped[datetime | None]
    # Number of the outcome in the job, from 1, in the order of recording; null before there is one, for duplicates, and
    # for what was recorded before migration 0003.
    recorded: Mapped[int | None] = mapped_column(Integer)


class RecipeRow(Base):
    """A candidate's recipe, kilobytes that only its own page, its evaluation and its export read."""

    __tablename__ = "recipes"

    job_id: Mapped[str] = _job_key()
    index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    recipe: Mapped[dict[str, Any]]


class ObjectiveValueRow(Base):
    """One objective's value of a candidate measured on all items, also of a duplicate: what sorting by value walks along."""

    __tablename__ = "objective_values"
    __table_args__ = (Index("ix_objective_values_sorted", "job_id", "objective", "value", "index"),)

    job_id: Mapped[str] = _job_key()
    objective: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    value: Mapped[float]


class ItemScoresRow(Base):
    """Per-item scores of one objective of a candidate, float32."""

    __tablename__ = "item_scores"

    job_id: Mapped[str] = _job_key()
    index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    objective: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    values: Mapped[NDArray[np.float32]] = mapped_column(FloatArray(32))
    weights: Mapped[NDArray[np.float32] | None] = mapped_column(FloatArray(32))


class VerificationRow(Base):
    """What a candidate came to on all search items and on the test items; ``place`` is its number in the job's order."""

    __tablename__ = "verifications"
    __table_args__ = (_one_of("state", VerificationState),)

    job_id: Mapped[str] = _job_key()
    index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    place: Mapped[int] = mapped_column(Integer)
    state: Mapped[VerificationState] = mapped_column(String(16))
    # By objective: value, low, high and number of items.
    search: Mapped[dict[str, Any]]
    test: Mapped[dict[str, Any]]
    overfitted: Mapped[list[str]]
    failure: Mapped[dict[str, str] | None]
    seconds: Mapped[dict[str, float]]
    cost: Mapped[dict[str, float]]
    worker: Mapped[str] = mapped_column(Text)
    finished_at: Mapped[datetime | None]


class TestScoresRow(Base):
    """Per-item scores of one objective's test items for a verified candidate, float32."""

    __test__ = False  # no test class, whatever pytest makes of the name
    __tablename__ = "test_scores"

    job_id: Mapped[str] = _job_key()
    index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    objective: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    values: Mapped[NDArray[np.float32]] = mapped_column(FloatArray(32))
    weights: Mapped[NDArray[np.float32] | None] = mapped_column(FloatArray(32))


class ItemListRow(Base):
    """Which items a job's remembered scores are of, 16 bytes each: most rows share one of a few lists."""

    __tablename__ = "item_lists"

    job_id: Mapped[str] = _job_key()
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    items: Mapped[bytes] = mapped_column(LargeBinary)


class RememberedRow(Base):
    """Scores of items under one merge, for whatever candidate or job asks the same; see `optimizer.ports.Remembered`."""

    __tablename__ = "remembered_scores"

    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    measure: Mapped[str] = mapped_column(String(64), primary_key=True)
    item_list: Mapped[str] = mapped_column(String(64), primary_key=True)
    # Who paid for it: it is forgotten with that job.
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    values: Mapped[NDArray[np.float32]] = mapped_column(FloatArray(32))
    weights: Mapped[NDArray[np.float32] | None] = mapped_column(FloatArray(32))


class SlopesRow(Base):
    """How a candidate's objectives change with the weights, see `optimizer.algorithms.Outcome.slopes`."""

    __tablename__ = "slopes"

    job_id: Mapped[str] = _job_key()
    index: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    shape: Mapped[list[int]]
    values: Mapped[NDArray[np.float64]] = mapped_column(FloatArray(64))


class ImprovementRow(Base):
    """The best values after the ``completed``-th score, at which one of them or the weighted mean loss improved."""

    __tablename__ = "improvements"

    job_id: Mapped[str] = _job_key()
    completed: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    index: Mapped[int] = mapped_column(Integer)
    best: Mapped[list[float]]
    loss: Mapped[float]


class EnqueuedRow(Base):
    """A candidate that a user enqueued; ``number`` counts from 1 in each job."""

    __tablename__ = "enqueued_candidates"
    __table_args__ = (CheckConstraint("state IN ('waiting', 'taken', 'rejected')", name="state"),)

    job_id: Mapped[str] = _job_key()
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    candidate: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16), default="waiting")
    failure: Mapped[dict[str, str] | None]
    created_at: Mapped[datetime]


class EventRow(Base):
    """Something that happened in a job. Ids become visible in their order, see `api.store.events`."""

    __tablename__ = "events"
    # AUTOINCREMENT: without it SQLite gives the ids of deleted rows again, and readers would miss the new ones.
    __table_args__ = (Index(None, "job_id", "id"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = _job_key(primary_key=False)
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class ExportRow(Base):
    """An export of a candidate; claimed by a worker with a lease of its own, as jobs are by controllers."""

    __tablename__ = "exports"
    __table_args__ = (
        _one_of("state", ExportState),
        Index(None, "job_id", "created_at", "id"),
        Index(None, "state", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    job_id: Mapped[str] = _job_key(primary_key=False)
    candidate: Mapped[int] = mapped_column(Integer)
    head: Mapped[str | None] = mapped_column(Text)
    options: Mapped[dict[str, Any] | None]  # `api.views.ExportOptions`; null: its defaults
    state: Mapped[ExportState] = mapped_column(String(16), default="queued")
    progress: Mapped[float] = mapped_column(default=0.0)
    path: Mapped[str | None] = mapped_column(Text)
    error: Mapped[dict[str, str] | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    lease_owner: Mapped[str | None] = mapped_column(Text)
    lease_token: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_expires_at: Mapped[datetime | None]


class TokenRow(Base):
    """An access token; of its secret only the SHA-256 is kept."""

    __tablename__ = "tokens"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
