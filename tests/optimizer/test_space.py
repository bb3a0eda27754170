"""Search spaces: groups that cover every parameter once, and genomes that become recipes and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.geometry import MODULE_KINDS, Layout, ModuleKind, make_layout
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.space import MergeSpace, SearchSpace, Variable, WarmStart, make_groups, make_merge_space
from optimizer.spec import CandidateInput, Granularity, JobSpec
from tests.factories import make_problem, make_spec

LAYERS = 5


def full_layout() -> Layout:
    """Every kind of parameter in every layer, and before and after them."""
    kinds = ("attn.weight", "mlp.weight", "norm.weight", "thing.weight")
    names = [f"layers.{layer}.{kind}" for layer in range(LAYERS) for kind in kinds]
    return make_layout((name, (2, 2), "F32") for name in [*names, "embed.weight", "norm.weight", "lm_head.weight"])


LAYOUT = full_layout()


@st.composite
def granularities(draw: st.DrawFn) -> tuple[Granularity, list[ModuleKind]]:
    """A granularity with disjoint sets of module kinds, and frozen kinds."""
    kinds = draw(st.permutations(MODULE_KINDS))
    cuts = sorted(draw(st.sets(st.integers(1, len(kinds)), max_size=3)))
    sets = [list(kinds[a:b]) for a, b in zip([0, *cuts], cuts, strict=False) if a < b]
    return (
        Granularity(
            layers=draw(st.sampled_from(["whole", "groups", "each"])),
            group_size=draw(st.integers(1, 7)),
            modules=sets,
        ),
        draw(st.lists(st.sampled_from(MODULE_KINDS), unique=True, max_size=3)),
    )


@given(granularities())
def test_groups_cover_every_shared_parameter_exactly_once(given_: tuple[Granularity, list[ModuleKind]]) -> None:
    granularity, frozen = given_
    groups = make_groups(granularity, LAYOUT, frozen)
    for tensor in LAYOUT.shared:
        assert sum(group.matches(tensor) for group in groups) == (tensor.kind not in frozen), tensor
    for group in groups:
        assert any(group.matches(tensor) for tensor in LAYOUT.shared), "a group without parameters"
    assert len({group.label for group in groups}) == len(groups), "labels tell groups apart"


@pytest.mark.parametrize(
    ("granularity", "labels"),
    [
        ({"layers": "whole"}, ["all"]),
        ({"layers": "each"}, ["input", "layer 0", "layer 1", "layer 2", "layer 3", "layer 4", "output"]),
        ({"layers": "groups", "group_size": 2}, ["input", "layers 0-1", "layers 2-3", "layer 4", "output"]),
        ({"layers": "groups", "group_size": 99}, ["input", "layers 0-4", "output"]),
        ({"layers": "whole", "modules": [["mlp"]]}, ["mlp", "attention + embeddings + norm + head + other"]),
    ],
)
def test_labels_of_groups(granularity: dict[str, Any], labels: list[str]) -> None:
    assert [group.label for group in make_groups(Granularity(**granularity), LAYOUT)] == labels


def test_frozen_kinds_are_left_to_the_base() -> None:
    groups = make_groups(Granularity(layers="whole"), LAYOUT, ["embeddings", "head"])
    assert groups == [Selector(modules=["attention", "mlp", "norm", "other"])]


def space_of(merge: dict[str, Any] | None = None, **operator: Any) -> tuple[JobSpec, MergeSpace]:
    spec = make_spec(merge={"operator": "task_arithmetic", **(merge or {})})
    problem = make_problem(spec, layers=2)
    problem = Problem.model_validate(
        problem.model_dump() | {"operator": problem.operator.model_dump() | operator, "layout": problem.layout}
    )
    return spec, make_merge_space(spec, problem)


VARIED = {
    "granularity": {"layers": "each"},
    "bounds": {"low": -0.2, "high": 1.2},
    "options": {
        "density": {"low": 0.1, "high": 0.9},
        "rounds": {"low": 1, "high": 4, "integer": True},
        "sign": {"choices": ["sum", "majority", "none"]},
        "rescale": True,
    },
}


def root(recipe: Recipe) -> Merge:
    assert isinstance(recipe.root, Merge)
    return recipe.root


def test_variables_of_a_space() -> None:
    _, space = space_of(VARIED)
    assert [variable.name for variable in space.variables] == [
        "language @ layer 0",
        "polarity @ layer 0",
        "language @ layer 1",
        "polarity @ layer 1",
        "density",
        "rounds",
        "sign",
    ]
    assert space.table == (2, 2)
    assert space.low.tolist() == [-0.2] * 4 + [0.1, 1.0, 0.0]
    assert space.high.tolist() == [1.2] * 4 + [0.9, 4.0, 3.0]
    assert [variable.kind for variable in space.variables[4:]] == ["real", "integer", "choice"]


def test_a_genome_becomes_the_recipe_it_stands_for() -> None:
    _, space = space_of(VARIED)
    node = root(space.recipe(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 2.6, 1.99])))
    assert node.coefficients == [[0.1, 0.2], [0.3, 0.4]]
    assert node.options == {"density": 0.5, "rescale": True, "rounds": 3, "sign": "majority"}
    assert isinstance(node.options["rounds"], int)
    assert node.operator == "task_arithmetic"
    assert [group.positions for group in node.groups or []] == [[0], [1]]


@given(st.lists(st.floats(-0.2, 1.2), min_size=4, max_size=4), st.floats(0.1, 0.9), st.floats(1, 4), st.floats(0, 3))
def test_every_genome_inside_the_bounds_decodes_and_survives(
    coefficients: list[float], density: float, rounds: float, sign: float
) -> None:
    _, space = space_of(VARIED)
    genome = np.array([*coefficients, density, rounds, sign])
    recipe = space.recipe(genome)
    node = root(recipe)
    assert np.array(node.coefficients).ravel().tolist() == coefficients
    assert node.options["density"] == density
    assert node.options["rounds"] in {1, 2, 3, 4}
    assert node.options["sign"] in {"sum", "majority", "none"}
    assert Recipe.parse(recipe.to_json()).fingerprint == recipe.fingerprint
    again, same = space.encode(CandidateInput(genome=genome.tolist()))
    assert again is not None
    assert again.tobytes() == genome.tobytes()
    assert same.fingerprint == recipe.fingerprint


@pytest.mark.parametrize(("number", "value"), [(0.0, "a"), (0.999, "a"), (1.0, "b"), (2.0, "c"), (3.0, "c")])
def test_choices_are_rounded_down_and_the_upper_bound_belongs_to_the_last(number: float, value: str) -> None:
    assert Variable("v", 0.0, 3.0, "choice", ("a", "b", "c")).read(number) == value


def test_points_by_name() -> None:
    _, space = space_of(VARIED)
    assert space.point({"language": 0.6, "polarity": [0.1, 0.2]}).tolist() == [0.6, 0.1, 0.6, 0.2, 0.5, 2.5, 1.5]
    assert space.point({}).tolist()[:4] == [0.0] * 4


@pytest.mark.parametrize(
    ("given_", "field", "message"),
    [
        ({"coefficients": {"stranger": 1.0}}, "coefficients", "'stranger' has no coefficient"),
        ({"coefficients": {"language": [1.0]}}, "coefficients.language", "1 numbers given, the job has 2"),
        ({"genome": [0.0, 0.0]}, "genome", "the genome has 2 numbers, the job's space has 7"),
        ({"genome": [9.0, 0, 0, 0, 0.5, 2, 1]}, "genome", "language @ layer 0 = 9 is outside"),
        ({"coefficients": {"polarity": 1.3}}, "genome", "polarity @ layer 0 = 1.3 is outside"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(given_: dict[str, Any], field: str, message: str) -> None:
    _, space = space_of(VARIED)
    with pytest.raises(InvalidInput, match=message) as caught:
        space.encode(CandidateInput(**given_))
    assert caught.value.field == field


def test_foreign_recipes() -> None:
    _, space = space_of(VARIED)
    recipe = space.recipe(space.uniform())
    genome, same = space.encode(CandidateInput(recipe=recipe.to_json()))
    assert genome is None
    assert same == recipe
    strange = recipe.to_json()
    strange["models"]["language"]["digest"] = "f" * 64
    with pytest.raises(InvalidInput, match="'language' is not the job's") as caught:
        space.encode(CandidateInput(recipe=strange))
    assert caught.value.field == "recipe.models.language"
    with pytest.raises(InvalidInput) as caught:
        space.encode(CandidateInput(recipe={"nonsense": 1}))
    assert caught.value.field is not None
    assert caught.value.field.startswith("recipe")


def genome_of(start: WarmStart) -> list[float] | None:
    return None if start.genome is None else start.genome.tolist()


def test_warm_starts() -> None:
    spec, space = space_of({"granularity": {"layers": "whole"}})
    assert {start.label: genome_of(start) for start in space.warm_starts(spec)} == {
        "base": [0.0, 0.0],
        "language": [1.0, 0.0],
        "polarity": [0.0, 1.0],
        "uniform": [0.5, 0.5],
    }
    assert space.uniform().tolist() == [0.5, 0.5]


def test_warm_starts_as_asked_and_as_the_operator_allows() -> None:
    spec, space = space_of({"granularity": {"layers": "whole"}}, uses_base=False)
    assert [start.label for start in space.warm_starts(spec)] == ["language", "polarity", "uniform"]
    some = make_spec(warm_starts={"experts": False, "uniform": False})
    _, space = space_of()
    assert [start.label for start in space.warm_starts(some)] == ["base"]


def test_interpolation_has_one_coefficient_between_two_models() -> None:
    spec, space = space_of({"granularity": {"layers": "whole"}}, columns="interpolation", uses_base=False)
    assert [variable.name for variable in space.variables] == ["t @ all"]
    assert {start.label: genome_of(start) for start in space.warm_starts(spec)} == {
        "language": [0.0],
        "polarity": [1.0],
        "uniform": [0.5],
    }
    node = root(space.recipe(np.array([0.25])))
    assert [leaf.model_dump(exclude_none=True) for leaf in node.inputs] == [
        {"model": "language"},
        {"model": "polarity"},
    ]
    assert node.coefficients == [[0.25]]


def test_a_scale_is_one_coefficient_and_experts_stand_as_they_are() -> None:
    spec, space = space_of({"granularity": {"layers": "whole"}}, columns="scale")
    assert [variable.name for variable in space.variables] == ["scale @ all"]
    starts = {start.label: start for start in space.warm_starts(spec)}
    assert {label: genome_of(start) for label, start in starts.items()} == {
        "base": [0.0],
        "language": None,
        "polarity": None,
        "uniform": [1.0],
    }
    assert starts["language"].recipe.root == Leaf(model="language")
    node = root(space.recipe(np.array([0.7])))
    assert node.coefficients == [[0.7]] and len(node.inputs) == 2


def test_options_that_differ_between_groups_and_experts() -> None:
    low_high = {"low": 0.1, "high": 0.9}
    options = {
        "both": {**low_high, "per_group": True, "per_expert": True},
        "expert": {**low_high, "per_expert": True},
        "fixed": [0.2, 0.4],
        "group": {**low_high, "per_group": True},
    }
    _, space = space_of({"granularity": {"layers": "each"}, "options": options})
    assert [variable.name for variable in space.variables[4:]] == [
        "both of language @ layer 0",
        "both of polarity @ layer 0",
        "both of language @ layer 1",
        "both of polarity @ layer 1",
        "expert of language",
        "expert of polarity",
        "group @ layer 0",
        "group @ layer 1",
    ]
    genome = np.array([0.5, 0.5, 0.5, 0.5, 0.11, 0.12, 0.21, 0.22, 0.3, 0.4, 0.6, 0.7])
    node = root(space.recipe(genome))
    assert node.options == {}
    assert node.tables == {
        "both": [[0.11, 0.12], [0.21, 0.22]],
        "expert": [[0.3, 0.4], [0.3, 0.4]],
        "fixed": [[0.2, 0.4], [0.2, 0.4]],
        "group": [[0.6], [0.7]],
    }


def test_a_list_has_a_number_for_each_expert() -> None:
    with pytest.raises(InvalidInput, match="3 numbers given for 2 experts") as caught:
        space_of({"options": {"density": [0.1, 0.2, 0.3]}})
    assert caught.value.field == "merge.options.density"


def test_modifiers_stand_around_the_experts_and_the_merge() -> None:
    modifiers = [
        {"operator": "prune", "target": "experts", "options": {"density": {"low": 0.1, "high": 0.9}}},
        {"operator": "lines", "target": "merged", "options": {"beta": 0.5}},
    ]
    spec, space = space_of({"granularity": {"layers": "whole"}, "modifiers": modifiers})
    assert [variable.name for variable in space.variables[2:]] == ["prune (experts) density"]
    outer = root(space.recipe(np.array([0.3, 0.4, 0.25])))
    assert (outer.operator, outer.options, outer.coefficients) == ("lines", {"beta": 0.5}, [[1.0]])
    (inner,) = outer.inputs
    assert isinstance(inner, Merge)
    assert (inner.operator, inner.coefficients) == ("task_arithmetic", [[0.3, 0.4]])
    for child, name in zip(inner.inputs, ("language", "polarity"), strict=True):
        assert isinstance(child, Merge)
        assert (child.operator, child.options, child.inputs) == ("prune", {"density": 0.25}, [Leaf(model=name)])
    assert [start.label for start in space.warm_starts(spec) if start.genome is None] == ["language", "polarity"]


def test_one_group_for_every_tensor() -> None:
    groups = make_groups(Granularity(layers="tensors"), LAYOUT, ["embeddings"])
    merged = [tensor for tensor in LAYOUT.shared if tensor.kind != "embeddings"]
    assert [group.label for group in groups] == [tensor.name for tensor in merged]
    assert [[group.matches(tensor) for tensor in merged].index(True) for group in groups] == list(range(len(merged)))


def test_uniform_start_lies_inside_the_bounds() -> None:
    _, space = space_of({"bounds": {"low": 0.6, "high": 1.0}})
    assert (space.uniform() == 0.6).all()


def test_nothing_left_to_merge_is_refused() -> None:
    with pytest.raises(InvalidInput, match="every module kind is frozen") as caught:
        space_of({"frozen": list(MODULE_KINDS)})
    assert caught.value.field == "merge.frozen"


def test_clip() -> None:
    box = SearchSpace((Variable("a", -1.0, 1.0), Variable("b", 0.0, 2.0)))
    assert box.dim == 2
    assert box.clip(np.array([-3.0, 3.0])).tolist() == [-1.0, 2.0]
