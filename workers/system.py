"""Asking the system to read mapped files before their pages are used."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from torch import Tensor

_WILL_NEED = 3  # MADV_WILLNEED, the same on all systems that have it


def _find() -> Any:
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, TypeError, AttributeError):  # not every system has it
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


_MADVISE = _find()


def will_need(tensor: Tensor) -> None:
    """Ask for the pages of a tensor on the CPU. A hint: where it cannot be followed nothing happens.

    Reads nothing that is in memory already. Lets other threads run.
    """
    if _MADVISE is not None and tensor.nbytes:
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _MADVISE(begin, tensor.data_ptr() + tensor.nbytes - begin, _WILL_NEED)
