"""Merging LoRA adapters factor by factor: the A's and the B's separately, as Evo-Merging and PEFT's `linear` do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from optimizer.errors import InvalidInput
from workers.checkpoints import Factors
from workers.merging.blocks import weighted_sum, work_dtype
from workers.merging.low_rank import add_task_vectors, combine, factors_of
from workers.merging.operator import Options, Parameter, operator, varies


class LoraFactorsOptions(Options):
    """Options of `lora_factors`."""

    density: float = varies(
        1.0, ge=0, le=1, description="Share of the entries of A that is kept, largest magnitudes first (B is whole)."
    )
    weights: Literal["both", "root"] = Field(
        default="both",
        description=(
            "`both` multiplies A and B by the coefficient each, as Evo-Merging; `root` by the root of its magnitude, as "
            "PEFT's `linear`, so that a single adapter is scaled by the coefficient itself."
        ),
    )


@operator(
    "lora_factors",
    summary="Adds up the factors A and B of LoRA adapters separately and multiplies the sums.",
    reference="Evo-Merging, arXiv 2509.12951; PEFT's add_weighted_adapter (linear)",
    options=LoraFactorsOptions,
    low=-1.5,
    high=1.5,
    needs="factors",
    idempotent=False,
)
def lora_factors(parameter: Parameter, out: Tensor) -> None:
    """Compute base + (Σ β_i √s_i B_i)(Σ β_i √s_i S_i(A_i)); see `MergeFunction`.

    S_i keeps the share ``density`` of an expert's A, and all entries as large as the smallest kept one; s_i is the
    adapter's scale, shared between both sides. With `root` the weights are √|β_i s_i|, and A's carries the sign. The
    product has terms between different adapters, so the result is not linear in the task vectors. Adapters without
    factors for a module do not take part there. Parameters for which nobody has factors: base + Σ β_i τ_i.

    Raises:
        InvalidInput: the adapters' ranks differ, or an expert that is no adapter changes what adapters have factors for.
    """
    base, weights = parameter.ancestor, parameter.coefficients
    found = factors_of(parameter)
    if found is None:
        add_task_vectors(parameter, weights, out)
        return
    densities = parameter.values("density")
    used = [(part, *rest) for part, *rest in zip(found, weights, densities, strict=True) if part.rank and rest[0] != 0]
    if not used:
        out.copy_(base)
        return
    _check([factors for factors, _, _ in used], parameter.info.name)
    work = work_dtype(out, base, *(part for factors, _, _ in used for part in (factors.up, factors.down)))
    sides = [_sides(factors, density, work) for factors, _, density in used]
    both = [_shares(weight, factors.scale, parameter.options.weights) for factors, weight, _ in used]
    up = _total([side[0] for side in sides], [share[0] for share in both])
    down = _total([side[1] for side in sides], [share[1] for share in both])
    turned = used[0][0].transposed
    merged = Factors(down.T, up.T, 1.0, True) if turned else Factors(up, down, 1.0)
    combine(out, [base], [1.0], [(merged, 1.0)])


def _check(found: Sequence[Factors], name: str) -> None:
    ranks = sorted({factors.rank for factors in found})
    if len(ranks) > 1:
        raise InvalidInput(
            f"the adapters have the ranks {', '.join(map(str, ranks))} for {name!r}, so their factors cannot be added",
            field="experts",
            remedy="use adapters of one rank, or an operator on their products such as task_arithmetic",
        )


def _sides(factors: Factors, density: float, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """B, and the largest entries of A, whichever way the weight is stored."""
    up, down = factors.up.to(work), factors.down.to(work)
    if factors.transposed:
        up, down = down.T, up.T
    return up, _largest(down, density)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """The share ``density`` of a tensor's entries, rounded to a whole number, at least one; none for a share of 0."""
    size = tensor.abs()
    kept = min(size.numel(), max(1, round(size.numel() * density))) if density else 0
    if kept == size.numel():
        return tensor
    if not kept:
        return torch.zeros_like(tensor)
    limit = size.reshape(-1).kthvalue(size.numel() - kept + 1).values
    return torch.where(size >= limit, tensor, 0.0)


def _shares(weight: float, scale: float, rule: str) -> tuple[float, float]:
    """The weights of B and of A."""
    if rule == "both":
        root = math.sqrt(abs(scale))
        return weight * root, math.copysign(weight * root, weight * scale)
    root = math.sqrt(abs(weight * scale))
    return root, math.copysign(root, weight * scale)


def _total(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    out = torch.empty(parts[0].shape, dtype=parts[0].dtype, device=parts[0].device)
    weighted_sum(out, parts, weights)
    return out
