"""A real HTTP server on loopback that answers as a test wants, however badly."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Received:
    """A request as it came over the network."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def data(self) -> Any:
        """The JSON in the body."""
        return json.loads(self.body)


Script = Callable[[Received, socket.socket], None]


@dataclass
class Server:
    """What a test knows of the server.

    Attributes:
        port: where it listens, on 127.0.0.1.
        script: answers a request on its connection; a test may replace it at any time.
        received: all requests so far.
        most: how many were under way at once, at most.
    """

    port: int
    script: Script
    received: list[Received] = field(default_factory=list)
    busy: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def answer(
    data: Any = None, status: int = 200, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> Script:
    """Return a script that answers with JSON, or with bytes."""
    content = json.dumps(data).encode() if body is None else body
    lines = {"Content-Type": "application/json", "Content-Length": str(len(content))} | dict(headers or {})
    head = f"HTTP/1.1 {status} Status\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    def script(received: Received, connection: socket.socket) -> None:
        connection.sendall(head.encode() + b"\r\n" + content)

    return script


def raw(*parts: bytes, pause_s: float = 0.0) -> Script:
    """Return a script that sends bytes as they are, with a pause before each but the first."""

    def script(received: Received, connection: socket.socket) -> None:
        for number, part in enumerate(parts):
            time.sleep(pause_s if number else 0.0)
            connection.sendall(part)

    return script


def in_turn(*scripts: Script) -> Script:
    """Return a script that behaves as each of some in turn, and then as the last one for good."""
    left = list(scripts)
    lock = threading.Lock()

    def script(received: Received, connection: socket.socket) -> None:
        with lock:
            now = left.pop(0) if len(left) > 1 else left[0]
        now(received, connection)

    return script


@contextlib.contextmanager
def serving(script: Script, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Run a server while the block runs."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connection = self.request
            with contextlib.suppress(OSError):
                if tls is not None:
                    connection = tls.wrap_socket(connection, server_side=True)
                while (received := _receive(connection)) is not None:
                    with server.lock:
                        server.received.append(received)
                        server.busy += 1
                        server.most = max(server.most, server.busy)
                    try:
                        server.script(received, connection)
                    finally:
                        with server.lock:
                            server.busy -= 1
                    if received.headers.get("connection") == "close":
                        break
                connection.close()

    class Threads(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False
        allow_reuse_address = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that hang up are what is tested

    with Threads(("127.0.0.1", 0), Handler) as threads:
        server = Server(threads.server_address[1], script)
        runner = threading.Thread(target=threads.serve_forever, args=(0.02,), daemon=True)
        runner.start()
        try:
            yield server
        finally:
            threads.shutdown()
            runner.join()


def _receive(connection: socket.socket) -> Received | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        body += connection.recv(65536)
    method, target, _ = first.split(" ")
    return Received(method, target, headers, body)
