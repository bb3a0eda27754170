"""Decom-Renorm-Merge: elects signs and averages in a space that all task vectors share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.operator import Numbers, Options, Parameter, Whole, operator
from workers.merging.spectral import add_prepared, is_matrix, one_thread, svd, task_vectors

SMALLEST_VALUE = 1e-2
"""Joint directions with a singular value up to this share of the largest are left out, as in the authors' code."""


class DrmOptions(Options):
    """Options of `drm`."""

    direction: Literal["horizontal", "vertical"] = Field(
        default="horizontal",
        description="Whether the task vectors share left singular vectors (DRM-H) or right ones (DRM-V).",
    )
    density: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of the entries of all tasks' renormalised singular vectors that are kept, largest first.",
    )


@operator(
    "drm",
    summary="Maps all task vectors into one singular space, renormalises, prunes, elects signs and averages there.",
    reference="Chaichana et al., Decom-Renorm-Merge, arXiv 2505.23117; as in yophis/decom-renorm-merge",
    options=DrmOptions,
    columns="scale",
    high=2.0,
    elementwise=True,
    idempotent=False,
)
def drm(parameter: Parameter, out: Tensor) -> None:
    """Compute base + scale · U · M, where U Σ [V_1ᵀ … V_Nᵀ] = [τ_1 … τ_N]; see `MergeFunction`.

    The rows of every V_iᵀ are brought to length 1 (their lengths go to Σ), the smallest entries of all V_i together
    become 0, the results are multiplied by Σ again, and M is the mean, entry by entry, of those that agree with the
    sign of their sum. DRM-V stands the task vectors on top of each other and swaps the roles of U and V. Where the sum
    is exactly 0 there is no sign and the entry is 0 (in the authors' code it depends on the signs of U). Embedding
    tables, output layers and tensors other than matrices are merged the same way without any such space or pruning.
    """
    (scale,) = parameter.coefficients
    options: DrmOptions = parameter.options
    if scale == 0.0 or out.numel() == 0:
        out.copy_(parameter.ancestor)
        return
    if is_matrix(parameter.info, embeddings=False) and parameter.info.kind != "head":
        found = parameter.facts.of_tensor(
            "drm",
            lambda whole: _joint(whole, options),
            settings={"direction": options.direction, "density": options.density},
        )
    else:
        found = parameter.facts.of_tensor("drm_plain", _plain)
    add_prepared(parameter, [found["delta"]], [scale], out)


def _joint(whole: Whole, options: DrmOptions) -> Numbers:
    with one_thread():
        deltas = list(task_vectors(whole))
        if options.direction == "horizontal":
            return {"delta": _horizontal(deltas, options.density)}
        return {"delta": _horizontal([delta.T for delta in deltas], options.density).T.contiguous()}


def _plain(whole: Whole) -> Numbers:
    with one_thread():
        deltas = torch.stack(list(task_vectors(whole)))
        signs = deltas.sum(dim=0).sign()
        # Opposite entries that cancel exactly follow the majority of the tensor, as in the authors' code.
        signs = torch.where(signs == 0.0, signs.sum().sign(), signs)
        return {"delta": _disjoint_mean(deltas, signs)}


def _horizontal(deltas: Sequence[Tensor], density: float) -> Tensor:
    joint = svd(torch.cat(list(deltas), dim=1))
    joint = joint.leading(int((joint.values > SMALLEST_VALUE * joint.values[:1]).sum()))
    if not len(joint.values):
        return torch.zeros_like(deltas[0])
    tasks = torch.stack(joint.right.chunk(len(deltas), dim=1))
    lengths = torch.linalg.vector_norm(tasks, dim=2, keepdim=True)
    tasks /= torch.where(lengths == 0.0, 1.0, lengths)
    _prune(tasks, density)
    tasks *= lengths * joint.values[:, None]
    return joint.left @ _disjoint_mean(tasks, tasks.sum(dim=0).sign())


def _prune(tasks: Tensor, density: float) -> None:
    dropped = tasks.numel() - round(tasks.numel() * density)
    if dropped:  # the authors keep the largest of those to be dropped too
        size = tasks.abs()
        tasks.masked_fill_(size < size.view(-1).kthvalue(dropped).values, 0.0)


def _disjoint_mean(tensors: Tensor, signs: Tensor) -> Tensor:
    agreeing = torch.where(tensors.sign() == signs, tensors, 0.0)
    return agreeing.sum(dim=0) / agreeing.count_nonzero(dim=0).clamp(min=1)
