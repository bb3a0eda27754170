"""What every request passes before it reaches a route: errors, headers, the gate, the body."""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import host_name, is_loopback
from api.documents import Format, parse_document
from api.errors import error_view, invalid_request
from api.settings import Settings
from api.views import ErrorBody, ErrorView
from optimizer.errors import Forbidden, InvalidInput, MergeoptError, TooLarge, TooManyRequests, Unauthorized

log = logging.getLogger(__name__)

SMALLER = "name data by path instead of sending it; the limit is MERGEOPT_MAX_BODY_BYTES"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
DRAIN = 16
"""A body over the limit is read and dropped up to this many times the limit, so that its sender gets to the answer."""

_HEADERS = {
    # plotly sets styles on elements; nothing needs inline or evaluated scripts.
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; object-src 'none'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_YAML_TYPES = frozenset({"application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml", "text/vnd.yaml"})
_CODES = {404: "not_found", 405: "method_not_allowed"}


def install(app: FastAPI, settings: Settings, remedy: str = SMALLER) -> None:
    """Put everything in this module around ``app``; ``remedy`` is for bodies that are too large."""
    app.add_exception_handler(RequestValidationError, _answer_validation)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_middleware(BodyReader, limit=settings.max_body_bytes, remedy=remedy)
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(ErrorBoundary)
    app.add_middleware(SecurityHeaders)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    return _answer(invalid_request(errors, f"see the schema at {request.app.openapi_url}"))


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 500)
    messages = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not possible here"}
    body = ErrorBody(
        code=_CODES.get(status, "invalid_input"),
        message=messages.get(status, str(getattr(error, "detail", "the request cannot be understood"))),
        remedy=f"see {request.app.openapi_url}",
    )
    return JSONResponse(ErrorView(error=body).model_dump(), status, getattr(error, "headers", None))


def _answer(error: MergeoptError) -> JSONResponse:
    headers = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="mergeopt"'
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return JSONResponse(error_view(error).model_dump(), error.status, headers)


class ErrorBoundary:
    """Answers every exception in the one error shape; what nobody expected is logged under an id that the answer names."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one request."""
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            return
        except MergeoptError as error:
            if started or scope["type"] != "http":
                raise
            await _answer(error)(scope, receive, send)
        except Exception:
            if started or scope["type"] != "http":
                raise
            await _internal(scope)(scope, receive, send)


def _internal(scope: Scope) -> JSONResponse:
    number = uuid.uuid4().hex
    log.exception("%s %s failed (error %s)", scope["method"], scope["path"], number)
    body = ErrorBody(
        code="internal",
        message="something went wrong in the service",
        remedy=f"its log has the details: error {number}",
    )
    return JSONResponse(ErrorView(error=body).model_dump(), 500)


class SecurityHeaders:
    """Adds the headers that tell browsers what they must not do; answers of the API are not cached."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one request."""

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self.app(scope, receive, add)


class Gate:
    """Refuses what only a browser under somebody else's control would send.

    On a loopback address, a Host header with a foreign name is DNS rebinding. Anywhere, a request that changes something
    and whose Origin is another site is a forgery.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.public = frozenset(name.lower() for name in settings.public_hosts)
        self.loopback = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check_host(headers)
            if scope["method"] not in SAFE_METHODS:
                self._check_origin(headers)
        await self.app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        name = host_name(headers.get("host", ""))
        if self.loopback and not is_loopback(name) and name not in self.public:
            raise Forbidden(
                f"this service does not answer as {name or 'a nameless host'}",
                field="Host",
                remedy="use its loopback address, or name the host in MERGEOPT_PUBLIC_HOSTS",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None:
            return
        site = urlsplit(origin).netloc.lower() if origin.count("://") == 1 else ""
        if not site or (site != headers.get("host", "").lower() and host_name(site) not in self.public):
            raise Forbidden(
                "requests from other sites are refused", field="Origin", remedy="use the service's own pages"
            )


class BodyReader:
    """Reads the body up to the limit, checks it, and hands it on as JSON whatever it was written in."""

    def __init__(self, app: ASGIApp, limit: int, remedy: str) -> None:
        self.app = app
        self.limit = limit
        self.remedy = remedy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one request."""
        if scope["type"] != "http" or scope["method"] in SAFE_METHODS:
            await self.app(scope, receive, send)
            return
        body = await self._read(receive)
        if body:
            scope, body = await run_in_threadpool(_to_json, scope, body)
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        """Return the whole body; raises `TooLarge`."""
        chunks: list[bytes] = []
        size, more = 0, True
        while more and size <= self.limit * DRAIN:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self.limit:
                chunks.append(chunk)
        if size > self.limit:
            raise TooLarge(
                f"the body is larger than {self.limit} bytes",
                field="body",
                remedy=self.remedy,
            )
        return b"".join(chunks)


def _to_json(scope: Scope, body: bytes) -> tuple[Scope, bytes]:
    form = _format(Headers(scope=scope).get("content-type", ""))
    data = parse_document(body, form)
    if form == "yaml":
        body = json.dumps(data).encode()
    headers = MutableHeaders(raw=list(scope["headers"]))
    headers["content-type"] = "application/json"
    headers["content-length"] = str(len(body))
    return {**scope, "headers": headers.raw}, body


def _format(content_type: str) -> Format:
    kind = content_type.partition(";")[0].strip().lower()
    if kind in _YAML_TYPES or kind.endswith("+yaml"):
        return "yaml"
    if kind in ("", "application/json") or kind.endswith("+json"):
        return "json"
    raise InvalidInput(
        f"bodies of type {kind} are not understood",
        field="Content-Type",
        remedy="send application/json or application/yaml",
    )


def _replay(body: bytes, receive: Receive) -> Callable[[], Any]:
    """Return a ``receive`` that gives ``body`` once and then whatever the server has to say."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
