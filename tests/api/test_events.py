"""Event streams over a real connection: nothing is lost, nothing comes twice, and they end when they should."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from httpx_sse import EventSource, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.types import Message

from api import events as events_module
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import EventView, JobView
from tests.api.conftest import Runner, fill, running
from tests.api.test_errors import check_error


@contextmanager
def stream(http: httpx.Client, path: str, **options: dict[str, str]) -> Iterator[Iterator[ServerSentEvent]]:
    """Open an event stream."""
    with http.stream("GET", path, **options) as response:  # type: ignore[arg-type]
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        yield (sse for sse in EventSource(response).iter_sse() if sse.data)


def take(events: Iterator[ServerSentEvent], count: int) -> list[EventView]:
    """Return the next ``count`` events of a stream, each checked against its own headers."""
    out = []
    for sse in events:
        event = EventView.model_validate_json(sse.data)
        assert (sse.id, sse.event) == (str(event.id), event.type)
        out.append(event)
        if len(out) == count:
            break
    return out


@pytest.mark.parametrize("path", ["/jobs/{}/events", "/events"])
def test_a_stream_tells_the_whole_log(http: httpx.Client, store: SqlStore, job: JobView, path: str) -> None:
    log = store.events(job.id, 0)
    with stream(http, path.format(job.id)) as events:
        assert take(events, len(log)) == log


@pytest.mark.parametrize("path", ["/jobs/{}/events", "/events"])
def test_it_resumes_at_every_point_without_loss_or_repetition(
    http: httpx.Client, store: SqlStore, job: JobView, path: str
) -> None:
    log = store.events(job.id, 0)
    for place, last in enumerate(log[:-1]):
        for options in ({"headers": {"Last-Event-ID": str(last.id)}}, {"params": {"after": str(last.id)}}):
            with stream(http, path.format(job.id), **options) as events:
                assert take(events, len(log) - place - 1) == log[place + 1 :]


def test_last_event_id_goes_before_after(http: httpx.Client, store: SqlStore, job: JobView) -> None:
    log = store.events(job.id, 0)
    with stream(
        http, f"/jobs/{job.id}/events", headers={"Last-Event-ID": str(log[-2].id)}, params={"after": "0"}
    ) as events:
        assert take(events, 1) == log[-1:]


def test_events_arrive_while_they_happen(http: httpx.Client, store: SqlStore, queued: JobView) -> None:
    with stream(http, f"/jobs/{queued.id}/events") as events:
        assert take(events, 1)[0].data["state"] == "queued"
        runner = Runner(store, queued.id)
        assert take(events, 1)[0].data["state"] == "running"
        for number in range(5):
            index = runner.propose()[0]
            runner.score(index, 0.5 + number / 100, 0.5)
            proposed, evaluated = take(events, 2)
            assert (proposed.type, proposed.data["first"]) == ("candidates.proposed", index)
            assert (evaluated.type, evaluated.data["index"]) == ("candidate.evaluated", index)
            assert evaluated.data["progress"]["completed"] == number + 1
        runner.finish()
        assert take(events, 1)[0].data["state"] == "completed"


def test_a_broken_connection_resumed_again_and_again_while_a_job_runs(
    http: httpx.Client, store: SqlStore, queued: JobView
) -> None:
    """A reader that is cut off after every second event ends up with exactly the log."""
    runner = Runner(store, queued.id)

    def run() -> None:
        for _ in range(20):
            runner.score(runner.propose()[0], 0.5, 0.5)
        runner.finish()

    thread = threading.Thread(target=run)
    thread.start()
    seen: list[EventView] = []
    while len(seen) < 43:  # queued, running, 20 proposed, 20 evaluated, completed
        last = {"Last-Event-ID": str(seen[-1].id)} if seen else {}
        with stream(http, f"/jobs/{queued.id}/events", headers=last) as events:
            seen += take(events, min(2, 43 - len(seen)))
    thread.join()
    assert seen == store.events(queued.id, 0)


def test_events_of_one_job_only(http: httpx.Client, store: SqlStore, job: JobView) -> None:
    other = fill(store, name="other")
    with stream(http, f"/jobs/{other.id}/events") as events:
        assert {event.job_id for event in take(events, 5)} == {other.id}


def test_as_a_list(http: httpx.Client, store: SqlStore, job: JobView) -> None:
    log = store.events(job.id, 0)
    for path in (f"/jobs/{job.id}/events", "/events"):
        response = http.get(path, params={"follow": False})
        assert response.headers["content-type"] == "application/json"
        assert [EventView.model_validate(event) for event in response.json()] == log
        part = http.get(path, params={"follow": False, "after": log[2].id, "limit": 2}).json()
        assert [event["id"] for event in part] == [log[3].id, log[4].id]
        assert http.get(path, params={"follow": False, "after": log[-1].id}).json() == []


@pytest.mark.parametrize("value", ["-1", "x", str(2**63)])
def test_a_malformed_id(http: httpx.Client, job: JobView, value: str) -> None:
    for options in ({"headers": {"Last-Event-ID": value}}, {"params": {"after": value}}):
        response = http.get(f"/jobs/{job.id}/events", **options)  # type: ignore[arg-type]
        check_error(response, 422, "invalid_input")


def test_an_unknown_job(http: httpx.Client) -> None:
    check_error(http.get("/jobs/0000/events"), 404, "not_found")
    check_error(http.get("/jobs/0000/events?follow=false"), 404, "not_found")


def test_pings_keep_a_silent_connection_alive(
    http: httpx.Client, job: JobView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_module, "PING_S", 0.05)
    with http.stream("GET", f"/jobs/{job.id}/events", params={"after": 10**6}) as response:
        pings = 0
        for line in response.iter_lines():
            assert not line.startswith("data")
            pings += line.startswith(": ping")
            if pings == 3:
                break
    assert events_module.PING_S == 0.05


def test_it_ends_when_the_job_is_deleted(http: httpx.Client, store: SqlStore, job: JobView) -> None:
    log = store.events(job.id, 0)
    with stream(http, f"/jobs/{job.id}/events") as events:
        take(events, len(log))
        store.delete_job(job.id)
        assert list(events) == []


def test_it_ends_when_the_server_stops(settings: Settings, store: SqlStore, job: JobView) -> None:
    with (
        running(store, settings) as service,
        service.http() as http,
        stream(http, f"/jobs/{job.id}/events") as events,
    ):
        take(events, 1)
        stopper = threading.Thread(target=service.stop)
        stopper.start()
        rest = list(events)
        stopper.join(timeout=5)  # half the grace that uvicorn gives open connections before it cuts them
        assert not stopper.is_alive()
    assert len(rest) == len(store.events(job.id, 0)) - 1


class _Counting(SqlStore):
    """A store that counts how often events are asked for."""

    calls = 0

    def events(self, job_id: str | None, after: int, limit: int = 500) -> list[EventView]:
        """Count, and read the log."""
        self.calls += 1
        return super().events(job_id, after, limit)


def test_nothing_goes_on_after_the_client_has_left(settings: Settings, sqlite_url: str, job: JobView) -> None:
    store = _Counting(sqlite_url)
    with running(store, settings) as service:
        with service.http() as http:
            for _ in range(5):
                with stream(http, f"/jobs/{job.id}/events") as events:
                    take(events, 3)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            before = store.calls
            time.sleep(10 * settings.poll_s)
            if store.calls == before:
                break
        assert store.calls == before
    store.close()


def test_a_stream_is_not_cut_off_when_the_signal_is_seen_before_the_server_stops(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sse-starlette notices SIGTERM by itself, now and then before the server says that it stops."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def serve() -> None:
        stopping = asyncio.Event()
        scope = {"type": "http", "method": "GET"}
        response = events_module.stream(store, None, 0, 0.01, stopping)
        running = asyncio.create_task(response(scope, asyncio.Event().wait, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        stopping.set()
        await running

    monkeypatch.setattr(AppStatus, "should_exit", True)
    asyncio.run(serve())
    assert sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
