"""The whole service, as users run it: real HTTP, real store, real Ray, real checkpoints; killed, paused, cancelled."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.client import Client
from api.store.sql import SqlStore
from api.views import JobView
from optimizer.controller import Controller, ControllerConfig
from optimizer.spec import parse_spec
from tests.durability.rows import Rows, history
from tests.jobs import write_job
from tests.service import Service, serving, until
from workers.pool import LocalPoolFactory

pytestmark = pytest.mark.ray


def slow_job(root: Path, evaluations: int, **changes: Any) -> dict[str, Any]:
    """A job whose evaluations take some tenths of a second each; what a worker needs to start costs more than those."""
    return write_job(root, items=1500, budget={"evaluations": evaluations}, workers={"count": 1}, **changes)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Path]]:
    """One service for the tests that do not kill it, and its root."""
    folder = tmp_path_factory.mktemp("service")
    root = folder / "root"
    slow_job(root, 1)
    with serving(folder / "home", root) as client:
        yield client, root


def evaluated(client: Client, job_id: str) -> int:
    return client.get_job(job_id).progress.completed


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_as_if_never_interrupted(
    tmp_path: Path, sqlite_template: Path, kills: int
) -> None:
    root = tmp_path / "root"
    evaluations = 40 * kills
    job = write_job(root, items=24, budget={"evaluations": evaluations}, workers={"count": 1 if kills < 4 else 2})
    whole = uninterrupted(job, root, sqlite_template, tmp_path / "whole.db")

    home, rng = tmp_path / "killed", random.Random(11)
    job_id = ""
    for kill in range(kills):
        with Service(home, root, lease_ttl_s=1) as service:
            if kill == 0:
                job_id = service.wait_ready().submit(job).id
            # Half of the kills come at any moment of the start, half in the middle of the work.
            if kill % 2:
                wait_for_progress(service.wait_ready(), job_id)
            until_dead(service, rng.uniform(0, 0.3 if kill % 2 else 3.0))
    done = [row for row in history(f"sqlite:///{home}/mergeopt.db", job_id) if row[-1] is not None]
    assert 0 < len(done) < evaluations, "the job must be under way at the last kill"
    with serving(home, root, lease_ttl_s=1) as client:
        resumed = client.wait(job_id)
    assert resumed.state == "completed"
    assert resumed.progress.completed == sum(row[-1] is not None for row in whole)
    assert history(f"sqlite:///{home}/mergeopt.db", job_id) == whole


def uninterrupted(job: dict[str, Any], root: Path, template: Path, path: Path) -> Rows:
    """Return what the job finds in one go; on threads of this process, which score as workers on Ray do."""
    shutil.copy(template, path)
    url = f"sqlite:///{path}"
    store = SqlStore(url)
    job_id = store.create_job(parse_spec(job))[0].id
    Controller(store, LocalPoolFactory([root]), ControllerConfig("whole", poll_s=0.01)).run_next()
    view = store.get_job(job_id)
    store.close()
    assert view.state == "completed", view.reason
    return history(url, job_id)


def wait_for_progress(client: Client, job_id: str) -> None:
    """Wait until one more candidate has been evaluated."""
    seen = evaluated(client, job_id)
    until("it goes on", lambda: evaluated(client, job_id) > seen or None)


def until_dead(service: Service, after_s: float) -> None:
    """Let the service live for a moment, then kill it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        service.popen.wait(after_s)
        raise AssertionError(service.log.read_text()[-3000:])
    service.kill()


def test_a_worker_killed_in_the_middle_of_an_evaluation_costs_only_that_evaluation(
    service: tuple[Client, Path],
) -> None:
    client, root = service
    job = client.submit(slow_job(root, 10, name="worker killed"))
    until("two are done", lambda: evaluated(client, job.id) >= 2 or None)
    worker = client.get_candidate(job.id, 0).worker
    os.kill(int(worker.rsplit(":", 1)[1]), signal.SIGKILL)
    done = client.wait(job.id)
    assert (done.state, done.progress.completed, done.progress.failed) == ("completed", 10, 0)
    workers = {client.get_candidate(job.id, index).worker for index in range(10)}
    assert len(workers) == 2


def test_pause_takes_effect_within_one_evaluation_and_resume_goes_on(service: tuple[Client, Path]) -> None:
    client, root = service
    # Evaluations that take longer than the half second after which a controller hears of a request.
    job = client.submit(write_job(root, items=5000, budget={"evaluations": 30}, parallel_evaluations=8, name="paused"))
    until("one is done", lambda: evaluated(client, job.id) >= 1 or None)
    before = evaluated(client, job.id)
    client.pause(job.id)
    paused = until("it is paused", lambda: paused_or_none(client, job.id))
    # What the worker was at is finished and kept, nothing more is begun, however many proposals are open.
    assert paused.progress.completed <= before + 3
    client.resume(job.id)
    until("it goes on", lambda: evaluated(client, job.id) > paused.progress.completed or None)
    client.cancel(job.id)
    assert client.wait(job.id).state == "cancelled"


def paused_or_none(client: Client, job_id: str) -> JobView | None:
    job = client.get_job(job_id)
    return job if job.state == "paused" else None


def test_cancel_takes_effect_within_one_evaluation(service: tuple[Client, Path]) -> None:
    client, root = service
    job = client.submit(slow_job(root, 500, name="cancelled"))
    until("one is done", lambda: evaluated(client, job.id) >= 1 or None)
    client.cancel(job.id)
    assert client.wait(job.id).state == "cancelled"
    states = {candidate.state for candidate in client.candidates(job.id)}
    assert states <= {"completed", "cancelled"}


def test_a_users_candidate_is_evaluated_while_the_job_runs(service: tuple[Client, Path]) -> None:
    client, root = service
    job = client.submit(slow_job(root, 14, name="enqueued"))
    until("one is done", lambda: evaluated(client, job.id) >= 1 or None)
    client.enqueue(job.id, {"coefficients": {"colour": 0.25, "shape": 0.75}, "label": "mine"})
    assert client.wait(job.id).state == "completed"
    mine = [candidate for candidate in client.candidates(job.id) if candidate.label == "mine"]
    assert [candidate.state for candidate in mine] == ["completed"]
    assert mine[0].origin == "user"


def test_a_checkpoint_that_changed_fails_the_job_with_its_name(service: tuple[Client, Path], tmp_path: Path) -> None:
    client, root = service
    job = client.submit(slow_job(root, 500, name="changed"))
    until("one is done", lambda: evaluated(client, job.id) >= 1 or None)
    client.pause(job.id)
    until("it is paused", lambda: paused_or_none(client, job.id))
    weights = root / "models" / "shape" / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-4] + b"\x00\x00\x80\x3f")
    try:
        client.resume(job.id)
        failed = client.wait(job.id)
    finally:
        weights.write_bytes(original)
    assert failed.state == "failed"
    assert "shape" in str(failed.reason)
    assert "changed" in str(failed.reason)


def test_more_than_the_machine_has_fails_the_job_and_says_what_to_do(service: tuple[Client, Path]) -> None:
    client, root = service
    job = client.submit(write_job(root, items=1500, workers={"count": 1, "gpus": 3}, name="too greedy"))
    failed = client.wait(job.id)
    assert failed.state == "failed"
    assert "GPU" in str(failed.reason)
