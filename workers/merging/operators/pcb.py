"""PCB-Merging: experts compete for every entry, within their own task vector and with each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from optimizer.geometry import TensorInfo
from workers.merging import blocks
from workers.merging.competition import Form, Wholes, entries, limits
from workers.merging.operator import Numbers, Options, Parameter, Whole, operator, varies


class PcbOptions(Options):
    """Options of `pcb`."""

    density: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Share of each task vector that is kept, best scores first; usually 0.05 to 0.1.",
    )
    inter: Form = Field(
        default="sum",
        description=(
            "How experts are compared, in the three forms of the authors' code: tanh(τ_i · Σ τ_j) (`sum`, the outline of "
            "the method), tanh(τ_i · Σ normalised τ_j) (`normalised`), Σ tanh(normalised τ_i · normalised τ_j) (`pairs`)."
        ),
    )
    outliers: float = Field(
        default=0.0001,
        ge=0,
        le=0.25,
        description="Share of the magnitudes that are clamped at either end; the authors' experiments take 0.01.",
    )
    factor: float = varies(
        default=1.0,
        ge=-10,
        le=10,
        description="λ_i, a factor of an expert's own beside the scale; the authors search 0.8 to 1.3.",
    )
    scope: Literal["model", "tensor"] = Field(
        default="model",
        description="Whether magnitudes and scores are ranked over all weights, as the authors do, or per tensor.",
    )


@operator(
    "pcb",
    summary="Keeps of each task vector the entries that win a competition within and between experts, and averages them.",
    reference="Du et al., Parameter competition balancing for model merging, arXiv 2410.02396",
    options=PcbOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
)
def pcb(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ λ_i s_i τ_i / Σ s_i; see `MergeFunction`.

    s_i is the score exp(N m_i²) · tanh(…), m_i the magnitude normalised to 0 … 1, of the entries that are kept, less the
    least one and normalised to 0 … 1; 0 for the others. The authors' scale is 1.2. Magnitudes and scores are ranked over
    the whole model in bounded memory. What is left of each task vector is a fact of the models, kept as places and
    values, so a candidate costs one pass over the base and the kept entries. An expert whose magnitudes or scores are
    all equal (the base itself, or a single weight) counts nothing, where the authors' code divides by 0.
    """
    (scale,) = parameter.coefficients
    factors = [scale * factor for factor in parameter.values("factor")]
    if scale == 0.0 or not any(factors):
        out.copy_(parameter.ancestor)
        return
    form: Form = parameter.options.inter
    found = _limits(parameter)

    def compute(whole: Whole) -> Numbers:
        return entries(whole, found, form)

    settings = {"inter": form, "limits": found.flatten().tolist()}
    _add(parameter, out, parameter.facts.of_tensor("pcb_entries", compute, settings=settings), factors)


def _limits(parameter: Parameter) -> Tensor:
    options: PcbOptions = parameter.options

    def compute(wholes: Wholes) -> Numbers:
        count = len(parameter.models)
        return {"limits": limits(wholes, count, density=options.density, outliers=options.outliers, form=options.inter)}

    def of_model(model: Iterable[tuple[TensorInfo, Whole]]) -> Numbers:
        return compute(lambda: (whole for _, whole in model))

    settings = options.model_dump(include={"density", "inter", "outliers"})
    if options.scope == "model":
        return parameter.facts.of_model("pcb_limits", of_model, settings=settings)["limits"]
    return parameter.facts.of_tensor("pcb_limits", lambda whole: compute(lambda: [whole]), settings=settings)["limits"]


def _add(parameter: Parameter, out: Tensor, kept: Numbers, factors: Sequence[float]) -> None:
    """Write base + Σ factor · entries."""
    base, target = parameter.ancestor.reshape(-1), out.view(-1)
    work = blocks.work_dtype(out, base, kept["values_0"])
    size = blocks.BLOCK if out.device.type == "cpu" else blocks.BLOCK_GPU
    for begin in range(0, target.numel(), size):
        result = base[begin : begin + size].to(work, copy=True)
        first = parameter.begin + begin
        for number, factor in enumerate(factors):
            places = kept[f"places_{number}"]
            edges = torch.tensor([first, first + len(result)], dtype=places.dtype, device=places.device)
            part = slice(*torch.searchsorted(places, edges).tolist())
            values = kept[f"values_{number}"][part].to(work)
            result.index_add_(0, places[part] - first, values, alpha=factor)
        target[begin : begin + size].copy_(result)
