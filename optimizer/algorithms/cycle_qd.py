"""CycleQD (Kuroki et al. 2024): an archive for each task, whose turn it is to be the quality rotates."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.niches.breeding import BoxBreeding, Breeding, TableBreeding, breeding_space
from optimizer.niches.grid import Elite, Grid
from optimizer.niches.scores import draw
from optimizer.niches.search import NicheSearch
from optimizer.problem import Problem
from optimizer.space import JobSpace
from optimizer.spec import JobSpec, Strict
from optimizer.tables import TableSpace


@algorithm("cycle_qd")
class CycleQd(NicheSearch):
    """Keeps an archive for each objective: its value is the quality, and the grid is over the other objectives' values.

    Each generation breeds from the next archive, and every outcome competes in all of them. Parents are drawn by elite
    sampling: with γ = Π_i (low + (f_i − min f_i) / (max f_i − min f_i) · (high − low)) over quality and descriptors. A
    child is the mean of two task vectors, with weights drawn around 1 and divided by their sum, and Gaussian noise is
    added to its coefficients. The paper's mutation scales the singular directions of a child's task vector, which only a
    model that is written out has: it is not available, and the noise by tensor or layer stands in its place.

    With one objective its archive has a single cell: a hill climb.
    """

    summary = (
        "Keeps an archive for each objective, in a grid over the others; whose turn it is to be bred from rotates."
    )
    reference = "Kuroki et al. 2024, Agent Skill Acquisition for Large Language Models via CycleQD, arXiv 2410.14735"
    multi_objective = True

    class Options(Strict):
        """Options of `CycleQd`."""

        representation: Literal["table", "coefficients"] = Field(
            default="coefficients",
            description=(
                "What an individual is: a point of the job's own search space (`coefficients`), or any linear merge, with "
                "a coefficient for each expert in each layer or tensor (`table`; for linear and task_arithmetic)."
            ),
        )
        bins: int = Field(default=15, ge=1, le=1000, description="Cells along each descriptor.")
        generation: int = Field(
            default=1, ge=1, le=10_000, description="Children of an archive before it is the next one's turn."
        )
        spread: float = Field(
            default=0.01, ge=0, le=1, description="Standard deviation of the parents' weights around 1."
        )
        mutation: float = Field(
            default=0.05,
            ge=0,
            le=1,
            description="Standard deviation of a coefficient's noise, as a share of its range.",
        )
        cuts: Literal["tensors", "layers"] = Field(
            default="layers", description="In tables, what has noise of its own: each layer, or each tensor."
        )
        low: float = Field(default=0.5, gt=0, le=1, description="Elite sampling: factor of the lowest value.")
        high: float = Field(default=0.8, gt=0, le=1, description="Elite sampling: factor of the highest value.")

    @classmethod
    def make_space(cls, spec: JobSpec, problem: Problem, options: Any) -> JobSpace:
        """See `Algorithm.make_space`: the job's own space, or tables."""
        return breeding_space(spec, problem, options, mutates_tables=True)

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        tasks = context.objectives
        self._archives = [Grid(int(options.bins), tasks - 1) for _ in range(tasks)]

    def _compete(self, outcome: Outcome) -> None:
        """Let a feasible candidate compete in every archive."""
        if outcome.losses is None:
            return
        values = -outcome.losses
        for task, archive in enumerate(self._archives):
            others = np.delete(values, task)
            archive.add(Elite(outcome.index, outcome.genome, float(values[task]), others))

    def _make_breeding(self) -> Breeding:
        context, sigma = self.context, float(self.options.mutation)
        if isinstance(context.space, TableSpace):
            return TableBreeding(context.space, self._random, mixing="linear", cuts=self.options.cuts, sigma=sigma)
        return BoxBreeding(context.space, context.start, self._random, mixing="linear", sigma=sigma)

    def _propose(self) -> Proposal:
        generation = self._proposed // int(self.options.generation)
        self._proposed += 1
        archive = list(self._archives[generation % len(self._archives)])
        if not archive:
            return Proposal(self._first.pop(0) if self._first else self._breeding.fresh(), generation)
        chances = self._chances(archive)
        a, b = (archive[draw(self._random, chances)] for _ in range(2))
        first, second = np.maximum(self._random.normal(1.0, float(self.options.spread), 2), 1e-3)
        child = self._breeding.mutate(self._breeding.blend(a.genome, b.genome, float(second / (first + second))))
        return Proposal(child, generation, tuple(dict.fromkeys((a.index, b.index))))

    def _chances(self, archive: list[Elite]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        values = np.array([[elite.quality, *elite.descriptors] for elite in archive])
        low, high = values.min(axis=0), values.max(axis=0)
        unit = (values - low) / np.where(high > low, high - low, 1.0)
        floor, ceiling = float(self.options.low), float(self.options.high)
        return np.asarray((floor + unit * (ceiling - floor)).prod(axis=1))
