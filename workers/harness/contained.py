"""Keeps what other libraries do to the whole process (global generators, warnings, loggers, terminals) inside a block."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from threading import RLock

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging

_ALONE = RLock()
"""Global generators, warning filters and the standard streams are the process's: one thread at a time changes them."""


@contextmanager
def seeded(seeds: Sequence[int], device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch while the block runs, and put back what was there.

    Args:
        seeds: of Python's, numpy's and torch's generator, in this order.
        device: of the model that draws, besides the CPU.
    """
    python, numpy, torch_seed = seeds[:3]
    devices = [device] if device is not None and device.type == "cuda" else []
    with _ALONE, torch.random.fork_rng(devices=devices):
        before = random.getstate(), np.random.get_state()
        random.seed(python)
        np.random.seed(numpy)
        torch.manual_seed(torch_seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def silent() -> Iterator[None]:
    """Let nothing reach a terminal that the block prints, draws as a bar, warns of, or logs of reaching for a hub."""
    with _ALONE, warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        said = hub_logging.get_verbosity()
        hub_logging.set_verbosity(logging.CRITICAL)
        try:
            yield
        finally:
            hub_logging.set_verbosity(said)
