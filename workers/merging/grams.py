"""Inner products of an operator's inputs: what norms, angles and means on spheres are made from.

They do not depend on coefficients, so they are asked for as facts: a candidate then costs arithmetic on small matrices
and one weighted sum. Vectors are measured from zero (the weights themselves) or from the base (task vectors). Whole
tensors are one vector; or each row (last dimension), or each column (first dimension), is one of its own: a *line*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.geometry import TensorInfo
from workers.merging import blocks
from workers.merging.operator import Numbers, Parameter, Whole

Origin = Literal["zero", "base"]
"""Where vectors begin."""

Lines = Literal["row", "column"]
"""Rows run along the last dimension; columns along the first, for each place in the others."""

Matrix = NDArray[np.float64]

_CHUNK = 1 << 20  # elements; fixed, since sums over chunks depend on it


def gram(parameter: Parameter, origin: Origin) -> Matrix:
    """Return the inputs' inner products over the whole parameter, shape (inputs, inputs)."""
    found = parameter.facts.of_tensor(f"gram_{origin}", lambda whole: {"gram": inner_products(whole, origin)})
    return _matrix(found["gram"])


def model_gram(parameter: Parameter, origin: Origin) -> Matrix:
    """Return the inputs' inner products over all shared parameters together, shape (inputs, inputs)."""

    def compute(model: Iterable[tuple[TensorInfo, Whole]]) -> Numbers:
        return {"gram": _exact_sum([inner_products(whole, origin) for _, whole in model])}

    return _matrix(parameter.facts.of_model(f"gram_{origin}", compute)["gram"])


def inner_products(whole: Whole, origin: Origin) -> Tensor:
    """Return the inner products of one parameter's inputs: float64, on the CPU, shape (inputs, inputs)."""
    base, models = whole
    flat = [model.reshape(-1) for model in models]
    start = base.reshape(-1) if base is not None and origin == "base" else None
    count, size = len(models), models[0].numel()
    sums: dict[tuple[int, int], list[float]] = {}
    for begin in range(0, size, _CHUNK):
        part = slice(begin, begin + _CHUNK)
        vectors = [_minus(tensor[part], start[part] if start is not None else None) for tensor in flat]
        for i in range(count):
            for j in range(i, count):
                sums.setdefault((i, j), []).append(blocks.dot(vectors[i], vectors[j]))
    out = torch.zeros(count, count, dtype=torch.float64)
    for (i, j), terms in sums.items():
        out[i, j] = out[j, i] = math.fsum(terms)
    return out


def lines(tensor: Tensor, along: Lines) -> Tensor:
    """Return a tensor that is not empty as a matrix with a row for each line; a view where that is possible."""
    if tensor.dim() == 0:
        return tensor.reshape(1, 1)
    if along == "row":
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(tensor.shape[0], -1).t()


def line_products(tensors: Sequence[Tensor], along: Lines, start: Tensor | None = None) -> Tensor:
    """Return the inner products of the tensors' lines, relative to ``start``: float64, shape (tensors, tensors, lines)."""
    count = len(tensors)
    if tensors[0].numel() == 0:
        return torch.zeros(count, count, 0, dtype=torch.float64, device=tensors[0].device)
    views = [lines(tensor, along) for tensor in tensors]
    begin_at = lines(start, along) if start is not None else None
    number, length = views[0].shape
    out = torch.empty(count, count, number, dtype=torch.float64, device=tensors[0].device)
    step = max(1, _CHUNK // length)
    for begin in range(0, number, step):
        part = slice(begin, begin + step)
        vectors = [_minus(view[part], begin_at[part] if begin_at is not None else None).contiguous() for view in views]
        for i in range(count):
            for j in range(i, count):
                out[i, j, part] = out[j, i, part] = _row_dots(vectors[i], vectors[j])
    return out


def line_sum(
    parameter: Parameter, out: Tensor, tensors: Sequence[Tensor], weights: Sequence[Tensor], along: Lines
) -> None:
    """Write Σ weight · tensor into ``out``, with one weight for each line.

    Args:
        parameter: what ``out`` is all or a stretch of.
        tensors: of the shape of ``out``.
        weights: for each tensor, a weight for each line of the whole parameter.
        along: the lines.
    """
    work = blocks.work_dtype(out, *tensors)
    factors = [weight.to(work) for weight in weights]
    shape = parameter.info.shape
    width = (shape[-1] if shape else 1) if along == "row" else factors[0].numel()
    flat, target = [tensor.reshape(-1) for tensor in tensors], out.view(-1)
    for begin, end in _rows_of(parameter.begin, target.numel(), width, out.device.type == "cpu"):
        place = parameter.begin + begin
        if along == "row":
            part = slice(place // width, -(-(place + end - begin) // width))
            scales = [factor[part].unsqueeze(1) for factor in factors]
        else:
            part = slice(place % width, place % width + min(width, end - begin))
            scales = [factor[part].unsqueeze(0) for factor in factors]
        rows = [tensor[begin:end].view(-1, min(width, end - begin)).to(work) for tensor in flat]
        result = rows[0] * scales[0]
        for row, scale in zip(rows[1:], scales[1:], strict=True):
            result.addcmul_(row, scale)
        target[begin:end].copy_(result.view(-1))


def _rows_of(place: int, size: int, width: int, on_cpu: bool) -> Iterator[tuple[int, int]]:
    """Cut a stretch of ``size`` elements from ``place`` on into pieces of whole rows, or of a part of a single one."""
    step = max(1, (blocks.BLOCK if on_cpu else blocks.BLOCK_GPU) // width) * width
    begin = 0
    while begin < size:
        left = width - (place + begin) % width  # of the row
        whole = min(step, (size - begin) // width * width)
        end = begin + (whole if left == width and whole else min(left, size - begin))
        yield begin, end
        begin = end


def _minus(tensor: Tensor, start: Tensor | None) -> Tensor:
    return tensor.double() if start is None else tensor.double() - start.double()


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    if len(left) == 1:  # a sum to a single number would depend on the number of threads
        return torch.tensor([blocks.dot(left, right)], dtype=torch.float64, device=left.device)
    return (left * right).sum(dim=1)


def _exact_sum(parts: Sequence[Tensor]) -> Tensor:
    cells = torch.stack(list(parts)).flatten(1).t().tolist()
    return torch.tensor([math.fsum(cell) for cell in cells], dtype=torch.float64).view(parts[0].shape)


def _matrix(found: Tensor) -> Matrix:
    out: Matrix = found.cpu().numpy()
    return out
