"""One exchange over HTTP/1.1: to a checked address, within a deadline that covers all of it, with a bounded answer.

httpcore speaks the protocol. What a hostile or broken service may do to whoever waits for it is dealt with here: a
deadline over connecting, headers and body (however slowly they drip), a bound of the answer's size, no redirects, no
compression (its bombs), no proxies and no credentials of the environment.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import certifi
import httpcore

from workers.services.addresses import Origin
from workers.services.options import Limits
from workers.services.pace import SYSTEM, Clock

_SLICE_S = 0.25  # how long a read may keep a thread from noticing that it is called off


@dataclass(frozen=True)
class Reply:
    """What a service answered.

    Attributes:
        status: the HTTP status.
        headers: by lower-case name; of several with one name the last.
        body: all of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Fault(Exception):
    """An exchange came to nothing.

    Attributes:
        text: what happened, in a few words, without secrets.
        down: whether the service as a whole seems to be gone, whatever it is asked.
        wait_s: how long it asked not to be asked again, or None.
    """

    def __init__(self, text: str, *, down: bool = False, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.down = down
        self.wait_s = wait_s


class CalledOff(Exception):
    """Nobody wants the answer any more."""


class Wire:
    """Connections to one service, for any number of threads.

    Args:
        origin: where it is, as its URL says; also the Host header and the name that its certificate must have.
        addresses: where it really is, checked; asked for when a connection is to be made.
        limits: timeouts, sizes and numbers of connections.
        clock: what time it is.
    """

    def __init__(
        self, origin: Origin, addresses: Callable[[], Sequence[str]], limits: Limits, clock: Clock = SYSTEM
    ) -> None:
        self._origin = origin
        self._limits = limits
        self._clock = clock
        self._turn = threading.local()
        self._pool = httpcore.ConnectionPool(
            ssl_context=_trust() if origin.scheme == "https" else None,
            max_connections=limits.concurrency,
            max_keepalive_connections=limits.concurrency if limits.keep_alive else 0,
            network_backend=_Pinned(addresses, self._left_s),
        )

    def exchange(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | None,
        called_off: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Send a request and return the answer, whatever its status.

        Args:
            method: such as ``POST``.
            target: path and query, as they are sent.
            headers: beside Host, and what follows from the body.
            body: what is sent, or None.
            called_off: asked several times a second.

        Raises:
            Fault: there is no whole answer.
            CalledOff: ``called_off`` said so.
        """
        self._turn.deadline, self._turn.called_off = self._clock.now() + self._limits.total_s, called_off
        sent: dict[str, str] = {"Host": self._origin.netloc, "Accept-Encoding": "identity", **headers}
        if body is not None:
            sent["Content-Length"] = str(len(body))
        if not self._limits.keep_alive:
            sent["Connection"] = "close"
        try:
            request = httpcore.Request(
                method,
                httpcore.URL(scheme=self._origin.scheme, host=self._origin.host, port=self._origin.port, target=target),
                headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in sent.items()],
                content=body,
                extensions={"timeout": self._timeouts()},
            )
            response = self._pool.handle_request(request)
            with closing(response):
                return self._read(response)
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise self._fault(error) from None  # its text or its causes may show what was sent

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()

    def _timeouts(self) -> dict[str, float]:
        limits = self._limits
        return {"connect": limits.connect_s, "read": limits.read_s, "write": limits.read_s, "pool": limits.total_s}

    def _read(self, response: httpcore.Response) -> Reply:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        if headers.get("content-encoding", "identity") != "identity":
            raise Fault("it answered compressed, though that was refused")
        chunks, size = [], 0
        for chunk in response.iter_stream():
            size += len(chunk)
            if size > self._limits.max_response_bytes:
                raise Fault(f"its answer is larger than {self._limits.max_response_bytes} bytes")
            chunks.append(chunk)
        return Reply(response.status, headers, b"".join(chunks))

    def _left_s(self) -> float:
        """Seconds until the deadline of this thread's exchange; raises `CalledOff`."""
        if self._turn.called_off():
            raise CalledOff
        left: float = self._turn.deadline - self._clock.now()
        return left

    def _fault(self, error: Exception) -> Fault:
        if isinstance(error, httpcore.TimeoutException) and self._turn.deadline <= self._clock.now():
            return Fault(f"no whole answer within {self._limits.total_s:g} s")
        text, down = next((text, down) for kind, text, down in _FAULTS if isinstance(error, kind))
        return Fault(text.format(connect=self._limits.connect_s, read=self._limits.read_s), down=down)


def _trust() -> ssl.SSLContext:
    """Trust the authorities that the system does (SSL_CERT_FILE names others), and the usual ones where it has none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


_FAULTS: tuple[tuple[type[Exception], str, bool], ...] = (
    (httpcore.ConnectTimeout, "no connection within {connect:g} s", True),
    (httpcore.ConnectError, "no connection, or no secure one", True),
    (httpcore.TimeoutException, "it was silent for {read:g} s", False),
    (httpcore.RemoteProtocolError, "it broke off, or did not speak HTTP as it should", False),
    (httpcore.NetworkError, "the connection broke", False),
    (Exception, "the request cannot be sent", False),
)


class _Pinned(httpcore.NetworkBackend):
    """Connects to checked addresses, whatever name a URL has; TLS and the Host header go on with the name."""

    def __init__(self, addresses: Callable[[], Sequence[str]], left_s: Callable[[], float]) -> None:
        self._addresses = addresses
        self._left_s = left_s
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        del host
        failure: Exception = httpcore.ConnectError("there is no address")
        for address in self._addresses():
            left = self._left_s()
            if left <= 0:
                raise httpcore.ConnectTimeout
            bound = left if timeout is None else min(timeout, left)
            try:
                stream = self._backend.connect_tcp(address, port, bound, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
            else:
                return _Bounded(stream, self._left_s)
        raise failure


class _Bounded(httpcore.NetworkStream):
    """A stream whose every wait ends at the deadline of the exchange that uses it, or soon after it is called off."""

    def __init__(self, stream: httpcore.NetworkStream, left_s: Callable[[], float]) -> None:
        self._stream = stream
        self._left_s = left_s

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        silent = 0.0
        while True:
            bound = self._bound(None if timeout is None else timeout - silent, httpcore.ReadTimeout)
            try:
                return self._stream.read(max_bytes, min(bound, _SLICE_S))
            except httpcore.ReadTimeout:
                silent += min(bound, _SLICE_S)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._bound(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        bound = self._bound(timeout, httpcore.ConnectTimeout)
        return _Bounded(self._stream.start_tls(ssl_context, server_hostname, bound), self._left_s)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

    def _bound(self, timeout: float | None, over: type[Exception]) -> float:
        left = self._left_s()
        bound = left if timeout is None else min(timeout, left)
        if bound <= 0:
            raise over
        return bound
