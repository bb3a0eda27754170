"""When a search is over, its best are measured on test items: once each, whatever comes between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from api.store.sql import SqlStore
from api.views import CandidateSummary, JobView
from optimizer.controller import Controller, ControllerConfig
from optimizer.spec import CandidateInput, JobSpec
from tests.factories import make_spec
from tests.optimizer.measured import ITEMS, Pools

TEST = {"language": [f"unseen {n}" for n in range(30)]}
BASELINES = 4  # the base, two experts, the uniform merge


def spec_of(**changes: Any) -> JobSpec:
    return make_spec(**({"budget": {"evaluations": 9}} | changes))


def run(store: SqlStore, pools: Pools, **changes: Any) -> JobView:
    job, _ = store.create_job(spec_of(**changes))
    return resume(store, pools, job.id)


def resume(store: SqlStore, pools: Pools, job_id: str) -> JobView:
    assert Controller(store, pools, ControllerConfig("test", poll_s=0.0)).run_next(job_id)
    return store.get_job(job_id)


def verified(store: SqlStore, job: JobView) -> list[CandidateSummary]:
    return [c for c in store.list_candidates(job.id, limit=1000).items if c.verification is not None]


def test_the_front_and_the_baselines_are_measured_on_test_items(store: SqlStore) -> None:
    pools = Pools(test=TEST)
    job = run(store, pools)
    assert job.state == "completed"
    front = {point.index for point in store.front(job.id).front}
    found = verified(store, job)
    assert {candidate.index for candidate in found} == front | set(range(BASELINES))
    assert (job.progress.to_verify, job.progress.verified) == (len(found), len(found))
    tested = [each for each in pools.measured if each[1].startswith("test/")]
    assert len(tested) == len(set(tested)) == 30 * len(found)
    for candidate in found:
        view = candidate.verification
        assert view is not None
        assert view.state == "completed"
        assert view.test.keys() == {"language"}
        items = store.get_candidate(job.id, candidate.index).test_items["language"]
        assert view.test["language"].items == len(items) == 30
        assert view.test["language"].value == pytest.approx(np.mean(items))
        assert view.test["language"].low < view.test["language"].value < view.test["language"].high
        assert candidate.values is not None
        for name, value in zip(("language", "polarity"), candidate.values, strict=True):
            assert view.search[name].value == pytest.approx(value)
            assert (view.search[name].items, view.search[name].low < value < view.search[name].high) == (ITEMS, True)
        assert view.overfitted == []


def test_a_search_that_was_fooled_is_told_of(store: SqlStore) -> None:
    job = run(store, Pools(test=TEST, flatter=0.5))
    found = [c.verification.overfitted for c in verified(store, job) if c.verification is not None]
    assert found == [["language"]] * len(found)


def test_without_test_items_there_is_nothing_to_verify(store: SqlStore) -> None:
    job = run(store, Pools())
    assert (verified(store, job), job.progress.to_verify) == ([], 0)


@pytest.mark.parametrize(
    ("options", "count"),
    [({"candidates": 1, "baselines": False}, 1), ({"candidates": 0}, 0), ({"candidates": 1}, None)],
)
def test_how_many_is_the_users_choice(store: SqlStore, options: dict[str, Any], count: int | None) -> None:
    job = run(store, Pools(test=TEST), fitness={"verification": options})
    found = len(verified(store, job))
    assert found == count if count is not None else found in (BASELINES, BASELINES + 1)


def test_a_failure_is_recorded_and_the_job_ends(store: SqlStore) -> None:
    pools = Pools(test=TEST)
    job, _ = store.create_job(spec_of())
    pools.on_test = lambda: setattr(pools, "fail", True)
    assert resume(store, pools, job.id).state == "completed"
    found = verified(store, job)
    assert found
    assert all(c.verification and c.verification.state == "failed" for c in found)
    assert all(c.state == "completed" for c in found)


@pytest.mark.parametrize("how", ["stop", "pause"])
def test_interrupted_it_goes_on_where_it_was(store: SqlStore, how: str) -> None:
    pools = Pools(test=TEST)
    job, _ = store.create_job(spec_of())
    controller = Controller(store, pools, ControllerConfig("test", poll_s=0.0, lease_ttl_s=0.3))
    calls = iter(range(100))
    interrupt: Callable[[], object] = controller.stop if how == "stop" else lambda: store.request(job.id, "pause")
    pools.on_test = lambda: interrupt() if next(calls) == 2 else None
    assert controller.run_next(job.id)
    view = store.get_job(job.id)
    if how == "stop":
        assert 0 < view.progress.verified < view.progress.to_verify
        assert view.state == "running"
    pools.on_test = lambda: None
    store.request(job.id, "run") if view.state == "paused" else None
    if view.state != "completed":
        view = resume(store, pools, job.id)
    assert (view.state, view.progress.verified) == ("completed", view.progress.to_verify)
    tested = [each for each in pools.measured if each[1].startswith("test/")]
    assert len(tested) == len(set(tested))
    whole = run(store, Pools(test=TEST), fitness={"cache": False})
    assert [c.verification.test for c in verified(store, view) if c.verification] == [
        c.verification.test for c in verified(store, whole) if c.verification
    ]


def test_after_the_time_is_over_too(store: SqlStore) -> None:
    job = run(store, Pools(test=TEST), budget={"evaluations": 10_000, "wall_time_s": 1e-9})
    assert job.state == "completed"
    assert job.reason is not None
    assert "running time" in job.reason
    job = run(store, Pools(test=TEST), budget={"evaluations": 5000, "wall_time_s": 0.3})
    assert job.progress.verified == job.progress.to_verify > 0


def test_what_another_job_measured_is_not_measured_again(store: SqlStore) -> None:
    run(store, Pools(test=TEST))
    again = Pools(test=TEST)
    job = run(store, again)
    assert again.measured == []
    assert job.progress.verified == job.progress.to_verify > 0


def test_candidates_that_users_enqueue_meanwhile_are_verified_too(store: SqlStore) -> None:
    pools = Pools(test=TEST)
    job, _ = store.create_job(make_spec(budget={"evaluations": 30, "patience": 1}))
    calls = iter(range(100))

    def enqueue() -> None:
        if next(calls) == 0:
            store.enqueue(job.id, CandidateInput(genome=[0.123] * 8, label="mine"))

    pools.on_test = enqueue
    view = resume(store, pools, job.id)
    assert view.state == "completed"
    mine = next(c for c in store.list_candidates(job.id, limit=1000).items if c.label == "mine")
    assert (mine.verification is not None) == mine.on_front
    assert view.progress.verified == view.progress.to_verify
