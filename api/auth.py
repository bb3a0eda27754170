"""Who may ask: bearer tokens, and when none is needed."""

from __future__ import annotations

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import Scope

from api.context import get_context
from api.settings import Settings
from api.store.ports import JobStore
from optimizer.errors import Unauthorized, UserError

_REMEDY = "make a token with `mergeopt token create NAME` on the server, and send it as `Authorization: Bearer TOKEN`"
# What a reverse proxy adds. With one of them a request comes from elsewhere, however near the proxy is.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")

bearer = HTTPBearer(
    auto_error=False,
    description="A token made by `mergeopt token create`. Requests from the service's own machine need none by default.",
)


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine under a name that no DNS server can give to another."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(header: str) -> str:
    """Return the name in a Host header (``name``, ``name:port``, ``[::1]:port``), or an empty text."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def is_local(scope: Scope, settings: Settings) -> bool:
    """Whether a request needs no token: it comes from this machine, to a loopback address, and through no proxy."""
    headers = Headers(scope=scope)
    client = scope.get("client")
    return (
        not settings.always_require_token
        and is_loopback(settings.host)
        and client is not None
        and is_loopback(client[0])
        and is_loopback(host_name(headers.get("host", "")))
        and not any(name in headers for name in _FORWARDED)
    )


def authenticate(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> None:
    """Let a request through, or raise `Unauthorized`. A wrong token is refused even where none is needed."""
    context = get_context(request)
    if credentials is not None:
        if context.store.check_token(credentials.credentials) is None:
            raise Unauthorized("the token is wrong or has expired", remedy=_REMEDY)
    elif "authorization" in request.headers:
        raise Unauthorized("the Authorization header holds no bearer token", remedy=_REMEDY)
    elif not is_local(request.scope, context.settings):
        raise Unauthorized("a token is needed", remedy=_REMEDY)


def check_bind(settings: Settings, store: JobStore) -> None:
    """Refuse to listen where a token is needed while none exists; raises `UserError`."""
    if is_loopback(settings.host) and not settings.public_hosts and not settings.always_require_token:
        return
    if not store.has_tokens():
        raise UserError(
            f"listening on {settings.host} needs an access token, and there is none",
            field="MERGEOPT_HOST",
            remedy="make one with `mergeopt token create NAME`, or listen on 127.0.0.1",
        )
