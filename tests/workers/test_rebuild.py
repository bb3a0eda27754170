"""Recipes and mergekit's files become models outside of any job; what mergekit itself makes is the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimizer.errors import InvalidCheckpoint, InvalidInput
from optimizer.mergekit import read_configuration, to_configuration
from optimizer.mergekit.methods import METHODS
from optimizer.recipe import Recipe
from optimizer.spec import ModelRef
from tests.workers.merging.reference.make_yaml import DATA, inputs, write_model
from tests.workers.merging.reference.yaml_cases import CASES
from tests.workers.models import VOCABULARY, make_recipe, tiny_bert, tiny_bert_base, tiny_llama
from tests.workers.test_compatibility import opened, rewritten
from workers import rebuild
from workers.alignment import align, vocabulary_of
from workers.checkpoints import Checkpoint
from workers.export import MERGEKIT
from workers.merging.engine import MergeEngine
from workers.merging.operator import OPERATORS, operator_info
from workers.naming import canonical_names
from workers.publishing import RECIPE
from workers.rebuild import Places, import_recipe, open_recipe
from workers.roots import Roots

REFERENCE = load_file(DATA)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's models, as checkpoints in float64."""
    root = tmp_path_factory.mktemp("models")
    for name in inputs():
        write_model(root / name, REFERENCE[f"in.{name}"])
    return root


def places(*roots: Path, **given: Path) -> Places:
    return Places(Roots(roots), given)


def imported(text: str, models: Path) -> Recipe:
    return import_recipe(read_configuration(yaml.safe_load(text)), places(models)).recipe


def vector(recipe: Recipe, models: Path) -> Tensor:
    """The merged model's tensors, flat, in order of the checkpoints' own names."""
    opened = open_recipe(recipe, places(models))
    engine = MergeEngine(opened.checkpoints, opened.layout)
    names = canonical_names(opened.checkpoints["base"])
    shared = engine.result_layout(recipe).shared
    prefixed = sorted((names.get(tensor.name, f"model.{tensor.name}"), tensor) for tensor in shared)
    return torch.cat([engine.merged(recipe, tensor).flatten() for _, tensor in prefixed])


@pytest.mark.parametrize("case", CASES)
def test_what_mergekit_makes(case: str, models: Path) -> None:
    torch.testing.assert_close(
        vector(imported(CASES[case], models), models), REFERENCE[f"out.{case}"], rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, models: Path) -> None:
    """What is written for mergekit reads as the same model, and mergekit's own schema would take it."""
    recipe = imported(CASES[case], models)
    opened = open_recipe(recipe, places(models))
    references = {name: str(model.ref) for name, model in recipe.models.items()}
    names = canonical_names(opened.checkpoints["base"])
    written = to_configuration(recipe, opened.layout, names, references, operator_info)
    again = import_recipe(read_configuration(yaml.safe_load(yaml.safe_dump(written))), places(models)).recipe
    assert torch.equal(vector(again, models), vector(recipe, models))


def test_every_method_has_its_operator_and_options() -> None:
    for method in METHODS.values():
        known = OPERATORS.find(method.operator, "x").options.model_fields
        own = {parameter.option for parameter in method.parameters.values() if parameter.role == "option"}
        folded = {"scale", "normalise"} if method.folds else set()
        assert own - folded - {"row_wise", "flatten"} <= known.keys(), method.operator
        assert method.fixed.keys() <= known.keys(), method.operator


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A directory with a base, an expert with the same vocabulary and one with two tokens more."""
    tiny_llama(tmp_path / "here" / "base")
    tiny_llama(tmp_path / "here" / "one", seed=1)
    rewritten(tiny_llama(tmp_path / "here" / "two", seed=2), VOCABULARY, ["<|im_start|>", "<|im_end|>"])
    return tmp_path / "here"


def recipe_of(checkpoints: Mapping[str, Checkpoint]) -> Recipe:
    """A recipe that names its models relative to one directory."""
    recipe = make_recipe(checkpoints, "task_arithmetic", [0.3] * (len(checkpoints) - 1))
    models = {
        name: model.model_copy(update={"ref": ModelRef(path=name), "vocabulary": vocabulary_of(checkpoints[name])})
        for name, model in recipe.models.items()
    }
    return recipe.model_copy(update={"models": models})


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_another_machine_writes_the_same_files(tiny: Path, tmp_path: Path) -> None:
    checkpoints = align(opened(tiny / "base", one=tiny / "one", two=tiny / "two"), "union")
    recipe = Recipe.parse(json.loads(json.dumps(recipe_of(checkpoints).to_json(), sort_keys=True)))
    first, second = tmp_path / "a" / "out", tmp_path / "b" / "out"
    rebuild.write_model(open_recipe(recipe, places(tiny)), first, title="x", head="two", max_shard_bytes=10_000)
    shutil.copytree(tiny, tmp_path / "there")
    shutil.move(tmp_path / "there" / "one", tmp_path / "moved")
    again = Recipe.parse(json.loads((first / RECIPE).read_text()))
    elsewhere = places(tmp_path / "there", one=tmp_path / "moved")
    rebuild.write_model(open_recipe(again, elsewhere), second, title="x", head="two", max_shard_bytes=10_000)
    assert files(first) == files(second) and len(list(first.glob("*.safetensors"))) > 1
    assert "`mergekit.yml` describes the same merge" in (first / "README.md").read_text()
    assert yaml.safe_load((first / MERGEKIT).read_text())["tokenizer_source"] == "union"


def test_another_model_is_refused(tiny: Path) -> None:
    recipe = recipe_of(opened(tiny / "base", one=tiny / "one"))
    tiny_llama(tiny / "other", seed=7)
    with pytest.raises(InvalidCheckpoint, match="not the model 'one' that the recipe was made for") as caught:
        open_recipe(recipe, places(tiny, one=tiny / "other"))
    assert caught.value.field == "models.one" and "--model one=DIRECTORY" in str(caught.value.remedy)


def test_another_tokenizer_is_refused(tiny: Path) -> None:
    recipe = recipe_of(align(opened(tiny / "base", one=tiny / "two"), "union"))
    shutil.move(tiny / "two", tiny / "one") if not (tiny / "one").exists() else None
    text = (tiny / "two" / "tokenizer.json").read_text()
    (tiny / "two" / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|the_end|>"))
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer in .* is not the one"):
        open_recipe(recipe, places(tiny, one=tiny / "two"))


def test_missing_models(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(opened(tiny / "base", one=tiny / "one"))
    with pytest.raises(InvalidCheckpoint, match="'base' does not exist") as caught:
        open_recipe(recipe, places(tmp_path))
    assert "--root" in str(caught.value.remedy)
    with pytest.raises(InvalidCheckpoint, match="is no directory"):
        open_recipe(recipe, places(tiny, one=tmp_path / "nowhere"))
    no_base = recipe.model_copy(update={"models": {"one": recipe.models["one"]}})
    with pytest.raises(InvalidInput, match="no model `base`"):
        open_recipe(no_base, places(tiny))


def test_heads_stay_the_experts_own(tmp_path: Path) -> None:
    tiny_bert_base(tmp_path / "base")
    tiny_bert(tmp_path / "one", labels=2, seed=1)
    recipe = recipe_of(opened(tmp_path / "base", one=tmp_path / "one"))
    rebuild.write_model(open_recipe(recipe, places(tmp_path)), tmp_path / "out", title="x", head="one")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mergekit cannot make this model: the experts' heads stay their own" in card and "--head one" in card
    assert not (tmp_path / "out" / MERGEKIT).exists()
    everything = recipe.model_copy(update={"heads": []})
    assert everything.fingerprint == recipe.fingerprint
    with pytest.raises(InvalidCheckpoint, match="has tensors that the base lacks"):
        open_recipe(everything, places(tmp_path))


def test_an_adapter(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(opened(tiny / "base", one=tiny / "one"))
    found = open_recipe(recipe, places(tiny))
    report = rebuild.write_model(found, tmp_path / "out", title="x", adapter_rank=16)
    assert report is not None and report.error < 1e-5
    assert "--as-adapter 16" in (tmp_path / "out" / "README.md").read_text()
    rebuild.write_model(found, tmp_path / "out", title="x", adapter_rank=2, overwrite=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    with pytest.raises(InvalidInput, match="base's vocabulary and tokenizer"):
        rebuild.write_model(found, tmp_path / "out2", title="x", adapter_rank=2, tokenizer_from="one")


def test_adapters_in_mergekits_files(tiny: Path, tmp_path: Path) -> None:
    found = open_recipe(recipe_of(opened(tiny / "base", one=tiny / "one")), places(tiny))
    rebuild.write_model(found, tiny / "adapter", title="x", adapter_rank=16)
    text = "{merge_method: linear, base_model: base, models: [{model: base+adapter}], parameters: {weight: 0.5}}"
    recipe = imported(text, tiny)
    assert list(recipe.models) == ["base", "adapter"] and str(recipe.models["adapter"].ref) == "adapter"
    rebuild.write_model(open_recipe(recipe, places(tiny)), tmp_path / "out", title="x")
    written = yaml.safe_load((tmp_path / "out" / MERGEKIT).read_text())
    assert [entry["model"] for entry in written["models"]] == ["base+adapter", "base"]
    with pytest.raises(InvalidInput, match="stands on 'one', which is not the base"):
        imported(text.replace("base+adapter", "one+adapter"), tiny)


def test_plain_transformers_loads_a_stack(models: Path, tmp_path: Path) -> None:
    recipe = imported(CASES["passthrough"], models)
    rebuild.write_model(open_recipe(recipe, places(models)), tmp_path / "out", title="x")
    auto: type = AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "out", dtype=torch.float64)  # type: ignore[attr-defined]
    assert loaded.config.num_hidden_layers == 6 and len(loaded.model.layers) == 6
    assert "The model has 6 layers" in (tmp_path / "out" / "README.md").read_text()
