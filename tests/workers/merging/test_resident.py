from __future__ import annotations

import copy
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from optimizer.errors import InfeasibleCandidate, InvalidCheckpoint, InvalidInput
from optimizer.plans import Slice, stack, swap
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe
from tests.workers.merging import deep_models
from tests.workers.models import make_recipe, open_models, tiny_bert, tiny_bert_base, tiny_llama, tiny_vit
from workers.merging.engine import MergeEngine
from workers.merging.plans import renumbered
from workers.merging.resident import ResidentModels

CPU = torch.device("cpu")
IDS = torch.tensor([[2, 8, 9, 10, 3], [2, 20, 21, 22, 3]])
TEXT = "AutoModelForSequenceClassification"


def residents(
    base: Path, experts: dict[str, Path], dtype: torch.dtype = torch.float32, heads: tuple[str, ...] = ("classifier.*",)
) -> ResidentModels:
    checkpoints, layout = open_models(base, experts, heads)
    return ResidentModels(checkpoints, layout, MergeEngine(checkpoints, layout), CPU, dtype)


def merge(models: ResidentModels, row: list[float], operator: str = "task_arithmetic") -> None:
    models.apply(make_recipe(models.checkpoints, operator, row))


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights in fresh memory: matrix products can differ with the alignment of mapped files."""
    return copy.deepcopy(model).eval()  # type: ignore[no-untyped-call, no-any-return]


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Tensor = IDS) -> Tensor:
    out: Tensor = model(inputs).logits
    return out


@pytest.fixture
def berts(tmp_path: Path) -> Path:
    tiny_bert_base(tmp_path / "base")
    tiny_bert(tmp_path / "one", labels=2, seed=1)
    tiny_bert(tmp_path / "two", labels=4, seed=2)
    return tmp_path


@pytest.fixture
def models(berts: Path) -> ResidentModels:
    return residents(berts / "base", {"one": berts / "one", "two": berts / "two"})


def test_an_expert_alone_computes_what_the_expert_does(models: ResidentModels, berts: Path) -> None:
    for name, row in (("one", [1.0, 0.0]), ("two", [0.0, 1.0])):
        merge(models, row)
        plain = aligned(AutoModelForSequenceClassification.from_pretrained(berts / name))
        assert torch.equal(logits(models.model(name, TEXT)), logits(plain))


def test_heads_share_the_encoders_memory_and_follow_every_merge(models: ResidentModels) -> None:
    one, two, base = models.model("one", TEXT), models.model("two", TEXT), models.model(None, "AutoModel")
    assert (one.config.num_labels, two.config.num_labels) == (2, 4)
    assert not one.training and not any(parameter.requires_grad for parameter in one.parameters())
    for name, tensor in models.shared.items():
        places = {model.get_parameter(f"bert.{name}").data_ptr() for model in (one, two)}
        assert places == {tensor.data_ptr(), base.get_parameter(name).data_ptr()}
    before = logits(one), logits(two), base(IDS).last_hidden_state
    merge(models, [0.5, 0.5])
    after = logits(one), logits(two), base(IDS).last_hidden_state
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert models.model("one", TEXT) is one


def test_before_the_first_merge_it_is_the_base(models: ResidentModels, berts: Path) -> None:
    for name, tensor in models.shared.items():
        assert torch.equal(tensor, models.checkpoints["base"].tensor(name))


def test_a_merge_depends_on_nothing_before_it(models: ResidentModels) -> None:
    model = models.model("one", TEXT)
    merge(models, [0.3, 0.4], "ties")
    first = logits(model)
    merge(models, [1.0, -0.5])
    merge(models, [0.3, 0.4], "ties")
    assert torch.equal(logits(model), first)


def test_bfloat16(berts: Path) -> None:
    models = residents(berts / "base", {"one": berts / "one"}, torch.bfloat16)
    merge(models, [1.0])
    plain = AutoModelForSequenceClassification.from_pretrained(berts / "one", dtype=torch.bfloat16)
    found = models.model("one", TEXT)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(found), logits(aligned(plain)))


def test_names_that_transformers_changes_on_loading(tmp_path: Path) -> None:
    """ViT checkpoints say vit.encoder.layer.0.attention.attention.query, the model vit.layers.0.attention.q_proj."""
    tiny_vit(tmp_path / "base", labels=3)
    tiny_vit(tmp_path / "one", labels=5, seed=1)
    models = residents(tmp_path / "base", {"one": tmp_path / "one"})
    merge(models, [1.0])
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = aligned(AutoModelForImageClassification.from_pretrained(tmp_path / "one"))
    found = models.model("one", "AutoModelForImageClassification")
    assert torch.equal(logits(found, pixels), logits(plain, pixels))
    assert logits(models.model(None, "AutoModelForImageClassification"), pixels).shape == (2, 3)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tmp_path: Path, tied: bool) -> None:
    tiny_llama(tmp_path / "base", tied=tied)
    tiny_llama(tmp_path / "one", seed=1, tied=tied)
    models = residents(tmp_path / "base", {"one": tmp_path / "one"})
    model = models.model(None, "AutoModelForCausalLM")
    merge(models, [1.0])
    head, embeddings = model.get_parameter("lm_head.weight"), model.get_parameter("model.embed_tokens.weight")
    assert (head.data_ptr() == embeddings.data_ptr()) is tied
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(model), logits(aligned(plain)))


def test_threads_that_load_at_once_leave_transformers_as_it_was(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base", tied=True)
    tiny_llama(tmp_path / "one", seed=1, tied=True)
    before = PreTrainedModel.tie_weights

    def load(_: int) -> bool:
        models = residents(tmp_path / "base", {"one": tmp_path / "one"})
        model = models.model(None, "AutoModelForCausalLM")
        weights = [model.get_parameter(name) for name in ("lm_head.weight", "model.embed_tokens.weight")]
        return weights[0].data_ptr() == weights[1].data_ptr()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(load, range(16)))
    assert PreTrainedModel.tie_weights is before


def test_weights_that_transformers_fuses_on_loading(tmp_path: Path) -> None:
    """A mixture of experts is stored expert by expert and computed with all of them in one tensor."""
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=64,
    )
    for name, seed in (("base", 0), ("one", 1)):
        torch.manual_seed(seed)
        MixtralForCausalLM(config).save_pretrained(tmp_path / name)
    models = residents(tmp_path / "base", {"one": tmp_path / "one"})
    assert any(name.endswith("experts.0.w1.weight") for name in models.shared)
    model = models.model(None, "AutoModelForCausalLM")
    for name, row in (("one", [1.0]), ("base", [0.0]), ("one", [1.0])):
        merge(models, row)
        plain = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0)


Plan = list[PlannedLayer]


class TestLayerPlans:
    """What they compute is compared with exports in test_plans; here is how the model is re-assembled."""

    @pytest.fixture(params=["llama", "bert", "vit", "gpt2", "mixtral"])
    def models(self, request: pytest.FixtureRequest, tmp_path: Path) -> ResidentModels:
        for seed, name in enumerate(("base", "one", "two")):
            deep_models.save(request.param, tmp_path / name, seed)
        experts = {name: tmp_path / name for name in ("one", "two")}
        return residents(tmp_path / "base", experts, heads=("classifier.*", "score.*"))

    @staticmethod
    def apply(models: ResidentModels, plan: Plan | None, row: tuple[float, float] = (0.6, 0.3)) -> None:
        recipe = make_recipe(models.checkpoints, "task_arithmetic", list(row))
        models.apply(recipe.model_copy(update={"layers": plan}))

    @staticmethod
    def outputs(models: ResidentModels, head: str | None = "one") -> list[Tensor]:
        model_type = str(models.checkpoints["base"].config["model_type"])
        return deep_models.outputs(models.model(head, deep_models.auto_class(model_type).__name__))

    plans: tuple[Plan | None, ...] = (
        None,
        stack([Slice("one", 0, 3), Slice("two", 1, 4)]),
        [PlannedLayer(layer=3)],
        [PlannedLayer(layer=1), PlannedLayer(layer=1), PlannedLayer(layer=0, scale=0.5), PlannedLayer(layer=1)],
        swap(4, {2: "two"}),
        [PlannedLayer(layer=2), PlannedLayer(layer=2), PlannedLayer(layer=2), PlannedLayer(layer=2)],
        None,
    )

    def test_a_candidate_depends_on_nothing_before_it(self, models: ResidentModels) -> None:
        for plan in self.plans:
            engine = MergeEngine(models.checkpoints, models.layout)
            fresh = ResidentModels(models.checkpoints, models.layout, engine, CPU, models.dtype)
            self.apply(models, plan)
            self.apply(fresh, plan)
            assert models.shared.keys() == fresh.shared.keys()
            assert all(torch.equal(models.shared[name], fresh.shared[name]) for name in fresh.shared)
            for head in ("one", "two"):
                logits, *written = self.outputs(models, head)
                wanted, *others = self.outputs(fresh, head)
                assert torch.equal(logits, wanted)
                for left, right in zip(written, others, strict=True):
                    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)

    def test_ordinary_candidates_find_everything_as_it_was(self, models: ResidentModels) -> None:
        self.apply(models, None)
        tensors = {name: tensor.clone() for name, tensor in models.shared.items()}
        places = {name: tensor.data_ptr() for name, tensor in models.shared.items()}
        before = self.outputs(models)[0]
        for plan in self.plans[1:-1]:
            self.apply(models, plan, (1.0, -0.5))
            self.outputs(models)
        self.apply(models, None)
        assert {name: tensor.data_ptr() for name, tensor in models.shared.items()} == places
        assert all(torch.equal(models.shared[name], tensor) for name, tensor in tensors.items())
        assert torch.equal(self.outputs(models)[0], before)

    def test_memory_is_reused_and_repeated_layers_are_there_once(self, models: ResidentModels) -> None:
        deep = stack([Slice("one", 0, 3), Slice("two", 1, 4)])
        self.apply(models, deep)
        places = {name: tensor.data_ptr() for name, tensor in models.shared.items()}
        self.apply(models, [PlannedLayer(layer=0)])
        self.apply(models, deep)
        assert {name: tensor.data_ptr() for name, tensor in models.shared.items()} == places
        self.apply(models, [PlannedLayer(layer=0), PlannedLayer(layer=2), PlannedLayer(layer=2)])
        inner = {name: tensor for name, tensor in models.shared.items() if re.match(r"^[^0-9]*\.1\.", name)}
        assert inner and all(models.shared[renumbered(name, 2)] is tensor for name, tensor in inner.items())

    def test_a_model_is_the_same_object_while_its_layers_stay(self, models: ResidentModels) -> None:
        name = deep_models.auto_class(str(models.checkpoints["base"].config["model_type"])).__name__
        self.apply(models, [PlannedLayer(layer=layer) for layer in (0, 1, 1)])
        first = models.model("one", name)
        before = self.outputs(models)[0]
        assert first.config.num_hidden_layers == 3
        self.apply(models, [PlannedLayer(layer=layer) for layer in (3, 0, 1)])
        assert models.model("one", name) is first and not torch.equal(self.outputs(models)[0], before)
        self.apply(models, [PlannedLayer(layer=0), PlannedLayer(layer=1)])
        again = models.model("one", name)
        assert again is not first and again.config.num_hidden_layers == 2
        self.apply(models, [PlannedLayer(layer=layer) for layer in (0, 1, 1)])
        keeps_weights_of_its_own = models.checkpoints["base"].config["model_type"] == "mixtral"
        assert (models.model("one", name) is first) is not keeps_weights_of_its_own
        assert torch.equal(self.outputs(models)[0], before)

    def test_a_plan_that_cannot_be_changes_nothing(self, models: ResidentModels) -> None:
        self.apply(models, [PlannedLayer(layer=1), PlannedLayer(layer=2)])
        before, tensors = self.outputs(models)[0], {name: tensor.clone() for name, tensor in models.shared.items()}
        with pytest.raises(InvalidInput, match="no layer 4"):
            self.apply(models, [PlannedLayer(layer=4)])
        assert all(torch.equal(models.shared[name], tensor) for name, tensor in tensors.items())
        assert torch.equal(self.outputs(models)[0], before)

    def test_an_infeasible_candidate_does_not_reach_the_next(self, models: ResidentModels) -> None:
        self.apply(models, None)
        before = self.outputs(models)[0]
        node = make_recipe(models.checkpoints, "linear", [0.5, -0.5]).root
        recipe = make_recipe(models.checkpoints, "linear", [0.5, 0.5])
        assert isinstance(node, Merge)
        with pytest.raises(InfeasibleCandidate):
            models.apply(
                recipe.model_copy(update={"layers": [PlannedLayer(layer=0), PlannedLayer(layer=1, node=node)]})
            )
        self.apply(models, None)
        assert torch.equal(self.outputs(models)[0], before)


def test_planned_models_of_several_heads_share_memory(tmp_path: Path) -> None:
    tiny_bert_base(tmp_path / "base", layers=3)
    tiny_bert(tmp_path / "one", labels=2, seed=1, layers=3)
    tiny_bert(tmp_path / "two", labels=4, seed=2, layers=3)
    models = residents(tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"})
    root = Leaf(model="one")
    plan = [PlannedLayer(layer=2), PlannedLayer(layer=0), PlannedLayer(layer=0), PlannedLayer(layer=1)]
    models.apply(Recipe(models=make_recipe(models.checkpoints, "linear", [1, 1]).models, root=root, layers=plan))
    one, two, base = models.model("one", TEXT), models.model("two", TEXT), models.model(None, "AutoModel")
    assert (one.config.num_labels, two.config.num_labels) == (2, 4)
    for name, tensor in models.shared.items():
        places = {model.get_parameter(f"bert.{name}").data_ptr() for model in (one, two)}
        assert places == {tensor.data_ptr(), base.get_parameter(name).data_ptr()}
    assert logits(one).shape == (2, 2) and logits(two).shape == (2, 4)


class TestNothingIsInitialisedAtRandom:
    def test_the_base_has_no_head(self, models: ResidentModels) -> None:
        with pytest.raises(InvalidInput, match=r"needs classifier.bias, classifier.weight, which the base") as caught:
            models.model(None, TEXT)
        assert caught.value.field == "head" and "expert whose head" in str(caught.value.remedy)

    def test_a_head_of_another_task(self, models: ResidentModels) -> None:
        with pytest.raises(InvalidInput, match="BertForQuestionAnswering needs qa_outputs"):
            models.model("one", "AutoModelForQuestionAnswering")

    def test_a_pooler_nobody_has(self, tmp_path: Path, berts: Path) -> None:
        from safetensors.torch import load_file, save_file

        for name in ("base", "one"):
            tensors = load_file(berts / name / "model.safetensors")
            kept = {key: value for key, value in tensors.items() if "pooler" not in key}
            save_file(kept, berts / name / "model.safetensors", {"format": "pt"})
        models = residents(berts / "base", {"one": berts / "one"})
        with pytest.raises(InvalidInput, match=r"needs bert.pooler.dense.bias, .*expert 'one' does not have"):
            models.model("one", TEXT)
        headless = models.model(None, "AutoModel")(IDS)
        assert bool(headless.last_hidden_state.isfinite().all()) and bool(headless.pooler_output.isnan().all())

    def test_a_config_of_another_size(self, berts: Path) -> None:
        config = json.loads((berts / "one" / "config.json").read_text())
        config |= {"id2label": {str(number): str(number) for number in range(9)}, "label2id": {}}
        (berts / "one" / "config.json").write_text(json.dumps(config))
        models = residents(berts / "base", {"one": berts / "one"})
        with pytest.raises(InvalidCheckpoint, match=r"one: its tensors do not fit its config.json"):
            models.model("one", TEXT)


def test_unknown_heads_and_classes(models: ResidentModels) -> None:
    with pytest.raises(InvalidInput, match="'three' is no expert"):
        models.model("three", TEXT)
    for name in ("AutoModelForMagic", "AutoConfig", "pipeline"):
        with pytest.raises(InvalidInput, match="no model class"):
            models.model("one", name)
    with pytest.raises(InvalidInput, match="does not know models of type 'bert'"):
        models.model("one", "AutoModelForImageClassification")


def test_a_config_cannot_name_code_to_run(berts: Path) -> None:
    config = json.loads((berts / "one" / "config.json").read_text())
    config |= {
        "attn_implementation": "somebody/kernels",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
    }
    (berts / "one" / "config.json").write_text(json.dumps(config))
    (berts / "one" / "evil.py").write_text("raise SystemExit('ran')")
    models = residents(berts / "base", {"one": berts / "one"})
    assert type(models.model("one", TEXT)).__module__.startswith("transformers.models.bert")
