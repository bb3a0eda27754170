"""What the operating system and the C library are asked for beside plain files and memory; hints, all of them."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

from torch import Tensor

_WILL_NEED = 3  # MADV_WILLNEED, the same on all systems that have it


def _find(name: str, *types: Any) -> Any:
    try:
        found = getattr(ctypes.CDLL(None), name)
    except (OSError, TypeError, AttributeError):  # not every system has it
        return None
    found.argtypes = types
    return found


_MADVISE = _find("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MALLOC_TRIM = _find("malloc_trim", ctypes.c_size_t)


def will_need(tensor: Tensor) -> None:
    """Ask for the pages of a mapped tensor, so that they are read from disk before they are used.

    Reads nothing that is in memory already. Lets other threads run.
    """
    if _MADVISE is not None and tensor.nbytes:
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _MADVISE(begin, tensor.data_ptr() + tensor.nbytes - begin, _WILL_NEED)


def give_back() -> None:
    """Give the system back what the C library keeps of freed memory. Takes about a millisecond.

    glibc puts small things that stay into large blocks that were freed, which then no longer fit the next large block:
    whoever takes large blocks in turn with small ones that stay holds all of them in the end.
    """
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)
