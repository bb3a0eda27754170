"""Steps of a job's life, as controllers and users take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from api.store.sql import SqlStore
from api.views import CandidateSummary
from optimizer.fitness.aggregate import ItemScores
from optimizer.ports import Candidate, Evaluation, Failure, Lease
from optimizer.recipe import canonical_json
from optimizer.space import make_space
from optimizer.spec import JobSpec
from tests.factories import make_problem, make_spec

SPEC = make_spec()
SPACE = make_space(SPEC, make_problem(SPEC))
TTL = 600.0


def started(store: SqlStore, spec: JobSpec = SPEC, owner: str = "one") -> Lease:
    """Submit a job, claim it, start it."""
    job, _ = store.create_job(spec)
    lease = claimed(store, job.id, owner)
    store.start(lease, make_problem(spec))
    return lease


def claimed(store: SqlStore, job_id: str | None = None, owner: str = "one", ttl_s: float = TTL) -> Lease:
    """Claim a job that must be free; a lifetime of 0 is a lease that has expired already."""
    lease = store.claim(owner, ttl_s, job_id)
    assert lease is not None
    return lease


def candidate(index: int, **changes: Any) -> Candidate:
    """Return a candidate with a genome and recipe of its own."""
    genome = np.full(SPACE.dim, index / 1000 + 0.1)
    recipe = SPACE.recipe(genome)
    fields: dict[str, Any] = {
        "index": index,
        "generation": index // 4,
        "told": index,
        "origin": "algorithm",
        "label": None,
        "genome": genome,
        "recipe": recipe.to_json(),
        "fingerprint": recipe.fingerprint,
        "parents": (index - 1,) if index else (),
    }
    return Candidate(**(fields | changes))


def repeat(original: Candidate, index: int) -> Candidate:
    """Return a duplicate of a candidate."""
    return candidate(index, fingerprint=original.fingerprint, duplicate_of=original.index)


def propose(store: SqlStore, lease: Lease, count: int, first: int = 0, **changes: Any) -> list[Candidate]:
    """Record candidates ``first`` … ``first + count - 1``."""
    candidates = [candidate(index, **changes) for index in range(first, first + count)]
    store.add_candidates(lease, candidates)
    return candidates


def scored(index: int, values: Sequence[float], **changes: Any) -> Evaluation:
    """Return an outcome with values."""
    return Evaluation(index, tuple(values), **changes)


def failed(index: int) -> Evaluation:
    """Return an outcome without values."""
    return Evaluation(index, None, failure=Failure("worker_lost", "the node died"))


def items(values: Sequence[float], weights: Sequence[float] | None = None) -> ItemScores:
    """Return per-item scores."""
    return ItemScores(
        np.array(values, dtype=np.float32), None if weights is None else np.array(weights, dtype=np.float32)
    )


def everything(store: SqlStore, job_id: str) -> str:
    """Return all that can be seen of a job as one text, to show that nothing has changed."""
    page = store.list_candidates(job_id, limit=1000)
    views = [store.get_job(job_id), store.front(job_id), store.progression(job_id), *store.events(job_id, 0)]
    details = [store.get_candidate(job_id, item.index) for item in page.items]
    return canonical_json([view.model_dump(mode="json") for view in (page, *views, *details)])


def walk(store: SqlStore, job_id: str, limit: int, **options: Any) -> list[CandidateSummary]:
    """Return all pages of a list of candidates, joined."""
    found, cursor = [], None
    while True:
        page = store.list_candidates(job_id, cursor=cursor, limit=limit, **options)
        found += page.items
        assert len(page.items) <= limit
        if page.next_cursor is None:
            return found
        cursor = page.next_cursor
