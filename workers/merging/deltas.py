"""What the operators on sparsified task vectors have in common: what is kept of each, how it is rescaled, and the merge.

Whatever must be known of a whole tensor (limits of magnitudes, ranks, norms) is a fact: computed once for an expert and
its settings, so that a candidate of a search costs one pass over the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from optimizer.spec import Scalar
from workers.merging.blocks import work_dtype
from workers.merging.kernels import merge_sparse
from workers.merging.kernels.portable import keep_mask
from workers.merging.kernels.terms import Chance, Combine, Limits, RankedChance, Term, Vote
from workers.merging.operator import Numbers, Options, Parameter, Whole, varies
from workers.merging.selection import kth_magnitudes

Norm = Literal["l1", "l2", "linf"]
Rescale = Literal["none", "l1", "l2", "linf"]
RandomRescale = Literal["probability", "none", "l1", "l2", "linf"]
Scope = Literal["tensor", "model"]
Selection = Limits | Chance | RankedChance

SMALLEST_SUM = 1e-8
SMALLEST_NORM = 1e-7  # below it nothing is rescaled, as in mergekit
CHUNK = 1 << 20
_ROW = 4096


def density_option(default: float) -> Any:
    """The option `density`, which may differ between experts."""
    return varies(default, gt=0, le=1, description="Share of each task vector that is kept; 1 keeps everything.")


def epsilon_option() -> Any:
    """The option `epsilon`, which may differ between experts."""
    return varies(
        0.15,
        ge=0,
        le=1,
        description="How far the probability of keeping an entry departs from the density, either way.",
    )


def gamma_option() -> Any:
    """The option `gamma`, which may differ between experts."""
    return varies(0.01, ge=0, lt=1, description="Share of each task vector that is dropped as too large.")


def scale_option() -> Any:
    """The option `scale`."""
    return Field(default=1.0, ge=-10, le=10, description="λ, the factor of the merged task vector.")


def seed_option() -> Any:
    """The option `seed`."""
    return Field(
        default=0,
        ge=0,
        le=2**31 - 1,
        description="Another seed drops other entries; the same one drops the same on every machine.",
    )


def rescale_option() -> Any:
    """The option `rescale` of operators that choose by magnitude."""
    return Field(
        default="none",
        description="Norm of the whole task vector of a tensor that what is kept of it is scaled up to, if any.",
    )


def random_rescale_option() -> Any:
    """The option `rescale` of operators that choose at random."""
    return Field(
        default="probability",
        description=(
            "`probability` divides what is kept by the probability of keeping it, as the papers do; a norm scales it up to "
            "that norm of the tensor's whole task vector (mergekit: `l1`)."
        ),
    )


def normalise_option(default: Combine) -> Any:
    """The option `normalise` of operators that elect a sign."""
    return Field(
        default=default,
        description=(
            "What becomes of the entries with the elected sign: `sum` adds them up, `mean` divides that by their experts' "
            "coefficients, `max` takes the largest."
        ),
    )


class VoteOptions(Options):
    """Options of operators that elect a sign for each entry and sum those that have it."""

    scale: float = scale_option()
    consensus: Vote = Field(
        default="sum",
        description="Elected is the sign of the `sum` of the weighted entries, or the one that more of them have (`count`).",
    )


class SumOptions(Options):
    """Options of operators that sum all entries."""

    scale: float = scale_option()
    normalise: bool = Field(default=False, description="Divide by the sum of the coefficients.")


Select = Callable[[int, torch.dtype], tuple[Selection, float]]
"""From an input's number and the type of the arithmetic to what is kept of its task vector, and the factor of that."""


def elect_and_sum(parameter: Parameter, out: Tensor, select: Select) -> None:
    """Merge with options that are `VoteOptions` with a `normalise` besides; see `MergeFunction`."""
    options = parameter.options
    _merge(parameter, out, select, options.scale, options.consensus, options.normalise)


def sum_up(parameter: Parameter, out: Tensor, select: Select) -> None:
    """Merge with options that are `SumOptions`; see `MergeFunction`.

    Raises:
        InfeasibleCandidate: with ``normalise``, the coefficients sum to almost nothing.
    """
    options = parameter.options
    total = math.fsum(parameter.coefficients) if options.normalise and any(parameter.coefficients) else 1.0
    if abs(total) < SMALLEST_SUM:
        raise InfeasibleCandidate(f"the coefficients sum to {total:g}, so the average is not defined")
    _merge(parameter, out, select, options.scale / total, None, "sum")


def _merge(
    parameter: Parameter, out: Tensor, select: Select, scale: float, vote: Vote | None, combine: Combine
) -> None:
    work = work_dtype(out, parameter.ancestor, *parameter.models)
    used = [number for number, weight in enumerate(parameter.coefficients) if weight != 0.0]
    terms = [_term(parameter, number, select, work) for number in used]
    if not terms or scale == 0.0:
        out.copy_(parameter.ancestor)
    elif len(terms) == 1 and _is_whole(terms[0], scale, combine):
        out.copy_(terms[0].tensor)
    else:
        merge_sparse(out, parameter.ancestor, terms, vote=vote, combine=combine, scale=scale, begin=parameter.begin)


def _term(parameter: Parameter, number: int, select: Select, work: torch.dtype) -> Term:
    selection, factor = select(number, work)
    return Term(parameter.models[number], parameter.coefficients[number], selection, factor)


def _is_whole(term: Term, scale: float, combine: Combine) -> bool:
    """Whether an expert that stands alone is the result, bit for bit."""
    weight = math.copysign(1.0, term.weight) if combine == "mean" else term.weight
    select = term.select
    if isinstance(select, Limits):
        everything = select == Limits()
    elif isinstance(select, Chance):
        everything = select.keep == 1.0
    else:
        everything = (select.lowest, select.step) == (1.0, 0.0)
    return everything and weight * term.factor * scale == 1.0


def by_magnitude(parameter: Parameter, gamma: bool = False) -> Select:
    """Keep the largest entries of each task vector, with ``gamma`` without the very largest.

    Reads the options `density`, `rescale`, `gamma` where asked for, and `scope` where there is one.
    """
    options = parameter.options
    densities, gammas = parameter.values("density"), parameter.values("gamma") if gamma else None
    scope = getattr(options, "scope", "tensor")

    def select(number: int, work: torch.dtype) -> tuple[Selection, float]:
        density, outliers = densities[number], gammas[number] if gammas else 0.0
        if scope == "model":
            limits = _model_limits(parameter, number, density, work)
        else:
            limits = _tensor_limits(parameter, number, density, outliers, work)
        if options.rescale == "probability":
            return limits, 1.0 / density
        settings = {"density": density, "gamma": outliers, "scope": scope}
        return limits, _to_norm(parameter, number, limits, options.rescale, work, settings)

    return select


def at_random(parameter: Parameter) -> Select:
    """Keep every entry with the same probability. Reads the options `density`, `rescale` and `seed`."""
    options, densities = parameter.options, parameter.values("density")

    def select(number: int, work: torch.dtype) -> tuple[Selection, float]:
        chance = Chance(parameter.facts.seed(number, {"seed": options.seed}), densities[number])
        if options.rescale == "probability":
            return chance, 1.0 / chance.probability
        settings = {"chance": chance.keep, "seed": options.seed}
        return chance, _to_norm(parameter, number, chance, options.rescale, work, settings)

    return select


def by_rank(parameter: Parameter) -> Select:
    """Keep entries the more likely the larger they are in their row.

    Reads the options `density`, `epsilon`, `rescale` and `seed`.
    """
    options = parameter.options
    densities, epsilons = parameter.values("density"), parameter.values("epsilon")

    def select(number: int, work: torch.dtype) -> tuple[Selection, float]:
        density, epsilon = densities[number], epsilons[number] if densities[number] < 1.0 else 0.0
        seed = parameter.facts.seed(number, {"seed": options.seed})
        known = _ranks(parameter, number, work)
        ranks, length = known["ranks"], int(known["length"])
        step = 2.0 * epsilon / (length - 1) * 2.0 ** _coarseness(length) if length > 1 else 0.0
        lowest = density - epsilon if length > 1 else density

        def chance(ranks: Tensor) -> RankedChance:
            return RankedChance(seed, lowest, step, ranks, options.rescale == "probability")

        begin = parameter.begin
        kept = chance(ranks[begin : begin + parameter.ancestor.numel()])
        settings = {"density": density, "epsilon": epsilon, "seed": options.seed}
        return kept, _to_norm(parameter, number, chance(ranks), options.rescale, work, settings)

    return select


def _tensor_limits(parameter: Parameter, number: int, density: float, gamma: float, work: torch.dtype) -> Limits:
    if density >= 1.0:
        return Limits()

    def compute(whole: Whole) -> Numbers:
        magnitudes = _delta(whole, work).abs_().view(-1)
        count = magnitudes.numel()
        if not count:
            return {"low": _number(0.0), "high": _number(math.inf)}
        kept = max(1, int(density * count))
        dropped = max(0, count - kept - int(gamma * count))
        low, high = _select(magnitudes, dropped, dropped + kept - 1)
        return {"low": _number(low), "high": _number(high)}

    settings: dict[str, Scalar] = {"density": density, "gamma": gamma, "work": str(work)}
    found = parameter.facts.of_tensor("magnitude_limits", compute, of=[number], settings=settings)
    return Limits(float(found["low"]), float(found["high"]) if gamma else math.inf)


def _select(magnitudes: Tensor, first: int, last: int) -> tuple[float, float]:
    """The numbers that stand at two places in ascending order; reorders ``magnitudes``."""
    if magnitudes.device.type == "cpu":  # numpy selects four times as fast as torch here
        values = magnitudes.numpy()
        values.partition(first)
        rest = values[first:]
        low = float(rest[0])
        rest.partition(last - first)
        return low, float(rest[last - first])
    return float(magnitudes.kthvalue(first + 1).values), float(magnitudes.kthvalue(last + 1).values)


def _model_limits(parameter: Parameter, number: int, density: float, work: torch.dtype) -> Limits:
    if density >= 1.0:
        return Limits()

    def compute(model: Any) -> Numbers:
        def parts() -> Iterator[list[Tensor]]:
            for _, whole in model:
                yield [_delta(whole, work)]

        # The papers' code keeps the entries from the k-th largest on, and one more.
        (limit,) = kth_magnitudes(parts, lambda count: count - min(count - 1, int(density * count)), 1)
        return {"low": _number(limit)}

    settings: dict[str, Scalar] = {"density": density, "work": str(work)}
    found = parameter.facts.of_model("magnitude_limit_of_model", compute, of=[number], settings=settings)
    return Limits(float(found["low"]))


def _coarseness(length: int) -> int:
    """By how many bits ranks in rows of that length are cut so that they fit into 16."""
    return max(0, (length - 1).bit_length() - 16)


def _ranks(parameter: Parameter, number: int, work: torch.dtype) -> Numbers:
    """The rank of every entry's magnitude in its row, from 0, as `RankedChance` wants it, and the rows' length."""

    def compute(whole: Whole) -> Numbers:
        magnitudes = _delta(whole, work).abs_()
        if magnitudes.dim() < 2:
            magnitudes = magnitudes.reshape(1, -1)
        order = magnitudes.argsort(dim=1, stable=True)
        places = torch.arange(order.shape[1], device=order.device) >> _coarseness(order.shape[1])
        places = places.to(torch.int32).to(torch.int16)  # the numbers from 2**15 on become negative
        ranks = torch.empty_like(order, dtype=torch.int16)
        ranks.scatter_(1, order, places.view(1, -1, *[1] * (order.dim() - 2)).expand_as(order))
        return {"ranks": ranks.view(-1), "length": _number(order.shape[1])}

    return parameter.facts.of_tensor("row_ranks", compute, of=[number], settings={"work": str(work)})


def _to_norm(
    parameter: Parameter,
    number: int,
    selection: Selection,
    rescale: RandomRescale,
    work: torch.dtype,
    settings: dict[str, Scalar],
) -> float:
    """The factor that gives what is kept of a whole tensor's task vector the norm of all of it."""
    if rescale in ("none", "probability"):
        return 1.0

    def compute(whole: Whole) -> Numbers:
        delta = _delta(whole, work).view(-1)
        before, after = NormSum(rescale), NormSum(rescale)
        for begin in range(0, delta.numel(), CHUNK):
            part = slice(begin, min(begin + CHUNK, delta.numel()))
            magnitudes = delta[part].double().abs_()
            before.add(magnitudes)
            after.add(magnitudes * keep_mask(selection, delta[part], begin, part))
        if min(before.value, after.value) < SMALLEST_NORM:
            return {"factor": _number(1.0)}
        return {"factor": _number(before.value / after.value)}

    settings = {**settings, "norm": rescale, "work": str(work)}
    return float(parameter.facts.of_tensor("factor_to_norm", compute, of=[number], settings=settings)["factor"])


class NormSum:
    """A norm ("l1", "l2" or "linf") that is summed up from parts, in an order that threads do not change."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._sums: list[float] = []

    def add(self, magnitudes: Tensor) -> None:
        """Add entries' magnitudes, float64, flat."""
        if self._kind == "linf":
            self._sums.append(float(magnitudes.max()))
            return
        terms = magnitudes if self._kind == "l1" else magnitudes.square()
        whole = terms.numel() // _ROW * _ROW
        self._sums += terms[:whole].view(-1, _ROW).sum(dim=1).tolist() + terms[whole:].tolist()

    @property
    def value(self) -> float:
        """The norm of all that was added."""
        if self._kind == "linf":
            return max(self._sums, default=0.0)
        total = math.fsum(self._sums)
        return total if self._kind == "l1" else math.sqrt(total)


def _delta(whole: Whole, work: torch.dtype) -> Tensor:
    """The task vector of the only input, in the type of the arithmetic; a new tensor."""
    base, (model,) = whole
    assert base is not None  # noqa: S101 - all operators here use it
    return model.to(work) - base.to(work)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
