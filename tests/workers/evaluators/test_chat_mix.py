"""The evaluator `chat_mix`: a server with known log-probabilities for its arithmetic, a real model for the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from optimizer.errors import InfeasibleCandidate, InvalidData, InvalidInput, JobPaused, ServiceUnavailable
from optimizer.fitness.cost import Cost
from tests.workers.evaluators.services import asking, candidate
from tests.workers.openai_server import smollm2
from tests.workers.services.server import Received, Server, answer, serving

LABELS = ["A", "B"]
ROWS = [{"prompt": f"item {n}", "answer": LABELS[n % 2], "task": ["law", "maths"][n // 3]} for n in range(6)]
TRUTH = {"good": 0.9, "bad": 0.2}
"""Probability that each of the server's models gives to the right label."""


def completions(received: Received, connection: Any) -> None:
    """Answer as OpenAI's API does, with the log-probabilities that a model is known to have."""
    data = received.data
    n = int(data["messages"][-1]["content"].split()[1])
    right, wrong = LABELS[n % 2], LABELS[1 - n % 2]
    p = TRUTH[data["model"]] if data.get("temperature", 0) < 1 else 0.5
    top = [{"token": right, "logprob": math.log(p)}, {"token": f" {wrong}", "logprob": math.log(1 - p)}]
    said = {"role": "assistant", "content": right if p > 0.5 else wrong}
    choice: dict[str, Any] = {"message": said, "finish_reason": "stop"}
    if data.get("logprobs"):
        choice["logprobs"] = {"content": [{"token": right, "top_logprobs": top[: data["top_logprobs"]]}]}
    usage = {"prompt_tokens": 20, "completion_tokens": 1}
    answer({"choices": [choice], "usage": usage})(received, connection)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(completions) as found:
        yield found


def options(server: Server, **changes: Any) -> dict[str, Any]:
    members = {
        "one": {"model": "good", "weight": "{{values.one}}", "prices": {"per_request": 3}},
        "two": {"model": "bad", "weight": "{{values.two}}"},
    }
    return {"url": f"{server.url}/v1", "labels": LABELS, "members": members, **changes}


def test_weights_mix_what_members_hold_likely(server: Server) -> None:
    evaluator = asking("chat_mix", ROWS, server.port, **options(server))
    scores = evaluator.score(candidate(one=1.0, two=3.0))
    p = (0.9 + 3 * 0.2) / 4
    np.testing.assert_allclose(scores["loss"].values, -math.log(p), rtol=1e-5)
    np.testing.assert_array_equal(scores["accuracy"].values, [0.0] * 6)
    assert scores.cost == Cost(items=6, requests=12, tokens=12 * 21, money=18)
    again = evaluator.score(candidate(one=3.0, two=1.0))
    np.testing.assert_allclose(again["loss"].values, -math.log((3 * 0.9 + 0.2) / 4), rtol=1e-5)
    np.testing.assert_array_equal(again["accuracy"].values, [1.0] * 6)
    assert again.cost == Cost(), "other weights ask for nothing"
    assert len(server.received) == 12
    sent = server.received[0]
    assert sent.target == "/v1/chat/completions"
    assert (sent.data["max_tokens"], sent.data["logprobs"], sent.data["top_logprobs"]) == (1, True, 20)


def test_a_logarithmic_pool(server: Server) -> None:
    evaluator = asking("chat_mix", ROWS, server.port, **options(server, pool="logarithmic"))
    right, wrong = 0.9**2 / 0.2**0.5, 0.1**2 / 0.8**0.5
    found = evaluator.score(candidate(one=2.0, two=-0.5))["loss"].values
    np.testing.assert_allclose(found, -math.log(right / (right + wrong)), rtol=1e-4)


def test_members_without_weight_are_not_asked(server: Server) -> None:
    evaluator = asking("chat_mix", ROWS, server.port, **options(server))
    evaluator.score(candidate(one=1.0, two=0))
    assert {received.data["model"] for received in server.received} == {"good"}
    for weights in ({"one": 0, "two": 0}, {"one": 1.0, "two": -1.0}, {"one": "x", "two": 1.0}, {"two": 1.0}):
        with pytest.raises(InfeasibleCandidate) as caught:
            evaluator.score(candidate(**weights))
        assert str(caught.value.field).startswith("objectives.0.options.members")


def test_routes_and_weights_by_task(server: Server) -> None:
    members = {
        "one": {"model": "good", "weights": {"law": "{{values.law}}"}},
        "two": {"model": "bad", "weight": 1},
    }
    evaluator = asking(
        "chat_mix", ROWS, server.port, **options(server, members=members, routes={"maths": "{{values.maths}}"})
    )
    found = evaluator.score(candidate(law=4.0, maths="two"))["loss"].values
    np.testing.assert_allclose(found[:3], -math.log((4 * 0.9 + 0.2) / 5), rtol=1e-5)
    np.testing.assert_allclose(found[3:], -math.log(0.2), rtol=1e-5)
    assert len(server.received) == 3 * 2 + 3
    found = evaluator.score(candidate(law=4.0, maths="one"))["loss"].values
    np.testing.assert_allclose(found[3:], -math.log(0.9), rtol=1e-5)
    assert len(server.received) == 12
    with pytest.raises(InfeasibleCandidate, match="no member 'three'"):
        evaluator.score(candidate(law=4.0, maths="three"))


def test_sampling_is_part_of_the_question(server: Server) -> None:
    evaluator = asking("chat_mix", ROWS, server.port, **options(server, sampling={"temperature": "{{values.t}}"}))
    for t in (0.1, 1.5, 0.1):
        evaluator.score(candidate(one=1.0, two=1.0, t=t))
    assert len(server.received) == 24


def test_votes(server: Server) -> None:
    evaluator = asking("chat_mix", ROWS, server.port, **options(server, by="votes", votes=3))
    scores = evaluator.score(candidate(one=1.0, two=1.0))
    shares = np.array([3.5 / 4, 0.5 / 4])
    np.testing.assert_allclose(scores["loss"].values, -math.log(shares.mean()), rtol=1e-5)
    seeds = [received.data["seed"] for received in server.received if received.data["model"] == "good"]
    assert sorted(set(seeds)) == [0, 1, 2]
    assert len(server.received) == 6 * 2 * 3


def test_labels_of_each_row(server: Server) -> None:
    rows = [{**row, "labels": ["A", "B", f"C{n}"]} for n, row in enumerate(ROWS)]
    evaluator = asking("chat_mix", rows, server.port, **options(server, labels=[]))
    assert evaluator.score(candidate(one=1.0, two=0.0))["accuracy"].values.tolist() == [1.0] * 6
    part = evaluator.subset([4])
    assert part.score(candidate(one=1.0, two=0.0)).cost == Cost()


def test_services_without_log_probabilities(server: Server) -> None:
    server.script = answer({"choices": [{"message": {"content": "A"}}]})
    with pytest.raises(ServiceUnavailable, match="no log-probabilities: use `by: votes`"):
        asking("chat_mix", ROWS, server.port, **options(server)).score(candidate(one=1.0, two=1.0))


def test_each_member_may_have_a_service_of_its_own(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_SECRET_FIRST", "first-key")
    changes = options(server, token="first")
    changes["members"]["two"]["url"] = f"http://127.0.0.1:{server.port}/other"
    evaluator = asking("chat_mix", ROWS, server.port, **changes)
    evaluator.score(candidate(one=1.0, two=1.0))
    sent = {
        received.data["model"]: (received.target, received.headers.get("authorization")) for received in server.received
    }
    assert sent["good"] == ("/v1/chat/completions", "Bearer first-key")
    assert sent["bad"] == ("/other/chat/completions", None), "a secret goes to its own service only"


def test_estimate(server: Server) -> None:
    found = asking("chat_mix", ROWS, server.port, **options(server)).estimate()
    assert (found.requests, found.money) == (12, 18)
    assert 12 * 10 < found.tokens < 12 * 30
    assert not server.received


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"labels": ["A"]}, "labels", "two different labels"),
    ({"members": {"one": {"model": "{{value.x}}"}}}, "members.one.model", "no placeholder"),
    ({"prompt": "{{secret.key}}"}, "prompt", "no placeholder"),
    ({"url": "http://elsewhere.example/v1"}, "url", "does not let jobs ask"),
]


@pytest.mark.parametrize(("changes", "field", "said"), REFUSED)
def test_bad_options_are_refused(server: Server, changes: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        asking("chat_mix", ROWS, server.port, **options(server, **changes))
    assert caught.value.field == f"objectives.0.options.{field}"


def test_bad_rows_are_refused(server: Server) -> None:
    for bad in ({"answer": "C"}, {"answer": None}):
        with pytest.raises(InvalidData, match="line 2"):
            asking("chat_mix", [ROWS[0], {**ROWS[1], **bad}], server.port, **options(server))
    for labels in ("A, B", ["A"], ["A", ""], [1, 2]):
        with pytest.raises(InvalidData, match="line 1"):
            asking("chat_mix", [{**ROWS[0], "labels": labels}], server.port, **options(server))


@pytest.mark.slow
def test_a_real_model() -> None:
    """SmolLM2 behind llama.cpp's server, under two system prompts: probabilities are a model's own, and are kept."""
    rows = [
        {"prompt": f"Is {thing} a colour? Answer Yes or No.", "answer": "Yes" if is_one else "No"}
        for thing, is_one in (("red", True), ("seven", False), ("blue", True), ("bread", False))
    ]
    members = {
        name: {"model": name, "system": system, "weight": f"{{{{values.{name}}}}}"}
        for name, system in (("plain", "Answer the question."), ("contrary", "Always answer No."))
    }
    with smollm2() as url:
        port = urlsplit(url).port
        assert port is not None
        evaluator = asking(
            "chat_mix",
            rows,
            port,
            url=url,
            labels=["Yes", "No"],
            members=members,
            limits={"concurrency": 2, "read_s": 600, "total_s": 600},
        )
        plain, contrary, both = (
            evaluator.score(candidate(plain=one, contrary=two)) for one, two in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
        )
        p, q, mixed = (np.exp(-scores["loss"].values) for scores in (plain, contrary, both))
        np.testing.assert_allclose(mixed, (p + q) / 2, rtol=1e-4)
        assert (abs(p - q) > 0.01).any(), "the system prompt matters"
        assert plain.cost.requests == 4
        assert plain.cost.tokens > 4 * 20
        assert both.cost == Cost()


def test_a_request_can_be_read_by_a_service_as_json(server: Server) -> None:
    asking("chat_mix", [{"prompt": "item 0 “ü”", "answer": "A"}], server.port, **options(server)).score(
        candidate(one=1.0, two=0.0)
    )
    assert json.loads(server.received[0].body)["messages"][-1]["content"] == "item 0 “ü”"


def test_an_expired_token_pauses(server: Server) -> None:
    server.script = answer({"error": {"message": "expired"}}, 401)
    with pytest.raises(JobPaused, match="expired"):
        asking("chat_mix", ROWS, server.port, **options(server)).score(candidate(one=1.0, two=1.0))
