"""Errors: from exceptions to JSON and back; the one shape over every route."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.app import create_app, route_table
from api.errors import error_view, rebuild
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import ErrorBody, ErrorView
from optimizer.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    InvalidProblems,
    MergeoptError,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    UserError,
)
from optimizer.spec import parse_spec
from tests.api.conftest import Service, inspect_spec, running

ROUTES = [
    (method, path)
    for method, path, _ in route_table(create_app(SqlStore("sqlite:///unused.db"), Settings(), inspect_spec))
]
OPEN = {"/api/v1/health", "/api/v1/ready", "/api/v1/version"}
WITH_BODY = [
    (method, path)
    for method, path in ROUTES
    if method == "POST" and not path.endswith(("/pause", "/resume", "/cancel"))
]
"""Nothing is at these ids."""
IDS = {"job_id": "0" * 16, "export_id": "0" * 16, "index": "7"}


def concrete(path: str) -> str:
    """Return a path with ids that nothing has."""
    return re.sub(r"{(\w+)}", lambda match: IDS[match[1]], path)


def check_error(response: httpx.Response, status: int, code: str) -> ErrorBody:
    """Return the error of a response, which has the one shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = ErrorView.model_validate_json(response.content).error
    assert body.code == code
    assert body.message
    return body


@pytest.fixture(scope="module")
def shared(sqlite_template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One empty service for all that only looks at errors."""
    store = SqlStore(f"sqlite:///{sqlite_template}")
    with running(store, Settings(home=tmp_path_factory.mktemp("home"), max_body_bytes=2048)) as service:
        yield service
    store.close()


@pytest.fixture(scope="module")
def raw(shared: Service) -> Iterator[httpx.Client]:
    """A plain HTTP client of the shared service."""
    with httpx.Client(base_url=shared.url, timeout=30) as client:
        yield client


def _tree(cls: type[MergeoptError]) -> Iterator[type[MergeoptError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == "optimizer.errors":
            yield from _tree(child)


@pytest.mark.parametrize("cls", [cls for cls in _tree(MergeoptError) if cls is not InvalidProblems])
def test_every_class_survives_the_wire(cls: type[MergeoptError]) -> None:
    view = ErrorView.model_validate_json(error_view(cls("no", field="a.b", remedy="do")).model_dump_json())
    error = rebuild(view.error, cls.status)

    assert type(error) is cls
    assert (error.message, error.field, error.remedy) == ("no", "a.b", "do")


def test_all_problems_survive_the_wire() -> None:
    with pytest.raises(InvalidProblems) as caught:
        parse_spec({"name": "", "seed": -1})
    error = rebuild(error_view(caught.value).error, 422)

    assert isinstance(error, InvalidProblems)
    assert error.problems == caught.value.problems
    assert len(error.problems) > 3


@pytest.mark.parametrize(
    ("status", "cls"),
    [(404, NotFound), (409, Conflict), (401, Unauthorized), (418, UserError), (502, Unavailable), (500, MergeoptError)],
)
def test_an_unknown_code_becomes_what_fits_the_status(status: int, cls: type[MergeoptError]) -> None:
    assert type(rebuild(ErrorBody(code="new", message="x"), status)) is cls


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_wrong_token(method: str, path: str, raw: httpx.Client) -> None:
    response = raw.request(method, concrete(path), headers={"Authorization": "Bearer wrong"}, params={"follow": False})
    if path in OPEN:
        assert response.status_code == 200
    else:
        assert check_error(response, 401, "unauthorized").remedy
        assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if "{" in route[1]])
def test_unknown_ids(method: str, path: str, raw: httpx.Client) -> None:
    bodies = {"exports": {"candidate": 0}, "candidates": {"genome": [0.5]}, "clone": {"changes": {}}}
    body = bodies.get(path.rsplit("/", 1)[-1])
    check_error(raw.request(method, concrete(path), json=body), 404, "not_found")


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if "{job_id}" in route[1]])
def test_malformed_ids(method: str, path: str, raw: httpx.Client) -> None:
    body: dict[str, Any] | None = {} if (method, path) in WITH_BODY else None
    error = check_error(raw.request(method, path.format(job_id="no id!", index="-1"), json=body), 422, "invalid_input")
    assert "job_id" in [problem["field"] for problem in error.problems]


@pytest.mark.parametrize(
    "path", sorted({path for _, path in ROUTES} | {"/", "/ui/index.html", "/ui/vendor/plotly.min.js"})
)
def test_wrong_method(path: str, raw: httpx.Client) -> None:
    response = raw.patch(concrete(path))
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_foreign_host(method: str, path: str, raw: httpx.Client) -> None:
    error = check_error(raw.request(method, concrete(path), headers={"Host": "evil.example"}), 403, "forbidden")
    assert error.field == "Host"


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[0] != "GET"])
def test_foreign_origin(method: str, path: str, raw: httpx.Client) -> None:
    error = check_error(
        raw.request(method, concrete(path), headers={"Origin": "http://evil.example"}), 403, "forbidden"
    )
    assert error.field == "Origin"


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[0] != "GET"])
def test_too_large(method: str, path: str, raw: httpx.Client) -> None:
    error = check_error(raw.request(method, concrete(path), json={"name": "x" * 3000}), 413, "too_large")
    assert error.field == "body"


@pytest.mark.parametrize(("method", "path"), WITH_BODY)
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"a: b: c", "application/yaml"),
        (b"a=1", "application/x-www-form-urlencoded"),
        (b"", "application/json"),
        (b'{"nobody_knows_me": 1}', "application/json"),
        (b"\xff\xfe\xfd", "application/json"),
    ],
)
def test_malformed_bodies(method: str, path: str, content: bytes, kind: str, raw: httpx.Client) -> None:
    response = raw.request(method, concrete(path), content=content, headers={"Content-Type": kind})
    error = check_error(response, 422, "invalid_input")
    assert error.field


@pytest.mark.parametrize(
    "path", ["/nothing", "/api/v1/nothing", "/api/v2/jobs", "/ui/nothing.js", "/docs", "/ui/%2e%2e/app.py"]
)
def test_unknown_paths(path: str, raw: httpx.Client) -> None:
    check_error(raw.get(path), 404, "not_found")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "state=asleep", "cursor=%00", "name=%00", "cursor=forged"]
)
def test_wrong_queries(query: str, raw: httpx.Client) -> None:
    error = check_error(raw.get(f"/api/v1/jobs?{query}"), 422, "invalid_input")
    assert error.field == query.partition("=")[0]


def test_errors_are_all_of_the_tree() -> None:
    """What a route may answer with is one of these, so that clients can rely on the codes."""
    documented = {NotFound, Conflict, InvalidInput, TooLarge, Unauthorized, Forbidden, Unavailable}
    app = create_app(SqlStore("sqlite:///unused.db"), Settings(), inspect_spec)
    statuses = {
        int(status)
        for operations in app.openapi()["paths"].values()
        for operation in operations.values()
        for status in operation["responses"]
        if not status.startswith("2")
    }
    assert statuses == {cls.status for cls in documented} | {500}


class _Broken(SqlStore):
    """A store whose reads fail in a way that nobody foresaw."""

    def get_job(self, job_id: str) -> None:  # type: ignore[override]
        raise RuntimeError("the password is hunter2")


def test_the_unexpected_is_logged_and_not_told(
    sqlite_url: str, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    store = _Broken(sqlite_url)
    with running(store, settings) as service, service.http() as client, caplog.at_level(logging.ERROR, "api"):
        response = client.get("/jobs/0000")
    store.close()

    error = check_error(response, 500, "internal")
    assert "hunter2" not in response.text
    number = re.search(r"[0-9a-f]{32}", error.remedy or "")
    assert number is not None
    assert number[0] in caplog.text
    assert "hunter2" in caplog.text
    assert response.headers["x-content-type-options"] == "nosniff"


def test_error_bodies_hold_nothing_else(raw: httpx.Client) -> None:
    body = json.loads(raw.get("/api/v1/nothing").content)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "field", "remedy", "problems"}
