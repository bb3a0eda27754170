"""Arithmetic with task vectors that are products of two narrow matrices, without ever writing them out.

A linear combination of models of which some are LoRA adapters costs one pass over the base and one product of rank
Σ r_i. Blocks have a fixed number of elements, so that results depend on nothing but the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from optimizer.errors import InvalidInput
from workers.checkpoints import Factors
from workers.merging.blocks import weighted_sum, work_dtype
from workers.merging.operator import Parameter

BLOCK = 1 << 19  # elements of the result, at least one row; half or twice as many measure slower on CPUs
BLOCK_GPU = 1 << 26


def expand(base: Tensor, factors: Factors) -> Tensor:
    """Return base + scale · up @ down in float32 (float64 where any of them is), not yet rounded to the base's type.

    As PEFT computes it: the product, then the scale, then the sum.
    """
    out = torch.empty(base.shape, dtype=work_dtype(base, factors.up, factors.down), device=base.device)
    combine(out, [base], [1.0], [(factors, 1.0)])
    return out


def combine(
    out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], products: Sequence[tuple[Factors, float]]
) -> None:
    """Write Σ weight · tensor + Σ weight · scale · up @ down into ``out``, rounded once.

    Args:
        out: contiguous.
        tensors: of its shape.
        weights: theirs.
        products: factors of task vectors of that shape, with their weights; those of weight 0 or rank 0 cost nothing.
    """
    used = [(factors, weight) for factors, weight in products if weight != 0.0 and factors.rank]
    if not used or not out.numel():
        weighted_sum(out, tensors, weights)
        return
    work = work_dtype(out, *tensors, *(part for factors, _ in used for part in (factors.up, factors.down)))
    product = _Single(*used[0], work) if len(used) == 1 else _Stacked(used, work)
    height, width = matrix_shape(out.shape)
    size = max(1, (BLOCK if out.device.type == "cpu" else BLOCK_GPU) // width)
    target, sources = out.view(height, width), [tensor.reshape(height, width) for tensor in tensors]
    for begin in range(0, height, size):
        rows = slice(begin, begin + size)
        goal = target[rows]
        result = goal if goal.dtype == work else torch.empty_like(goal, dtype=work)
        weighted_sum(result, [source[rows] for source in sources], weights)
        product.add(result, rows)
        if result is not goal:
            goal.copy_(result)


def delta(factors: Factors, work: torch.dtype) -> Tensor:
    """Return scale · up @ down as a matrix of type ``work``."""
    out = torch.zeros(len(factors.up), factors.down.shape[1], dtype=work, device=factors.up.device)
    if factors.rank:
        _Single(factors, 1.0, work).add(out, slice(None))
    return out


def matrix(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix of its first dimension by all others; a vector as a column."""
    return tensor.reshape(matrix_shape(tensor.shape))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return a tensor's shape as that of the matrix of its first dimension by all others."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


class Terms:
    """Tensors with weights, each tensor once.

    Attributes:
        tensors, weights: what `combine` takes.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._weights: list[list[float]] = []

    def add(self, tensor: Tensor, weight: float) -> None:
        """Add ``weight`` times a tensor."""
        for known, weights in zip(self.tensors, self._weights, strict=True):
            if known is tensor:
                weights.append(weight)
                return
        self.tensors.append(tensor)
        self._weights.append([weight])

    @property
    def weights(self) -> list[float]:
        """The sum of each tensor's weights."""
        return [math.fsum(weights) for weights in self._weights]


def add_task_vectors(parameter: Parameter, weights: Sequence[float], out: Tensor) -> None:
    """Write base + Σ weight · τ_i into ``out``: the base bit for bit where the inputs' tensors are the base's own."""
    base = parameter.ancestor
    others = [pair for pair in zip(parameter.models, weights, strict=True) if pair[0] is not base]
    own = math.fsum([1.0, *(-weight for _, weight in others)])
    weighted_sum(out, [base, *(model for model, _ in others)], [own, *(weight for _, weight in others)])


class _Single:
    """One product, computed as PEFT does, so that an adapter alone comes out as PEFT's own."""

    def __init__(self, factors: Factors, weight: float, work: torch.dtype) -> None:
        self._up, self._down = factors.up.to(work), factors.down.to(work)
        self._transposed = factors.transposed
        self._scale = factors.scale * weight

    def add(self, result: Tensor, rows: slice) -> None:
        up = self._up[rows]
        product = self._down.T @ up.T if self._transposed else up @ self._down
        product.mul_(self._scale)
        result.add_(product.T if self._transposed else product)


class _Stacked:
    """Several products as one, of the sum of their ranks."""

    def __init__(self, used: Sequence[tuple[Factors, float]], work: torch.dtype) -> None:
        scaled = [factors.up.to(work) * (factors.scale * weight) for factors, weight in used]
        self._up = torch.cat(scaled, dim=1)
        self._down = torch.cat([factors.down.to(work) for factors, _ in used], dim=0)

    def add(self, result: Tensor, rows: slice) -> None:
        result.addmm_(self._up[rows], self._down)


def factors_of(parameter: Parameter) -> list[Factors] | None:
    """Return the factors of all inputs, or None where none has any of a rank above 0: biases, norms, the untouched.

    Raises:
        InvalidInput: an input has factors here, and another one differs from the base without having any.
    """
    found = [parameter.facts.factors(number) for number in range(len(parameter.models))]
    if not any(factors is not None and factors.rank for factors in found):
        return None
    known = [factors for factors in found if factors is not None]
    if len(known) < len(found):
        raise InvalidInput(
            f"input {found.index(None)} has no low-rank factors for {parameter.info.name!r}, which others have",
            field="experts",
            remedy="use LoRA adapters only, or an operator on whole weights such as task_arithmetic",
        )
    return known
