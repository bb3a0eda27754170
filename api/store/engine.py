"""Database engines, and the two kinds of transactions every operation of the store runs in.

SQLite: WAL, so that readers and the writer do not block each other. A writing transaction takes the write lock when it
begins (BEGIN IMMEDIATE) and waits for it: one that began as a reader would fail with "database is locked" as soon as
another wrote first. ``synchronous`` is FULL: in WAL mode NORMAL survives a killed process but may lose the last commits
when the machine goes down, and a lost evaluation costs more than an fsync.

PostgreSQL: writers read committed rows and lock what they change; readers see one snapshot for all their queries.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from api.store.columns import UtcDateTime, utc_now
from optimizer.errors import InvalidInput, Unavailable

log = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 60.0
_WRITES = "mergeopt_writes"
_TO_JSON = partial(json.dumps, separators=(",", ":"), allow_nan=False)

CommitHook = Callable[[str], None]


def parse_url(url: str) -> URL:
    """Return the database URL with its driver filled in; raises `InvalidInput` if it is none we can use."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        # The text may hold a password: it is not repeated.
        raise _bad_url("this is no database URL") from None
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise _bad_url(f"{parsed.drivername} is not supported")
    if parsed.database in (None, "", ":memory:"):
        raise _bad_url("an SQLite database in memory cannot be shared and keeps nothing")
    return parsed


def _bad_url(message: str) -> InvalidInput:
    return InvalidInput(
        message, field="database", remedy="use sqlite:///path/to/file.db or postgresql://user@host/database"
    )


def make_engine(url: str, *, foreign_keys: bool = True) -> Engine:
    """Make an engine.

    Args:
        url: of SQLite (a file) or PostgreSQL.
        foreign_keys: whether SQLite enforces them; migrations rebuild tables, which must not cascade.

    Raises:
        InvalidInput: the URL cannot be used.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed, json_serializer=_TO_JSON, pool_pre_ping=True)
    engine = create_engine(parsed, json_serializer=_TO_JSON, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _connect(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN is deferred; ours is below
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_wal(connection: sqlite3.Connection) -> None:
    """Turn WAL on. Two who do so at once on a new file are in each other's way, and SQLite does not let them wait."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if _sqlite_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def writing(engine: Engine) -> Engine:
    """Return the engine for writing transactions; it shares the connections."""
    return engine.execution_options(**{_WRITES: True})


def reading(engine: Engine) -> Engine:
    """Return the engine for reading transactions; it shares the connections."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return engine


class Database:
    """Transactions on one database. Safe to share between threads; after a fork each process makes its own.

    Every operation raises `Unavailable` when the database cannot do it now (it is down, locked for too long, its disk
    fails). Nothing has changed then, except when the connection broke during the very commit: that may have taken place.

    Args:
        url: of SQLite (a file) or PostgreSQL.
        on_commit: called with ``"before:<operation>"`` and ``"after:<operation>"`` around each commit of a controller's
            operation; for crash tests. What it raises before the commit rolls back.
    """

    def __init__(self, url: str, on_commit: CommitHook | None = None) -> None:
        self.engine = make_engine(url)
        self._readers = reading(self.engine)
        self._writers = writing(self.engine)
        self._on_commit = on_commit

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that sees one state of the database and writes nothing."""
        with _own_errors(), Session(self._readers, autoflush=False) as session:
            yield session

    @contextmanager
    def write(self, operation: str | None = None) -> Iterator[Session]:
        """A transaction that commits at its end, or changes nothing when its body raises.

        Args:
            operation: of a controller, for the commit hook.
        """
        with _own_errors(), Session(self._writers, expire_on_commit=False) as session:
            yield session
            session.flush()
            self._notify("before", operation)
            session.commit()
        self._notify("after", operation)

    def now(self, session: Session) -> datetime:
        """Return the time that leases go by: the database's own where machines share it, as their clocks differ."""
        if self.engine.dialect.name == "sqlite":
            return utc_now()
        return session.execute(select(func.clock_timestamp(type_=UtcDateTime()))).scalar_one()

    def _notify(self, when: str, operation: str | None) -> None:
        if self._on_commit is not None and operation is not None:
            self._on_commit(f"{when}:{operation}")


def expiry(now: datetime, ttl_s: float) -> datetime:
    """Return when a lease taken now expires."""
    return now + timedelta(seconds=ttl_s)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Turn the errors that are not the program's own into ours.

    Numbers and texts that the database cannot hold (beyond 64 bits, a NUL) are the caller's mistake; an outage is nobody's.
    """
    try:
        yield
    except (DataError, OverflowError) as error:
        raise InvalidInput("a number or a text is outside of what the database can hold") from error
    except (DBAPIError, PoolTimeout) as error:
        if not _is_outage(error):
            raise
        # The driver's words are for the operator: they may name hosts and accounts, and SQLAlchemy adds the statement.
        log.warning("the database cannot be used: %s", " ".join(str(getattr(error, "orig", error)).split()))
        raise Unavailable(
            "the database cannot be used now", remedy="try again; the service's log has the cause"
        ) from error


def _is_outage(error: DBAPIError | PoolTimeout) -> bool:
    """Whether the same operation may succeed later."""
    if isinstance(error, PoolTimeout) or error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        # The driver has one class for most errors: only the code tells bad SQL and missing tables from the rest.
        return isinstance(error, OperationalError) and _sqlite_code(error.orig) != sqlite3.SQLITE_ERROR
    return isinstance(error, OperationalError | InterfaceError)


def _sqlite_code(error: sqlite3.Error) -> int:
    """Return the primary result code, which extended ones keep in their lowest byte; the driver's own errors have none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
