"""Column types: what numpy and datetime values look like in the database, the same on SQLite and PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import BigInteger, DateTime, Dialect, Integer, LargeBinary
from sqlalchemy.types import TypeDecorator

# SQLite numbers rows by itself only in a column whose type is exactly INTEGER.
RowId = BigInteger().with_variant(Integer, "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, kept in UTC; SQLite has no time zones of its own. A naive one raises ``ValueError``."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Convert to UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return an aware datetime in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class FloatArray(TypeDecorator[NDArray[Any]]):
    """A vector as little-endian bytes, whatever the machine.

    Args:
        bits: 32 or 64, the size of a number.
    """

    impl = LargeBinary
    cache_ok = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def process_bind_param(self, value: NDArray[Any] | None, dialect: Dialect) -> bytes | None:  # noqa: ARG002
        """Return the vector's bytes."""
        return None if value is None else np.asarray(value, dtype=f"<f{self.bits // 8}").tobytes()

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> NDArray[Any] | None:  # noqa: ARG002
        """Return a vector of this machine's own byte order, writable."""
        return None if value is None else np.frombuffer(value, dtype=f"<f{self.bits // 8}").astype(f"f{self.bits // 8}")


def utc_now() -> datetime:
    """Return the present time by this machine's clock."""
    return datetime.now(UTC)
