"""What numba lacks for the kernels: bit casts, 16-bit floats, pointers, and writes that pass the caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

BLOCK = 256
"""Elements that a kernel finishes before it goes on to the next ones: their sums stay in the first-level cache."""

STORED: dict[torch.dtype, type[Any]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
}
"""How numba sees the types that there is code for."""

F = TypeVar("F", bound=Callable[..., Any])
_LINE = ir.VectorType(ir.IntType(32), 16)  # 64 bytes
_SINGLE, _HALF, _BITS32, _BITS16 = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16)


def compiled(function: F) -> F:
    """Compile a kernel when it is first called; it releases the interpreter's lock."""
    return cast(F, numba.njit(nogil=True, error_model="numpy")(function))


def compiled_inline(function: F) -> F:
    """Make a function part of each loop that calls it, before the compiler sees the loop: it then vectorises better."""
    return cast(F, numba.njit(inline="always", error_model="numpy")(function))


def _cast(result: Any, argument: Any, generate: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic of one argument from LLVM's builder and its value to the result."""

    def typed(_context: Any, _value: Any) -> Any:
        return result(argument), lambda _context, builder, _signature, values: generate(builder, values[0])

    return intrinsic(typed)


_to_single = _cast(types.float32, types.uint32, lambda builder, bits: builder.bitcast(bits, _SINGLE))
_bits = _cast(types.uint32, types.float32, lambda builder, value: builder.bitcast(value, _BITS32))
_from_half = _cast(
    types.float32, types.uint16, lambda builder, bits: builder.fpext(builder.bitcast(bits, _HALF), _SINGLE)
)
_to_half = _cast(
    types.uint16, types.float32, lambda builder, value: builder.bitcast(builder.fptrunc(value, _HALF), _BITS16)
)


@intrinsic  # type: ignore[untyped-decorator]
def pointer(_context: Any, where: Any, like: Any) -> Any:
    """Return an address as a pointer to values of the type of ``like``."""
    kind = types.CPointer(like)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(where, like), generate


@intrinsic  # type: ignore[untyped-decorator]
def stream(_context: Any, _target: Any, _source: Any) -> Any:
    """Copy a cache line between two addresses that are multiples of 64, past the caches."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        to, out_of = (builder.inttoptr(argument, _LINE.as_pointer()) for argument in arguments)
        store = builder.store(builder.load(out_of, align=64), to, align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_BITS32, 1)]))
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def drain(_context: Any) -> Any:
    """Wait until everything written is visible to other threads: writes past the caches are not ordered otherwise."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@compiled_inline
def address(array: Any) -> Any:
    """Return where an array begins."""
    return np.uint64(array.ctypes.data)


@compiled_inline
def aligned(array: Any) -> Any:
    """Return the array from its first element whose address is a multiple of 64 on."""
    behind = np.uint64(array.ctypes.data) & np.uint64(63)
    return array[((np.uint64(64) - behind) & np.uint64(63)) // np.uint64(array.itemsize) :]


@compiled_inline
def _from_bfloat16(bits: Any) -> Any:
    return _to_single(np.uint32(bits) << np.uint32(16))


@compiled_inline
def _to_bfloat16(value: Any) -> Any:
    bits = _bits(np.float32(value))
    rounded = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return rounded if value == value else np.uint16(0x7FC0)


def loader(source: torch.dtype, work: type[Any]) -> Callable[..., Any]:
    """Return a function from a value as it is stored to one of the work type."""
    if source == torch.bfloat16:
        return compiled_inline(lambda bits: work(_from_bfloat16(bits)))
    if source == torch.float16:
        return compiled_inline(lambda bits: work(_from_half(bits)))
    return compiled_inline(lambda value: work(value))


def storer(target: torch.dtype) -> Callable[..., Any]:
    """Return a function from a value of the work type to how it is stored, rounded to nearest, ties to even."""
    if target == torch.bfloat16:
        return _to_bfloat16
    if target == torch.float16:
        return compiled_inline(lambda value: _to_half(np.float32(value)))
    stored = np.float64 if target == torch.float64 else np.float32
    return compiled_inline(lambda value: stored(value))


def work_type(source: torch.dtype, target: torch.dtype) -> type[Any]:
    """Return the type of the arithmetic between models of one type and a result of another."""
    return np.float64 if torch.float64 in (source, target) else np.float32


@cache
def reader(source: torch.dtype) -> Callable[..., Any]:
    """Return a function from a model's address to a block of it, as it is stored."""
    size, like = np.dtype(STORED[source]).itemsize, STORED[source](0)

    def read(model: Any, begin: Any, count: Any) -> Any:
        return carray(pointer(np.uint64(model) + np.uint64(begin) * np.uint64(size), like), count)

    return compiled_inline(read)


@cache
def writer(target: torch.dtype) -> Callable[..., Any]:
    """Return a function that writes a finished block to its place: past the caches where it fills whole cache lines."""
    size, like = np.dtype(STORED[target]).itemsize, STORED[target](0)
    lines = BLOCK * size // 64

    def write(out: Any, begin: Any, block: Any, count: Any) -> None:
        goal = np.uint64(out) + np.uint64(begin) * np.uint64(size)
        if count == BLOCK and goal & np.uint64(63) == np.uint64(0):
            source = address(block)
            for line in range(lines):
                offset = np.uint64(line) * np.uint64(64)
                stream(goal + offset, source + offset)
        else:
            part = carray(pointer(goal, like), count)
            for i in range(count):
                part[i] = block[i]

    return compiled_inline(write)
