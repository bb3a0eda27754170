"""Exports: write a candidate as a checkpoint, and how far that is."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body
from pydantic import Field

from api.routes import examples
from api.routes.common import ExportId, JobId, Store, answers
from api.views import ExportOptions, ExportView
from optimizer.errors import Conflict, InvalidInput, NotFound, TooLarge

router = APIRouter(tags=["exports"])


class ExportInput(ExportOptions):
    """What to export."""

    candidate: int = Field(ge=0, lt=2**31, description="The candidate's number in the job.", examples=[17])
    head: str | None = Field(
        default=None,
        max_length=64,
        description="Name of the expert whose head the checkpoint gets; none leaves out the heads.",
        examples=["language"],
    )


ExportBody = Annotated[
    ExportInput, Body(openapi_examples={"with a head": {"value": {"candidate": 17, "head": "language"}}})
]


@router.post(
    "/jobs/{job_id}/exports",
    status_code=202,
    summary="Export a candidate",
    response_description="The export, queued.",
    responses=answers(NotFound, Conflict, InvalidInput, TooLarge, example=examples.EXPORT, status=202),
)
def create_export(job_id: JobId, body: ExportBody, store: Store) -> ExportView:
    """Write an evaluated candidate as a Hugging Face checkpoint; the event `export.progress` says how far it is."""
    spec = store.get_job(job_id).spec
    if spec["base"] is None:
        raise InvalidInput(
            "the job's models stand behind services: there are no weights to write",
            field="candidate",
            remedy="take the recipe from the candidate's page",
        )
    experts = [expert["name"] for expert in spec["experts"]]
    if body.head is not None and body.head not in experts:
        raise InvalidInput(
            f"{body.head!r} is no expert of the job", field="head", remedy=f"use one of: {', '.join(experts)}"
        )
    options = ExportOptions.model_validate(body.model_dump(include=set(ExportOptions.model_fields)))
    return store.create_export(job_id, body.candidate, body.head, options)


@router.get(
    "/jobs/{job_id}/exports",
    summary="List a job's exports",
    response_description="The job's exports, newest first.",
    responses=answers(NotFound, InvalidInput, example=[examples.EXPORT]),
)
def list_exports(job_id: JobId, store: Store) -> list[ExportView]:
    """Return a job's exports, newest first."""
    return store.list_exports(job_id)


@router.get(
    "/exports/{export_id}",
    summary="Show an export",
    response_description="The export with its progress, and its path once completed.",
    responses=answers(NotFound, InvalidInput, example=examples.EXPORT),
)
def get_export(export_id: ExportId, store: Store) -> ExportView:
    """Return one export."""
    return store.get_export(export_id)
