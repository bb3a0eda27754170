"""DOGE: a common correction of the task vectors that reduces their conflict outside of the subspace that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from optimizer.geometry import TensorInfo
from workers.merging.descent import descend
from workers.merging.operator import Numbers, Options, Parameter, Whole, operator
from workers.merging.selection import kth_magnitudes
from workers.merging.spectral import add_prepared, is_matrix, one_thread, svd, task_vectors


class DogeOptions(Options):
    """Options of `doge`."""

    strength: float = Field(
        default=0.07, gt=0, le=10, description="Norm that every task vector is brought to in each matrix."
    )
    density: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Share of each task vector that is merged, largest magnitudes of the whole model first.",
    )
    subspace: int = Field(
        default=6,
        ge=1,
        le=1000,
        description="One in so many directions of a matrix belongs to the shared subspace, which stays as it is.",
    )
    iterations: int = Field(default=400, ge=1, le=10_000, description="Number of steps of the optimiser.")
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="Step size of the optimiser (Adam).")


@operator(
    "doge",
    summary="Corrects all task vectors by a common, optimised difference, keeps their largest entries and adds up.",
    reference="Wei et al., Modeling multi-task model merging as adaptive projective gradient descent, "
    "arXiv 2501.01230; as in fusion_bench (doge_ta)",
    options=DogeOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
    min_experts=2,
    idempotent=False,
)
def doge(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ_i λ_i (τ_i + δ) ∘ M_i, where λ_i = strength ∕ ‖τ_i‖; see `MergeFunction`.

    δ takes a fixed number of steps of Adam from 0 down Σ_j Σ_rows (Σ_columns τ_j ∘ (τ_j − Σ_i λ_i (τ_i + δ)))², with
    the projection of the gradient onto the shared subspace taken away: the leading left singular vectors of the N task
    vectors' leading ones side by side. The mask M_i has the largest entries of τ_i over all matrices of the model's
    layers. As in the reference, everything but those matrices (embeddings, output layers, norms, biases) stays the
    base's. Task vectors that are 0 in a matrix have no say there.
    """
    (scale,) = parameter.coefficients
    options: DogeOptions = parameter.options
    if scale == 0.0 or not _is_merged(parameter.info):
        out.copy_(parameter.ancestor)
        return
    density = options.density
    limits: list[float] = parameter.facts.of_model(
        "doge_limits", lambda model: _limits(model, density, len(parameter.models)), settings={"density": density}
    )["limits"].tolist()
    settings = {**options.model_dump(exclude={"density"}), "limits": limits}
    found = parameter.facts.of_tensor("doge", lambda whole: _merged(whole, limits, options), settings=settings)
    add_prepared(parameter, [found["delta"]], [scale], out)


def _is_merged(info: TensorInfo) -> bool:
    return is_matrix(info, embeddings=False) and info.kind != "head" and isinstance(info.position, int)


def _limits(model: Iterable[tuple[TensorInfo, Whole]], density: float, count: int) -> Numbers:
    """The smallest magnitude of each task vector that is kept (the reference keeps one entry more than the share)."""

    def parts() -> Iterator[Sequence[Tensor]]:
        return (list(task_vectors(whole)) for info, whole in model if _is_merged(info))

    limits = kth_magnitudes(parts, lambda length: length - int(length * density), count)
    return {"limits": torch.tensor(limits, dtype=torch.float64)}


def _merged(whole: Whole, limits: Sequence[float], options: DogeOptions) -> Numbers:
    with one_thread():
        stack = torch.stack(list(task_vectors(whole)), dim=1)
        deltas = stack.unbind(dim=1)
        norms = [float(torch.linalg.vector_norm(delta)) for delta in deltas]
        factors = [options.strength / norm if norm else 0.0 for norm in norms]
        correction = _correction(stack, factors, options)
        merged = torch.zeros_like(correction)
        for delta, limit, factor in zip(deltas, limits, factors, strict=True):
            merged += torch.where(delta.abs() >= limit, delta + correction, 0.0) * factor
        return {"delta": merged}


def _correction(stack: Tensor, factors: Sequence[float], options: DogeOptions) -> Tensor:
    """δ of one matrix; ``stack`` has rows × tasks × columns, as every row is a problem of its own."""
    total = sum(factors)
    merged = torch.zeros_like(stack[:, 0])
    for number, factor in enumerate(factors):
        merged.add_(stack[:, number], alpha=factor)
    conflict = (stack * (stack - merged[:, None])).sum(dim=2, keepdim=True)
    shared = _shared(stack.unbind(dim=1), options.subspace)

    def gradient(step: Tensor) -> Tensor:
        left = conflict - total * (stack @ step[:, :, None])
        full = (stack.mT @ left)[:, :, 0].mul_(-2.0 * total)
        return full - shared @ (shared.T @ full)

    return descend(torch.zeros_like(merged), gradient, rate=options.learning_rate, steps=options.iterations)


def _shared(deltas: Sequence[Tensor], subspace: int) -> Tensor:
    """Orthonormal columns that span the shared subspace."""
    size = min(deltas[0].shape)
    own = [svd(delta).leading(size // len(deltas)).left for delta in deltas]
    return svd(torch.cat(own, dim=1)).leading(size // subspace).left
