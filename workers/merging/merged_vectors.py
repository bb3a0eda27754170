"""Merged task vectors that are prepared once: operators whose only coefficient scales one.

Preparing goes through all experts; a candidate then reads the base and the prepared vector, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workers.merging.blocks import blockwise, work_dtype
from workers.merging.operator import Parameter, Settings, Whole
from workers.merging.spectral import add_prepared


def add_merged_vector(
    parameter: Parameter,
    out: Tensor,
    question: str,
    compute: Callable[[Whole], Tensor],
    settings: Settings | None = None,
) -> None:
    """Write base + scale · merged task vector, the scale being the parameter's coefficient.

    Args:
        parameter: all or a stretch of it.
        out: see `MergeFunction`.
        question: name of the merged task vector; see `Facts.of_tensor`.
        compute: makes it: of the parameter's shape, of the inputs' work type.
        settings: what it depends on beside the models.
    """
    (scale,) = parameter.coefficients
    if scale == 0.0:
        out.copy_(parameter.ancestor)
        return
    vector = parameter.facts.of_tensor(question, lambda whole: {"vector": compute(whole)}, settings=settings)["vector"]
    add_prepared(parameter, [vector], [scale], out)


def merge_task_vectors(whole: Whole, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return a merged task vector, computed element by element.

    Args:
        whole: base and inputs.
        combine: gets a flat block of each task vector, in the work type, that it may overwrite; returns the merged one.
    """
    base, models = whole
    assert base is not None  # noqa: S101 - operators that ask this use the base
    out = torch.empty(base.shape, dtype=work_dtype(base, *models), device=base.device)

    def write(parts: list[Tensor], result: Tensor) -> None:
        start = parts[0].to(result.dtype)
        result.copy_(combine([part.to(result.dtype) - start for part in parts[1:]]))

    blockwise(out, [base, *models], write)
    return out
