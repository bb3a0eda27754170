"""Arcee Fusion: take from an expert only the changes that matter most."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softmax

from workers.merging.blocks import work_dtype
from workers.merging.merged_vectors import add_merged_vector
from workers.merging.operator import Options, Parameter, Whole, operator

EPS = 1e-8
QUARTILES = (0.25, 0.5, 0.75)


class ArceeFusionOptions(Options):
    """Options of `arcee_fusion`."""

    sample: int = Field(
        default=1_000_000,
        ge=0,
        le=1_000_000_000,
        description=(
            "Number of entries that the quartiles of larger tensors are estimated from, drawn the same each time; 0 takes "
            "all of them."
        ),
    )


@operator(
    "arcee_fusion",
    summary="Takes over from the expert the entries whose change is far more important than that of most others.",
    reference="Arcee AI's fusion merge; as in mergekit",
    options=ArceeFusionOptions,
    columns="scale",
    high=2.0,
    max_experts=1,
    elementwise=True,
    modifier=True,
)
def arcee_fusion(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · τ where importance ≥ median + 1.5 (upper − lower quartile); see `MergeFunction`.

    The importance of an entry is |τ| · KL(softmax of the expert's row ‖ softmax of the base's row). Divergences of
    similar rows vanish in float32, so they are computed in float64. Scale 1 is mergekit's method. Rows run along the
    last dimension; a row of one entry, and so a number, has importance 0 and is taken over. The masked task vector is
    a fact of the models; samples are drawn from a seed that depends on the expert's content.
    """
    sample = parameter.options.sample

    def compute(whole: Whole) -> Tensor:
        return _important(whole, sample, parameter.facts.seed(0))

    add_merged_vector(parameter, out, "arcee_fusion", compute, {"sample": sample})


def _important(whole: Whole, sample: int, seed: int) -> Tensor:
    base, (expert,) = whole
    assert base is not None  # noqa: S101 - it says it uses the base
    work = work_dtype(base, expert)
    delta = expert.to(work) - base.to(work)
    if delta.numel() == 0:
        return delta
    importance = _divergence(expert, base) * delta.abs()
    lower, median, upper = _quartiles(importance.view(-1), sample, seed)
    return delta.mul_(importance >= median + 1.5 * (upper - lower))


def _divergence(expert: Tensor, base: Tensor) -> Tensor:
    """Kullback-Leibler divergence between rows as distributions: float64, of shape (…, 1)."""
    ours = softmax(expert.double(), dim=-1) + EPS
    theirs = softmax(base.double(), dim=-1) + EPS
    terms = ours * torch.log(ours / theirs)
    if terms.dim() == 0:
        return terms
    rows = terms.reshape(-1, terms.shape[-1])
    # A sum to a single number would depend on the number of threads, so there are always two.
    sums = torch.cat([rows, rows[:1]]).sum(dim=1)[:-1]
    return sums.view(*terms.shape[:-1], 1)


def _quartiles(values: Tensor, sample: int, seed: int) -> list[float]:
    if 0 < sample < values.numel():
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        values = values[torch.randint(values.numel(), (sample,), generator=generator).to(values.device)]
    places = [int(share * (values.numel() - 1)) for share in QUARTILES]
    found: list[float] = values.sort().values[places].tolist()
    return found
