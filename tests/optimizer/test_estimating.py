"""A search over estimates: a few items a candidate, the same for all, and the truth about the best in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from api.store.sql import SqlStore
from optimizer.controller import Controller, ControllerConfig
from optimizer.spec import JobSpec
from tests.factories import make_spec
from tests.optimizer.measured import Pools, run
from tests.optimizer.test_races import WORDS, quality

BASELINES = 4
ANCHORS = 20


def spec_of(method: str = "regression", **changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "algorithm": {"name": "cma_es", "options": {"population": 6}},
        "budget": {"evaluations": 22},
        "fitness": {"estimation": {"method": method, "items": ANCHORS}, "verification": {"candidates": 2}},
    }
    return make_spec(**(fields | changes))


@pytest.mark.parametrize("method", ["mean", "weighted", "regression", "gmp_irt"])
def test_candidates_are_measured_on_the_anchors_and_the_best_on_everything(store: SqlStore, method: str) -> None:
    pools = Pools(words=WORDS, quality=quality)
    job = run(store, pools, spec_of(method))
    found = store.list_candidates(job.id, limit=100).items
    estimated = [candidate for candidate in found if candidate.estimated]
    assert len(estimated) == 22 - BASELINES
    front = [point.index for point in store.front(job.id).front]
    checked = [c for c in estimated if c.verification is not None]
    assert checked
    assert {c.index for c in checked} <= set(front)
    assert len(pools.measured) == len(set(pools.measured))
    most = BASELINES * 400 + 2 * ANCHORS * len(estimated) + len(checked) * (400 - 2 * ANCHORS)
    assert len(pools.measured) <= most
    for candidate in estimated:
        assert candidate.errors is not None
        assert min(candidate.errors) > 0
        assert candidate.partial is None
        for scores in store.get_candidate(job.id, candidate.index).items.values():
            assert len(scores) <= ANCHORS
    for candidate in checked:
        view = candidate.verification
        assert view is not None
        assert candidate.values is not None
        assert candidate.errors is not None
        for name, value, error in zip(("language", "polarity"), candidate.values, candidate.errors, strict=True):
            assert view.search[name].items == 200
            assert abs(view.search[name].value - value) < 6 * error


def test_where_one_objective_has_one_best_the_next_best_estimates_are_measured_too(store: SqlStore) -> None:
    spec = spec_of()
    job = run(store, Pools(words=WORDS, quality=quality), spec.model_copy(update={"objectives": spec.objectives[:1]}))
    found = store.list_candidates(job.id, limit=100).items
    sign = -1 if store.get_job(job.id).objectives[0].direction == "maximise" else 1
    best = sorted((sign * c.values[0], c.index) for c in found if c.values is not None)[:2]
    checked = [c.index for c in found if c.estimated and c.verification is not None]
    assert len(store.front(job.id).front) == 1
    assert sorted(checked) == sorted(index for _, index in best if found[index].estimated)


def test_an_estimate_is_no_measurement_for_whoever_exports_it(store: SqlStore) -> None:
    job = run(store, Pools(words=WORDS, quality=quality), spec_of())
    index = next(c.index for c in store.list_candidates(job.id, limit=100).items if c.estimated)
    store.create_export(job.id, index, None)
    task = store.claim_export("worker", 60)
    assert task is not None
    assert task.scores == {}


def stop_after(tasks: int, controller: Controller) -> Callable[[], object]:
    """Stops a controller while a task is under way."""
    calls = iter(range(100))
    return lambda: controller.stop() if next(calls) == tasks else None


def test_a_resumed_job_estimates_with_what_it_had(store: SqlStore) -> None:
    whole = run(store, Pools(words=WORDS, quality=quality), spec_of(seed=5))
    spec = spec_of(seed=5).model_copy(update={"fitness": spec_of(seed=5).fitness.model_copy(update={"cache": False})})
    job, _ = store.create_job(spec)
    for _ in range(60):
        controller = Controller(
            store, pools := Pools(words=WORDS, quality=quality), ControllerConfig("test", poll_s=0.0)
        )
        pools.on_task = stop_after(5, controller)
        if not controller.run_next(job.id) or store.get_job(job.id).state == "completed":
            break
    values = [
        [(c.values, c.errors) for c in store.list_candidates(each, limit=100).items] for each in (whole.id, job.id)
    ]
    assert values[0] == values[1]
    assert np.isfinite(np.array([v for v, _ in values[0] if v is not None])).all()
