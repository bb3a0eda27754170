"""Layer plans through the engine and the export: what stands where, mergekit's own stacks, and reloading."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, make_layout
from optimizer.plans import Slice, additions, ends, prune, scaled, stack, swap
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe, Selector
from tests.workers.merging.deep_models import IDS, LAYERS, auto_class, outputs, save
from tests.workers.models import make_recipe, model_ids, open_models
from workers.checkpoints import Checkpoint
from workers.export import export_checkpoint
from workers.merging.engine import MergeEngine
from workers.merging.plans import arranged, moved, placements, renumbered, stack_of
from workers.merging.resident import ResidentModels

DATA = Path(__file__).parent / "reference" / "data"
WEIGHTS = "model.safetensors"
BASE, ONE = Leaf(model="base"), Leaf(model="one")
Models = tuple[dict[str, Checkpoint], Layout]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(models: Models) -> MergeEngine:
    return MergeEngine(*models)


def make_models(model_type: str, root: Path, **changes: Any) -> Models:
    for seed, name in enumerate(("base", "one", "two")):
        save(model_type, root / name, seed, **changes)
    return open_models(root / "base", {"one": root / "one", "two": root / "two"}, [])


def planned(models: Models, layers: list[PlannedLayer] | None, root: Leaf | Merge = ONE) -> Recipe:
    return Recipe(models=model_ids(models[0]), root=root, layers=layers)


def applied(engine: MergeEngine, recipe: Recipe) -> dict[str, Tensor]:
    out = {tensor.name: torch.full(tensor.shape, 7.0) for tensor in engine.result_layout(recipe).shared}
    engine.apply(recipe, out)
    return out


def export(models: Models, recipe: Recipe, out: Path, head: str | None = None) -> Path:
    settings: dict[str, Any] = {"title": "Test", "scores": {}, "spec": None, "progress": lambda _: None}
    return export_checkpoint(recipe, *models, out, head=head, **settings)


def reload(model_type: str, path: Path) -> Any:
    model, info = auto_class(model_type).from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return copy.deepcopy(model).eval()  # weights in fresh memory: products can differ with the alignment of the file


def raw(models: Models, model: str, name: str) -> Tensor:
    return models[0][model].tensor(f"model.{name}")


DOWN, UP = "layers.{}.mlp.down_proj.weight", "layers.{}.mlp.up_proj.weight"


class TestWhatStandsWhere:
    def test_removed_repeated_and_replaced_layers(self, models: Models, engine: MergeEngine) -> None:
        plan = [
            PlannedLayer(layer=2),
            PlannedLayer(layer=2, node=BASE),
            PlannedLayer(layer=2),
            PlannedLayer(layer=0, node=Leaf(model="two", layer=3)),
            PlannedLayer(layer=1, node=Leaf(model="two")),
        ]
        recipe = planned(models, plan)
        layout = engine.result_layout(recipe)
        out = applied(engine, recipe)
        assert layout.layers == 5 and {tensor.position for tensor in layout.shared} == {"input", "output", *range(5)}
        for depth, (model, layer) in enumerate([("one", 2), ("base", 2), ("one", 2), ("two", 3), ("two", 1)]):
            for name in (DOWN, UP, "layers.{}.input_layernorm.weight"):
                assert torch.equal(out[name.format(depth)], raw(models, model, name.format(layer)))
        assert torch.equal(out["embed_tokens.weight"], raw(models, "one", "embed_tokens.weight"))
        assert len(out) == 2 + 5 * 9

    def test_layers_of_different_numbers_merge(self, models: Models, engine: MergeEngine) -> None:
        node = Merge(
            operator="linear",
            base=BASE,
            inputs=[Leaf(model="one", layer=3), Leaf(model="two", layer=1)],
            groups=[Selector()],
            coefficients=[[0.25, 0.75]],
        )
        out = applied(engine, planned(models, [PlannedLayer(layer=0, node=node)]))
        wanted = 0.25 * raw(models, "one", UP.format(3)) + 0.75 * raw(models, "two", UP.format(1))
        torch.testing.assert_close(out[UP.format(0)], wanted)

    def test_groups_and_breaks_mean_the_models_layers(self, models: Models, engine: MergeEngine) -> None:
        groups = [Selector(positions=[3]), Selector()]
        root = Merge(operator="linear", base=BASE, inputs=[BASE, ONE], groups=groups, coefficients=[[0, 1], [1, 0]])
        out = applied(engine, planned(models, [PlannedLayer(layer=3), PlannedLayer(layer=2)], root))
        assert torch.equal(out[UP.format(0)], raw(models, "one", UP.format(3)))
        assert torch.equal(out[UP.format(1)], raw(models, "base", UP.format(2)))
        begin = models[1].offsets()[UP.format(3)]
        root = Merge(operator="linear", base=BASE, inputs=[BASE, ONE], breaks=[begin], coefficients=[[1, 0], [0, 1]])
        out = applied(engine, planned(models, [PlannedLayer(layer=3), PlannedLayer(layer=2)], root))
        assert torch.equal(out[UP.format(0)], raw(models, "one", UP.format(3)))
        assert torch.equal(out[DOWN.format(0)], raw(models, "base", DOWN.format(3)))

    def test_a_scale_is_on_what_writes_into_the_residual_stream(self, models: Models, engine: MergeEngine) -> None:
        out = applied(engine, planned(models, [PlannedLayer(layer=1, scale=-0.3), PlannedLayer(layer=1)]))
        changed = set()
        for name, tensor in out.items():
            source = raw(models, "one", renumbered(name, 1) if "layers" in name else name)
            if not torch.equal(tensor, source):
                assert torch.equal(tensor, source * -0.3)
                changed.add(name)
        assert changed == {DOWN.format(0), "layers.0.self_attn.o_proj.weight"}

    def test_one_tensor_equals_the_same_of_all(self, models: Models, engine: MergeEngine) -> None:
        root = make_recipe(models[0], "ties", [0.5, 0.7]).root
        recipe = planned(models, [PlannedLayer(layer=3, scale=0.5), PlannedLayer(layer=0)], root)
        out = applied(engine, recipe)
        for tensor in engine.result_layout(recipe).shared:
            assert torch.equal(engine.merged(recipe, tensor), out[tensor.name])

    def test_repeated_layers_may_share_their_memory(self, models: Models, engine: MergeEngine) -> None:
        recipe = planned(models, [PlannedLayer(layer=1), PlannedLayer(layer=0), PlannedLayer(layer=1)])
        apart = applied(engine, recipe)
        out = {tensor.name: torch.full(tensor.shape, 7.0) for tensor in engine.result_layout(recipe).shared}
        out |= {name: out[renumbered(name, 0)] for name in out if name.startswith("layers.2.")}
        engine.apply(recipe, out)
        assert all(torch.equal(out[name], tensor) for name, tensor in apart.items())


coefficients = st.integers(-15, 15).map(lambda number: number / 10)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(coefficients, coefficients, st.sampled_from(["task_arithmetic", "ties"]))
def test_a_plan_that_changes_nothing_is_no_plan(engine: MergeEngine, one: float, two: float, operator: str) -> None:
    plain = make_recipe(engine.checkpoints, operator, [one, two])
    same = plain.model_copy(update={"layers": swap(LAYERS, {})})
    assert engine.result_layout(same) == engine.layout
    first, second = applied(engine, plain), applied(engine, same)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "vit", "qwen2", "mixtral"])
def test_an_export_computes_what_the_resident_model_does(model_type: str, tmp_path: Path) -> None:
    models = make_models(model_type, tmp_path)
    resident = ResidentModels(*models, MergeEngine(*models), torch.device("cpu"), torch.float32)
    root = make_recipe(models[0], "task_arithmetic", [0.6, 0.3]).root
    layers = {
        "fewer": [PlannedLayer(layer=3), PlannedLayer(layer=1, node=ONE)],
        "more": stack([Slice("one", 0, 3), Slice("two", 1, 4)]),
        "scaled": [PlannedLayer(layer=layer, scale=0.5 + layer / 4) for layer in (0, 2, 2, 3)],
        "one": [PlannedLayer(layer=2)],
    }
    for name, plan in layers.items():
        recipe = planned(models, plan, root)
        out = export(models, recipe, tmp_path / f"out-{name}")
        resident.apply(recipe)
        wanted = outputs(resident.model(None, auto_class(model_type).__name__))
        found = reload(model_type, out)
        assert found.config.num_hidden_layers == len(plan)
        logits, *written = outputs(found)
        assert torch.equal(logits, wanted[0]), name
        for left, right in zip(
            written, wanted[1:], strict=True
        ):  # products of one row differ with their memory's place
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_exported_kinds_of_layers_move_along(tmp_path: Path) -> None:
    models = make_models("qwen2", tmp_path)
    kinds = models[0]["base"].config["layer_types"]
    assert kinds == ["full_attention"] * 2 + ["sliding_attention"] * 2
    plan = [PlannedLayer(layer=layer) for layer in (3, 0, 0, 2, 1)]
    config = json.loads((export(models, planned(models, plan), tmp_path / "out") / "config.json").read_text())
    assert config["layer_types"] == [kinds[layer.layer] for layer in plan]
    assert config["num_hidden_layers"] == 5
    same = json.loads(
        (export(models, planned(models, swap(4, {1: "two"})), tmp_path / "same") / "config.json").read_text()
    )
    assert same == models[0]["base"].config


def test_what_a_config_leaves_out_moves_along_too(tmp_path: Path) -> None:
    """Older configs do not list the kinds of layers; what transformers makes of the depth is written out then."""
    for seed, name in enumerate(("base", "one")):
        path = save("qwen2", tmp_path / name, seed) / "config.json"
        config = json.loads(path.read_text())
        del config["layer_types"]
        path.write_text(json.dumps(config))
    models = open_models(tmp_path / "base", {"one": tmp_path / "one"}, [])
    plan = [PlannedLayer(layer=3), PlannedLayer(layer=1)]
    config = json.loads((export(models, planned(models, plan), tmp_path / "out") / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"]


REFERENCE: Any = json.loads((DATA / "plans.json").read_text())


@pytest.fixture(scope="module")
def reference_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("mergekit")
    tensors = load_file(DATA / "plans.safetensors")
    for name in "ab":
        model = LlamaForCausalLM(LlamaConfig(**REFERENCE["config"]))
        own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        model.load_state_dict(own)
        model.save_pretrained(root / name)
    return open_models(root / "a", {"a": root / "a", "b": root / "b"}, [])


class TestMergekit:
    """mergekit 0.1.5's own results, see reference/make_plans.py."""

    @pytest.mark.parametrize("case", sorted(REFERENCE["cases"]))
    def test_bit_for_bit(self, case: str, reference_models: Models, tmp_path: Path) -> None:
        models = reference_models
        wanted = REFERENCE["cases"][case]
        slices = [Slice(model, first, end) for model, first, end, *_ in wanted["slices"]]
        factors = [scale for _, first, end, *given in wanted["slices"] for scale in (given or [1.0]) * (end - first)]
        recipe = planned(models, scaled(stack(slices), factors), ends(slices[0].model, slices[-1].model))
        out = export(models, recipe, tmp_path / "out")
        assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == wanted["layers"]
        found = load_file(out / WEIGHTS)
        digests = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in found.items()}
        assert digests == wanted["tensors"]

    def test_a_swap_is_the_same_as_a_stack(self, reference_models: Models) -> None:
        models = reference_models
        engine = MergeEngine(*models)
        first = applied(engine, planned(models, swap(4, {1: "b"}), Leaf(model="a")))
        slices = [Slice("a", 0, 1), Slice("b", 1, 2), Slice("a", 2, 4)]
        second = applied(engine, planned(models, stack(slices), ends("a", "a")))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_scales_of_the_hidden_state_in_plain_weights(tmp_path: Path) -> None:
    """Sakana's input scales and auto-merge-llm's output scales, computed as they do and as additions."""
    models = make_models("llama", tmp_path, rms_norm_eps=1e-12)
    scales = [0.6, 1.7, 1.3, 0.8]
    plain = reload("llama", export(models, planned(models, None), tmp_path / "plain"))
    for at in ("input", "output"):
        plan = scaled(swap(LAYERS, {}), additions(scales, "input" if at == "input" else "output"))
        found = reload("llama", export(models, planned(models, plan), tmp_path / at))
        model = copy.deepcopy(plain)
        for layer, scale in zip(model.model.layers, scales, strict=True):
            if at == "input":
                layer.register_forward_pre_hook(lambda _, inputs, scale=scale: (inputs[0] * scale, *inputs[1:]))
            else:
                layer.register_forward_hook(lambda _, __, out, scale=scale: out * scale)
        assert not torch.allclose(model(IDS).logits, plain(IDS).logits, atol=1e-2)
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


class TestPlansThatCannotBe:
    @pytest.mark.parametrize(
        ("plan", "field", "text"),
        [
            ([PlannedLayer(layer=4)], "recipe.layers.0.layer", "no layer 4: the models have 4"),
            (
                [PlannedLayer(layer=0), PlannedLayer(layer=1, node=Leaf(model="one", layer=9))],
                "recipe",
                "layer 9 cannot",
            ),
        ],
    )
    def test_nothing_is_written(
        self, models: Models, engine: MergeEngine, plan: list[PlannedLayer], field: str, text: str, tmp_path: Path
    ) -> None:
        recipe = planned(models, plan)
        for attempt in (engine.check, engine.result_layout, lambda recipe: export(models, recipe, tmp_path / "out")):
            with pytest.raises(InvalidInput, match=text) as caught:
                attempt(recipe)
            assert caught.value.field == field and caught.value.remedy
        assert not list(tmp_path.iterdir())

    def test_a_leaf_of_the_root_names_a_layer_that_is_not_there(self, engine: MergeEngine, models: Models) -> None:
        with pytest.raises(InvalidInput, match="layer 4 cannot stand for layer 0"):
            engine.check(planned(models, None, Leaf(model="one", layer=4)))

    def test_layers_of_another_shape(self) -> None:
        layout = make_layout([("layers.0.mlp.weight", (2, 3), "F32"), ("layers.1.mlp.weight", (2, 4), "F32")])
        recipe = Recipe.parse(
            {"models": {"one": {"ref": {"path": "x"}, "digest": "a" * 64}}, "root": {"model": "one"}}
            | {"layers": [{"layer": 0, "node": {"model": "one", "layer": 1}}]}
        )
        with pytest.raises(InvalidInput, match="in another shape or stack") as caught:
            placements(recipe, layout, {})
        assert "same kind and shape" in str(caught.value.remedy)

    def test_two_stacks(self, models: Models) -> None:
        names = ["encoder.layers.0.fc1.weight", "encoder.layers.1.fc1.weight", "decoder.layers.0.fc1.weight"]
        layout = make_layout([(name, (2, 2), "F32") for name in names])
        with pytest.raises(
            InvalidInput, match=r"several stacks of layers \(decoder.layers, encoder.layers\)"
        ) as caught:
            placements(planned(models, [PlannedLayer(layer=0)]), layout, {})
        assert caught.value.field == "recipe.layers"
        by_name = {tensor.name: tensor for tensor in layout.shared}
        first, second, other = (by_name[name] for name in names)
        assert moved(first, 1, by_name) == second and moved(other, 2, by_name) == other
        with pytest.raises(InvalidInput, match="layer 2 cannot stand for layer 0"):
            moved(first, 2, by_name)

    def test_no_layers(self) -> None:
        with pytest.raises(InvalidInput, match="no layers that could be rearranged"):
            stack_of(make_layout([("embed_tokens.weight", (2, 2), "F32")]))

    def test_a_scale_where_the_family_is_not_known(self, models: Models) -> None:
        recipe = planned(models, [PlannedLayer(layer=0), PlannedLayer(layer=1, scale=0.5)])
        with pytest.raises(InvalidInput, match="'magic' model") as caught:
            placements(recipe, models[1], {"model_type": "magic"})
        assert caught.value.field == "recipe.layers.1.scale"

    def test_what_a_layer_computes_must_not_follow_from_its_depth(self, tmp_path: Path) -> None:
        models = make_models("gpt2", tmp_path, scale_attn_by_inverse_layer_idx=True)
        with pytest.raises(InvalidInput, match="layer 2 of base would compute something else at depth 1") as caught:
            export(models, planned(models, prune(LAYERS, [1])), tmp_path / "out")
        assert caught.value.field == "recipe.layers.1.layer"
        resident = ResidentModels(*models, MergeEngine(*models), torch.device("cpu"), torch.float32)
        with pytest.raises(InvalidInput, match=r"at depth 1: attn\.scaling would be"):
            resident.apply(planned(models, prune(LAYERS, [1])))
        assert not (tmp_path / "out").exists()
        export(models, planned(models, prune(LAYERS, [3])), tmp_path / "out")

    def test_a_config_of_another_depth(self, models: Models, tmp_path: Path) -> None:
        for name in ("base", "one"):
            save("llama", tmp_path / name, 0)
            config = json.loads((tmp_path / name / "config.json").read_text())
            (tmp_path / name / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
        found = open_models(tmp_path / "base", {"one": tmp_path / "one"}, [])
        with pytest.raises(InvalidInput, match="has num_hidden_layers = 2"):
            export(found, planned(found, [PlannedLayer(layer=3)]), tmp_path / "out")


plans = st.lists(st.builds(PlannedLayer, layer=st.integers(0, LAYERS - 1)), min_size=1, max_size=7)


@given(plans)
def test_every_tensor_of_a_layer_moves(plan: list[PlannedLayer]) -> None:
    inner = ("mlp.up_proj.weight", "attn.mask")
    layout = make_layout([(f"layers.{layer}.mlp.up_proj.weight", (2, 2), "F32") for layer in range(LAYERS)])
    names = {f"layers.{layer}.{name}": f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in inner}
    names |= {"embed.weight": "model.embed.weight", "classifier.0.weight": "classifier.0.weight"}
    out = arranged(names, plan, layout)
    assert len(out) == 2 + len(plan) * len(inner) and out["classifier.0.weight"].raw == "classifier.0.weight"
    for depth, layer in enumerate(plan):
        for name in inner:
            origin = out[f"layers.{depth}.{name}"]
            assert origin.target == f"model.layers.{depth}.{name}"
            assert origin.name == f"layers.{layer.layer}.{name}" and origin.raw == f"model.{origin.name}"


def test_tensors_that_are_not_merged_move_too(tmp_path: Path) -> None:
    """Old GPT-2 checkpoints store their masks; whole numbers are the base's, at the layer's new depth."""
    for seed, name in enumerate(("base", "one", "two")):
        tensors = load_file(save("gpt2", tmp_path / name, seed) / WEIGHTS)
        marks = {f"transformer.h.{layer}.attn.mark": torch.tensor([10 * seed + layer]) for layer in range(LAYERS)}
        save_file(tensors | marks, tmp_path / name / WEIGHTS, {"format": "pt"})
    models = open_models(tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"}, [])
    plan = [PlannedLayer(layer=3), PlannedLayer(layer=1), PlannedLayer(layer=3)]
    found = load_file(export(models, planned(models, plan), tmp_path / "out", head="one") / WEIGHTS)
    depths = {name: int(tensor) for name, tensor in found.items() if name.endswith("mark")}
    assert depths == {f"transformer.h.{depth}.attn.mark": layer.layer for depth, layer in enumerate(plan)}
