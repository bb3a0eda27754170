"""LoRA adapters as checkpoints, against PEFT itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from optimizer.errors import InputsChanged, InvalidCheckpoint, InvalidInput
from optimizer.ports import Task
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.space import make_space
from optimizer.spec import JobSpec
from tests.workers.adapter_models import (
    causal,
    changed,
    classifier,
    make_adapter,
    merged,
    open_all,
    silence,
    wrapped,
)
from tests.workers.models import make_recipe, model_ids, tiny_bert, tiny_bert_base, tiny_llama, tiny_vit
from workers.adapters import Adapter, open_adapter
from workers.adapters_names import names_in_memory
from workers.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, Factors, open_checkpoint, open_checkpoints
from workers.compatibility import inspect, raise_on_errors
from workers.export import export_checkpoint
from workers.merging import engine as engines
from workers.merging import low_rank
from workers.merging.engine import MergeEngine
from workers.merging.resident import ResidentModels
from workers.naming import canonical_names
from workers.prepare import prepare
from workers.roots import Roots
from workers.worker import EvaluationWorker

CPU = torch.device("cpu")
IDS = torch.tensor([[2, 8, 9, 10, 3], [2, 20, 21, 22, 3]])
HEADS = ("classifier.*", "score.*")
TEXT = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, and two ordinary adapters to each of llama and bert."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_llama(root / "llama")
    tiny_llama(root / "untied", tied=False)
    tiny_bert_base(root / "bert")
    tiny_vit(root / "vit")
    causal(root / "llama", root / "one", 1)
    causal(root / "llama", root / "two", 2, r=2, target_modules=["q_proj", "down_proj"])
    classifier(root / "bert", root / "five", 5, 1)
    classifier(root / "bert", root / "three", 3, 2, bias="lora_only")
    return root


def gpt2(path: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def assert_like_peft(adapter: Checkpoint, theirs: dict[str, Tensor]) -> None:
    """Bit for bit, every tensor; the adapter must have all of them."""
    names = names_in_memory(adapter)
    assert set(names) == set(adapter.tensors)
    assert len(names) >= len(theirs) - 1  # a tied output layer counts once
    for raw, name in names.items():
        assert torch.equal(adapter.tensor(raw), theirs[name]), raw
        assert adapter.tensor(raw).shape == adapter.tensors[raw].shape


class TestEqualsPeft:
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"r": 3, "lora_alpha": 7, "use_rslora": True},
            {
                "target_modules": ["q_proj", "k_proj", "down_proj"],
                "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
                "alpha_pattern": {"^model.layers.0.mlp.down_proj": 1, "q_proj": 5},
            },
            {"layers_to_transform": [1], "layers_pattern": "layers"},
            {"target_modules": "all-linear", "bias": "all"},
            {"target_modules": ["lm_head", "embed_tokens", "o_proj"]},
            {"modules_to_save": ["norm", "lm_head"]},
        ],
        ids=["plain", "rslora", "patterns", "layers", "all-linear", "embeddings", "modules_to_save"],
    )
    def test_language_models(self, root: Path, tmp_path: Path, config: dict[str, Any]) -> None:
        path = causal(root / "untied", tmp_path / "adapter", **config)
        adapter = open_all(root / "untied", [path])["adapter"]
        assert_like_peft(adapter, merged(AutoModelForCausalLM, root / "untied", path))

    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"bias": "lora_only"},
            {"bias": "all", "target_modules": ["key", "dense"]},
            {"lora_bias": True, "task_type": None, "modules_to_save": ["classifier", "pooler"]},
            {"target_modules": ["word_embeddings", "query"]},
        ],
        ids=["plain", "lora_only", "all", "lora_bias", "embeddings"],
    )
    @pytest.mark.parametrize("headless", [True, False])
    def test_classifiers(self, root: Path, tmp_path: Path, config: dict[str, Any], headless: bool) -> None:
        """The base may be saved without the head that the adapter was trained with, or with one of another size."""
        base = root / "bert" if headless else tiny_bert(tmp_path / "base", labels=3)
        path = classifier(base, tmp_path / "adapter", 5, **config)
        adapter = open_all(base, [path])["adapter"]
        theirs = merged(
            AutoModelForSequenceClassification, base, path, num_labels=5, ignore_mismatched_sizes=not headless
        )
        assert_like_peft(adapter, theirs)
        assert adapter.config["architectures"] == ["BertForSequenceClassification"]
        assert len(adapter.config["id2label"]) == 5

    @pytest.mark.parametrize("old_names", [False, True])
    def test_images_convolutions_and_names_that_transformers_changed(
        self, root: Path, tmp_path: Path, old_names: bool
    ) -> None:
        """Modules were called vit.encoder.layer.0.attention.attention.query before, and still are in the files."""
        with silence():
            model = AutoModelForImageClassification.from_pretrained(root / "vit")
        path = make_adapter(model, tmp_path / "new", r=2, target_modules=["q_proj", "projection"])
        theirs = merged(AutoModelForImageClassification, root / "vit", path)
        if old_names:

            def rename(tensors: dict[str, Tensor]) -> None:
                for name in list(tensors):
                    old = name.replace("vit.layers", "vit.encoder.layer").replace("q_proj", "attention.query")
                    tensors[old] = tensors.pop(name)

            path = changed(path, tmp_path / "old", rename)
        assert_like_peft(open_all(root / "vit", [path])[path.name], theirs)

    def test_layers_that_store_in_by_out(self, tmp_path: Path) -> None:
        base = gpt2(tmp_path / "gpt2")
        with silence():
            model = AutoModelForCausalLM.from_pretrained(base)
        path = make_adapter(model, tmp_path / "adapter", r=2, target_modules=["c_attn", "attn.c_proj", "wpe"])
        opened = open_all(base, [path])
        assert_like_peft(opened["adapter"], merged(AutoModelForCausalLM, base, path))
        square = opened["adapter"].factors("transformer.h.0.attn.c_proj.weight")
        assert square is not None and square.transposed

    def test_16_bits_are_rounded_once(self, root: Path, tmp_path: Path) -> None:
        """PEFT rounds the product and then the sum; here nothing is rounded before the merge is written."""
        base = tiny_llama(tmp_path / "low", dtype=torch.bfloat16)
        path = causal(base, tmp_path / "adapter")
        opened = open_all(base, [path])
        theirs = merged(AutoModelForCausalLM, base, path, dtype=torch.bfloat16)
        raw = "model.layers.0.self_attn.q_proj.weight"
        ours, factors = opened["adapter"].tensor(raw), opened["adapter"].factors(raw)
        assert factors is not None and ours.dtype == torch.float32 and theirs[raw].dtype == torch.bfloat16
        exact = opened["base"].tensor(raw).double() + factors.scale * (factors.up.double() @ factors.down.double())
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours, theirs[raw].float(), rtol=1e-2, atol=1e-2)

    @torch.no_grad()
    def test_tied_output_layers(self, root: Path, tmp_path: Path) -> None:
        """With factors for both sides the model computes what PEFT's does; `merge_and_unload` counts them twice."""
        modules = ["embed_tokens", "q_proj"]
        path = causal(root / "llama", tmp_path / "adapter", target_modules=modules, ensure_weight_tying=True)
        models = residents(open_all(root / "llama", [path]))
        models.apply(make_recipe(models.checkpoints, "task_arithmetic", [1.0]))
        theirs = wrapped(AutoModelForCausalLM, root / "llama", path)
        found = models.model("adapter", "AutoModelForCausalLM")
        torch.testing.assert_close(found(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)

    def test_embeddings_of_a_tied_base(self, root: Path, tmp_path: Path) -> None:
        path = causal(root / "llama", tmp_path / "adapter", target_modules=["embed_tokens"])
        opened = open_all(root / "llama", [path])
        assert_like_peft(opened["adapter"], merged(AutoModelForCausalLM, root / "llama", path))
        _, findings = inspect(opened["base"], [opened["adapter"]], HEADS)
        assert [finding.severity for finding in findings] == ["info", "warning"]
        assert "the output layer, which the base ties to them, changes with them" in findings[1].message


def residents(checkpoints: dict[str, Checkpoint]) -> ResidentModels:
    base, *experts = checkpoints.values()
    layout, findings = inspect(base, experts, HEADS)
    raise_on_errors(findings)
    return ResidentModels(checkpoints, layout, MergeEngine(checkpoints, layout), CPU, torch.float32)


class TestAsAnExpert:
    @torch.no_grad()
    def test_heads(self, root: Path) -> None:
        """Two adapters with heads of different sizes, and a whole model beside them."""
        tiny_bert(root / "whole", labels=4, seed=9)
        models = residents(open_all(root / "bert", [root / "five", root / "three", root / "whole"]))
        for number, (name, labels) in enumerate((("five", 5), ("three", 3))):
            models.apply(make_recipe(models.checkpoints, "task_arithmetic", [float(n == number) for n in range(3)]))
            theirs = wrapped(AutoModelForSequenceClassification, root / "bert", root / name, num_labels=labels)
            with silence():
                plain = theirs.merge_and_unload()
            found = models.model(name, TEXT)
            assert found.config.num_labels == labels
            torch.testing.assert_close(found(IDS).logits, plain(IDS).logits, rtol=1e-6, atol=1e-6)

    def test_report(self, root: Path) -> None:
        opened = open_all(root / "bert", [root / "five", root / "three"])
        layout, findings = inspect(opened["base"], [opened["five"], opened["three"]], HEADS)
        assert len(layout.shared) == 39
        assert [(finding.severity, finding.model) for finding in findings] == [("info", "five"), ("info", "three")]
        assert "LoRA adapter on query, value: rank 4 and scale 2 in 4 modules; 2 tensors" in findings[0].message
        assert "6 tensors are its own as a whole" in findings[1].message

    def test_a_job_names_adapters_among_its_experts(self, root: Path) -> None:
        spec = {
            "base": "llama",
            "experts": [{"name": "a", "path": "one"}, {"name": "b", "path": "llama"}],
            "objectives": [{"name": "x", "evaluator": "perplexity", "data": {"path": "data"}}],
            "budget": {"evaluations": 1},
        }
        opened = open_checkpoints(JobSpec.model_validate(spec), Roots([root]))
        assert isinstance(opened["a"], Adapter) and not isinstance(opened["b"], Adapter)
        with pytest.raises(InvalidCheckpoint, match="one is a PEFT adapter, not a whole model") as caught:
            open_checkpoints(JobSpec.model_validate(spec | {"base": "one"}), Roots([root]))
        assert caught.value.field == "base" and "among the experts" in str(caught.value.remedy)

    def test_a_job_from_its_spec_to_a_score(self, root: Path) -> None:
        """Evaluators read labels and tokenizers as a whole model's; the head's adapter need not have any."""
        for labels, name in ((5, "five"), (3, "three")):
            rows = [{"text": f"w{row} w{row + 1}", "label": row % labels} for row in range(12)]
            (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = JobSpec.model_validate(
            {
                "base": "bert",
                "experts": [{"name": name, "path": name} for name in ("five", "three")],
                "merge": {"operator": "core_space", "granularity": {"layers": "whole"}},
                "objectives": [
                    {
                        "name": name,
                        "evaluator": "text_classification",
                        "data": {"path": f"{name}.jsonl"},
                        "head": name,
                        "metric": "loss",
                    }
                    for name in ("five", "three")
                ],
                "budget": {"evaluations": 4},
            }
        )
        roots = Roots([root])
        problem = prepare(spec, roots)
        assert [finding.severity for finding in problem.findings] == ["info", "info"]
        worker = EvaluationWorker(spec, problem, roots, "one")
        recipe = make_space(spec, problem).recipe(np.array([0.6, 0.4]))
        result = worker.evaluate(Task(0, recipe.to_json()))
        assert result.failure is None and {name: len(scores.values) for name, scores in result.scores.items()} == {
            "five": 12,
            "three": 12,
        }
        whole = spec.model_dump(mode="json")
        whole["experts"] = [{"name": name, "path": "bert"} for name in ("five", "three")]
        with pytest.raises(InvalidInput, match="core_space merges LoRA adapters, and none of the experts is one"):
            prepare(JobSpec.model_validate(whole), roots)

    def test_its_directory_reads_like_a_whole_models(self, root: Path, tmp_path: Path) -> None:
        base = tiny_bert_base(tmp_path / "base")
        adapter = open_all(base, [classifier(base, tmp_path / "adapter", 5)])["adapter"]
        config = json.loads((adapter.path / "config.json").read_text())
        assert config == adapter.config and config["architectures"] == ["BertForSequenceClassification"]
        assert (adapter.path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert not list(adapter.path.glob("*.safetensors")) and "num_labels" not in (base / "config.json").read_text()
        path = adapter.path
        del adapter
        assert not path.exists() and (base / "tokenizer.json").is_file()

    @torch.no_grad()
    def test_export_as_a_whole_model(self, root: Path, tmp_path: Path) -> None:
        models = residents(open_all(root / "bert", [root / "five", root / "three"]))
        recipe = make_recipe(models.checkpoints, "task_arithmetic", [0.7, 0.4])
        export_checkpoint(
            recipe,
            models.checkpoints,
            models.layout,
            tmp_path / "out",
            head="five",
            title="x",
            scores={},
            spec=None,
            progress=lambda _: None,
        )
        with silence():
            loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        models.apply(recipe)
        assert torch.equal(loaded(IDS).logits, models.model("five", TEXT)(IDS).logits)

    def test_digest(self, root: Path, tmp_path: Path) -> None:
        """Of the content and the base's content, neither of the configuration's form nor of what is not used."""

        def digest(path: Path, base: str = "llama") -> str:
            return open_all(root / base, [path])[path.name].digest

        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        original = digest(root / "one")
        same = changed(
            root / "one",
            tmp_path / "same",
            config=lambda data: data.update(
                r=7, rank_pattern={"[qv]_proj": 4}, lora_alpha=14, alpha_pattern={"proj": 8}
            ),
        )
        with pytest.raises(InvalidCheckpoint):  # a pattern must match from a dot on
            digest(
                changed(root / "one", tmp_path / "part", config=lambda data: data.update(r=7, rank_pattern={"proj": 4}))
            )
        same_config = json.loads((same / ADAPTER_CONFIG).read_text()) | {"alpha_pattern": {"._proj": 8}}
        (same / ADAPTER_CONFIG).write_text(json.dumps(same_config))
        assert digest(same) == original
        others = [
            digest(changed(root / "one", tmp_path / "a", lambda tensors: tensors[name].add_(1e-6))),
            digest(changed(root / "one", tmp_path / "b", config=lambda data: data.update(lora_alpha=9))),
            digest(changed(root / "one", tmp_path / "c", config=lambda data: data.update(use_rslora=True))),
            digest(root / "one", "untied"),
            open_checkpoint(root / "llama", "base").digest,
        ]
        assert len({original, *others}) == 6

    def test_files_that_change(self, root: Path, tmp_path: Path) -> None:
        path = changed(root / "one", tmp_path / "x")
        adapter = open_all(root / "llama", [path])["x"]
        adapter.verify()
        shutil.copyfile(root / "two" / ADAPTER_WEIGHTS, path / ADAPTER_WEIGHTS)
        with pytest.raises(InputsChanged, match=r"adapter_model.safetensors of the checkpoint 'x'"):
            adapter.verify()


def applied(engine: MergeEngine, recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    out = {tensor.name: torch.full(tensor.shape, 7.0, dtype=dtype) for tensor in engine.layout.shared}
    engine.apply(recipe, out)
    return out


class TestEngine:
    @pytest.fixture
    def engine(self, root: Path, tmp_path: Path) -> MergeEngine:
        """Two adapters of different ranks on different modules, and a whole model."""
        tiny_llama(tmp_path / "whole", seed=5)
        opened = open_all(root / "llama", [root / "one", root / "two", tmp_path / "whole"])
        layout, findings = inspect(opened["base"], [opened["one"], opened["two"], opened["whole"]], HEADS)
        raise_on_errors(findings)
        return MergeEngine(opened, layout)

    @pytest.fixture
    def unexpanded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> Tensor:
            raise AssertionError("an adapter was written out")

        monkeypatch.setattr(engines, "expand", refuse)
        monkeypatch.setattr("workers.adapters.expand", refuse)

    def exact(self, engine: MergeEngine, model: str, name: str) -> Tensor:
        checkpoint, base = engine.checkpoints[model], engine.checkpoints["base"]
        raw = canonical_names(base)[name]
        factors = checkpoint.factors(raw)
        if factors is None:
            return checkpoint.tensor(raw).double()
        return base.tensor(raw).double() + factors.scale * (factors.up.double() @ factors.down.double()).reshape(
            base.tensor(raw).shape
        )

    @pytest.mark.usefixtures("unexpanded")
    @pytest.mark.parametrize("operator", ["task_arithmetic", "linear"])
    def test_sums_are_made_of_factors(self, engine: MergeEngine, operator: str) -> None:
        row = [0.6, -0.3, 0.5]
        out = applied(engine, make_recipe(engine.checkpoints, operator, row))
        for name, found in out.items():
            base, *models = (self.exact(engine, model, name) for model in ("base", "one", "two", "whole"))
            wanted = sum((weight * (model - base) for weight, model in zip(row, models, strict=True)), base.clone())
            if operator == "linear":
                wanted = sum(w * model for w, model in zip(row, models, strict=True)) / sum(row)  # type: ignore[assignment]
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.usefixtures("unexpanded")
    @pytest.mark.parametrize("operator", ["lora_factors", "core_space", "knots", "lora_lego"])
    def test_operators_on_factors_get_nothing_else(self, engine: MergeEngine, operator: str) -> None:
        del engine.checkpoints["whole"]  # type: ignore[attr-defined]
        row = [0.6] if operator == "lora_lego" else [0.6, 0.3]
        if operator == "lora_factors":  # of one rank
            engine.checkpoints["two"] = engine.checkpoints["one"]  # type: ignore[index]
        out = applied(engine, make_recipe(engine.checkpoints, operator, row))
        base = engine.checkpoints["base"]
        same = {name for name, raw in canonical_names(base).items() if torch.equal(out[name], base.tensor(raw))}
        targets = ("q", "v") if operator == "lora_factors" else ("q", "v", "down")
        assert out.keys() - same == {name for name in out if name.endswith(tuple(f"{x}_proj.weight" for x in targets))}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    def test_an_adapter_alone_comes_out_bit_for_bit(self, engine: MergeEngine, dtype: torch.dtype) -> None:
        for row, model in (([1.0, 0.0, 0.0], "one"), ([0.0, 1.0, 0.0], "two"), ([0.0, 0.0, 0.0], "base")):
            for operator in ("task_arithmetic", "linear") if model != "base" else ("task_arithmetic",):
                out = applied(engine, make_recipe(engine.checkpoints, operator, row), dtype)
                alone = applied(engine, Recipe(models=model_ids(engine.checkpoints), root=Leaf(model=model)), dtype)
                for name, raw in canonical_names(engine.checkpoints["base"]).items():
                    own = engine.checkpoints[model].tensor(raw)
                    assert torch.equal(alone[name], own.to(dtype))
                    if dtype == torch.float64:  # computed anew with more digits
                        torch.testing.assert_close(out[name], alone[name], rtol=1e-6, atol=1e-6)
                    else:
                        assert torch.equal(out[name], alone[name]), name

    def test_what_cannot_use_factors_gets_the_whole(self, engine: MergeEngine) -> None:
        """TIES, ranges that cut through a tensor, and steps from a base that is itself merged."""
        whole = {
            name: Checkpoint(name, checkpoint.path, checkpoint.config, checkpoint.tensors)
            for name, checkpoint in engine.checkpoints.items()
        }
        for name, checkpoint in whole.items():
            checkpoint._mapped.update({raw: engine.checkpoints[name].tensor(raw) for raw in checkpoint.tensors})
        plain = MergeEngine(whole, engine.layout)
        models = model_ids(engine.checkpoints)
        first = Merge(
            operator="task_arithmetic",
            base=Leaf(model="base"),
            inputs=[Leaf(model="two"), Leaf(model="whole")],
            groups=[Selector()],
            coefficients=[[0.4, 0.2]],
        )
        step = first.model_copy(
            update={"base": first, "inputs": [Leaf(model="one"), first], "coefficients": [[0.3, 0.1]]}
        )
        cut = Merge(
            operator="task_arithmetic",
            base=Leaf(model="base"),
            inputs=[Leaf(model="one"), Leaf(model="two")],
            breaks=[1000, 1100, 1500],
            coefficients=[[0.5, 0.5], [1.0, 0.0], [0.0, -0.5], [0.2, 0.2]],
        )
        recipes = [make_recipe(engine.checkpoints, "ties", [0.5, 0.7, 0.3], density=0.4)]
        recipes += [Recipe(models=models, root=root) for root in (step, cut)]
        for recipe in recipes:
            wanted = applied(plain, recipe)
            for name, found in applied(engine, recipe).items():
                torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-5)

    def test_neither_threads_nor_blocks_of_other_operators_change_a_bit(
        self, engine: MergeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = make_recipe(engine.checkpoints, "task_arithmetic", [0.6, -0.3, 0.5])
        first = applied(engine, recipe)
        monkeypatch.setattr("workers.merging.blocks.BLOCK", 128)
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            second = applied(engine, recipe)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_blocks_of_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(7, 3, 2, generator=generator, dtype=torch.float64)
        parts = [
            (Factors(torch.randn(7, r, generator=generator), torch.randn(r, 6, generator=generator), 0.5), w)
            for r, w in ((2, 0.3), (3, -1.0), (0, 1.0), (1, 0.0))
        ]
        wanted = base * 2.0
        for factors, weight in parts:
            wanted += weight * low_rank.delta(factors, torch.float64).view(base.shape)
        for size in (1 << 20, 20, 1):
            monkeypatch.setattr(low_rank, "BLOCK", size)
            out = torch.empty_like(base)
            low_rank.combine(out, [base], [2.0], parts)
            torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def setting(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update(values)


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


class TestBadAdapters:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (setting(peft_type="LOHA"), "PEFT adapter of type 'LOHA'"),
            (setting(peft_type=None), "of type None"),
            (setting(use_dora=True), "is a DoRA adapter"),
            (setting(init_lora_weights="pissa_niter_4"), "initialised with pissa_niter_4"),
            (setting(layer_replication=[[0, 2]]), "repeats layers"),
            (setting(target_parameters=["mlp.experts.down_proj"]), r"\(target_parameters\)"),
            (setting(trainable_token_indices=[1]), "single rows"),
            (setting(alora_invocation_tokens=[1]), "activated LoRA"),
            (setting(r=0), "r is 0"),
            (setting(r="4"), "r is '4'"),
            (setting(r=True), "r is True"),
            (setting(lora_alpha=float("nan")), "lora_alpha is nan"),
            (setting(lora_alpha=None), "lora_alpha is None"),
            (setting(r=5), r"lora_A.weight' of rank 4, but adapter_config.json gives the module rank 5"),
            (setting(rank_pattern={"q_proj": 3}), "gives the module rank 3"),
            (setting(rank_pattern={"q_proj": 2.5}), "q_proj is 2.5"),
            (setting(rank_pattern=[3]), r"rank_pattern is \[3\]"),
            (setting(alpha_pattern={"(": 3}), r"has the pattern '\('"),
            (setting(alpha_pattern={"(a+)+": 3}), "is too complicated"),
        ],
    )
    def test_configuration(
        self, root: Path, tmp_path: Path, config: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        self.refused(root, changed(root / "one", tmp_path / "bad", config=config), message)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), "lora_A.weight' without its partner of B"),
            (lambda tensors: tensors.pop(f"{Q}.lora_A.weight"), "lora_B.weight' without its partner of A"),
            (
                replaced(f"{Q}.lora_A.weight", lambda tensor: tensor[:3]),
                r"of shape \[3, 16\] and .* of shape \[16, 4\]",
            ),
            (replaced(f"{Q}.lora_A.weight", lambda tensor: tensor[:, :9]), r"of shape \[4, 9\] .* of shape \[16, 16\]"),
            (replaced(f"{Q}.lora_B.weight", lambda tensor: tensor.view(-1)), r"of shape \[64\]"),
            (replaced(f"{Q}.lora_B.weight", lambda tensor: tensor / 0), r"in '.*lora_B.weight' that are not finite"),
            (replaced(f"{Q}.lora_A.weight", lambda tensor: tensor * float("nan")), "that are not finite"),
            (replaced(f"{Q}.lora_A.weight", lambda tensor: tensor.int()), "of type I32, which is no type of weights"),
            (lambda tensors: tensors.update(x=torch.ones(2)), "'x', whose name does not begin with"),
            (
                lambda tensors: tensors.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}),
                "no factor of plain LoRA",
            ),
            (
                lambda tensors: [
                    tensors.update({f"base_model.model.{part}": tensors[f"{Q}.{part}"].clone()})
                    for part in ("lora_A.weight", "lora_B.weight")
                ],
                "base_model.model.lora_A.weight', which is no factor",
            ),
            (
                lambda tensors: [
                    tensors.update({f"base_model.model.model.layers.9.q_proj.{part}": tensors[f"{Q}.{part}"].clone()})
                    for part in ("lora_A.weight", "lora_B.weight")
                ],
                "layers.9.q_proj.lora_A.weight' for a module that the base lacks",
            ),
            (
                lambda tensors: [
                    tensors.update({f"{Q.replace('model.layers', 'layers')}.{part}": tensors[f"{Q}.{part}"].clone()})
                    for part in ("lora_A.weight", "lora_B.weight")
                ],
                "changes 'model.layers.0.self_attn.q_proj.weight' twice",
            ),
            (
                lambda tensors: tensors.update(
                    {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(64, 16)}
                ),
                "a copy of the base's 'model.embed_tokens.weight' that differs",
            ),
            (lambda tensors: tensors.clear(), "has no factors"),
        ],
    )
    def test_tensors(
        self, root: Path, tmp_path: Path, tensors: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        self.refused(root, changed(root / "one", tmp_path / "bad", tensors), message)

    def test_files(self, root: Path, tmp_path: Path) -> None:
        path = changed(root / "one", tmp_path / "bad")
        weights = path / ADAPTER_WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-4])
        self.refused(root, path, "adapter_model.safetensors cannot be used: it is truncated")
        weights.rename(path / "adapter_model.bin")
        self.refused(root, path, "has no adapter_model.safetensors, only a pickle")
        (path / ADAPTER_CONFIG).write_text("[]")
        self.refused(root, path, "adapter_config.json is no JSON object")

    def test_another_base(self, root: Path, tmp_path: Path) -> None:
        base = open_checkpoint(root / "bert", "base")
        with pytest.raises(InvalidCheckpoint, match="for a module that the base lacks") as caught:
            open_adapter(root / "one", "one", base, "experts.0")
        assert "adapter_model.safetensors of one" in caught.value.message
        assert str(caught.value.remedy) == "name the base that the adapter was trained on"

    def test_the_output_layer_of_a_tied_base(self, root: Path, tmp_path: Path) -> None:
        path = causal(root / "llama", tmp_path / "bad", target_modules=["lm_head"])
        self.refused(root, path, "for the output layer, which the base ties to its embeddings")

    def test_a_head_that_is_not_listed_is_reported(self, root: Path) -> None:
        opened = open_all(root / "bert", [root / "five"])
        _, findings = inspect(opened["base"], [opened["five"]], ["score.*"])
        with pytest.raises(InvalidCheckpoint, match=r"has tensors that the base lacks .*merge.heads"):
            raise_on_errors(findings)

    def refused(self, root: Path, path: Path, message: str) -> None:
        with pytest.raises(InvalidCheckpoint, match=message) as caught:
            open_checkpoint(path, "bad", "experts.2", open_checkpoint(root / "llama", "base"))
        assert caught.value.field == "experts.2" and caught.value.remedy

    @given(data=st.data())
    @settings(max_examples=150, deadline=None)
    def test_damaged_adapters_are_refused_or_read(
        self, root: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        path = tmp_path_factory.mktemp("damaged")
        shutil.copytree(root / "one", path, dirs_exist_ok=True)
        name = data.draw(st.sampled_from([ADAPTER_WEIGHTS, ADAPTER_CONFIG]))
        content = bytearray((path / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, min(len(content), 3000) - 1))
            content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        (path / name).write_bytes(bytes(content))
        base = open_checkpoint(root / "llama", "base")
        try:
            adapter = open_checkpoint(path, "damaged", "experts.0", base)
        except InvalidCheckpoint as error:
            assert error.field == "experts.0" and error.remedy
            return
        for raw, meta in adapter.tensors.items():
            tensor = adapter.tensor(raw)
            assert tensor.shape == meta.shape and bool(tensor.isfinite().all())
        assert len(adapter.digest) == 64

    @given(
        st.dictionaries(
            st.sampled_from(
                ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "auto_mapping", "task_type"]
            ),
            st.recursive(
                st.none() | st.booleans() | st.integers(-2, 9) | st.floats(-2, 9) | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
                max_leaves=4,
            ),
            max_size=3,
        )
    )
    @settings(max_examples=100, deadline=None)
    def test_strange_configurations_are_refused_or_read(
        self, root: Path, tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
    ) -> None:
        path = tmp_path_factory.mktemp("strange")
        shutil.copytree(root / "one", path, dirs_exist_ok=True)
        config = json.loads((path / ADAPTER_CONFIG).read_text()) | values
        (path / ADAPTER_CONFIG).write_text(json.dumps(config))
        try:
            adapter = open_checkpoint(path, "strange", "experts.0", open_checkpoint(root / "llama", "base"))
        except InvalidCheckpoint as error:
            assert error.remedy
            return
        factors = adapter.factors("model.layers.0.self_attn.q_proj.weight")
        assert factors is not None and factors.rank == 4 and factors.scale == pytest.approx(factors.scale)
