"""The Python client, sync and async: a method for every route, the server's views as answers, its errors as exceptions.

::

    with Client("http://127.0.0.1:8756") as client:
        job = client.submit(spec)
        for event in client.watch(job.id):
            ...
        best = client.front(job.id).front[0]

`AsyncClient` has the same methods; each is awaited, and `watch`, `jobs` and `candidates` are iterated with ``async for``.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

import httpx
from httpx_sse import EventSource, ServerSentEvent
from pydantic import ValidationError

from api import calls
from api.calls import Call
from api.errors import rebuild
from api.settings import load_settings
from api.views import ErrorBody, ErrorView, EventView, ExportView, JobView, Page
from optimizer.errors import MergeoptError, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

FINAL_STATES = frozenset({"completed", "failed", "cancelled"})
_END_OF_EXPORT = frozenset({"completed", "failed"})
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
# A stream is silent for as long as nothing happens, but the server pings every 15 s.
_STREAM_TIMEOUT = httpx.Timeout(60.0, connect=5.0, read=45.0)
_RETRY_S = 0.5
_POLL_S = 0.3


class Endpoint(Generic[P, T]):
    """Makes a call into a method of both clients: one that returns its answer, and one that is awaited for it."""

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self.build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, client: Client, owner: type[Client]) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type[AsyncClient]) -> Callable[P, Awaitable[T]]: ...
    @overload
    def __get__(self, client: None, owner: type[_Routes]) -> Self: ...

    def __get__(self, client: Client | AsyncClient | None, owner: type[Any]) -> Any:
        if client is None:
            return self

        @functools.wraps(self.build)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.send(self.build(*args, **kwargs))

        return method


class Listing(Generic[P, T]):
    """Makes a call that answers with pages into a method of both clients that iterates over all items, page by page."""

    def __init__(self, build: Callable[P, Call[Page[T]]]) -> None:
        self.build = build
        self.__doc__ = f"{build.__doc__} Iterates over all pages, each fetched when it is needed."

    @overload
    def __get__(self, client: Client, owner: type[Client]) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type[AsyncClient]) -> Callable[P, AsyncIterator[T]]: ...
    @overload
    def __get__(self, client: None, owner: type[_Routes]) -> Self: ...

    def __get__(self, client: Client | AsyncClient | None, owner: type[Any]) -> Any:
        if client is None:
            return self

        @functools.wraps(self.build)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.iterate(self.build(*args, **kwargs))

        return method


class _Routes:
    """A method for every route; see `api.calls` for what each takes."""

    submit = Endpoint(calls.submit)
    validate = Endpoint(calls.validate)
    list_jobs = Endpoint(calls.list_jobs)
    jobs = Listing(calls.list_jobs)
    get_job = Endpoint(calls.get_job)
    delete_job = Endpoint(calls.delete_job)
    pause = Endpoint(calls.pause)
    resume = Endpoint(calls.resume)
    cancel = Endpoint(calls.cancel)
    clone = Endpoint(calls.clone)
    list_candidates = Endpoint(calls.list_candidates)
    candidates = Listing(calls.list_candidates)
    get_candidate = Endpoint(calls.get_candidate)
    enqueue = Endpoint(calls.enqueue)
    front = Endpoint(calls.front)
    progression = Endpoint(calls.progression)
    events = Endpoint(calls.events)
    export = Endpoint(calls.export)
    list_exports = Endpoint(calls.list_exports)
    get_export = Endpoint(calls.get_export)
    algorithms = Endpoint(calls.algorithms)
    spaces = Endpoint(calls.spaces)
    operators = Endpoint(calls.operators)
    evaluators = Endpoint(calls.evaluators)
    graders = Endpoint(calls.graders)
    job_schema = Endpoint(calls.job_schema)
    health = Endpoint(calls.health)
    ready = Endpoint(calls.ready)
    server_version = Endpoint(calls.server_version)

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        settings = load_settings(url=url, token=token)
        self.url = settings.url.rstrip("/")
        secret = settings.token.get_secret_value() if settings.token else None
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {secret}"} if secret else {},
            "timeout": _TIMEOUT,
        }


class Client(_Routes):
    """The sync client. Safe to share between threads; close it, or use it in ``with``.

    Args:
        url: of the service; MERGEOPT_URL or http://127.0.0.1:8756 by default.
        token: access token; MERGEOPT_TOKEN by default.

    Raises (every method):
        MergeoptError: the class of `optimizer.errors` that the server answered with; `Unavailable` without an answer.
    """

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        super().__init__(url, token)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """Make a call and return its answer."""
        try:
            response = self._http.send(self._http.build_request(**call.request()))
        except httpx.TransportError as error:
            raise _unreachable(self.url, error) from error
        return _answer(call, response)

    def iterate(self, call: Call[Page[T]]) -> Iterator[T]:
        """Iterate over the items of all pages."""
        page = self.send(call)
        yield from page.items
        while page.next_cursor:
            page = self.send(call.after(page.next_cursor))
            yield from page.items

    def watch(self, job_id: str | None = None, after: int = 0) -> Iterator[EventView]:
        """Iterate over the events after id ``after`` as they come; reconnects where it stopped when a connection breaks.

        Args:
            job_id: ends after the event with which this job ends; None follows all jobs and never ends.
            after: id of the last event that is known already.
        """
        feed = _Feed(job_id, after)
        while True:
            try:
                if job_id is not None and self.get_job(job_id).state in FINAL_STATES:
                    break
                with self._http.stream(**feed.request()) as response:
                    if not response.is_success:
                        response.read()
                    feed.connected(response)
                    for sse in EventSource(response).iter_sse():
                        yield from feed.take(sse)
                        if feed.has_ended():
                            break
            except (httpx.TransportError, Unavailable) as error:
                feed.dropped(error)
                time.sleep(_RETRY_S)
        while rest := self.events(job_id, after=feed.last):
            yield from feed.known(rest)

    def wait(self, job_id: str) -> JobView:
        """Wait until a job has ended, and return it."""
        job = self.get_job(job_id)
        if job.state not in FINAL_STATES:
            for _ in self.watch(job_id):
                pass
            job = self.get_job(job_id)
        return job

    def wait_export(self, export_id: str) -> ExportView:
        """Wait until an export has ended, and return it."""
        *_, export = self.watch_export(export_id)
        return export

    def watch_export(self, export_id: str) -> Iterator[ExportView]:
        """Iterate over an export as it goes on; the last one has ended."""
        while True:
            export = self.get_export(export_id)
            yield export
            if export.state in _END_OF_EXPORT:
                return
            time.sleep(_POLL_S)


class AsyncClient(_Routes):
    """The async client; takes and raises what `Client` does."""

    def __init__(self, url: str | None = None, token: str | None = None) -> None:
        super().__init__(url, token)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """Make a call and return its answer."""
        try:
            response = await self._http.send(self._http.build_request(**call.request()))
        except httpx.TransportError as error:
            raise _unreachable(self.url, error) from error
        return _answer(call, response)

    async def iterate(self, call: Call[Page[T]]) -> AsyncIterator[T]:
        """Iterate over the items of all pages."""
        page = await self.send(call)
        for item in page.items:
            yield item
        while page.next_cursor:
            page = await self.send(call.after(page.next_cursor))
            for item in page.items:
                yield item

    async def watch(self, job_id: str | None = None, after: int = 0) -> AsyncIterator[EventView]:
        """Iterate over events as `Client.watch` does."""
        feed = _Feed(job_id, after)
        while True:
            try:
                if job_id is not None and (await self.get_job(job_id)).state in FINAL_STATES:
                    break
                async with self._http.stream(**feed.request()) as response:
                    if not response.is_success:
                        await response.aread()
                    feed.connected(response)
                    async for sse in EventSource(response).aiter_sse():
                        for event in feed.take(sse):
                            yield event
                        if feed.has_ended():
                            break
            except (httpx.TransportError, Unavailable) as error:
                feed.dropped(error)
                await asyncio.sleep(_RETRY_S)
        while rest := await self.events(job_id, after=feed.last):
            for event in feed.known(rest):
                yield event

    async def wait(self, job_id: str) -> JobView:
        """Wait until a job has ended, and return it."""
        job = await self.get_job(job_id)
        if job.state not in FINAL_STATES:
            async for _ in self.watch(job_id):
                pass
            job = await self.get_job(job_id)
        return job

    async def wait_export(self, export_id: str) -> ExportView:
        """Wait until an export has ended, and return it."""
        return [export async for export in self.watch_export(export_id)][-1]

    async def watch_export(self, export_id: str) -> AsyncIterator[ExportView]:
        """Iterate over an export as it goes on; the last one has ended."""
        while True:
            export = await self.get_export(export_id)
            yield export
            if export.state in _END_OF_EXPORT:
                return
            await asyncio.sleep(_POLL_S)


class _Feed:
    """Where an event stream stands: what came last, and whether the connection is worth another try."""

    MAX_FAILURES = 120

    def __init__(self, job_id: str | None, after: int) -> None:
        self.job_id = job_id
        self.last = after
        self._state: str | None = None
        self._failures: int | None = None  # in a row; None before the first connection

    def request(self) -> dict[str, Any]:
        """Return the arguments of an httpx client's ``stream``."""
        return {
            "method": "GET",
            "url": calls.PREFIX + calls.events_path(self.job_id),
            "headers": {"Accept": "text/event-stream", "Last-Event-ID": str(self.last)},
            "timeout": _STREAM_TIMEOUT,
        }

    def connected(self, response: httpx.Response) -> None:
        """Note that a connection was made, or raise what the server answered."""
        _check(response)
        self._failures, self._state = 0, None

    def take(self, sse: ServerSentEvent) -> Iterator[EventView]:
        """Yield the event that was received, unless it is a comment."""
        if sse.data:
            yield from self.known([EventView.model_validate_json(sse.data)])

    def known(self, events: list[EventView]) -> Iterator[EventView]:
        """Yield events, and note where the stream stands now."""
        for event in events:
            self.last = event.id
            self._state = event.data.get("state") if event.type == "job.state" else self._state
            yield event

    def has_ended(self) -> bool:
        """Whether the last event says that the job has ended. A failed job may have been resumed since: look at it."""
        return self.job_id is not None and self._state in FINAL_STATES

    def dropped(self, error: httpx.TransportError | Unavailable) -> None:
        """Count a connection that broke; raises if there never was one, or after too many failures in a row."""
        if self._failures is None or self._failures >= self.MAX_FAILURES:
            raise error if isinstance(error, Unavailable) else _unreachable(str(error.request.url), error)
        self._failures += 1


def _unreachable(url: str, error: httpx.TransportError) -> Unavailable:
    what = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
    return Unavailable(f"{url} {what}", remedy="start the service with `mergeopt serve`, or give another --url")


def _answer(call: Call[T], response: httpx.Response) -> T:
    _check(response)
    try:
        return call.parse(response.content)
    except ValidationError as error:
        raise MergeoptError(
            f"{response.request.url} answered with something else than this client expects",
            remedy="is it mergeopt, and of the same version?",
        ) from error


def _check(response: httpx.Response) -> None:
    """Raise what the server answered, unless it is a success."""
    if response.is_success:
        return
    try:
        body = ErrorView.model_validate_json(response.content).error
    except ValidationError:
        body = ErrorBody(
            code=f"http_{response.status_code}",
            message=f"{response.request.url} answered {response.status_code} {response.reason_phrase}".strip(),
            remedy="is it mergeopt?",
        )
    raise rebuild(body, response.status_code)
