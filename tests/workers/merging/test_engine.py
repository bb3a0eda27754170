from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from optimizer.errors import InfeasibleCandidate, InvalidCheckpoint, InvalidInput
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from tests.workers.models import make_recipe, model_ids, open_models, tiny_bert, tiny_bert_base, tiny_llama
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.merging import blocks
from workers.merging.engine import MergeEngine


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_bert_base(root / "base")
    tiny_bert(root / "one", labels=2, seed=1)
    tiny_bert(root / "two", labels=3, seed=2, shard_size="10KB")
    return root


@pytest.fixture
def engine(paths: Path) -> MergeEngine:
    checkpoints, layout = open_models(paths / "base", {"one": paths / "one", "two": paths / "two"})
    return MergeEngine(checkpoints, layout)


def targets(engine: MergeEngine, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {tensor.name: torch.full(tensor.shape, 7.0, dtype=dtype) for tensor in engine.layout.shared}


def applied(engine: MergeEngine, recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    out = targets(engine, dtype)
    engine.apply(recipe, out)
    return out


def raw(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.tensor(name if name in checkpoint.tensors else f"bert.{name}")


def test_matches_the_formula_on_every_tensor(engine: MergeEngine) -> None:
    out = applied(engine, make_recipe(engine.checkpoints, "task_arithmetic", [0.6, 0.3]))
    assert len(out) == 39
    for name, found in out.items():
        base, one, two = (raw(checkpoint, name).double() for checkpoint in engine.checkpoints.values())
        torch.testing.assert_close(found.double(), base + 0.6 * (one - base) + 0.3 * (two - base), rtol=1e-5, atol=1e-6)


def test_base_and_experts_come_out_bit_for_bit(engine: MergeEngine) -> None:
    for row, model in (([0.0, 0.0], "base"), ([1.0, 0.0], "one"), ([0.0, 1.0], "two")):
        out = applied(engine, make_recipe(engine.checkpoints, "task_arithmetic", row))
        assert all(torch.equal(found, raw(engine.checkpoints[model], name)) for name, found in out.items())
        alone = applied(engine, Recipe(models=model_ids(engine.checkpoints), root=Leaf(model=model)))
        assert all(torch.equal(out[name], alone[name]) for name in out)


def test_one_tensor_equals_the_same_of_all(engine: MergeEngine) -> None:
    recipe = make_recipe(engine.checkpoints, "ties", [0.5, 0.7], density=0.4)
    out = applied(engine, recipe)
    for tensor in engine.layout.shared:
        assert torch.equal(engine.merged(recipe, tensor), out[tensor.name])
        low = engine.merged(recipe, tensor, torch.bfloat16)
        assert torch.equal(low, out[tensor.name].bfloat16())


def test_groups_select_and_the_rest_is_the_base(engine: MergeEngine) -> None:
    recipe = Recipe(
        models=model_ids(engine.checkpoints),
        root=Merge(
            operator="task_arithmetic",
            base=Leaf(model="base"),
            inputs=[Leaf(model="one"), Leaf(model="two")],
            groups=[Selector(positions=[0], modules=["attention"]), Selector(positions=[0])],
            coefficients=[[1.0, 0.0], [0.0, 1.0]],
        ),
    )
    seen = set()
    for tensor in engine.layout.shared:
        wanted = "base"
        if tensor.position == 0:
            wanted = "one" if tensor.kind == "attention" else "two"
        seen.add(wanted)
        assert torch.equal(engine.merged(recipe, tensor), raw(engine.checkpoints[wanted], tensor.name)), tensor.name
    assert seen == {"base", "one", "two"}


def test_merges_nest_and_are_rounded_once(tmp_path: Path) -> None:
    low = torch.bfloat16
    tiny_bert_base(tmp_path / "base", dtype=low)
    tiny_bert(tmp_path / "one", seed=1, dtype=low)
    tiny_bert(tmp_path / "two", seed=2, dtype=low)
    checkpoints, layout = open_models(tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"})
    engine = MergeEngine(checkpoints, layout)
    inner = make_recipe(checkpoints, "task_arithmetic", [0.3, 0.2]).root
    assert isinstance(inner, Merge)
    outer = Merge(
        operator="linear",
        base=inner,
        inputs=[inner, Leaf(model="two")],
        groups=[Selector(positions=[0, 1])],
        coefficients=[[0.5, 0.5]],
    )
    recipe = Recipe(models=model_ids(checkpoints), root=outer)
    for tensor in layout.shared:
        base, one, two = (raw(checkpoint, tensor.name).float() for checkpoint in checkpoints.values())
        first = 0.5 * base + 0.3 * one + 0.2 * two
        wanted = 0.5 * first + 0.5 * two if isinstance(tensor.position, int) else first
        found = engine.merged(recipe, tensor)
        assert found.dtype == low
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-6)


def test_the_same_bits_from_many_threads_at_once(engine: MergeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(engine.checkpoints, "ties", [0.5, 0.7])
    wanted = applied(engine, recipe)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    found: list[dict[str, Tensor]] = []
    threads = [threading.Thread(target=lambda: found.append(applied(engine, recipe))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(out[name], wanted[name]) for out in found for name in wanted)


def test_slerp_runs_between_two_models(engine: MergeEngine) -> None:
    out = applied(engine, make_recipe(engine.checkpoints, "slerp", [1.0]))
    assert all(torch.equal(found, raw(engine.checkpoints["two"], name)) for name, found in out.items())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"operator": "mystery"}, "recipe.root.operator"),
        ({"options": {"density": 0.5}}, "recipe.root.options.density"),
        ({"operator": "ties", "options": {"density": 7}}, "recipe.root.options.density"),
        ({"coefficients": [[1.0]]}, "recipe.root.coefficients"),
        ({"operator": "slerp"}, "recipe.root.coefficients"),
        ({"operator": "slerp", "coefficients": [[0.5]], "inputs": [{"model": "one"}]}, "recipe.root.inputs"),
    ],
)
def test_a_recipe_that_cannot_be_computed_writes_nothing(
    engine: MergeEngine, change: dict[str, object], field: str
) -> None:
    data = make_recipe(engine.checkpoints, "task_arithmetic", [0.5, 0.5]).to_json()
    data["root"] |= change
    out = targets(engine)
    with pytest.raises(InvalidInput) as caught:
        engine.apply(Recipe.parse(data), out)
    assert caught.value.field == field
    assert all(bool((tensor == 7.0).all()) for tensor in out.values())


def test_a_recipe_of_other_models(engine: MergeEngine) -> None:
    models = model_ids(engine.checkpoints)
    recipe = Recipe(models={"stranger": models["one"]}, root=Leaf(model="stranger"))
    with pytest.raises(InvalidInput, match="not loaded: stranger"):
        engine.check(recipe)


def test_an_average_without_weight(engine: MergeEngine) -> None:
    with pytest.raises(InfeasibleCandidate):
        applied(engine, make_recipe(engine.checkpoints, "linear", [0.5, -0.5]))


def test_a_checkpoint_of_another_shape(engine: MergeEngine, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "short", layers=1)
    checkpoints = {**engine.checkpoints, "one": open_checkpoint(tmp_path / "short", "one")}
    with pytest.raises(InvalidCheckpoint, match=r"one has no tensor 'encoder.layer.1"):
        MergeEngine(checkpoints, engine.layout)


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base")
    tiny_llama(tmp_path / "one", seed=1)
    checkpoints, layout = open_models(tmp_path / "base", {"one": tmp_path / "one"})
    names = [tensor.name for tensor in layout.shared]
    assert "embed_tokens.weight" in names and "layers.0.self_attn.q_proj.weight" in names
    assert not any("lm_head" in name for name in names)
    out = applied(MergeEngine(checkpoints, layout), make_recipe(checkpoints, "linear", [2.0]))
    expert = checkpoints["one"]
    assert torch.equal(out["embed_tokens.weight"], expert.tensor("model.embed_tokens.weight"))
