"""Keeps transformers' notices and progress bars out of logs and terminals."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from transformers.utils import logging as transformers_logging

ALONE = RLock()
"""While transformers loads a model it replaces parts of its own classes, such as how weights are tied, and puts back what it
found; two threads at once would leave the replacements behind. Its verbosity is the process's as well."""

_hushed = 0
_before = logging.WARNING


@contextmanager
def quiet(least: int = logging.ERROR) -> Iterator[None]:
    """Let transformers show no progress bars, and log nothing below ``least``, while the block runs."""
    with ALONE:
        verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(least)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def hushed() -> Iterator[None]:
    """Let transformers log errors only while the block runs, as `quiet` does, but in any number of threads at once."""
    global _hushed, _before
    with ALONE:
        if not _hushed:
            _before = transformers_logging.get_verbosity()
            transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        _hushed += 1
    try:
        yield
    finally:
        with ALONE:
            _hushed -= 1
            if not _hushed:
                transformers_logging.set_verbosity(_before)
