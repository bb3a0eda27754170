"""The routes as a client without our library meets them: statuses, headers, bodies."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import httpx
import pytest
import yaml

import migrations
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import CandidateView, FrontView, JobView, Progression
from optimizer.algorithms.base import ALGORITHMS
from optimizer.fitness.cost import Cost
from optimizer.ports import Evaluation, Failure
from optimizer.space import SPACES
from optimizer.spec import JobSpec
from tests.api.conftest import Runner, Service, running, spec_json
from tests.api.test_errors import check_error


def test_submit(http: httpx.Client) -> None:
    response = http.post("/jobs", json=spec_json())

    assert response.status_code == 201
    job = JobView.model_validate_json(response.content)
    assert response.headers["location"] == f"/api/v1/jobs/{job.id}"
    assert (job.state, job.progress.budget) == ("queued", 20)
    assert job.spec["merge"]["granularity"]["layers"] == "each"  # a default, filled in
    assert JobView.model_validate_json(http.get(f"/jobs/{job.id}").content) == job


@pytest.mark.parametrize("kind", ["application/yaml", "text/yaml; charset=utf-8", "application/x-yaml"])
@pytest.mark.parametrize("path", ["/jobs", "/jobs/validate"])
def test_yaml(http: httpx.Client, kind: str, path: str) -> None:
    text = yaml.safe_dump(spec_json(name="aus YAML: größer"), allow_unicode=True)
    response = http.post(path, content=text.encode(), headers={"Content-Type": kind})

    assert response.is_success
    assert response.json()["spec"]["name"] == "aus YAML: größer"


def test_a_yaml_bomb_records_nothing(http: httpx.Client) -> None:
    lines = ["a0: &a0 [1, 2]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    response = http.post("/jobs", content="\n".join(lines), headers={"Content-Type": "application/yaml"})

    assert "aliases" in check_error(response, 422, "invalid_input").message
    assert http.get("/jobs").json()["items"] == []


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/jobs", "/jobs/validate"])
def test_a_spec_of_10_mb_is_refused(http: httpx.Client, chunked: bool, path: str) -> None:
    body = b'{"name": "' + b"x" * 10_000_000 + b'"}'
    content: Any = (body[start : start + 65536] for start in range(0, len(body), 65536)) if chunked else body
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})

    assert "1048576 bytes" in check_error(response, 413, "too_large").message
    assert http.get("/jobs").json()["items"] == []


def test_a_body_just_below_the_limit_is_read(http: httpx.Client) -> None:
    padding = " " * (1024 * 1024 - 2000)
    assert http.post("/jobs", content=yaml.safe_dump(spec_json()) + padding).status_code == 422  # it is no JSON
    response = http.post(
        "/jobs", content=yaml.safe_dump(spec_json()) + padding, headers={"Content-Type": "application/yaml"}
    )
    assert response.status_code == 201


def test_checkpoints_are_looked_at_before_anything_is_recorded(http: httpx.Client) -> None:
    spec = spec_json()
    spec["experts"][1]["path"] = "models/missing"
    for path in ("/jobs", "/jobs/validate"):
        assert check_error(http.post(path, json=spec), 422, "invalid_checkpoint").field == "experts.1"
    assert http.get("/jobs").json()["items"] == []


def test_validation_names_every_problem(http: httpx.Client) -> None:
    spec = spec_json(budget={"evaluations": 1}) | {"budget": {"evaluations": 0}, "colour": "red"}
    spec["merge"]["bounds"] = {"low": 1, "high": 0}
    error = check_error(http.post("/jobs/validate", json=spec), 422, "invalid_input")

    problems = {problem["field"]: problem["message"] for problem in error.problems}
    assert set(problems) == {"merge.bounds", "budget.evaluations", "colour"}
    assert "swap them" in (problems["merge.bounds"] or "")
    assert error.field == error.problems[0]["field"]


def test_validate(http: httpx.Client) -> None:
    response = http.post("/jobs/validate", json=spec_json())

    assert response.status_code == 200
    body = response.json()
    assert body["valid"] is True
    assert body["columns"] == ["language", "polarity"]
    assert body["groups"] == ["layer 0", "layer 1", "layer 2", "layer 3"]
    assert body["variables"] == 8
    assert [(phase["algorithm"], phase["evaluations"]) for phase in body["phases"]] == [("random", 20)]
    assert JobSpec.model_validate(body["spec"]) == JobSpec.model_validate(spec_json())
    assert http.get("/jobs").json()["items"] == []


def test_idempotency(http: httpx.Client) -> None:
    key = {"Idempotency-Key": "once"}
    first, again = (http.post("/jobs", json=spec_json(), headers=key) for _ in range(2))

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert again.headers["location"] == first.headers["location"]
    error = check_error(http.post("/jobs", json=spec_json(seed=2), headers=key), 409, "conflict")
    assert error.field == "Idempotency-Key"
    assert len(http.get("/jobs").json()["items"]) == 1


def test_list_pages_and_filters(http: httpx.Client, store: SqlStore) -> None:
    ids = [http.post("/jobs", json=spec_json(name=f"job {n}")).json()["id"] for n in range(5)]
    store.request(ids[1], "cancel")

    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = http.get("/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        assert len(page["items"]) <= 2
        seen += [job["id"] for job in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ids[::-1]
    assert [job["id"] for job in http.get("/jobs?state=cancelled").json()["items"]] == [ids[1]]
    assert [job["id"] for job in http.get("/jobs?name=JOB%203").json()["items"]] == [ids[3]]
    assert http.get("/jobs?name=%25").json()["items"] == []


def test_steering_a_job_that_nobody_holds(http: httpx.Client, queued: JobView) -> None:
    path = f"/jobs/{queued.id}"
    for action, state, requested in [
        ("pause", "paused", "pause"), ("resume", "queued", "run"), ("cancel", "cancelled", "cancel"),
    ]:  # fmt: skip
        response = http.post(f"{path}/{action}")
        assert response.status_code == 202
        assert (response.json()["state"], response.json()["requested"]) == (state, requested)
    for action in ("pause", "resume", "cancel"):
        check_error(http.post(f"{path}/{action}"), 409, "conflict")


def test_a_paused_job_resumes_with_another_budget(http: httpx.Client, store: SqlStore, queued: JobView) -> None:
    path = f"/jobs/{queued.id}"
    assert check_error(http.post(f"{path}/resume", json={"budget": {"money": 5}}), 409, "conflict").remedy
    http.post(f"{path}/pause")
    for wrong in ({"money": -1}, {"evaluations": 5}, {"tokens": "many"}):
        check_error(http.post(f"{path}/resume", json={"budget": wrong}), 422, "invalid_input")
    assert http.get(path).json()["state"] == "paused"
    response = http.post(f"{path}/resume", json={"budget": {"money": 5, "requests": 100}})
    assert (response.status_code, response.json()["state"]) == (202, "queued")
    before = queued.spec["budget"]
    assert store.get_job(queued.id).spec["budget"] == before | {"money": 5.0, "requests": 100.0}
    http.post(f"{path}/pause")
    http.post(f"{path}/resume", json={"budget": {"money": 7}})
    assert store.get_job(queued.id).spec["budget"] == before | {"money": 7.0, "requests": 100.0}


def test_a_budget_that_is_spent_already_is_refused(http: httpx.Client, store: SqlStore, queued: JobView) -> None:
    runner = Runner(store, queued.id)
    (index,) = runner.propose()
    failure = Failure("infeasible", "loss is nan")
    store.add_evaluation(runner.lease, Evaluation(index, None, failure=failure, cost=Cost(requests=6, tokens=40)))
    runner.finish("paused", "the budget of 6 requests is spent")
    before = http.get(f"/jobs/{queued.id}").json()
    assert (before["state"], before["progress"]["cost"]["requests"]) == ("paused", 6)
    for wrong, field in (({"requests": 6}, "requests"), ({"requests": 9, "tokens": 30}, "tokens")):
        error = check_error(http.post(f"/jobs/{queued.id}/resume", json={"budget": wrong}), 422, "invalid_input")
        assert error.field == f"budget.{field}"
    assert http.get(f"/jobs/{queued.id}").json() == before
    assert http.post(f"/jobs/{queued.id}/resume", json={"budget": {"requests": 7}}).status_code == 202


def test_steering_a_running_job_is_a_request(http: httpx.Client, store: SqlStore, queued: JobView) -> None:
    Runner(store, queued.id)
    response = http.post(f"/jobs/{queued.id}/pause")

    assert response.status_code == 202
    assert (response.json()["state"], response.json()["requested"]) == ("running", "pause")
    check_error(http.delete(f"/jobs/{queued.id}"), 409, "conflict")


def test_delete(http: httpx.Client, job: JobView) -> None:
    response = http.delete(f"/jobs/{job.id}")

    assert response.status_code == 204
    assert response.content == b""
    check_error(http.get(f"/jobs/{job.id}"), 404, "not_found")
    check_error(http.delete(f"/jobs/{job.id}"), 404, "not_found")


def test_clone_with_changes(http: httpx.Client, job: JobView) -> None:
    changes = {"name": "longer", "budget": {"evaluations": 50, "patience": 9}, "seed": None}
    response = http.post(f"/jobs/{job.id}/clone", json={"changes": changes})

    assert response.status_code == 201
    clone = response.json()
    assert clone["cloned_from"] == job.id
    assert clone["spec"]["budget"] == {
        "evaluations": 50,
        "wall_time_s": None,
        "patience": 9,
        "requests": None,
        "tokens": None,
        "money": None,
    }
    assert (clone["spec"]["name"], clone["spec"]["seed"], job.spec["seed"]) == ("longer", 0, 1)
    assert clone["spec"]["objectives"] == job.spec["objectives"]
    assert response.headers["location"].endswith(clone["id"])


def test_clone_without_changes_is_the_same_job_again(http: httpx.Client, job: JobView) -> None:
    key = {"Idempotency-Key": "clone"}
    first, again = (http.post(f"/jobs/{job.id}/clone", json={}, headers=key) for _ in range(2))

    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"] != job.id
    assert first.json()["spec"] == job.spec


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"budget": {"evaluations": 0}}, "budget.evaluations"),
        ({"colour": "red"}, "colour"),
        ({"base": None}, "base"),
        ({"experts": "language"}, "experts"),
        ({"experts": [{"name": "language", "path": "missing"}, {"name": "polarity", "path": "x"}]}, "experts.0"),
    ],
)
def test_clone_with_wrong_changes(http: httpx.Client, job: JobView, changes: dict[str, Any], field: str) -> None:
    response = http.post(f"/jobs/{job.id}/clone", json={"changes": changes})

    assert response.status_code == 422
    assert response.json()["error"]["field"] == field
    assert len(http.get("/jobs").json()["items"]) == 1


@pytest.mark.parametrize(
    ("query", "indices"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"sort": "-index"}, [4, 3, 2, 1, 0]),
        ({"sort": "value", "objective": "polarity"}, [2, 0, 1, 4]),
        ({"sort": "-value", "objective": "language"}, [0, 2, 1, 4]),
        ({"on_front": True}, [0, 2]),
        ({"on_front": False, "state": "completed"}, [1, 4]),
        ({"state": "failed"}, [3]),
        ({"partial": True}, []),
        ({"partial": False, "state": "completed"}, [0, 1, 2, 4]),
    ],
)
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_candidates(http: httpx.Client, job: JobView, query: dict[str, Any], indices: list[int], limit: int) -> None:
    found: list[int] = []
    cursor: dict[str, str] = {}
    while True:
        page = http.get(f"/jobs/{job.id}/candidates", params={**query, "limit": limit, **cursor}).json()
        found += [candidate["index"] for candidate in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert found == indices


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"sort": "value"}, "objective"),
        ({"sort": "value", "objective": "unknown"}, "objective"),
        ({"sort": "best"}, "sort"),
        ({"state": "asleep"}, "state"),
        ({"on_front": "perhaps"}, "on_front"),
        ({"cursor": "forged"}, "cursor"),
    ],
)
def test_candidates_with_wrong_queries(http: httpx.Client, job: JobView, query: dict[str, Any], field: str) -> None:
    error = check_error(http.get(f"/jobs/{job.id}/candidates", params=query), 422, "invalid_input")
    assert error.field == field


def test_one_candidate(http: httpx.Client, job: JobView) -> None:
    best = CandidateView.model_validate_json(http.get(f"/jobs/{job.id}/candidates/2").content)
    failed = CandidateView.model_validate_json(http.get(f"/jobs/{job.id}/candidates/3").content)

    assert (best.state, best.values, best.on_front, best.worker) == ("completed", [0.8, 0.2], True, "w0")
    assert len(best.genome or []) == 8
    assert best.recipe["root"]["operator"] == "task_arithmetic"
    assert set(best.items) == {"language", "polarity"}
    assert (failed.state, failed.values) == ("failed", None)
    assert failed.failure == {"code": "infeasible", "message": "loss is nan"}
    check_error(http.get(f"/jobs/{job.id}/candidates/5"), 404, "not_found")
    check_error(http.get(f"/jobs/{job.id}/candidates/{2**31}"), 422, "invalid_input")


@pytest.mark.parametrize(
    "candidate",
    [
        {"label": "mine", "coefficients": {"language": 0.5, "polarity": [0.1, 0.2, 0.3, 0.4]}},
        {"genome": [0.5] * 8},
        {"recipe": {"format": 1}},  # the controller looks at it, and says candidate.rejected
    ],
)
def test_enqueue(http: httpx.Client, store: SqlStore, queued: JobView, candidate: dict[str, Any]) -> None:
    response = http.post(f"/jobs/{queued.id}/candidates", json=candidate)

    assert response.status_code == 202
    events = store.events(queued.id, 0)
    assert (events[-1].type, events[-1].data) == ("candidate.enqueued", response.json())


@pytest.mark.parametrize(
    "candidate",
    [{}, {"genome": []}, {"genome": ["x"]}, {"genome": [0.5], "recipe": {}}, {"coefficients": {"language": "much"}}],
)
def test_enqueue_nonsense(http: httpx.Client, queued: JobView, candidate: dict[str, Any]) -> None:
    check_error(http.post(f"/jobs/{queued.id}/candidates", json=candidate), 422, "invalid_input")


def test_enqueue_after_the_end(http: httpx.Client, job: JobView) -> None:
    check_error(http.post(f"/jobs/{job.id}/candidates", json={"genome": [0.5] * 8}), 409, "conflict")


def test_front_and_progression(http: httpx.Client, job: JobView) -> None:
    front = FrontView.model_validate_json(http.get(f"/jobs/{job.id}/front").content)
    progression = Progression.model_validate_json(http.get(f"/jobs/{job.id}/progression").content)

    assert [point.index for point in front.front] == [0, 2]
    assert [point.index for point in front.dominated] == [1, 4]
    assert front.total == 4
    assert http.get(f"/jobs/{job.id}/front?limit=0").json()["dominated"] == []
    assert (progression.index, progression.best) == ([0, 2], [[0.9, 0.5], [0.9, 0.2]])


def test_exports(http: httpx.Client, job: JobView) -> None:
    response = http.post(f"/jobs/{job.id}/exports", json={"candidate": 2, "head": "polarity"})

    assert response.status_code == 202
    export = response.json()
    assert (export["state"], export["candidate"], export["head"], export["progress"]) == ("queued", 2, "polarity", 0)
    assert http.get(f"/exports/{export['id']}").json() == export
    assert http.get(f"/jobs/{job.id}/exports").json() == [export]


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({"candidate": 3}, 409, "conflict", None),  # it failed
        ({"candidate": 99}, 404, "not_found", None),
        ({"candidate": 2, "head": "nobody"}, 422, "invalid_input", "head"),
        ({"candidate": -1}, 422, "invalid_input", "candidate"),
        ({}, 422, "invalid_input", "candidate"),
    ],
)
def test_exports_of_what_cannot_be_exported(
    http: httpx.Client, job: JobView, body: dict[str, Any], status: int, code: str, field: str | None
) -> None:
    error = check_error(http.post(f"/jobs/{job.id}/exports", json=body), status, code)
    assert field is None or error.field == field
    assert http.get(f"/jobs/{job.id}/exports").json() == []


def test_catalog(http: httpx.Client) -> None:
    algorithms, spaces, operators, evaluators, graders = (
        http.get(f"/{kind}").json() for kind in ("algorithms", "spaces", "operators", "evaluators", "graders")
    )

    abilities = {
        entry["name"]: (entry["multi_objective"], entry["needs_items"], entry["races"]) for entry in algorithms
    }
    assert abilities == {name: (cls.multi_objective, cls.needs_items, cls.races) for name, cls in ALGORITHMS.items()}
    assert list(abilities) == list(ALGORITHMS)
    assert [space["name"] for space in spaces] == list(SPACES)
    assert {"linear", "slerp", "task_arithmetic", "ties"} <= {operator["name"] for operator in operators}
    assert {"text_classification", "causal_lm"} <= {evaluator["name"] for evaluator in evaluators}
    for entry in [*algorithms, *spaces, *operators, *evaluators, *graders]:
        assert entry["summary"]
        assert entry["options_schema"]["type"] == "object"
    assert {"exact_match", "refusal"} <= {grader["name"] for grader in graders}
    # These have the metrics that a job's options name.
    assert {entry["name"] for entry in evaluators if not entry["metrics"]} == {"http", "lm_eval", "python"}


def test_phases_are_planned_by_validation_and_kept_by_clones(http: httpx.Client) -> None:
    phases = [{"algorithm": "cma_es", "share": 0.25}, {"algorithm": {"name": "random"}, "patience": 5}]
    spec = {key: value for key, value in spec_json().items() if key != "algorithm"} | {"phases": phases}
    planned = http.post("/jobs/validate", json=spec).json()["phases"]
    assert [(phase["algorithm"], phase["evaluations"]) for phase in planned] == [("cma_es", 5), ("random", 15)]
    job = http.post("/jobs", json=spec).json()
    assert job["algorithm"] == "cma_es → random"
    assert "algorithm" not in job["spec"]
    clone = http.post(f"/jobs/{job['id']}/clone", json={"changes": {"seed": 2}})
    assert clone.status_code == 201
    assert clone.json()["spec"]["phases"] == job["spec"]["phases"]
    wrong = spec | {"phases": [{"algorithm": "none_such"}]}
    error = check_error(http.post("/jobs/validate", json=wrong), 422, "invalid_input")
    assert error.field == "phases.0.algorithm.name"


def test_job_schema_is_complete(http: httpx.Client) -> None:
    schema = http.get("/schema/job").json()

    assert schema == JobSpec.model_json_schema()
    # pydantic leaves out a field's description where its type has the same one
    for name, field in schema["properties"].items():
        of_type = schema["$defs"].get(field.get("$ref", "").rsplit("/", 1)[-1], {})
        assert field.get("description") or of_type["description"], name
    assert schema["additionalProperties"] is False


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ok"}
    assert http.get("/version").json() == {"version": version("mergeopt"), "api": "v1"}


def test_not_ready_before_the_migration(sqlite_url: str, settings: Settings) -> None:
    migrations.downgrade(sqlite_url, "base")
    store = SqlStore(sqlite_url)
    with running(store, settings) as service, service.http() as client:
        assert client.get("/health").status_code == 200
        assert "mergeopt db upgrade" in (check_error(client.get("/ready"), 503, "unavailable").remedy or "")
        migrations.upgrade(sqlite_url)
        assert client.get("/ready").status_code == 200
    store.close()


def test_plotly_comes_from_its_package(service: Service) -> None:
    with httpx.Client(base_url=service.url) as browser:
        response = browser.get("/ui/vendor/plotly.min.js")
        assert response.status_code == 200
        assert "javascript" in response.headers["content-type"]
        assert response.headers["cache-control"] == "public, max-age=86400"
        assert b"plotly.js" in response.content[:200]
        again = browser.get("/ui/vendor/plotly.min.js", headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_root_leads_to_the_ui(service: Service) -> None:
    with httpx.Client(base_url=service.url) as browser:
        response = browser.get("/")
        assert (response.status_code, response.headers["location"]) == (307, "/ui/")
        page = browser.get("/ui/")
        assert page.status_code == 200
        assert "text/html" in page.headers["content-type"]
        assert page.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/api/v1/health", "/api/v1/nothing", "/ui/vendor/plotly.min.js", "/"])
def test_security_headers(service: Service, path: str) -> None:
    headers = httpx.get(service.url + path).headers

    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert "script-src" not in policy  # nothing more than the default
    assert policy["frame-ancestors"] == "'none'"
    assert "server" not in headers


def test_api_answers_are_not_cached(http: httpx.Client) -> None:
    assert http.get("/jobs").headers["cache-control"] == "no-store"
