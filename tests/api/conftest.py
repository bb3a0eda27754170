"""A real server on a loopback port over a real SQLite store, and a stand-in for the controller that fills jobs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from api.app import create_app
from api.client import Client
from api.context import Context
from api.server import make_server
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import JobView
from optimizer.errors import InvalidCheckpoint
from optimizer.fitness.aggregate import ItemScores
from optimizer.ports import Candidate, Evaluation, Failure, Lease
from optimizer.problem import Problem
from optimizer.space import JobSpace, make_space
from optimizer.spec import JobSpec
from tests.factories import make_problem, make_spec

STARTS_WITHIN_S = 30


def inspect_spec(spec: JobSpec) -> Problem:
    """Find what a spec names without any files: every model is there, except those called missing."""
    for number, expert in enumerate(spec.experts):
        if "missing" in str(expert):
            raise InvalidCheckpoint("there is no such directory", field=f"experts.{number}", remedy="check the path")
    return make_problem(spec)


@dataclass
class Service:
    """A running server.

    Attributes:
        url: where it is.
        app: what it serves.
        stop: ends it.
    """

    url: str
    app: FastAPI
    stop: Callable[[], None]

    @contextmanager
    def http(self, **options: Any) -> Iterator[httpx.Client]:
        """A plain HTTP client of the API."""
        with httpx.Client(base_url=f"{self.url}/api/v1", timeout=30, **options) as client:
            yield client


@contextmanager
def running(store: SqlStore, settings: Settings, port: int = 0) -> Iterator[Service]:
    """Serve ``store`` until the block ends."""
    app = create_app(store, settings, inspect_spec)
    server = make_server(app, settings)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join()

        try:
            deadline = time.monotonic() + STARTS_WITHIN_S
            while not server.started:
                assert thread.is_alive(), "the server ended"
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.005)
            yield Service(f"http://127.0.0.1:{listener.getsockname()[1]}", app, stop)
        finally:
            stop()


@pytest.fixture
def store(sqlite_url: str) -> Iterator[SqlStore]:
    """A fresh store."""
    store = SqlStore(sqlite_url)
    yield store
    store.close()


@pytest.fixture
def settings(sqlite_url: str, tmp_path: Path) -> Settings:
    """Settings of a service in a directory of its own."""
    return Settings(home=tmp_path, database_url=sqlite_url, poll_s=0.02)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One server for all tests; what it serves changes with each of them."""
    home = tmp_path_factory.mktemp("server")
    store = SqlStore(f"sqlite:///{home}/unused.db")
    with running(store, Settings(home=home)) as service:
        yield service
    store.close()


@pytest.fixture
def service(server: Service, store: SqlStore, settings: Settings) -> Service:
    """A running server over a fresh store."""
    server.app.state.context = Context(store, settings, inspect_spec)
    return server


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    """A plain HTTP client of the API."""
    with service.http() as client:
        yield client


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    """The Python client."""
    with Client(service.url) as client:
        yield client


class Runner:
    """Does to one job what a controller does, step by step, through the store's own methods."""

    def __init__(self, store: SqlStore, job_id: str, lease: Lease | None = None) -> None:
        self.store = store
        self.job_id = job_id
        self.made = 0
        lease = lease or store.claim("test", 3600, job_id)
        assert lease is not None
        self.lease: Lease = lease
        self.spec = store.load(lease).spec
        problem = make_problem(self.spec)
        self.space: JobSpace = make_space(self.spec, problem)
        store.start(lease, problem)

    def propose(self, count: int = 1, **changes: Any) -> list[int]:
        """Record ``count`` candidates, with fields as given, and return their indices."""
        rng = np.random.default_rng(self.made)
        candidates = []
        for index in range(self.made, self.made + count):
            genome = rng.uniform(self.space.low, self.space.high)
            recipe = self.space.recipe(genome)
            candidates.append(
                replace(
                    Candidate(
                        index=index,
                        generation=0,
                        told=self.made,
                        origin="algorithm",
                        label=None,
                        genome=genome,
                        recipe=recipe.to_json(),
                        fingerprint=recipe.fingerprint,
                    ),
                    **changes,
                )
            )
        self.store.add_candidates(self.lease, candidates)
        self.made += count
        return [candidate.index for candidate in candidates]

    def score(self, index: int, *values: float) -> None:
        """Record a candidate's values, one for each objective."""
        items = {
            objective.name: ItemScores(np.full(4, value, dtype=np.float32))
            for objective, value in zip(self.spec.objectives, values, strict=True)
        }
        assert self.store.add_evaluation(self.lease, Evaluation(index, values, items=items, worker="w0"))

    def fail(self, index: int) -> None:
        """Record that a candidate has no score."""
        self.store.add_evaluation(self.lease, Evaluation(index, None, failure=Failure("infeasible", "loss is nan")))

    def finish(self, state: Any = "completed", reason: str | None = None) -> None:
        """End the job."""
        self.store.set_state(self.lease, state, reason)


def fill(store: SqlStore, **changes: Any) -> JobView:
    """Make a completed job of five candidates: 0 and 2 on the front, 1 and 4 dominated, 3 failed."""
    job, _ = store.create_job(make_spec(**changes))
    runner = Runner(store, job.id)
    runner.propose(5)
    for index, values in {0: (0.9, 0.5), 1: (0.7, 0.6), 2: (0.8, 0.2), 4: (0.5, 0.9)}.items():
        runner.score(index, *values)
    runner.fail(3)
    runner.finish()
    return store.get_job(job.id)


@pytest.fixture
def job(store: SqlStore) -> JobView:
    """A completed job with candidates."""
    return fill(store)


@pytest.fixture
def queued(store: SqlStore) -> JobView:
    """A job that nobody has taken up."""
    return store.create_job(make_spec())[0]


def spec_json(**changes: Any) -> dict[str, Any]:
    """Return a valid job spec as plain data."""
    return make_spec(**changes).model_dump(mode="json", exclude_unset=True)
