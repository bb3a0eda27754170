"""Activation-informed merging: keeps a merge from changing what the base relies on."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.blocks import weighted_sum, work_dtype
from workers.merging.operator import Numbers, Options, Parameter, operator


class AimOptions(Options):
    """Options of `aim`."""

    omega: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description=(
            "ω, the share of a change that is left where the base is most active; 1 changes nothing. The authors "
            "recommend 0.2 to 0.6."
        ),
    )


@operator(
    "aim",
    summary="Holds back a merge's changes to the weights whose inputs are most active in the base.",
    reference="Nobari et al., Activation-informed merging of large language models, arXiv 2502.02421",
    options=AimOptions,
    max_experts=1,
    needs="items",
    measures="base",
    modifier=True,
)
def aim(parameter: Parameter, out: Tensor) -> None:
    """Compute θ0 + c (1 − (1 − ω) a / max a) (θ − θ0), where a is the base's mean |input|; see `MergeFunction`.

    a has one entry for each input of a linear layer, or each channel of a norm. Everything else (embeddings, biases,
    weights tied to the embeddings) is changed in full.
    """
    weight, base, model = parameter.coefficients[0], parameter.ancestor, parameter.models[0]
    found = parameter.facts.measured(-1, "activation") if weight != 0.0 else {}
    if "activation" not in found:
        weighted_sum(out, [base, model], [1.0 - weight, weight])
        return
    work = work_dtype(out, base, model)
    left = _left(found, base.dim(), parameter.options.omega).to(work)
    start = base.to(work)
    out.copy_(start + (model.to(work) - start) * left * weight)


def _left(found: Numbers, dims: int, omega: float) -> Tensor:
    """The share of a change that is left, to be multiplied with a tensor of so many dimensions."""
    activation = found["activation"].double()
    highest = activation.max() if activation.numel() else activation.new_ones(())
    left = 1.0 - (1.0 - omega) * activation / highest if float(highest) > 0.0 else torch.ones_like(activation)
    return left[:, None] if dims == 2 and int(found["axis"]) == 0 else left
