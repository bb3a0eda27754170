"""Verifications: begun in an order, recorded once each, shown beside the candidate, gone with the job."""

from __future__ import annotations

from typing import Any

import pytest

from api.store.sql import SqlStore
from optimizer.errors import InvalidInput, LeaseLost, NotFound
from optimizer.fitness.cost import Cost
from optimizer.fitness.intervals import Interval
from optimizer.ports import Failure, Lease, Remembered, Verification
from tests.api.store.helpers import everything, items, propose, repeat, scored, started

INTERVAL = Interval(0.5, 0.4, 0.6, 20)


def verification(index: int, **changes: Any) -> Verification:
    fields: dict[str, Any] = {
        "index": index,
        "search": {"language": INTERVAL, "polarity": INTERVAL},
        "test": {"language": Interval(0.25, 0.125, 0.375, 2)},
        "overfitted": ("language",),
        "items": {"language": items([0.0, 0.5], [1.0, 2.0])},
        "seconds": {"evaluate": 1.5},
        "worker": "one",
        "cost": Cost(items=2),
    }
    return Verification(**(fields | changes))


@pytest.fixture
def lease(store: SqlStore) -> Lease:
    lease = started(store)
    originals = propose(store, lease, 3)
    store.add_candidates(lease, [repeat(originals[0], 3)])
    for index in range(3):
        store.add_evaluation(lease, scored(index, [0.5 + index / 10, 0.5 + index / 10]))
    return lease


def test_from_beginning_to_end(store: SqlStore, lease: Lease) -> None:
    assert store.load(lease).verified == {}
    store.begin_verification(lease, [2, 0])
    store.begin_verification(lease, [0, 1])
    assert list(store.load(lease).verified.items()) == [(2, False), (0, False), (1, False)]
    assert (store.get_job(lease.job_id).progress.to_verify, store.get_job(lease.job_id).progress.verified) == (3, 0)
    waiting = store.get_candidate(lease.job_id, 0).verification
    assert waiting is not None
    assert (waiting.state, waiting.test) == ("waiting", {})
    assert store.add_verification(lease, verification(0))
    assert not store.add_verification(lease, verification(0, overfitted=()))
    assert store.load(lease).verified == {2: False, 0: True, 1: False}
    assert store.get_job(lease.job_id).progress.verified == 1


def test_it_is_shown_with_the_candidate_and_its_duplicates(store: SqlStore, lease: Lease) -> None:
    store.begin_verification(lease, [0])
    store.add_verification(lease, verification(0))
    for index in (0, 3):
        view = store.get_candidate(lease.job_id, index)
        assert view.verification is not None
        assert view.verification.state == "completed"
        assert view.verification.test["language"].model_dump() == {
            "value": 0.25,
            "low": 0.125,
            "high": 0.375,
            "items": 2,
        }
        assert set(view.verification.search) == {"language", "polarity"}
        assert view.verification.overfitted == ["language"]
        assert view.test_items == {"language": [0.0, 0.5]}
    listed = {c.index: c.verification for c in store.list_candidates(lease.job_id).items}
    assert listed[0] == store.get_candidate(lease.job_id, 0).verification
    assert listed[1] is None
    by_value = store.list_candidates(lease.job_id, sort="value", objective="polarity").items
    assert by_value[0].verification == listed[0]
    front = {point.index: point.verification for point in store.front(lease.job_id).front}
    assert front[0] == listed[0]


def test_a_failure_is_an_end_too(store: SqlStore, lease: Lease) -> None:
    store.begin_verification(lease, [1])
    assert store.add_verification(lease, Verification(1, failure=Failure("infeasible", "NaN")))
    view = store.get_candidate(lease.job_id, 1).verification
    assert view is not None
    assert (view.state, view.failure) == ("failed", {"code": "infeasible", "message": "NaN"})
    assert store.load(lease).verified == {1: True}


def test_bad_ones_change_nothing(store: SqlStore, lease: Lease) -> None:
    with pytest.raises(NotFound):
        store.begin_verification(lease, [0, 9])
    with pytest.raises(NotFound):
        store.add_verification(lease, verification(0))
    store.begin_verification(lease, [0])
    before = everything(store, lease.job_id)
    for bad in (
        {"test": {"other": INTERVAL}},
        {"items": {"other": items([1.0])}},
        {"search": {"language": Interval(float("nan"), 0, 1, 1)}},
        {"overfitted": ("other",)},
    ):
        with pytest.raises(InvalidInput):
            store.add_verification(lease, verification(0, **bad), [Remembered("m", "f", bytes(16), items([1.0]))])
    assert everything(store, lease.job_id) == before
    assert store.remembered(lease, ["m"], "f") == []


def test_only_the_holder_verifies(store: SqlStore, lease: Lease) -> None:
    store.begin_verification(lease, [0])
    store.release(lease)
    with pytest.raises(LeaseLost):
        store.begin_verification(lease, [1])
    with pytest.raises(LeaseLost):
        store.add_verification(lease, verification(0))


def test_events_tell_of_it(store: SqlStore, lease: Lease) -> None:
    store.begin_verification(lease, [1, 0])
    store.add_verification(lease, verification(0))
    begun, done = store.events(lease.job_id, 0)[-2:]
    assert (begun.type, begun.data["candidates"]) == ("job.verifying", [1, 0])
    assert (done.type, done.data["index"], done.data["test"], done.data["overfitted"]) == (
        "candidate.verified",
        0,
        {"language": 0.25},
        ["language"],
    )
    assert (done.data["progress"]["to_verify"], done.data["progress"]["verified"]) == (2, 1)


def test_what_was_measured_is_remembered(store: SqlStore, lease: Lease) -> None:
    store.begin_verification(lease, [0])
    store.add_verification(lease, verification(0), [Remembered("m", "f", bytes(16), items([1.0]))])
    assert len(store.remembered(lease, ["m"], "f")) == 1
