"""The client's side of the merge-and-score protocol: requests that survive faults, and answers that are checked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from optimizer.errors import (
    Conflict,
    Gone,
    InputsChanged,
    InvalidData,
    InvalidInput,
    JobPaused,
    MergeoptError,
    NotFound,
    NotOffered,
    ServiceUnavailable,
    TooLarge,
)
from optimizer.fitness.cost import Cost
from optimizer.geometry import Cuts
from optimizer.problem import Grams
from optimizer.spec import EndpointSpec
from workers.endpoint.protocol import (
    LONGEST_WAIT_S,
    PREFIX,
    PROTOCOL,
    CandidateUpload,
    CandidateView,
    EvaluationRequest,
    EvaluationView,
    RepositoryView,
    SessionView,
    SetUpload,
    SetView,
)
from workers.evaluators.base import Cancelled
from workers.policy import Policy
from workers.services.addresses import check_allowed, parse_origin, resolve
from workers.services.meter import Meter
from workers.services.options import Limits
from workers.services.pace import SYSTEM, Backoff, Clock, retry_after_s
from workers.services.requests import Redaction
from workers.services.wire import CalledOff, Fault, Reply, Wire

FIELD = "endpoint"
LIMITS = Limits(read_s=60.0 + LONGEST_WAIT_S, concurrency=1, max_response_bytes=64 * 2**20)

_REQUEST = Cost(requests=1)
_PULSE_S = 0.1  # how often whoever asks is asked whether it is called off
_SHOWN = 300  # characters of an answer that an error may show
_ERRORS: dict[str, type[MergeoptError]] = {
    cls.code: cls for cls in (InvalidInput, InvalidData, NotOffered, NotFound, Conflict, Gone, TooLarge)
}

V = TypeVar("V", bound=BaseModel)
T = TypeVar("T")
Cancel = Callable[[], bool]


def _never() -> bool:
    return False


class EndpointClient:
    """Talks to one endpoint, from one thread.

    Requests are repeated, waiting longer each time, where an answer is missing, broken or busy; all of them may be.

    Attributes:
        meter: counts the requests that are sent, repeated ones too, and stops at the budget.

    Args:
        spec: where it is, and the name of its token.
        policy: which hosts may be asked, and where secrets are.
        limits: how long and how often it is asked.
        clock: what time it is.

    Raises:
        InvalidInput: the URL is none that may be asked.
    """

    def __init__(self, spec: EndpointSpec, policy: Policy, limits: Limits = LIMITS, clock: Clock = SYSTEM) -> None:
        self.origin = parse_origin(spec.url, f"{FIELD}.url")
        check_allowed(self.origin, policy, f"{FIELD}.url")
        self.meter = Meter()
        self._path = urlsplit(spec.url).path.rstrip("/").removesuffix(PREFIX) + PREFIX
        self._token = spec.token
        self._policy = policy
        self._limits = limits
        self._clock = clock
        self._backoff = Backoff(limits.backoff_s, limits.longest_wait_s, random.Random())  # noqa: S311 - jitter
        self._wire = Wire(self.origin, self._addresses, limits, clock)

    def close(self) -> None:
        """Close the connection."""
        self._wire.close()

    def repository(self) -> RepositoryView:
        """Return what the owner offers.

        Raises:
            JobPaused: the endpoint cannot be reached, or refuses the token.
            ServiceUnavailable: it gives no answer that can be used.
            InvalidInput: it speaks another version of the protocol.
        """
        view = self._ask("GET", "/repository", RepositoryView)
        if view.protocol != PROTOCOL:
            raise InvalidInput(
                f"the endpoint speaks version {view.protocol} of the protocol, not {PROTOCOL}", field=f"{FIELD}.url"
            )
        return view

    def grams(self, cuts: Cuts) -> Grams:
        """Return inner products of the models; raises `NotOffered`, and as `repository`."""
        return self._ask("GET", f"/repository/grams?cuts={cuts}", Grams)

    def open_session(self) -> SessionView:
        """Open a session; raises as `repository`."""
        return self._ask("POST", "/sessions", SessionView)

    def close_session(self, session: str) -> None:
        """Close a session; raises `Gone`, and as `repository`."""
        self._send("DELETE", f"/sessions/{session}", None, _never, lambda _: None)

    def upload(self, session: str, upload: SetUpload) -> SetView:
        """Upload a query set; raises `Gone`, `InvalidInput`, `TooLarge`, and as `repository`."""
        return self._ask("POST", f"/sessions/{session}/sets", SetView, upload.model_dump(mode="json"))

    def materialise(self, session: str, recipe: Mapping[str, Any], cancelled: Cancel = _never) -> str:
        """Materialise a candidate and return its fingerprint.

        Raises:
            Gone: the session has ended.
            InvalidInput: the owner does not evaluate it.
            InputsChanged: a model is no longer the one that it was made for.
            Cancelled: ``cancelled`` said so.
        """
        body = CandidateUpload(recipe=dict(recipe)).model_dump(mode="json")
        return self._ask("POST", f"/sessions/{session}/candidates", CandidateView, body, cancelled).fingerprint

    def evaluate(self, session: str, request: EvaluationRequest, cancelled: Cancel = _never) -> EvaluationView:
        """Evaluate a candidate and wait until that is over.

        Raises:
            Gone, NotFound: the session has ended, or lacks the candidate or a set.
            InvalidInput: the owner does not evaluate it.
            JobPaused: the token's quota is used up; and as `repository`.
            Cancelled: ``cancelled`` said so; the endpoint is told.
        """
        path = f"/sessions/{session}/evaluations"
        wait = f"wait_s={min(LONGEST_WAIT_S, 20.0):g}"
        view = self._ask("POST", f"{path}?{wait}", EvaluationView, request.model_dump(mode="json"), cancelled)
        try:
            while not view.over:
                view = self._ask("GET", f"{path}/{view.id}?{wait}", EvaluationView, None, cancelled)
        except Cancelled:
            self._call_off(f"{path}/{view.id}")
            raise
        return view

    def _call_off(self, path: str) -> None:
        try:
            self._judge(self._exchange("DELETE", path, None, _never))
        except (Fault, MergeoptError):  # it ends by itself
            return

    def _ask(self, method: str, path: str, view: type[V], body: Any = None, cancelled: Cancel = _never) -> V:
        """Send a request and return its answer."""
        return self._send(method, path, body, cancelled, partial(_read, view))

    def _send(self, method: str, path: str, body: Any, cancelled: Cancel, read: Callable[[Reply], T]) -> T:
        """Send a request until there is an answer that can be used, or no attempt left."""
        for tries in range(1, self._limits.attempts + 1):
            try:
                return read(self._judge(self._exchange(method, path, body, cancelled)))
            except CalledOff:
                raise Cancelled("the evaluation was called off") from None
            except Fault as fault:
                self._count(fault, tries)
                wait_s = fault.wait_s if fault.wait_s is not None else self._backoff.wait_s(tries)
            self._sleep(wait_s, cancelled)
        raise AssertionError("the last attempt raises")

    def _exchange(self, method: str, path: str, body: Any, cancelled: Cancel) -> Reply:
        headers = {"Accept": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._secret()}"
        data = None
        if body is not None:
            data = json.dumps(body, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"
        self.meter.reserve(_REQUEST)
        self.meter.settle(_REQUEST, _REQUEST)
        return self._wire.exchange(method, self._path + path, headers, data, cancelled)

    def _secret(self) -> str:
        return self._policy.secret(str(self._token), f"{FIELD}.token")

    def _addresses(self) -> list[str]:
        try:
            return resolve(self.origin, self._policy, f"{FIELD}.url")
        except OSError:
            raise Fault("its name cannot be looked up", down=True) from None

    def _judge(self, reply: Reply) -> Reply:
        """Return an answer that is one; raise what its error stands for."""
        if 200 <= reply.status < 300:
            return reply
        code, message, field, remedy = self._error(reply)
        if reply.status in (401, 403):
            raise JobPaused(
                f"the endpoint {self.origin} answers: {message}",
                field=f"{FIELD}.token",
                remedy=f"{remedy or 'ask its owner'}; then resume the job",
            )
        if code == Conflict.code:
            raise InputsChanged(f"the endpoint's models changed: {message}", field=FIELD, remedy="begin a new job")
        if code in _ERRORS:
            raise _ERRORS[code](message, field=field, remedy=remedy)
        busy = reply.status in (429, 502, 503, 504)
        wait_s = retry_after_s(reply.headers.get("retry-after"), self._clock)
        raise Fault(f"it answered {reply.status}: {message}", down=busy, wait_s=wait_s)

    def _error(self, reply: Reply) -> tuple[str | None, str, str | None, str | None]:
        """Code, message, field and remedy of an error; whatever else it is, is shown in part."""
        clean = Redaction([self._secret()] if self._token is not None else [])
        text = clean(reply.body.decode("utf-8", errors="replace"))
        try:
            error = json.loads(text)["error"]
            code, message = str(error["code"]), str(error["message"])[:_SHOWN]
            field, remedy = (
                (None if error.get(name) is None else str(error[name])[:_SHOWN]) for name in ("field", "remedy")
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None, text[:_SHOWN], None, None
        return code, message, field, remedy

    def _count(self, fault: Fault, tries: int) -> None:
        """Raise what becomes of the request if no other try is left, or none that makes sense."""
        if fault.wait_s is not None and fault.wait_s > self._limits.longest_wait_s:
            self._pause(f"it asks not to be asked again for {fault.wait_s:.0f} s ({fault.text})")
        if tries < self._limits.attempts:
            return
        reason = f"{fault.text}, after {tries} tries"
        if fault.down:
            self._pause(reason)
        raise ServiceUnavailable(f"the endpoint {self.origin} gives no usable answer: {reason}", field=FIELD)

    def _pause(self, reason: str) -> NoReturn:
        raise JobPaused(
            f"the endpoint {self.origin} cannot be used: {reason}", field=FIELD, remedy="resume the job when it is back"
        )

    def _sleep(self, seconds: float, cancelled: Cancel) -> None:
        end = self._clock.now() + seconds
        while (left := end - self._clock.now()) > 0:
            if cancelled():
                raise Cancelled("the evaluation was called off")
            self._clock.sleep(min(left, _PULSE_S))


def _read(view: type[V], reply: Reply) -> V:
    try:
        return view.model_validate_json(reply.body)
    except (ValidationError, RecursionError) as error:
        first = str(error).splitlines()
        raise Fault(f"its answer cannot be used: {' '.join(first[1:3])[:_SHOWN]}") from None
