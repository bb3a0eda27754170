"""WUDI: the merged task vector that disturbs every task least, found by gradient descent without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.descent import Method, descend
from workers.merging.operator import Numbers, Parameter, Whole, operator
from workers.merging.spectral import (
    MatrixOptions,
    add_prepared,
    add_task_vectors,
    is_matrix,
    one_thread,
    sum_of_task_vectors,
    svd,
    task_vectors,
)


class WudiOptions(MatrixOptions):
    """Options of `wudi`. OptMerge is `low_rank`, `start` mean, `optimiser` sgd and a `learning_rate` of 1e-4."""

    iterations: int = Field(default=300, ge=1, le=10_000, description="Number of steps of the optimiser.")
    learning_rate: float = Field(default=1e-5, gt=0, le=1, description="Step size of the optimiser.")
    optimiser: Method = Field(default="adam", description="Adam, or gradient descent with a momentum of 0.9.")
    start: Literal["sum", "mean"] = Field(default="sum", description="Where it starts from, of the task vectors.")
    low_rank: bool = Field(
        default=False,
        description="Use of each of N task vectors only the leading 1/N of its singular values, as OptMerge does.",
    )


@operator(
    "wudi",
    summary="Optimises the merged task vector so that it disturbs the inputs of every task least, without data.",
    reference="Cheng et al., Whoever started the interference should end it, arXiv 2503.08099; as in fusion_bench; "
    "low_rank: Wei et al., OptMerge, arXiv 2505.19892",
    options=WudiOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
    idempotent=False,
)
def wudi(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · τ_M, where τ_M reduces Σ_i ‖(τ_M − τ_i) τ_iᵀ‖² ∕ ‖τ_i‖²; see `MergeFunction`.

    The rows of a task vector stand for the inputs of its layer. The result is that of a fixed number of steps, not the
    minimum. Task vectors that are 0 have no say. Other tensors take the mean of the task vectors.
    """
    (scale,) = parameter.coefficients
    options: WudiOptions = parameter.options
    if not is_matrix(parameter.info, options.embeddings):
        add_task_vectors(parameter, scale / len(parameter.models), out)
    elif scale == 0.0:
        out.copy_(parameter.ancestor)
    else:
        settings = options.model_dump(exclude={"embeddings"})
        found = parameter.facts.of_tensor("wudi", lambda whole: _merged(whole, options), settings=settings)
        add_prepared(parameter, [found["delta"]], [scale], out)


def _merged(whole: Whole, options: WudiOptions) -> Numbers:
    with one_thread():
        start = sum_of_task_vectors(whole)
        if options.start == "mean":
            start /= len(whole[1])
        # In terms of the step from the start, so that where nothing pushes nothing moves, not even by rounding.
        push, inputs = torch.zeros_like(start), []
        for delta in task_vectors(whole):
            norm = torch.linalg.vector_norm(delta)
            if norm == 0.0:
                continue
            target, rows = _task(delta, len(whole[1]), options.low_rank)
            rows = rows / norm
            push += _product_with([rows], start.shape[1])(start - target)
            inputs.append(rows)
        pushed = _product_with(inputs, start.shape[1])
        step = descend(
            torch.zeros_like(start),
            lambda step: (push + pushed(step)).mul_(2.0),
            rate=options.learning_rate,
            steps=options.iterations,
            method=options.optimiser,
        )
        return {"delta": start + step}


def _task(delta: Tensor, count: int, low_rank: bool) -> tuple[Tensor, Tensor]:
    """What to come close to, and the rows that stand for the inputs."""
    if not low_rank:
        return delta, delta
    part = svd(delta).leading(min(delta.shape) // count)
    return part.matrix(), part.values[:, None] * part.right


def _product_with(inputs: Sequence[Tensor], columns: int) -> Callable[[Tensor], Tensor]:
    """The product of a matrix with Σ rowsᵀ rows, by the cheaper of two ways."""
    if columns > 2 * sum(len(rows) for rows in inputs):
        return lambda matrix: sum(((matrix @ rows.T) @ rows for rows in inputs), torch.zeros_like(matrix))
    square = torch.zeros(columns, columns, dtype=inputs[0].dtype, device=inputs[0].device)
    for rows in inputs:
        square += rows.T @ rows
    return lambda matrix: matrix @ square
