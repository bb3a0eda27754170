"""Access tokens: the secret is shown once, the store keeps its SHA-256.

The secret has 256 random bits, so a plain hash is enough, and looking the hash up tells an attacker who measures time
nothing about the secret.
"""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, or_, select

from api.store import rendering
from api.store.columns import utc_now
from api.store.engine import Database
from api.store.models import TokenRow
from api.views import TokenView
from optimizer.errors import InvalidInput, NotFound

_PREFIX = "mo_"
_USE_RECORDED_EVERY = timedelta(minutes=1)


class Tokens(Database):
    """Makes, checks and revokes access tokens."""

    def create_token(self, name: str, ttl_s: float | None = None) -> tuple[TokenView, str]:
        """Make an access token; return it and its secret, of which only a hash is kept.

        Args:
            name: for humans.
            ttl_s: seconds until it expires; None for never.

        Raises:
            InvalidInput: a lifetime that is not above zero, or beyond the calendar.
        """
        now, secret = utc_now(), _PREFIX + secrets.token_urlsafe(32)
        with self.write() as session:
            row = TokenRow(name=name, sha256=_hash(secret), created_at=now, expires_at=_expiry(now, ttl_s))
            session.add(row)
            session.flush()
            return rendering.token_view(row), secret

    def check_token(self, secret: str) -> TokenView | None:
        """Return the token with this secret, or None if there is none or it has expired."""
        now = utc_now()
        valid = (TokenRow.sha256 == _hash(secret)) & _unexpired(now)
        with self.read() as session:
            row = session.scalar(select(TokenRow).where(valid))
            if row is None:
                return None
            view = rendering.token_view(row)
        if view.last_used_at is None or now - view.last_used_at >= _USE_RECORDED_EVERY:
            view.last_used_at = now
            with self.write() as session:
                row = session.get(TokenRow, view.id)
                if row is None:  # revoked just now
                    return None
                row.last_used_at = now
        return view

    def list_tokens(self) -> list[TokenView]:
        """Return all tokens, expired ones too, oldest first."""
        with self.read() as session:
            return [rendering.token_view(row) for row in session.scalars(select(TokenRow).order_by(TokenRow.id))]

    def delete_token(self, token_id: int) -> None:
        """Revoke a token; raises `NotFound`."""
        with self.write() as session:
            found = session.scalar(delete(TokenRow).where(TokenRow.id == token_id).returning(TokenRow.id))
            if found is None:
                raise NotFound(f"there is no token {token_id}", field="token_id")

    def has_tokens(self) -> bool:
        """Whether any valid token exists."""
        with self.read() as session:
            return bool(session.scalar(select(exists().where(_unexpired(utc_now())))))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _unexpired(now: datetime) -> ColumnElement[bool]:
    return or_(TokenRow.expires_at.is_(None), TokenRow.expires_at > now)


def _expiry(now: datetime, ttl_s: float | None) -> Any:
    if ttl_s is None:
        return None
    try:
        if not ttl_s > 0:
            raise InvalidInput("must be above zero", field="ttl_s")
        return now + timedelta(seconds=ttl_s)
    except OverflowError:
        raise InvalidInput("lies beyond the calendar", field="ttl_s", remedy="leave it out for no expiry") from None
