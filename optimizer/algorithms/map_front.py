"""MAP: quadratic surrogates, and the front of their predictions, evaluated and refined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import minimize

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.errors import InvalidInput
from optimizer.pareto import front_mask
from optimizer.spec import Strict
from optimizer.surrogates import angles
from optimizer.surrogates.archive import Observed
from optimizer.surrogates.encoding import Units
from optimizer.surrogates.front import predicted_front
from optimizer.surrogates.models import latest_and_best
from optimizer.surrogates.nested import Nested
from optimizer.surrogates.plan import columns_of, holds_zero_and_one, sampling_plan
from optimizer.surrogates.quadratic import Interactions, LinkName, Quadratic, choose_link
from optimizer.surrogates.search import SurrogateSearch

_MOST = 600
_LARGEST_ROUND = 20
_ROUNDS = 12
_GROWTH = 0.1
_REGRET = 0.1
_DESCENTS = 6
_DESCENT_STEPS = 40

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass
class _Round:
    """Proposals that are made together.

    Attributes:
        first: number of the first one.
        size: how many there are.
        known: outcomes told when it began.
        flying: units of what was in flight then.
        points: shape (size, dim), with their labels, once somebody asked for one.
    """

    first: int
    size: int
    known: int
    flying: Units
    points: tuple[Units, list[str]] | None = None


@algorithm("map")
class MapFront(SurrogateSearch):
    """Evaluates a sampling plan, fits quadratics, evaluates the front of their predictions, and begins again with the fit.

    The published method stops after one fit; here every round's outcomes, also foreign ones, refine the next one. The plan
    has experts, diagonals and mixtures, jittered: (N + 1)(N + 2) / 2 points for N variables, or a third of the budget where
    that is less. Predictions are trusted inside the box of what was measured, grown by a tenth in each round.

    A round spreads over what the predicted front would gain on the measured one; where nothing is to be gained, it goes
    where the predictions are least certain among those that lose little. It never waits. The label of a proposal says
    which point of the round it is, and the R² of the worst fit with each observation left out in turn. Outcomes on a part
    of the items are left out.
    """

    summary = (
        "Fits quadratics to the losses and evaluates the front they predict: sketches trade-offs in few evaluations."
    )
    reference = "Li et al. 2024, MAP: Low-compute Model Merging with Amortized Pareto Fronts (arXiv:2406.07529)"
    multi_objective = True

    class Options(Strict):
        """Options of `MapFront`."""

        link: LinkName = Field(
            default="auto",
            description=(
                "What a loss is of its quadratic: `sigmoid` for shares, `softplus` for losses above 0, `identity`; `auto` "
                "chooses for each objective by its range as seen."
            ),
        )
        interactions: Interactions = Field(
            default="auto",
            description="`full` models products of variables, `diagonal` none; `auto` takes what predicts better.",
        )
        plan: int | None = Field(
            default=None,
            ge=3,
            le=10_000,
            description=(
                "Outcomes to begin with, warm starts among them: (variables + 1)(variables + 2) / 2 by default, at most a "
                "third of the budget."
            ),
        )
        sampling: Literal["plan", "angles"] = Field(
            default="plan",
            description=(
                "How samples are chosen before there is a front: by the `plan`, or its second half one by one where the "
                f"fit predicts worst, by the `angles` of the coefficients (2 to {angles.LARGEST} real variables)."
            ),
        )
        nested: bool = Field(
            default=False,
            description=(
                "For many experts: merge two and two, keep each pair's preferred point by the objectives' weights, and "
                "merge the merges, in place of the plan. Real coefficients only."
            ),
        )
        nested_evaluations: int = Field(
            default=8, ge=4, le=1000, description="Evaluations of each pair, where `nested`."
        )
        round_size: int | None = Field(
            default=None,
            ge=1,
            le=1000,
            description=(
                f"Points of the front that are evaluated between two fits; a {_ROUNDS}th of the budget by default, between "
                f"4 and {_LARGEST_ROUND}."
            ),
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        budget = context.budget
        size = _LARGEST_ROUND if budget is None else min(max(4, budget // _ROUNDS), _LARGEST_ROUND)
        self._size = max(context.parallel, options.round_size or size)
        self._plan: Units | None = None
        self._round: _Round | None = None
        self._number = 0
        self._nested = self._tournament() if options.nested else None
        if options.sampling == "angles" and not self._few():
            raise InvalidInput(
                f"sampling by angles needs 2 to {angles.LARGEST} real variables within bounds that hold 0 and 1",
                field="algorithm.options.sampling",
                remedy="use the plan",
            )

    def _propose(self, number: int) -> Proposal:
        if self._nested is not None and number < self._nested.total:
            genome, label = self._nested.point(*self._nested.begin(number))
            unit = self.encoding.repair(self.encoding.units(genome)[None])[0]
            return Proposal(self.encoding.genome(unit), label=label)
        current = self._at(number)
        if current is None:
            return Proposal(self.encoding.genome(self._planned_point(number)))
        if current.points is None:
            current.points = self._sketch(current)
        units, labels = current.points
        place = number - current.first
        return Proposal(self.encoding.genome(units[place]), self._number, label=labels[place])

    def _recalled(self, number: int) -> int | None:
        if self._nested is not None and number < self._nested.total:
            self._nested.begin(number)
        else:
            self._at(number)
        return None

    def _told(self, outcome: Outcome, number: int | None, improved: bool) -> None:
        del improved
        full = outcome.items is None and outcome.losses is not None and outcome.feasible
        if self._nested is not None and number is not None and outcome.losses is not None and full:
            self._nested.tell(number, self.context.space.clip(outcome.genome), outcome.losses)

    def _tournament(self) -> Nested:
        space, columns = self.context.space, columns_of(self.context, self.encoding)
        if self.encoding.discrete or len(columns) < 2 or not holds_zero_and_one(space):
            raise InvalidInput(
                "nested merging needs two or more real coefficients within bounds that hold 0 and 1",
                field="algorithm.options.nested",
                remedy="leave it out",
            )
        origin = self.context.start.copy()
        origin[np.concatenate(columns)] = 0.0
        experts = []
        for column in columns:
            expert = np.zeros(space.dim)
            expert[column] = 1.0
            experts.append(expert)
        return Nested(origin, experts, self.options.nested_evaluations, self.context.weights)

    def _few(self) -> bool:
        space = self.context.space
        return not self.encoding.discrete and 2 <= space.dim <= angles.LARGEST and holds_zero_and_one(space)

    def _planned_point(self, number: int) -> Units:
        """A point of the plan, or one drawn in its place."""
        assert self._plan is not None  # noqa: S101  `_at` made it
        observed = self.archive.observed().full()
        measured = observed.where(observed.measured)
        if self.options.sampling == "plan" or number < len(self._plan) // 2 or len(measured) < 3:
            return np.asarray(self._plan[number], dtype=np.float64)
        random = self.generator(number)
        errors = _Surrogate(self, measured, random).errors()
        genomes = np.array([self.encoding.genome(unit) for unit in np.clip(measured.units, 0, 1)])
        point = angles.draw(genomes, errors, random)
        return np.asarray(self.encoding.repair(self.encoding.units(point)[None])[0], dtype=np.float64)

    def _at(self, number: int) -> _Round | None:
        """The round that the proposal of this number belongs to; None for one of the plan."""
        before = 0 if self._nested is None else self._nested.total
        if self._plan is None:
            known = self.archive.observed().full()
            plan = sampling_plan(self.context, self.encoding, known, self._planned(), self.generator(-1))
            self._plan = plan
        if before == 0 and number < len(self._plan):
            return None
        if self._round is None or number >= self._round.first + self._round.size:
            self._round = _Round(number, self._size, len(self.archive), self.archive.pending)
            self._number += 1
        return self._round

    def _planned(self) -> int:
        if self.options.plan is not None:
            return int(self.options.plan)
        dim, budget = self.context.space.dim, self.context.budget
        enough = (dim + 1) * (dim + 2) // 2
        return max(3, min(enough, 100 if budget is None else budget // 3))

    # --- a round ----------------------------------------------------------------------------------------------------

    def _sketch(self, current: _Round) -> tuple[Units, list[str]]:
        """Work out the points of a round, and what they are called."""
        random = self.generator(current.first)
        observed = self.archive.observed().where(np.arange(current.known)).full()
        measured = observed.where(observed.measured)
        if len(measured) < 3 or not np.ptp(measured.losses, axis=0).any():
            anywhere = random.random((current.size, self.encoding.dim))
            return self.encoding.repair(anywhere), ["random point"] * current.size
        surrogate = _Surrogate(self, measured.where(latest_and_best(measured, _MOST)), random)
        units = surrogate.spread(current.flying, current.size)
        labels = [
            f"front point {k + 1} of {current.size}, R² {max(surrogate.r2, 0.0):.2f}" for k in range(current.size)
        ]
        return units, labels


class _Surrogate:
    """The fitted quadratics of all objectives, and the points they recommend.

    Attributes:
        r2: of the worst fit.
    """

    def __init__(self, search: MapFront, observed: Observed, random: np.random.Generator) -> None:
        self._search = search
        self._encoding = search.encoding
        self._random = random
        self._observed = observed
        weights = nearness(observed)
        z = self._scaled(observed.units)
        options = search.options
        self._fits = [
            Quadratic(z, column, choose_link(column, options.link), weights, options.interactions)
            for column in observed.losses.T
        ]
        self.r2 = min(fit.r2 for fit in self._fits)
        middle, best = np.median(observed.losses, axis=0), observed.losses.min(axis=0)
        self._middle = middle
        self._spread = np.where(middle > best, middle - best, np.maximum(np.ptp(observed.losses, axis=0), 1e-12))
        inside = np.clip(observed.units, 0.0, 1.0)
        low, high = inside.min(axis=0), inside.max(axis=0)
        grow = _GROWTH * np.maximum(high - low, 0.1)
        discrete = ~self._encoding.real
        self._low = np.where(discrete, 0.0, np.maximum(low - grow, 0.0))
        self._high = np.where(discrete, 1.0, np.minimum(high + grow, 1.0))

    def errors(self) -> Vector:
        """Return how far each observation lies from its prediction, shape (n,), over the spread, in the worst objective."""
        predicted = self._predict(self._observed.units)
        span = np.maximum(np.ptp(self._observed.losses, axis=0), 1e-12)
        return np.asarray((np.abs(predicted - self._observed.losses) / span).max(axis=1), dtype=np.float64)

    def _scaled(self, units: Units) -> Matrix:
        """The coordinates of the quadratics."""
        return 2 * self._encoding.features(units) - 1

    def _predict(self, units: Units) -> Matrix:
        z = self._scaled(units)
        return np.column_stack([fit.predict(z) for fit in self._fits])

    def _squash(self, losses: Matrix) -> Matrix:
        """Losses in units of the better half, logarithms above: a ruined expert's loss must not be the measure of gains."""
        scaled = (losses - self._middle) / self._spread
        return np.asarray(np.where(scaled > 0, np.log1p(np.maximum(scaled, 0.0)), scaled), dtype=np.float64)

    def _squashed(self, units: Units) -> Matrix:
        return self._squash(self._predict(units))

    def spread(self, flying: Units, count: int) -> Units:
        """Return points, shape (count, dim), that gain most on what was measured or is in flight, one after another."""
        feasible = self._observed.where(self._observed.feasible)
        known = feasible if len(feasible) else self._observed
        front = known.units[front_mask(known.losses)]
        first = np.vstack([self._descents(front), np.clip(front[:30], 0.0, 1.0)])
        units, losses = predicted_front(self._squashed, self._encoding, self._low, self._high, first, self._random)
        near = self._jittered(units)
        units, losses = np.vstack([units, near]), np.vstack([losses, self._squashed(near)])
        doubt = np.column_stack([fit.doubt(self._scaled(units)) for fit in self._fits])
        doubt = doubt / self._spread / np.exp(np.maximum(losses, 0.0))
        reached = self._squash(known.losses[front_mask(known.losses)])
        if len(flying):
            reached = np.vstack([reached, self._squashed(flying)])
        return self._choose(units, losses, doubt, reached, np.vstack([self._observed.units, flying]), count)

    def _choose(self, units: Units, losses: Matrix, doubt: Matrix, reached: Matrix, known: Units, count: int) -> Units:
        """Greedy: the point that lies farthest before all that is reached, or the least certain that lies little behind."""
        span = np.maximum(np.ptp(np.vstack([reached, losses[front_mask(losses)]]), axis=0), 1e-9)
        seen = {row.tobytes() for row in known}
        free = np.array([row.tobytes() not in seen for row in units])
        out = []
        for _ in range(count):
            gain = ((reached[None] - losses[:, None]) / span).max(axis=2).min(axis=1)
            score = np.where(gain > 1e-3, 1 + gain, np.where(gain > -_REGRET, (doubt / span).mean(axis=1) / 1e3, gain))
            score = np.where(free, score, -np.inf)
            best = int(score.argmax())
            if not free[best]:
                out.append(self._encoding.repair(self._random.random((1, units.shape[1])))[0])
                continue
            out.append(units[best])
            free &= np.abs(units - units[best]).max(axis=1) > 1e-6
            reached = np.vstack([reached, losses[best]])
            # What is chosen will be known: who is near it tells little more.
            distance = np.sqrt(((units - units[best]) ** 2).mean(axis=1))[:, None]
            doubt = doubt * np.minimum(1.0, distance / 0.05)
        return np.array(out)

    def _jittered(self, units: Units) -> Units:
        steps = 10 ** self._random.uniform(-2.5, -1, (len(units), 1)) * self._random.standard_normal(units.shape)
        near = np.where(self._encoding.real, units + steps, units)
        return self._encoding.repair(np.clip(near, self._low, self._high))

    def _descents(self, front: Units) -> Units:
        """Minima of random weighted sums of the predicted losses, in the real variables, from points of the front."""
        real = self._encoding.real
        if not real.any():
            return np.empty((0, self._encoding.dim))
        objectives = len(self._fits)
        weights = np.vstack([np.eye(objectives), self._random.dirichlet(np.ones(objectives), _DESCENTS)])
        weights = weights[:1] if objectives == 1 else weights[: max(_DESCENTS, objectives)]
        starts = np.clip(front[self._random.integers(len(front), size=len(weights))], self._low, self._high)
        span = np.maximum(np.ptp(self._observed.losses, axis=0), 1e-9)
        return np.array([self._descend(start, row / span) for start, row in zip(starts, weights, strict=True)])

    def _descend(self, start: Units, weights: Vector) -> Units:
        real = self._encoding.real
        places = self._encoding.start[real]
        z = self._scaled(start[None])[0]

        def loss(values: Vector) -> tuple[float, Vector]:
            z[places] = 2 * values - 1
            found = [fit.gradient(z) for fit in self._fits]
            value = sum(weight * each[0] for weight, each in zip(weights, found, strict=True))
            slope = sum((weight * each[1] for weight, each in zip(weights, found, strict=True)), np.zeros(len(z)))
            return float(value), 2 * slope[places]

        bounds = np.column_stack([self._low[real], self._high[real]])
        found = minimize(
            loss,
            start[real],
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": _DESCENT_STEPS, "maxfun": 60},
        )
        out = start.copy()
        out[real] = found.x
        return out


def nearness(observed: Observed) -> Vector:
    """Return how much each outcome counts, shape (n,): less, the farther it lies behind the better half in every loss."""
    losses = observed.losses
    middle, best = np.median(losses, axis=0), losses.min(axis=0)
    spread = np.where(middle > best, middle - best, np.maximum(np.ptp(losses, axis=0), 1e-12))
    behind = np.maximum(((losses - middle) / spread).min(axis=1), 0.0)
    return np.asarray(1 / (1 + behind) ** 2, dtype=np.float64)
