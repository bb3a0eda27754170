"""OPCM: adds one expert after the other, each without what would disturb those before it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from optimizer.geometry import TensorInfo
from workers.merging.blocks import dot
from workers.merging.operator import Numbers, Options, Parameter, Whole, operator
from workers.merging.spectral import add_prepared, add_task_vectors, is_matrix, one_thread, svd, task_vectors


class OpcmOptions(Options):
    """Options of `opcm`."""

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the merged singular values whose directions a further expert must not change.",
    )


@operator(
    "opcm",
    summary="Adds the experts in their order, each projected away from the leading directions of those before.",
    reference="Tang et al., Merging models on the fly without retraining, arXiv 2501.09522; as in fusion_bench",
    options=OpcmOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
    ordered=True,
    idempotent=False,
)
def opcm(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · (mean_i ‖τ_i‖ ∕ ‖E_N‖) · E_N; see `MergeFunction`.

    E_1 = τ_1, and E_t = E_{t-1} + τ_t without its entries, in the basis of E_{t-1}'s singular vectors, on the diagonal
    and in the block of the leading singular values that sum up to at most ``alpha`` of all. Tensors other than
    matrices, and embedding tables, are summed. Norms are those of all shared parameters together. The order of the
    experts is part of the recipe; the reference shuffles it. Renormalising after every expert, as the paper does,
    comes to the same, because E's singular vectors do not depend on its length. Where E_{t-1} has not full rank, only
    the directions that it has are protected; the reference protects arbitrary others too.
    """
    (scale,) = parameter.coefficients
    if scale == 0.0:
        out.copy_(parameter.ancestor)
        return
    alpha = parameter.options.alpha
    facts, settings = parameter.facts, {"alpha": alpha}
    swept = partial(_swept, alpha=alpha)
    length = facts.of_model(
        "opcm_length", lambda _: _length(facts.of_tensors("opcm", swept, settings=settings)), settings=settings
    )
    factor = scale * float(length["factor"])
    if _is_linear(parameter.info):
        found = facts.of_tensor("opcm", partial(swept, parameter.info), settings=settings)
        add_prepared(parameter, [found["delta"]], [factor], out)
    else:
        add_task_vectors(parameter, factor, out)


def _is_linear(info: TensorInfo) -> bool:
    return is_matrix(info, embeddings=False)


def _swept(info: TensorInfo, whole: Whole, alpha: float) -> Numbers:
    """E_N of a matrix, and the squared norms of all task vectors and of E_N."""
    linear = _is_linear(info)
    with one_thread():
        deltas = task_vectors(whole)
        merged = next(deltas)
        norms = [dot(merged, merged)]
        for delta in deltas:
            norms.append(dot(delta, delta))
            merged = merged + (_projected(delta, merged, alpha) if linear else delta)
        squares = torch.tensor([*norms, dot(merged, merged)], dtype=torch.float64)
    return {"squares": squares, "delta": merged} if linear else {"squares": squares}


def _projected(delta: Tensor, merged: Tensor, alpha: float) -> Tensor:
    basis = svd(merged)
    core = basis.left.T @ delta @ basis.right.T
    split = int((basis.values.cumsum(dim=0) <= alpha * basis.values.sum()).sum())
    removed = torch.diag(core.diagonal())
    removed[:split, :split] = core[:split, :split]
    return delta - basis.left @ removed @ basis.right


def _length(answers: Iterable[tuple[TensorInfo, Mapping[str, Tensor]]]) -> Numbers:
    squares = zip(*(answer["squares"].tolist() for _, answer in answers), strict=True)
    *own, merged = [math.sqrt(math.fsum(column)) for column in squares]
    return {"factor": torch.tensor(math.fsum(own) / len(own) / merged if merged else 1.0, dtype=torch.float64)}
