"""Task arithmetic: base + Σ λ_i (θ_i − base)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from workers.merging.blocks import weighted_sum
from workers.merging.operator import Options, operator


@operator(
    "task_arithmetic",
    summary="Adds the experts' task vectors to the base, each scaled by its coefficient.",
    reference="Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089",
)
def task_arithmetic(
    base: Tensor | None, inputs: Sequence[Tensor], coefficients: Sequence[float], options: Options, out: Tensor
) -> None:
    """Compute base + Σ λ_i (θ_i − base), as (1 − Σ λ_i) base + Σ λ_i θ_i; see `MergeFunction`."""
    del options
    assert base is not None  # noqa: S101 - the engine gives it, as the operator says it uses it
    weighted_sum(out, [base, *inputs], [math.fsum([1.0, *(-number for number in coefficients)]), *coefficients])
