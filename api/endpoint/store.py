"""What an endpoint keeps on disk: tokens, what each has spent, and every score that was ever computed.

One SQLite file, apart from the service's own database: a token for one is none for the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import JSON, Double, Integer, LargeBinary, String, delete, func, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from api.endpoint.limits import Limits
from api.settings import Settings
from api.store.columns import UtcDateTime, utc_now
from api.store.models import TokenRow
from api.store.tokens import Tokens
from optimizer.errors import QuotaExhausted
from workers.endpoint.protocol import UsageView

KEPT = 200_000
"""Results that are kept; the oldest go first."""

PRUNED_EVERY = 1000
"""New results after which the oldest are looked for."""


HOME = "endpoint"
"""Directory below the service's home where an endpoint keeps what it knows."""


def endpoint_home(settings: Settings) -> Path:
    """Return where the endpoint keeps its database and its audit log."""
    return settings.home / HOME


class Base(DeclarativeBase):
    """Base of the endpoint's own tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime,
        float: Double,
        dict[str, Any]: JSON,
    }


class KeyRow(Base):
    """The secret that the ids of models are made with."""

    __tablename__ = "keys"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    secret: Mapped[bytes] = mapped_column(LargeBinary)


class ChargeRow(Base):
    """A result that a token has paid for; asking for it again costs nothing."""

    __tablename__ = "charges"

    token: Mapped[int] = mapped_column(Integer, primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    items: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime]


class ResultRow(Base):
    """The scores of a candidate on a set or a part of one, or why there are none."""

    __tablename__ = "results"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class EndpointStore(Tokens):
    """The endpoint's database below a home directory; raises `Unavailable` while it cannot be used."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        super().__init__(f"sqlite:///{home}/endpoint.db")
        TokenRow.metadata.create_all(self.engine, tables=[TokenRow.metadata.tables[TokenRow.__tablename__]])
        Base.metadata.create_all(self.engine)
        self._added = 0

    def key(self, name: str) -> bytes:
        """Return the secret of that name, 32 random bytes made when it is first asked for."""
        with self.write() as session:
            session.execute(insert(KeyRow).values(name=name, secret=secrets.token_bytes(32)).on_conflict_do_nothing())
            return session.scalars(select(KeyRow.secret).where(KeyRow.name == name)).one()

    def charge(self, token: int, parts: Mapping[str, int], limits: Limits) -> None:
        """Charge a token for results: all of them or, with `QuotaExhausted`, none.

        Args:
            token: who pays.
            parts: items by the result's key; what the token has paid for before costs nothing.
            limits: what it may spend.
        """
        with self.write() as session:
            known = select(ChargeRow.key).where(ChargeRow.token == token, ChargeRow.key.in_(list(parts)))
            paid = set(session.scalars(known))
            new = {key: items for key, items in parts.items() if key not in paid}
            if not new:
                return
            spent = _spent(session, token)
            _check(spent.evaluations + len(new), limits.evaluations, "evaluations")
            _check(spent.items + sum(new.values()), limits.items, "items")
            now = utc_now()
            session.add_all(ChargeRow(token=token, key=key, items=items, at=now) for key, items in new.items())

    def usage(self, token: int) -> UsageView:
        """Return what a token has spent."""
        with self.read() as session:
            return _spent(session, token)

    def result(self, key: str) -> dict[str, Any] | None:
        """Return a result, or None."""
        with self.read() as session:
            return session.scalar(select(ResultRow.data).where(ResultRow.key == key))

    def add_result(self, key: str, data: Mapping[str, Any]) -> None:
        """Keep a result; the first one of a key stays."""
        with self.write() as session:
            row = insert(ResultRow).values(key=key, data=dict(data), at=utc_now())
            session.execute(row.on_conflict_do_nothing())
            self._added += 1
            if self._added % PRUNED_EVERY == 0:
                newest = select(ResultRow.key).order_by(ResultRow.at.desc()).limit(KEPT)
                session.execute(delete(ResultRow).where(ResultRow.key.not_in(newest)))


def _spent(session: Session, token: int) -> UsageView:
    row = select(func.count(), func.coalesce(func.sum(ChargeRow.items), 0)).where(ChargeRow.token == token)
    evaluations, items = session.execute(row).one()
    return UsageView(evaluations=evaluations, items=items)


def _check(wanted: int, most: int | None, what: str) -> None:
    if most is not None and wanted > most:
        raise QuotaExhausted(f"this token's {most} {what} are used up", field="token", remedy="ask the owner for more")
