"""The event log as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from api.store.ports import JobStore
from optimizer.errors import NotFound

PING_S = 15
RETRY_MS = 1000
FAREWELL_S = 5.0
"""Time for a stream to end by itself when the server stops, in seconds; less than the server's own grace."""


async def follow(
    store: JobStore, job_id: str | None, after: int, poll_s: float, stopping: asyncio.Event
) -> AsyncIterator[ServerSentEvent]:
    """Yield the events after id ``after``, then new ones as they come, until the server stops or the job is deleted.

    Args:
        job_id: whose events; None for all jobs'.
        poll_s: seconds between looks into the store while nothing happens.
        stopping: ends the stream when set.
    """
    # The first bytes tell the client that it is connected, even when nothing happens for long.
    yield ServerSentEvent(comment="connected", retry=RETRY_MS)
    while not stopping.is_set():
        try:
            batch = await run_in_threadpool(store.events, job_id, after)
        except NotFound:
            return
        for event in batch:
            yield ServerSentEvent(id=str(event.id), event=event.type, data=event.model_dump_json())
            after = event.id
        if not batch:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), poll_s)


def stream(
    store: JobStore, job_id: str | None, after: int, poll_s: float, stopping: asyncio.Event
) -> EventSourceResponse:
    """Return the response that streams `follow`, with a ping every `PING_S` seconds."""
    # Without the grace period, sse-starlette cuts streams off when it sees the signal before `stopping` is set.
    return EventSourceResponse(
        follow(store, job_id, after, poll_s, stopping), ping=PING_S, sep="\n", shutdown_grace_period=FAREWELL_S
    )
