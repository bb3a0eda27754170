"""Jobs: submit, validate, list, show, steer, clone, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Response
from pydantic import Field

from api import warm_starts
from api.context import Context
from api.routes import examples
from api.routes.common import Cursor, Deps, JobId, Limit, Store, answers
from api.views import JobSummary, JobView, Page, PlannedPhaseView, ValidationView
from optimizer.errors import Conflict, InvalidInput, NotFound, TooLarge
from optimizer.phases import plan
from optimizer.ports import JobState
from optimizer.space import make_space
from optimizer.spec import JobSpec, RaisedBudget, Strict, parse_spec

router = APIRouter(tags=["jobs"])

_YAML: dict[str, Any] = {
    "requestBody": {"content": {"application/yaml": {"schema": {"$ref": "#/components/schemas/JobSpec"}}}}
}

SpecBody = Annotated[JobSpec, Body(openapi_examples={"three word tasks": {"value": examples.SPEC}})]
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Any text of your own. A request that repeats it gets the first one's job instead of a new one.",
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        examples=["9d2f6f0e-6a53-4c55-8c0b-0b8a3b8c9e55"],
    ),
]


class ResumeInput(Strict):
    """What a job goes on with."""

    budget: RaisedBudget | None = Field(
        default=None,
        description="What it may spend in all from now on, where it paused because a budget was spent.",
        examples=[{"money": 20}],
    )


_AS_BEFORE = ResumeInput()


class CloneInput(Strict):
    """What a clone has otherwise."""

    changes: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Parts of a job spec that replace the original's, merged deeply (RFC 7396): objects are merged, anything else "
            "replaces, and null puts a field back to its default."
        ),
        examples=[{"name": "again, longer", "budget": {"evaluations": 500}}],
    )


@router.post(
    "/jobs",
    status_code=201,
    summary="Submit a job",
    response_description="The new job, queued.",
    responses={
        **answers(InvalidInput, Conflict, TooLarge, example=examples.JOB, status=201),
        200: {"model": JobView, "description": "The job that an earlier request with this Idempotency-Key made."},
    },
    openapi_extra=_YAML,
)
def submit_job(spec: SpecBody, context: Deps, response: Response, idempotency_key: IdempotencyKey = None) -> JobView:
    """Check the checkpoints and the data, and queue a search.

    Nothing is recorded unless everything fits together. The best candidates of `warm_starts.jobs` are taken over now, as
    recipes among `warm_starts.candidates`. With an `Idempotency-Key` the request may be repeated safely;
    the same key with another spec is a conflict.
    """
    problem = context.inspect(spec)
    return _create(warm_starts.resolve(spec, problem, context.store), context, response, idempotency_key)


@router.post(
    "/jobs/validate",
    summary="Validate a job spec",
    response_description="The spec is valid: its defaults, the compatibility report and the size of its search space.",
    responses=answers(InvalidInput, TooLarge, example=examples.VALIDATION),
    openapi_extra=_YAML,
)
def validate_job(spec: SpecBody, context: Deps) -> ValidationView:
    """Do all the checks of a submission and record nothing."""
    problem = context.inspect(spec)
    warm_starts.resolve(spec, problem, context.store)
    space = make_space(spec, problem)
    return ValidationView(
        spec=spec.model_dump(mode="json"),
        findings=problem.findings,
        variables=space.dim,
        groups=list(space.axes[0]),
        columns=list(space.axes[1]),
        phases=[PlannedPhaseView.of(phase) for phase in problem.phases or plan(spec, problem)],
        estimate={part: amount * spec.budget.evaluations for part, amount in problem.estimate.items()},
    )


@router.get(
    "/jobs",
    summary="List jobs",
    response_description="A page of jobs, newest first.",
    responses=answers(InvalidInput, example=Page[JobSummary](items=[examples.JOB_SUMMARY])),
)
def list_jobs(
    store: Store,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    name: Annotated[
        str | None, Query(description="Only jobs whose name contains this.", max_length=200, pattern=r"^[^\x00]*$")
    ] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Page[JobSummary]:
    """Return jobs, newest first."""
    return store.list_jobs(state=state, name=name, cursor=cursor, limit=limit)


@router.get(
    "/jobs/{job_id}",
    summary="Show a job",
    response_description="The job with its spec, search space and compatibility report.",
    responses=answers(NotFound, InvalidInput, example=examples.JOB),
)
def get_job(job_id: JobId, store: Store) -> JobView:
    """Return one job."""
    return store.get_job(job_id)


@router.delete(
    "/jobs/{job_id}",
    status_code=204,
    summary="Delete a job",
    response_description="The job and all that belongs to it is gone.",
    responses=answers(NotFound, Conflict, InvalidInput),
)
def delete_job(job_id: JobId, store: Store) -> None:
    """Delete a job with its candidates, events and exports' records. A running job has to be cancelled first."""
    store.delete_job(job_id)


_STEERING = answers(NotFound, Conflict, InvalidInput, example=examples.JOB, status=202)


@router.post(
    "/jobs/{job_id}/pause",
    status_code=202,
    summary="Pause a job",
    response_description="The job; it pauses within one evaluation.",
    responses=_STEERING,
)
def pause_job(job_id: JobId, store: Store) -> JobView:
    """Ask a job to pause. Evaluations under way are finished and recorded."""
    return store.request(job_id, "pause")


@router.post(
    "/jobs/{job_id}/resume",
    status_code=202,
    summary="Resume a job",
    response_description="The job; a controller takes it up as soon as one is free.",
    responses=answers(NotFound, Conflict, InvalidInput, TooLarge, example=examples.JOB, status=202),
)
def resume_job(job_id: JobId, store: Store, body: ResumeInput = _AS_BEFORE) -> JobView:
    """Ask a paused job to go on where it stopped; one that spent its budget, with another one."""
    return store.request(job_id, "run", body.budget)


@router.post(
    "/jobs/{job_id}/cancel",
    status_code=202,
    summary="Cancel a job",
    response_description="The job; it ends within one evaluation.",
    responses=_STEERING,
)
def cancel_job(job_id: JobId, store: Store) -> JobView:
    """Ask a job to end for good. What it found stays."""
    return store.request(job_id, "cancel")


@router.post(
    "/jobs/{job_id}/clone",
    status_code=201,
    summary="Clone a job",
    response_description="The new job, queued.",
    responses={
        **answers(NotFound, InvalidInput, Conflict, TooLarge, example=examples.JOB, status=201),
        200: {"model": JobView, "description": "The job that an earlier request with this Idempotency-Key made."},
    },
)
def clone_job(
    job_id: JobId, body: CloneInput, context: Deps, response: Response, idempotency_key: IdempotencyKey = None
) -> JobView:
    """Submit a job like this one, with changes."""
    spec = parse_spec(merge_patch(context.store.get_job(job_id).spec, body.changes))
    spec = warm_starts.resolve(spec, context.inspect(spec), context.store)
    return _create(spec, context, response, idempotency_key, cloned_from=job_id)


def merge_patch(target: Any, patch: Any) -> Any:
    """Return ``target`` with ``patch`` merged into it (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    out = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merge_patch(out.get(key), value)
    return out


def _create(
    spec: JobSpec, context: Context, response: Response, key: str | None, cloned_from: str | None = None
) -> JobView:
    job, created = context.store.create_job(spec, key, cloned_from)
    if not created:
        response.status_code = 200
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    return job
