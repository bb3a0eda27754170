"""Run by Alembic for every command; the connection comes from `migrations.configured`."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from sqlalchemy.types import TypeDecorator

from api.store.models import Base


def _render(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """Write our own column types as what they are in the database: a revision must not depend on later code."""
    return f"sa.{item.impl!r}" if kind == "type" and isinstance(item, TypeDecorator) else False


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    render_item=_render,
)
with context.begin_transaction():
    context.run_migrations()
