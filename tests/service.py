"""Runs `mergeopt` processes for tests, as users run them, and kills them as preemption does."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from api.client import Client
from optimizer.errors import MergeoptError

T = TypeVar("T")
START_S = 120.0


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, condition: Callable[[], T | None], timeout_s: float = 120.0) -> T:
    """Return the first value of ``condition`` that is neither None nor False; fails the test after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value is not None and value is not False:
            return value
        time.sleep(0.02)
    raise AssertionError(f"timed out after {timeout_s:g} s: {what}")


class Process:
    """A `mergeopt` command in a session of its own.

    Args:
        arguments: e.g. ``["serve"]``.
        home: its MERGEOPT_HOME, where its log also goes.
        settings: other settings by name, without the prefix.
    """

    def __init__(self, arguments: list[str], home: Path, **settings: object) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / f"{arguments[0]}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MERGEOPT_")} | {
            f"MERGEOPT_{name.upper()}": str(value) for name, value in ({"home": home} | settings).items()
        }
        with self.log.open("ab") as stream:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "api", *arguments],
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL the whole session: nobody gets to tidy up."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.popen.terminate()
        try:
            self.popen.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()


class Service(Process):
    """`mergeopt serve` or `mergeopt api`, with a client for it."""

    def __init__(self, home: Path, root: Path, *arguments: str, **settings: object) -> None:
        self.port = free_port()
        super().__init__(list(arguments or ("serve",)), home, roots=root, port=self.port, **settings)
        self.client = Client(f"http://127.0.0.1:{self.port}")

    def kill(self) -> None:
        """SIGKILL it; the client goes too."""
        self.client.close()
        super().kill()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        super().__exit__(kind, error, trace)

    def wait_ready(self) -> Client:
        """Wait until it answers, and return the client."""

        def ready() -> bool:
            assert self.popen.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(MergeoptError):
                self.client.ready()
                return True
            return False

        until("the service is ready", ready, START_S)
        return self.client


@contextlib.contextmanager
def serving(home: Path, root: Path, **settings: object) -> Iterator[Client]:
    """Run `mergeopt serve` while the block runs."""
    with Service(home, root, **settings) as service:
        yield service.wait_ready()
