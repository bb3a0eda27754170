"""Which of many cases every test run takes, and which only `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick_or_slow(cases: Iterable[Any], *quick: str) -> list[Any]:
    """Return parameters of a test: those whose names are among ``quick`` as they are, all others marked slow."""
    return [case if str(case) in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
