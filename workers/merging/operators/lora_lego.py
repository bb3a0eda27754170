"""LoRA-LEGO: the rank-one units of all adapters, clustered; the clusters' centres make the merged adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from scipy.cluster.vq import kmeans, vq
from torch import Tensor

from workers.checkpoints import Factors
from workers.merging.blocks import work_dtype
from workers.merging.low_rank import add_task_vectors, combine, factors_of
from workers.merging.operator import Numbers, Options, Parameter, operator


class LoraLegoOptions(Options):
    """Options of `lora_lego`."""

    rank: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="Number of clusters, the merged adapter's rank; 0: the adapters' mean rank.",
    )
    parameter_reweighting: bool = Field(
        default=True,
        description="Scale each centre to the mean size (largest magnitude) of its units: averaging makes it smaller.",
    )
    output_reweighting: bool = Field(
        default=True,
        description="Scale the product by √(mean rank / clusters): more units give outputs of a higher variance.",
    )
    seed: int = Field(default=0, ge=0, description="Where the clustering starts.")
    starts: int = Field(default=10, ge=1, le=1000, description="Clusterings to choose the best of.")


@operator(
    "lora_lego",
    summary="Clusters the rank-one units of all LoRA adapters and assembles an adapter from the clusters' centres.",
    reference="Zhao et al., Merging LoRAs like playing LEGO, arXiv 2409.16167",
    options=LoraLegoOptions,
    columns="scale",
    high=2.0,
    needs="factors",
)
def lora_lego(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · Σ_k b_k a_k over the centres (a_k, b_k) of the clusters; see `MergeFunction`.

    A unit is a row of A and the column of B that belongs to it, each times the root of its adapter's scale, end to end;
    k-means groups them. An adapter is thus not merged with another's units because they stand at the same place. The
    order of the experts does not matter. The clustering is done once; a candidate costs one product. Parameters for
    which nobody has factors: base + scale · mean of the task vectors.

    Raises:
        InvalidInput: an expert that is no adapter changes what adapters have factors for.
    """
    (scale,) = parameter.coefficients
    base, options = parameter.ancestor, parameter.options
    found = factors_of(parameter)
    if found is None:
        count = len(parameter.models)
        add_task_vectors(parameter, [scale / count] * count, out)
        return
    used = [factors for factors in found if factors.rank]
    known = parameter.facts.of_tensor("lora_lego", lambda _: _assemble(used, options, base), settings=dict(options))
    combine(out, [base], [1.0], [(Factors(known["up"], known["down"], 1.0), scale)])


def _assemble(found: Sequence[Factors], options: LoraLegoOptions, base: Tensor) -> Numbers:
    """B and A of the merged adapter, without a scale."""
    rank = sum(factors.rank for factors in found) / len(found)
    units = _units(found)
    labels = _clusters(units, options.rank or round(rank), options)
    centres = [_centre(units[labels == label], options.parameter_reweighting) for label in np.unique(labels)]
    joined = torch.from_numpy(np.stack(centres)).to(base.device)
    factor = math.sqrt(rank / len(centres)) if options.output_reweighting else 1.0
    height = len(found[0].up)
    work = work_dtype(base, *(part for factors in found for part in (factors.up, factors.down)))
    return {"up": (joined[:, :height].T * factor).to(work), "down": joined[:, height:].to(work)}


def _units(found: Sequence[Factors]) -> np.ndarray:
    """All units as rows of float64 (B's part first), in an order that does not depend on that of the experts."""
    rows = []
    for factors in found:
        root = math.sqrt(abs(factors.scale))
        up = factors.up.double().T * math.copysign(root, factors.scale)
        rows.append(torch.cat([up, factors.down.double() * root], dim=1).cpu())
    units = np.array(torch.cat(rows).numpy(), dtype=np.float64)
    order: np.ndarray = np.lexsort(units.T[::-1])
    return np.take(units, order, axis=0)


def _clusters(units: np.ndarray, count: int, options: LoraLegoOptions) -> np.ndarray:
    """The cluster of each unit."""
    distinct = np.unique(units, axis=0)
    if count >= len(distinct):
        return np.array(vq(units, distinct)[0], dtype=np.intp)
    centres, _ = kmeans(units, count, iter=options.starts, rng=np.random.default_rng(options.seed))
    return np.array(vq(units, centres)[0], dtype=np.intp)


def _centre(members: np.ndarray, reweighted: bool) -> np.ndarray:
    centre: np.ndarray = members.mean(axis=0)
    size = np.abs(centre).max()
    if not reweighted or size == 0.0:
        return centre
    return np.asarray(centre * (np.abs(members).max(axis=1).mean() / size))
