"""A store on each database, and the few steps most tests begin with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from api.store.sql import SqlStore


@pytest.fixture
def store(database_url: str) -> Iterator[SqlStore]:
    opened = SqlStore(database_url)
    yield opened
    opened.close()
