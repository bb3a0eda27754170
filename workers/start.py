"""Which kind of worker a job needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from optimizer.ports import Result, Task
from optimizer.problem import Problem
from optimizer.spec import JobSpec
from workers.endpoint_worker import EndpointWorker
from workers.merging.cache import Cache
from workers.roots import Roots
from workers.service_worker import ServiceWorker
from workers.worker import EvaluationWorker


class Worker(Protocol):
    """Evaluates the candidates of one job, one at a time."""

    def evaluate(self, task: Task, cancelled: Callable[[], bool] = ...) -> Result:
        """Return the per-item scores of a candidate, or why it has none.

        Raises:
            JobError: the job cannot go on.
            JobPaused: the job has to wait until somebody does something.
            RetryableError: the same task may succeed elsewhere or later.
        """


def start_worker(spec: JobSpec, problem: Problem, roots: Roots, name: str, cache: Cache | None = None) -> Worker:
    """Make the worker of a job; the arguments are those of `EvaluationWorker`."""
    if spec.parameters:
        return ServiceWorker(spec, problem, roots, name, cache)
    if spec.endpoint is not None:
        return EndpointWorker(spec, problem, roots, name)
    return EvaluationWorker(spec, problem, roots, name, cache=cache)
