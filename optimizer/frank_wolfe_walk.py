"""The walk of Frank-Wolfe merging: which vertex next, how far, and when it is over."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal
from optimizer.frank_wolfe_domain import Array, Choice, Point, Probe, Table, make_domain, starts
from optimizer.frank_wolfe_space import ChainSpace, collapses
from optimizer.pycma import BoundedStrategy
from optimizer.space import Genome, SearchSpace, Variable
from optimizer.spec import Strict

_FRACTIONS = (1.0, 0.5, 0.25, 0.125)
_PENALTY = 10.0
_ATTEMPTS = 4
_PUBLISHED = {"task_arithmetic": 0.3}
_FIRST_SHARE, _LATER_SHARE = 0.3, 0.05
_SIGMA = 0.2
_FINER = 3
_TRIES = 8
_GROWTH = 4.0


class Settings(Strict):
    """Options of Frank-Wolfe merging."""

    variant: Literal["hard", "soft"] = Field(
        default="hard",
        description=(
            "`hard` takes a step towards the one vertex that lowers the weighted sum of the objectives most; with `soft` "
            "each objective picks a vertex of its own, and how much of each is merged is learned."
        ),
    )
    oracle: Literal["auto", "exact", "differences", "spsa"] = Field(
        default="auto",
        description=(
            "Where derivatives come from: `exact` from a backward pass of the workers; `differences` from one evaluation "
            "near the iterate for each vertex; `spsa` from a few pairs of random perturbations, however many experts there "
            "are. `auto` is exact where every objective has gradients."
        ),
    )
    granularity: Literal["auto", "layers", "model"] = Field(
        default="auto",
        description=(
            "Whether each coefficient group of the job picks a vertex of its own (`layers`), or the whole model one. `auto` "
            "picks one for the whole model where derivatives are measured by differences, which cost an evaluation each."
        ),
    )
    form: Literal["formula", "cosine"] = Field(
        default="formula",
        description=(
            "What the exact oracle compares vertices by: the inner product of the gradient with where they lie, as the "
            "paper says, or the sum of its cosines with their weights, tensor by tensor, as the authors' code does."
        ),
    )
    step: Literal["line_search", "harmonic"] = Field(
        default="line_search",
        description=(
            "How far: the best of four steps, each half of the one before, which must lower the loss; or "
            "2/(t + 2), without looking."
        ),
    )
    step_size: float = Field(default=1.0, gt=0, le=1, description="Factor of the steps.")
    scale: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Factor of harmonic steps by the merge function; by default 0.3 for task_arithmetic, else 1.",
    )
    away: Literal["none", "away", "pairwise"] = Field(
        default="none",
        description=(
            "For weighted sums: also step `away` from a bad vertex that the iterate contains, where that promises more, or "
            "always move weight from the worst to the best (`pairwise`)."
        ),
    )
    start: Literal["best", "merge", "base"] = Field(
        default="best",
        description=(
            "Where to begin: at the best candidate known, the merge of all experts (0.3 of each task vector, or the "
            "operator's uniform merge), or the base."
        ),
    )
    base_vertex: bool = Field(default=True, description="Whether the base is among the vertices, beside the experts.")
    h: float = Field(
        default=0.1,
        gt=0,
        le=0.5,
        description="Distance of probes, as a fraction of the way to a vertex, or of a range.",
    )
    central: bool = Field(
        default=False, description="Probe on both sides where the bounds allow it, at twice the evaluations."
    )
    pairs: int = Field(default=4, ge=1, le=1000, description="Pairs of perturbations that `spsa` averages over.")
    probe_items: int | None = Field(
        default=None, ge=1, description="Measure probes on so many items of each objective only, the same for all."
    )
    inner: int = Field(
        default=10, ge=1, le=10_000, description="With `soft`, evaluations that learn the coefficients in an iteration."
    )
    iterations: int | None = Field(
        default=None, ge=1, le=100_000, description="Most iterations; as many as the budget allows by default."
    )
    tolerance: float = Field(
        default=0.0,
        ge=0,
        description=(
            "Stop when the Frank-Wolfe gap, which bounds how far a convex loss is above its minimum over the merges within "
            "reach, is no larger."
        ),
    )


@dataclass(frozen=True)
class Here:
    """A point that was evaluated.

    Attributes:
        place: its number among those evaluated together.
        index: the candidate's.
        losses: shape (objectives,), violations of constraints added.
        value: their weighted sum.
        towards: derivatives, shape (objectives, parts or 1, vertices); None where not known yet.
        scores: what vertices are compared by, of the same shape.
        probed: whether derivatives were measured by probes.
    """

    point: Point
    place: int
    index: int
    losses: Array
    value: float
    towards: Array | None = None
    scores: Array | None = None
    probed: bool = False


Asking = Generator[list[Proposal], list[Outcome], "Here | None"]


class Walk:
    """A Frank-Wolfe walk as a generator of batches: it yields proposals and is sent their outcomes, in their order.

    Args:
        context: of the algorithm.
        settings: its options.
        random: its generator.
    """

    def __init__(self, context: AlgorithmContext, settings: Settings, random: np.random.Generator) -> None:
        self._context = context
        self._settings = settings
        self._random = random
        self._domain = make_domain(context.space, with_base=settings.base_vertex)
        self._exact = _wants_slopes(context, settings)
        self._together = settings.granularity == "model" and not self._domain.box
        self._trust: dict[str, float] = {}
        self._finer = 0
        self._number = 0
        self._parents: tuple[int, ...] = ()

    def run(self, known: Sequence[Outcome]) -> Generator[list[Proposal], list[Outcome], str]:
        """Walk until it is over, and return why; in a box it begins again elsewhere, and never is.

        Args:
            known: outcomes of others.
        """
        genomes = self._starts(known)
        while True:
            here: Here | None = None
            for genome in genomes:
                here = yield from self._measure([self._domain.begin(genome)], ["start"])
                if here is not None:
                    break
            reason = "no model could be evaluated to begin with"
            if here is not None:
                reason = yield from self._descend(here)
            if not self._domain.box:
                return reason
            space = self._context.space
            genomes = [space.low + self._random.random(space.dim) * (space.high - space.low)]
            self._trust, self._finer, self._parents = {}, 0, ()

    def _starts(self, known: Sequence[Outcome]) -> list[Genome]:
        genomes = starts(self._context.space, self._context.start, self._settings.start)
        usable = [(value, -number) for number, o in enumerate(known) if (value := self._value(o)) is not None]
        if self._settings.start == "best" and usable:
            genomes.insert(0, self._context.space.clip(known[-min(usable)[1]].genome))
        return genomes

    def _descend(self, here: Here) -> Generator[list[Proposal], list[Outcome], str]:
        limit = self._settings.iterations
        for number in count(1) if limit is None else range(1, limit + 1):
            assert here.towards is not None  # noqa: S101 - `_measure` saw to it
            gap = self._gap(here.towards)
            self._number += 1
            self._parents = (here.index,)
            found: Here | None = None
            if gap > self._settings.tolerance:
                step = self._soft if self._settings.variant == "soft" else self._hard
                found = yield from step(here, number, f"iterate {number}, gap {gap:.3g}")
            if found is None and here.probed and self._finer < _FINER:
                self._finer += 1
                self._trust = {}
                found = yield from self._probed(here)
            if found is None:
                why = (
                    "no vertex promises more" if gap <= self._settings.tolerance else "no step lowers the loss further"
                )
                return f"the Frank-Wolfe gap is {gap:.3g}, and {why}"
            here = found
        return f"all {limit} iterations are done"

    @property
    def h(self) -> float:
        """Distance of probes: halved where those at the last one promised nothing, or nothing that held."""
        return float(self._settings.h * 0.5**self._finer)

    def _gap(self, towards: Array) -> float:
        """max_v ⟨∇, θ − v⟩, every part with a vertex of its own where it may choose one."""
        total = self._summed(towards)
        best = np.min(np.where(np.isfinite(total), total, 0.0), axis=1)
        return float(np.maximum(-best, 0.0).sum())

    def _summed(self, found: Array) -> Array:
        """The weighted sum over objectives, and over all parts where these move together."""
        total = np.tensordot(self._context.weights, found, axes=1)
        return np.asarray(total.sum(axis=0, keepdims=True) if self._together else total)

    # --- hard: one vertex ---------------------------------------------------------------------------------------------

    def _hard(self, here: Here, number: int, label: str) -> Asking:
        if self._settings.step == "harmonic":
            return (yield from self._harmonic(here, self._move(here), number, label))
        for _ in range(_TRIES):
            move = self._move(here)
            reach = min(self._settings.step_size, _GROWTH * max(self._trust.get(name, 1.0) for name in move.names))
            steps = [reach * fraction for fraction in _FRACTIONS]
            points = [self._domain.mix(here.point, move.choice, move.weights(step)) for step in steps]
            found = yield from self._measure(points, [f"{label}, step {step:.3g}" for step in steps], here.value)
            if found is not None:
                self._trust |= dict.fromkeys(move.names, steps[found.place])
                return found
            self._trust |= dict.fromkeys(move.names, steps[-1] / 2 / _GROWTH)
        return None

    def _harmonic(self, here: Here, move: _Move, number: int, label: str) -> Asking:
        step = min(1.0, self._scale() * self._settings.step_size * 2 / (number + 1))
        for _ in range(_ATTEMPTS):
            found = yield from self._measure([self._domain.mix(here.point, move.choice, move.weights(step))], [label])
            if found is not None:
                return found
            step /= 4
        return None

    def _scale(self) -> float:
        space = self._context.space
        if self._settings.scale is not None:
            return self._settings.scale
        return 1.0 if self._domain.box else _PUBLISHED.get(_operator(space), 1.0)

    def _move(self, here: Here) -> _Move:
        """Where to step: part by part to the vertex that promises most, by derivative and by how far one got towards it."""
        assert here.scores is not None  # noqa: S101 - `_measure` saw to it
        parts, labels = self._domain.parts, self._domain.labels
        scores = np.broadcast_to(self._summed(here.scores), (parts, len(labels)))
        trusted = scores
        if not self._domain.box and self._settings.step == "line_search":
            trusted = np.where(scores < 0, scores * [self._trust.get(name, 1.0) for name in labels], scores)
        rows = np.arange(parts)
        best = trusted.argmin(axis=1)
        names = self._names(best, scores[rows, best])
        signs = np.isfinite(scores[rows, best]).astype(float)
        active = here.point.active
        if self._settings.away == "none" or active is None:
            return _Move(best[None], signs[None], np.ones(parts), names)
        worst = np.where((active > 1e-12) & np.isfinite(scores), scores, -np.inf).argmax(axis=1)
        share = active[rows, worst]
        if self._settings.away == "pairwise":
            return _Move(np.array([best, worst]), np.array([signs, -signs]), share, names)
        leaves = (scores[rows, worst] > -scores[rows, best]) & (share < 1) & np.isfinite(scores[rows, worst])
        limit = np.where(leaves, share / np.maximum(1 - share, 1e-12), 1.0)
        return _Move(np.where(leaves, worst, best)[None], np.where(leaves, -1.0, signs)[None], limit, names)

    def _names(self, best: Choice, scores: Array) -> tuple[str, ...]:
        """The vertices that a step mostly leads to, by what they promise together in all parts."""
        if self._domain.box:
            return ("",)
        promise = np.bincount(best, np.maximum(-np.where(np.isfinite(scores), scores, 0.0), 0.0))
        return tuple(self._domain.labels[number] for number in np.flatnonzero(promise >= promise.max() / 2))

    # --- soft: a vertex for each objective, and learned weights ----------------------------------------------------

    def _soft(self, here: Here, number: int, label: str) -> Asking:
        choice = self._distinct(here)
        share = min(_FIRST_SHARE if number == 1 else _LATER_SHARE, 0.9 / len(choice))
        learn = self._by_slopes if self._exact else self._by_search
        found = yield from learn(here, choice, share, label)
        if found is not None and found.value < here.value:
            return found
        return (yield from self._hard(here, number, label))

    def _distinct(self, here: Here) -> Choice:
        """A vertex for each objective, in their order, none twice in a part; shape (K, parts)."""
        assert here.scores is not None  # noqa: S101 - `_measure` saw to it
        scores = here.scores.sum(axis=1, keepdims=True) if self._together else here.scores
        parts, vertices = self._domain.parts, len(self._domain.labels)
        scores = np.broadcast_to(scores, (len(scores), parts, vertices)).copy()
        rows = np.arange(parts)
        out = []
        for number in range(min(len(scores), vertices)):
            out.append(scores[number].argmin(axis=1))
            scores[:, rows, out[-1]] = np.inf
        return np.array(out)

    def _by_slopes(self, here: Here, choice: Choice, share: float, label: str) -> Asking:
        """Exponentiated gradient on the simplex of the iterate and its vertices, part by part.

        A step that raises the loss is undone and halved.
        """
        weights = np.full((len(choice) + 1, self._domain.parts), share)
        weights[0] = 1 - share * len(choice)
        best: Here | None = None
        kept, rates, eta = weights, np.zeros_like(weights), 1.0
        for number in range(self._settings.inner):
            point = self._domain.mix(here.point, choice, weights[1:])
            found = yield from self._measure([point], [f"{label}, learning {number + 1}"])
            if found is not None and (best is None or found.value <= best.value):
                best, kept, rates = found, weights, self._rates(found, choice, weights)
            else:
                eta /= 2
            if best is None:
                weights = np.vstack([1 - weights[1:].sum(axis=0) / 2, weights[1:] / 2])
            elif not rates.any():
                break
            else:
                grown = kept * np.exp(-eta * rates)
                weights = grown / grown.sum(axis=0)
        return best

    def _rates(self, found: Here, choice: Choice, weights: Array) -> Array:
        """Derivatives by the weights of the iterate (first) and the vertices, the largest of size 1."""
        assert found.towards is not None  # noqa: S101 - `_measure` saw to it
        total = np.broadcast_to(self._summed(found.towards), (self._domain.parts, len(self._domain.labels)))
        rows = np.arange(self._domain.parts)
        rates = np.array([total[rows, vertices] for vertices in choice])
        rates = np.where(np.isfinite(rates), rates, 0.0)
        # Weighted by themselves derivatives sum to nothing: the model is where it is.
        rates = np.vstack([-(weights[1:] * rates).sum(axis=0) / np.maximum(weights[0], 1e-9), rates])
        largest = np.abs(rates).max()
        return np.asarray(rates / largest if largest > 0 else rates)

    def _by_search(self, here: Here, choice: Choice, share: float, label: str) -> Asking:
        """CMA-ES on one weight for each vertex; what exceeds 1 in sum is scaled down."""
        variables = [Variable(f"weight {number}", 0.0, 1.0) for number in range(len(choice))]
        size = min(4 + int(3 * np.log(len(choice))), self._settings.inner)
        strategy = BoundedStrategy(variables, np.full(len(choice), share), _SIGMA, max(size, 2), self._random)
        best: Here | None = None
        for _ in range(max(1, self._settings.inner // max(size, 2))):
            vectors = strategy.ask()
            amounts = [np.repeat(v[:, None] / max(1.0, v.sum()), self._domain.parts, axis=1) for v in vectors]
            points = [self._domain.mix(here.point, choice, weights) for weights in amounts]
            found = yield from self._evaluate(points, [f"{label}, learning"] * len(points))
            values = [one.value for one in found if one is not None]
            worst = max(values, default=0.0) + 1.0
            strategy.tell(vectors, [worst if one is None else one.value for one in found])
            for one in found:
                if one is not None and (best is None or one.value < best.value):
                    best = one
        if best is None or best.value >= here.value:
            return None
        return (yield from self._probed(best))

    # --- evaluations --------------------------------------------------------------------------------------------------

    def _measure(self, points: list[Point], labels: list[str], below: float = np.inf) -> Asking:
        """Evaluate points and return the best with its derivatives; None where none has a loss ``below`` that."""
        plan = None if self._exact or len(points) > 1 else self._plan(points[0])
        proposals = [self._proposal(point, label) for point, label in zip(points, labels, strict=True)]
        outcomes = yield [*proposals, *(plan.proposals if plan else [])]
        found = [one for one in self._read(points, outcomes[: len(points)]) if one is not None]
        best = min(found, key=lambda one: one.value, default=None)
        if best is None or not best.value < below:
            return None
        if plan is not None:
            return plan.finish(best, outcomes[len(points) :])
        if best.towards is not None:
            return best
        return (yield from self._probed(best))

    def _evaluate(
        self, points: list[Point], labels: list[str]
    ) -> Generator[list[Proposal], list[Outcome], list[Here | None]]:
        outcomes = yield [self._proposal(point, label) for point, label in zip(points, labels, strict=True)]
        return self._read(points, outcomes)

    def _probed(self, here: Here) -> Asking:
        """Measure the derivatives at a point without gradients."""
        plan = self._plan(here.point)
        outcomes = (yield plan.proposals) if plan.proposals else []
        return plan.finish(here, outcomes)

    def _proposal(self, point: Point, label: str) -> Proposal:
        return Proposal(point.genome, self._number, self._parents, label, slopes=self._exact)

    def _plan(self, point: Point) -> _Plan:
        if self._settings.oracle == "spsa" and isinstance(self._domain, Table):
            return _Perturbations(self, self._domain, point)
        return _Differences(self, point)

    def _read(self, points: Sequence[Point], outcomes: Sequence[Outcome]) -> list[Here | None]:
        out: list[Here | None] = []
        for place, (point, outcome) in enumerate(zip(points, outcomes, strict=True)):
            losses = _losses(outcome)
            if losses is None:
                out.append(None)
                continue
            there = self._domain.recorded(point, outcome.genome)
            value = float(self._context.weights @ losses)
            found = Here(there, place, outcome.index, losses, value)
            slopes = outcome.slopes
            towards = self._domain.derivatives(there, slopes) if self._exact and slopes is not None else None
            if towards is not None and slopes is not None:
                cosine = self._settings.form == "cosine"
                found = replace(found, towards=towards, scores=self._domain.cosines(slopes) if cosine else towards)
            out.append(found)
        return out

    def _value(self, outcome: Outcome) -> float | None:
        losses = None if outcome.items is not None else _losses(outcome)
        return None if losses is None else float(self._context.weights @ losses)


@dataclass(frozen=True)
class _Move:
    """Towards which vertices, and away from which, part by part.

    Attributes:
        choice: shape (K, parts).
        signs: of the same shape: 1 towards, -1 away, 0 not at all.
        limit: shape (parts,): the longest step.
        names: the vertices that it mostly leads to.
    """

    choice: NDArray[np.int64]
    signs: Array
    limit: Array
    names: tuple[str, ...]

    def weights(self, step: float) -> Array:
        return np.asarray(self.signs * np.minimum(step, self.limit))


class _Plan:
    """Evaluations that measure derivatives at a point.

    Attributes:
        proposals: what is to be evaluated.
    """

    proposals: list[Proposal]

    def __init__(self, walk: Walk) -> None:
        self._items = walk._settings.probe_items
        self._generation, self._parents = walk._number, walk._parents
        self.proposals = []

    def finish(self, here: Here, outcomes: Sequence[Outcome]) -> Here:
        """Return the point with its derivatives."""
        raise NotImplementedError

    def _propose(self, genome: Genome, label: str) -> None:
        self.proposals.append(Proposal(genome, self._generation, self._parents, label, items=self._items))


class _Differences(_Plan):
    """One probe towards each vertex, or two."""

    def __init__(self, walk: Walk, point: Point) -> None:
        super().__init__(walk)
        self._domain = walk._domain
        self._together = walk._settings.granularity != "layers" and not self._domain.box
        probes = self._domain.probes(point, walk.h, walk._settings.central, self._together)
        if self._domain.box:  # so that what a budget cuts off is not always the same
            probes = [probes[number] for number in walk._random.permutation(len(probes))]
        self._probes: list[Probe] = probes
        if self._items is not None:  # differences are between the same items
            self._propose(point.genome, "the iterate on the probes' items")
        for probe in probes:
            self._propose(probe.genome, probe.label)

    def finish(self, here: Here, outcomes: Sequence[Outcome]) -> Here:
        reference: Array | None = here.losses
        if self._items is not None:
            reference, outcomes = _losses(outcomes[0]), outcomes[1:]
        changes: list[Array | None] = []
        for probe, outcome in zip(self._probes, outcomes, strict=True):
            losses = _losses(outcome)
            known = losses is not None and reference is not None
            changes.append((losses - reference) / probe.step if known else None)  # type: ignore[operator]
        towards = self._domain.measured(here.point, self._probes, changes, self._together)
        if len(towards) != len(here.losses):  # nothing was measured at all
            towards = np.repeat(towards, len(here.losses), axis=0)
        return replace(here, towards=towards, scores=towards, probed=True)


class _Perturbations(_Plan):
    """Pairs of points on both sides, all coefficients moved at once at random (Spall 1992)."""

    def __init__(self, walk: Walk, domain: Table, point: Point) -> None:
        super().__init__(walk)
        self._domain = domain
        self._between: list[Array] = []
        self._shared = domain.parts if walk._together else 1
        shape = (1, domain.shape[1]) if walk._together else domain.shape
        for _ in range(walk._settings.pairs):
            signs = np.broadcast_to(walk._random.choice([-1.0, 1.0], shape), domain.shape)
            up, down, between = domain.perturbed(point, walk.h * signs)
            self._between.append(between)
            self._propose(up, "perturbation")
            self._propose(down, "perturbation")

    def finish(self, here: Here, outcomes: Sequence[Outcome]) -> Here:
        found = []
        for between, up, down in zip(self._between, outcomes[::2], outcomes[1::2], strict=True):
            high, low = _losses(up), _losses(down)
            if high is not None and low is not None:
                inverse = np.divide(1.0, between, out=np.zeros_like(between), where=between != 0)
                found.append((high - low)[:, None, None] * inverse / self._shared)
        shape = (len(here.losses), *self._domain.shape)
        gradient = np.mean(found, axis=0) if found else np.full(shape, np.nan)
        towards = self._domain.from_gradient(here.point, gradient)
        return replace(here, towards=towards, scores=towards, probed=True)


def _losses(outcome: Outcome) -> Array | None:
    """The losses, with violations of constraints added to each tenfold; None where there are none."""
    if outcome.losses is None or not np.isfinite(outcome.losses).all():
        return None
    return np.asarray(outcome.losses + _PENALTY * max(0.0, outcome.violation))


def _wants_slopes(context: AlgorithmContext, settings: Settings) -> bool:
    space = context.space
    modified = collapses(space) and bool(getattr(space, "modifiers", ()))
    able = context.differentiable and not modified and (collapses(space) or isinstance(space, ChainSpace))
    return able and settings.oracle in ("auto", "exact")


def _operator(space: SearchSpace) -> str:
    problem = getattr(space, "problem", None)
    return str(problem.operator.name) if problem is not None else ""
