"""Tokens, rate limits, quotas, sessions that end, and the audit log."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from api.endpoint.audit import Audit
from api.endpoint.limits import Limits, RateLimit
from api.endpoint.sessions import Sessions
from api.endpoint.store import EndpointStore
from optimizer.errors import Gone, QuotaExhausted, TooManyRequests, Unavailable
from tests.api.endpoint.conftest import (
    ITEMS,
    Endpoint,
    error,
    evaluate,
    make_recipe,
    make_rows,
    materialise,
    open_session,
    repository,
    running,
)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_route_but_health_needs_a_token(endpoint: Endpoint) -> None:
    with endpoint.http("mo_wrong") as http:
        assert error(http.get("/repository")) == (401, "unauthorized", None)
        assert error(http.post("/sessions")) == (401, "unauthorized", None)
        assert http.get("/repository").headers["WWW-Authenticate"] == 'Bearer realm="mergeopt"'
        assert http.get("/health", headers={"Authorization": ""}).json() == {"status": "ok"}
        del http.headers["Authorization"]
        assert error(http.get("/repository")) == (401, "unauthorized", None)  # not even from this machine


def test_a_revoked_token_is_refused_at_once(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path) as found, found.http() as http:
        assert http.get("/repository").status_code == 200
        (token,) = found.desk.store.list_tokens()
        found.desk.store.delete_token(token.id)
        assert error(http.get("/repository")) == (401, "unauthorized", None)


def test_a_session_is_its_tokens_alone(endpoint: Endpoint) -> None:
    other = endpoint.desk.store.create_token("other")[1]
    with endpoint.http() as http, endpoint.http(other) as stranger:
        session = open_session(http)
        assert error(stranger.get(session)) == (410, "gone", "session")
        assert error(stranger.delete(session)) == (410, "gone", "session")
        assert http.get(session).status_code == 200
        assert http.delete(session).status_code == 204
        assert error(http.get(session)) == (410, "gone", "session")


def test_the_rate_limit_says_when_to_come_again(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, limits={"requests_per_minute": 3}) as found, found.http() as http:
        answers = [http.get("/repository") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert error(answers[-1]) == (429, "too_many_requests", None)
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 20


def test_the_bucket_fills_at_its_rate_and_is_each_tokens_own() -> None:
    clock = Clock()
    limit = RateLimit(60, clock)
    for _ in range(60):
        limit.take(1)
    with pytest.raises(TooManyRequests) as caught:
        limit.take(1)
    assert caught.value.retry_after_s == pytest.approx(1.0)
    limit.take(2)
    clock.now += 1.5
    limit.take(1)
    with pytest.raises(TooManyRequests):
        limit.take(1)
    clock.now += 1000
    for _ in range(60):
        limit.take(1)
    with pytest.raises(TooManyRequests):
        limit.take(1)


@pytest.mark.parametrize("quota", [{"evaluations": 2}, {"items": 2 * ITEMS + 5}])
def test_a_quota_ends_but_what_was_paid_for_stays(models: Path, tmp_path: Path, quota: dict[str, int]) -> None:
    with running(models, tmp_path, limits=quota) as found, found.http() as http:
        session, view = open_session(http), repository(http)
        first, second, third = (materialise(http, session, make_recipe(view, n / 10, 0.5)) for n in range(3))
        paid = evaluate(http, session, first)
        evaluate(http, session, second)
        body = {"candidate": third, "parts": [{"set": "own"}]}
        assert error(http.post(f"{session}/evaluations", json=body)) == (403, "quota_exhausted", "token")
        assert evaluate(http, session, first) == paid
        assert repository(http).usage.evaluations == 2


def test_a_charge_is_all_or_nothing_and_outlives_the_process(tmp_path: Path) -> None:
    store = EndpointStore(tmp_path)
    limits = Limits(evaluations=3)
    store.charge(7, {"a": 10, "b": 10}, limits)
    store.charge(7, {"a": 10, "b": 10}, limits)
    store.close()
    store = EndpointStore(tmp_path)
    with pytest.raises(QuotaExhausted, match="3 evaluations"):
        store.charge(7, {"c": 10, "d": 10}, limits)
    assert store.usage(7).items == 20
    store.charge(7, {"c": 10}, limits)
    store.charge(8, {"a": 10}, limits)
    assert (store.usage(7).evaluations, store.usage(8).evaluations) == (3, 1)
    store.close()


def test_ids_of_models_stay_from_one_start_to_the_next(tmp_path: Path) -> None:
    keys = []
    for _ in range(2):
        store = EndpointStore(tmp_path)
        keys.append(store.key("models"))
        store.close()
    assert keys[0] == keys[1]
    assert len(keys[0]) == 32


def test_the_oldest_results_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.endpoint.store.KEPT", 3)
    monkeypatch.setattr("api.endpoint.store.PRUNED_EVERY", 1)
    store = EndpointStore(tmp_path)
    for number in range(5):
        store.add_result(f"{number}", {"number": number})
    assert [store.result(f"{number}") for number in range(5)] == [None, None, *({"number": n} for n in (2, 3, 4))]
    store.close()


def test_a_session_ends_when_it_is_not_used() -> None:
    clock = Clock()
    sessions = Sessions(Limits(session_ttl_s=10, sessions=2), 1, clock)
    first = sessions.open(1)
    clock.now += 9
    assert sessions.get(first.id, 1) is first
    clock.now += 9
    assert sessions.get(first.id, 1) is first
    clock.now += 11
    with pytest.raises(Gone, match="has ended"):
        sessions.get(first.id, 1)


def test_the_session_that_was_unused_for_longest_makes_room() -> None:
    clock = Clock()
    sessions = Sessions(Limits(sessions=2), 1, clock)
    first, second = sessions.open(1), sessions.open(1)
    other = sessions.open(2)
    clock.now += 1
    sessions.get(first.id, 1)
    third = sessions.open(1)
    assert [sessions.get(session.id, 1) for session in (first, third)] == [first, third]
    assert sessions.get(other.id, 2) is other
    with pytest.raises(Gone):
        sessions.get(second.id, 1)


def test_no_more_evaluations_at_once_than_allowed(models: Path, tmp_path: Path, gate: threading.Event) -> None:
    with running(models, tmp_path, limits={"in_flight": 1}) as found, found.http() as http:
        session, view = open_session(http), repository(http)
        one, two = (materialise(http, session, make_recipe(view, n / 10, 0.5)) for n in (1, 2))
        first, second = ({"candidate": candidate, "parts": [{"set": "own"}]} for candidate in (one, two))
        assert http.post(f"{session}/evaluations", json=first).status_code == 202
        assert http.post(f"{session}/evaluations", json=first).status_code == 202  # the same one
        refused = http.post(f"{session}/evaluations", json=second)
        assert error(refused) == (429, "too_many_requests", None)
        assert refused.headers["Retry-After"] == "1"
        assert repository(http).usage.evaluations == 1
        gate.set()
        assert evaluate(http, session, one)["state"] == "done"
        assert evaluate(http, session, two)["state"] == "done"


def test_the_audit_log_tells_who_asked_for_what_and_no_content(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path) as found, found.http() as http:
        session = open_session(http)
        rows = make_rows(ITEMS, seed=9)
        digest = http.post(f"{session}/sets", json={"evaluator": "text_classification", "rows": rows}).json()["digest"]
        fingerprint = materialise(http, session, make_recipe(repository(http), 0.5, 0.5))
        evaluate(http, session, fingerprint, {"set": digest})
        http.post(f"{session}/candidates", json={"recipe": {"root": "secret words"}})
        http.delete(session)
        entries, text = found.audit(), (found.home / "audit.jsonl").read_text()
    assert [entry["action"] for entry in entries] == [
        *("session.open", "set.upload", "candidate.materialise", "evaluation.begin", "evaluation.computed"),
        *("candidate.refused", "session.close"),
    ]
    assert all(re.match(r"2\d{3}-\d\d-\d\dT", entry["at"]) for entry in entries)
    assert {entry.get("name", "client") for entry in entries} == {"client"}
    begin, computed = entries[3:5]
    assert (begin["candidate"], begin["sets"], begin["items"]) == (fingerprint, [digest], ITEMS)
    assert (computed["candidate"], computed["set"], computed["cost"]["items"]) == (fingerprint, digest, ITEMS)
    assert entries[5]["code"] == "invalid_input"
    assert "secret" not in text
    assert rows[0]["text"] not in text
    assert found.token not in text
    assert session.rsplit("/", 1)[-1] not in text
    assert (found.home / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_what_cannot_be_recorded_is_not_done(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.write("first", number=1, nothing=None)
    assert json.loads(audit.path.read_text()) == {
        "at": json.loads(audit.path.read_text())["at"],
        "action": "first",
        "number": 1,
    }
    audit.path.unlink()
    audit.path.mkdir()
    with pytest.raises(Unavailable, match="audit log"):
        audit.write("second")


def test_a_large_body_is_refused_by_the_owners_limit(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, limits={"body_bytes": 2048}) as found, found.http() as http:
        session = open_session(http)
        body: dict[str, Any] = {"evaluator": "text_classification", "rows": make_rows(100)}
        answer = http.post(f"{session}/sets", json=body)
        assert error(answer) == (413, "too_large", "body")
        assert "the owner sets the limit" in answer.json()["error"]["remedy"]
