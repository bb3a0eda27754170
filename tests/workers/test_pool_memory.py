"""What a pool of this process leaves when it is closed: nothing, for a service runs one job after the other for weeks."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from optimizer.errors import JobError, WorkerLost
from optimizer.spec import JobSpec, parse_spec
from tests.jobs import write_job
from tests.workers.test_pool import drain, tasks
from workers.merging.resident import ResidentModels
from workers.pool import LocalPoolFactory
from workers.worker import EvaluationWorker


@contextmanager
def no_collections() -> Iterator[None]:
    """From here on let nothing go but what nobody refers to: a cycle counts as kept."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def use(root: Path, spec: JobSpec, fails: bool) -> None:
    """Evaluate something. Not in the test's own frame, which would hold the errors."""
    factory = LocalPoolFactory([root])
    problem = factory.prepare(spec)
    pool = factory.open(spec, problem)
    try:
        for task in tasks(spec, problem, 3):
            pool.submit(task)
        for result in drain(pool, 3).values():
            assert (result.failure is not None) == fails
    except JobError:
        time.sleep(0.5)  # so that the other worker's error has come too, and nobody takes it
    finally:
        pool.close()


@pytest.mark.parametrize("error", [None, WorkerLost, JobError])
def test_a_closed_pool_leaves_nothing_of_its_workers(
    error: type[Exception] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a job ends. To a collection of garbage, which comes late, gigabytes of models are a few small objects."""
    spec = parse_spec(write_job(tmp_path) | {"workers": {"count": 2}})
    workers: list[weakref.ref[EvaluationWorker]] = []
    start = EvaluationWorker.__init__

    def watched(self: EvaluationWorker, *args: Any, **options: Any) -> None:
        workers.append(weakref.ref(self))
        start(self, *args, **options)

    def broken(*_: Any) -> None:
        assert error is not None
        raise error("it cannot be merged") from ValueError("of a number")

    monkeypatch.setattr(EvaluationWorker, "__init__", watched)
    if error is not None:
        monkeypatch.setattr(ResidentModels, "apply", broken)
    use(tmp_path, spec, error is not None)  # libraries are imported now, and what that leaves is none of the pool's
    with no_collections():
        threads = threading.active_count()
        workers.clear()
        use(tmp_path, spec, error is not None)
        assert [worker() for worker in workers] == [None, None]
        deadline = time.monotonic() + 5  # threads that read ahead end when they notice
        while threading.active_count() > threads and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threading.active_count() <= threads
        mapped = Path("/proc/self/maps")
        assert not mapped.exists() or str(tmp_path / "models") not in mapped.read_text(encoding="utf-8")
