"""Drives algorithms as a job does: proposals in flight, outcomes told in the order of the candidates."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms import ALGORITHMS, Algorithm, AlgorithmContext, Outcome, Proposal
from optimizer.space import Genome, SearchSpace, Variable

Evaluate = Callable[[int, Genome, bool], Outcome]


@dataclass(frozen=True)
class Case:
    """An algorithm with options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(str(value) for value in self.options.values())])

    def make(self, context: AlgorithmContext) -> Algorithm:
        cls = ALGORITHMS[self.name]
        return cls(context, cls.Options.model_validate(self.options))


def reals(dim: int, low: float = -0.5, high: float = 1.5) -> SearchSpace:
    return SearchSpace(tuple(Variable(f"x{number}", low, high) for number in range(dim)))


def mixed() -> SearchSpace:
    """Two real, two integer and two choice variables."""
    return SearchSpace(
        (
            Variable("a", 0.0, 1.0),
            Variable("b", -3.0, 2.0),
            Variable("few", 1.0, 3.0, "integer"),
            Variable("many", -20.0, 20.0, "integer"),
            Variable("switch", 0.0, 2.0, "choice", (False, True)),
            Variable("word", 0.0, 5.0, "choice", ("a", "b", "c", "d", "e")),
        )
    )


def make_context(
    space: SearchSpace, *, objectives: int = 1, seed: int = 3, parallel: int = 1, budget: int | None = 200
) -> AlgorithmContext:
    start = space.low + 0.4 * (space.high - space.low)
    return AlgorithmContext(space, np.ones(objectives), seed, start, parallel, budget)


@dataclass(frozen=True)
class Ask:
    count: int
    proposals: list[Proposal]


Log = list[Ask | Outcome]


def drive(
    algorithm: Algorithm,
    evaluate: Evaluate,
    count: int,
    *,
    window: int | None = None,
    foreign: Sequence[Genome] = (),
    every: int = 0,
) -> Log:
    """Run ``count`` own candidates, or as many as there are, and return every call with what came of it.

    Args:
        evaluate: from index, genome and whether it is the algorithm's own, to the outcome.
        window: most candidates in flight; the batch size by default.
        foreign: genomes told first, as warm starts are.
        every: with a number, the first of ``foreign`` is told again after so many own candidates, as users do.
    """
    log: Log = []
    flying: deque[Outcome] = deque()
    index = own = 0
    for genome in foreign:
        log.append(tell(algorithm, evaluate(index, genome, False)))
        index += 1
    while own < count or flying:
        room = min((window or algorithm.batch_size) - len(flying), count - own)
        proposals = algorithm.ask(room) if room > 0 else []
        assert len(proposals) <= max(room, 0)
        if not proposals and not flying:
            assert algorithm.stop_reason, f"{algorithm.name} waits although it has been told everything"
            break
        if proposals:
            log.append(Ask(room, proposals))
        for proposal in proposals:
            flying.append(evaluate(index, proposal.genome, True))
            index, own = index + 1, own + 1
            if every and own % every == 0:
                flying.append(evaluate(index, foreign[0], False))
                index += 1
        for _ in range(1 + len(flying) // 2):
            log.append(tell(algorithm, flying.popleft()))
            if not flying:
                break
    return log


def tell(algorithm: Algorithm, outcome: Outcome) -> Outcome:
    algorithm.tell(outcome)
    return outcome


def replay(algorithm: Algorithm, log: Log) -> None:
    """Put an algorithm through the same calls, and assert that it proposes the same, bit for bit."""
    for entry in log:
        if isinstance(entry, Outcome):
            algorithm.tell(entry)
        else:
            assert same(algorithm.ask(entry.count), entry.proposals)


def same(a: Sequence[Proposal], b: Sequence[Proposal]) -> bool:
    return [(p.genome.tobytes(), p.generation, p.parents) for p in a] == [
        (p.genome.tobytes(), p.generation, p.parents) for p in b
    ]


def proposals_of(log: Log) -> list[Proposal]:
    return [proposal for entry in log if isinstance(entry, Ask) for proposal in entry.proposals]


def outcomes_of(log: Log) -> list[Outcome]:
    return [entry for entry in log if isinstance(entry, Outcome)]


def best_loss(log: Log) -> float:
    return min(float(o.losses.sum()) for o in outcomes_of(log) if o.losses is not None and o.feasible)


def smooth(space: SearchSpace, objectives: int = 1) -> Callable[[Genome], NDArray[np.float64]]:
    """Weighted quadratics, one for each objective, with optima at 0.3, 0.4, … of the range."""
    weights = np.linspace(1.0, 3.0, space.dim)

    def losses(genome: Genome) -> NDArray[np.float64]:
        unit = (genome - space.low) / (space.high - space.low)
        return np.array([float(weights @ (unit - 0.3 - 0.1 * k) ** 2) / space.dim for k in range(objectives)])

    return losses


def clean(losses: Callable[[Genome], NDArray[np.float64]]) -> Evaluate:
    return lambda index, genome, own: Outcome(index, genome, losses(genome), own=own)


Trouble = Literal["failed", "nan", "infinite", "violating", "duplicate", "last bits"]


def troubled(losses: Callable[[Genome], NDArray[np.float64]]) -> Evaluate:
    """Every second outcome has some trouble or other."""
    troubles: Iterator[Trouble | None] = iter(())
    earlier: list[NDArray[np.float64]] = []

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        nonlocal troubles
        trouble = next(troubles, "start")
        if trouble == "start":
            kinds: list[Trouble] = ["failed", "nan", "infinite", "violating", "duplicate", "last bits"]
            troubles, trouble = iter([part for kind in kinds for part in (kind, None)]), None
        values = losses(genome)
        earlier.append(values)
        if trouble == "failed":
            return Outcome(index, genome, None, own=own)
        if trouble in ("nan", "infinite"):
            values = np.full_like(values, np.nan if trouble == "nan" else np.inf)
        if trouble == "duplicate":
            values = earlier[0]
        if trouble == "last bits":
            genome = np.nextafter(genome, 0.0)
        return Outcome(index, genome, values, 0.1 * (index % 5) if trouble == "violating" else 0.0, own)

    return evaluate
