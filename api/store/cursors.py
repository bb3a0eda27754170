"""Cursors of pages: the sort key of the last row, so that rows inserted meanwhile shift nothing; opaque to callers."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from optimizer.errors import InvalidInput

MAX_PAGE = 1000

T = TypeVar("T")


def encode(order: str, *key: str | int | float) -> str:
    """Return the cursor after the row with this sort key.

    Args:
        order: names the list and its order; a cursor of one is no good for another.
        key: the row's values of the columns that are sorted by.
    """
    return base64.urlsafe_b64encode(json.dumps([order, *key]).encode()).decode().rstrip("=")


def decode(cursor: str, order: str, *types: type) -> list[Any]:
    """Return the sort key in ``cursor``; raises `InvalidInput` if it was not made for ``order`` with these types."""
    key: list[Any]
    try:
        made_for, *key = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise bad_cursor() from None
    if made_for != order or [type(part) for part in key] != list(types):
        raise bad_cursor()
    return key


def bad_cursor() -> InvalidInput:
    """Return the error for a cursor that is no good."""
    return InvalidInput(
        "the cursor is none of this list's",
        field="cursor",
        remedy="pass the last page's next_cursor as it is, with the same sort",
    )


def check_limit(limit: int, lowest: int = 1, highest: int = MAX_PAGE) -> None:
    """Raise `InvalidInput` for a page size out of range."""
    if not lowest <= limit <= highest:
        raise InvalidInput(f"must be between {lowest} and {highest}, not {limit}", field="limit")


def split(rows: Sequence[T], limit: int) -> tuple[Sequence[T], bool]:
    """Split ``limit`` + 1 fetched rows into the page and whether there is a next one."""
    return rows[:limit], len(rows) > limit
