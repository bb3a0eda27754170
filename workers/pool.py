"""Evaluation pools: in this process, or as actors of a Ray cluster.

Both give each task back exactly once. Ray is disposable: nothing is kept in its object store but a job's spec, and an
actor that dies takes with it only the evaluation it was at.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from optimizer.errors import EvaluationTimeout, JobError, MergeoptError, RetryableError, WorkerLost
from optimizer.ports import EvaluationPool, Failure, Result, Task
from optimizer.problem import Problem
from optimizer.spec import JobSpec, Workers
from workers.merging.cache import Cache
from workers.policy import Policy
from workers.prepare import prepare
from workers.roots import NOTHING, Roots
from workers.start import Worker, start_worker
from workers.system import give_back

log = logging.getLogger(__name__)


def _given_up(task: Task, attempts: int, error: MergeoptError) -> Result:
    return Result(task.index, failure=Failure(error.code, f"{error} in each of {attempts} attempts"))


def _too_long(limit_s: float) -> EvaluationTimeout:
    return EvaluationTimeout(f"the evaluation took longer than {limit_s:g} s")


# --- in this process --------------------------------------------------------------------------------------------------


class LocalPoolFactory:
    """Pools of threads in this process, one worker each; for tests, debugging and `mergeopt run --pool local`.

    Workers share the process, so one that crashes takes the service with it; `RayPoolFactory` does not.

    Args:
        roots: directories that checkpoints and data may be in.
        cache: where what operators prepare is kept; in memory by default.
        policy: what else jobs may do.
    """

    def __init__(self, roots: Sequence[Path], cache: Cache | None = None, policy: Policy = NOTHING) -> None:
        self._roots = Roots(roots, policy)
        self._cache = cache

    def prepare(self, spec: JobSpec) -> Problem:
        """See `optimizer.ports.PoolFactory`."""
        return prepare(spec, self._roots)

    def open(self, spec: JobSpec, problem: Problem) -> EvaluationPool:
        """See `optimizer.ports.PoolFactory`."""
        return LocalPool(spec, problem, self._roots, self._cache)

    def close(self) -> None:
        """See `optimizer.ports.PoolFactory`."""


class LocalPool:
    """One thread for each worker, fed from one queue."""

    def __init__(self, spec: JobSpec, problem: Problem, roots: Roots, cache: Cache | None = None) -> None:
        self._cache = cache
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result | Exception] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._timeout_s = spec.workers.timeout_s
        self._attempts = spec.workers.attempts
        self._threads = [
            threading.Thread(
                target=self._work, args=(spec, problem, roots, f"local-{number}"), name=f"worker-{number}", daemon=True
            )
            for number in range(min(spec.workers.count, spec.in_flight))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> None:
        """See `optimizer.ports.EvaluationPool`."""
        self._tasks.put(task)

    def wait(self, timeout_s: float) -> list[Result]:
        """See `optimizer.ports.EvaluationPool`."""
        out: list[Result] = []
        with contextlib.suppress(queue.Empty):
            found = self._results.get(timeout=timeout_s) if timeout_s > 0 else self._results.get_nowait()
            while not isinstance(found, Exception):
                out.append(found)
                found = self._results.get_nowait()
            if not out:
                try:
                    raise found
                finally:
                    del found  # it holds this frame, so this frame must not hold it: the worker's models stay with it
            self._results.put(found)  # what is done is handed over first
        return out

    def withdraw(self) -> list[int]:
        """See `optimizer.ports.EvaluationPool`."""
        out = []
        with contextlib.suppress(queue.Empty):
            while (task := self._tasks.get_nowait()) is not None:
                out.append(task.index)
        return out

    def close(self) -> None:
        """See `optimizer.ports.EvaluationPool`."""
        self._closed.set()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        self._results = queue.SimpleQueue()  # an error that nobody took holds its worker's frame, and that this pool
        give_back()

    def _work(self, spec: JobSpec, problem: Problem, roots: Roots, name: str) -> None:
        try:
            worker = start_worker(spec, problem, roots, name, self._cache)
            while not self._closed.is_set() and (task := self._tasks.get()) is not None:
                self._results.put(self._attempt(worker, task))
        except Exception as error:  # noqa: BLE001 - handed to whoever waits
            self._results.put(error)

    def _attempt(self, worker: Worker, task: Task) -> Result:
        """Evaluate a task, again if it took too long; a thread cannot be killed, so evaluators look at the clock."""
        given_up = _given_up(task, self._attempts, WorkerLost("the pool was closed"))
        for _ in range(self._attempts):
            deadline = time.monotonic() + self._timeout_s
            try:
                return worker.evaluate(task, partial(self._overdue, deadline))
            except RetryableError as error:
                # Its text, not the error itself: that holds this frame, and would keep the worker with it.
                late = time.monotonic() >= deadline
                given_up = _given_up(task, self._attempts, _too_long(self._timeout_s) if late else error)
                if self._closed.is_set():
                    break
        return given_up

    def _overdue(self, deadline: float) -> bool:
        return self._closed.is_set() or time.monotonic() > deadline


# --- on a Ray cluster -------------------------------------------------------------------------------------------------


class RayPoolFactory:
    """Pools of Ray actors on a local Ray that this process starts, or on a cluster given by its address.

    Args:
        roots: directories that checkpoints and data may be in, the same on every node.
        address: of the cluster (``"auto"``, ``"10.0.0.1:6379"``, ``"ray://…"``); None starts a local Ray.
        start_timeout_s: how long to wait for the first worker of a job, e.g. for an autoscaler to add nodes.
        cache: where each node keeps what operators prepare; in each worker's memory by default.
        policy: what else jobs may do.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        address: str | None = None,
        start_timeout_s: float = 900.0,
        cache: Cache | None = None,
        policy: Policy = NOTHING,
    ) -> None:
        self._roots = Roots(roots, policy)
        self._address = address
        self._start_timeout_s = start_timeout_s
        self._cache = cache
        self._lock = threading.Lock()

    def prepare(self, spec: JobSpec) -> Problem:
        """See `optimizer.ports.PoolFactory`."""
        self._connect()  # first: while a cluster cannot be reached nothing is worth hashing gigabytes
        return prepare(spec, self._roots)

    def open(self, spec: JobSpec, problem: Problem) -> EvaluationPool:
        """See `optimizer.ports.PoolFactory`."""
        if self._address is None:
            _check_fits(spec.workers)
        return RayPool(spec, problem, self._roots, self._start_timeout_s, self._cache)

    def close(self) -> None:
        """Disconnect, and stop the local Ray if there is one."""
        with self._lock:
            if ray.is_initialized():
                ray.shutdown()

    def _connect(self) -> None:
        with self._lock:
            if ray.is_initialized():
                return
            try:
                # A dead cluster leaves an address file behind; "local" never looks at it.
                ray.init(
                    address=self._address or "local",
                    namespace="mergeopt",
                    include_dashboard=False if self._address is None else None,
                    log_to_driver=False,
                    configure_logging=False,
                )
            except ConnectionError as error:
                raise WorkerLost(f"the Ray cluster at {self._address} cannot be reached") from error


def _check_fits(workers: Workers) -> None:
    """A local Ray gets no more nodes: say at once what can never start."""
    have = ray.cluster_resources()
    wanted = {"CPU": workers.cpus, "GPU": workers.gpus, "memory": (workers.memory_gb or 0) * 2**30}
    for resource, amount in wanted.items():
        if amount > have.get(resource, 0.0):
            unit = f"{amount / 2**30:g} GiB" if resource == "memory" else f"{amount:g}"
            raise JobError(
                f"a worker asks for {unit} {resource}, this machine has {have.get(resource, 0.0):g}",
                field="workers",
                remedy="ask for less, or give the controller a cluster with `ray_address`",
            )


@dataclass
class _Slot:
    """One actor, and what it is doing."""

    number: int
    actor: Any
    ref: Any  # the call under way: loading, or an evaluation
    task: Task | None = None
    loading: bool = True
    since: float = 0.0


class RayPool:
    """One actor for each worker; a task goes to an idle actor, and again to another if that one dies."""

    def __init__(
        self,
        spec: JobSpec,
        problem: Problem,
        roots: Roots,
        start_timeout_s: float,
        cache: Cache | None = None,
    ) -> None:
        self._spec = spec
        self._inputs = ray.put((spec.model_dump_json(), problem.model_dump_json(), roots, cache))
        self._start_timeout_s = start_timeout_s
        self._waiting: deque[Task] = deque()
        self._attempts: Counter[int] = Counter()
        self._ever_ready = False
        self._opened = time.monotonic()
        self._deaths_while_loading = 0
        self._fatal: MergeoptError | None = None
        count = min(spec.workers.count, spec.in_flight)
        self._slots = [self._start(number) for number in range(count)]

    def submit(self, task: Task) -> None:
        """See `optimizer.ports.EvaluationPool`."""
        self._waiting.append(task)
        self._assign()

    def wait(self, timeout_s: float) -> list[Result]:
        """See `optimizer.ports.EvaluationPool`."""
        self._assign()
        busy = [slot for slot in self._slots if slot.ref is not None]
        ready, _ = ray.wait([slot.ref for slot in busy], num_returns=1, timeout=timeout_s) if busy else ([], [])
        if not busy:
            time.sleep(timeout_s)
        if ready:
            ready, _ = ray.wait([slot.ref for slot in busy], num_returns=len(busy), timeout=0)
        done = set(ready)
        results = [result for slot in busy if slot.ref in done for result in self._collect(slot)]
        results += [result for slot in list(self._slots) for result in self._enforce_timeout(slot)]
        if self._fatal is not None and not results:  # what is done is handed over first
            raise self._fatal
        self._check_started()
        self._assign()
        return results

    def withdraw(self) -> list[int]:
        """See `optimizer.ports.EvaluationPool`."""
        out = [task.index for task in self._waiting]
        self._waiting.clear()
        return out

    def close(self) -> None:
        """See `optimizer.ports.EvaluationPool`."""
        self._waiting.clear()
        for slot in self._slots:
            _kill(slot.actor)

    def _start(self, number: int) -> _Slot:
        workers = self._spec.workers
        actor = _EvaluationActor.options(  # type: ignore[attr-defined]
            num_cpus=workers.cpus,
            num_gpus=workers.gpus,
            memory=None if workers.memory_gb is None else int(workers.memory_gb * 2**30),
            max_restarts=0,
        ).remote()
        return _Slot(number, actor, actor.load.remote(self._inputs, f"ray-{number}"), since=time.monotonic())

    def _assign(self) -> None:
        for slot in self._slots:
            if slot.ref is None and self._waiting:
                slot.task = self._waiting.popleft()
                slot.ref = slot.actor.evaluate.remote(slot.task)
                slot.since = time.monotonic()

    def _collect(self, slot: _Slot) -> list[Result]:
        """Take what a finished call brought, and free its slot."""
        try:
            found = ray.get(slot.ref, timeout=10)
        except RayTaskError as error:
            return self._failed(slot, error)
        except RayError as error:
            log.warning("worker %d was lost: %s", slot.number, str(error).splitlines()[0])
            return self._lost(slot, WorkerLost("the worker died"))
        slot.ref, slot.task = None, None
        if slot.loading:
            slot.loading, self._ever_ready, self._deaths_while_loading = False, True, 0
            return []
        return [found]

    def _failed(self, slot: _Slot, error: RayTaskError) -> list[Result]:
        """The worker raised: what concerns the job ends it, what may be mended is tried again."""
        cause = error.cause
        if isinstance(cause, WorkerLost) or (slot.loading and isinstance(cause, RetryableError)):
            return self._lost(slot, cause)
        task, slot.task, slot.ref = slot.task, None, None
        if isinstance(cause, RetryableError):
            return self._again(task, cause)
        if self._fatal is None:
            unexpected = JobError(f"a worker could not load the job: {type(cause).__name__}: {cause}")
            self._fatal = cause if isinstance(cause, MergeoptError) else unexpected
        return []

    def _lost(self, slot: _Slot, error: RetryableError) -> list[Result]:
        _kill(slot.actor)
        if slot.loading:
            self._deaths_while_loading += 1
            if self._deaths_while_loading > self._spec.workers.attempts * len(self._slots):
                raise JobError(
                    "workers die while they load the models",
                    field="workers",
                    remedy="they may need more memory: see the Ray logs of the node",
                )
        self._slots[self._slots.index(slot)] = self._start(slot.number)
        return self._again(slot.task, error)

    def _again(self, task: Task | None, error: RetryableError) -> list[Result]:
        if task is None:
            return []
        self._attempts[task.index] += 1
        if self._attempts[task.index] >= self._spec.workers.attempts:
            return [_given_up(task, self._attempts.pop(task.index), error)]
        self._waiting.appendleft(task)
        return []

    def _enforce_timeout(self, slot: _Slot) -> list[Result]:
        limit = self._spec.workers.timeout_s
        if slot.task is None or slot.ref is None or time.monotonic() - slot.since < limit:
            return []
        return self._lost(slot, _too_long(limit))

    def _check_started(self) -> None:
        if not self._ever_ready and time.monotonic() - self._opened > self._start_timeout_s:
            raise JobError(
                f"no worker started within {self._start_timeout_s:g} s; the cluster has {ray.cluster_resources()}",
                field="workers",
                remedy="ask for less, or add nodes that have it",
            )


def _kill(actor: Any) -> None:
    try:
        ray.kill(actor, no_restart=True)
    except (RayError, ValueError):
        log.debug("an actor was gone already", exc_info=True)


@ray.remote
class _EvaluationActor:
    """A worker in a process of its own. `load` is a call, so that its errors arrive as they are."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def load(self, inputs: tuple[str, str, Roots, Cache | None], name: str) -> None:
        """Load the models and the items of a job."""
        spec, problem, roots, cache = inputs
        self._worker = start_worker(
            JobSpec.model_validate_json(spec),
            Problem.model_validate_json(problem),
            roots,
            f"{name}@{socket.gethostname()}:{os.getpid()}",
            cache,
        )

    def evaluate(self, task: Task) -> Result:
        """Evaluate one candidate."""
        if self._worker is None:
            raise WorkerLost("the worker has not loaded the job")
        return self._worker.evaluate(task)
