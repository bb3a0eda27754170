"""What tests of jobs share: a fresh store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api.store.sql import SqlStore


@pytest.fixture
def store(sqlite_url: str) -> Iterator[SqlStore]:
    """A store of its own for each test."""
    store = SqlStore(sqlite_url)
    yield store
    store.close()
