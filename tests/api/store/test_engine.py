"""How databases are opened."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import text

from api.store.columns import FloatArray, UtcDateTime
from api.store.engine import make_engine, parse_url
from api.store.sql import SqlStore
from optimizer.errors import InvalidInput


@pytest.mark.parametrize(
    ("url", "drivername"),
    [
        ("postgresql://u@h/db", "postgresql+psycopg"),
        ("postgres://u@h/db", "postgresql+psycopg"),
        ("postgresql+psycopg://u@h/db", "postgresql+psycopg"),
        ("sqlite:///file.db", "sqlite"),
    ],
)
def test_urls(url: str, drivername: str) -> None:
    assert parse_url(url).drivername == drivername


@pytest.mark.parametrize("url", ["", "file.db", "mysql://u:secret@h/db", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        SqlStore(url)
    assert caught.value.field == "database"
    assert "secret" not in str(caught.value)


def test_sqlite_settings(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/file.db")
    with engine.connect() as connection:
        found = {name: connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "foreign_keys")}
        waits = int(connection.scalar(text("PRAGMA busy_timeout")) or 0)
        synchronous = connection.scalar(text("PRAGMA synchronous"))
    engine.dispose()
    assert found == {"journal_mode": "wal", "foreign_keys": 1}
    assert waits >= 30_000
    assert synchronous == 2


def test_a_reader_cannot_write_on_postgres(postgres_url: str) -> None:
    store = SqlStore(postgres_url)
    with pytest.raises(Exception, match="read-only"), store.read() as session:
        session.execute(text("DELETE FROM jobs"))
    store.close()


def test_column_types_refuse_and_convert() -> None:
    dialect = make_engine("sqlite:///x.db").dialect
    with pytest.raises(ValueError, match="no time zone"):
        UtcDateTime().process_bind_param(datetime(2026, 1, 1), dialect)
    stored = UtcDateTime().process_result_value(datetime(2026, 1, 1), dialect)
    assert stored == datetime(2026, 1, 1, tzinfo=UTC)
    assert FloatArray(32).process_result_value(b"\x00\x00\x80\x3f", dialect) == [1.0]


_WRITE_AND_DIE = """
import os, sys
from api.store.sql import SqlStore
from tests.api.store.helpers import propose, scored, started
def die(boundary):
    if boundary == "after:add_evaluation":
        os.kill(os.getpid(), 9)
store = SqlStore(sys.argv[1], on_commit=die)
lease = started(store)
propose(store, lease, 1)
store.add_evaluation(lease, scored(0, [0.5, 0.5]))
"""


def test_what_is_committed_survives_sigkill(database_url: str) -> None:
    died = subprocess.run([sys.executable, "-c", _WRITE_AND_DIE, database_url], check=False)
    assert died.returncode == -signal.SIGKILL
    store = SqlStore(database_url)
    (job,) = store.list_jobs().items
    assert (job.progress.completed, job.progress.front, job.best) == (1, 1, [0.5, 0.5])
    assert store.events(job.id, 0)[-1].type == "candidate.evaluated"
    store.close()
