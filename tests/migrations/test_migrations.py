"""The migrations lead to exactly the models' schema, there and back, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import CheckConstraint, Engine, inspect

import migrations
from api.store.engine import make_engine
from api.store.models import Base
from api.store.sql import SqlStore
from optimizer.errors import MergeoptError
from tests.factories import make_spec
from tests.postgres import PostgresServer


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        # A percent sign in a path is special to Alembic's configuration.
        yield f"sqlite:///{tmp_path}/100%.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = server.create_database()
    yield server.url(name)
    server.drop_database(name)


def tables(url: str) -> set[str]:
    engine = make_engine(url)
    try:
        return set(inspect(engine).get_table_names()) - {"alembic_version"}
    finally:
        engine.dispose()


@pytest.fixture
def migrated(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def test_autogenerate_finds_no_difference(migrated: Engine) -> None:
    with migrated.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_check_constraints_are_the_models(migrated: Engine) -> None:
    """Autogenerate does not look at check constraints."""
    inspector = inspect(migrated)
    for table in Base.metadata.sorted_tables:
        wanted = {str(constraint.name) for constraint in table.constraints if isinstance(constraint, CheckConstraint)}
        assert {constraint["name"] for constraint in inspector.get_check_constraints(table.name)} == wanted


def test_up_down_and_up_again(empty_url: str) -> None:
    everything = set(Base.metadata.tables)
    assert migrations.current(empty_url) is None
    migrations.upgrade(empty_url)
    assert (migrations.current(empty_url), tables(empty_url)) == (migrations.head(), everything)
    migrations.upgrade(empty_url)  # nothing to do
    migrations.downgrade(empty_url, "base")
    assert (migrations.current(empty_url), tables(empty_url)) == (None, set())
    migrations.upgrade(empty_url)
    assert (migrations.current(empty_url), tables(empty_url)) == (migrations.head(), everything)


def test_upgrade_keeps_data(database_url: str) -> None:
    store = SqlStore(database_url)
    job, _ = store.create_job(make_spec())
    migrations.upgrade(database_url)
    assert store.get_job(job.id) == job
    store.close()


def test_ping_wants_the_newest_revision(empty_url: str) -> None:
    store = SqlStore(empty_url)
    with pytest.raises(MergeoptError, match="mergeopt db upgrade"):
        store.ping()
    migrations.upgrade(empty_url)
    store.ping()
    store.close()


def test_ping_says_when_the_database_cannot_be_reached(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/missing/file.db", f"postgresql://user:secret@/db?host={tmp_path}"):
        store = SqlStore(url)
        with pytest.raises(MergeoptError, match="cannot be reached") as caught:
            store.ping()
        assert "secret" not in str(caught.value)
        store.close()
