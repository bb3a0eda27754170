"""One life of a controller, in a process of its own that may kill itself at a chosen commit boundary.

The fork server imports this module once, so each life begins with everything loaded.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from api.store.sql import SqlStore
from optimizer.controller import Controller, ControllerConfig
from optimizer.ports import EvaluationPool, Result, Task
from optimizer.problem import Problem
from optimizer.spec import JobSpec
from workers.pool import LocalPoolFactory

LEASE_TTL_S = 0.6


class Boundaries:
    """Counts commit boundaries, writes down each, and kills the process at the chosen one."""

    def __init__(self, kill_at: int | None, log: Path) -> None:
        self.count = 0
        self.kill_at = kill_at
        self.log = log

    def __call__(self, name: str) -> None:
        if "renew" in name:  # these follow the clock, not the search
            return
        self.count += 1
        append(self.log, name)
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class RecordingPools(LocalPoolFactory):
    """The real pool; which candidates were handed to it is written down before it happens, as -1, -2, … to be verified."""

    def __init__(self, root: Path, log: Path) -> None:
        super().__init__([root])
        self.log = log

    def open(self, spec: JobSpec, problem: Problem) -> EvaluationPool:
        return _Recording(super().open(spec, problem), self.log)


class _Recording:
    def __init__(self, pool: EvaluationPool, log: Path) -> None:
        self._pool, self._log = pool, log

    def submit(self, task: Task) -> None:
        append(self._log, str(-task.index - 1 if task.test else task.index))
        self._pool.submit(task)

    def wait(self, timeout_s: float) -> list[Result]:
        return self._pool.wait(timeout_s)

    def withdraw(self) -> list[int]:
        return self._pool.withdraw()

    def close(self) -> None:
        self._pool.close()


def append(path: Path, line: str) -> None:
    """Append a line with one write, so that a kill leaves whole lines."""
    with path.open("ab", buffering=0) as stream:
        stream.write(f"{line}\n".encode())


def live(url: str, root: Path, kill_at: int | None, boundaries: Path, submitted: Path) -> None:
    """Claim the job as soon as its last holder's lease is over, and run it to its end or to the kill."""
    torch.set_num_threads(1)
    store = SqlStore(url, on_commit=Boundaries(kill_at, boundaries))
    controller = Controller(
        store, RecordingPools(root, submitted), ControllerConfig(f"life-{os.getpid()}", LEASE_TTL_S, poll_s=0.02)
    )
    while not controller.run_next():
        controller._stop.wait(0.02)
