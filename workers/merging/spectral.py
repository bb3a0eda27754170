"""What the operators on task vectors as matrices share: a singular value decomposition that results can be built on.

Singular vectors are unique only up to sign (and up to rotation where values are equal), and those of singular values
that are nothing but rounding noise are arbitrary. Everything here is invariant under the signs and drops the noise, so
results do not hang on what LAPACK happens to return. Their last bits may still differ between types of CPU, because
LAPACK and BLAS pick other kernels there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from optimizer.geometry import TensorInfo
from workers.merging.blocks import weighted_sum, work_dtype
from workers.merging.operator import Options, Parameter, Whole


class MatrixOptions(Options):
    """Options of the operators that treat every matrix of a model by its spectrum."""

    embeddings: bool = Field(
        default=True,
        description="Treat embedding tables by their spectrum too; otherwise as biases and norms are treated.",
    )


@dataclass(frozen=True)
class Svd:
    """Singular value decomposition of an m × n matrix, cut to its numerical rank r.

    Attributes:
        left: m × r, orthonormal columns.
        values: r singular values, descending, none of them 0.
        right: r × n, orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def leading(self, count: int) -> Svd:
        """Return the part that belongs to the ``count`` largest singular values, without holding on to the rest."""
        if count >= len(self.values):
            return self
        return Svd(self.left[:, :count].clone(), self.values[:count].clone(), self.right[:count].clone())

    def matrix(self) -> Tensor:
        """Return the m × n matrix."""
        return (self.left * self.values) @ self.right


def svd(matrix: Tensor, part_of: Tensor | None = None) -> Svd:
    """Decompose a matrix in its own type (float32 or float64).

    Singular values below 4 √(m + n) rounding units of the largest, a few times the noise to expect, count as 0.

    Args:
        matrix: m × n.
        part_of: what the matrix is left of after a subtraction; the noise is then relative to the norm of that.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    noise = 4.0 * sum(matrix.shape) ** 0.5 * torch.finfo(matrix.dtype).eps
    size = values[:1] if part_of is None else torch.linalg.vector_norm(part_of)
    rank = int((values > noise * size).sum())
    return Svd(left, values, right).leading(rank)


def polar(matrix: Tensor) -> Tensor:
    """Return the closest matrix with orthonormal columns (rows): the polar factor, the solution of Procrustes' problem.

    Where columns depend on each other it is the partial isometry (matrix · matrixᵀ)^{-1/2} · matrix, which is unique;
    an orthogonal factor would need arbitrary directions there.
    """
    parts = svd(matrix)
    return parts.left @ parts.right


def is_matrix(info: TensorInfo, embeddings: bool) -> bool:
    """Whether a parameter is treated by its spectrum; ``embeddings`` says whether embedding tables are."""
    return len(info.shape) == 2 and 0 not in info.shape and (embeddings or info.kind != "embeddings")


def task_vectors(whole: Whole) -> Iterator[Tensor]:
    """Yield the inputs minus the base, new tensors in float32 (float64 where any of them is).

    Raises:
        InfeasibleCandidate: they are not finite.
    """
    base, models = whole
    assert base is not None  # noqa: S101 - the engine gives it to operators that use it
    work = work_dtype(base, *models)
    start = base.to(work)
    for model in models:
        delta = model.to(work) - start
        if not bool(delta.isfinite().all()):
            raise InfeasibleCandidate("a task vector has entries that are not finite")
        yield delta


def sum_of_task_vectors(whole: Whole) -> Tensor:
    """Return Σ τ_i as a new tensor, of the task vectors' type."""
    deltas = task_vectors(whole)
    total = next(deltas)
    for delta in deltas:
        total += delta
    return total


def add_prepared(parameter: Parameter, prepared: Sequence[Tensor], factors: Sequence[float], out: Tensor) -> None:
    """Write base + Σ factor · prepared into ``out``, where ``prepared`` belong to the whole parameter."""
    stretch = slice(parameter.begin, parameter.begin + out.numel())
    cut = [tensor.reshape(-1)[stretch].view(out.shape) for tensor in prepared]
    weighted_sum(out, [parameter.ancestor, *cut], [1.0, *factors])


def add_task_vectors(parameter: Parameter, factor: float, out: Tensor) -> None:
    """Write base + factor · Σ τ_i into ``out``, as (1 − N factor) base + factor Σ θ_i."""
    count = len(parameter.models)
    weights = [1.0 - count * factor, *[factor] * count]
    weighted_sum(out, [parameter.ancestor, *parameter.models], weights)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use a single thread, in the calling thread only: LAPACK's results depend on how many there are."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
