"""LiNeS: scale a task vector with depth."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.geometry import TensorInfo
from workers.merging.blocks import weighted_sum
from workers.merging.deltas import NormSum
from workers.merging.operator import Numbers, Options, Parameter, Whole, operator


class LinesOptions(Options):
    """Options of `lines`."""

    alpha: float = Field(
        default=0.5, ge=-10, le=10, description="Factor of the first layer, and of what belongs to no layer."
    )
    beta: float = Field(default=0.5, ge=-10, le=10, description="What the factor of the last layer is larger by.")
    auto_alpha: bool = Field(
        default=False,
        description=(
            "Take as alpha the L1 norm of the sum of the experts' task vectors, divided by their number and by the norm of "
            "the merged task vector; for the result of a merge of task vectors."
        ),
    )


@operator(
    "lines",
    summary="Scales a task vector by a factor that grows linearly with depth.",
    reference="Wang et al., LiNeS, arXiv 2410.17146",
    options=LinesOptions,
    max_experts=1,
    elementwise=True,
    modifier=True,
    linear=True,
)
def lines(parameter: Parameter, out: Tensor) -> None:
    """Compute base + w (α + β l/(L−1)) τ in layer l = 0 … L−1, base + w α τ elsewhere; see `MergeFunction`.

    For a single fine-tuned model the paper takes β = 1 − α; for a merged one `auto_alpha` and tunes β.

    Raises:
        InvalidInput: `auto_alpha`, and the input is not the result of a merge of task vectors.
        InfeasibleCandidate: `auto_alpha`, and the merged task vector is 0.
    """
    options, position = parameter.options, parameter.info.position
    depth = position / (parameter.layers - 1) if isinstance(position, int) and parameter.layers > 1 else 0.0
    alpha = _alpha(parameter) if options.auto_alpha else options.alpha
    weight = parameter.coefficients[0] * (alpha + options.beta * depth)
    weighted_sum(out, [parameter.ancestor, parameter.models[0]], [1.0 - weight, weight])


def _alpha(parameter: Parameter) -> float:
    """The authors' choice for merged models. Computing the merged task vector's norm merges the whole model once more."""
    inner = parameter.facts.behind(0)
    if inner is None:
        raise _no_experts()
    experts = inner.of_model("l1_of_summed_task_vectors", _summed)
    merged = parameter.facts.of_model("l1_of_task_vector", _summed, of=[0])
    if float(merged["norm"]) == 0.0:
        raise InfeasibleCandidate("the merged task vector is 0, so there is nothing to scale alpha by")
    return float(experts["norm"]) / float(merged["norm"]) / float(experts["count"])


def _summed(model: Iterable[tuple[TensorInfo, Whole]]) -> Numbers:
    """The L1 norm of the sum of all inputs' task vectors over the whole model, and the number of inputs."""
    norm, count = NormSum("l1"), 0
    for _, (base, inputs) in model:
        if base is None:
            raise _no_experts()
        start, count = base.double(), len(inputs)
        total = torch.zeros_like(start)
        for tensor in inputs:
            total += tensor.double() - start
        norm.add(total.abs_().view(-1))
    return {"norm": torch.tensor(norm.value, dtype=torch.float64), "count": torch.tensor(float(count))}


def _no_experts() -> InvalidInput:
    return InvalidInput(
        "auto_alpha needs the task vectors that were merged",
        field="options.auto_alpha",
        remedy="apply lines to the result of an operator on task vectors, such as ties, or give alpha",
    )
