"""KnOTS: task vectors in the left singular vectors that they share, merged there by another operator."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.checkpoints import Factors
from workers.merging.blocks import work_dtype
from workers.merging.inside import InnerOptions, merge_parts, merge_plainly
from workers.merging.low_rank import combine, matrix
from workers.merging.operator import Numbers, Parameter, Whole, operator
from workers.merging.spectral import one_thread, svd


class KnotsOptions(InnerOptions):
    """Options of `knots`."""

    shared: Literal["output", "input"] = Field(
        default="output",
        description="Which side's singular vectors the task vectors share: `output` for the rows, `input` for the columns.",
    )
    scaled: bool = Field(
        default=True,
        description="Merge the parts with the singular values in them, as the authors; else without, as Core Space's do.",
    )


@operator(
    "knots",
    summary="Aligns the task vectors by a joint singular value decomposition and merges the aligned parts by `inner`.",
    reference="Stoica et al., Model merging with SVD to tie the KnOTS, arXiv 2410.19735",
    options=KnotsOptions,
    needs="factors",
)
def knots(parameter: Parameter, out: Tensor) -> None:
    """Compute base + U · merged(Σ V_1ᵀ … Σ V_Nᵀ) with [τ_1 … τ_N] = U Σ [V_1ᵀ … V_Nᵀ]; see `MergeFunction`.

    The decomposition costs little where all experts are adapters, and is done once. The authors trim over all layers
    together, here every parameter is by itself. Vectors and numbers are merged by the inner operator as they are.
    """
    if len(parameter.info.shape) < 2 or not out.numel():
        merge_plainly(parameter, out)
        return
    options = parameter.options
    settings = {"shared": options.shared}
    known = parameter.facts.of_tensor("knots", lambda whole: _aligned(parameter, whole), settings=settings)
    left, values = known["left"], known["values"]
    if not values.numel() or not any(parameter.coefficients):
        out.copy_(parameter.ancestor)
        return
    parts = [known[f"part.{number}"] for number in range(len(parameter.models))]
    if options.scaled:
        parts = [values[:, None] * part for part in parts]
    else:
        left = left * values
    merged = merge_parts(parameter, parts, "knots", {**settings, "scaled": options.scaled})
    turned = options.shared == "input"
    factors = Factors(merged.T, left.T, 1.0, True) if turned else Factors(left, merged, 1.0)
    combine(out, [parameter.ancestor], [1.0], [(factors, 1.0)])


def _aligned(parameter: Parameter, whole: Whole) -> Numbers:
    """U, Σ and the V_iᵀ, decomposed in float64 and rounded to the type of the work."""
    base, models = whole
    assert base is not None  # noqa: S101 - knots uses it
    found = [parameter.facts.factors(number) for number in range(len(models))]
    turned = parameter.options.shared == "input"
    with one_thread():
        pairs = [_pair(factors, base, model, turned) for factors, model in zip(found, models, strict=True)]
        basis, core = torch.linalg.qr(torch.cat([up for up, _ in pairs], dim=1))
        rows = [torch.linalg.qr(down.T) for _, down in pairs]
        widths = [up.shape[1] for up, _ in pairs]
        joint = torch.cat(
            [block @ right.T for block, (_, right) in zip(torch.split(core, widths, dim=1), rows, strict=True)], dim=1
        )
        parts = svd(joint)
        split = torch.split(parts.right, [right.shape[0] for _, right in rows], dim=1)
        work = work_dtype(base, *models, *(part for factors in found if factors for part in (factors.up, factors.down)))
        answer = {"left": (basis @ parts.left).to(work), "values": parts.values.to(work)}
        return answer | {
            f"part.{number}": (piece @ orthonormal.T).to(work)
            for number, (piece, (orthonormal, _)) in enumerate(zip(split, rows, strict=True))
        }


def _pair(factors: Factors | None, base: Tensor, model: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """A task vector (its transpose, if ``turned``) as a product of two matrices in float64; of a dense one and 1."""
    if factors is None:
        dense = matrix(model.double() - base.double())
        dense = dense.T if turned else dense
        height, width = dense.shape
        eye = torch.eye(min(height, width), dtype=torch.float64, device=dense.device)
        return (dense, eye) if width <= height else (eye, dense)
    up, down = factors.up.double() * factors.scale, factors.down.double()
    return (down.T, up.T) if turned else (up, down)
