"""The random-forest search: mixed spaces, fidelities, and what failures cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.algorithms import Algorithm, AlgorithmContext, Outcome, Proposal
from optimizer.space import Genome, SearchSpace, Variable
from tests.optimizer.algorithms.driving import Case, best_loss, clean, drive, make_context, mixed, reals, smooth

ITEMS = 1000


def noisy(losses: NDArray[np.float64], items: int | None, random: np.random.Generator) -> NDArray[np.float64]:
    """Fewer items measure with an error that falls with their root."""
    error = 0.0 if items is None else 0.5 / np.sqrt(items)
    return losses + error * random.standard_normal(losses.shape)


def run(algorithm: Algorithm, space: SearchSpace, count: int, objectives: int = 1) -> list[tuple[Proposal, Outcome]]:
    losses, random = smooth(space, objectives), np.random.default_rng(0)
    out = []
    for index in range(count):
        proposal = algorithm.ask(1)[0]
        value = noisy(losses(proposal.genome), proposal.items, random)
        outcome = Outcome(index, proposal.genome, value, items=proposal.items)
        algorithm.tell(outcome)
        out.append((proposal, outcome))
    return out


def with_items(context: AlgorithmContext) -> AlgorithmContext:
    return replace(context, items=(ITEMS, 400))


def test_most_candidates_are_measured_on_few_items_and_the_best_on_all() -> None:
    space = reals(4)
    algorithm = Case("forest").make(with_items(make_context(space, budget=100)))
    log = run(algorithm, space, 100)
    counts = Counter(proposal.items for proposal, _ in log)
    assert set(counts) == {111, 333, None}
    assert counts[111] > counts[333] > counts[None]
    seen = {proposal.genome.tobytes() for proposal, _ in log if proposal.items == 111}
    assert any(proposal.items == 333 and proposal.genome.tobytes() in seen for proposal, _ in log)
    full = [float(outcome.losses[0]) for _, outcome in log if outcome.items is None and outcome.losses is not None]
    few = [float(outcome.losses[0]) for _, outcome in log if outcome.items == 111 and outcome.losses is not None]
    assert np.median(full) < np.median(few)


def test_successive_halving_begins_with_the_fewest_items_always() -> None:
    space = reals(3)
    case = Case("forest", {"hyperband": False, "items_min": 50, "eta": 4})
    log = run(case.make(with_items(make_context(space, objectives=2, budget=60))), space, 60, objectives=2)
    new = [proposal.items for proposal, _ in log]
    assert new[:4] == [62, 62, 62, 62] and 250 in new and Counter(new)[62] >= 3 * Counter(new)[250]


def test_everything_is_measured_in_full_where_items_are_few_or_unknown() -> None:
    space = reals(3)
    for items in ((), (120,)):
        algorithm = Case("forest").make(replace(make_context(space), items=items))
        assert all(proposal.items is None for proposal in algorithm.ask(10))


def test_outcomes_on_few_items_help_in_the_end() -> None:
    space = reals(4)
    log = run(Case("forest").make(with_items(make_context(space, budget=150))), space, 150)
    best = min(float(smooth(space)(proposal.genome)[0]) for proposal, _ in log if proposal.items is None)
    start = float(smooth(space)(make_context(space).start)[0])
    assert best < max(0.6 * start, 0.05)


@pytest.mark.slow
def test_chooses_among_choices() -> None:
    space = SearchSpace(
        (
            *(Variable(f"operator {k}", 0.0, 4.0, "choice", ("a", "b", "c", "d")) for k in range(8)),
            *(Variable(f"weight {k}", 0.0, 1.0) for k in range(4)),
        )
    )

    def losses(genome: Genome) -> NDArray[np.float64]:
        wrong = sum(int(genome[k]) != k % 4 for k in range(8))
        return np.array([wrong + float(((genome[8:] - 0.3) ** 2).sum())])

    def median(name: str) -> float:
        contexts = [make_context(space, seed=seed, budget=100) for seed in range(3)]
        return float(np.median([best_loss(drive(Case(name).make(each), clean(losses), 100)) for each in contexts]))

    assert median("forest") < 0.7 * median("random")


def test_keeps_away_from_what_fails() -> None:
    space = mixed()
    losses = smooth(space)

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        return Outcome(index, genome, None if genome[4] < 1 else losses(genome), own=own)

    log = drive(Case("forest", {"random_share": 0.0}).make(make_context(space)), evaluate, 60)
    late = [entry for entry in log if isinstance(entry, Outcome)][30:]
    assert sum(outcome.losses is None for outcome in late) < len(late) / 4
