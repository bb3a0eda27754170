"""Fewer evaluations, and items that no search has seen, where the models are somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.views import CandidateSummary
from optimizer.fitness.aggregate import aggregate
from optimizer.ports import Task
from optimizer.space import make_space
from optimizer.spec import JobSpec
from tests.api.endpoint.conftest import ITEMS, Endpoint, make_rows, port_of, running, use
from tests.api.endpoint.jobs import Client, allowing, job, local
from tests.durability.rows import Rows
from workers.endpoint_worker import EndpointWorker
from workers.prepare import prepare
from workers.roots import Roots

pytestmark = pytest.mark.usefixtures("quick")

TESTED = 24


@pytest.fixture(scope="module")
def models(models: Path) -> Path:
    """The owner's directory, with test items that both sides have."""
    (models / "unseen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(TESTED, 7)))
    return models


@pytest.fixture
def data(data: Path, models: Path) -> Path:
    """The client's directory, with test items."""
    (data / "unseen.jsonl").write_bytes((models / "unseen.jsonl").read_bytes())
    return data


def objective(**changes: Any) -> dict[str, Any]:
    return {
        "name": "query",
        "evaluator": "text_classification",
        "data": {"path": "query.jsonl"},
        "metric": "loss",
        **changes,
    }


def nearby(spec: JobSpec, models: Path, url: str) -> Rows:
    """What the same job finds with the models at hand."""
    client = Client(url, models, allowing(1))
    try:
        return client.run(local(spec, models))[1]
    finally:
        client.close()


def verified(client: Client, job_id: str) -> list[CandidateSummary]:
    found = client.store.list_candidates(job_id, limit=1000).items
    return [candidate for candidate in found if candidate.verification is not None]


FITNESS: dict[str, dict[str, Any]] = {
    "racing": {"racing": {"enabled": True, "first_items": 8, "error": 0.4}},
    "weighted": {"estimation": {"method": "weighted", "items": 12}, "verification": {"candidates": 3}},
    "regression": {"estimation": {"method": "regression", "items": 8}, "verification": {"candidates": 3}},
}


@pytest.mark.parametrize("which", FITNESS)
def test_fewer_items_are_those_that_local_workers_take(
    which: str, endpoint: Endpoint, searcher: Client, models: Path, sqlite_url: str
) -> None:
    objectives = [objective(), objective(name="right", metric="accuracy", use="report")]
    spec = job(
        endpoint.url,
        merge={"operator": "lora_factors", "bounds": {"low": -9, "high": 9}},  # far enough that some are clearly worse
        objectives=objectives,
        algorithm={"name": "cma_es"},
        budget={"evaluations": 30},
        fitness=FITNESS[which] | {"cache": False},
    )
    done, rows = searcher.run(spec)
    assert (done.state, done.progress.failed) == ("completed", 0)
    assert rows == nearby(spec, models, sqlite_url)
    few = [row for row in rows if row[10] is not None]  # stopped or estimated: with errors
    assert few
    assert done.progress.cost["items"] < 30 * ITEMS


def test_the_best_are_measured_on_test_items_that_are_uploaded(
    endpoint: Endpoint, searcher: Client, models: Path, sqlite_url: str
) -> None:
    spec = job(endpoint.url, objectives=[objective(test={"path": "unseen.jsonl"})], budget={"evaluations": 10})
    job_id = searcher.submit(spec)
    assert searcher.turn(job_id).state == "completed"
    found = verified(searcher, job_id)
    assert searcher.rows(job_id) == nearby(spec, models, sqlite_url)
    assert len(found) > 1
    for view in (candidate.verification for candidate in found):
        assert view is not None
        test = view.test["query"]
        assert test.items == TESTED
        assert test.low < test.value < test.high


def owner(models: Path, home: Path, **changes: Any) -> Any:
    def named(name: str) -> dict[str, Any]:
        return {"name": name, "evaluator": "text_classification", "data": {"path": f"{name}.jsonl"}}

    return running(models, home, sets=[named("own"), named("unseen")], **changes)


def test_the_owners_sets_test_too_and_means_have_no_error(
    models: Path, data: Path, tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {
        "name": "theirs",
        "evaluator": "text_classification",
        "set": "own",
        "metric": "loss",
        "test_set": "unseen",
    }
    client = Client(sqlite_url, data, allowing(1))
    found: dict[str, list[CandidateSummary]] = {}
    for scores in ("items", "aggregate"):
        with owner(models, tmp_path / scores, scores=scores, max_share=1.0, min_items=1) as endpoint:
            use(monkeypatch, endpoint.token)
            client = Client(sqlite_url, data, allowing(port_of(endpoint.url)))
            job_id = client.submit(job(endpoint.url, objectives=[theirs], budget={"evaluations": 8}))
            done = client.turn(job_id)
            assert (done.state, done.progress.failed) == ("completed", 0)
            assert any("only the owner can tell" in finding.message for finding in done.findings)
            found[scores] = verified(client, job_id)
            client.close()
    assert [c.index for c in found["items"]] == [c.index for c in found["aggregate"]]
    for one, other in zip(found["items"], found["aggregate"], strict=True):
        assert one.verification is not None
        assert other.verification is not None
        assert (one.verification.test["theirs"].items, other.verification.test["theirs"].items) == (TESTED, 1)
        for split in ("search", "test"):
            known, mean = (getattr(c.verification, split)["theirs"] for c in (one, other))
            assert known.low < known.value < known.high
            assert mean.low == mean.value == mean.high == pytest.approx(known.value, abs=1e-6)
        assert other.verification.overfitted == []


def test_more_items_are_asked_for_where_the_owner_wants_more(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec_of = {}
    found = {}
    for fewest in (1, 15, ITEMS):
        with running(models, tmp_path / str(fewest), min_items=fewest) as endpoint:
            use(monkeypatch, endpoint.token)
            roots = Roots([data], allowing(port_of(endpoint.url)))
            spec = spec_of[fewest] = job(endpoint.url)
            problem = prepare(spec, roots)
            space = make_space(spec, problem)
            worker = EndpointWorker(spec, problem, roots, "w")
            places = {"query": np.array([31, 4, 17])}
            found[fewest] = worker.evaluate(Task(0, space.recipe(space.uniform() * 0.9).to_json(), places=places))
            assert found[fewest].cost.items == max(3, fewest)
            aggregate(problem.objectives, found[fewest].scores)
    values = [result.scores["query"].values for result in found.values()]
    assert all(len(each) == 3 for each in values)
    for each in values:  # in other batches, so not bit for bit
        assert each == pytest.approx(values[0], abs=1e-5)
