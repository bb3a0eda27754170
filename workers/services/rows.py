"""Rows of data as JSON that can be sent."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optimizer.errors import InvalidData
from workers.data import Rows


def sendable(rows: Rows) -> list[dict[str, Any]]:
    """Return rows as plain JSON: bytes as base64, dates and the like as text.

    Columns that play a role are also under the role's name.

    Raises:
        InvalidData: a number is not finite, or a text cannot be encoded; names the row and the column.
    """
    out = []
    for place, row in zip(rows.places, rows.items, strict=True):
        plain = {}
        for name, value in row.items():
            try:
                plain[name] = _plain(value)
            except ValueError as error:
                raise InvalidData(f"{place}: {name!r} cannot be sent: {error}", field=f"{rows.field}.path") from None
        out.append({role: plain.get(column) for role, column in rows.columns.items()} | plain)
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return _finite(value)
    if value is None or isinstance(value, bool | int):
        return value
    return _encodable(str(value))


def _encodable(text: str) -> str:
    text.encode()  # lone surrogates raise ValueError
    return text


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("the number is not finite")
    return value
