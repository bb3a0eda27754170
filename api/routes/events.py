"""Events: a job's or everyone's, as a stream or as a list."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from starlette.concurrency import run_in_threadpool

from api.context import Context
from api.events import stream
from api.routes import examples
from api.routes.common import Deps, JobId, answers
from api.views import EventView
from optimizer.errors import InvalidInput, NotFound

router = APIRouter(tags=["events"])

_MAX_ID = 2**63 - 1

After = Annotated[int, Query(description="Only events with a higher id.", ge=0, le=_MAX_ID)]
LastEventId = Annotated[
    int | None,
    Header(description="What a reconnecting browser sends: the last id it got. Goes before `after`.", ge=0, le=_MAX_ID),
]
Follow = Annotated[bool, Query(description="Stream, and go on as things happen; false returns a JSON list.")]
Limit = Annotated[int, Query(description="Most events in a list; a stream has no limit.", ge=1, le=5000)]

_SSE_EXAMPLE = f"id: 42\nevent: {examples.EVENT.type}\ndata: {examples.EVENT.model_dump_json()}\n\n"
_DESCRIPTION = "Server-sent events, each with `id`, `event` (its type) and `data` (an `EventView`); or a list of them."


def _answers(*errors: type[InvalidInput | NotFound]) -> dict[int | str, dict[str, Any]]:
    out = answers(*errors, example=[examples.EVENT])
    out[200]["content"]["text/event-stream"] = {"schema": {"type": "string"}, "example": _SSE_EXAMPLE}
    return out


@router.get(
    "/events",
    summary="Events of all jobs",
    response_model=list[EventView],
    response_description=_DESCRIPTION,
    responses=_answers(InvalidInput),
)
async def list_events(
    context: Deps, after: After = 0, last_event_id: LastEventId = None, follow: Follow = True, limit: Limit = 500
) -> Any:
    """Follow what happens in all jobs. A stream resumes from `Last-Event-ID` (or `after`) without loss or repetition."""
    return await _events(context, None, _start(after, last_event_id), follow, limit)


@router.get(
    "/jobs/{job_id}/events",
    summary="Events of a job",
    response_model=list[EventView],
    response_description=_DESCRIPTION,
    responses=_answers(InvalidInput, NotFound),
)
async def list_job_events(
    job_id: JobId,
    context: Deps,
    after: After = 0,
    last_event_id: LastEventId = None,
    follow: Follow = True,
    limit: Limit = 500,
) -> Any:
    """Follow what happens in a job. A stream resumes from `Last-Event-ID` (or `after`) without loss or repetition."""
    await run_in_threadpool(context.store.get_job, job_id)  # an unknown job is a 404, not an empty stream
    return await _events(context, job_id, _start(after, last_event_id), follow, limit)


def _start(after: int, last_event_id: int | None) -> int:
    return after if last_event_id is None else last_event_id


async def _events(
    context: Context, job_id: str | None, after: int, follow: bool, limit: int
) -> Response | list[EventView]:
    if follow:
        return stream(context.store, job_id, after, context.settings.poll_s, context.stopping)
    return await run_in_threadpool(context.store.events, job_id, after, limit)
