"""A service that misbehaves, over real connections: what is tried again, what pauses a job, what is given up."""

from __future__ import annotations

import pickle
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import pytest

from optimizer.errors import InfeasibleCandidate, InvalidInput, JobPaused, RetryableError, ServiceUnavailable
from tests.workers.services.asking import FIELD, client, question, questions
from tests.workers.services.clocks import Skipping
from tests.workers.services.server import Script, answer, in_turn, raw, serving
from workers.policy import Policy
from workers.services.wire import CalledOff

GOOD = answer({"score": 0.5})
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def hang_up(received: object, connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def reset(received: object, connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()


PASSING: dict[str, Script] = {
    "429": answer({"error": "slow down"}, 429),
    "500": answer({"error": "oops"}, 500),
    "502 with HTML": answer(None, 502, {"Content-Type": "text/html"}, b"<html>bad gateway</html>"),
    "503": answer(None, 503),
    "504": answer(None, 504),
    "hung up": hang_up,
    "reset": reset,
    "cut off in the headers": raw(HEAD[:30]),
    "cut off in the body": raw(HEAD + b'Content-Length: 100\r\n\r\n{"sco'),
    "cut off in a chunk": raw(HEAD + b'Transfer-Encoding: chunked\r\n\r\n20\r\n{"sco'),
    "truncated JSON": answer(body=b'{"score": 0.'),
    "no JSON": answer(None, 200, {"Content-Type": "text/html"}, b"<html>please log in</html>"),
    "nothing": answer(body=b""),
    "no text": answer(body=b"\xff\xfe\x00"),
    "another shape": answer([1, 2]),
    "another key": answer({"skore": 1}),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "nonsense length": raw(HEAD + b"Content-Length: -7\r\n\r\n{}"),
    "two lengths": raw(HEAD + b'Content-Length: 2\r\nContent-Length: 14\r\n\r\n{"score": 0.5}'),
    "huge headers": raw(HEAD + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(300)) + b"\r\n{}"),
    "too large": answer(body=b" " * 5000 + b"{}"),
    "compressed": answer(None, 200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"),
    "a number of 10,000 digits": answer(body=b'{"score": ' + b"9" * 10_000 + b"}"),
    "nested": answer(body=b"[" * 4000),
}


@pytest.mark.parametrize("fault", list(PASSING))
def test_what_passes_is_tried_again(fault: str) -> None:
    skipping = Skipping()
    with serving(in_turn(PASSING[fault], PASSING[fault], GOOD)) as server:
        asking = client(server, clock=skipping.clock, max_response_bytes=4096)
        found = asking.ask(question(server))
        assert (found.value, found.cost.requests) == (0.5, 3)
        assert asking.meter.spent.requests == 3
        assert len(server.received) == 3
    assert 0 < skipping.waited < 3, "full jitter below 1 s and then 2 s"


@pytest.mark.parametrize("fault", list(PASSING))
def test_what_stays_is_given_up_or_pauses_the_job(fault: str) -> None:
    """A service that is gone pauses the job; one that fails at this question alone may still answer others."""
    with serving(PASSING[fault]) as server:
        asking = client(server, clock=Skipping().clock, attempts=3, max_response_bytes=4096)
        gone = fault[:3] in {"429", "502", "503", "504"}
        with pytest.raises(JobPaused if gone else ServiceUnavailable) as caught:
            asking.ask(question(server))
        assert caught.value.field == FIELD
        assert "after 3 tries" in caught.value.message
        assert str(server.port) in caught.value.message
        assert len(server.received) == 3
        back = pickle.loads(pickle.dumps(caught.value))
        assert isinstance(back, RetryableError) != gone
        assert str(back) == str(caught.value)


def test_nobody_listens() -> None:
    with serving(GOOD) as server:
        pass
    with pytest.raises(JobPaused, match=r"no connection.*after 2 tries"):
        client(server, clock=Skipping().clock, attempts=2).ask(question(server))


def test_failures_in_a_row_open_the_breaker() -> None:
    """Whatever is asked, once enough evaluations in a row have failed; then nobody asks any more."""
    with serving(answer(None, 500)) as server:
        asking = client(server, clock=Skipping().clock, attempts=4, breaker=3)
        for number in range(2):
            with pytest.raises(ServiceUnavailable):
                asking.ask(question(server, number))
        with pytest.raises(JobPaused, match="500"):
            asking.ask(question(server, 2))
        assert len(server.received) == 12
        with pytest.raises(JobPaused, match="500"):
            asking.ask(question(server, 3))
        assert len(server.received) == 12


def test_a_question_that_alone_fails_pauses_nothing() -> None:
    """A poisonous candidate must not stop the job: others are answered between its tries."""

    def script(received: object, connection: socket.socket) -> None:
        data = received.data  # type: ignore[attr-defined]
        (answer(None, 500) if data["number"] == 0 else GOOD)(received, connection)  # type: ignore[arg-type]

    with serving(script) as server:
        asking = client(server, clock=Skipping().clock, attempts=3, breaker=2)
        for number in range(1, 6):
            with pytest.raises(ServiceUnavailable):
                asking.ask(question(server, 0))
            assert asking.ask(question(server, number)).value == 0.5


@pytest.mark.parametrize("status", [429, 503, 500])
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_kept(status: int, form: str) -> None:
    skipping = Skipping()

    def header() -> str:
        return (
            "7" if form == "seconds" else format_datetime(datetime.fromtimestamp(skipping.clock.date() + 8, UTC), True)
        )

    with serving(GOOD) as server:
        server.script = in_turn(answer(None, status, {"Retry-After": header()}), GOOD)
        assert client(server, clock=skipping.clock).ask(question(server)).value == 0.5
    assert 6.5 < skipping.waited < 8.5, "no jitter on top"


def test_one_that_was_told_to_wait_holds_the_others() -> None:
    skipping = Skipping()
    with serving(in_turn(answer(None, 429, {"Retry-After": "30"}), GOOD)) as server:
        asking = client(server, clock=skipping.clock, concurrency=1)
        with pytest.raises(JobPaused):
            client(server, clock=skipping.clock, attempts=1).ask(question(server))
        server.script = in_turn(answer(None, 429, {"Retry-After": "30"}), GOOD)
        asking.ask_all(questions(server, 5))
    assert 29 < skipping.waited < 35, "once, not once each"


def test_a_wait_that_is_too_long_pauses_the_job() -> None:
    with serving(answer(None, 429, {"Retry-After": "3600"})) as server:
        with pytest.raises(JobPaused, match="not to be asked again for 3600 s"):
            client(server, clock=Skipping().clock).ask(question(server))
        assert len(server.received) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_pause_the_job(status: int) -> None:
    with serving(answer({"error": "token expired"}, status)) as server:
        with pytest.raises(JobPaused, match=r"credentials.*token expired") as caught:
            client(server).ask(question(server))
        assert "renew" in str(caught.value.remedy)
        assert len(server.received) == 1


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_is_refused_is_the_candidates_failure(status: int) -> None:
    with serving(answer({"error": "no such model"}, status)) as server:
        asking = client(server, refusals=3)
        for number in range(2):
            with pytest.raises(InfeasibleCandidate, match=f"{status}.*no such model") as caught:
                asking.ask(question(server, number))
            assert caught.value.field == FIELD
        with pytest.raises(JobPaused, match="no such model"):  # a service that refuses everything has another fault
            asking.ask(question(server, 2))
        assert len(server.received) == 3


@pytest.mark.parametrize(
    "location", ["http://169.254.169.254/latest", "http://127.0.0.1:1/", "file:///etc/passwd", "/x"]
)
def test_redirects_are_not_followed(location: str) -> None:
    with serving(answer(None, 302, {"Location": location})) as server:
        with pytest.raises(ServiceUnavailable, match="redirect"):
            client(server, clock=Skipping().clock, attempts=2).ask(question(server))
        assert [one.target for one in server.received] == ["/score"] * 2


DRIPS: dict[str, tuple[Script, str]] = {
    "silent": (raw(b"", b"late", pause_s=5), "silent for 0.3 s"),
    "silent in the body": (raw(HEAD + b"Content-Length: 9\r\n\r\n", b"{}", pause_s=5), "silent for 0.3 s"),
    "dripping headers": (raw(*(bytes([byte]) for byte in HEAD), pause_s=0.1), "within 0.8 s"),
    "dripping body": (raw(HEAD + b"Content-Length: 90\r\n\r\n", *[b" "] * 90, pause_s=0.1), "within 0.8 s"),
    "endless interim answers": (raw(*[b"HTTP/1.1 100 Continue\r\n\r\n"] * 90, pause_s=0.1), "within 0.8 s"),
}


@pytest.mark.parametrize("kind", list(DRIPS))
def test_slow_services(kind: str) -> None:
    script, said = DRIPS[kind]
    with serving(script) as server:
        began = time.monotonic()
        with pytest.raises(ServiceUnavailable, match=said):
            client(server, read_s=0.3, total_s=0.8, attempts=1).ask(question(server))
        assert time.monotonic() - began < 3


def test_an_endless_body() -> None:
    sent = 0

    def script(received: object, connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        while True:
            sent += connection.send(b"10000\r\n" + b" " * 0x10000 + b"\r\n")

    with serving(script) as server, pytest.raises(ServiceUnavailable, match="larger than 1048576 bytes"):
        client(server, max_response_bytes=2**20, attempts=1).ask(question(server))
    assert sent < 16 * 2**20  # what lies in the system's buffers


@pytest.mark.parametrize("keep_alive", [False, True])
def test_an_answer_sent_twice_is_taken_once(keep_alive: bool) -> None:
    """By default a second answer on the connection can never be taken for that to the next question."""

    def script(received: object, connection: socket.socket) -> None:
        number = received.data["number"]  # type: ignore[attr-defined]
        body = b'{"score": %d.0}' % number
        connection.sendall((HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) * (1 if keep_alive else 2))

    with serving(script) as server:
        asking = client(server, concurrency=1, keep_alive=keep_alive)
        with closing(asking):
            values = [found.value for found in asking.ask_all(questions(server, 6))]
        assert values == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_calling_off_takes_less_than_a_second() -> None:
    release = threading.Event()

    def script(received: object, connection: socket.socket) -> None:
        release.wait(20)

    with serving(script) as server:
        began = time.monotonic()
        with pytest.raises(CalledOff):
            client(server).ask_all(questions(server, 40), lambda: time.monotonic() - began > 0.3)
        assert time.monotonic() - began < 2
        assert len(server.received) <= 8
        release.set()


# --- where it leads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://other.example/", "http://127.0.0.1:1/"])
def test_only_the_service_may_be_asked(url: str) -> None:
    with serving(GOOD) as server:
        with pytest.raises(InvalidInput) as caught:
            client(server).ask(question(server, url=url))
        assert caught.value.field == FIELD
        with pytest.raises(InvalidInput):
            client(server, url=url)
        assert not server.received


def test_loopback_is_refused_unless_allowed() -> None:
    with serving(GOOD) as server:
        asking = client(server, policy=Policy(hosts=(f"127.0.0.1:{server.port}",)))
        with pytest.raises(InvalidInput, match=r"127\.0\.0\.1, which is private"):
            asking.check()
        with pytest.raises(JobPaused, match=r"127\.0\.0\.1, which is private"):
            asking.ask(question(server))
        assert not server.received


def rebinding(*answers: list[str]) -> tuple[Callable[[str, int], list[str]], list[str]]:
    left, asked = list(answers), []

    def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        return left.pop(0) if len(left) > 1 else left[0]

    return resolver, asked


def test_a_name_that_changes_between_two_looks() -> None:
    """The address that was checked is the one that is connected to, however often the name server changes its mind."""
    with serving(GOOD) as server:
        policy = Policy(hosts=(f"scores.example:{server.port}",), private_hosts=True)
        url = f"http://scores.example:{server.port}"
        resolver, asked = rebinding(["127.0.0.1"], ["127.0.0.2"], ["169.254.169.254"])
        asking = client(server, policy=policy, url=url, resolver=resolver)
        asking.check()
        for number in range(3):
            assert asking.ask(question(server, number, url=f"{url}/score")).value == 0.5
        assert asked == ["scores.example"], "looked up once"
        assert {one.headers["host"] for one in server.received} == {f"scores.example:{server.port}"}


def test_a_name_that_turns_private_is_refused_at_each_look() -> None:
    with serving(GOOD) as server:
        policy = Policy(hosts=(f"scores.example:{server.port}",))
        url = f"http://scores.example:{server.port}"
        resolver, _ = rebinding(["93.184.215.14"], ["127.0.0.1"])
        client(server, policy=policy, url=url, resolver=resolver).check()
        with pytest.raises(JobPaused, match="private"):
            client(server, policy=policy, url=url, resolver=resolver).ask(question(server, url=f"{url}/score"))
        mixed, _ = rebinding(["93.184.215.14", "127.0.0.1"])
        with pytest.raises(InvalidInput, match="private"):
            client(server, policy=policy, url=url, resolver=mixed).check()
        assert not server.received


def test_an_address_that_does_not_answer_gives_way_to_the_next() -> None:
    with serving(GOOD) as server:
        policy = Policy(hosts=(f"scores.example:{server.port}",), private_hosts=True)
        url = f"http://scores.example:{server.port}"
        asking = client(server, policy=policy, url=url, resolver=lambda *_: ["127.0.0.9", "127.0.0.1"])
        assert asking.ask(question(server, url=f"{url}/score")).value == 0.5


def test_a_name_that_cannot_be_looked_up_pauses_the_job() -> None:
    def resolver(host: str, port: int) -> list[str]:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    with serving(GOOD) as server:
        policy = Policy(hosts=(f"scores.example:{server.port}",))
        url = f"http://scores.example:{server.port}"
        asking = client(server, policy=policy, url=url, resolver=resolver, clock=Skipping().clock, attempts=2)
        asking.check()  # not the spec's fault
        with pytest.raises(JobPaused, match="cannot be looked up"):
            asking.ask(question(server, url=f"{url}/score"))


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(GOOD) as server, serving(answer({"score": 0.1})) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert client(server).ask(question(server)).value == 0.5
        assert not proxy.received


def test_tls_goes_by_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked address is connected to; name indication, certificate and Host header are those of the URL."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("scores.example").configure_cert(context)
    names: list[str | None] = []
    context.sni_callback = lambda connection, name, context: names.append(name)
    with serving(GOOD, tls=context) as server:
        for host, fine in (("scores.example", True), ("other.example", False)):
            policy = Policy(hosts=(f"{host}:{server.port}",), private_hosts=True)
            url = f"https://{host}:{server.port}"
            asking = client(
                server, policy=policy, url=url, resolver=lambda *_: ["127.0.0.1"], attempts=1, clock=Skipping().clock
            )
            if fine:
                assert asking.ask(question(server, url=f"{url}/score")).value == 0.5
            else:
                with pytest.raises(JobPaused, match="no secure one"):
                    asking.ask(question(server, url=f"{url}/score"))
        assert names == ["scores.example", "other.example"]
        assert [one.headers["host"] for one in server.received] == [f"scores.example:{server.port}"]
