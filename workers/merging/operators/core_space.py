"""Core Space: LoRA adapters as small square matrices in bases that they share, merged there by another operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.checkpoints import Factors
from workers.merging.blocks import work_dtype
from workers.merging.inside import InnerOptions, merge_parts, merge_plainly
from workers.merging.low_rank import combine, matrix
from workers.merging.operator import Numbers, Parameter, Whole, operator
from workers.merging.spectral import one_thread, svd


@operator(
    "core_space",
    summary="Expresses LoRA adapters in bases that they share and merges the small core matrices by `inner`.",
    reference="Panariello et al., Accurate and efficient low-rank model merging in Core Space, arXiv 2509.17786",
    options=InnerOptions,
    needs="factors",
)
def core_space(parameter: Parameter, out: Tensor) -> None:
    """Compute base + U · merged(M_1 … M_N) · Vᵀ with M_i = (Uᵀ B_i)(A_i V); see `MergeFunction`.

    U are the left singular vectors of all B_i side by side, V the right ones of all A_i below each other, at most Σ r_i
    of each, so nothing is lost. An adapter's scale is shared between both sides. Experts that are no adapters take part
    by their singular value decomposition. Vectors and numbers are merged by the inner operator as they are.
    """
    if len(parameter.info.shape) < 2 or not out.numel():
        merge_plainly(parameter, out)
        return
    known = parameter.facts.of_tensor("core_space", lambda whole: _cores(parameter, whole))
    if not known["left"].numel() or not any(parameter.coefficients):
        out.copy_(parameter.ancestor)
        return
    cores = [known[f"core.{number}"] for number in range(len(parameter.models))]
    merged = merge_parts(parameter, cores, "core_space", {})
    combine(out, [parameter.ancestor], [1.0], [(Factors(known["left"] @ merged, known["right"], 1.0), 1.0)])


def _cores(parameter: Parameter, whole: Whole) -> Numbers:
    """U, Vᵀ and the M_i, computed in float64 and rounded to the type of the work."""
    base, models = whole
    assert base is not None  # noqa: S101 - core_space uses it
    found = [parameter.facts.factors(number) for number in range(len(models))]
    with one_thread():
        pairs = [_pair(factors, base, model) for factors, model in zip(found, models, strict=True)]
        left = svd(torch.cat([up for up, _ in pairs], dim=1)).left
        right = svd(torch.cat([down for _, down in pairs], dim=0)).right
        cores = [(left.T @ up) @ (down @ right.T) for up, down in pairs]
    work = work_dtype(base, *models, *(part for factors in found if factors for part in (factors.up, factors.down)))
    answer = {"left": left.to(work), "right": right.to(work)}
    return answer | {f"core.{number}": core.to(work) for number, core in enumerate(cores)}


def _pair(factors: Factors | None, base: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """√s B and √s A in float64; of a dense task vector its singular vectors, each with the roots of the values."""
    if factors is not None:
        root = math.sqrt(abs(factors.scale))
        return factors.up.double() * math.copysign(root, factors.scale), factors.down.double() * root
    parts = svd(matrix(model.double() - base.double()))
    return parts.left * parts.values.sqrt(), parts.values.sqrt()[:, None] * parts.right
