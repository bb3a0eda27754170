"""What an algorithm is: a pure ask/tell state machine over bounded vectors.

It does no I/O and never sees weights, recipes or the store. Its state is a fold over what it asked and was told: a new
instance with the same context, put through the same calls, proposes the same genomes. That is how jobs resume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from optimizer.errors import JobError, from_validation
from optimizer.fitness.racing import Rivals
from optimizer.geometry import Cuts
from optimizer.problem import PlannedPhase, Problem
from optimizer.registry import Registry
from optimizer.space import Genome, JobSpace, SearchSpace, make_space
from optimizer.spec import AlgorithmSpec, JobSpec, Strict


@dataclass(frozen=True)
class Proposal:
    """A genome an algorithm wants evaluated.

    Attributes:
        genome: shape (dim,), inside the bounds.
        generation: number of the generation it belongs to, from 0.
        parents: indices of the candidates it descends from, where the method has parents.
        label: what the UI calls it, for candidates that mean something to a user ("greedy soup").
        items: measure it on so many items of each objective only, the same ones for all candidates that ask for as many
            (and among those of whoever asks for more); all by default. Such a candidate joins no front.
        slopes: whether its `Outcome.slopes` are wanted: a backward pass for each objective.
    """

    genome: Genome
    generation: int = 0
    parents: tuple[int, ...] = ()
    label: str | None = None
    items: int | None = None
    slopes: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate.

    Attributes:
        index: the candidate's number in the job, from 0.
        genome: shape (dim,), as recorded in the store.
        losses: shape (objectives,): the objectives' values, all to be minimised (a maximised value stands negated);
            None when the evaluation failed.
        violation: how far its constraints are violated in sum; 0 when they hold.
        own: whether the algorithm proposed it; warm starts and the user's candidates are foreign.
        gains: for algorithms that ask for them (`Algorithm.needs_items`), the scores item by item: for each objective
            an array of shape (items,) in which more is better (what is to be minimised stands negated). Empty when the
            evaluation failed.
        items: how many items of each objective it was measured on, where not on all.
        lost: whether it was not measured on all because it is clear that it loses to one of its rivals
            (`Algorithm.rivals`): its losses are estimates, and worse than that one's.
        slopes: where they were asked for, shape (2, objectives, groups, models + 1): how each objective's mean negative
            log-likelihood changes with the weights, by the job's coefficient groups. With g its gradient at the
            candidate θ, [0] holds the inner products ⟨g, θ_m − θ_base⟩ of the base (0) and the experts in the job's
            order, and in the last column ⟨g, θ − θ_base⟩; [1] holds, summed over the parameters of the group, the
            cosines of g with the weights θ_m themselves, as the code of FW-Merging (arXiv:2503.12649) takes them, and
            in the last column those with θ. Parameters of no group, and such without a gradient, count nowhere.
    """

    index: int
    genome: Genome
    losses: NDArray[np.float64] | None
    violation: float = 0.0
    own: bool = True
    gains: tuple[NDArray[np.float32], ...] = ()
    items: int | None = None
    slopes: NDArray[np.float64] | None = None
    lost: bool = False

    @property
    def feasible(self) -> bool:
        """Whether it was evaluated to finite numbers and violates nothing."""
        return self.losses is not None and bool(np.isfinite(self.losses).all()) and self.violation <= 0


@dataclass(frozen=True)
class AlgorithmContext:
    """All that an algorithm is told about the job.

    Attributes:
        space: bounds and kinds of the variables.
        weights: shape (objectives,), positive: the objectives' weights, for a weighted sum of the losses.
        seed: of its own random generator.
        start: shape (dim,), inside the bounds: the best guess before any evaluation (the uniform merge).
        parallel: candidates that may be in flight at once.
        budget: evaluations it may spend in all, or None.
        items: number of items of each objective; empty where unknown.
        differentiable: whether every objective has slopes (`Outcome.slopes`).
    """

    space: SearchSpace
    weights: NDArray[np.float64]
    seed: int
    start: Genome
    parallel: int = 1
    budget: int | None = None
    items: tuple[int, ...] = ()
    differentiable: bool = False

    @property
    def objectives(self) -> int:
        """Number of objectives."""
        return len(self.weights)

    def generator(self) -> np.random.Generator:
        """Return a fresh random generator, the same for the same seed on every machine."""
        return np.random.Generator(np.random.PCG64(self.seed))


class Algorithm(ABC):
    """An ask/tell search.

    The contract (tests/optimizer/algorithms/test_conformance.py runs it over every algorithm):

    - `ask` returns between 0 and ``count`` proposals inside the bounds; none means that it waits for outcomes, and then
      its state is unchanged. It never waits when every proposal has been told, unless it gives a `stop_reason`.
    - `tell` gets every outcome once, also foreign ones (``own`` is False), failed ones (``losses`` is None) and
      duplicates. None of these may break it. Usually they come in the order of the candidates' indices; in asynchronous
      jobs in any order.
    - Asks may be split or joined: twelve proposals at once are those that were asked for one by one.
    - The genome in an outcome is authoritative: it may differ in its last bits from what this process proposed.
    - Nothing but ``context.generator()`` is random; no global generator is touched.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    multi_objective: ClassVar[bool] = False
    needs_items: ClassVar[bool] = False
    races: ClassVar[bool] = False

    class Options(Strict):
        """Options of the algorithm; subclasses declare fields with bounds and descriptions."""

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        self.context = context
        self.options = options

    @classmethod
    def make_space(cls, spec: JobSpec, problem: Problem, options: Any) -> JobSpace:
        """Make the space it searches for a job; by default the job's own.

        Algorithms with individuals of another form (tables with break points, chains of merges) return their own. What
        users and earlier phases evaluated is told as foreign outcomes where `JobSpace.adopt` can express it.

        Raises:
            InvalidInput: it cannot search what the job merges, naming the field and the remedy.
        """
        del options
        return make_space(spec, problem)

    @classmethod
    def cuts(cls, options: Any) -> Cuts | None:
        """Where `Problem.grams` must have edges for it; None if it needs none."""
        del options
        return None

    @classmethod
    def phases(cls, spec: JobSpec, problem: Problem, options: Any, evaluations: int) -> list[PlannedPhase] | None:
        """What stands for it in a job, for an algorithm that only chooses others; None for all that search by themselves."""
        del spec, problem, options, evaluations
        return None

    @property
    def stop_reason(self) -> str | None:
        """Why it will never propose anything again (a sentence's end for the user), or None."""
        return None

    @property
    def batch_size(self) -> int:
        """How many candidates it likes to propose at once: its generation, or as many as run in parallel."""
        return self.context.parallel

    def rivals(self) -> Rivals | None:
        """Whom the next proposals must not lose to, where one that does is of no use to the algorithm any more.

        Its evaluation is then stopped as soon as that is clear, and its outcome told as one that is `lost`. References
        must have been told with all their items, and be feasible.

        Returns:
            A function of what was told; None where every proposal is to be measured as it asks.
        """
        return None

    @abstractmethod
    def ask(self, count: int) -> list[Proposal]:
        """Return up to ``count`` proposals; none while it waits for outcomes."""

    def recall(self, genomes: Sequence[Genome]) -> None:
        """Take in that the next proposals were these, as a log says; what `ask` would have left behind, is then the same.

        An algorithm whose proposals take long to work out can do better than to work them out again.

        Raises:
            JobError: it would not propose anything now.
        """
        proposals = self.ask(len(genomes))
        if len(proposals) < len(genomes):
            raise JobError(f"the log has a proposal where the algorithm {self.name} makes none")

    @abstractmethod
    def tell(self, outcome: Outcome) -> None:
        """Take in the outcome of one candidate."""


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm", "optimizer.algorithms")

A = TypeVar("A", bound=type[Algorithm])


def algorithm(name: str) -> Callable[[A], A]:
    """Register an algorithm under ``name``: ``@algorithm("random")``."""

    def decorate(cls: A) -> A:
        cls.name = name
        ALGORITHMS.register(name)(cls)
        return cls

    return decorate


def parse_options(spec: AlgorithmSpec, field: str = "algorithm") -> tuple[type[Algorithm], Strict]:
    """Find the algorithm a spec names and validate its options; raises `InvalidInput` naming the field below ``field``."""
    cls = ALGORITHMS.find(spec.name, f"{field}.name")
    try:
        return cls, cls.Options.model_validate(spec.options)
    except ValidationError as error:
        raise from_validation(error, f"{field}.options") from error


@dataclass
class Generation:
    """Outcomes of a generation under way, for algorithms that learn only from whole generations.

    Attributes:
        size: number of its own candidates.
        outcomes: those told so far.
    """

    size: int
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> bool:
        """Add an own outcome; return whether the generation is complete now."""
        self.outcomes.append(outcome)
        return len(self.outcomes) == self.size


def ranked_losses(outcomes: Sequence[Outcome], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return one finite number for each outcome, shape (outcomes,), to minimise.

    Feasible outcomes keep their weighted sum of losses. Those that violate constraints follow, ordered by violation, and
    failed ones (also NaN and infinite losses) come last; both lie above the worst feasible one by multiples of the
    feasible spread, so that they carry order but no scale of their own.
    """
    finite = [o.losses is not None and bool(np.isfinite(o.losses).all()) for o in outcomes]
    scores = np.array(
        [
            float(o.losses @ weights) if ok and o.losses is not None else np.inf
            for o, ok in zip(outcomes, finite, strict=True)
        ]
    )
    feasible = np.array([o.feasible for o in outcomes], dtype=bool)
    if feasible.all():
        return scores
    worst = scores[feasible].max() if feasible.any() else 0.0
    spread = max(np.ptp(scores[feasible]), 1e-12) if feasible.any() else 1.0
    behind = sorted(
        np.flatnonzero(~feasible),
        key=lambda i: (not finite[i], outcomes[i].violation, outcomes[i].index),
    )
    for place, i in enumerate(behind, start=1):
        scores[i] = worst + spread * place
    return scores
