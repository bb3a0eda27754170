"""Many questions at once, none paid for twice, and secrets that nobody sees."""

from __future__ import annotations

import base64
import json
import logging
import multiprocessing
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optimizer.errors import InfeasibleCandidate, InvalidInput, JobPaused, MergeoptError, ServiceUnavailable
from optimizer.fitness.cost import Cost
from tests.workers.services.asking import FIELD, client, question, questions, read_score
from tests.workers.services.clocks import Skipping
from tests.workers.services.server import Received, Script, Server, answer, in_turn, serving
from workers.merging.cache import Cache
from workers.services.client import Question
from workers.services.options import Prices
from workers.services.requests import Redaction, Request, Secret, Text, mask, reveal

SECRET = 'sk-s3cr3t/+"%value'
USAGE = {"score": 0.25, "usage": {"in": 12, "out": 3}}


def slowly(script: Script, seconds: float) -> Script:
    def slow(received: Received, connection: Any) -> None:
        time.sleep(seconds)
        script(received, connection)

    return slow


def echo(received: Received, connection: Any) -> None:
    answer({"score": received.data["number"] / 8})(received, connection)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(echo) as found:
        yield found


def test_answers_come_in_the_order_of_the_questions(server: Server) -> None:
    found = client(server).ask_all(questions(server, 30))
    assert [one.value for one in found] == [number / 8 for number in range(30)]
    assert client(server).ask_all([]) == []


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_at_once_than_allowed(server: Server, concurrency: int) -> None:
    together = threading.Barrier(concurrency)

    def wait_for_the_others(received: Received, connection: Any) -> None:
        together.wait(60)
        echo(received, connection)

    server.script = wait_for_the_others
    client(server, concurrency=concurrency).ask_all(questions(server, 9))
    assert server.most == concurrency


def test_rates_are_kept_whatever_the_concurrency(server: Server) -> None:
    skipping = Skipping()
    began = skipping.clock.now()
    client(server, clock=skipping.clock, requests_per_minute=60, concurrency=4).ask_all(questions(server, 10))
    assert 8.5 < skipping.clock.now() - began < 12
    began = skipping.clock.now()
    server.script = answer(USAGE)
    client(server, clock=skipping.clock, tokens_per_minute=900, concurrency=4).ask_all(questions(server, 10))
    assert 7 < skipping.clock.now() - began < 12, "10 × 15 tokens at 15 a second"


def test_what_was_answered_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    server.script = answer(USAGE)
    prices = Prices(per_request=1, per_million_input_tokens=1e6, per_million_output_tokens=2e6)
    cost = Cost(tokens=15, requests=1, money=1 + 12 + 6)
    asking = client(server, cache=Cache(tmp_path), prices=prices)
    assert asking.ask(question(server)).cost == cost
    assert asking.ask(question(server)).cost == Cost()
    later = client(server, cache=Cache(tmp_path), prices=prices)  # another job, another process
    assert [found.cost for found in later.ask_all(questions(server, 2))] == [Cost(), cost]
    assert later.meter.spent == cost
    assert len(server.received) == 2


def test_equal_questions_at_once_are_asked_once(server: Server) -> None:
    server.script = slowly(answer(USAGE), 0.05)
    found = client(server).ask_all([question(server)] * 20)
    assert {one.value for one in found} == {0.25}
    assert Cost.total(one.cost for one in found).requests == 1
    assert len(server.received) == 1


def test_questions_differ_by_method_url_body_and_key(server: Server) -> None:
    server.script = answer(USAGE)
    asking = client(server)
    url = f"{server.url}/score"
    different = [
        Request("POST", url, body={"a": 1}),
        Request("POST", url, body={"a": 2}),
        Request("POST", f"{url}?q=1", body={"a": 1}),
        Request("GET", url),
        Request("POST", url),
        Request("POST", url, body={"a": 1}, key="v2"),
        Request("POST", url, body={"a": Secret("one")}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEOPT_SECRET_ONE", "1")
        for _ in range(2):
            asking.ask_all([Question(request, read_score) for request in different])
        same = Request("POST", url, headers={"X-Trace": "other"}, body={"a": 1})
        asking.ask(Question(same, read_score))
    assert len(server.received) == len(different)


def test_what_is_of_no_use_is_not_kept(server: Server) -> None:
    server.script = in_turn(answer({"score": "high"}), answer({"nothing": 1}), answer({"score": 1.0}))
    asking = client(server, clock=Skipping().clock)
    with pytest.raises(InfeasibleCandidate, match="no number"):
        asking.ask(question(server))
    assert asking.ask(question(server)).value == 1.0
    assert len(server.received) == 3


def test_what_was_paid_for_before_a_fault_is_kept(server: Server) -> None:
    def script(received: Received, connection: Any) -> None:
        (answer(None, 503) if received.data["number"] == 5 else echo)(received, connection)

    server.script = script
    asking = client(server, clock=Skipping().clock, concurrency=1, attempts=2)
    with pytest.raises(JobPaused):
        asking.ask_all(questions(server, 8))
    server.script = echo
    before = len(server.received)
    again = asking
    again._breaker.succeeded()  # as a new client's
    found = again.ask_all(questions(server, 8))
    assert [one.cost.requests for one in found] == [0] * 5 + [1] * 3
    assert len(server.received) == before + 3


def test_a_budget_stops_before_it_is_exceeded(server: Server) -> None:
    server.script = slowly(answer(USAGE), 0.01)
    asking = client(server, prices=Prices(per_request=1))
    asking.meter.allow(Cost(requests=1e9, tokens=1e9, money=7))
    with pytest.raises(JobPaused, match="the budget of money is spent") as caught:
        asking.ask_all(questions(server, 40))
    assert caught.value.field == "budget.money"
    assert len(server.received) == 7
    assert asking.meter.take().money == 7
    assert asking.meter.spent == Cost()
    asking.meter.allow(Cost(requests=40, tokens=1e9, money=1e9))
    found = asking.ask_all(questions(server, 40))
    assert sum(one.cost.requests for one in found) == 33, "what was paid for is not paid for again"


def test_tries_count_as_requests(server: Server) -> None:
    server.script = answer(None, 500)
    asking = client(server, clock=Skipping().clock, attempts=50)
    asking.meter.allow(Cost(requests=5, tokens=1e9, money=1e9))
    with pytest.raises(JobPaused, match="requests"):
        asking.ask(question(server))
    assert len(server.received) == 5


def _ask_in_another_process(port: int, cache: Cache) -> None:
    there = Server(port, echo)
    client(there, cache=cache).ask_all(questions(there, 6))


@pytest.mark.slow
def test_processes_ask_the_same_once(server: Server, tmp_path: Path) -> None:
    server.script = slowly(echo, 0.05)
    cache = Cache(tmp_path)
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_ask_in_another_process, args=(server.port, cache)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert len(server.received) == 6


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MERGEOPT_SECRET_API_KEY", SECRET)
    return SECRET


def secretive(server: Server, number: int = 0) -> Question[float]:
    """A question with the secret in its URL, a header and its body."""
    return Question(
        Request(
            "POST",
            Text((f"{server.url}/score?key=", Secret("api-key-in-url"))),
            {"Authorization": Text(("Bearer ", Secret("api-key")))},
            {"number": number, "auth": [Secret("api-key")]},
        ),
        read_score,
    )


def shapes() -> list[bytes]:
    quoted = json.dumps(SECRET)[1:-1]
    return [SECRET.encode(), quoted.encode(), base64.b64encode(SECRET.encode()).rstrip(b"="), b"url-s3cr3t"]


@pytest.mark.parametrize(
    "script",
    [
        lambda received, connection: answer({"score": 0.5, "you": dict(received.headers)})(received, connection),
        lambda received, connection: answer({"you said": received.data}, 400)(received, connection),
        lambda received, connection: answer({"you said": received.data}, 401)(received, connection),
        lambda received, connection: answer({"you said": str(received)}, 500)(received, connection),
        lambda received, connection: answer(body=received.body + b"?")(received, connection),
        lambda received, connection: answer(body=base64.b64encode(SECRET.encode()))(received, connection),
        lambda received, connection: connection.close(),
    ],
)
def test_secrets_are_sent_and_seen_nowhere(
    script: Script, server: Server, secret: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Not in logs of any level and library, in errors, in their tracebacks, or in what is kept on disk."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MERGEOPT_SECRET_API_KEY_IN_URL", "url-s3cr3t")
    server.script = script
    asking = client(server, clock=Skipping().clock, attempts=2, cache=Cache(tmp_path))
    seen = ""
    try:
        seen = repr(asking.ask(secretive(server)))
    except MergeoptError as error:
        seen = "".join(traceback.format_exception(error)) + str(error) + repr(error.__dict__)
    for got in server.received:
        assert got.target == "/score?key=url-s3cr3t"
        assert got.headers["authorization"] == f"Bearer {secret}"
        assert got.data["auth"] == [secret]
    assert server.received
    seen += caplog.text + repr([record.__dict__ for record in caplog.records]) + repr(secretive(server))
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for shape in shapes():
        assert shape not in seen.encode() + kept


def test_a_missing_secret_pauses_the_job(server: Server) -> None:
    with pytest.raises(JobPaused, match="no secret 'api-key") as caught:
        client(server).ask(secretive(server))
    assert caught.value.field == FIELD
    assert "MERGEOPT_SECRET_API_KEY" in str(caught.value.remedy)
    assert not server.received


def test_answers_do_not_depend_on_the_secret(server: Server, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_SECRET_API_KEY_IN_URL", "1")
    asking = client(server)
    asking.ask(secretive(server))
    monkeypatch.setenv("MERGEOPT_SECRET_API_KEY", "another")
    asking.ask(secretive(server))
    assert len(server.received) == 1


def test_masks_and_redaction() -> None:
    data = {"a": [Secret("x"), Text(("b", Secret("y"), "c")), 1, None]}
    assert mask(data) == {"a": ["{{secret.x}}", "b{{secret.y}}c", 1, None]}
    assert reveal(data, {"x": "1", "y": "2"}.__getitem__) == {"a": ["1", "b2c", 1, None]}
    redact = Redaction([SECRET, "x"])
    for shape in shapes()[:3]:
        assert redact(f"a {shape.decode()} b").startswith("a ***")
    assert Redaction([])("as it is") == "as it is"


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "\x00", "☃"])
def test_headers_cannot_be_injected(server: Server, value: str) -> None:
    request = Request("POST", f"{server.url}/score", {"X-Value": value}, {"number": 1})
    with pytest.raises(InvalidInput, match="X-Value"):
        client(server).ask(Question(request, read_score))
    assert not server.received


def test_an_interrupted_round_says_what_decides(server: Server) -> None:
    """What pauses the job goes before what concerns one question, whichever came first."""

    def script(received: Received, connection: Any) -> None:
        number = received.data["number"]
        (answer(None, 400) if number else slowly(answer(None, 401), 0.05))(received, connection)

    server.script = script
    with pytest.raises(JobPaused, match="credentials"):
        client(server, concurrency=2).ask_all(questions(server, 2))
    server.script = answer(None, 500)
    with pytest.raises(ServiceUnavailable):
        client(server, clock=Skipping().clock, attempts=1).ask_all(questions(server, 4))
