"""Checkpoints that are written once for all tests of evaluators."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.workers.evaluators.cases import CASES, bpe_llama


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of an evaluator's tiny checkpoint, by the evaluator's name."""

    @cache
    def write(name: str) -> Path:
        return CASES[name].checkpoint(tmp_path_factory.mktemp(name))

    return write


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny Llama with a byte-level BPE tokenizer."""
    return bpe_llama(tmp_path_factory.mktemp("bpe"))
