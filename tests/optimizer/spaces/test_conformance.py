"""What every kind of search space must do, whoever wrote it. A new one is tested here by being registered."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.geometry import make_layout
from optimizer.recipe import Leaf, Recipe
from optimizer.space import SPACES, Genome, JobSpace, make_space
from optimizer.spec import CandidateInput
from optimizer.structured import layers_of, same
from tests.optimizer.spaces.cases import CASES, Case, models, real_problem, real_space

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_kind = pytest.mark.parametrize("name", list(SPACES))
seeds = st.integers(0, 2**32 - 1)


def random_genome(space: JobSpace, seed: int) -> Genome:
    """Uniform in the box; now and then some numbers lie on a bound."""
    random = np.random.Generator(np.random.PCG64(seed))
    genome = space.low + random.random(space.dim) * (space.high - space.low)
    at = random.random(space.dim)
    return np.where(at < 0.05, space.low, np.where(at > 0.95, space.high, genome))


@every_kind
def test_describes_itself(name: str) -> None:
    kind = SPACES[name]
    assert kind.name == name
    assert kind.summary.endswith(".") and len(kind.summary) < 150
    assert re.search(r"20\d\d.*arXiv \d{4}\.\d{5}", kind.reference)
    for option, field in kind.options.model_json_schema()["properties"].items():
        assert field.get("description"), f"option {option} has no description"


@every_case
def test_variables_have_unique_names_and_sensible_bounds(case: Case) -> None:
    space = real_space(case)
    assert len({variable.name for variable in space.variables}) == space.dim > 0
    assert (space.low < space.high).all() and np.isfinite([space.low, space.high]).all()
    for variable in space.variables:
        assert variable.kind != "choice" or variable.high == len(variable.choices)
        assert "\n" not in variable.name and len(variable.name) < 80


@every_case
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_every_genome_is_a_recipe_that_the_engine_accepts(case: Case, seed: int) -> None:
    space = real_space(case)
    genome = random_genome(space, seed)
    recipe = space.recipe(genome)
    models("llama")[2].check(recipe)
    assert recipe.fingerprint == space.recipe(genome.copy()).fingerprint
    assert Recipe.parse(recipe.to_json()).fingerprint == recipe.fingerprint
    again, found = space.encode(CandidateInput(genome=genome.tolist()))
    assert again is not None and again.tobytes() == genome.tobytes() and found == recipe


@every_case
@settings(max_examples=25, deadline=None)
@given(seed=seeds)
def test_its_own_recipes_are_adopted(case: Case, seed: int) -> None:
    space = real_space(case)
    recipe = space.recipe(random_genome(space, seed))
    genome = space.adopt(recipe)
    if genome is None:  # segments shorter than what they are blended over
        assert case.options.get("blend")
        return
    assert same(space.recipe(genome), recipe)
    space.encode(CandidateInput(genome=space.clip(genome).tolist()))


@every_case
def test_few_of_its_own_recipes_are_not_adopted(case: Case) -> None:
    space = real_space(case)
    found = [space.adopt(space.recipe(random_genome(space, seed))) for seed in range(40)]
    assert sum(genome is None for genome in found) <= 10


@every_case
def test_what_genomes_stand_for_can_be_built(case: Case) -> None:
    space = real_space(case)
    engine = models("llama")[2]
    for genome in (space.low, space.high, space.uniform(), *(random_genome(space, seed) for seed in range(3))):
        recipe = space.recipe(genome)
        targets = {tensor.name: torch.full(tensor.shape, torch.nan) for tensor in engine.result_layout(recipe).shared}
        engine.apply(recipe, targets)
        assert all(tensor.isfinite().all() for tensor in targets.values())


@pytest.mark.parametrize("model_type", ["bert", "vit", "gpt2"])
@every_kind
def test_other_architectures(name: str, model_type: str) -> None:
    space = real_space(Case(name), model_type)
    engine = models(model_type)[2]
    for genome in (space.low, space.high, space.uniform(), random_genome(space, 1)):
        engine.check(space.recipe(genome))


@every_case
def test_warm_starts_are_recipes_with_their_genomes(case: Case) -> None:
    space = real_space(case)
    starts = space.warm_starts(case.spec())
    assert len({start.label for start in starts}) == len(starts) >= 3
    assert any(start.genome is not None for start in starts)
    for start in starts:
        models("llama")[2].check(start.recipe)
        if start.genome is not None:
            assert same(space.recipe(start.genome), start.recipe)
    nothing = case.spec().warm_starts.model_copy(update={"base": False, "experts": False, "uniform": False})
    assert not space.warm_starts(case.spec().model_copy(update={"warm_starts": nothing}))


@every_case
def test_uniform_lies_inside(case: Case) -> None:
    space = real_space(case)
    assert np.array_equal(space.clip(space.uniform()), space.uniform())


@every_case
def test_models_alone_are_adopted_as_they_are_or_not_at_all(case: Case) -> None:
    space = real_space(case)
    engine = models("llama")[2]
    for name in space.problem.models:
        alone = Recipe(models=space.problem.models, root=Leaf(model=name))
        genome = space.adopt(alone)
        if genome is not None:
            found = space.recipe(genome)
            assert len(layers_of(found, space.problem)) == space.problem.layout.layers
            for tensor in engine.result_layout(found).shared:
                torch.testing.assert_close(engine.merged(found, tensor), engine.merged(alone, tensor))


@pytest.mark.parametrize(
    "case", [Case("operators"), Case("data_flow"), Case("blocks"), Case("layer_swap")], ids=str
)  # fmt: skip
def test_kinds_that_can_express_every_expert_do(case: Case) -> None:
    space = real_space(case)
    recipes = [Recipe(models=space.problem.models, root=Leaf(model=name)) for name in ("one", "two")]
    assert all(space.adopt(recipe) is not None for recipe in recipes)


@every_kind
def test_one_expert_is_enough(name: str) -> None:
    space = real_space(Case(name), experts=("one",))
    for seed in range(5):
        models("llama")[2].check(space.recipe(random_genome(space, seed)))


@every_case
def test_wrong_lengths_are_refused(case: Case) -> None:
    space = real_space(case)
    with pytest.raises(InvalidInput, match=f"has {space.dim + 1} numbers, the job's space has {space.dim}"):
        space.recipe(np.zeros(space.dim + 1))


@every_kind
def test_models_without_layers(name: str) -> None:
    problem = real_problem(Case(name))
    flat = problem.model_copy(update={"layout": make_layout([("weight", (4, 4), "F32")])})
    if name == "operators":
        assert make_space(Case(name).spec(), flat).dim > 0
        return
    with pytest.raises(InvalidInput, match="the models have no layers") as caught:
        make_space(Case(name).spec(), flat)
    assert caught.value.field == "merge.space.name"


@every_kind
def test_models_with_several_stacks(name: str) -> None:
    names = [f"{stack}.layers.{n}.mlp.weight" for stack in ("encoder", "decoder") for n in range(2)]
    layout = make_layout([(each, (4, 4), "F32") for each in names])
    problem = real_problem(Case(name)).model_copy(update={"layout": layout})
    if name in ("operators", "layer_swap"):
        assert make_space(Case(name).spec(), problem).dim > 0
        return
    with pytest.raises(InvalidInput, match=r"several stacks of layers \(decoder.layers, encoder.layers\)"):
        make_space(Case(name).spec(), problem)


@pytest.mark.parametrize("setting", [{"operator": "ties"}, {"options": {"density": 0.5}}])
@every_kind
def test_settings_that_do_not_count_are_refused(name: str, setting: dict[str, object]) -> None:
    case = Case(name, merge=setting)
    with pytest.raises(InvalidInput, match="does not use") as caught:
        real_space(case)
    assert caught.value.field == f"merge.{next(iter(setting))}"


@pytest.mark.parametrize(
    ("case", "field"),
    [
        (Case("operators", {"operators": []}), "operators"),
        (Case("operators", {"operators": [{"operator": "ties", "no_such": 1}]}), "operators.0.no_such"),
        (Case("prune", {"layers": 5}), "layers"),
        (Case("prune", {"source": "stranger"}), "source"),
        (Case("prune", {"layers": 4, "blocks": "remove"}), ""),
        (Case("prune", {"output_scales": True, "scales": {"low": 0, "high": 1}}), "scales.low"),
        (Case("data_flow", {"models": ["one", "stranger"]}), "models.1"),
        (Case("data_flow", {"models": ["one", "one"]}), "models.1"),
        (Case("blocks", {"most_layers": 3}), "most_layers"),
        (Case("blocks", {"fixed_layers": 2}), "fixed_layers"),
        (Case("actions", {"merged": [{"operator": "aim"}]}), "merged.0.operator"),
    ],
    ids=str,
)
def test_bad_options_are_refused(case: Case, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        real_space(case)
    assert caught.value.field == "merge.space.options" + (f".{field}" if field else "")
