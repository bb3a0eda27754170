"""Regular expressions of users on texts of models: compiled once, with an end to every search."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any

import regex

from optimizer.errors import InvalidInput

MAX_PATTERN = 2000
TIMEOUT_S = 1.0
_MAX_MATCHES = 100_000

Pattern = Any
"""A compiled pattern of the package ``regex``."""


def compiled(pattern: str, field: str, *, ignore_case: bool = False) -> Pattern:
    """Compile a pattern; ``.`` matches line ends too, ``^`` and ``$`` at lines.

    Raises:
        InvalidInput: it is malformed or too long; names ``field``.
    """
    if len(pattern) > MAX_PATTERN:
        raise InvalidInput(f"a pattern has {MAX_PATTERN} characters at most", field=field)
    flags = regex.MULTILINE | regex.DOTALL | regex.VERSION1 | (regex.IGNORECASE if ignore_case else 0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sets that may mean something else one day
            return regex.compile(pattern, flags)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise InvalidInput(f"no regular expression: {error}", field=field, remedy="use Python's syntax") from error


def search(pattern: Pattern, text: str, *, whole: bool = False) -> bool:
    """Whether a pattern is found in a text; False after `TIMEOUT_S` too, as for patterns that backtrack without end."""
    try:
        found = (pattern.fullmatch if whole else pattern.search)(text, timeout=TIMEOUT_S)
    except (TimeoutError, MemoryError):
        return False
    return found is not None


def last_group(pattern: Pattern, text: str) -> str | None:
    """Return the first group (or all) of the last match in a text; None where there is none in `TIMEOUT_S`."""
    try:
        found = list(islice(pattern.finditer(text, timeout=TIMEOUT_S), _MAX_MATCHES))
    except (TimeoutError, MemoryError):
        return None
    if not found:
        return None
    last: str | None = found[-1][1] if pattern.groups else found[-1][0]
    return last
