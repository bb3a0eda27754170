"""Who may ask what, from where; and where the service refuses to listen."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.types import Scope

from api.auth import check_bind, host_name, is_local, is_loopback
from api.settings import Settings
from api.store.sql import SqlStore
from optimizer.errors import UserError
from tests.api.conftest import Service, running
from tests.api.test_errors import check_error

OPEN = ["/health", "/ready", "/version"]


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def secret(store: SqlStore) -> str:
    """A valid token."""
    return store.create_token("test")[1]


@pytest.mark.parametrize(
    ("require", "header", "status"),
    [
        ("auto", None, 200),
        ("auto", "good", 200),
        ("auto", "Bearer wrong", 401),
        ("auto", "Bearer", 401),
        ("auto", "Basic bWU6aHVudGVyMg==", 401),
        ("auto", "expired", 401),
        ("auto", "revoked", 401),
        ("always", None, 401),
        ("always", "good", 200),
        ("always", "Bearer wrong", 401),
        ("always", "expired", 401),
    ],
)
def test_tokens(
    store: SqlStore, settings: Settings, secret: str, require: str, header: str | None, status: int
) -> None:
    revoked = store.create_token("revoked")
    store.delete_token(revoked[0].id)
    known = {"good": secret, "revoked": revoked[1], "expired": store.create_token("old", ttl_s=1e-6)[1]}
    headers = {} if header is None else {"Authorization": f"Bearer {known[header]}" if header in known else header}
    changed = settings.model_copy(update={"require_token": require})

    with running(store, changed) as service, service.http(headers=headers) as http:
        response = http.get("/jobs")
        assert response.status_code == status
        if status == 401:
            assert check_error(response, 401, "unauthorized").remedy
            assert response.headers["www-authenticate"].startswith("Bearer")
        assert [http.get(path).status_code for path in OPEN] == [200, 200, 200]
        assert http.get("/openapi.json").status_code == 200


def test_the_ui_needs_no_token(store: SqlStore, settings: Settings) -> None:
    with running(store, settings.model_copy(update={"require_token": "always"})) as service:
        assert httpx.get(f"{service.url}/ui/vendor/plotly.min.js").status_code == 200
        assert httpx.get(f"{service.url}/ui/").status_code == 200


def test_event_streams_need_a_token_too(store: SqlStore, settings: Settings, secret: str) -> None:
    with running(store, settings.model_copy(update={"require_token": "always"})) as service, service.http() as http:
        check_error(http.get("/events"), 401, "unauthorized")
        with http.stream("GET", "/events", headers=bearer(secret)) as response:
            assert response.status_code == 200


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via", "X-Forwarded-Host"])
def test_a_request_through_a_proxy_is_not_local(http: httpx.Client, header: str, secret: str) -> None:
    check_error(http.get("/jobs", headers={header: "203.0.113.9"}), 401, "unauthorized")
    assert http.get("/jobs", headers={header: "203.0.113.9", **bearer(secret)}).status_code == 200


def test_a_public_host_is_answered_with_a_token_only(store: SqlStore, settings: Settings, secret: str) -> None:
    changed = settings.model_copy(update={"public_hosts": ["merge.example.org"]})
    with running(store, changed) as service, service.http(headers={"Host": "merge.example.org"}) as http:
        check_error(http.get("/jobs"), 401, "unauthorized")
        assert http.get("/jobs", headers=bearer(secret)).status_code == 200
        origin = {"Origin": "https://merge.example.org", **bearer(secret)}
        assert http.delete("/jobs/0000", headers=origin).status_code == 404
        check_error(http.get("/jobs", headers={"Host": "evil.example"}), 403, "forbidden")


def test_a_server_on_every_address_needs_tokens_even_from_here(
    store: SqlStore, settings: Settings, secret: str
) -> None:
    with running(store, settings.model_copy(update={"host": "0.0.0.0"})) as service, service.http() as http:
        check_error(http.get("/jobs"), 401, "unauthorized")
        assert http.get("/jobs", headers=bearer(secret)).status_code == 200
        assert http.get("/jobs", headers={"Host": "gpu-box:8756", **bearer(secret)}).status_code == 200


@pytest.mark.parametrize(
    ("host", "client", "header", "local"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:8756", True),
        ("localhost", "127.0.0.1", "localhost", True),
        ("::1", "::1", "[::1]:8756", True),
        ("127.0.0.1", "192.0.2.7", "127.0.0.1", False),  # started on another address than the settings say
        ("127.0.0.1", "127.0.0.1", "box.example", False),
        ("127.0.0.1", "127.0.0.1", "", False),
        ("0.0.0.0", "127.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", None, "127.0.0.1", False),
    ],
)
def test_what_is_local(host: str, client: str | None, header: str, local: bool) -> None:
    scope: Scope = {
        "type": "http",
        "client": (client, 1) if client else None,
        "headers": [(b"host", header.encode())] if header else [],
    }
    assert is_local(scope, Settings(host=host)) is local


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.evil.example", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_loopback_names(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("header", "name"),
    [("a:80", "a"), ("A.B", "a.b"), ("[::1]:80", "::1"), ("[::1", ""), ("", ""), ("user@127.0.0.1", "127.0.0.1")],
)
def test_host_names(header: str, name: str) -> None:
    assert host_name(header) == name


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"host": "::1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "192.0.2.7"}, True),
        ({"host": "box.example"}, True),
        ({"require_token": "always"}, True),
        ({"public_hosts": ["merge.example.org"]}, True),
    ],
)
def test_listening_is_refused_without_a_token(store: SqlStore, changes: dict[str, Any], refused: bool) -> None:
    settings = Settings(**changes)
    if refused:
        store.create_token("old", ttl_s=1e-6)  # an expired one does not count
        with pytest.raises(UserError) as caught:
            check_bind(settings, store)
        assert "mergeopt token create" in (caught.value.remedy or "")
        store.create_token("test")
    check_bind(settings, store)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1.evil.example", "http://", "://"]
)
def test_foreign_origins_change_nothing(http: httpx.Client, origin: str) -> None:
    assert check_error(http.post("/jobs", json={}, headers={"Origin": origin}), 403, "forbidden").field == "Origin"
    assert http.get("/jobs", headers={"Origin": origin}).status_code == 200
    assert "access-control-allow-origin" not in http.get("/jobs", headers={"Origin": origin}).headers


def test_the_own_origin_is_fine(service: Service, http: httpx.Client) -> None:
    check_error(http.post("/jobs", json={}, headers={"Origin": service.url}), 422, "invalid_input")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8756", "", "[::1", "localhost.evil.example"])
def test_dns_rebinding_is_refused(http: httpx.Client, host: str) -> None:
    for path in ("/jobs", "/health"):
        check_error(http.get(path, headers={"Host": host}), 403, "forbidden")
    assert http.get("/jobs", headers={"Host": "localhost:1"}).status_code == 200
