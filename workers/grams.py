"""Inner products of a job's models over ranges of the flat vector: what angles between merges are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.geometry import Cuts, Layout, TensorInfo
from optimizer.problem import Grams
from optimizer.tables import cut_edges
from workers.checkpoints import Checkpoint, Factors
from workers.merging.engine import MergeEngine
from workers.merging.low_rank import matrix, matrix_shape
from workers.naming import canonical_names

LARGEST = 1_000_000
"""Bytes of the packed inner products up to which ranges are made finer than tensors."""

BLOCK = 1 << 22
"""Numbers of float64 that are in memory at once, of all models together."""

_CPU = torch.device("cpu")


def measure_grams(checkpoints: Mapping[str, Checkpoint], layout: Layout, cuts: Cuts) -> Grams:
    """Measure the inner products ⟨θ_a, θ_b⟩ of all shared weights, in one pass over the checkpoints, in float64.

    Checkpoints stay mapped and adapters' factors are multiplied out block by block, so memory does not grow with the
    models, nor with their number.

    Args:
        checkpoints: the models by name in the job's order, ``base`` first.
        layout: what they share.
        cuts: where ranges end: between layers, between tensors, or also at evenly spaced positions (at every one if that
            is no more), as many as keep the packed result below `LARGEST`.

    Raises:
        InvalidCheckpoint: a checkpoint lacks a tensor of the layout.
        InputsChanged: a checkpoint's file was changed meanwhile.
    """
    engine = MergeEngine(checkpoints, layout)
    edges = gram_edges(layout, cuts, len(checkpoints))
    products = np.zeros((len(edges) - 1, len(checkpoints), len(checkpoints)))
    marks = np.array(edges)
    for begin, values in _blocks(engine):
        end = begin + values.shape[1]
        first, last = int(np.searchsorted(marks, begin, "right")) - 1, int(np.searchsorted(marks, end, "left"))
        cut = [begin, *edges[first + 1 : last], end]
        for number, (left, right) in enumerate(pairwise(cut), start=first):
            part = values[:, left - begin : right - begin]
            products[number] += part @ part.T
    engine.verify()
    return Grams.pack(edges, products)


def gram_edges(layout: Layout, cuts: Cuts, models: int) -> list[int]:
    """Return where the ranges of `measure_grams` begin and end: 0, …, number of shared parameters."""
    edges = cut_edges(layout, cuts)
    room = LARGEST * 3 // 4 // (8 * models * models) - (len(edges) - 1)  # Base64 has 4 characters for 3 bytes
    if cuts != "parameters" or room <= 0:
        return edges
    if layout.size <= room:
        return list(range(layout.size + 1))
    return sorted({*edges, *(layout.size * number // (room + 1) for number in range(room + 1))})


def _blocks(engine: MergeEngine) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield where a block begins in the flat vector, and all models' numbers in it, shape (models, elements)."""
    raw = {model: canonical_names(checkpoint) for model, checkpoint in engine.checkpoints.items()}
    offsets = engine.layout.offsets()
    for tensor in engine.layout.flat:
        height, width = matrix_shape(tensor.shape)
        if not height * width:
            continue
        sources = [_source(engine, model, tensor, raw[model][tensor.name]) for model in raw]
        step = max(1, BLOCK // len(sources) // width)
        for row in range(0, height, step):
            rows = slice(row, row + step)
            yield offsets[tensor.name] + row * width, np.stack([_numbers(*source, rows) for source in sources])


def _source(engine: MergeEngine, model: str, tensor: TensorInfo, raw: str) -> tuple[Tensor, Factors | None]:
    """A model's parameter as a matrix that is mapped from disk, and the factors that are to be added to it."""
    factors = engine.checkpoints[model].factors(raw)
    found = engine.source(model if factors is None else "base", tensor, _CPU)
    return matrix(found), factors if factors is not None and factors.rank else None


def _numbers(source: Tensor, factors: Factors | None, rows: slice) -> NDArray[np.float64]:
    values = source[rows].double()
    if factors is not None:
        values = torch.addmm(values, factors.up[rows].double(), factors.down.double(), alpha=factors.scale)
    out: NDArray[np.float64] = values.numpy().reshape(-1)
    return out
