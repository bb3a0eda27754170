"""Scores that outlive their candidates: kept, found again by any job, and gone with the job that paid for them."""

from __future__ import annotations

import numpy as np
import pytest
from sqlalchemy import func, select

from api.store.models import ItemListRow, RememberedRow
from api.store.sql import SqlStore
from optimizer.errors import LeaseLost
from optimizer.ports import Remembered
from tests.api.store.helpers import items, propose, scored, started

LIST = bytes(range(48))


def part(measure: str = "m", fingerprint: str = "f", ids: bytes = LIST, weighted: bool = False) -> Remembered:
    count = len(ids) // 16
    values = np.arange(count, dtype=np.float32) + 0.1
    return Remembered(measure, fingerprint, ids, items(values.tolist(), values.tolist() if weighted else None))


def test_what_was_kept_is_found_by_measure_and_merge_from_any_job(store: SqlStore) -> None:
    lease = started(store)
    propose(store, lease, 2)
    kept = [part(), part("n", weighted=True), part(ids=LIST[:16]), part(fingerprint="g")]
    assert store.add_evaluation(lease, scored(0, [0.5, 0.5]), kept)
    other = started(store)
    found = store.remembered(other, ["m", "n", "o"], "f")
    assert {(one.measure, one.items) for one in found} == {("m", LIST), ("n", LIST), ("m", LIST[:16])}
    for one in found:
        wanted = part(one.measure, ids=one.items, weighted=one.measure == "n")
        assert one.scores.values.tobytes() == wanted.scores.values.tobytes()
        assert (one.scores.weights is None) == (wanted.scores.weights is None)
        assert one.split() == [one.items[n : n + 16] for n in range(0, len(one.items), 16)]
    assert [(one.measure, one.items) for one in store.remembered(lease, ["n", "m"], "f")] == [
        (one.measure, one.items) for one in found
    ]
    assert store.remembered(other, ["m"], "h") == store.remembered(other, ["o"], "f") == []


def test_what_is_known_already_stays_as_it_is(store: SqlStore) -> None:
    lease = started(store)
    propose(store, lease, 2)
    store.add_evaluation(lease, scored(0, [0.5, 0.5]), [part()])
    changed = Remembered("m", "f", LIST, items([9.0, 9.0, 9.0]))
    store.add_evaluation(lease, scored(1, [0.5, 0.5]), [changed])
    (found,) = store.remembered(lease, ["m"], "f")
    assert found.scores.values[0] == np.float32(0.1)


def test_nothing_is_kept_of_an_outcome_that_was_there_already(store: SqlStore) -> None:
    lease = started(store)
    propose(store, lease, 1)
    store.add_evaluation(lease, scored(0, [0.5, 0.5]))
    assert not store.add_evaluation(lease, scored(0, [0.5, 0.5]), [part()])
    assert store.remembered(lease, ["m"], "f") == []


def test_it_goes_with_the_job_that_paid_for_it(store: SqlStore) -> None:
    lease = started(store)
    propose(store, lease, 1)
    store.add_evaluation(lease, scored(0, [0.5, 0.5]), [part()])
    other = started(store)
    propose(store, other, 1)
    store.add_evaluation(other, scored(0, [0.5, 0.5]), [part("n")])
    store.set_state(lease, "completed")
    store.delete_job(lease.job_id)
    assert [one.measure for one in store.remembered(other, ["m", "n"], "f")] == ["n"]


def test_lists_of_items_are_kept_once(store: SqlStore) -> None:
    lease = started(store)
    propose(store, lease, 3)
    for index in range(3):
        store.add_evaluation(lease, scored(index, [0.5, 0.5]), [part(fingerprint=str(index)), part("n", str(index))])
    with store.read() as session:
        assert session.scalars(select(ItemListRow.job_id)).all() == [lease.job_id]
        assert session.scalar(select(func.count()).select_from(RememberedRow)) == 6


def test_only_the_holder_may_look(store: SqlStore) -> None:
    lease = started(store)
    store.release(lease)
    with pytest.raises(LeaseLost):
        store.remembered(lease, ["m"], "f")
