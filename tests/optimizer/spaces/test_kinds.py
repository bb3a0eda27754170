"""What the genomes of each kind of search space mean."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.plans import additions, data_flow
from optimizer.recipe import Leaf, Merge, Recipe
from optimizer.space import Genome, JobSpace, MergeSpace, make_space
from optimizer.spaces.actions import ActionSpace
from optimizer.spaces.operators import OperatorSpace
from optimizer.spaces.prune import PruneSpace
from optimizer.spec import CandidateInput, parse_spec
from optimizer.structured import layers_of
from tests.jobs import write_job
from tests.optimizer.spaces.cases import Case, models, real_problem, real_space
from workers.prepare import prepare
from workers.roots import Roots

LAYERS = 4


def genome_of(space: JobSpace, **named: float) -> Genome:
    """A genome by the variables' names, in which ``_`` stands for a space."""
    known = [variable.name for variable in space.variables]
    genome = np.zeros(space.dim)
    for name, value in named.items():
        genome[known.index(name.replace("_", " "))] = value
    return space.clip(genome)


def stack(recipe: Recipe, space: JobSpace) -> list[tuple[int, str]]:
    """Layer and model at each depth; merges as their operator's name."""
    found = []
    for entry in layers_of(recipe, space.problem):
        node = recipe.root if entry.node is None else entry.node
        found.append((entry.layer, node.model if isinstance(node, Leaf) else node.operator))
    return found


class TestOperators:
    def test_the_papers_variables(self) -> None:
        granularity = {"layers": "groups", "group_size": 2, "modules": [["attention"], ["mlp"]]}
        space = real_space(Case("operators", merge={"granularity": granularity}))
        names = [variable.name for variable in space.variables]
        short = ["operator", "linear one", "linear two", "task_arithmetic coefficient", "ties scale", "ties density"]
        assert [name.split(" @ ")[0] for name in names[:8]] == [*short, "slerp one", "slerp two"]
        assert names[8].startswith("operator @ layers 0-1 · attention")
        assert space.dim == 8 * len(space.axes[0])  # an operator, 2 + 1 + 2 + 2 floats in every group

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_each_group_is_merged_by_its_own_operator_alone(self, seed: int) -> None:
        case = Case("operators")
        space, engine = real_space(case), models("llama")[2]
        random = np.random.Generator(np.random.PCG64(seed))
        genome = space.low + random.random(space.dim) * (space.high - space.low)
        recipe = space.recipe(genome)
        groups = space.axes[0]
        width = space.dim // len(groups)
        for number in range(len(groups)):  # the same row everywhere is one operator without any chain
            alone = space.recipe(np.tile(genome[number * width : (number + 1) * width], len(groups)))
            assert isinstance(alone.root, Merge) and all(isinstance(child, Leaf) for child in alone.root.inputs)
            assert isinstance(space, OperatorSpace)
            for tensor in models("llama")[1].shared:
                if space.groups[number].matches(tensor):
                    assert torch.equal(engine.merged(recipe, tensor), engine.merged(alone, tensor)), tensor.name

    def test_operators_never_see_each_other(self) -> None:
        """Nodes are relative to the base itself, and stand behind each other with disjoint groups."""
        space = real_space(Case("operators"))
        width = space.dim // len(space.axes[0])
        genome = space.uniform()
        genome[::width] = np.arange(len(space.axes[0])) % 4 + 0.5
        node: Leaf | Merge = space.recipe(genome).root
        seen: list[str] = []
        operators = []
        while isinstance(node, Merge):
            inner = node.inputs[0] if isinstance(node.inputs[0], Merge) else node
            assert isinstance(inner, Merge) and (inner.base == Leaf(model="base"))
            operators.append(inner.operator)
            seen += [group.label for group in inner.groups or ()]
            node = node.base
        assert sorted(operators) == ["linear", "slerp", "task_arithmetic", "ties"]
        assert sorted(seen) == sorted(space.axes[0])

    @pytest.mark.parametrize(("one", "two"), [(0.0, 1.0), (0.3, 0.2), (1.0, 1.0)])
    def test_slerp_stands_at_the_softmax_of_the_scores(self, one: float, two: float) -> None:
        space = real_space(Case("operators", {"operators": ["slerp"]}, {"granularity": {"layers": "whole"}}))
        node = space.recipe(np.array([0.5, one, two])).root
        assert isinstance(node, Merge)
        assert node.inputs == [Leaf(model="one"), Leaf(model="two")]
        assert node.coefficients[0][0] == pytest.approx(math.exp(two) / (math.exp(one) + math.exp(two)), rel=1e-12)

    def test_slerp_takes_the_two_experts_with_the_largest_scores(self) -> None:
        case = Case("operators", {"operators": ["slerp"]}, {"granularity": {"layers": "whole"}})
        space = real_space(case, experts=("one", "two"))
        assert isinstance(space, OperatorSpace)
        wide = replace(space, mixed=("base", "one", "two"))
        pair, (t,) = wide._pair(replace(wide.parts[0], columns=wide.mixed), [0.1, 0.9, 0.5])
        assert pair == ("one", "two") and t == pytest.approx(1 / (1 + math.exp(0.4)))

    def test_weights_that_sum_to_nothing_are_equal(self) -> None:
        space = real_space(Case("operators", {"operators": ["linear"]}, {"granularity": {"layers": "whole"}}))
        root = space.recipe(space.low).root
        assert isinstance(root, Merge) and root.coefficients == [[0.5, 0.5]]

    def test_points_are_of_the_first_operator_with_coefficients(self) -> None:
        space = real_space(Case("operators", merge={"granularity": {"layers": "whole"}}))
        _, recipe = space.encode(CandidateInput(coefficients={"two": 0.25}))
        assert isinstance(recipe.root, Merge)
        assert (recipe.root.operator, recipe.root.coefficients) == ("linear", [[0.0, 0.25]])
        with pytest.raises(InvalidInput, match="'three' has no coefficient here"):
            space.encode(CandidateInput(coefficients={"three": 0.25}))

    def test_a_job_is_prepared_with_what_the_space_names(self, tmp_path: Path) -> None:
        job = write_job(tmp_path)
        job["merge"]["space"] = {"name": "operators", "options": {"operators": ["linear", "magmax"]}}
        problem = prepare(parse_spec(job), Roots([tmp_path]))
        assert sorted(problem.operators) == ["linear", "magmax"]
        assert problem.operators["magmax"].columns == "scale"
        assert "magmax scale @ layer 0" in [v.name for v in make_space(parse_spec(job), problem).variables]

    @pytest.mark.parametrize(
        ("operator", "message"),
        [
            ("no_such", "unknown operator"),
            ({"operator": "ties", "options": {"density": {"low": 0, "high": 1}}}, "greater than 0"),
            ({"operator": "ties", "options": {"no_such": 1}}, "no option 'no_such'"),
            ("fisher", "needs more than the models' weights"),
            ("lines", "does not merge 2 experts"),
        ],
    )
    def test_what_operators_do_not_allow_is_refused_at_once(self, tmp_path: Path, operator: Any, message: str) -> None:
        job = write_job(tmp_path)
        job["merge"]["space"] = {"name": "operators", "options": {"operators": [operator]}}
        with pytest.raises(InvalidInput, match=message) as caught:
            prepare(parse_spec(job), Roots([tmp_path]))
        assert (caught.value.field or "").startswith("merge.space.options")


class TestPrune:
    def test_the_largest_scores_are_removed(self) -> None:
        space = real_space(Case("prune", {"layers": 2, "blocks": "remove"}))
        genome = genome_of(space, remove_layer_0=0.2, remove_layer_1=0.9, remove_layer_2=0.1, remove_layer_3=0.3)
        assert stack(space.recipe(genome), space) == [(0, "base"), (2, "base")]

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, LAYERS), blocks=st.sampled_from(["select", "merge"]))
    def test_every_genome_has_the_target_size(self, seed: int, layers: int, blocks: str) -> None:
        space = real_space(Case("prune", {"layers": layers, "blocks": blocks}))
        random = np.random.Generator(np.random.PCG64(seed))
        recipe = space.recipe(space.low + random.random(space.dim) * (space.high - space.low))
        numbers = [layer for layer, _ in stack(recipe, space)]
        assert len(numbers) == layers and numbers == sorted(set(numbers))

    def test_selected_and_merged_blocks(self) -> None:
        space = real_space(Case("prune", {"layers": 4}))
        named = {"one in layer 1": 1.5, "one in layer 2": 1.5, "two in layer 2": 1.5, "factor of layer 2": 0.25}
        recipe = space.recipe(genome_of(space, **{name.replace(" ", "_"): value for name, value in named.items()}))
        assert stack(recipe, space) == [(0, "base"), (1, "one"), (2, "task_arithmetic"), (3, "base")]
        node = layers_of(recipe, space.problem)[2].node
        assert isinstance(node, Merge) and node.coefficients == [[0.25, 0.25]]

    def test_output_scales_are_what_later_layers_add_less(self) -> None:
        space = real_space(Case("prune", {"layers": 3, "blocks": "remove", "output_scales": True}))
        scales = {f"scale_behind_layer_{layer}": value for layer, value in enumerate((2.0, 0.5, 1.5, 0.7))}
        recipe = space.recipe(genome_of(space, remove_layer_1=1.0, **scales))
        assert [entry.scale for entry in recipe.layers or ()] == additions([2.0, 1.5, 0.7], "output")

    def test_warm_starts_all_meet_the_target(self) -> None:
        case = Case("prune", {"layers": 3})
        space = real_space(case)
        starts = {start.label: stack(start.recipe, space) for start in space.warm_starts(case.spec())}
        assert {label: [layer for layer, _ in found] for label, found in starts.items()} == {
            "without high layers": [0, 1, 3],
            "without middle layers": [0, 1, 3],
            "without high and low layers": [0, 1, 3],
            "one pruned": [0, 1, 3],
            "two pruned": [0, 1, 3],
            "uniform pruned": [0, 1, 3],
        }
        assert {model for _, model in starts["two pruned"]} == {"two"}
        assert {model for _, model in starts["uniform pruned"]} == {"task_arithmetic"}

    def test_orders_of_removal(self) -> None:
        space = real_space(Case("prune"))
        assert isinstance(space, PruneSpace)
        for order in space._orders().values():
            assert sorted(order) == list(range(LAYERS)) and order[-2:] == [3, 0]


class TestDataFlow:
    def test_a_path_is_that_of_the_plan(self) -> None:
        space = real_space(Case("data_flow", {"models": ["one", "two"], "inputs": "layers", "most_layers": 16}))
        random = np.random.Generator(np.random.PCG64(4))
        genome = space.low + random.random(space.dim) * (space.high - space.low)
        places, square = 3 * 2 * LAYERS, (2 * LAYERS) ** 2
        table = genome[places : places + square].reshape(2 * LAYERS, -1).tolist()
        wanted = data_flow(["one", "two"], LAYERS, genome[:places].tolist(), table)
        assert space.recipe(genome).layers == wanted

    def test_too_many_layers_are_cut_to_the_strongest(self) -> None:
        space = real_space(Case("data_flow", {"repeats": 1, "inputs": "none", "most_layers": 3, "outside": "base"}))
        genome = np.array([0.1, 0.9, 0.2, 0.3, 0.05, 0.8, -1.0, 0.4])
        assert stack(space.recipe(genome), space) == [(1, "one"), (1, "two"), (3, "two")]
        assert stack(space.recipe(-np.arange(1.0, 9.0) / 10), space) == [(0, "one")]

    def test_a_layer_may_come_again(self) -> None:
        space = real_space(Case("data_flow", {"repeats": 2, "models": ["two"], "inputs": "none"}))
        genome = np.full(space.dim, -0.5)
        genome[[0, 1, 2, 5, 6, 7]] = 0.5
        assert [layer for layer, _ in stack(space.recipe(space.clip(genome)), space)] == [0, 1, 2, 1, 2, 3]

    def test_scales_between_models(self) -> None:
        space = real_space(Case("data_flow", {"repeats": 1, "outside": "base"}))
        genome = np.array([0.5, 0.5, -1, -1, -1, -1, 0.5, -1, 1.25, 2.0, 0.5, 0.75])
        recipe = space.recipe(genome)
        assert [entry.scale for entry in recipe.layers or ()] == additions([1.0, 1.25, 2.0], "input")


class TestBlocks:
    def test_blocks_stand_in_the_order_of_their_numbers(self) -> None:
        space = real_space(Case("blocks", {"most_layers": 9, "output_scales": False, "outside": "base"}))
        genome = np.array([0.6, 0.9, 0.0, 0.0, 0.7, 0.1, 0.9, 0.8])
        assert stack(space.recipe(genome), space) == [
            (0, "two"), (0, "one"), (1, "base"), (2, "one"), (3, "one"), (3, "two"),
        ]  # fmt: skip

    def test_the_weakest_are_left_out_but_one_at_each_depth(self) -> None:
        space = real_space(Case("blocks", {"most_layers": 5, "output_scales": False, "outside": "base"}))
        genome = np.array([0.6, 0.95, 0.51, 0.0, 0.7, 0.9, 0.99, 0.97])
        assert stack(space.recipe(genome), space) == [(0, "two"), (1, "one"), (2, "two"), (3, "one"), (3, "two")]

    def test_a_scale_is_behind_the_last_block_of_its_depth(self) -> None:
        space = real_space(Case("blocks", {"outside": "base"}))
        genome = np.array([0.9, 0.6, 2.0, 0.9, 0.0, 0.5, 0.9, 0.0, 1.0, 0.9, 0.0, 1.0])
        recipe = space.recipe(genome)
        assert [entry.scale for entry in recipe.layers or ()] == additions([1.0, 2.0, 0.5, 1.0, 1.0], "output")


class TestLayerSwap:
    def test_segments(self) -> None:
        space = real_space(Case("layer_swap"))
        genome = genome_of(
            space,
            border_1=3.2,
            border_2=1.0,
            model_of_the_bottom=1.5,
            model_of_the_middle=2.5,
            model_of_the_top=1.5,
            model_before_the_layers=0.5,
            model_after_the_layers=2.5,
        )
        recipe, engine = space.recipe(genome), models("llama")[2]
        wanted = {"input": "base", 0: "one", 1: "two", 2: "two", 3: "one", "output": "two"}
        for tensor in models("llama")[1].shared:
            alone = Recipe(models=recipe.models, root=Leaf(model=wanted[tensor.position]))
            assert torch.equal(engine.merged(recipe, tensor), engine.merged(alone, tensor))

    def test_borders_may_blend(self) -> None:
        space = real_space(Case("layer_swap", {"borders": 1, "blend": 1, "models": ["one", "two"], "outside": "base"}))
        root = space.recipe(np.array([2.0, 0.5, 1.5])).root
        assert isinstance(root, Merge)
        rows = {group.label: row for group, row in zip(root.groups or (), root.coefficients, strict=True)}
        columns = [child.model for child in root.inputs if isinstance(child, Leaf)]
        assert columns == ["base", "one", "two"]
        assert rows["layer 1"] == pytest.approx([0, 2 / 3, 1 / 3]) and rows["layer 2"] == pytest.approx(
            [0, 1 / 3, 2 / 3]
        )
        assert rows["layer 0"] == [0, 1, 0] and rows["input"] == rows["output"] == [1, 0, 0]


class TestActions:
    @pytest.mark.parametrize(
        ("actions", "wanted"),
        [
            ([0, 0, 0, 0], [(0, 0), (1, 0), (2, 0), (3, 0)]),
            ([0, 3, 2, 1], [(0, 0), (2, 2), (3, 1)]),  # skip the second
            ([0, 1, 4, 0, 3, 3], [(0, 0), (1, 1), (1, 0)]),  # back, and the second layer again
            ([4, 4, 1, 3, 3, 3], [(0, 1)]),  # no way back from the first
            ([3, 3, 3, 3], [(0, 2)]),  # something must stand
            ([0], [(0, 0), (1, 2), (2, 2), (3, 2)]),  # the rest is the merged model's
            ([0, 0, 0, 0, 1, 1], [(0, 0), (1, 0), (2, 0), (3, 0)]),  # nothing counts after the last layer
        ],
    )
    def test_paths(self, actions: list[int], wanted: list[tuple[int, int]]) -> None:
        space = real_space(Case("actions"))
        assert isinstance(space, ActionSpace)
        assert space.names == ("one", "two", "merged by ties") and (space.merged, space.skip) == (2, 3)
        assert space.path(actions) == wanted

    def test_what_is_in_no_layer_is_merged(self) -> None:
        space, engine = real_space(Case("actions")), models("llama")[2]
        merged = space.recipe(space.uniform())
        assert merged.layers is None and isinstance(merged.root, Merge) and merged.root.operator == "ties"
        found = space.recipe(np.full(space.dim, 0.5))
        for tensor in models("llama")[1].shared:
            recipe = Recipe(models=found.models, root=Leaf(model="one")) if isinstance(tensor.position, int) else merged
            assert torch.equal(engine.merged(found, tensor), engine.merged(recipe, tensor))


def test_the_parameter_space_is_the_usual_one() -> None:
    """Sakana's: DARE-TIES with a weight and a density of its own for each layer and expert, as the package says."""
    spec = Case("operators").spec().model_dump(mode="json")
    spec["merge"] = {
        "operator": "dare_ties",
        "granularity": {"layers": "each"},
        "options": {"density": {"low": 0.01, "high": 1.0, "per_group": True, "per_expert": True}},
    }
    problem = real_problem(Case("operators"))
    problem = problem.model_copy(update={"operator": problem.operator.model_copy(update={"name": "dare_ties"})})
    space = make_space(parse_spec(spec), problem)
    assert isinstance(space, MergeSpace)
    assert space.dim == 2 * 2 * (LAYERS + 2)
    assert {"one @ layer 2", "density of two @ layer 3"} <= {variable.name for variable in space.variables}
    models("llama")[2].check(space.recipe(space.uniform()))
