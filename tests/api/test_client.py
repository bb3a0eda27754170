"""The Python client, sync and async, against a real server."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from api.client import AsyncClient, Client
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import CandidateSummary, EventView, JobSummary, JobView
from optimizer.errors import (
    Conflict,
    InvalidCheckpoint,
    InvalidProblems,
    MergeoptError,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from tests.api.conftest import Runner, Service, fill, running, spec_json
from tests.factories import make_spec


def run_to_the_end(store: SqlStore, job_id: str, count: int = 3) -> threading.Thread:
    """Run a job in another thread."""
    runner = Runner(store, job_id)

    def run() -> None:
        for _ in range(count):
            runner.score(runner.propose()[0], 0.5, 0.5)
        runner.finish()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_the_life_of_a_job(client: Client, store: SqlStore) -> None:
    validation = client.validate(make_spec())
    assert (validation.valid, validation.variables) == (True, 8)

    job = client.submit(make_spec(), idempotency_key="k")
    assert client.submit(spec_json(), idempotency_key="k") == job
    assert client.pause(job.id).state == "paused"
    assert client.resume(job.id, {"money": 5}).state == "queued"
    assert client.get_job(job.id).spec["budget"]["money"] == 5
    queued = client.enqueue(job.id, {"coefficients": {"language": 1}})
    assert queued.queued == client.events(job.id)[-1].data["queued"]

    thread = run_to_the_end(store, job.id)
    assert client.wait(job.id).state == "completed"
    thread.join()
    assert [candidate.index for candidate in client.candidates(job.id)] == [0, 1, 2]
    assert client.get_candidate(job.id, 1).values == [0.5, 0.5]
    assert client.front(job.id, limit=10).total == 3
    assert client.progression(job.id).best == [[0.5, 0.5]]

    export = client.export(job.id, 1, head="language")
    assert client.get_export(export.id) == export
    assert client.list_exports(job.id) == [export]

    clone = client.clone(job.id, {"budget": {"evaluations": 7}})
    assert (clone.progress.budget, clone.cloned_from) == (7, job.id)
    assert client.cancel(clone.id).state == "cancelled"
    client.delete_job(clone.id)
    assert [summary.id for summary in client.jobs()] == [job.id]


def test_the_life_of_a_job_async(service: Service, store: SqlStore) -> None:
    async def live() -> None:
        async with AsyncClient(service.url) as client:
            job = await client.submit(make_spec())
            thread = run_to_the_end(store, job.id)
            types = [event.type async for event in client.watch(job.id)]
            assert types.count("candidate.evaluated") == 3
            assert (await client.wait(job.id)).state == "completed"
            thread.join()
            assert [candidate.index async for candidate in client.candidates(job.id, limit=2)] == [0, 1, 2]
            assert (await client.get_candidate(job.id, 2)).index == 2
            export = await client.export(job.id, 1)
            assert await client.list_exports(job.id) == [export]
            await client.delete_job(job.id)
            with pytest.raises(NotFound):
                await client.get_job(job.id)

    asyncio.run(live())


def test_catalog_and_service(client: Client) -> None:
    assert {algorithm.name for algorithm in client.algorithms()} >= {"cma_es", "nsga2", "random"}
    assert "layer_swap" in {space.name for space in client.spaces()}
    assert "ties" in {operator.name for operator in client.operators()}
    assert "causal_lm" in {evaluator.name for evaluator in client.evaluators()}
    assert {grader.name: grader.direction for grader in client.graders()}["exact_match"] == "maximise"
    assert client.job_schema()["title"] == "JobSpec"
    assert (client.health().status, client.ready().status, client.server_version().api) == ("ok", "ok", "v1")


def test_every_route_has_a_method_of_both_clients(service: Service) -> None:
    """Each method was built for one route; together they are all routes."""
    import re

    from api import calls
    from api.app import route_table
    from api.client import Endpoint

    arguments = {
        "job_id": "ID",
        "index": 7,
        "export_id": "ID",
        "spec": {},
        "candidate": {},
        "changes": {},
        "budget": {},
    }
    built = {("GET", "/api/v1/events")}  # one method serves this route and the job's own
    for name, endpoint in vars(Client.__mro__[1]).items():
        if isinstance(endpoint, Endpoint):
            needed = [
                arguments[parameter.name]
                for parameter in inspect.signature(endpoint.build).parameters.values()
                if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ]
            call = endpoint.build(*needed)
            assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__
            built.add((call.method, calls.PREFIX + call.path))
    routes = {
        (method, re.sub("{index}", "7", re.sub("{(job|export)_id}", "ID", path)))
        for method, path, _ in route_table(service.app)
    }
    assert built == routes


ERRORS: list[tuple[type[MergeoptError], str, Callable[[Any, str], Any]]] = [
    (NotFound, "job_id", lambda client, job: client.get_job("0000")),
    (Conflict, "", lambda client, job: client.pause(job)),
    (Conflict, "", lambda client, job: client.export(job, 3)),
    (InvalidProblems, "name", lambda client, job: client.submit(spec_json() | {"name": "", "seed": -1})),
    (InvalidCheckpoint, "experts.0", lambda client, job: client.submit(_missing())),
    (TooLarge, "body", lambda client, job: client.submit(spec_json() | {"name": "x" * 10_000_000})),
    (NotFound, "", lambda client, job: client.get_job("../../health")),
    (NotFound, "", lambda client, job: client.get_candidate(job, 99)),
]


def _missing() -> dict[str, Any]:
    spec = spec_json()
    spec["experts"][0]["path"] = "missing"
    return spec


@pytest.mark.parametrize(("cls", "field", "act"), ERRORS)
def test_errors_are_raised_as_their_classes(
    service: Service, job: JobView, cls: type[MergeoptError], field: str, act: Callable[[Any, str], Any]
) -> None:
    with Client(service.url) as client, pytest.raises(MergeoptError) as caught:
        act(client, job.id)
    _check_error(caught.value, cls, field)

    async def acted() -> None:
        async with AsyncClient(service.url) as client:
            answer: Awaitable[Any] = act(client, job.id)
            await answer

    with pytest.raises(MergeoptError) as caught:
        asyncio.run(acted())
    _check_error(caught.value, cls, field)


def _check_error(error: MergeoptError, cls: type[MergeoptError], field: str) -> None:
    if field == "" and cls is NotFound and error.code == "invalid_input":
        return  # an id that no job can have is refused before it is looked for
    assert type(error) is cls
    assert not field or error.field == field


def test_tokens(store: SqlStore, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = store.create_token("test")[1]
    with running(store, settings.model_copy(update={"require_token": "always"})) as service:
        with Client(service.url, secret) as client:
            assert list(client.jobs()) == []
        monkeypatch.setenv("MERGEOPT_URL", f"{service.url}/")
        with Client() as client, pytest.raises(Unauthorized):
            client.list_jobs()
        monkeypatch.setenv("MERGEOPT_TOKEN", secret)
        with Client() as client:
            assert client.list_jobs().items == []


def test_no_server() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client:
        for act in (client.list_jobs, lambda: list(client.watch()), lambda: list(client.watch("0000"))):
            with pytest.raises(Unavailable) as caught:
                act()
            assert url in caught.value.message
            assert "mergeopt serve" in (caught.value.remedy or "")


def test_a_server_that_is_something_else(service: Service) -> None:
    with Client(f"{service.url}/ui") as client, pytest.raises(NotFound):
        client.list_jobs()


def test_pages_are_fetched_when_they_are_needed(client: Client, store: SqlStore, job: JobView) -> None:
    def indices(**options: Any) -> list[int]:
        found: list[CandidateSummary] = list(client.candidates(job.id, **options))
        return [candidate.index for candidate in found]

    assert indices(limit=2) == [0, 1, 2, 3, 4]
    assert indices(limit=1, sort="-index", state="completed") == [4, 2, 1, 0]
    iterator = client.candidates(job.id, limit=2)
    assert [next(iterator).index, next(iterator).index] == [0, 1]
    store.delete_job(job.id)
    with pytest.raises(NotFound):
        next(iterator)


def test_jobs_are_iterated_over_all_pages(client: Client) -> None:
    ids = [client.submit(make_spec()).id for _ in range(5)]
    jobs: list[JobSummary] = list(client.jobs(limit=2))
    assert [job.id for job in jobs] == ids[::-1]


def test_watching_a_job_that_has_ended(client: Client, store: SqlStore, job: JobView) -> None:
    log = store.events(job.id, 0)
    assert list(client.watch(job.id)) == log
    assert list(client.watch(job.id, after=log[3].id)) == log[4:]
    assert list(client.watch(job.id, after=log[-1].id)) == []
    client.export(job.id, 2)  # what comes after the end is told too, and does not keep the watch waiting
    assert list(client.watch(job.id)) == store.events(job.id, 0)
    assert list(client.watch(job.id, after=log[-1].id)) == store.events(job.id, log[-1].id)


def test_watching_a_failed_job_that_was_resumed(client: Client, store: SqlStore, queued: JobView) -> None:
    Runner(store, queued.id).finish("failed", "a worker could not start")
    client.resume(queued.id)
    events = client.watch(queued.id)
    assert [next(events).data["state"] for _ in range(4)] == ["queued", "running", "failed", "queued"]
    lease = store.claim("test", 60, queued.id)
    assert lease is not None
    store.set_state(lease, "completed")
    assert [event.data["state"] for event in events][-1] == "completed"


def test_watching_all_jobs(client: Client, store: SqlStore, job: JobView) -> None:
    log = store.events(None, 0)
    events = client.watch()
    assert [next(events) for _ in log] == log
    other = fill(store)
    assert next(events).job_id == other.id


def test_watching_a_job_that_is_deleted_meanwhile(client: Client, store: SqlStore, queued: JobView) -> None:
    events = client.watch(queued.id)
    assert next(events).type == "job.state"
    store.delete_job(queued.id)
    with pytest.raises(NotFound):
        next(events)


def test_watching_goes_on_when_the_server_restarts(store: SqlStore, settings: Settings, queued: JobView) -> None:
    port = free_port()
    seen: list[EventView] = []
    runner = Runner(store, queued.id)
    with Client(f"http://127.0.0.1:{port}") as client:
        with running(store, settings, port):
            events = client.watch(queued.id)
            seen += [next(events), next(events)]
        runner.score(runner.propose()[0], 0.5, 0.5)  # nobody listens
        with running(store, settings, port):
            seen += [next(events), next(events)]
            runner.finish()
            seen += list(events)
    assert seen == store.events(queued.id, 0)


def test_waiting_for_an_export(client: Client, store: SqlStore, job: JobView) -> None:
    export = client.export(job.id, 2)
    task = store.claim_export("test", 60)
    assert task is not None
    progress = iter(client.watch_export(export.id))
    assert next(progress).state == "running"
    store.update_export(task, state="running", progress=0.5, ttl_s=60)
    assert next(progress).progress == 0.5
    store.update_export(task, state="completed", progress=1, ttl_s=60, path="/exports/x")
    assert next(progress).path == "/exports/x"
    assert next(progress, None) is None
    assert client.wait_export(export.id).state == "completed"


def test_methods_know_their_types(client: Client) -> None:
    method = client.get_job
    assert method.__name__ == "get_job"
    assert inspect.signature(method).parameters.keys() == {"job_id"}
    assert method.__doc__ == "Return one job."
