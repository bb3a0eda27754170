"""Database migrations (Alembic), run without an alembic.ini, so that they work from an installed wheel.

A new revision, made from what differs between the models and a database at the newest one::

    from alembic import command
    from migrations import configured
    with configured("sqlite:///mergeopt.db") as config:
        command.revision(config, "what changes", autogenerate=True, rev_id="0002")
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from api.store.engine import make_engine, writing

# At INFO it tells of every look at a revision, and the readiness check looks often.
logging.getLogger("alembic.runtime.migration").setLevel(logging.WARNING)

# Any fixed number will do: it keeps two processes that start together from migrating at once.
_LOCK = 0x6D69677261746573


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database to ``revision``, in one transaction; nothing happens if it is there.

    Raises:
        InvalidInput: the URL cannot be used.
    """
    with configured(url) as config:
        command.upgrade(config, revision)


def downgrade(url: str, revision: str) -> None:
    """Take the database back to ``revision`` (``"base"``: empty), in one transaction. Data of later ones is lost."""
    with configured(url) as config:
        command.downgrade(config, revision)


def current(url: str) -> str | None:
    """Return the revision the database is at, None if it was never migrated."""
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            return revision_of(connection)
    finally:
        engine.dispose()


@cache
def head() -> str:
    """Return the newest revision."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def revision_of(connection: Connection) -> str | None:
    """Return the revision of the database behind a connection."""
    return MigrationContext.configure(connection).get_current_revision()


@contextmanager
def configured(url: str) -> Iterator[Config]:
    """Yield an Alembic configuration on a transaction of ``url`` that commits at the end."""
    # SQLite alters a table by building a new one and dropping the old, which must not delete what refers to it.
    engine = make_engine(url, foreign_keys=False)
    try:
        with writing(engine).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            config = _config()
            config.attributes["connection"] = connection
            yield config
    finally:
        engine.dispose()


def _config() -> Config:
    config = Config()
    # The option is a configparser value, in which a % begins a reference.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
