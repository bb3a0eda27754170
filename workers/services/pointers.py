"""JSON pointers (RFC 6901): where in an answer a score stands, with ``*`` for all elements of a list."""

from __future__ import annotations

import re
from typing import Any

_INDEX = re.compile(r"0|[1-9][0-9]*")


class NothingThere(Exception):
    """A pointer leads nowhere in a document; the text says how far it got."""


def parse_pointer(text: str) -> tuple[str, ...]:
    """Return the pointer's parts, unescaped; raises `ValueError` if it is none.

    Args:
        text: empty for the whole document, else every part after a ``/``; ``~1`` stands for ``/`` and ``~0`` for ``~``.
    """
    if text and not text.startswith("/"):
        raise ValueError(f"a JSON pointer is empty or begins with a slash, unlike {text!r}")
    if re.search(r"~(?![01])", text):
        raise ValueError(f"in a JSON pointer ~ is written ~0, and / within a name ~1, unlike {text!r}")
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:])


def follow(document: Any, pointer: str, *, spread: bool = False) -> Any:
    """Return what a pointer leads to.

    Args:
        document: plain data from JSON.
        pointer: as `parse_pointer` takes it.
        spread: whether the part ``*`` at a list means all its elements: what the rest leads to in each, in a list.

    Raises:
        NothingThere: there is no such member or element.
    """
    return _follow(document, parse_pointer(pointer), 0, spread)


def _follow(value: Any, parts: tuple[str, ...], begin: int, spread: bool) -> Any:
    for number in range(begin, len(parts)):
        part = parts[number]
        if spread and part == "*" and isinstance(value, list):
            return [_follow(element, parts, number + 1, spread) for element in value]
        value = _step(value, part, "/".join(("", *parts[: number + 1])))
    return value


def _step(value: Any, part: str, path: str) -> Any:
    if isinstance(value, dict) and part in value:
        return value[part]
    if isinstance(value, list) and _INDEX.fullmatch(part) and int(part[:9]) < len(value) and len(part) < 9:
        return value[int(part)]
    raise NothingThere(f"there is nothing at {path!r}: it stops at {kind_of(value)}")


def kind_of(value: Any) -> str:
    """Return what a value from JSON is, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case list():
            return f"a list of {len(value)}"
    return "an object"
