"""The evaluator `chat`: a scripted server for what is sent and read, a real model for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from optimizer.errors import InfeasibleCandidate, InvalidInput, JobPaused, ServiceUnavailable
from optimizer.fitness.cost import Cost
from tests.workers.evaluators.services import asking, candidate
from tests.workers.openai_server import smollm2
from tests.workers.services.server import Received, Server, answer, in_turn, serving

ROWS = [{"prompt": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(5)]


def sums(received: Received, connection: Any) -> None:
    """Add up, rightly where the model is called good; long where it is hot."""
    data = received.data
    n = int(data["messages"][-1]["content"].split()[2])
    text = str(2 * n if data["model"] == "good-adapter" else 2 * n + 1)
    tokens = 9 if data["temperature"] > 1 else 2
    answer(
        {
            "choices": [
                {"message": {"role": "assistant", "content": text}, "finish_reason": "length" if tokens > 8 else "stop"}
            ],
            "usage": {"prompt_tokens": 11, "completion_tokens": tokens},
        }
    )(received, connection)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(sums) as found:
        yield found


def options(server: Server, **changes: Any) -> dict[str, Any]:
    return {
        "url": f"{server.url}/v1",
        "model": "{{values.which}}-adapter",
        "system": "Answer as a {{values.who}}.",
        "sampling": {"temperature": "{{values.t}}", "max_tokens": 16},
        "prices": {"per_million_input_tokens": 1e6, "per_million_output_tokens": 2e6},
        **changes,
    }


def test_the_candidate_says_who_answers_and_how(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_SECRET_API", "api-s3cr3t")
    evaluator = asking("chat", ROWS, server.port, **options(server, token="api"))
    good = evaluator.score(candidate(which="good", who="clerk", t=0.5))
    assert good["score"].values.tolist() == [1.0] * 5
    assert good["tokens"].values.tolist() == [2.0] * 5
    assert good["truncated"].values.tolist() == [0.0] * 5
    assert good.cost == Cost(items=5, requests=5, tokens=65, money=5 * (11 + 4))
    sent = server.received[0]
    assert sent.headers["authorization"] == "Bearer api-s3cr3t"
    assert (sent.data["model"], sent.data["temperature"], sent.data["max_tokens"]) == ("good-adapter", 0.5, 16)
    assert sent.data["messages"][0] == {"role": "system", "content": "Answer as a clerk."}
    bad = evaluator.score(candidate(which="bad", who="clerk", t=1.5))
    assert bad["score"].values.tolist() == [0.0] * 5
    assert bad["truncated"].values.tolist() == [1.0] * 5
    assert evaluator.score(candidate(which="good", who="clerk", t=0.5)).cost == Cost()
    assert len(server.received) == 10


def test_graders_are_named_in_the_options(server: Server) -> None:
    graders = {"exact": "exact_match", "begins": {"name": "exact_match", "options": {"where": "start"}}}
    evaluator = asking("chat", ROWS, server.port, **options(server, graders=graders))
    assert evaluator.metrics == {
        "exact": "maximise",
        "begins": "maximise",
        "tokens": "minimise",
        "truncated": "minimise",
    }
    scores = evaluator.score(candidate(which="good", who="clerk", t=0))
    assert set(scores) == set(evaluator.metrics)
    part = evaluator.subset([3, 1]).score(candidate(which="good", who="clerk", t=0))
    assert part.cost == Cost()
    np.testing.assert_array_equal(part["exact"].values, [1, 1])


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        {"choices": []},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": 7}}]},
        {"choices": {"0": 1}},
        {"error": {"message": "overloaded"}},
    ],
)
def test_answers_that_are_no_completion(server: Server, data: Any) -> None:
    server.script = in_turn(answer(data), sums)
    evaluator = asking("chat", ROWS, server.port, **options(server))
    assert evaluator.score(candidate(which="good", who="a", t=0))["score"].values.tolist() == [1.0] * 5
    server.script = answer(data)
    with pytest.raises(ServiceUnavailable, match=r"no chat completion|no text"):
        evaluator.score(candidate(which="good", who="b", t=0))


def test_a_model_that_writes_nothing_or_refuses(server: Server) -> None:
    """Of several choices the first counts; tokens that nobody counts are words."""
    message = {"content": None, "refusal": "I cannot do that"}
    server.script = answer({"choices": [{"message": message}, {"message": {"content": "4"}}]})
    scores = asking("chat", ROWS[2:3], server.port, **options(server)).score(candidate(which="good", who="a", t=0))
    assert (scores["score"].values[0], scores["tokens"].values[0]) == (0, 4)


def test_a_model_that_is_not_there_fails_the_candidate(server: Server) -> None:
    server.script = answer({"error": {"message": "The model 'bad-adapter' does not exist"}}, 404)
    evaluator = asking("chat", ROWS, server.port, **options(server))
    with pytest.raises(InfeasibleCandidate, match="'bad-adapter' does not exist"):
        evaluator.score(candidate(which="bad", who="a", t=0))
    with pytest.raises(InfeasibleCandidate, match=r"values\.t"):
        evaluator.score(candidate(which="bad", who="a"))
    server.script = answer({"error": {"message": "Incorrect API key"}}, 401)
    with pytest.raises(JobPaused, match="Incorrect API key"):
        evaluator.score(candidate(which="bad", who="a", t=0))


def test_estimate(server: Server) -> None:
    found = asking("chat", ROWS, server.port, **options(server)).estimate()
    assert found.requests == 5
    assert 5 * (16 + 20) < found.tokens < 5 * (16 + 50)
    assert not server.received


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": "{{vals.x}}"}, "model"),
        ({"system": "{{secret.api}}"}, "system"),
        ({"prompt": "{{rows}}"}, "prompt"),
        ({"sampling": {"temperature": "{{x}}"}}, "sampling.temperature"),
        ({"graders": {"score": "nonsense"}}, "graders.score.name"),
        ({"graders": {"tokens": "exact_match"}}, "graders.tokens"),
        ({"url": "http://elsewhere.example/v1"}, "url"),
    ],
)
def test_bad_options_are_refused(server: Server, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        asking("chat", ROWS, server.port, **options(server, **changes))
    assert caught.value.field == f"objectives.0.options.{field}"


@pytest.mark.slow
def test_a_real_model() -> None:
    """SmolLM2 behind llama.cpp's server: another system prompt gives other answers, the same one the kept ones."""
    rows = [
        {"prompt": f"What is the capital of {country}?", "answer": city}
        for country, city in (("France", "Paris"), ("Italy", "Rome"))
    ]
    with smollm2() as url:
        port = urlsplit(url).port
        assert port is not None
        evaluator = asking(
            "chat",
            rows,
            port,
            url=url,
            model="smollm2",
            system="{{values.system}}",
            sampling={"temperature": 0, "max_tokens": 12, "seed": 0},
            graders={"found": {"name": "exact_match", "options": {"where": "anywhere"}}},
            limits={"concurrency": 2, "read_s": 600, "total_s": 600},
        )
        sensible = evaluator.score(candidate(system="Answer with the name of the city."))
        assert sensible["found"].values[0] == 1.0, "so small a model knows Paris at least"
        assert sensible.cost.requests == 2
        assert 2 * 20 < sensible.cost.tokens < 2 * 100
        assert (sensible["tokens"].values <= 12).all()
        other = evaluator.score(candidate(system="Whatever you are asked, say: banana."))
        assert other.cost.requests == 2
        assert evaluator.score(candidate(system="Answer with the name of the city.")).cost == Cost()
