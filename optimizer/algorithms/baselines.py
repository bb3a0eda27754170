"""The cheap merges that every search has to beat, evaluated one after the other and shown by their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.algorithms.scalarise import Scalariser
from optimizer.baseline_space import BaselineSpace, make_baseline_space
from optimizer.problem import Problem
from optimizer.space import Genome, JobSpace, SearchSpace
from optimizer.spec import JobSpec, Strict

Baseline = Literal[
    "models",
    "uniform",
    "task_arithmetic",
    "ties",
    "metrics_weighted",
    "greedy_soup",
    "dare_linear",
    "model_stock",
    "slerp",
]
_USUAL: list[Baseline] = ["models", "uniform", "task_arithmetic", "ties", "metrics_weighted", "greedy_soup"]
_TINY = 1e-12
_NAMED = 3

Labelled = tuple[str, Genome]


@algorithm("baselines")
class Baselines(Algorithm):
    """The usual baselines, with the operators they need whatever the job's own is.

    - ``models``: the base and each expert; ``uniform``: their plain average (Wortsman et al. 2022).
    - ``task_arithmetic`` and ``ties``: one λ for all experts on a grid. Where the best λ lies at an end, the grid grows
      there: halved below, by its last step above. TIES merges by the mean of what agrees, times λ.
    - ``metrics_weighted``: the average with weights ∝ (1/loss)^p, or score^p where more is better, from the experts'
      own results (after Metrics-Weighted Averaging, arXiv 2504.18580, whose exact penalty was not found in public); over
      several objectives the mean of such weights.
    - ``greedy_soup``: experts from the best on, each of which stays in the average if that gets no worse.
    - ``dare_linear`` at the best λ of task arithmetic; ``model_stock``; ``slerp`` of two experts at t = ¼, ½ and ¾.

    With several objectives one candidate is better than another by the weighted mean of the losses, each divided by its
    spread among the first outcomes. About 2N + 20 evaluations for N experts; what warm starts have shown costs none. Steps
    that depend on results wait for them. When all is done it stops, so a job or phase with it alone ends there.

    In a box that stands for nothing the variables are weights of experts, and random points of the diagonal follow.
    """

    summary = "Experts, averages, greedy soup, task arithmetic and TIES on a grid: what a search must beat, cheaply."
    reference = "Greedy soup: Wortsman et al., arXiv 2203.05482 (2022); weights by metrics: arXiv 2504.18580 (2025)"
    multi_objective = True

    class Options(Strict):
        """Options of the baselines."""

        include: list[Baseline] = Field(
            default=_USUAL, min_length=1, max_length=len(get_args(Baseline)), description="Which ones are evaluated."
        )
        task_arithmetic: list[float] = Field(
            default=[round(0.1 * step, 1) for step in range(1, 11)],
            min_length=1,
            max_length=100,
            description="The values of λ for task arithmetic, from 0 to 10.",
        )
        ties: list[float] = Field(
            default=[0.5, 0.75, 1.0, 1.25, 1.5],
            min_length=1,
            max_length=100,
            description="The values of λ for TIES, from 0 to 10.",
        )
        extend: int = Field(
            default=4, ge=0, le=20, description="By how many values a grid may grow beyond an end where it is best."
        )
        ties_density: float = Field(default=0.2, gt=0, le=1, description="Share of each task vector that TIES keeps.")
        dare_density: float = Field(default=0.5, gt=0, le=1, description="Share of each task vector that DARE keeps.")
        powers: list[float] = Field(
            default=[1.0, 4.0], max_length=10, description="The powers p of the weights by metrics; a soup for each."
        )
        soup_trials: int | None = Field(
            default=None, ge=1, description="Most experts that the greedy soup tries to add; all by default."
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()
        self._include = set(options.include)
        self._pantry = _Pantry(context.space)
        self._scalariser = Scalariser(context.weights / context.weights.sum(), "weighted_sum", context.objectives > 1)
        self._known: dict[bytes, Outcome] = {}
        self._queue: list[Labelled] = []
        self._flying = 0
        self._round = 0
        self._done = False
        self._grids = [_Grid(name, list(getattr(options, name))) for name in ("task_arithmetic", "ties")]
        self._grids = [grid for grid in self._grids if grid.name in self._include]
        self._soup: _Soup | None = None
        self._served: list[Labelled] = []  # known already, and proposed again for its name: that costs no evaluation

    @classmethod
    def make_space(cls, spec: JobSpec, problem: Problem, options: Any) -> JobSpace:
        """Make the space of the baselines' recipes."""
        return make_baseline_space(spec, problem, {"ties": options.ties_density, "dare_linear": options.dare_density})

    @property
    def stop_reason(self) -> str | None:
        """That all baselines are evaluated, once they are."""
        return "all baselines are evaluated" if self._done and self._pantry.recipes else None

    def ask(self, count: int) -> list[Proposal]:
        """Return the next baselines; none while the next step waits for results."""
        if count <= 0:
            return []
        self._advance()
        out, self._queue = self._queue[:count], self._queue[count:]
        if not out and self._done and not self._pantry.recipes:
            space = self.context.space
            units = [self._random.random() for _ in range(count)]
            return [Proposal(space.clip(space.low + unit * (space.high - space.low)), self._round) for unit in units]
        self._flying += len(out)
        return [Proposal(genome, self._round - 1, label=label) for label, genome in out]

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome; the last one of a step shows what the next one is."""
        if outcome.items is None:
            self._scalariser.observe(outcome)
            self._known.setdefault(_key(outcome.genome), outcome)
        if outcome.own and self._flying:
            self._flying -= 1
            self._advance()

    def _advance(self) -> None:
        """Fill the queue with the next step's baselines, once all outcomes of the last one are in."""
        while not (self._queue or self._flying or self._done):
            wanted = self._first() if self._round == 0 else self._next()
            self._done = wanted is None
            new = {_key(genome): (label, genome) for label, genome in reversed(wanted or [])}
            self._queue = [entry for key, entry in reversed(new.items()) if key not in self._known] + self._served
            self._served = []
            self._round += 1

    # --- the steps --------------------------------------------------------------------------------------------------

    def _first(self) -> list[Labelled]:
        """What depends on no result."""
        pantry, everyone = self._pantry, np.ones(self._pantry.count)
        found: list[Labelled | None] = []
        if "models" in self._include:
            found += [pantry.model(number) for number in range(-1, pantry.count)]
        if "uniform" in self._include:
            found.append(pantry.merge("uniform average", "linear", everyone))
        for grid in self._grids:
            found += [self._on_grid(grid, strength) for strength in sorted(grid.strengths)]
        if "model_stock" in self._include and pantry.count > 1:
            found.append(pantry.merge("model stock", "model_stock", everyone))
        if "slerp" in self._include and pantry.count == 2:
            found += [pantry.merge(f"SLERP t={t:g}", "slerp", everyone, t) for t in (0.25, 0.5, 0.75)]
        return [labelled for labelled in found if labelled is not None]

    def _next(self) -> list[Labelled] | None:
        """What follows from results; None when nothing does any more."""
        found = [step() for step in (self._weighted, self._soups, self._farther)]
        if all(part is None for part in found):
            return self._dare()
        return [labelled for part in found for labelled in part or []]

    def _weighted(self) -> list[Labelled] | None:
        members = self._members()
        if "metrics_weighted" not in self._include or self._round > 1 or not members:
            return None
        losses = np.array([outcome.losses for _, outcome in members])
        out: list[Labelled] = []
        for power in self.options.powers:
            weights = np.zeros(self._pantry.count)
            weights[[number for number, _ in members]] = metric_weights(losses, self.context.weights, power)
            labelled = self._pantry.merge(f"weighted by metrics, power {power:g}", "linear", weights)
            out += [labelled] if labelled else []
        return out

    def _soups(self) -> list[Labelled] | None:
        """The next trial of the greedy soup; in the end the soup itself, under its name."""
        if "greedy_soup" not in self._include:
            return None
        if self._soup is None:
            members = self._members()
            if len(members) < 2:
                return None
            order = np.argsort(self._scalariser.rank([outcome for _, outcome in members]), kind="stable")
            numbers = [members[place][0] for place in order]
            self._soup = _Soup(numbers[:1], members[order[0]][1], numbers[1:][: self.options.soup_trials])
        else:
            self._judge(self._soup)
        soup = self._soup
        if not soup.left:
            self._include.remove("greedy_soup")
            self._served = [(f"greedy soup, {len(soup.members)} of {self._pantry.count}", self._blend(soup.members))]
            return []
        names = [self._pantry.name(number) for number in [*soup.members, soup.left[0]]]
        label = "soup of " + (" + ".join(names) if len(names) <= _NAMED else f"{len(names)}, with {names[-1]}")
        return [(label, self._blend([*soup.members, soup.left[0]]))]

    def _judge(self, soup: _Soup) -> None:
        """Keep the expert that was tried last if the average got no worse with it."""
        tried = soup.left.pop(0)
        outcome = self._known.get(_key(self._blend([*soup.members, tried])))
        if outcome is not None and outcome.feasible:
            before, after = self._scalariser.rank([soup.outcome, outcome])
            if after <= before:
                soup.members.append(tried)
                soup.outcome = outcome

    def _blend(self, members: Sequence[int]) -> Genome:
        if len(members) == 1:
            return self._pantry.model(members[0])[1]
        weights = np.zeros(self._pantry.count)
        weights[list(members)] = 1.0
        labelled = self._pantry.merge("", "linear", weights)
        assert labelled is not None  # noqa: S101 - every space has averages
        return labelled[1]

    def _farther(self) -> list[Labelled] | None:
        """One more value for each grid that is best at an end."""
        out: list[Labelled] = []
        for grid in self._grids:
            strength = self._beyond(grid)
            labelled = None if strength is None else self._on_grid(grid, strength)
            if strength is not None and labelled is not None:
                grid.strengths.append(strength)
                grid.added += 1
                out.append(labelled)
        return out or None

    def _beyond(self, grid: _Grid) -> float | None:
        best = self._best_on(grid)
        known = sorted(grid.strengths)
        if best is None or grid.added >= self.options.extend:
            return None
        if best == known[0]:
            return best / 2 if best > 0 else None
        if best == known[-1]:
            return min(2 * best - known[-2], self._pantry.strongest) if best < self._pantry.strongest else None
        return None

    def _best_on(self, grid: _Grid) -> float | None:
        labelled = [(strength, self._on_grid(grid, strength)) for strength in grid.strengths]
        found = [(strength, self._known.get(_key(entry[1]))) for strength, entry in labelled if entry]
        feasible = [(strength, outcome) for strength, outcome in found if outcome is not None and outcome.feasible]
        if not feasible:
            return None
        return feasible[int(self._scalariser.rank([outcome for _, outcome in feasible]).argmin())][0]

    def _dare(self) -> list[Labelled] | None:
        """DARE at the best λ of task arithmetic, once that is settled."""
        if "dare_linear" not in self._include:
            return None
        self._include.remove("dare_linear")
        grid = next((grid for grid in self._grids if grid.name == "task_arithmetic"), None)
        strength = self._best_on(grid) if grid else None
        strength = 1.0 / self._pantry.count if strength is None else strength
        labelled = self._pantry.merge(f"DARE λ={strength:g}", "dare_linear", np.ones(self._pantry.count), strength)
        return [labelled] if labelled else None

    def _on_grid(self, grid: _Grid, strength: float) -> Labelled | None:
        title = {"task_arithmetic": "task arithmetic", "ties": "TIES"}[grid.name]
        return self._pantry.merge(f"{title} λ={strength:g}", grid.name, np.ones(self._pantry.count), strength)

    def _members(self) -> list[tuple[int, Outcome]]:
        """The experts that have feasible results."""
        found = [(number, self._known.get(_key(self._pantry.model(number)[1]))) for number in range(self._pantry.count)]
        return [(number, outcome) for number, outcome in found if outcome is not None and outcome.feasible]


@dataclass
class _Grid:
    """Values of λ; ``added`` of them beyond those that were asked for."""

    name: str
    strengths: list[float]
    added: int = 0


@dataclass
class _Soup:
    """A greedy soup: what is in it, its outcome, and the experts not tried yet, the next one first."""

    members: list[int]
    outcome: Outcome
    left: list[int]


class _Pantry:
    """Names and genomes of merges, in a space of baselines or in a box whose variables stand for weights of experts.

    Attributes:
        recipes: whether genomes stand for recipes.
        count: number of experts.
        strongest: largest λ.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.recipes = isinstance(space, BaselineSpace)
        self.count = space.dim - 2 if isinstance(space, BaselineSpace) else space.dim
        self.strongest = float(space.high[1]) if isinstance(space, BaselineSpace) else float(space.high.max())

    def name(self, number: int) -> str:
        if number < 0:
            return "base"
        space = self._space
        return space.experts[number] if isinstance(space, BaselineSpace) else space.variables[number].name

    def model(self, number: int) -> Labelled:
        """An expert by number, or the base (-1)."""
        weights = np.zeros(self.count)
        weights[number if number >= 0 else []] = 1.0
        labelled = self.merge(self.name(number), "model", weights)
        assert labelled is not None  # noqa: S101 - every space has models
        return labelled

    def merge(self, label: str, method: str, weights: NDArray[np.float64], strength: float = 1.0) -> Labelled | None:
        """A merge, or None where the space has none of that kind."""
        space = self._space
        if isinstance(space, BaselineSpace):
            return label, space.genome(method, weights.tolist(), strength)
        if method == "linear":
            return label, space.clip(weights / weights.sum())
        return (label, space.clip(strength * weights)) if method in ("model", "task_arithmetic") else None


def metric_weights(losses: NDArray[np.float64], weights: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """Return the experts' weights in an average by their own results, shape (experts,), with sum 1.

    Args:
        losses: shape (experts, objectives), finite; scores in which more is better stand negated.
        weights: of the objectives.
        power: 0 weighs all alike; more favours the best.
    """
    out = np.zeros(len(losses))
    for column, weight in zip(losses.T, weights / weights.sum(), strict=True):
        if (column <= 0).all():
            merit = -column
        elif (column >= 0).all():
            merit = 1.0 / np.maximum(column, _TINY)
        else:
            merit = column.max() - column
        merit = (merit / merit.max()) ** power if merit.max() > 0 else np.ones(len(losses))
        out += weight * merit / merit.sum()
    return out


def _key(genome: Genome) -> bytes:
    """What genomes have in common that differ in their last bits only."""
    return (np.round(genome, 9) + 0.0).tobytes()
