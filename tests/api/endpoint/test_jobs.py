"""Jobs against a real endpoint over HTTP: the same search as over the models themselves, through every fault."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from optimizer.errors import InputsChanged, InvalidInput, JobPaused, NotOffered, ServiceUnavailable
from optimizer.ports import Task
from optimizer.space import make_space
from optimizer.spec import EndpointSpec
from tests.api.endpoint.conftest import ITEMS, QUICK, Endpoint, make_rows, port_of, running, use
from tests.api.endpoint.jobs import SECRET, Client, allowing, job, local
from tests.service import free_port, until
from tests.workers.services import server as bad
from workers.endpoint.client import EndpointClient
from workers.endpoint_worker import EndpointWorker
from workers.evaluators.base import Cancelled
from workers.prepare import prepare
from workers.roots import Roots

pytestmark = pytest.mark.usefixtures("quick")


def sessions_of(endpoint: Endpoint) -> dict[str, Any]:
    return endpoint.desk._sessions._open


def test_evo_merging_finds_what_it_finds_locally_bit_for_bit(
    endpoint: Endpoint, searcher: Client, models: Path, data: Path, sqlite_url: str
) -> None:
    spec = job(endpoint.url)
    remote, rows = searcher.run(spec)
    assert (remote.state, remote.progress.completed) == ("completed", 24)
    nearby = Client(sqlite_url, models, allowing(1))
    _, expected = nearby.run(local(spec, models))
    nearby.close()
    assert rows == expected
    assert len({row[4] for row in rows}) > 12


@pytest.mark.slow
@pytest.mark.ray
def test_workers_of_a_ray_cluster_find_the_same(
    endpoint: Endpoint, searcher: Client, roots: Roots, data: Path, sqlite_url: str
) -> None:
    spec = job(endpoint.url, workers={"count": 2}, budget={"evaluations": 12})
    _, expected = searcher.run(spec)
    others = Client(sqlite_url, data, roots.policy, ray=True)
    done, rows = others.run(spec)
    others.close()
    assert (done.state, done.progress.completed) == ("completed", 12)
    assert rows == expected


def test_several_objectives_share_a_merge_and_named_sets_need_no_upload(endpoint: Endpoint, roots: Roots) -> None:
    own = {"evaluator": "text_classification", "set": "own"}
    query = {"evaluator": "text_classification", "data": {"path": "query.jsonl"}}
    spec = job(
        endpoint.url,
        objectives=[
            {"name": "a", "metric": "loss", **own},
            {"name": "b", "metric": "accuracy", **own},
            {"name": "c", **query, "use": "report"},
        ],
        algorithm={"name": "nsga2"},
    )
    problem = prepare(spec, roots)
    assert [(o.metric, o.direction, o.items, o.use) for o in problem.objectives] == [
        ("loss", "minimise", ITEMS, "objective"),
        ("accuracy", "maximise", ITEMS, "objective"),
        ("accuracy", "maximise", ITEMS, "report"),
    ]
    worker = EndpointWorker(spec, problem, roots, "w")
    space = make_space(spec, problem)
    result = worker.evaluate(Task(0, space.recipe(space.uniform() * 0.77).to_json()))
    assert {name: len(scores.values) for name, scores in result.scores.items()} == dict.fromkeys("abc", ITEMS)
    assert result.cost.items == 2 * ITEMS
    assert result.cost.requests >= 4


def test_a_part_of_the_items_is_the_one_that_local_workers_take(endpoint: Endpoint, roots: Roots, models: Path) -> None:
    spec = job(endpoint.url)
    problem = prepare(spec, roots)
    space = make_space(spec, problem)
    recipe = space.recipe(space.uniform())
    remote = EndpointWorker(spec, problem, roots, "w").evaluate(Task(0, recipe.to_json(), items=12))
    from workers.worker import EvaluationWorker

    near = Roots([models])
    here = local(spec, models)
    known = prepare(here, near)
    same = recipe.model_copy(update={"models": known.models})
    nearby = EvaluationWorker(here, known, near, "w").evaluate(Task(0, same.to_json(), items=12))
    assert (remote.scores["query"].values == nearby.scores["query"].values).all()
    assert len(remote.scores["query"].values) == 12


def test_a_session_that_ended_is_opened_anew(endpoint: Endpoint, roots: Roots) -> None:
    spec = job(endpoint.url)
    problem = prepare(spec, roots)
    space = make_space(spec, problem)
    worker = EndpointWorker(spec, problem, roots, "w")
    genomes = np.random.default_rng(3).uniform(0.1, 0.9, (2, space.dim))
    first = worker.evaluate(Task(0, space.recipe(genomes[0]).to_json()))
    sessions_of(endpoint).clear()
    second = worker.evaluate(Task(1, space.recipe(genomes[1]).to_json()))
    assert first.failure is None
    assert second.failure is None
    assert len(sessions_of(endpoint)) == 1


def test_a_revoked_token_pauses_the_job_and_a_new_one_lets_it_go_on(
    models: Path, data: Path, tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(models, tmp_path / "owner") as found:
        use(monkeypatch, found.token)
        client = Client(sqlite_url, data, allowing(port_of(found.url)))
        job_id = client.submit(job(found.url))

        def revoke() -> None:
            until("some candidates are scored", lambda: client.store.get_job(job_id).progress.completed > 8)
            (token,) = found.desk.store.list_tokens()
            found.desk.store.delete_token(token.id)

        thread = threading.Thread(target=revoke)
        thread.start()
        paused = client.turn(job_id)
        thread.join()
        assert paused.state == "paused"
        assert "the token is wrong or has expired" in str(paused.reason)
        assert found.token not in str(paused.reason)
        before = client.rows(job_id)
        use(monkeypatch, found.desk.store.create_token("again")[1])
        client.store.request(job_id, "run")
        done = client.turn(job_id)
        assert (done.state, done.progress.completed, done.progress.failed) == ("completed", 24, 0)
        rows = client.rows(job_id)
        assert [row[:5] for row in rows[: len(before)]] == [row[:5] for row in before]
        assert rows == client.run(job(found.url))[1]  # as if nothing had happened
        client.close()


def test_a_used_up_quota_pauses_the_job_until_the_owner_gives_more(
    models: Path, data: Path, tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    spec = job(f"http://127.0.0.1:{port}", budget={"evaluations": 14})
    client = Client(sqlite_url, data, allowing(port))
    with running(models, tmp_path / "owner", port, limits={"evaluations": 9}) as found:
        use(monkeypatch, found.token)
        job_id = client.submit(spec)
        paused = client.turn(job_id)
        assert (paused.state, paused.progress.completed) == ("paused", 9)
        assert "9 evaluations are used up" in str(paused.reason)
    with running(models, tmp_path / "owner", port, found.token):
        client.store.request(job_id, "run")
        done = client.turn(job_id)
        assert (done.state, done.progress.completed) == ("completed", 14)
    client.close()


@pytest.mark.slow
def test_a_server_that_is_started_anew_is_not_noticed_and_one_that_stays_away_pauses_the_job(
    models: Path, data: Path, tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    client = Client(sqlite_url, data, allowing(port))
    job_id = client.submit(job(f"http://127.0.0.1:{port}"))
    with running(models, tmp_path / "owner", port) as found:
        use(monkeypatch, found.token)
        states: list[Any] = []
        thread = threading.Thread(target=lambda: states.append(client.turn(job_id)))
        thread.start()
        until("some candidates are scored", lambda: client.store.get_job(job_id).progress.completed > 5)
    with running(models, tmp_path / "owner", port, found.token):
        # The new server needs a moment, in which the job may have paused: that is what pausing is for.
        thread.join()
        if states[0].state == "paused":
            client.store.request(job_id, "run")
            states.append(client.turn(job_id))
        assert (states[-1].state, states[-1].progress.failed) == ("completed", 0)
        assert client.rows(job_id) == client.run(job(f"http://127.0.0.1:{port}"))[1]
    other = client.submit(job(f"http://127.0.0.1:{port}", seed=6))
    gone = client.turn(other)
    assert gone.state == "paused"
    assert "cannot be used: no connection" in str(gone.reason)
    client.close()


def test_other_weights_fail_the_job(models: Path, endpoint: Endpoint, roots: Roots) -> None:
    spec = job(endpoint.url)
    problem = prepare(spec, roots)
    changed = problem.models | {"a1": problem.models["a1"].model_copy(update={"digest": "0" * 64})}
    with pytest.raises(InputsChanged, match="'a1' is not the one the job began with"):
        EndpointWorker(spec, problem.model_copy(update={"models": changed}), roots, "w")
    worker = EndpointWorker(spec, problem, roots, "w")
    space = make_space(spec, problem.model_copy(update={"models": changed}))
    with pytest.raises(InputsChanged, match="the endpoint's models changed"):
        worker.evaluate(Task(0, space.recipe(space.uniform()).to_json()))


def test_a_candidate_that_the_owner_refuses_fails_alone(
    models: Path, data: Path, tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(models, tmp_path / "owner", max_share=0.9, scores="aggregate", decimals=3) as found:
        use(monkeypatch, found.token)
        client = Client(sqlite_url, data, allowing(port_of(found.url)))
        alone = {"label": "alone", "coefficients": {"a1": 1.0}}
        spec = job(found.url, budget={"evaluations": 8}, warm_starts={"candidates": [alone]})
        done, rows = client.run(spec)
        client.close()
    labels = [row[3] for row in rows]
    assert "a1" not in labels  # no model by itself is tried where that is known to be refused
    failed = [row for row in rows if row[7] is not None]
    assert [(row[3], row[7]) for row in failed] == [("alone", "not_offered")]
    assert done.progress.completed == 7
    assert all(round(row[8][0], 3) == pytest.approx(row[8][0], abs=1e-7) for row in rows if row[8])


MEANS = {"scores": "aggregate"}


def query(**changes: Any) -> dict[str, Any]:
    """An objective on uploaded items."""
    return {"name": "query", "evaluator": "text_classification", "data": {"path": "query.jsonl"}, **changes}


def own(**changes: Any) -> dict[str, Any]:
    """An objective on the owner's items."""
    return {"name": "theirs", "evaluator": "text_classification", "set": "own", **changes}


PREPARED: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({}, {"merge": {"operator": "fisher"}}, "merge.operator", "not offer"),
    ({}, {"merge": {"operator": "lora_factors", "heads": []}}, "merge.heads", "owner"),
    ({}, {"merge": {"operator": "lora_factors", "vocabulary": "union"}}, "merge.vocabulary", "owner"),
    ({}, {"workers": {"count": 5}}, "workers.count", "at once"),
    (MEANS, {"fitness": {"racing": {"enabled": True}}}, "fitness.racing.enabled", "means only"),
    (MEANS, {"fitness": {"estimation": {"method": "mean"}}}, "fitness.estimation.method", "means only"),
    (
        {},
        {"objectives": [query(test={"path": "query.jsonl", "limit": 20})]},
        "objectives.0.test",
        "20 of 20 test items",
    ),
    (
        {},
        {"objectives": [query(test={"path": "query.jsonl"})]},
        "objectives.0.test",
        "search items of objective 'query'",
    ),
    ({}, {"objectives": [own(test_set="own")]}, "objectives.0.test_set", "search items of objective 'theirs'"),
    ({}, {"objectives": [own(test_set="more")]}, "objectives.0.test_set", "has no set 'more'"),
    ({}, {"objectives": [query(test={"path": "none.jsonl"})]}, "objectives.0.test.path", "none.jsonl"),
    ({}, {"objectives": [{"name": "x", "evaluator": "text_classification", "set": "no"}]}, "objectives.0.set", "own"),
    ({}, {"objectives": [{"name": "x", "evaluator": "causal_lm", "set": "own"}]}, "objectives.0.evaluator", "measures"),
    ({}, {"objectives": [{"name": "x", "evaluator": "causal_lm"}]}, "objectives.0.data", "nothing to measure"),
    (
        {},
        {"objectives": [{"name": "x", "evaluator": "image_classification", "data": {"path": "query.jsonl"}}]},
        "objectives.0.evaluator",
        "no query sets",
    ),
    (
        {},
        {
            "objectives": [
                {"name": "x", "evaluator": "text_classification", "data": {"path": "query.jsonl"}, "metric": "bleu"}
            ]
        },
        "objectives.0.metric",
        "no metric",
    ),
    (
        {},
        {
            "objectives": [
                {
                    "name": "x",
                    "evaluator": "text_classification",
                    "data": {"path": "query.jsonl", "limit": 6},
                }
            ]
        },
        "objectives.0.data",
        "6 items",
    ),
    (
        {},
        {
            "objectives": [
                {
                    "name": "x",
                    "evaluator": "text_classification",
                    "data": {"path": "query.jsonl", "columns": {"label": "text"}},
                }
            ]
        },
        "objectives.0.data.columns.label",
        "none of the model's",
    ),
    ({}, {"algorithm": "m2n2", "merge": {"operator": "linear"}}, "algorithm", "angles"),
    (
        {"scores": "aggregate", "grams": True},
        {"algorithm": "m2n2", "merge": {"operator": "linear"}},
        "algorithm",
        "means",
    ),
    ({"uploads": None}, {}, "objectives.0.data", "no query sets"),
]


@pytest.mark.parametrize(("offer", "changes", "field", "message"), PREPARED)
def test_what_does_not_fit_the_owners_offer_is_said_before_the_job_starts(
    endpoint: Endpoint,
    roots: Roots,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offer: dict[str, Any],
    changes: dict[str, Any],
    field: str,
    message: str,
) -> None:
    if not offer:
        with pytest.raises(InvalidInput, match=message) as caught:
            prepare(job(endpoint.url, **changes), roots)
        assert caught.value.field == field
        return
    with running(models, tmp_path / "owner", **offer) as found:
        use(monkeypatch, found.token)
        with pytest.raises(InvalidInput, match=message) as caught:
            prepare(job(found.url, **changes), Roots(roots.paths, allowing(port_of(found.url))))
    assert caught.value.field == field


def test_grams_come_from_the_owner_where_it_gives_them(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(models, tmp_path / "owner", grams=True) as found:
        use(monkeypatch, found.token)
        spec = job(found.url, algorithm="m2n2", merge={"operator": "linear"})
        problem = prepare(spec, Roots([data], allowing(port_of(found.url))))
    assert problem.grams is not None
    here = prepare(local(spec, models), Roots([models]))
    assert here.grams is not None
    assert problem.grams == here.grams


def test_only_what_the_evaluator_reads_is_sent(endpoint: Endpoint, roots: Roots, data: Path) -> None:
    rows = [row | {"author": "secret name"} for row in make_rows(20)]
    (data / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {"name": "x", "evaluator": "text_classification", "data": {"path": "more.jsonl"}}
    from workers.endpoint.questions import questions_of

    spec = job(endpoint.url, objectives=[objective])
    assert spec.endpoint is not None
    client = EndpointClient(spec.endpoint, roots.policy)
    question = questions_of(spec, client.repository(), roots)[0]
    client.close()
    assert question.upload is not None
    assert all(set(row) == {"text", "label"} for row in question.upload.rows)


@pytest.mark.parametrize(("url", "message"), [("http://10.0.0.1", "does not let jobs ask"), ("ftp://x", "pattern")])
def test_only_allowed_hosts_are_asked(roots: Roots, url: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        prepare(job(url), roots)


def test_an_unknown_secret_is_named(endpoint: Endpoint, roots: Roots) -> None:
    with pytest.raises(InvalidInput, match="no secret 'other'"):
        prepare(job(endpoint.url, endpoint={"url": endpoint.url, "token": "other"}), roots)


# --- a server that misbehaves ----------------------------------------------------------------------------------------


def proxy(endpoint: Endpoint, *faults: bad.Script) -> bad.Script:
    """Forward requests to the endpoint; before each that goes through, one of the faults, each of them in turn."""
    left = list(faults)

    def script(received: bad.Received, connection: Any) -> None:
        if left and len(received.target) % 2 == len(left) % 2:
            left.pop(0)(received, connection)
            return
        answer = httpx.request(
            received.method,
            endpoint.url + received.target,
            content=received.body,
            headers={name: value for name, value in received.headers.items() if name != "connection"},
            timeout=30,
        )
        bad.answer(status=answer.status_code, body=answer.content)(received, connection)

    return script


FAULTS = [
    bad.answer({"error": {"code": "internal", "message": "oops"}}, status=500),
    bad.raw(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"id": '),
    bad.answer(body=b'{"scores": NaN'),
    bad.raw(b""),
    bad.answer({"state": "done"}),
    bad.answer([1, 2, 3]),
    bad.answer({"error": {"code": "too_many_requests", "message": "later"}}, status=429, headers={"Retry-After": "0"}),
    bad.answer({"detail": "gateway"}, status=503),
]


def test_broken_answers_are_asked_for_again(endpoint: Endpoint, roots: Roots) -> None:
    spec = job(endpoint.url)
    problem = prepare(spec, roots)
    space = make_space(spec, problem)
    recipe = space.recipe(np.linspace(0.2, 0.8, space.dim)).to_json()
    direct = EndpointWorker(spec, problem, roots, "w").evaluate(Task(0, recipe))
    with bad.serving(proxy(endpoint, *FAULTS)) as server:
        through = job(server.url)
        policy = allowing(server.port)
        worker = EndpointWorker(through, problem, Roots(roots.paths, policy), "w")
        result = worker.evaluate(Task(0, recipe))
        assert len(server.received) > 5
    assert (result.scores["query"].values == direct.scores["query"].values).all()


ANSWERS: list[tuple[bad.Script, type[Exception], str]] = [
    (bad.answer(body=b"not json"), ServiceUnavailable, "no usable answer"),
    (bad.answer({"protocol": 1}), ServiceUnavailable, "no usable answer"),
    (bad.answer(status=418, data={"error": {"code": "teapot", "message": "short"}}), ServiceUnavailable, "418: short"),
    (bad.answer(status=503), JobPaused, "cannot be used"),
    (bad.answer(status=429, headers={"Retry-After": "7200"}), JobPaused, "7200 s"),
    (bad.answer(status=401, data={"error": {"code": "unauthorized", "message": "who?"}}), JobPaused, "who"),
    (bad.answer(status=403, body=b"<html>no</html>"), JobPaused, "no"),
    (bad.answer(status=302, headers={"Location": "http://169.254.169.254/"}), ServiceUnavailable, "302"),
    (bad.answer(status=422, data={"error": {"code": "not_offered", "message": "never"}}), NotOffered, "never"),
]


@pytest.mark.parametrize(("script", "cls", "message"), ANSWERS)
def test_an_endpoint_that_never_answers_properly(
    monkeypatch: pytest.MonkeyPatch, script: bad.Script, cls: type[Exception], message: str
) -> None:
    use(monkeypatch, "the-secret-token")
    with bad.serving(script) as server:
        client = EndpointClient(EndpointSpec(url=server.url, token=SECRET), allowing(server.port), QUICK)
        with pytest.raises(cls, match=message):
            client.repository()
        client.close()
        assert {received.headers["authorization"] for received in server.received} == {"Bearer the-secret-token"}


def test_a_token_that_the_endpoint_repeats_is_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "the-secret-token")
    said = {"error": {"code": "unauthorized", "message": "the-secret-token is wrong"}}
    with bad.serving(bad.answer(said, status=401)) as server:
        client = EndpointClient(EndpointSpec(url=server.url, token=SECRET), allowing(server.port), QUICK)
        with pytest.raises(JobPaused) as caught:
            client.repository()
        client.close()
    assert "the-secret-token" not in str(caught.value)
    assert "*** is wrong" in str(caught.value)


def test_waiting_is_called_off_within_a_moment(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    with running(models, tmp_path / "owner") as found:
        use(monkeypatch, found.token)
        roots = Roots([data], allowing(port_of(found.url)))
        spec = job(found.url)
        problem = prepare(spec, roots)
        space = make_space(spec, problem)
        worker = EndpointWorker(spec, problem, roots, "w")
        called_off = threading.Event()
        caught: list[BaseException] = []

        def evaluate() -> None:
            try:
                worker.evaluate(Task(0, space.recipe(space.uniform()).to_json()), called_off.is_set)
            except Cancelled as error:
                caught.append(error)

        thread = threading.Thread(target=evaluate)
        thread.start()
        until("the endpoint is at it", lambda: found.desk._evaluations._pieces or None)
        called_off.set()
        thread.join(10)
        assert not thread.is_alive()
        assert len(caught) == 1
        gate.set()
