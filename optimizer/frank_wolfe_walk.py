"""The walk of Frank-Wolfe merging: which vertex next, how far, and when it is over.

Defaults were measured on digits experts with 16 and 64 strangers that learned shuffled labels
(tests/benchmarks/search/frank_wolfe.py), as the mean loss on the search items after 60 evaluations, with the test accuracy:

- Exact slopes alone lead astray: the way to a stranger is long, steep and soon goes up again. A short step towards each
  vertex before its first use (`check`) takes the loss from 0.666 to 0.603 (whole model), from 0.651 to 0.605 (layers)
  and from 0.670 to 0.596 (soft, layers).
- One vertex for the whole model generalises better than one for each layer: 0.900 against 0.881.
- Probes at 0.02, 0.05 and 0.1 of the way end at the same loss (0.604 after 120 evaluations), although those at 0.1 agree
  less with the exact slopes (mean cosine 0.77 against 0.95 at 0.05): what they see of the way ahead makes up for it.
- Beginning at the merge of all experts, as published, is hopeless where most do not belong.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal
from optimizer.frank_wolfe_domain import Array, Choice, Point, Table, make_domain, starts
from optimizer.frank_wolfe_oracle import Around, Differences, Here, Perturbations, Plan, losses_of
from optimizer.frank_wolfe_settings import Settings
from optimizer.frank_wolfe_space import ChainSpace, collapses
from optimizer.pycma import BoundedStrategy
from optimizer.space import Genome, SearchSpace, Variable

_FRACTIONS = (1.0, 0.5, 0.25, 0.125)
_ATTEMPTS = 4
_PUBLISHED = {"task_arithmetic": 0.3}
_FIRST_SHARE, _LATER_SHARE = 0.3, 0.05
_SIGMA = 0.2
_H, _SPSA_H = 0.1, 0.03
_FINER = 3
_GROWTH = 4.0


Asking = Generator[list[Proposal], list[Outcome], Here | None]


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
        self._domain = make_domain(context.space, with_base=settings.base_vertex, reach=settings.distance)
        self._exact = _wants_slopes(context, settings)
        self._together = settings.granularity == "model" and not self._domain.box
        self._reach = settings.step_size
        self._finer = 0
        self._checked: set[int] = set()
        self._banned: set[int] = set()
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
            self._reach, self._finer, self._parents = self._settings.step_size, 0, ()

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
                yield from self._check(here)
                step = self._soft if self._settings.variant == "soft" else self._hard
                found = yield from step(here, number, f"iterate {number}, gap {gap:.3g}")
            if found is None and (here.probed or self._banned) and self._finer < _FINER:
                found = yield from self._look_closer(here)
            if found is None:
                why = (
                    "no vertex promises more" if gap <= self._settings.tolerance else "no step lowers the loss further"
                )
                return f"the Frank-Wolfe gap is {gap:.3g}, and {why}"
            here = found
        return f"all {limit} iterations are done"

    def _look_closer(self, here: Here) -> Asking:
        """Begin again at the same point, with probes at half the distance."""
        self._finer += 1
        self._reach = self._settings.step_size
        self._checked, self._banned = set(), set()
        return (yield from self._probed(here)) if here.probed else here

    def _check(self, here: Here) -> Generator[list[Proposal], list[Outcome], None]:
        """Try a short step towards each vertex that slopes choose, once; leave out those that raise the loss."""
        if not self._settings.check or here.probed or self._domain.box:
            return
        while True:
            chosen = self._distinct(here) if self._settings.variant == "soft" else self._move(here).towards
            wanted = sorted({int(number) for number in chosen.ravel()} - self._checked)
            if not wanted:
                return
            weights = np.full((1, self._domain.parts), self.h)
            points = [
                self._domain.mix(here.point, np.full_like(weights, number, np.int64), weights) for number in wanted
            ]
            labels = [f"check of {self._domain.labels[number]}" for number in wanted]
            found = yield from self._evaluate(points, labels, slopes=False)
            self._checked |= set(wanted)
            self._banned |= {v for v, one in zip(wanted, found, strict=True) if one is None or one.value > here.value}

    @property
    def h(self) -> float:
        """Distance of probes: halved where those at the last one promised nothing, or nothing that held."""
        first = self._settings.h or (_SPSA_H if self._settings.oracle == "spsa" else _H)
        return float(first * 0.5**self._finer)

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
        move = self._move(here)
        for _ in range(_ATTEMPTS // 2 if here.probed else _ATTEMPTS):
            steps = [self._reach * fraction for fraction in _FRACTIONS]
            points = [self._domain.mix(here.point, move.choice, move.weights(step)) for step in steps]
            found = yield from self._measure(points, [f"{label}, step {step:.3g}" for step in steps], here.value)
            if found is not None:
                self._reach = min(1.0, _GROWTH * steps[found.place])
                return found
            self._reach = steps[-1] / 2
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
        parts, labels = self._domain.parts, self._domain.labels
        scores = np.broadcast_to(self._summed(self._allowed(here)), (parts, len(labels)))
        rows = np.arange(parts)
        best = scores.argmin(axis=1)
        signs = np.isfinite(scores[rows, best]).astype(float)
        active = here.point.active
        if self._settings.away == "none" or active is None:
            return _Move(best, best[None], signs[None], np.ones(parts))
        worst = np.where((active > 1e-12) & np.isfinite(scores), scores, -np.inf).argmax(axis=1)
        share = active[rows, worst]
        if self._settings.away == "pairwise":
            return _Move(best, np.array([best, worst]), np.array([signs, -signs]), share)
        leaves = (scores[rows, worst] > -scores[rows, best]) & (share < 1) & np.isfinite(scores[rows, worst])
        limit = np.where(leaves, share / np.maximum(1 - share, 1e-12), 1.0)
        return _Move(best, np.where(leaves, worst, best)[None], np.where(leaves, -1.0, signs)[None], limit)

    def _allowed(self, here: Here) -> Array:
        """What vertices are compared by, infinite for those that are left out."""
        assert here.scores is not None  # noqa: S101 - `_measure` saw to it
        scores = here.scores.copy()
        scores[:, :, sorted(self._banned)] = np.inf
        return scores

    # --- soft: a vertex for each objective, and learned weights ----------------------------------------------------

    def _soft(self, here: Here, number: int, label: str) -> Asking:
        choice = self._distinct(here)
        share = min(_FIRST_SHARE if number == 1 else _LATER_SHARE, 0.9 / len(choice)) / self._settings.distance
        learn = self._by_slopes if self._exact else self._by_search
        found = yield from learn(here, choice, share, label)
        if found is not None and found.value < here.value:
            return found
        return (yield from self._hard(here, number, label))

    def _distinct(self, here: Here) -> Choice:
        """A vertex for each objective, in their order, none twice in a part; shape (K, parts)."""
        scores = self._allowed(here)
        scores = scores.sum(axis=1, keepdims=True) if self._together else scores
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
        self, points: list[Point], labels: list[str], *, slopes: bool = True
    ) -> Generator[list[Proposal], list[Outcome], list[Here | None]]:
        proposals = [self._proposal(point, label) for point, label in zip(points, labels, strict=True)]
        outcomes = yield [replace(one, slopes=one.slopes and slopes) for one in proposals]
        return self._read(points, outcomes)

    def _probed(self, here: Here) -> Asking:
        """Measure the derivatives at a point without gradients."""
        plan = self._plan(here.point)
        outcomes = (yield plan.proposals) if plan.proposals else []
        return plan.finish(here, outcomes)

    def _proposal(self, point: Point, label: str) -> Proposal:
        return Proposal(point.genome, self._number, self._parents, label, slopes=self._exact)

    def _plan(self, point: Point) -> Plan:
        around = Around(self._settings, self.h, self._together, self._number, self._parents, self._random)
        if self._settings.oracle == "spsa" and isinstance(self._domain, Table):
            return Perturbations(around, self._domain, point)
        return Differences(around, self._domain, point)

    def _read(self, points: Sequence[Point], outcomes: Sequence[Outcome]) -> list[Here | None]:
        out: list[Here | None] = []
        for place, (point, outcome) in enumerate(zip(points, outcomes, strict=True)):
            losses = losses_of(outcome)
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
        losses = None if outcome.items is not None else losses_of(outcome)
        return None if losses is None else float(self._context.weights @ losses)


@dataclass(frozen=True)
class _Move:
    """Towards which vertices, and away from which, part by part.

    Attributes:
        towards: shape (parts,): the vertices that promise most.
        choice: shape (K, parts): those that it moves to and from.
        signs: of the same shape: 1 towards, -1 away, 0 not at all.
        limit: shape (parts,): the longest step.
    """

    towards: Choice
    choice: Choice
    signs: Array
    limit: Array

    def weights(self, step: float) -> Array:
        return np.asarray(self.signs * np.minimum(step, self.limit))


def _wants_slopes(context: AlgorithmContext, settings: Settings) -> bool:
    space = context.space
    modified = collapses(space) and bool(getattr(space, "modifiers", ()))
    able = context.differentiable and not modified and (collapses(space) or isinstance(space, ChainSpace))
    return able and settings.oracle in ("auto", "exact")


def _operator(space: SearchSpace) -> str:
    problem = getattr(space, "problem", None)
    return str(problem.operator.name) if problem is not None else ""
