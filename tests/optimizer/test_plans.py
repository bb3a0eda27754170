"""Layer plans from plain numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.geometry import make_layout
from optimizer.plans import Slice, additions, data_flow, ends, prune, scaled, stack, swap
from optimizer.recipe import Leaf, Merge, ModelId, PlannedLayer, Recipe, Selector
from optimizer.spec import ModelRef

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
MODELS = {name: ModelId(ref=ModelRef(path=name), digest=digit * 64) for name, digit in (("base", "a"), ("one", "b"))}
nodes = st.none() | st.builds(Leaf, model=st.sampled_from(sorted(MODELS)), layer=st.none() | st.integers(0, 9))
plans = st.lists(
    st.builds(PlannedLayer, layer=st.integers(0, 9), node=nodes, scale=st.floats(-2, 2)), min_size=1, max_size=6
)


def shown(plan: list[PlannedLayer]) -> list[tuple[str, int]]:
    return [(layer.node.model if isinstance(layer.node, Leaf) else "", layer.layer) for layer in plan]


def recipe(plan: list[PlannedLayer] | None) -> Recipe:
    return Recipe(models=MODELS, root=Leaf(model="one"), layers=plan)


@given(plans)
def test_plans_survive_json(plan: list[PlannedLayer]) -> None:
    first = recipe(plan)
    again = Recipe.parse(first.to_json())
    assert again == first and again.fingerprint == first.fingerprint


@given(plans, plans)
def test_fingerprints_tell_plans_apart(left: list[PlannedLayer], right: list[PlannedLayer]) -> None:
    def meaning(plan: list[PlannedLayer]) -> list[tuple[int, float, Leaf | Merge]]:
        return [(layer.layer, layer.scale + 0.0, layer.node or Leaf(model="one")) for layer in plan]

    same = meaning(left) == meaning(right)
    assert (recipe(left).fingerprint == recipe(right).fingerprint) is same


def test_a_plan_that_changes_nothing_has_another_fingerprint_than_none() -> None:
    assert recipe(swap(3, {})).fingerprint != recipe(None).fingerprint


def test_a_plan_needs_layers_and_finite_scales() -> None:
    for layers in ([], [{"layer": -1}], [{"layer": 0, "scale": math.nan}], [{"layer": 0, "scale": math.inf}]):
        with pytest.raises(InvalidInput) as caught:
            Recipe.parse(recipe(swap(1, {})).to_json() | {"layers": layers})
        assert str(caught.value.field).startswith("recipe.layers")


def test_plans_name_known_models() -> None:
    with pytest.raises(InvalidInput, match="does not list: two"):
        Recipe.parse({**recipe(None).to_json(), "layers": [{"layer": 0, "node": {"model": "two"}}]})


class TestStack:
    def test_lays_slices_on_each_other(self) -> None:
        plan = stack([Slice("one", 0, 2), Slice("base", 1, 3)])
        assert shown(plan) == [("one", 0), ("one", 1), ("base", 1), ("base", 2)]

    @pytest.mark.parametrize("part", [Slice("one", 2, 2), Slice("one", 3, 1), Slice("one", -1, 1)])
    def test_slices_have_layers(self, part: Slice) -> None:
        with pytest.raises(InvalidInput) as caught:
            stack([Slice("one", 0, 1), part])
        assert caught.value.field == "slices.1"

    def test_ends_take_the_input_from_one_model_and_the_output_from_another(self) -> None:
        assert ends("one", "one") == Leaf(model="one")
        node = ends("one", "base")
        assert isinstance(node, Merge)
        found = {}
        names = ("embed_tokens.weight", "layers.0.mlp.down_proj.weight", "lm_head.weight", "norm.weight")
        for tensor in make_layout([(name, (2, 2), "F32") for name in names]).shared:
            row = node.row(tensor)
            assert row is not None
            chosen = node.inputs[node.coefficients[row].index(1.0)]
            assert isinstance(chosen, Leaf) and sum(node.coefficients[row]) == 1.0
            found[tensor.position] = chosen.model
        assert found == {"input": "one", 0: "one", "output": "base"}


def test_swap_replaces_single_layers() -> None:
    merged = ends("base", "one")
    plan = swap(4, {1: "one", 3: merged})
    assert [layer.layer for layer in plan] == [0, 1, 2, 3]
    assert [layer.node for layer in plan] == [None, Leaf(model="one"), None, merged]
    with pytest.raises(InvalidInput, match="no layer 4"):
        swap(4, {4: "one"})


class TestPrune:
    def test_removes_selects_and_merges(self) -> None:
        candidates: list[list[str]] = [[], ["one"], ["one", "two"], ["two"], ["two", "one"]]
        plan = prune(5, {3}, candidates, factors=[1, 1, 0.3, 1, 0.7])
        assert [layer.layer for layer in plan] == [0, 1, 2, 4]
        assert [layer.node for layer in plan[:2]] == [Leaf(model="base"), Leaf(model="one")]
        assert plan[2].node == Merge(
            operator="task_arithmetic",
            base=Leaf(model="base"),
            inputs=[Leaf(model="one"), Leaf(model="two")],
            groups=[Selector()],
            coefficients=[[0.3, 0.3]],
        )
        last = plan[3].node
        assert isinstance(last, Merge) and last.coefficients == [[0.7, 0.7]]

    def test_without_candidates_the_rest_is_the_roots(self) -> None:
        assert prune(4, [0, 2]) == [PlannedLayer(layer=1), PlannedLayer(layer=3)]

    def test_something_must_be_left(self) -> None:
        with pytest.raises(InfeasibleCandidate, match="no layer is left"):
            prune(2, [0, 1])

    def test_bad_numbers(self) -> None:
        with pytest.raises(InvalidInput, match="no layer 7"):
            prune(4, [7])
        with pytest.raises(InvalidInput, match=r"candidates: 4 entries are needed"):
            prune(4, [], [[]])
        with pytest.raises(InvalidInput, match=r"factors: 4 entries are needed"):
            prune(4, [], None, [1.0])


class TestDataFlow:
    def test_the_indicator_picks_a_path_through_the_repeated_row(self) -> None:
        plan = data_flow(["base", "one"], 2, [1, 0, 0.2, -1, 0, 3, 0, 1])
        assert shown(plan) == [("base", 0), ("one", 0), ("base", 1), ("one", 1)]
        assert {layer.scale for layer in plan} == {1.0}

    def test_input_scales_belong_to_the_step_from_one_layer_to_the_next(self) -> None:
        inputs = [[10.0 * i + j + 1 for j in range(4)] for i in range(4)]
        path = [0, 2, 1, 3]
        plan = data_flow(["base", "one"], 2, [1, 0, 1, 0, 0, 1, 0, 1], inputs)
        steps = [inputs[i][j] for i, j in pairwise(path)]
        assert [layer.scale for layer in plan] == additions([1.0, *steps], "input")

    def test_lengths(self) -> None:
        for indicator in ([], [1.0] * 5):
            with pytest.raises(InvalidInput, match="no multiple of the 4 layers"):
                data_flow(["base", "one"], 2, indicator)
        for inputs in ([[1.0] * 4] * 3, [[1.0] * 3] * 4):
            with pytest.raises(InvalidInput, match="table of 4 × 4"):
                data_flow(["base", "one"], 2, [1] * 4, inputs)

    def test_infeasible_candidates(self) -> None:
        with pytest.raises(InfeasibleCandidate, match="no layer is left"):
            data_flow(["one"], 2, [0.0, -1.0])
        with pytest.raises(InfeasibleCandidate, match=r"scaled by -0.5 at depth 1"):
            data_flow(["one"], 2, [1, 1], [[1.0, -0.5], [1.0, 1.0]])


def normed(state: Array) -> Array:
    out: Array = state / np.sqrt(np.mean(state**2))
    return out


def run(weights: Array, adds: list[float], inputs: list[float], outputs: list[float]) -> Array:
    """A pre-norm model: each layer has two sub-layers; the hidden state is scaled before and after the layer."""
    state = np.linspace(-1.0, 2.0, weights.shape[-1])
    for layer, add, before, after in zip(weights, adds, inputs, outputs, strict=True):
        state = state * before
        for matrix in layer:
            state = state + add * np.tanh(matrix @ normed(state))
        state = state * after
    return normed(state)


@given(st.lists(st.floats(0.2, 3.0), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_scales_of_the_hidden_state_as_factors_of_additions(scales: list[float], seed: int) -> None:
    weights = np.random.default_rng(seed).normal(size=(len(scales), 2, 6, 6))
    ones = [1.0] * len(scales)
    for wanted, at in ((run(weights, ones, scales, ones), "input"), (run(weights, ones, ones, scales), "output")):
        found = run(weights, additions(scales, "input" if at == "input" else "output"), ones, ones)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_scales_multiply(factors: list[float]) -> None:
    plan = swap(len(factors), {})
    twice = scaled(scaled(plan, factors), factors)
    assert [layer.scale for layer in twice] == [factor * factor for factor in factors]
    assert scaled(plan, [1.0] * len(plan)) == plan
    with pytest.raises(InvalidInput, match="entries are needed"):
        scaled(plan, [*factors, 1.0])
    with pytest.raises(InfeasibleCandidate, match="scaled by inf"):
        scaled(plan, [math.inf] * len(plan))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_additions_need_positive_factors(bad: float) -> None:
    with pytest.raises(InfeasibleCandidate) as caught:
        additions([1.0, bad], "output")
    assert caught.value.field == "scales.1"


def test_additions_stay_numbers() -> None:
    for scales in ([1e300] * 4, [1e-300] * 4):
        with pytest.raises(InfeasibleCandidate, match="leaves the range"):
            additions(scales, "input")
    assert additions([], "output") == []
