"""M2N2 on tables and by hand; what every algorithm must do on boxes is in the conformance suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.algorithms import Outcome
from optimizer.algorithms.m2n2 import M2n2
from optimizer.errors import InvalidInput
from optimizer.space import MergeSpace
from optimizer.tables import TableSpace
from tests.optimizer.algorithms.archives import accuracy, job, judge, make
from tests.optimizer.algorithms.driving import (
    Ask,
    Case,
    Log,
    drive,
    make_context,
    outcomes_of,
    proposals_of,
    reals,
    replay,
)

TABLES = [
    Case("m2n2"),
    Case("m2n2", {"cuts": "layers", "archive": 5}),
    Case("m2n2", {"cuts": "none"}),
    Case("m2n2", {"mixing": "linear", "alpha": 0.0, "attraction": False}),
    Case("map_elites"),
    Case("map_elites", {"cuts": "tensors", "descriptors": "items"}),
    Case("cycle_qd", {"representation": "table"}),
]


def warm(space: Any) -> list[Any]:
    return [space.adopt(start.recipe) for start in space.warm_starts(job(Case("m2n2"))[0])]


@pytest.mark.parametrize("case", TABLES, ids=str)
class TestOnTables:
    @pytest.mark.parametrize(("window", "seeded"), [(1, True), (7, False), (64, True)])
    def test_replays_at_every_prefix(self, case: Case, window: int, seeded: bool) -> None:
        algorithm, space = make(case, parallel=window)
        foreign = warm(space) if seeded else [space.uniform()]
        log = drive(algorithm, judge(space), 90, window=window, foreign=foreign, every=13)
        assert len(proposals_of(log)) == 90
        for end in range(0, len(log), 27):
            replay(make(case, parallel=window)[0], log[: end + 1])

    def test_every_proposal_is_a_recipe_that_comes_back(self, case: Case) -> None:
        algorithm, space = make(case)
        for proposal in proposals_of(drive(algorithm, judge(space), 60, foreign=warm(space))):
            genome = space.clip(proposal.genome)
            again = space.adopt(space.recipe(genome))
            assert again is not None and again.tolist() == genome.tolist()

    def test_survives_every_kind_of_outcome(self, case: Case) -> None:
        algorithm, space = make(case, parallel=3)
        fair = judge(space)

        def evaluate(index: int, genome: Any, own: bool) -> Outcome:
            found = fair(index, genome, own)
            kind = index % 6 if own else 5
            if kind == 0:
                return Outcome(index, genome, None, own=own)
            if kind == 1:
                return Outcome(index, genome, np.full(2, np.nan), own=own, gains=found.gains)
            if kind == 2:
                return Outcome(index, genome, found.losses, 0.5, own, found.gains)
            if kind == 3:
                return Outcome(index, genome, found.losses, own=own)
            if kind == 4:
                return Outcome(index, genome, found.losses, own=own, gains=found.gains, items=3)
            return found

        log = drive(algorithm, evaluate, 120, foreign=warm(space), every=10)
        told = [outcome.index for outcome in outcomes_of(log) if outcome.own and outcome.index % 6 != 5]
        allowed = {3} if case.name != "m2n2" else set()
        bred = {parent for proposal in proposals_of(log) for parent in proposal.parents}
        assert not {index for index in bred & {*told} if index % 6 not in allowed}
        replay(make(case, parallel=3)[0], log)

    def test_a_long_run_of_failures(self, case: Case) -> None:
        algorithm, space = make(case)
        log = drive(algorithm, lambda index, genome, own: Outcome(index, genome, None, own=own), 80)
        assert len({space.recipe(proposal.genome).fingerprint for proposal in proposals_of(log)}) > 20


LATE = [int(item % 8 >= 4) for item in range(40)]
"""The items that look at late layers, for MAP-Elites, which has to be told what is of a kind."""


@pytest.mark.parametrize("case", [Case("m2n2"), Case("map_elites", {"item_groups": LATE})], ids=["m2n2", "map_elites"])
def test_finds_what_no_constant_merge_has(case: Case) -> None:
    """The objective wants other experts early than late: constant merges get half of the items right at most."""
    algorithm, space = make(case, objectives=1)
    evaluate = judge(space, 1)
    log = drive(algorithm, evaluate, 600, foreign=warm(space))
    first = max(accuracy(outcome) for outcome in outcomes_of(log)[:4])
    best = max(accuracy(outcome) for outcome in outcomes_of(log))
    assert first <= 0.5 and best >= 0.8


class TestArchive:
    def told(self, rows: Sequence[Sequence[float]], **options: Any) -> M2n2:
        algorithm = M2n2(make_context(reals(2)), M2n2.Options(**options))
        for index, row in enumerate(rows):
            gains = np.array(row, dtype=np.float32)
            genome = np.array([0.1 * index, 0.0])
            algorithm.tell(Outcome(index, genome, np.array([-gains.mean()]), own=False, gains=(gains,)))
        return algorithm

    def parents(self, algorithm: M2n2, count: int = 400) -> list[tuple[int, ...]]:
        return [proposal.parents for proposal in algorithm.ask(count)]

    def test_the_least_fit_leaves(self) -> None:
        """The specialist stays though two others are better on the mean: they share their reward."""
        rows: list[list[float]] = [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]]
        shared = {parent for pair in self.parents(self.told(rows, archive=3)) for parent in pair}
        assert shared == {0, 1, 2}
        plain = self.told([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 0]], archive=3, alpha=0.0)
        assert {parent for pair in self.parents(plain) for parent in pair} == {0, 1, 3}

    def test_the_second_parent_does_well_where_the_first_does_not(self) -> None:
        rows: list[list[float]] = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
        pairs = self.parents(self.told(rows))
        assert {pair[1] for pair in pairs if pair[0] == 0} == {2}
        assert {pair[1] for pair in pairs if pair[0] == 1} == {0, 2}

    def test_who_is_best_everywhere_mates_by_fitness(self) -> None:
        pairs = self.parents(self.told([[1, 1, 1], [0, 1, 1], [1, 0, 0]]))
        seconds = [pair[1] for pair in pairs if pair[0] == 0]
        assert {*seconds} == {1, 2} and seconds.count(1) > seconds.count(2)

    def test_with_no_right_answer_at_all_parents_are_drawn_evenly(self) -> None:
        pairs = self.parents(self.told([[0, 0], [0, 0], [0, 0]]))
        assert len({pair for pair in pairs if len(pair) == 2}) == 6

    def test_without_attraction_both_are_drawn_by_fitness(self) -> None:
        rows = [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
        assert {*self.parents(self.told(rows, attraction=False))} == {(0, 1), (1, 0)}
        alone = self.parents(self.told(rows, attraction=False, duplicates=True))
        assert {*alone} == {(0,), (0, 1), (1, 0), (1,)}

    def test_places_that_are_not_filled_are_never_drawn(self) -> None:
        pairs = self.parents(self.told([[1, 0], [0, 1]], archive=50))
        assert {*pairs} == {(0, 1), (1, 0)}

    def test_who_does_not_get_in_leaves_nothing_behind(self) -> None:
        rows: list[list[float]] = [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
        refused = self.told([*rows, [0, 1, 0, 0]], archive=3)
        assert self.parents(refused) == self.parents(self.told(rows, archive=3))

    def test_the_same_candidate_enters_once(self) -> None:
        algorithm = self.told([[1, 0], [0, 1]])
        gains = np.array([1, 0], dtype=np.float32)
        for index in range(2, 30):
            algorithm.tell(Outcome(index, np.zeros(2), np.array([-0.5]), gains=(gains,)))
        assert {parent for pair in self.parents(algorithm) for parent in pair} == {0, 1}

    def test_copies_may_crowd_out_the_others(self) -> None:
        """Without competition nothing stops the copies of the better one; with it they share what it earns."""
        row = np.array([1, 1, 0], dtype=np.float32)
        for alpha, left in ((0.0, {2, 3, 4}), (1.0, {1, 3, 4})):
            algorithm = self.told([[1, 1, 0], [0, 0, 1]], archive=3, alpha=alpha, duplicates=True, attraction=False)
            for index in range(2, 5):
                algorithm.tell(Outcome(index, np.zeros(2), np.array([-0.66]), gains=(row,)))
            assert {parent for pair in self.parents(algorithm) for parent in pair} == left

    def test_other_numbers_of_items_do_not_enter(self) -> None:
        algorithm = self.told([[1, 0], [0, 1]])
        algorithm.tell(Outcome(5, np.ones(2), np.array([-1.0]), gains=(np.ones(3, dtype=np.float32),)))
        assert {parent for pair in self.parents(algorithm) for parent in pair} == {0, 1}

    def test_generations_are_archives_of_proposals(self) -> None:
        algorithm = self.told([[1, 0], [0, 1]], archive=4)
        assert [proposal.generation for proposal in algorithm.ask(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]


class TestInFlight:
    def test_proposals_depend_on_what_was_told_only(self) -> None:
        """Any number in flight: the fold over asks and tells is all there is."""
        case = Case("m2n2")
        algorithm, space = make(case, parallel=8)
        log: Log = drive(algorithm, judge(space), 80, window=8, foreign=warm(space))
        assert max(entry.count for entry in log if isinstance(entry, Ask)) > 1
        replay(make(case, parallel=8)[0], log)


class TestSpaces:
    def test_tables_by_default(self) -> None:
        assert isinstance(make(Case("m2n2"))[1], TableSpace)
        assert isinstance(make(Case("m2n2", {"representation": "coefficients"}))[1], MergeSpace)
        assert isinstance(make(Case("cycle_qd"))[1], MergeSpace)

    @pytest.mark.parametrize(
        ("options", "merge", "field"),
        [
            ({"mutation": 0.01}, {}, "algorithm.options.mutation"),
            ({"crossover": False}, {}, "algorithm.options.crossover"),
            (
                {"crossover": False, "mutation": 0.0, "representation": "coefficients"},
                {},
                "algorithm.options.crossover",
            ),
            ({}, {"operator": "ties"}, "merge.operator"),
        ],
    )
    def test_what_it_cannot_search(self, options: dict[str, Any], merge: dict[str, Any], field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            make(Case("m2n2", options), **merge)
        assert caught.value.field == field and caught.value.remedy

    def test_other_operators_are_searched_by_coefficients(self) -> None:
        algorithm, space = make(Case("m2n2", {"representation": "coefficients"}), operator="ties")
        assert space.recipe(algorithm.ask(1)[0].genome).root

    @pytest.mark.parametrize(
        ("options", "cuts"),
        [
            ({}, "parameters"),
            ({"cuts": "tensors"}, "tensors"),
            ({"cuts": "none"}, "layers"),
            ({"mixing": "linear"}, None),
            ({"representation": "coefficients"}, None),
        ],
    )
    def test_says_which_inner_products_it_needs(self, options: dict[str, Any], cuts: str | None) -> None:
        assert M2n2.cuts(M2n2.Options(**options)) == cuts


class TestScaling:
    def tables(self, scaling: float, **merge: Any) -> list[NDArray[np.float64]]:
        case = Case("m2n2", {"mixing": "linear", "scaling": scaling})
        algorithm, space = make(case, **merge)
        log = drive(algorithm, judge(space), 60, foreign=warm(space))
        assert isinstance(space, TableSpace)
        return [space.table(proposal.genome).coefficients for proposal in proposals_of(log)]

    def test_children_lie_further_from_the_base_or_nearer(self) -> None:
        found = self.tables(0.3)
        for table in found:
            np.testing.assert_allclose(table.sum(axis=1), 1.0, atol=1e-9)
        sums = np.concatenate([table[:, 1:].sum(axis=1) for table in found])
        assert sums.max() > 1.3 and sums.min() < 0.8

    def test_without_they_stay_among_the_models_as_published(self) -> None:
        assert all(table.min() >= -1e-9 and table.max() <= 1 + 1e-9 for table in self.tables(0.0))
