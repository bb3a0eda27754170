"""Frank-Wolfe merging: choosing among many experts, a step at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.errors import InvalidInput
from optimizer.frank_wolfe_settings import Settings
from optimizer.frank_wolfe_space import make_chain_space
from optimizer.frank_wolfe_walk import Walk
from optimizer.problem import Problem
from optimizer.space import JobSpace, make_space
from optimizer.spec import JobSpec
from optimizer.tables import FAMILY


@algorithm("frank_wolfe")
class FrankWolfe(Algorithm):
    """Frank-Wolfe merging over the convex hull of the experts.

    An iteration finds the vertex (expert, base, or where it began) towards which the loss falls fastest, for each
    coefficient group or for the whole model, and merges some of it in. Weighted sums (`task_arithmetic`, `linear`)
    collapse into one table, a point of the job's own space; any other operator makes a chain of merges (`ChainSpace`).
    What is held are coefficients only: nothing here or in a worker grows with the experts' weights.

    As in the paper, with several objectives `hard` follows the weighted sum and `soft` lets each pick a vertex, then learns
    how much of each to merge: by exponentiated gradient where slopes are exact, by CMA-ES otherwise (the authors use Adam
    on layer-wise coefficients). Slopes are those of the mean negative log-likelihood; steps are judged by the job's own
    metrics. The label of an iterate says the Frank-Wolfe gap, in the unit of the loss, at the point that it was reached
    from.

    In a box that stands for no experts the corners are the vertices: coordinate by coordinate towards the end that
    promises more, and from a random point again when a walk is over.
    """

    summary = "Steps towards the experts that lower the loss most, by gradients or probes; for large pools of experts."
    reference = "Chen et al. 2025, FW-Merging (arXiv:2503.12649); Frank and Wolfe 1956"

    class Options(Settings):
        """Options of `FrankWolfe`."""

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._walk = Walk(context, options, context.generator())
        self._steps: Generator[list[Proposal], list[Outcome], str] | None = None
        self._known: list[Outcome] = []
        self._batch = _Batch()
        self._reason: str | None = None

    @classmethod
    def make_space(cls, spec: JobSpec, problem: Problem, options: Any) -> JobSpace:
        """Return the job's own space for weighted sums and for spaces of another form, else that of chains.

        Raises:
            InvalidInput: the operator cannot make chains, the space has no fixed variables, or derivatives are asked for
                that cannot be had.
        """
        if options.oracle == "exact" and not all(objective.differentiable for objective in problem.objectives):
            raise InvalidInput(
                "not every objective has likelihoods, so there are no exact derivatives",
                field="algorithm.options.oracle",
                remedy="use `auto`, `differences` or `spsa`",
            )
        if spec.merge.space is None and problem.operator.name not in FAMILY:
            if options.oracle == "spsa":
                raise InvalidInput(
                    f"random perturbations need weighted sums, and {problem.operator.name} makes none",
                    field="algorithm.options.oracle",
                    remedy="use `auto` or `differences`",
                )
            return make_chain_space(spec, problem)
        space = make_space(spec, problem)
        if not space.dim:
            raise InvalidInput(
                "Frank-Wolfe needs variables with bounds, and this search space has none",
                field="merge.space",
                remedy="leave it out, or choose another algorithm",
            )
        return space

    @property
    def stop_reason(self) -> str | None:
        """See `Algorithm.stop_reason`."""
        return self._reason

    @property
    def batch_size(self) -> int:
        """As many as run in parallel, or all evaluations that do not depend on each other."""
        return max(self.context.parallel, len(self._batch.proposals))

    def ask(self, count: int) -> list[Proposal]:
        """Return the next proposals; none while others are out that decide how to go on."""
        if count <= 0:
            return []
        if self._steps is None:
            self._steps = self._walk.run(self._known)
            self._batch = _Batch(next(self._steps))
        return self._batch.take(count)

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome; the last one of a batch decides the next."""
        if not outcome.own:
            self._known.append(Outcome(outcome.index, outcome.genome, outcome.losses, outcome.violation, False))
            return
        done = self._batch.put(outcome)
        if done is None or self._steps is None:
            return
        try:
            self._batch = _Batch(self._steps.send(done))
        except StopIteration as stop:
            self._batch, self._reason = _Batch(), stop.value


@dataclass
class _Batch:
    """Proposals that belong together.

    Attributes:
        proposals: all of them.
        taken: how many have been handed out.
        outcomes: of each, as far as told.
    """

    proposals: Sequence[Proposal] = ()
    taken: int = 0
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def take(self, count: int) -> list[Proposal]:
        begin, self.taken = self.taken, min(self.taken + count, len(self.proposals))
        return list(self.proposals[begin : self.taken])

    def put(self, outcome: Outcome) -> list[Outcome] | None:
        """Add an outcome to the proposal that comes closest; return all when the last one is there."""
        waiting = [number for number in range(self.taken) if number not in self.outcomes]
        if not waiting:
            return None
        nearest = min(waiting, key=lambda number: self._distance(number, outcome))
        self.outcomes[nearest] = outcome
        if len(self.outcomes) < len(self.proposals):
            return None
        return [self.outcomes[number] for number in range(len(self.proposals))]

    def _distance(self, number: int, outcome: Outcome) -> tuple[bool, float]:
        """How little an outcome fits a proposal; machines differ in the last bits, and equals are taken in their order."""
        proposal = self.proposals[number]
        if proposal.genome.shape != outcome.genome.shape:
            return True, np.inf
        distance = float(np.abs(proposal.genome - outcome.genome).max(initial=0.0))
        return proposal.items != outcome.items, round(distance, 9)
