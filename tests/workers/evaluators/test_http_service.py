"""The evaluator `http` over a real service on loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from optimizer.errors import InfeasibleCandidate, InvalidData, InvalidInput, JobPaused, ServiceUnavailable
from optimizer.fitness.cost import Cost
from tests.workers.evaluators.services import asking, candidate
from tests.workers.services.server import Received, Server, answer, in_turn, serving
from workers.evaluators.base import EVALUATORS, Cancelled
from workers.merging.cache import Cache
from workers.services.sharing import Services

ROWS = [{"x": float(number), "id": f"r{number}"} for number in range(7)]


def distances(received: Received, connection: Any) -> None:
    """Score rows by their distance from a candidate's value, as many as are asked for."""
    data = received.data
    rows = data["rows"] if isinstance(data["rows"], list) else [data["rows"]]
    found = [{"error": abs(row["x"] - data["at"]), "close": abs(row["x"] - data["at"]) < 2} for row in rows]
    usage = {"read": 5 * len(rows), "written": len(rows)}
    answer(
        {"results": found, "one": found[0], "mean": sum(one["error"] for one in found) / len(found), "usage": usage}
    )(received, connection)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(distances) as found:
        yield found


def options(server: Server, each: str, **changes: Any) -> dict[str, Any]:
    path = "/one" if each == "item" else "/results/*"
    return {
        "url": f"{server.url}/score",
        "body": {"at": "{{values.at}}", "rows": "{{row}}" if each == "item" else "{{rows}}"},
        "each": each,
        "batch_size": 3,
        "metrics": {
            "error": {"pointer": f"{path}/error", "direction": "minimise", "low": 0, "high": 100},
            "close": {"pointer": f"{path}/close"},
        },
        "tokens_in": "/usage/read",
        "tokens_out": "/usage/written",
        "prices": {"per_request": 0.5, "per_million_input_tokens": 1e6},
        **changes,
    }


@pytest.mark.parametrize(("each", "requests"), [("item", 7), ("batch", 3), ("candidate", 1)])
def test_scores_of_every_item(server: Server, each: str, requests: int) -> None:
    evaluator = asking("http", ROWS, server.port, **options(server, each))
    assert evaluator.metrics == {"error": "minimise", "close": "maximise"}
    assert len(evaluator) == 7
    scores = evaluator.score(candidate(at=2.5))
    assert scores["error"].values.dtype == np.float32
    np.testing.assert_allclose(scores["error"].values, np.abs(np.arange(7) - 2.5))
    np.testing.assert_array_equal(scores["close"].values, [0, 1, 1, 1, 1, 0, 0])
    assert scores.cost == Cost(items=7, tokens=42, requests=requests, money=0.5 * requests + 35)
    assert evaluator.score(candidate(at=2.5)).cost == Cost(), "kept answers cost nothing"
    assert len(server.received) == requests
    part = evaluator.subset([6, 0])
    np.testing.assert_allclose(part.score(candidate(at=1.0))["error"].values, [5, 1])


def test_one_score_for_the_candidate(server: Server) -> None:
    metrics = {"error": {"pointer": "/mean", "direction": "minimise"}}
    evaluator = asking("http", ROWS, server.port, **options(server, "candidate", aggregate=True, metrics=metrics))
    assert len(evaluator) == 1
    np.testing.assert_allclose(evaluator.score(candidate(at=3.0))["error"].values, [12 / 7])


def test_without_data(server: Server) -> None:
    """The service has items of its own: values go in the URL, and one score comes back."""
    server.script = lambda received, connection: answer({"data": [{"score": float(received.target[-3:])}]})(
        received, connection
    )
    evaluator = asking(
        "http",
        [],
        server.port,
        url=f"{server.url}/score/{{{{values.name}}}}?t={{{{values.t}}}}",
        method="GET",
        aggregate=True,
        metrics={"score": {"pointer": "/data/0/score"}},
    )
    assert evaluator.score(candidate(name="a/b", t=0.7))["score"].values.tolist() == pytest.approx([0.7])
    assert server.received[0].target == "/score/a%2Fb?t=0.7"
    assert server.received[0].body == b""


def test_what_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_SECRET_KEY", "s3cr3t-value")
    recipe = candidate(at=1.5, mode="fast")
    changes = {
        "headers": {"X-Key": "{{secret.key}}", "X-Mode": "mode {{values.mode}}"},
        "body": {
            "at": "{{values.at}}",
            "rows": "{{rows}}",
            "all": "{{recipe}}",
            "of": "{{items}}",
            "is": "{{fingerprint}}",
        },
    }
    evaluator = asking("http", ROWS, server.port, **options(server, "batch", **changes))
    evaluator.score(recipe)
    first = min(server.received, key=lambda received: received.data["of"])
    assert first.data["all"] == recipe.to_json()
    assert first.data["is"] == recipe.fingerprint
    assert first.data["of"] == [0, 1, 2]
    assert (first.headers["x-key"], first.headers["x-mode"]) == ("s3cr3t-value", "mode fast")
    keys = {received.headers["idempotency-key"] for received in server.received}
    assert len(keys) == 3
    server.script = in_turn(answer(None, 500), distances)
    asking("http", ROWS, server.port, **options(server, "batch", **changes)).score(recipe)
    assert {received.headers["idempotency-key"] for received in server.received} == keys, "the same when asked again"


def test_values_in_headers_alone_make_another_question(server: Server) -> None:
    server.script = lambda received, connection: answer({"s": float(received.headers["x-at"])})(received, connection)
    metrics = {"s": {"pointer": "/s"}}
    evaluator = asking(
        "http", [], server.port, url=server.url, headers={"X-At": "{{values.at}}"}, metrics=metrics, aggregate=True
    )
    assert [evaluator.score(candidate(at=at))["s"].values[0] for at in (1.0, 2.0, 1.0)] == [1, 2, 1]
    assert len(server.received) == 2


BAD: dict[str, tuple[Any, str]] = {
    "too few": ([1.0] * 6, r"a list of 6 .* 7 scores, from line 1 to line 7"),
    "too many": ([1.0] * 8, "a list of 8"),
    "no list": (1.0, "a number"),
    "a text": ([1.0, "good", *[1.0] * 5], "line 2: the score is 'good', no number"),
    "null": ([*[1.0] * 6, None], "line 7: the score is null"),
    "NaN": ([1.0, 1.0, float("nan"), *[1.0] * 4], "line 3: the score is nan"),
    "infinity": ([float("inf"), *[1.0] * 6], "line 1: the score is inf"),
    "huge": ([10**400, *[1.0] * 6], "line 1: .* not finite"),
    "below": ([*[1.0] * 3, -0.5, *[1.0] * 3], "line 4: the score -0.5 is below 0"),
    "above": ([*[1.0] * 4, 101, 1.0, 1.0], "line 5: the score 101 is above 100"),
    "nested": ([[1.0]] * 7, "line 1: the score is a list"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_scores_that_are_none_fail_the_candidate(server: Server, kind: str) -> None:
    """Objective and item are named; the next candidate is scored as if nothing had been."""
    value, said = BAD[kind]
    server.script = answer({"errors": value})
    metrics = {"error": {"pointer": "/errors", "low": 0, "high": 100}}
    evaluator = asking(
        "http", ROWS, server.port, **options(server, "candidate", metrics=metrics, tokens_in=None, tokens_out=None)
    )
    with pytest.raises(InfeasibleCandidate, match=said) as caught:
        evaluator.score(candidate(at=1.0))
    assert caught.value.field == "objectives.0.options.metrics.error"
    server.script = answer({"errors": [1.0] * 7})
    assert evaluator.score(candidate(at=1.0)).cost.requests == 2, (
        "what the failed evaluation took is told with the next"
    )


@pytest.mark.parametrize("data", [{}, [], None, {"results": {}}, {"results": [{}] * 7}, {"error": "busy"}])
def test_answers_of_another_shape_are_asked_for_again(server: Server, data: Any) -> None:
    server.script = in_turn(answer(data), distances)
    evaluator = asking("http", ROWS, server.port, **options(server, "candidate"))
    assert len(evaluator.score(candidate(at=1.0))["error"].values) == 7
    server.script = answer(data)
    with pytest.raises(ServiceUnavailable, match=r"options\.metrics\.error: there is nothing at"):
        evaluator.score(candidate(at=2.0))


def test_cancellation(server: Server) -> None:
    server.script = lambda received, connection: time.sleep(10)
    evaluator = asking("http", ROWS, server.port, **options(server, "item"))
    began = time.monotonic()
    with pytest.raises(Cancelled):
        evaluator.score(candidate(at=1.0), lambda: time.monotonic() - began > 0.2)
    assert time.monotonic() - began < 3


def test_an_expired_token_pauses_the_job(server: Server) -> None:
    server.script = answer({"error": "expired"}, 401)
    with pytest.raises(JobPaused, match="credentials"):
        asking("http", ROWS, server.port, **options(server, "batch")).score(candidate(at=1.0))


def test_measures_of_one_worker_share_limits_and_budget(server: Server, tmp_path: Any) -> None:
    services = Services(cache=Cache(tmp_path))
    one = asking("http", ROWS, server.port, services=services, **options(server, "item"))
    two = asking("http", ROWS[:3], server.port, services=services, **options(server, "item"))
    services.meter.allow(Cost(requests=9, tokens=1e9, money=1e9))
    assert one.score(candidate(at=1.0)).cost.requests == 7
    assert two.score(candidate(at=1.0)).cost == Cost(), "the same items"
    with pytest.raises(JobPaused, match="budget of requests"):
        two.score(candidate(at=2.0))
    services.meter.allow(None)
    assert two.score(candidate(at=2.0)).cost.requests == 3, "two of them before the budget was spent"


def test_estimate(server: Server) -> None:
    evaluator = asking("http", ROWS, server.port, **options(server, "batch", expected_tokens=100))
    assert evaluator.estimate() == Cost(tokens=300, requests=3, money=1.5 + 300)
    assert not server.received


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"url": "ftp://127.0.0.1/"}, "url", "http and https"),
    ({"url": "https://elsewhere.example/"}, "url", "does not let jobs ask"),
    ({"url": "http://169.254.169.254/latest"}, "url", "does not let jobs ask"),
    ({"body": {"rows": "{{rows}}"}}, "body", "all candidates would score the same"),
    ({"body": {"at": "{{values.at}}"}}, "body", "which items"),
    ({"body": {"at": "{{value.at}} {{rows}}"}}, "body.at", "no placeholder"),
    ({"body": {"at": "{{values.at}} {{row.x}}"}}, "body.at", "no placeholder"),
    ({"headers": {"Host": "evil.example"}}, "headers.Host", "set by the client"),
    ({"aggregate": True}, "aggregate", "one request for all"),
]


@pytest.mark.parametrize(("changes", "field", "said"), REFUSED)
def test_bad_options_are_refused(server: Server, changes: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        asking("http", ROWS, server.port, **options(server, "batch", **changes))
    assert caught.value.field == f"objectives.0.options.{field}"
    assert not server.received


def test_rows_that_cannot_be_sent_are_refused(server: Server) -> None:
    with pytest.raises(InvalidData, match="line 2"):
        asking("http", [{"x": 1.0}, {"x": float("nan")}], server.port, **options(server, "batch"))
    with pytest.raises(InvalidInput, match="without data"):
        asking("http", [], server.port, **options(server, "candidate"))


def test_options_are_described() -> None:
    info = EVALUATORS["http"].info()
    for name, part in info.options_schema["properties"].items():
        assert part.get("description"), name
    assert info.summary.endswith(".")
