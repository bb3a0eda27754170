"""Jobs whose candidates a service scores, through the API: the service goes away and comes back, budgets run out."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from api.client import Client
from tests.service import serving, until
from tests.workers.services.server import Received, Server, answer
from tests.workers.services.server import serving as service

ITEMS = 5


class Scores:
    """Scores items by a formula, counts what it answered, and is down when told so."""

    def __init__(self, down_after: int) -> None:
        self.answered: Counter[tuple[float, int]] = Counter()
        self.down_after = down_after
        self._lock = threading.Lock()

    def __call__(self, received: Received, connection: Any) -> None:
        data = received.data
        with self._lock:
            up = self.answered.total() < self.down_after
            if up:
                self.answered[data["at"], data["item"]] += 1
        if up:
            answer({"score": score(data["at"], data["item"])})(received, connection)
        else:
            answer({"error": "down for maintenance"}, 503)(received, connection)


def score(at: float, item: int) -> float:
    return (at - 0.1 * item) ** 2


def job(server: Server, **changes: Any) -> dict[str, Any]:
    """A job without checkpoints over the items of a service."""
    options = {
        "url": f"{server.url}/score",
        "each": "item",
        "body": {"at": "{{values.at}}", "item": "{{row.item}}"},
        "metrics": {"error": {"pointer": "/score", "direction": "minimise", "low": 0}},
        "limits": {"attempts": 2, "backoff_s": 0.01, "concurrency": 4},
        "prices": {"per_request": 0.5},
    }
    objective = {"name": "fit", "evaluator": "http", "options": options, "data": {"path": "items.jsonl"}}
    spec = {
        "name": "behind a service",
        "parameters": {"at": {"low": 0.0, "high": 1.0}, "mode": {"choices": ["a", "b"]}},
        "objectives": [objective],
        "algorithm": "random",
        "budget": {"evaluations": 24},
        "workers": {"count": 2},
    }
    return spec | changes


@contextmanager
def running(folder: Path, server: Server, pool: str = "local") -> Iterator[Client]:
    root = folder / "root"
    root.mkdir(exist_ok=True)
    (root / "items.jsonl").write_text("".join(json.dumps({"item": item}) + "\n" for item in range(ITEMS)))
    with serving(folder / "home", root, pool=pool, hosts=f"127.0.0.1:{server.port}", private_hosts="true") as client:
        yield client


@pytest.mark.slow
def test_a_service_that_goes_away_pauses_the_job_and_nothing_is_lost_or_repeated(tmp_path: Path) -> None:
    scores = Scores(down_after=43)
    with service(scores) as server, running(tmp_path, server) as client:
        told = client.validate(job(server)).estimate
        assert (told["requests"], told["money"]) == (24 * ITEMS, 12 * ITEMS)
        submitted = client.submit(job(server)).id

        def paused() -> str | None:
            found = client.get_job(submitted)
            assert found.state in ("queued", "running", "paused"), found
            return found.reason if found.state == "paused" else None

        reason = until("the job pauses", paused)
        assert "503" in reason
        assert "down for maintenance" in reason
        before = client.get_job(submitted)
        assert 0 < before.progress.completed < 24
        assert before.progress.failed == 0
        assert scores.answered.total() == 43

        scores.down_after = 10**9
        client.resume(submitted)
        done = client.wait(submitted)
        assert (done.state, done.progress.completed, done.progress.failed) == ("completed", 24, 0)
        assert set(scores.answered.values()) == {1}, "no answer was asked for twice"
        assert scores.answered.total() == 24 * ITEMS
        refused = len(server.received) - 24 * ITEMS
        assert done.progress.cost["requests"] == len(server.received), f"{refused} refused ones counted"
        for candidate in client.candidates(submitted):
            at = client.get_candidate(submitted, candidate.index).recipe["root"]["values"]["at"]
            expected = sum(score(at, item) for item in range(ITEMS)) / ITEMS
            assert candidate.values is not None
            assert candidate.values[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_budget_of_requests_is_a_hard_stop(tmp_path: Path) -> None:
    scores = Scores(down_after=10**9)
    with service(scores) as server, running(tmp_path, server) as client:
        limited = job(server, budget={"evaluations": 24, "requests": 33})
        submitted = client.submit(limited).id
        reason = until(
            "the job pauses", lambda: found.reason if (found := client.get_job(submitted)).state == "paused" else None
        )
        assert "budget" in reason
        assert "requests" in reason
        assert 30 <= len(server.received) <= 33
        assert client.get_job(submitted).progress.cost["requests"] == len(server.received)
        client.resume(submitted, {"requests": 24 * ITEMS})
        done = client.wait(submitted)
        assert (done.state, done.progress.completed) == ("completed", 24)
        assert done.progress.cost["requests"] == 24 * ITEMS
        assert len(server.received) == 24 * ITEMS
        assert set(scores.answered.values()) == {1}


@pytest.mark.slow
@pytest.mark.ray
def test_workers_of_a_ray_cluster_ask_the_service_as_local_ones_do(tmp_path: Path) -> None:
    found = {}
    with service(Scores(down_after=10**9)) as server:
        for pool in ("local", "ray"):
            folder = tmp_path / pool
            folder.mkdir()
            with running(folder, server, pool) as client:
                done = client.wait(client.submit(job(server)).id)
                assert (done.state, done.progress.completed) == ("completed", 24)
                found[pool] = [(one.fingerprint, one.values) for one in client.candidates(done.id)]
    assert found["ray"] == found["local"]
