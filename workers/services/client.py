"""The client of a service: many requests at once, within limits and budgets, through faults, and none paid for twice."""

from __future__ import annotations

import json
import logging
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlsplit

import torch

from optimizer.errors import InfeasibleCandidate, InvalidInput, JobPaused, ServiceUnavailable
from optimizer.fitness.cost import Cost
from workers.merging.cache import Cache, key_of
from workers.policy import Policy
from workers.services.addresses import Resolver, check_allowed, parse_origin, resolve, system_resolver
from workers.services.breaker import Breaker
from workers.services.meter import Meter
from workers.services.options import Limits, Prices
from workers.services.pace import SYSTEM, Backoff, Clock, Pace, retry_after_s
from workers.services.requests import Redaction, Request, mask, reveal
from workers.services.wire import CalledOff, Fault, Reply, Wire

log = logging.getLogger(__name__)

T = TypeVar("T")

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
_KIND = "answer of a service"
_PULSE_S = 0.1  # how often whoever asks is asked whether it is called off
_SHORTEST_SECRET = 6  # characters; removing a shorter one would change answers that only look like it
_SHOWN = 300  # characters of an answer that an error may show


class BadAnswer(Exception):
    """What an answer's reader raises where the same request may well be answered properly another time."""


@dataclass(frozen=True)
class Reading(Generic[T]):
    """What was read out of an answer.

    Attributes:
        value: what was asked for.
        tokens_in: tokens that the service says it read.
        tokens_out: tokens that it says it wrote.
    """

    value: T
    tokens_in: float = 0.0
    tokens_out: float = 0.0


@dataclass(frozen=True)
class Question(Generic[T]):
    """A request, and what to make of its answer.

    Attributes:
        request: what is sent.
        read: turns the answer's JSON (NaN and infinities included) into what is wanted; raises `BadAnswer` where another
            try may help, `InfeasibleCandidate` where it cannot. What raises is not kept.
        tokens_in: tokens that the service will read, as far as is known before.
        tokens_out: most tokens that it will write.
    """

    request: Request
    read: Callable[[Any], Reading[T]]
    tokens_in: float = 0.0
    tokens_out: float = 0.0


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What was asked for, and what it cost now: nothing where it was known."""

    value: T
    cost: Cost


@dataclass(frozen=True)
class _Call:
    """Questions that are asked together.

    Attributes:
        over: set once no more tries may begin.
        abandoned: set once even those under way are not wanted any more.
    """

    over: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)


class ServiceClient:
    """Asks one service (scheme, host and port), from any number of threads.

    Answers are kept by method, URL, body and ``key``, in memory or in the cache's directory, for all jobs; secrets are in
    neither. A service that is down, refuses the credentials, or would exceed the budget pauses the job.

    Args:
        url: any URL of the service.
        limits: of this client alone.
        policy: which hosts may be asked, and where secrets are.
        field: dotted path in the job of what names the service, for errors.
        prices: what it charges.
        cache: where answers are kept; in memory by default.
        meter: counts what it costs; its own by default.
        clock: what time it is.
        rng: for the jitter of waits.
        resolver: looks names up.

    Raises:
        InvalidInput: the URL is none that may be asked.
    """

    def __init__(
        self,
        url: str,
        limits: Limits,
        *,
        policy: Policy,
        field: str,
        prices: Prices | None = None,
        cache: Cache | None = None,
        meter: Meter | None = None,
        clock: Clock = SYSTEM,
        rng: random.Random | None = None,
        resolver: Resolver = system_resolver,
    ) -> None:
        self.origin = parse_origin(url, field)
        check_allowed(self.origin, policy, field)
        self.limits = limits
        self.prices = prices or Prices()
        self.meter = meter if meter is not None else Meter()
        self._policy = policy
        self._field = field
        self._cache = cache if cache is not None else Cache(memory_bytes=256 * 2**20)
        self._clock = clock
        self._resolver = resolver
        self._addresses: list[str] | None = None
        self._resolving = threading.Lock()
        self._pace = Pace(limits, clock)
        self._backoff = Backoff(limits.backoff_s, limits.longest_wait_s, rng or random.Random())  # noqa: S311 - jitter
        self._breaker = Breaker(limits.breaker, clock=clock)
        self._refusals = Breaker(limits.refusals, clock=clock)
        self._wire = Wire(self.origin, self._checked, limits, clock)

    def addresses(self) -> list[str]:
        """Return the service's addresses, looked up once and checked.

        Raises:
            InvalidInput: one of them may not be asked.
            OSError: the name cannot be looked up now.
        """
        with self._resolving:
            if self._addresses is None:
                self._addresses = resolve(self.origin, self._policy, self._field, self._resolver)
            return self._addresses

    def check(self) -> None:
        """Look the name up; raises `InvalidInput` where an address may not be asked. Nothing is asked."""
        try:
            self.addresses()
        except OSError as error:
            log.warning("%s: its name cannot be looked up now: %s", self.origin, error)

    def _checked(self) -> list[str]:
        """The addresses, as connections are made: then it is too late for an error of the spec."""
        try:
            return self.addresses()
        except OSError:
            raise Fault("its name cannot be looked up", down=True) from None
        except InvalidInput as error:
            raise self._paused(error.message, error.remedy) from None

    def close(self) -> None:
        """Close all connections."""
        self._wire.close()

    def ask(self, question: Question[T], cancelled: Callable[[], bool] = lambda: False) -> Answer[T]:
        """Ask one question; see `ask_all`."""
        return self.ask_all([question], cancelled)[0]

    def ask_all(
        self, questions: Sequence[Question[T]], cancelled: Callable[[], bool] = lambda: False
    ) -> list[Answer[T]]:
        """Ask several questions, so many at once as allowed, and return the answers in their order.

        Args:
            questions: equal ones are asked once.
            cancelled: asked ten times a second by the calling thread.

        Raises:
            JobPaused: the service is down or refuses the credentials, a secret is missing, or a budget is spent.
            ServiceUnavailable: no usable answer to one of them in all attempts.
            InfeasibleCandidate: the service refuses one of them as it is, or its reader does.
            InvalidInput: a request leads elsewhere, or has a header that cannot be sent.
            CalledOff: ``cancelled`` said so.
        """
        if not questions:
            return []
        call = _Call()
        count = min(self.limits.concurrency, len(questions))
        with ThreadPoolExecutor(count, thread_name_prefix="service") as threads:
            futures = [threads.submit(self._answer, question, call) for question in questions]
            try:
                self._await(futures, cancelled)
            except CalledOff:
                call.abandoned.set()
                raise
            finally:
                call.over.set()  # what is under way is paid for, so it may end; nothing else begins
        if (error := _worst([future.exception() for future in futures])) is not None:
            raise self._counted(error)
        return [future.result() for future in futures]

    def _await(self, futures: Sequence[Future[Answer[T]]], cancelled: Callable[[], bool]) -> None:
        while True:
            if cancelled():
                raise CalledOff
            done, waiting = wait(futures, timeout=_PULSE_S, return_when=FIRST_EXCEPTION)
            if not waiting or any(future.exception() is not None for future in done):
                return

    def _answer(self, question: Question[T], call: _Call) -> Answer[T]:
        """Return the answer that is known, or ask for it; whoever asks the same meanwhile waits for it."""
        if call.over.is_set():
            raise CalledOff
        asked: list[Cost] = []
        fresh: list[Reading[T]] = []

        def compute() -> Mapping[str, torch.Tensor]:
            body, reading, cost = self._try(question, call)
            asked.append(cost)
            fresh.append(reading)
            return {"body": torch.frombuffer(bytearray(body), dtype=torch.uint8)}

        key = key_of({"kind": _KIND, **question.request.identity()})
        kept = self._cache.get(key, compute, lasting=True)
        reading = fresh[0] if fresh else question.read(json.loads(kept["body"].numpy().tobytes()))
        return Answer(reading.value, Cost.total(asked))

    def _try(self, question: Question[T], call: _Call) -> tuple[bytes, Reading[T], Cost]:
        """Ask until there is a usable answer or no attempt left."""
        spent = Cost()
        for tries in range(1, self.limits.attempts + 1):
            self._enter(question, call)
            estimate = self.prices.cost(question.tokens_in, question.tokens_out)
            self.meter.reserve(estimate)
            taken = self.prices.cost(0.0, 0.0)
            try:
                body = self._exchange(question.request, call)
                data, reading = self._usable(question, body)
                taken = self.prices.cost(reading.tokens_in, reading.tokens_out)
                self._breaker.succeeded()
                self._refusals.succeeded()
                return data, reading, spent + taken
            except Fault as fault:
                self._failed(fault, tries)
                wait_s = fault.wait_s if fault.wait_s is not None else self._backoff.wait_s(tries)
            finally:
                self.meter.settle(estimate, taken)
                self._pace.settle(estimate.tokens, taken.tokens)
            spent += taken
            self._sleep(wait_s, call)
        raise AssertionError("the last attempt raises")

    def _enter(self, question: Question[T], call: _Call) -> None:
        """Wait for this request's turn."""
        reason = self._breaker.blocked() or self._refusals.blocked()
        if reason is not None:
            raise self._paused(reason)
        while (wait_s := self._pace.enter(question.tokens_in + question.tokens_out)) > 0:
            self._sleep(wait_s, call)

    def _sleep(self, seconds: float, call: _Call) -> None:
        end = self._clock.now() + seconds
        while (left := end - self._clock.now()) > 0:
            if call.over.is_set():
                raise CalledOff
            self._clock.sleep(min(left, _PULSE_S))

    def _exchange(self, request: Request, call: _Call) -> bytes:
        url, headers, body, secrets = self._reveal(request)
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        reply = self._wire.exchange(request.method, target, headers, body, call.abandoned.is_set)
        log.debug("%s %s: %d, %d bytes", request.method, mask(request.url), reply.status, len(reply.body))
        return self._judged(reply, secrets)

    def _reveal(self, request: Request) -> tuple[str, dict[str, str], bytes | None, list[str]]:
        """Return the request with its secrets, and them alone."""
        used: list[str] = []

        def lookup(name: str) -> str:
            try:
                used.append(self._policy.secret(name, self._field))
            except InvalidInput as error:
                raise self._paused(error.message, error.remedy) from None
            return used[-1]

        url = reveal(request.url, lambda name: quote(lookup(name), safe=""))
        if parse_origin(url, self._field) != self.origin:
            raise InvalidInput(
                "every request must go to the same scheme, host and port",
                field=self._field,
                remedy=f"begin the URL with {self.origin}/",
            )
        headers = {"Accept": "application/json", **reveal(dict(request.headers), lookup)}
        for name, value in headers.items():
            if not (_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)):
                raise InvalidInput(
                    f"the header {name!r} cannot be sent: it holds line breaks or characters beyond Latin-1",
                    field=self._field,
                )
        body = None
        if request.body is not None:
            body = json.dumps(reveal(request.body, lookup), ensure_ascii=False).encode()
            headers["Content-Type"] = "application/json"
        return url, headers, body, used

    def _judged(self, reply: Reply, secrets: Sequence[str]) -> bytes:
        """Return the body of an answer that is one; secrets that a service repeats are not in it."""
        status, text = reply.status, _text(reply.body)
        if 200 <= status < 300:
            return Redaction(secrets, _SHORTEST_SECRET)(text).encode()
        shown = Redaction(secrets)(text)[:_SHOWN]
        said = f"{status}: {shown}" if shown else str(status)
        if status in (401, 403):
            raise self._paused(f"it refuses the credentials ({said})", "renew the secret, then resume the job")
        if status in (408, 425, 429) or status >= 500:
            wait_s = retry_after_s(reply.headers.get("retry-after"), self._clock)
            if wait_s is not None:
                self._pace.hold(min(wait_s, self.limits.longest_wait_s))
            raise Fault(f"it answered {said}", down=status in (429, 502, 503, 504), wait_s=wait_s)
        if 300 <= status < 400:
            raise Fault(f"it answered {status}, a redirect, which is not followed")
        raise _Refused(f"{self.origin} answered {said}", field=self._field)

    def _counted(self, error: BaseException) -> BaseException:
        """Return what becomes of a failed round of questions: a service that fails at all of them pauses the job."""
        opened = None
        if isinstance(error, ServiceUnavailable):
            opened = self._breaker.failed(error.message)
        elif isinstance(error, _Refused):
            opened = self._refusals.failed(error.message)
        return error if opened is None else self._paused(opened)

    def _usable(self, question: Question[T], body: bytes) -> tuple[bytes, Reading[T]]:
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise Fault(f"its answer is no JSON: {_text(body)[:_SHOWN]!r}") from None
        try:
            return body, question.read(data)
        except BadAnswer as error:
            raise Fault(f"its answer cannot be used: {error}") from None

    def _failed(self, fault: Fault, tries: int) -> None:
        """Count a failed try; raise what becomes of the question if there is no other, or none that makes sense."""
        log.info("%s: %s (try %d of %d)", self.origin, fault.text, tries, self.limits.attempts)
        if fault.wait_s is not None and fault.wait_s > self.limits.longest_wait_s:
            raise self._open(f"it asks not to be asked again for {fault.wait_s:.0f} s ({fault.text})")
        if tries < self.limits.attempts:
            return
        reason = f"{fault.text}, after {tries} tries"
        if fault.down:
            raise self._open(reason)
        error = ServiceUnavailable(f"the service {self.origin} gives no usable answer: {reason}", field=self._field)
        error.retry_after_s = fault.wait_s
        raise error

    def _open(self, reason: str) -> JobPaused:
        self._breaker.failed(reason, at_once=True)
        return self._paused(reason)

    def _paused(self, reason: str, remedy: str | None = "resume the job when it is back") -> JobPaused:
        return JobPaused(f"the service {self.origin} cannot be used: {reason}", field=self._field, remedy=remedy)


class _Refused(InfeasibleCandidate):
    """The service says that the request is wrong (4xx)."""


def _text(body: bytes) -> str:
    return body.decode("utf-8", errors="replace")


def _worst(errors: Sequence[BaseException | None]) -> BaseException | None:
    """Return the error that decides: what pauses the job before what concerns one question."""
    found = [error for error in errors if error is not None]
    for kind in (JobPaused, InvalidInput, InfeasibleCandidate, ServiceUnavailable):
        for error in found:
            if isinstance(error, kind):
                return error
    return min(found, key=lambda error: isinstance(error, CalledOff), default=None)
