"""Candidates: page, show, enqueue; the front and the best-so-far curve."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Query

from api.routes import examples
from api.routes.common import Cursor, Index, JobId, Limit, Store, answers
from api.store.ports import CandidateSort
from api.views import CandidateState, CandidateSummary, CandidateView, FrontView, Page, Progression, QueuedView
from optimizer.errors import Conflict, InvalidInput, NotFound, TooLarge
from optimizer.spec import CandidateInput

router = APIRouter(prefix="/jobs/{job_id}", tags=["candidates"])

CandidateBody = Annotated[
    CandidateInput,
    Body(
        openapi_examples={
            "by coefficients": {"value": {"label": "mine", "coefficients": {"language": 0.6, "polarity": 0.4}}},
            "by genome": {"value": {"genome": [0.6, 0.4]}},
        }
    ),
]


@router.get(
    "/candidates",
    summary="List candidates",
    response_description="A page of candidates.",
    responses=answers(NotFound, InvalidInput, example=Page[CandidateSummary](items=[examples.CANDIDATE_SUMMARY])),
)
def list_candidates(
    job_id: JobId,
    store: Store,
    sort: Annotated[CandidateSort, Query(description="Order; `-` is descending.")] = "index",
    objective: Annotated[
        str | None,
        Query(
            description="Name of the objective that the sorts by value go by.",
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        ),
    ] = None,
    on_front: Annotated[bool | None, Query(description="Only those on the front, or only the others.")] = None,
    partial: Annotated[
        bool | None, Query(description="Only those measured on some items, or only those measured on all.")
    ] = None,
    state: Annotated[CandidateState | None, Query(description="Only candidates in this state.")] = None,
    cursor: Cursor = None,
    limit: Limit = 100,
) -> Page[CandidateSummary]:
    """Return candidates.

    The sorts by value need `objective`, and leave out candidates without scores and those measured on some items only.
    """
    return store.list_candidates(
        job_id,
        sort=sort,
        objective=objective,
        on_front=on_front,
        partial=partial,
        state=state,
        cursor=cursor,
        limit=limit,
    )


@router.get(
    "/candidates/{index}",
    summary="Show a candidate",
    response_description="The candidate with its genome, recipe, parents and per-item scores.",
    responses=answers(NotFound, InvalidInput, example=examples.CANDIDATE),
)
def get_candidate(job_id: JobId, index: Index, store: Store) -> CandidateView:
    """Return one candidate."""
    return store.get_candidate(job_id, index)


@router.post(
    "/candidates",
    status_code=202,
    summary="Enqueue a candidate",
    response_description="Queued; the job evaluates it next.",
    responses=answers(NotFound, Conflict, InvalidInput, TooLarge, example=QueuedView(queued=3), status=202),
)
def enqueue_candidate(job_id: JobId, candidate: CandidateBody, store: Store) -> QueuedView:
    """Have a candidate of your own evaluated, before or while the job runs.

    The event `candidate.rejected` says so if it does not fit the job's search space.
    """
    return QueuedView(queued=store.enqueue(job_id, candidate))


@router.get(
    "/front",
    summary="The Pareto front",
    response_description="The front, the baselines and a sample of the dominated candidates.",
    responses=answers(NotFound, InvalidInput, example=examples.FRONT),
)
def get_front(
    job_id: JobId,
    store: Store,
    limit: Annotated[
        int, Query(description="Most dominated, and most partial, candidates to return.", ge=0, le=100_000)
    ] = 2000,
) -> FrontView:
    """Return the non-dominated candidates with all that is needed to draw them."""
    return store.front(job_id, limit)


@router.get(
    "/progression",
    summary="The best-so-far curve",
    response_description="Best value of each objective at every candidate that improved one.",
    responses=answers(NotFound, InvalidInput, example=examples.PROGRESSION),
)
def get_progression(job_id: JobId, store: Store) -> Progression:
    """Return how the best value of each objective grew."""
    return store.progression(job_id)
