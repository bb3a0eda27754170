"""Tables against the vectors that they stand for, on random models."""

from __future__ import annotations

import base64
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, make_layout
from optimizer.problem import Grams, Problem
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe, Selector
from optimizer.space import make_space
from optimizer.spec import JobSpec
from optimizer.tables import (
    GramSums,
    Table,
    TableSpace,
    cut_edges,
    linear_table,
    make_table_space,
    near,
    shared_breaks,
)
from tests.factories import make_problem, make_spec

Vector = NDArray[np.float64]
NAMES = ("base", "language", "polarity")
LAYOUT = make_layout(
    [
        ("embed_tokens.weight", (5, 3), "F32"),
        ("norm.weight", (4,), "F32"),
        *((f"layers.{layer}.{kind}.weight", (3, 2), "F32") for layer in range(11) for kind in ("self_attn", "mlp")),
    ]
)
SIZE = 15 + 4 + 11 * 2 * 6
BASE, ONE, TWO = (Leaf(model=name) for name in NAMES)


def models(seed: int = 0) -> Vector:
    """Three models as flat vectors, the experts near the base."""
    random = np.random.default_rng(seed)
    base = random.normal(size=SIZE)
    return np.array([base, *(base + 0.3 * random.normal(size=SIZE) for _ in NAMES[1:])])


def vector(table: Table, weights: Vector) -> Vector:
    each = np.repeat(table.coefficients, np.diff([0, *table.breaks, SIZE]), axis=0)
    return np.asarray((each.T * weights).sum(axis=0))


def merged(node: Leaf | Merge, weights: Vector, layout: Layout = LAYOUT) -> Vector:
    """What a recipe's node means, element by element."""
    if isinstance(node, Leaf):
        return np.asarray(weights[NAMES.index(node.model)])
    base, *inputs = (merged(child, weights, layout) for child in (node.base, *node.inputs))
    out = base.copy()
    begin = 0
    for tensor in layout.flat:
        for place in range(begin, begin + prod(tensor.shape)):
            row = node.row(tensor) if node.groups else int(np.searchsorted(node.breaks or [], place, side="right"))
            if row is None:
                continue
            given = np.array(node.coefficients[row])
            if node.operator == "linear" and node.options.get("normalise", True):
                given = given / given.sum()
            values = np.array([each[place] for each in inputs])
            out[place] = given @ values + (1 - given.sum()) * base[place] * (node.operator != "linear")
        begin += prod(tensor.shape)
    return out


def recipe(root: Leaf | Merge, **more: Any) -> Recipe:
    return Recipe(models=problem().models, root=root, **more)


def problem(spec: JobSpec | None = None, **changes: Any) -> Problem:
    return make_problem(spec or make_spec()).model_copy(update={"layout": LAYOUT, **changes})


def space(**merge: Any) -> TableSpace:
    spec = make_spec(merge={"operator": "task_arithmetic", **merge})
    return make_table_space(spec, problem(spec))


@st.composite
def tables(draw: st.DrawFn) -> Table:
    breaks = sorted(draw(st.sets(st.integers(1, SIZE - 1), max_size=12)))
    rows = draw(
        st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=len(breaks) + 1, max_size=len(breaks) + 1)
    )
    return Table(np.array(breaks, np.int64), np.array(rows))


@st.composite
def nodes(draw: st.DrawFn, depth: int = 2) -> Leaf | Merge:
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from([BASE, ONE, TWO]))
    operator = draw(st.sampled_from(["linear", "task_arithmetic"]))
    inputs = draw(st.lists(nodes(depth=depth - 1), min_size=1, max_size=2))
    groups = breaks = None
    if draw(st.booleans()):
        groups = draw(
            st.sampled_from([GROUPS, [Selector()], [Selector(modules=["attention"]), Selector(positions=[10])]])
        )
        rows = len(groups)
    else:
        breaks = sorted(draw(st.sets(st.integers(1, SIZE - 1), max_size=5)))
        rows = len(breaks) + 1
    row = st.lists(st.floats(0.1, 1), min_size=len(inputs), max_size=len(inputs))
    return Merge(
        operator=operator,
        options=draw(st.sampled_from([{}, {"normalise": False}])) if operator == "linear" else {},
        base=draw(nodes(depth=depth - 1)),
        inputs=inputs,
        groups=groups,
        breaks=breaks,
        coefficients=draw(st.lists(row, min_size=rows, max_size=rows)),
    )


GROUPS = [
    Selector(positions=["input"]),
    *(Selector(positions=[layer], modules=[kind]) for layer in range(11) for kind in ("attention", "mlp")),
    Selector(positions=["output"]),
]


class TestTable:
    @given(table=tables())
    def test_comes_back_from_its_genome(self, table: Table) -> None:
        found = Table.decode(table.encode(), 3, SIZE)
        assert found.breaks.tolist() == table.breaks.tolist()
        assert found.coefficients.tolist() == table.coefficients.tolist()

    @given(table=tables())
    def test_simplifying_changes_no_weight(self, table: Table) -> None:
        repeated = Table(table.breaks, table.coefficients // 1)
        simple, weights = repeated.simplified(), models()
        assert (vector(simple, weights) == vector(repeated, weights)).all()
        assert (simple.coefficients[1:] != simple.coefficients[:-1]).any(axis=1).all()

    @pytest.mark.parametrize(
        "genome",
        [
            [],
            [0.0],
            [1.0, 0.5, 0.5],
            [1.5, 0, 0, 0],
            [np.nan, 0, 0, 0],
            [1.0, np.nan, 0, 0],
            [2.0, 0.0, 1, 2, 3, 4, 5, 6],
            [2.0, 2.5, 1, 2, 3, 4, 5, 6],
            [2.0, float(SIZE), 1, 2, 3, 4, 5, 6],
            [3.0, 9.0, 9.0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            [1e300, 0, 0, 0],
        ],
    )
    def test_other_vectors_are_refused(self, genome: list[float]) -> None:
        with pytest.raises(InvalidInput, match="is no table") as caught:
            Table.decode(np.array(genome), 3, SIZE)
        assert caught.value.field == "genome"


class TestRecipes:
    @given(node=nodes())
    @settings(max_examples=60, deadline=None)
    def test_every_linear_recipe_is_a_table(self, node: Leaf | Merge) -> None:
        weights = models()
        table = linear_table(recipe(node), LAYOUT)
        assert table is not None
        np.testing.assert_allclose(vector(table, weights), merged(node, weights), rtol=1e-12, atol=1e-12)

    @given(table=tables())
    def test_a_table_comes_back_from_its_recipe(self, table: Table) -> None:
        found = space()
        again = found.adopt(found.recipe(table.encode()))
        assert again is not None
        assert again.tolist() == table.simplified().encode().tolist()

    def test_a_recipe_is_canonical(self) -> None:
        table = Table(np.array([7, 20]), np.array([[0.0, 0.5, 0], [0.0, 0.5, 0], [0.0, 0.25, 0]]))
        root = space().recipe(table.encode()).root
        assert root == Merge(
            operator="linear",
            options={"normalise": False},
            base=BASE,
            inputs=[ONE],
            breaks=[20],
            coefficients=[[0.5], [0.25]],
        )

    def test_nothing_at_all_is_a_recipe_too(self) -> None:
        root = space().recipe(Table.constant([0, 0, 0]).encode()).root
        assert isinstance(root, Merge) and (root.inputs, root.coefficients) == ([BASE], [[0.0]])

    @pytest.mark.parametrize(
        "node",
        [
            Leaf(model="language", layer=2),
            Merge(operator="ties", base=BASE, inputs=[ONE], breaks=[], coefficients=[[1.0]]),
            Merge(operator="linear", base=BASE, inputs=[ONE, TWO], breaks=[], coefficients=[[1.0, -1.0]]),
            Merge(operator="linear", base=BASE, inputs=[ONE, TWO], breaks=[], coefficients=[[1.0]]),
            Merge(operator="linear", base=BASE, inputs=[ONE], breaks=[SIZE], coefficients=[[1.0], [1.0]]),
            Merge(operator="task_arithmetic", options={"x": 1}, base=BASE, inputs=[ONE], breaks=[], coefficients=[[1]]),
            Merge(
                operator="linear", base=BASE, inputs=[Leaf(model="polarity", layer=1)], breaks=[], coefficients=[[1.0]]
            ),
        ],
    )
    def test_what_is_no_table(self, node: Leaf | Merge) -> None:
        assert linear_table(recipe(node), LAYOUT) is None
        assert space().adopt(recipe(node)) is None

    def test_a_layer_plan_is_no_table(self) -> None:
        assert linear_table(recipe(ONE, layers=[PlannedLayer(layer=0)]), LAYOUT) is None

    def test_columns_are_in_the_order_wanted(self) -> None:
        table = linear_table(recipe(ONE), LAYOUT, ["polarity", "language"])
        assert table is not None and table.coefficients.tolist() == [[0.0, 1.0]]
        assert linear_table(recipe(ONE), LAYOUT, ["polarity"]) is None


class TestNear:
    @given(table=tables())
    def test_means_over_parameters(self, table: Table) -> None:
        each = np.repeat(table.coefficients, np.diff([0, *table.breaks, SIZE]), axis=0)
        owner = np.concatenate([np.full(prod(t.shape), tensor_group(t.name)) for t in LAYOUT.flat])
        wanted = np.array([each[owner == group].mean(axis=0) for group in range(len(GROUPS))])
        np.testing.assert_allclose(near(table, GROUPS, LAYOUT), wanted, rtol=1e-12, atol=1e-12)

    def test_what_is_constant_in_groups_stays(self) -> None:
        spec = make_spec(merge={"operator": "task_arithmetic", "granularity": {"layers": "each"}})
        merges = make_space(spec, problem(spec))
        genome = np.random.default_rng(0).uniform(size=merges.dim)
        found = merges.recipe(genome)
        table = linear_table(found, LAYOUT)
        assert table is not None and isinstance(found.root, Merge) and found.root.groups
        np.testing.assert_allclose(near(table, found.root.groups, LAYOUT)[:, 1:].ravel(), genome, rtol=1e-12)


def tensor_group(name: str) -> int:
    tensor = next(tensor for tensor in LAYOUT.flat if tensor.name == name)
    return next(number for number, group in enumerate(GROUPS) if group.matches(tensor))


class TestGeometry:
    def test_the_flat_vector_runs_from_input_to_output(self) -> None:
        positions = [tensor.position for tensor in LAYOUT.flat]
        assert positions == ["input", *(layer for layer in range(11) for _ in range(2)), "output"]
        assert LAYOUT.offsets()["layers.10.mlp.weight"] == 15 + 20 * 6 and LAYOUT.size == SIZE

    def test_edges(self) -> None:
        layers = [0, *range(15, 15 + 12 * 12, 12), SIZE]
        assert cut_edges(LAYOUT, "layers") == layers
        assert cut_edges(LAYOUT, "tensors") == sorted({*layers, *range(15, 15 + 22 * 6, 6)})

    @given(a=tables(), b=tables(), seed=st.integers(0, 99))
    @settings(deadline=None)
    def test_angles_are_those_of_the_vectors(self, a: Table, b: Table, seed: int) -> None:
        weights = models(seed)
        x, y = vector(a, weights), vector(b, weights)
        found = GramSums(grams(weights, list(range(SIZE + 1)))).angle(a, b)
        if min(np.linalg.norm(x), np.linalg.norm(y)) < 1e-3:
            return
        u, v = x / np.linalg.norm(x), y / np.linalg.norm(y)
        wanted = 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-7)

    def test_small_angles_keep_their_digits(self) -> None:
        """Where arccos would return 0 or noise."""
        weights = models()
        sums = GramSums(grams(weights, cut_edges(LAYOUT, "tensors")))
        a, b = Table.constant([0, 1, 0]), Table.constant([0, 1, 1e-9])
        across = weights[2] - weights[1] * (weights[1] @ weights[2]) / (weights[1] @ weights[1])
        wanted = 1e-9 * np.linalg.norm(across) / np.linalg.norm(weights[1])
        assert sums.angle(a, b) == pytest.approx(wanted, rel=1e-5)
        assert sums.angle(a, a) == 0.0

    def test_breaks_within_ranges_count_evenly(self) -> None:
        weights = models()
        fine, coarse = (GramSums(grams(weights, edges)) for edges in (list(range(SIZE + 1)), [0, 60, SIZE]))
        a, b = Table(np.array([60]), np.eye(3)[[1, 2]]), Table(np.array([33]), np.eye(3)[[2, 1]])
        assert coarse.angle(a, Table.constant([0, 1, 0])) == pytest.approx(fine.angle(a, Table.constant([0, 1, 0])))
        assert coarse.angle(a, b) == pytest.approx(fine.angle(a, b), rel=0.1)

    def test_a_zero_vector_has_no_angle(self) -> None:
        sums = GramSums(grams(models(), [0, SIZE]))
        assert sums.angle(Table.constant([0, 0, 0]), Table.constant([1, 0, 0])) == 0.0

    def test_packed_products_are_small(self) -> None:
        found = grams(models(), [0, 10, SIZE])
        assert len(base64.b64decode(found.packed)) == 2 * 3 * 3 * 8

    @given(a=tables(), b=tables())
    def test_shared_breaks(self, a: Table, b: Table) -> None:
        found = shared_breaks(a, b, 5).tolist()
        assert found == sorted({*a.breaks.tolist(), *b.breaks.tolist(), 5})


def grams(weights: Vector, edges: list[int]) -> Grams:
    parts = [weights[:, begin:end] for begin, end in pairwise(edges)]
    return Grams.pack(edges, np.array([part @ part.T for part in parts]))


class TestSpace:
    def test_begins_with_the_mean_of_the_experts(self) -> None:
        found = space()
        assert found.table(found.uniform()).coefficients.tolist() == [[0, 0.5, 0.5]]
        assert found.dim == 0 and found.axes == ((), ())

    def test_warm_starts_have_genomes(self) -> None:
        starts = {start.label: start.genome for start in space().warm_starts(make_spec())}
        found = {name: genome[1:].tolist() for name, genome in starts.items() if genome is not None}
        assert found == {
            "base": [1, 0, 0],
            "language": [0, 1, 0],
            "polarity": [0, 0, 1],
            "uniform": [0, 0.5, 0.5],
        }

    def test_what_is_frozen_stays_the_bases(self) -> None:
        found, weights = space(frozen=["embeddings", "norm"]), models()
        genome = Table(np.array([50]), np.array([[0, 1.0, 0.5], [0, 0.5, 0.25]])).encode()
        assert found.clip(found.clip(genome)).tolist() == found.clip(genome).tolist()
        values = merged(found.recipe(genome).root, weights)
        np.testing.assert_array_equal(values[:15], weights[0, :15])
        np.testing.assert_array_equal(values[-4:], weights[0, -4:])
        np.testing.assert_allclose(values[15:50], (weights[1] + 0.5 * weights[2])[15:50], rtol=1e-14)
        for start in (found.uniform(), found.alone("language")):
            assert found.clip(start).tolist() == start.tolist()

    @pytest.mark.parametrize(
        ("merge", "field"),
        [
            ({"operator": "ties"}, "merge.operator"),
            ({"space": "layer_swap"}, "merge.space"),
            ({"modifiers": [{"operator": "prune", "target": "experts"}]}, "merge.modifiers"),
            ({"options": {"normalise": {"choices": [True, False]}}}, "merge.options.normalise"),
            ({"frozen": ["embeddings", "norm", "attention", "mlp"]}, "merge.frozen"),
        ],
    )
    def test_other_merges_are_refused(self, merge: dict[str, Any], field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            space(**merge)
        assert caught.value.field == field and caught.value.remedy
