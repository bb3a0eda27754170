"""Breeding against full vectors, competition for items by hand, and grids."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer.algorithms import AlgorithmContext, Outcome
from optimizer.errors import JobError
from optimizer.niches.breeding import (
    BoxBreeding,
    BreedingOptions,
    Mixing,
    Split,
    TableBreeding,
    make_breeding,
    slerp_weights,
)
from optimizer.niches.grid import Elite, Grid
from optimizer.niches.scores import Capacity, ItemScores, draw, item_gains
from optimizer.problem import Grams
from optimizer.space import SearchSpace, Variable
from optimizer.tables import Table, TableSpace, cut_edges, make_table_space
from tests.factories import make_problem, make_small_layout, make_spec
from tests.optimizer.algorithms.driving import mixed, reals

Vector = NDArray[np.float64]
LAYOUT = make_small_layout(11)  # 352 parameters
SIZE = LAYOUT.size


def models(seed: int, near: float) -> Vector:
    """A base and two experts as flat vectors, ``near`` being the share of what an expert has of its own."""
    random = np.random.default_rng(seed)
    base = random.normal(size=SIZE)
    return np.array([base, *(base + near * random.normal(size=SIZE) for _ in range(2))])


def grams(weights: Vector, edges: list[int]) -> Grams:
    parts = [weights[:, begin:end] for begin, end in pairwise(edges)]
    return Grams.pack(edges, np.array([part @ part.T for part in parts]))


def space(weights: Vector, edges: list[int] | None = None, **merge: Any) -> TableSpace:
    spec = make_spec(merge={"operator": "task_arithmetic", **merge})
    found = grams(weights, list(range(SIZE + 1)) if edges is None else edges)
    return make_table_space(spec, make_problem(spec, layers=11).model_copy(update={"grams": found}))


def vector(table: Table, weights: Vector) -> Vector:
    each = np.repeat(table.coefficients, np.diff([0, *table.breaks, SIZE]), axis=0)
    return np.asarray((each.T * weights).sum(axis=0))


def slerp_of_vectors(a: Vector, b: Vector, split: int, t: float) -> Vector:
    """The crossover as the paper's code has it, on full vectors."""
    angle = np.arccos(np.clip(a / np.linalg.norm(a) @ (b / np.linalg.norm(b)), -1, 1))
    weight = np.where(np.arange(len(a)) < split, t, 1 - t)
    if np.sin(angle) <= 1e-6:
        return np.asarray((1 - weight) * a + weight * b)
    return np.asarray((np.sin((1 - weight) * angle) * a + np.sin(weight * angle) * b) / np.sin(angle))


def distance(found: Vector, wanted: Vector) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


class TestTableBreeding:
    @given(seed=st.integers(0, 2**32 - 1), near=st.sampled_from([1e-3, 0.05, 1.0, 30.0]))
    @settings(max_examples=15, deadline=None)
    def test_two_hundred_generations_are_those_of_full_vectors(self, seed: int, near: float) -> None:
        """An archive of tables and one of vectors go through the same crossovers; each child replaces a member."""
        random = np.random.default_rng(seed)
        weights = models(seed, near)
        breeding = TableBreeding(space(weights), random)
        tables = [Table.constant(row) for row in np.eye(3)]
        vectors = list(weights)
        for _ in range(200):
            first, second = random.permutation(len(tables))[:2]
            split, t = int(random.integers(SIZE)), float(random.random())
            table = breeding.child(tables[first], tables[second], split, t)
            wanted = slerp_of_vectors(vectors[first], vectors[second], split, t)
            assert distance(vector(table, weights), wanted) < 1e-12
            if len(tables) < 8:
                tables.append(table)
                vectors.append(wanted)
            else:
                place = int(random.integers(8))
                tables[place], vectors[place] = table, wanted
        assert max(len(table.coefficients) for table in tables) > 50

    @given(split=st.integers(0, SIZE), t=st.floats(0, 1), seed=st.integers(0, 9))
    @settings(deadline=None)
    def test_linear_mixing_is_that_of_vectors(self, split: int, t: float, seed: int) -> None:
        weights = models(seed, 0.5)
        breeding = TableBreeding(space(weights), np.random.default_rng(0), mixing="linear")
        a, b = Table(np.array([100]), np.eye(3)[[1, 2]]), Table(np.array([77]), np.eye(3)[[2, 1]])
        weight = np.where(np.arange(SIZE) < split, t, 1 - t)
        wanted = (1 - weight) * vector(a, weights) + weight * vector(b, weights)
        np.testing.assert_allclose(vector(breeding.child(a, b, split, t), weights), wanted, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        ("cuts", "mixing"),
        [(cuts, mixing) for cuts in ("parameters", "tensors", "layers", "none") for mixing in ("slerp", "linear")],
    )
    def test_splits_lie_where_they_may(self, cuts: Split, mixing: Mixing) -> None:
        found = space(models(0, 0.5))
        breeding = TableBreeding(found, np.random.default_rng(0), mixing=mixing, cuts=cuts)
        children = [breeding.cross(found.alone("language"), found.alone("polarity")) for _ in range(300)]
        places = {int(place) for child in children for place in found.table(child).breaks}
        if cuts == "parameters":
            assert len(places) > 150
        else:
            assert places == ({*cut_edges(LAYOUT, cuts)[1:-1]} if cuts != "none" else set())

    def test_breaks_are_at_edges_of_the_inner_products(self) -> None:
        found = space(models(0, 0.5), [0, 17, 200, SIZE])
        breeding = TableBreeding(found, np.random.default_rng(0))
        children = [breeding.cross(found.alone("language"), found.alone("polarity")) for _ in range(50)]
        assert {int(place) for child in children for place in found.table(child).breaks} == {17, 200}

    def test_what_is_frozen_stays_the_bases(self) -> None:
        found = space(models(0, 0.5), frozen=["mlp"])
        breeding = TableBreeding(found, np.random.default_rng(0), sigma=0.1)
        child = breeding.mutate(breeding.cross(found.alone("language"), found.alone("polarity")))
        rows = np.repeat(
            found.table(child).coefficients, np.diff([0, *found.table(child).breaks.tolist(), SIZE]), axis=0
        )
        for tensor in LAYOUT.flat:
            begin = LAYOUT.offsets()[tensor.name]
            frozen = (rows[begin : begin + 16] == [1, 0, 0]).all()
            assert frozen == (tensor.kind == "mlp")

    def test_blends_are_means(self) -> None:
        found = space(models(0, 0.5))
        breeding = TableBreeding(found, np.random.default_rng(0))
        child = found.table(breeding.blend(found.alone("language"), found.alone("polarity"), 0.25))
        assert child.coefficients.tolist() == [[0, 0.75, 0.25]]

    def test_noise_scales_task_vectors(self) -> None:
        found = space(models(0, 0.5))
        breeding = TableBreeding(found, np.random.default_rng(0), cuts="layers", sigma=0.1)
        table = found.table(breeding.mutate(found.uniform()))
        assert table.breaks.tolist() == cut_edges(LAYOUT, "layers")[1:-1]
        np.testing.assert_allclose(table.coefficients.sum(axis=1), 1.0)
        assert 0.05 < table.coefficients[:, 1:].std() < 0.2

    def test_without_inner_products_there_is_no_angle(self) -> None:
        spec = make_spec()
        bare = make_table_space(spec, make_problem(spec))
        with pytest.raises(JobError, match="inner products"):
            TableBreeding(bare, np.random.default_rng(0)).fresh()
        assert TableBreeding(bare, np.random.default_rng(0), mixing="linear").fresh().size


class TestSlerpWeights:
    @given(angle=st.floats(0, 3.1), t=st.floats(0, 1))
    def test_children_of_unit_vectors_have_length_one(self, angle: float, t: float) -> None:
        a, b = slerp_weights(angle, t)
        length = np.sqrt(a * a + b * b + 2 * a * b * np.cos(angle))
        assert length == pytest.approx(1.0, abs=1e-9)

    def test_no_step_where_it_becomes_linear(self) -> None:
        above, below = slerp_weights(1.001e-6, 0.3), slerp_weights(0.999e-6, 0.3)
        assert above == pytest.approx(below, rel=1e-12)


class TestBoxBreeding:
    @given(seed=st.integers(0, 999))
    @settings(deadline=None)
    def test_children_are_slerps_of_the_coordinates(self, seed: int) -> None:
        random, twin = np.random.default_rng(seed), np.random.default_rng(seed)
        a, b = np.random.default_rng(seed + 1).uniform(-1, 1, (2, 30))
        breeding = BoxBreeding(reals(30, -9, 9), np.zeros(30), random)
        wanted = slerp_of_vectors(a, b, int(twin.integers(30)), float(twin.random()))
        assert distance(breeding.cross(a, b), wanted) < 1e-12

    def test_integers_and_choices_come_from_a_parent(self) -> None:
        box = mixed()
        breeding = BoxBreeding(box, box.low, np.random.default_rng(0))
        a = np.array([0.2, -1.0, 1.0, -7.0, 0.5, 2.5])
        b = np.array([0.9, 1.5, 3.0, 11.0, 1.5, 4.5])
        seen = np.array([breeding.cross(a, b)[2:] for _ in range(100)])
        assert ((seen == a[2:]) | (seen == b[2:])).all()
        assert (seen == a[2:]).any(axis=0).all() and (seen == b[2:]).any(axis=0).all()

    def test_mutants_move_every_number_a_little(self) -> None:
        box = reals(2000, -5, 5)
        breeding = BoxBreeding(box, box.low, np.random.default_rng(0), sigma=0.001)
        moved = breeding.mutate(np.zeros(2000))
        assert moved.std() == pytest.approx(0.01, rel=0.1)
        still = BoxBreeding(box, box.low, np.random.default_rng(0), sigma=0.0)
        assert not still.mutate(np.zeros(2000)).any()

    def test_discrete_mutants_differ(self) -> None:
        box = SearchSpace((Variable("n", 0, 1, "integer"), Variable("c", 0, 3, "choice", ("a", "b", "c"))))
        breeding = BoxBreeding(box, box.low, np.random.default_rng(0))
        found = np.array([breeding.mutate(np.array([1.0, 2.5])) for _ in range(300)])
        assert {*found[:, 0]} == {0.0, 1.0} and {*found[:, 1]} == {0.5, 1.5, 2.5}
        assert 0.3 < (found[:, 0] == 0).mean() < 0.7

    def test_children_stay_inside(self) -> None:
        box = reals(3, 0, 1)
        breeding = BoxBreeding(box, box.low, np.random.default_rng(0), sigma=0.5)
        outside = np.array([3.0, -2.0, 0.5])
        for child in (
            breeding.cross(outside, outside),
            breeding.mutate(outside),
            breeding.blend(outside, outside, 0.5),
        ):
            assert ((child >= 0) & (child <= 1)).all()

    def test_zero_vectors_are_mixed_linearly(self) -> None:
        breeding = BoxBreeding(reals(4), np.zeros(4), np.random.default_rng(0))
        assert np.isfinite(breeding.cross(np.zeros(4), np.ones(4))).all()


@pytest.mark.parametrize("representation", ["table", "coefficients"])
def test_the_space_decides_what_is_bred(representation: str) -> None:
    options = BreedingOptions(representation=cast(Any, representation))
    found: SearchSpace = space(models(0, 1.0)) if representation == "table" else reals(3)
    context = AlgorithmContext(found, np.ones(1), 0, np.zeros(3))
    breeding = make_breeding(context, options, context.generator())
    assert isinstance(breeding, TableBreeding if representation == "table" else BoxBreeding)


def scores(
    gains: Any, alpha: float = 1.0, capacity: Capacity = "auto", sizes: Any = None, weights: Any = None
) -> ItemScores:
    table = np.array(gains, dtype=np.float64)
    sizes = sizes or [table.shape[1]]
    return ItemScores(
        table, sizes, np.ones(len(sizes)) if weights is None else np.array(weights), alpha=alpha, capacity=capacity
    )


class TestItemScores:
    def test_right_answers_share_their_reward(self) -> None:
        """As in the paper's code: f_i = Σ_j S_ij / z_j; a third of each of three items here."""
        found = scores([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
        np.testing.assert_allclose(3 * found.fitness(), [0.5 + 1, 0.5, 0])
        np.testing.assert_allclose(3 * found.attraction(1), [1, 0, 0])
        np.testing.assert_allclose(3 * found.attraction(2), [1.5, 0.5, 0])

    def test_without_competition_fitness_is_the_mean(self) -> None:
        gains = np.random.default_rng(0).integers(0, 2, (5, 40))
        np.testing.assert_allclose(scores(gains, alpha=0.0).fitness(), gains.mean(axis=1))

    def test_strength_of_the_competition(self) -> None:
        np.testing.assert_allclose(scores([[1], [1], [1], [1]], alpha=0.5).fitness(), [0.5] * 4)

    def test_capacities_of_continuous_scores(self) -> None:
        gains = [[0.8, 0.2], [0.4, 0.2]]
        highest, one = scores(gains), scores(gains, capacity="one")
        scale = (0.8 + 0.2) / 2
        np.testing.assert_allclose(highest.scores, np.array(gains) / scale)
        np.testing.assert_allclose(2 * scale * highest.fitness(), [0.8 * 2 / 3 + 0.1, 0.8 / 3 + 0.1])
        np.testing.assert_allclose(2 * one.fitness(), [2 / 3 + 0.5, 1 / 3 + 0.5])
        np.testing.assert_allclose(scores([[1, 0], [1, 1]], capacity="max").fitness(), [0.25, 0.75])

    @given(
        gains=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=2, max_size=6),
        unit=st.floats(1e-3, 1e3),
    )
    def test_log_likelihoods_have_no_unit_and_keep_their_order(self, gains: list[list[float]], unit: float) -> None:
        table = np.round(np.array(gains), 3) - 2000.0
        found, other = scores(table), scores(unit * table)
        np.testing.assert_allclose(found.fitness(), other.fitness(), rtol=1e-6, atol=1e-9)
        assert (found.scores >= 0).all() and np.isfinite(found.fitness()).all()
        for item, column in zip(found.scores.T, table.T, strict=True):
            assert (np.diff(item[np.argsort(column)]) >= 0).all()

    def test_objectives_count_by_weight_not_by_items_or_unit(self) -> None:
        one = [[1, 0], [0, 1]]
        many = [[-300.0] * 10 + [-100.0] * 10, [-100.0] * 10 + [-300.0] * 10]
        table = np.hstack([one, many])
        found = scores(table, sizes=[2, 20], weights=[1.0, 1.0])
        np.testing.assert_allclose(found.fitness(), [1.0, 1.0])
        heavy = scores(np.hstack([[[1, 1], [0, 1]], many]), sizes=[2, 20], weights=[3.0, 1.0])
        np.testing.assert_allclose(heavy.fitness(), [3 * 0.75 + 0.5, 3 * 0.25 + 0.5])

    def test_losses_stand_for_missing_items(self) -> None:
        found = item_gains(Outcome(0, np.zeros(1), np.array([0.25, -3.0])))
        assert [part.tolist() for part in found] == [[-0.25], [3.0]]

    def test_draws_are_in_proportion(self) -> None:
        random = np.random.default_rng(0)
        counts = np.bincount([draw(random, np.array([0.0, 1, 3, 0])) for _ in range(4000)], minlength=4)
        assert counts[[0, 3]].tolist() == [0, 0] and counts[2] / counts[1] == pytest.approx(3, rel=0.1)
        even = np.bincount([draw(random, np.zeros(4)) for _ in range(4000)], minlength=4)
        assert even.min() > 900


def elite(index: int, quality: float, *descriptors: float) -> Elite:
    return Elite(index, np.array([float(index)]), quality, np.array(descriptors))


class TestGrid:
    def test_the_better_one_has_the_cell(self) -> None:
        grid = Grid(10, 2)
        told = [elite(0, 0.5, 0.51, 0.2), elite(1, 0.6, 0.58, 0.29), elite(2, 0.6, 0.55, 0.2), elite(3, 0.1, 0.7, 1.0)]
        assert [grid.add(each) for each in told] == [True, True, False, True]
        assert [each.index for each in grid] == [1, 3]
        assert grid.cell(np.array([1.0, 0.0])) == (9, 0)

    def test_a_wider_range_moves_the_elites(self) -> None:
        grid = Grid(10, 1)
        for number, value in enumerate((0.0, 0.11, 0.95)):
            grid.add(elite(number, value, value))
        assert len(grid) == 3
        grid.add(elite(9, -5.0, -9.0))
        assert [each.index for each in grid] == [2, 9]
        assert grid.cell(np.array([0.95])) == (9,) and grid.cell(np.array([-9.0])) == (0,)

    def test_no_descriptors_make_one_cell(self) -> None:
        grid = Grid(15, 0)
        assert grid.add(elite(0, 0.1)) and grid.add(elite(1, 0.2)) and not grid.add(elite(2, 0.15))
        assert [each.index for each in grid] == [1]
