"""How far experts may be moved: probes, what follows from them, and what CMA-ES makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.algorithms import Outcome
from optimizer.expert_scales import SMALLEST, STEP, Probes, expert_columns
from optimizer.space import Genome, MergeSpace, make_space
from tests.factories import make_problem, make_spec
from tests.optimizer.algorithms.driving import (
    Case,
    best_loss,
    drive,
    make_context,
    proposals_of,
    reals,
    replay,
)

CMA = Case("cma_es")
LAYERS = 6
NAMES = ("a", "b", "c", "stranger", "hot")
WANTED = np.array([0.6, 0.5, 0.4, 0.0, 0.0])
STEEP = np.array([1.0, 1.0, 1.0, 60.0, 400.0])


def space(names: tuple[str, ...] = NAMES, **merge: object) -> MergeSpace:
    spec = make_spec(
        experts=[{"name": name, "path": name} for name in names],
        merge={
            "operator": "task_arithmetic",
            "granularity": {"layers": "each"},
            "bounds": {"low": -0.25, "high": 1.25},
            **merge,
        },
        objectives=[make_spec().objectives[0].model_dump(mode="json") | {"head": names[0]}],
    )
    found = make_space(spec, make_problem(spec, layers=LAYERS))
    assert isinstance(found, MergeSpace)
    return found


def loss(genome: Genome) -> NDArray[np.float64]:
    table = genome.reshape(-1, len(NAMES))
    excess = (STEEP * (table - WANTED) ** 2).mean(axis=0)
    return np.array([float((3 * excess / (1 + excess)).sum())])  # strangers are as bad as can be soon


def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
    return Outcome(index, genome, loss(genome), own=own)


def warm(where: MergeSpace) -> list[Genome]:
    rows, cols = where.table
    return [np.zeros(where.dim), *(np.tile(row, rows) for row in np.eye(cols)), where.uniform()]


def test_columns_are_those_of_the_experts() -> None:
    where = space(options={"density": {"low": 0.1, "high": 1.0}}, operator="ties")
    columns = expert_columns(where)
    assert columns is not None and columns.tolist() == [*list(range(5)) * (where.dim // 5), -1]
    for number, variable in enumerate(where.variables[:-1]):
        assert variable.name.startswith(f"{NAMES[columns[number]]} @")
    assert expert_columns(reals(6)) is None
    assert expert_columns(space(operator="slerp", names=("a", "b"))) is not None


def test_probes_move_one_expert_each_inside_the_bounds() -> None:
    where = space()
    columns = expert_columns(where)
    assert columns is not None
    start = np.full(where.dim, 0.3)
    start[columns == 1] = where.high[0]
    probes = Probes(where, columns, start)
    assert len(probes.genomes) == 6 and np.array_equal(probes.genomes[0], start)
    for expert, genome in enumerate(probes.genomes[1:]):
        sign = -1 if expert == 1 else 1
        np.testing.assert_allclose(genome - start, np.where(columns == expert, sign * STEP * 1.5, 0.0), atol=1e-12)


def test_what_changes_the_loss_more_is_moved_less() -> None:
    where = space()
    columns = expert_columns(where)
    assert columns is not None
    probes = Probes(where, columns, np.full(where.dim, 0.3))
    losses = [1.0, 0.9, 1.1, 1.05, 1.4, 9.0]
    scales = probes.scales([genome + 1e-9 for genome in probes.genomes], losses)
    np.testing.assert_allclose(scales[:5], [1, 1, 1, 0.25, SMALLEST], atol=1e-12)
    assert np.array_equal(scales, np.tile(scales[:5], where.dim // 5))
    failed = probes.scales(probes.genomes[:4], losses[:4])
    np.testing.assert_allclose(failed[:5], [1, 1, 1, SMALLEST, SMALLEST])
    assert (probes.scales(probes.genomes[1:], losses[1:]) == 1).all()  # nothing to compare with
    assert (probes.scales(probes.genomes, [1.0] * 6) == 1).all()


@pytest.mark.parametrize("budget", [60, 200])
def test_strangers_do_not_keep_cma_es_at_the_best_expert(budget: int) -> None:
    where = space()
    context = make_context(where, budget=budget)
    found = {}
    for probe in (True, False):
        algorithm = Case("cma_es", {"probe_experts": probe}).make(context)
        found[probe] = best_loss(drive(algorithm, evaluate, budget, foreign=warm(where)))
    alone = min(float(loss(genome)[0]) for genome in warm(where))
    assert found[True] < 0.6 * alone
    assert found[True] < 0.7 * found[False]


def test_probes_come_first_and_replay() -> None:
    where = space()
    context = make_context(where, budget=60, parallel=4)
    log = drive(CMA.make(context), evaluate, 60, window=4, foreign=warm(where))
    proposals = proposals_of(log)
    assert [proposal.generation for proposal in proposals[:7]] == [0] * 6 + [1]
    assert np.ptp((proposals[1].genome - proposals[0].genome)[:: len(NAMES)]) == 0
    replay(CMA.make(context), log)


@pytest.mark.parametrize("budget", [1, 17])
def test_no_probes_where_the_budget_is_short(budget: int) -> None:
    algorithm = CMA.make(make_context(space(), budget=budget))
    assert algorithm.batch_size < 20
    first, second = algorithm.ask(2)
    assert np.count_nonzero(first.genome != second.genome) > 20


@pytest.mark.parametrize("failed", [range(11, 12), range(7, 13)])
def test_failed_probes_cost_only_themselves(failed: range) -> None:
    """A stranger's probe fails, or all of them do: candidates 7 to 12."""
    where = space()

    def failing(index: int, genome: Genome, own: bool) -> Outcome:
        return Outcome(index, genome, None if index in failed else loss(genome), own=own)

    log = drive(CMA.make(make_context(where)), failing, 100, foreign=warm(where))
    alone = min(float(loss(genome)[0]) for genome in warm(where))
    assert best_loss(log) < 0.7 * alone if len(failed) == 1 else best_loss(log) <= alone
    assert len({proposal.genome.tobytes() for proposal in proposals_of(log)}) == 100
