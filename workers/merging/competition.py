"""The competition of PCB-Merging (arXiv 2410.02396): which entries of the experts' task vectors win, and by how much.

Everything is ranked in float64 and in pieces, so that task vectors may be as long as whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.merging.blocks import work_dtype
from workers.merging.operator import Numbers, Whole
from workers.merging.ranks import order_statistics

SMALLEST_SUM = 1e-12

Form = Literal["sum", "normalised", "pairs"]
"""How an expert's entry is compared with the others' at its place."""

Wholes = Callable[[], Iterable[Whole]]
"""Begins a pass through parameters."""

_CHUNK = 1 << 20  # entries


@dataclass(frozen=True)
class Limits:
    """What is known of one expert's competition.

    Attributes:
        low, high: the magnitudes that its entries are clamped to.
        least, best: the scores that weigh 0 and 1.
    """

    low: float
    high: float
    least: float
    best: float

    def weights(self, scores: Tensor) -> Tensor:
        """Return the weights that scores mean; all are 0 where there was nothing to compete for."""
        if self.high <= self.low or self.best <= self.least:
            return torch.zeros_like(scores)
        return (scores.clamp(min=self.least) - self.least).div_(self.best - self.least)


def limits(wholes: Wholes, count: int, *, density: float, outliers: float, form: Form) -> Tensor:
    """Return the limits of ``count`` experts: float64, of shape (experts, 4), with `Limits`' attributes as columns.

    Args:
        wholes: what is ranked together; gone through about five times.
        density: share of the entries that are kept, best scores first.
        outliers: share of the magnitudes that are clamped at either end.
        form: see `Form`.
    """
    size = sum(models[0].numel() for _, models in wholes())
    if size == 0:
        return torch.zeros(count, 4, dtype=torch.float64)

    def magnitudes() -> Iterator[list[Tensor]]:
        return ([delta.abs_() for delta in deltas] for deltas in _pieces(wholes))

    ends = order_statistics(magnitudes, size, [[int(size * outliers), int(size * (1 - outliers) - 1)]] * count)
    low, high = ([end[side] for end in ends] for side in (0, 1))

    def scores() -> Iterator[list[Tensor]]:
        return (_scores(deltas, low, high, form) for deltas in _pieces(wholes))

    least = min(size - 1, int(size * (1 - density)))
    found = order_statistics(scores, size, [[least, size - 1]] * count)
    return torch.tensor([[*end, *bounds] for end, bounds in zip(ends, found, strict=True)], dtype=torch.float64)


def entries(whole: Whole, found: Tensor, form: Form) -> Numbers:
    """Return what is kept of each expert's task vector in one parameter.

    Args:
        whole: the parameter.
        found: answer of `limits`.
        form: see `Form`.

    Returns:
        For the expert of number n ``places_n``, ascending places in the flat parameter, and ``values_n``, the clamped
        entries there times their weights, divided by the sum of all experts' weights.
    """
    known = [Limits(*row) for row in found.tolist()]
    low, high = [one.low for one in known], [one.high for one in known]
    pieces: list[list[tuple[Tensor, Tensor]]] = [[] for _ in known]
    begin = 0
    for deltas in _pieces(lambda: [whole]):
        scores = _scores(deltas, low, high, form)
        weights = [one.weights(score) for one, score in zip(known, scores, strict=True)]
        total = torch.stack(weights).sum(dim=0).clamp_(min=SMALLEST_SUM)
        for own, one, delta, weight in zip(pieces, known, deltas, weights, strict=True):
            places = weight.nonzero().view(-1)
            clamped = delta[places].sign() * delta[places].abs().clamp_(one.low, one.high)
            own.append((places + begin, clamped * weight[places] / total[places]))
        begin += len(total)
    base, models = whole
    work = work_dtype(*models) if base is None else work_dtype(base, *models)
    index = torch.int32 if begin < 2**31 else torch.int64
    nothing = torch.zeros(0, device=models[0].device)
    out: dict[str, Tensor] = {}
    for number, own in enumerate(pieces):
        out[f"places_{number}"] = torch.cat([nothing.to(index), *(places.to(index) for places, _ in own)])
        out[f"values_{number}"] = torch.cat([nothing.to(work), *(values.to(work) for _, values in own)])
    return out


def _pieces(wholes: Wholes) -> Iterator[list[Tensor]]:
    """The experts' task vectors, flat and a piece at a time, in float64."""
    for base, models in wholes():
        assert base is not None  # noqa: S101 - operators that ask this use the base
        start, flat = base.reshape(-1), [tensor.reshape(-1) for tensor in models]
        for begin in range(0, start.numel(), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            yield [tensor[part].double() - start[part].double() for tensor in flat]


def _scores(deltas: list[Tensor], low: Sequence[float], high: Sequence[float], form: Form) -> list[Tensor]:
    sizes = [
        (delta.abs().clamp_(bottom, top) - bottom).div_(top - bottom if top > bottom else 1.0)
        for delta, bottom, top in zip(deltas, low, high, strict=True)
    ]
    vectors = deltas
    if form != "sum":
        vectors = [delta.sign() * size for delta, size in zip(deltas, sizes, strict=True)]
    total = torch.stack(vectors).sum(dim=0)
    scores = []
    for delta, vector, size in zip(deltas, vectors, sizes, strict=True):
        if form == "pairs":
            inter = torch.stack([(vector * other).tanh_() for other in vectors]).sum(dim=0)
        else:
            inter = (delta * total).tanh_()
        scores.append(inter.mul_((len(deltas) * size.square()).exp_()))
    return scores
