"""The checkpoints' tensors where they are needed, and before they are needed.

On a CPU tensors are mapped from disk: nothing is copied, all processes of a machine share their pages, and the system
takes pages back when memory runs short. While one parameter is merged, the pages of the next ones are asked for.

On a GPU as many tensors stay as fit into a bound, in the order of their first use; the rest streams through two buffers
of pinned memory on a stream of its own while the arithmetic runs. What neither this pass nor the one before used makes
room for what is used. What is used stays: passes go over the parameters in the same order every time, so replacing
the one used longest ago would replace each shortly before it is needed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor

from workers.checkpoints import Checkpoint
from workers.safetensors_header import size_in_bytes

AHEAD = 64 * 2**20
"""Bytes of checkpoints that are asked for, or on their way to a GPU, while others are merged; at least one step's."""

Source = tuple[str, str]
"""A model's name and one of its tensors' own names."""


class Supply:
    """Hands out tensors of checkpoints. Safe to use from several threads.

    Args:
        checkpoints: by name.
        keep_on: a GPU on which tensors stay.
        room: bytes that they may take there together.
    """

    def __init__(
        self, checkpoints: Mapping[str, Checkpoint], keep_on: torch.device | None = None, room: int = 0
    ) -> None:
        self._checkpoints = checkpoints
        self._keep_on = keep_on
        self._kept = _Kept(room)
        self._stream: _Stream | None = None
        self._reader = ThreadPoolExecutor(1, "read-ahead")  # starts its thread when there is something to read
        self._lock = RLock()

    def get(self, source: Source, device: torch.device) -> Tensor:
        """Return a tensor on ``device``. Not to be written to."""
        return self.place(source, lambda: self._mapped(source), device)

    def place(self, key: Hashable, tensor: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return a tensor of main memory on ``device``, where it stays if there is room.

        Args:
            key: the same for the same content.
            tensor: returns it.
            device: where it is needed; on the CPU it is returned as it is.
        """
        if device.type == "cpu":
            return tensor()
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                found = self._stream.take(key) if self._stream is not None else None
                found = tensor().to(device) if found is None else found
                if device == self._keep_on:
                    self._kept.put(key, found)
            return found

    @contextmanager
    def following(self, order: Sequence[Sequence[Source]], device: torch.device) -> Iterator[Callable[[int], None]]:
        """Prepare for a pass over parameters.

        Args:
            order: what each step of the pass reads.
            device: where the arithmetic is done.

        Yields:
            A function to call at the beginning of each step, with its number: it sees to what comes next.
        """
        ahead = _Ahead(order, self._size)
        if device.type != "cuda":
            yield lambda number: self._ask_aside(ahead.reached(number)[1])
            return
        with self._lock:
            self._kept.passes += 1
            self._stream = stream = self._stream or _Stream(device)
        try:
            yield lambda number: self._send(stream, *ahead.reached(number))
        finally:
            with self._lock:
                stream.drop([source for step in order for source in step])

    def _mapped(self, source: Source) -> Tensor:
        return self._checkpoints[source[0]].tensor(source[1])

    def _size(self, source: Source) -> int:
        meta = self._checkpoints[source[0]].tensors[source[1]]
        return size_in_bytes(meta.dtype, meta.shape)

    def _ask_aside(self, sources: Sequence[Source]) -> None:
        if sources:
            self._reader.submit(self._ask, sources)

    def _ask(self, sources: Sequence[Source]) -> None:
        for model, name in sources:
            self._checkpoints[model].read_ahead(name)

    def _send(self, stream: _Stream, done: Sequence[Source], coming: Sequence[Source]) -> None:
        with self._lock:
            stream.drop(done)
            for source in coming:
                if source not in self._kept:
                    stream.send(source, self._mapped(source))


class _Ahead:
    """What to see to next, so that `AHEAD` bytes are always ahead of the step that a pass is at."""

    def __init__(self, order: Sequence[Sequence[Source]], size: Callable[[Source], int]) -> None:
        self._order = order
        self._sizes = [sum(size(source) for source in step) for step in order]
        self._first, self._last, self._bytes = 0, 0, 0  # the steps that were seen to, and not done yet

    def reached(self, number: int) -> tuple[list[Source], list[Source]]:
        """Return what no step needs any more since the last call, and what to see to now."""
        done: list[Source] = []
        coming: list[Source] = []
        while self._first < min(number, self._last):
            done += self._order[self._first]
            self._bytes -= self._sizes[self._first]
            self._first += 1
        while self._last < len(self._order) and (self._bytes < AHEAD or self._last <= number):
            coming += self._order[self._last]
            self._bytes += self._sizes[self._last]
            self._last += 1
        return done, coming


class _Kept:
    """Tensors on a GPU within a bound, with the last pass that used each, in the order of their last use.

    Attributes:
        passes: number of passes that began.
    """

    def __init__(self, room: int) -> None:
        self.passes = 0
        self._room = room
        self._total = 0
        self._entries: OrderedDict[Hashable, tuple[Tensor, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> Tensor | None:
        if key not in self._entries:
            return None
        tensor, _ = self._entries.pop(key)
        self._entries[key] = tensor, self.passes
        return tensor

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor if there is room, or what was not used any more makes enough."""
        while self._total + tensor.nbytes > self._room and self._entries:
            oldest, (old, used) = next(iter(self._entries.items()))
            if used >= self.passes - 1:
                return
            del self._entries[oldest]
            self._total -= old.nbytes
        if self._total + tensor.nbytes <= self._room:
            self._entries[key] = tensor, self.passes
            self._total += tensor.nbytes


class _Stream:
    """Copies tensors to a GPU through pinned memory, on a stream of its own.

    The copy into pinned memory is done by whoever calls `send`, who would otherwise wait for the GPU: its arithmetic was
    only started.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        self._flight: dict[Hashable, tuple[Tensor, torch.cuda.Event]] = {}

    def send(self, key: Hashable, tensor: Tensor) -> None:
        """Start to copy a tensor; returns when it is in pinned memory."""
        buffer = self._buffer(tensor.nbytes)
        pinned = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        pinned.copy_(tensor)
        with torch.cuda.stream(self._side):
            arriving = pinned.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._side)
        self._buffers.append((buffer, event))
        self._flight[key] = arriving, event

    def take(self, key: Hashable) -> Tensor | None:
        """Return a tensor that was sent, for the current stream, which waits for it; None if it was not."""
        if key not in self._flight:
            return None
        tensor, event = self._flight[key]
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        tensor.record_stream(stream)  # so that its memory is not given away while the stream still reads it
        return tensor

    def drop(self, keys: Sequence[Hashable]) -> None:
        """Forget tensors."""
        for key in keys:
            self._flight.pop(key, None)

    def _buffer(self, size: int) -> Tensor:
        """Return one of two pinned buffers, as soon as the last copy from it is done."""
        if len(self._buffers) < 2:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        buffer, event = self._buffers.pop(0)
        event.synchronize()
        return buffer if buffer.nbytes >= size else torch.empty(size, dtype=torch.uint8, pin_memory=True)
