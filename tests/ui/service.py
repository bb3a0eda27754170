"""The real service for the browser: FastAPI app, uvicorn, SQLite store and controller; only the models are missing.

Candidates are scored by a formula on their coefficients instead of by merging checkpoints, and only as fast as the test
allows, so that a test can look at the page before and after each evaluation.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import migrations
from api.app import create_app
from api.server import make_server
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import JobView
from optimizer.controller import Controller, ControllerConfig
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import Cost
from optimizer.geometry import make_layout
from optimizer.ports import EvaluationPool, Failure, Result, Task
from optimizer.problem import Finding, Problem
from optimizer.spec import JobSpec
from tests.factories import make_problem, make_spec
from tests.service import until

ITEMS = 60
LAYERS = 6
COST = Cost(requests=1, tokens=250, money=0.02)
"""Of each evaluation, as if a service had scored it."""
_NAMES = ("attention.query.weight", "mlp.up_proj.weight")


def browser_spec(**changes: Any) -> JobSpec:
    """Return a spec as a user would submit it: three experts, three objectives."""
    experts = ("language", "polarity", "continent")
    objectives = [
        {
            "name": name,
            "evaluator": "text_classification",
            "data": {"path": f"data/{name}", "split": "search"},
            "metric": metric,
            "head": name,
        }
        for name, metric in zip(experts, ("loss", "loss", "accuracy"), strict=True)
    ]
    data: dict[str, Any] = {
        "name": "three word tasks",
        "experts": [{"name": name, "path": f"models/{name}"} for name in experts],
        "objectives": objectives,
        "budget": {"evaluations": 40},
    }
    return make_spec(**(data | changes))


def browser_problem(spec: JobSpec) -> Problem:
    """Return a problem with an input group, `LAYERS` layers and an output group, and something in its report."""
    names = ["embeddings.word_embeddings.weight", "final_norm.weight"]
    names += [f"layers.{layer}.{name}" for layer in range(LAYERS) for name in _NAMES]
    finding = Finding(
        severity="info",
        model="language",
        message="has a head of its own, which is not merged",
        tensors=["classifier.weight"],
    )
    layout = make_layout((name, (4, 4), "F32") for name in names)
    problem = make_problem(spec)
    objectives = [objective.model_copy(update={"items": ITEMS}) for objective in problem.objectives]
    return problem.model_copy(update={"layout": layout, "findings": [finding], "objectives": objectives})


def score(problem: Problem, recipe: Mapping[str, Any], index: int) -> dict[str, ItemScores]:
    """Return per-item scores: each objective has an optimum of its own near its expert, so they conflict."""
    experts = [name for name in problem.models if name != "base"]
    means = np.array([_share(recipe["root"], name) for name in experts])
    rng = np.random.default_rng(index)
    out = {}
    for number, objective in enumerate(problem.objectives):
        wanted = np.full(len(means), 0.4)
        wanted[number % len(means)] = 0.8
        distance = float(((means - wanted) ** 2).sum())
        if objective.direction == "minimise":
            values = 0.3 + distance + rng.gamma(2.0, 0.1, ITEMS)
        else:
            values = (rng.random(ITEMS) < 0.95 * np.exp(-distance)).astype(np.float64)
        out[objective.name] = ItemScores(values.astype(np.float32))
    return out


def _share(node: Mapping[str, Any], name: str) -> float:
    """How much of an expert is in a merge: its mean coefficients, multiplied down to it."""
    if "model" in node:
        return float(node["model"] == name)
    means = np.array(node["coefficients"], dtype=np.float64).mean(axis=0).tolist()
    means *= len(node["inputs"]) // len(means)
    inputs = sum(weight * _share(child, name) for weight, child in zip(means, node["inputs"], strict=True))
    return float(inputs) + _share(node["base"], name)


class FormulaPool:
    """Scores candidates by `score`, each as soon as there is a permit for it; every ``fail_every``-th fails."""

    def __init__(self, problem: Problem, permits: threading.Semaphore, fail_every: int) -> None:
        self._problem = problem
        self._permits = permits
        self._fail_every = fail_every
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self._tasks.put(task)

    def wait(self, timeout_s: float) -> list[Result]:
        """Return one result if a permit comes within the time."""
        if self._tasks.empty() or not self._permits.acquire(timeout=timeout_s):
            return []
        task = self._tasks.get()
        made: dict[str, Any] = {"seconds": {"merge": 0.02, "evaluate": 0.3}, "worker": "formula", "cost": COST}
        if self._fail_every and task.index % self._fail_every == self._fail_every - 1:
            failure = Failure("infeasible", "loss is nan: 3 of 60 items have no finite score")
            return [Result(task.index, failure=failure, **made)]
        scores = score(self._problem, task.recipe, task.index)
        # On new items the losses are higher by as much as no chance explains.
        test = {name: ItemScores(scores[name].values[at] + 0.5) for name, at in task.test.items()}
        if task.places is not None:
            scores = {name: ItemScores(scores[name].values[at]) for name, at in task.places.items() if len(at)}
        elif task.items is not None:
            scores = {name: ItemScores(found.values[: task.items]) for name, found in scores.items()}
        return [Result(task.index, scores, test=test, **made)]

    def withdraw(self) -> list[int]:
        """A task that waits for its permit counts as begun."""
        return []

    def close(self) -> None:
        """Nothing is kept."""


class FormulaPools:
    """Makes pools that share the test's permits."""

    def __init__(self, permits: threading.Semaphore, fail_every: int) -> None:
        self._permits = permits
        self._fail_every = fail_every

    def prepare(self, spec: JobSpec) -> Problem:
        """Return the made-up problem."""
        return browser_problem(spec)

    def open(self, spec: JobSpec, problem: Problem) -> EvaluationPool:
        """Return a pool."""
        return FormulaPool(problem, self._permits, self._fail_every)

    def close(self) -> None:
        """Nothing is kept."""


class Service:
    """A running service.

    Attributes:
        store: behind it.
        port: it listens on.
        url: of the UI.
    """

    def __init__(self, store: SqlStore, settings: Settings, root: Path) -> None:
        self.store = store
        self.port = settings.port
        self.url = f"http://{settings.host}:{settings.port}/ui/"
        self._root = root
        self._permits = threading.Semaphore(0)

    def allow(self, evaluations: int) -> None:
        """Let the controller do this many more evaluations."""
        self._permits.release(evaluations)

    def evaluate(self, job: JobView, evaluations: int) -> None:
        """Let the controller do this many more evaluations, and wait until the job has them."""
        wanted = self._done(job) + evaluations
        self.allow(evaluations)
        until(f"{wanted} evaluations", lambda: self._done(job) >= wanted)

    def finish(self, job: JobView) -> None:
        """Let the controller do all evaluations that the job may have, and wait until it is completed."""
        self.allow(job.progress.budget)
        until("completed", lambda: self.store.get_job(job.id).state == "completed")

    def _done(self, job: JobView) -> int:
        progress = self.store.get_job(job.id).progress
        return progress.completed + progress.failed

    @contextmanager
    def steady(self, every_s: float = 0.05) -> Iterator[None]:
        """Allow one more evaluation every now and then while the block runs, and none that is left after it."""
        done = threading.Event()

        def allow() -> None:
            while not done.wait(every_s):
                self.allow(1)

        thread = threading.Thread(target=allow, name="steady")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._take_back()

    def submit(self, **changes: Any) -> JobView:
        """Submit a job past the UI."""
        return self.store.create_job(browser_spec(**changes))[0]

    @contextmanager
    def working(self, fail_every: int = 0) -> Iterator[None]:
        """Run a controller and exports while the block runs; every ``fail_every``-th candidate fails."""
        pools = FormulaPools(self._permits, fail_every)
        controller = Controller(self.store, pools, ControllerConfig("controller", poll_s=0.05))
        stop = threading.Event()
        threads = [
            threading.Thread(target=controller.run_forever, name="controller"),
            threading.Thread(target=self._export_until, args=[stop], name="exporter"),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            controller.stop()
            for thread in threads:
                thread.join()

    def clear(self) -> None:
        """Leave nothing of what a test did: no permits, and no jobs, whose controllers must have stopped."""
        self._take_back()
        while jobs := self.store.list_jobs().items:
            for job in jobs:
                if job.state == "running":
                    self.store.request(job.id, "cancel")
                self.store.delete_job(job.id)

    def _take_back(self) -> None:
        while self._permits.acquire(blocking=False):
            pass

    def _export_until(self, stop: threading.Event) -> None:
        while not stop.wait(0.05):
            task = self.store.claim_export("exporter", 30)
            if task is None:
                continue
            path = self._root / f"candidate-{task.candidate}"
            for part in range(1, 5):
                self.store.update_export(task, state="running", progress=part / 5, ttl_s=30)
            self.store.update_export(task, state="completed", progress=1, ttl_s=30, path=str(path))


@contextmanager
def running_service(root: Path, *, work: bool = True, port: int = 0, **settings: Any) -> Iterator[Service]:
    """Run a service while the block runs.

    Args:
        root: directory for its database, ``ui.db``.
        work: whether a controller runs jobs.
        port: to listen on; 0 takes a free one.
        settings: that differ from the tests' defaults.
    """
    url = f"sqlite:///{root}/ui.db"
    migrations.upgrade(url)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        made = Settings(
            home=root, database_url=url, port=listener.getsockname()[1], poll_s=0.05, log_level="warning", **settings
        )
        store = SqlStore(url)
        service = Service(store, made, root)
        server = make_server(create_app(store, made, browser_problem), made)
        thread = threading.Thread(target=server.run, args=([listener],), name="uvicorn")
        thread.start()
        try:
            with service.working() if work else nullcontext():
                yield service
        finally:
            server.should_exit = True
            thread.join()
            store.close()
