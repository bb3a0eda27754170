"""Merges written as LoRA adapters, loaded and run by PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from optimizer.errors import Conflict, InvalidInput
from optimizer.geometry import Layout
from optimizer.recipe import PlannedLayer, Recipe
from tests.workers.adapter_models import causal, classifier, merged, open_all, wrapped
from tests.workers.models import make_recipe, tiny_bert, tiny_bert_base, tiny_llama, tiny_vit
from workers import export_adapter as exporting
from workers.adapters_names import names_in_memory
from workers.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, open_checkpoint
from workers.compatibility import inspect, raise_on_errors
from workers.export_adapter import AdapterReport, export_adapter
from workers.merging.engine import MergeEngine
from workers.naming import canonical_names
from workers.safetensors_header import read_header

IDS = torch.tensor([[2, 8, 9, 10, 3], [2, 20, 21, 22, 3]])
HEADS = ("classifier.*", "score.*")


def layout_of(checkpoints: dict[str, Checkpoint]) -> Layout:
    base, *experts = checkpoints.values()
    layout, findings = inspect(base, experts, HEADS)
    raise_on_errors(findings)
    return layout


def export(
    checkpoints: dict[str, Checkpoint], recipe: Recipe, out: Path, rank: int, head: str | None = None
) -> AdapterReport:
    done: list[float] = []
    report = export_adapter(
        recipe,
        checkpoints,
        layout_of(checkpoints),
        out,
        rank=rank,
        head=head,
        title="A merge",
        scores={"loss": 0.5},
        spec=None,
        progress=done.append,
    )
    assert done == sorted(done) and (done[0], done[-1]) == (0.0, 1.0)
    return report


def wanted(checkpoints: dict[str, Checkpoint], recipe: Recipe, head: str | None = None) -> dict[str, Tensor]:
    """The merged parameters by transformers' names, those of the head too."""
    layout = layout_of(checkpoints)
    engine = MergeEngine(checkpoints, layout)
    source = checkpoints[head or "base"]
    names = names_in_memory(source)
    shared = {tensor.name: tensor for tensor in layout.shared}
    out = {}
    for name, raw in canonical_names(source).items():
        out[names[raw]] = engine.merged(recipe, shared[name]) if name in shared else source.tensor(raw)
    return out


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert expected and set(expected) <= set(found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llamas")
    tiny_llama(root / "base", tied=False)
    causal(root / "base", root / "one", 1)
    causal(root / "base", root / "two", 2, r=3, target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"])
    tiny_llama(root / "whole", seed=7, tied=False)
    return root


def test_a_sum_of_adapters_is_exact_where_the_rank_suffices(llamas: Path, tmp_path: Path) -> None:
    opened = open_all(llamas / "base", [llamas / "one", llamas / "two"])
    recipe = make_recipe(opened, "task_arithmetic", [0.7, -0.4])
    report = export(opened, recipe, tmp_path / "out", 7)
    assert report.error < 1e-6 and report.whole == ()
    ranks = {entry.tensor: entry.rank for entry in report.truncations}
    assert ranks["layers.0.self_attn.q_proj.weight"] == 7 and ranks["layers.0.self_attn.v_proj.weight"] == 4
    assert ranks["lm_head.weight"] == ranks["embed_tokens.weight"] == 3 and len(ranks) == 8
    assert_same(merged(AutoModelForCausalLM, llamas / "base", tmp_path / "out"), wanted(opened, recipe))
    config = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(llamas / "base") and config["task_type"] == "CAUSAL_LM"
    assert Recipe.parse(json.loads((tmp_path / "out" / "recipe.json").read_text())).fingerprint == recipe.fingerprint
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "rank 7 on 8 matrices" in card


def test_a_lower_rank_is_the_best_of_that_rank_and_reports_what_is_lost(llamas: Path, tmp_path: Path) -> None:
    opened = open_all(llamas / "base", [llamas / "one", llamas / "two"])
    recipe = make_recipe(opened, "task_arithmetic", [0.7, -0.4])
    report = export(opened, recipe, tmp_path / "out", 2)
    exact, base = wanted(opened, recipe), opened["base"]
    found = merged(AutoModelForCausalLM, llamas / "base", tmp_path / "out")
    lost, total = 0.0, 0.0
    for entry in report.truncations:
        name = entry.tensor if entry.tensor == "lm_head.weight" else f"model.{entry.tensor}"
        delta = exact[name].double() - base.tensor(name).double()
        values = torch.linalg.svdvals(delta)
        best = float(values[2:].square().sum().sqrt() / values.square().sum().sqrt())
        assert entry.rank == 2 and entry.norm == pytest.approx(float(delta.norm()))
        assert entry.error == pytest.approx(best, rel=1e-4, abs=1e-6)
        actual = (found[name].double() - exact[name].double()).norm() / delta.norm()
        assert float(actual) == pytest.approx(entry.error, rel=1e-3, abs=1e-5)
        lost, total = lost + (entry.error * entry.norm) ** 2, total + entry.norm**2
    assert report.error == pytest.approx((lost / total) ** 0.5) and 0.1 < report.error < 0.9


def test_any_task_vector(llamas: Path, tmp_path: Path) -> None:
    """A merge of whole models, norms included, at full rank; the exported adapter is an expert like any other."""
    opened = open_all(llamas / "base", [llamas / "one", llamas / "whole"])
    recipe = make_recipe(opened, "ties", [0.7, 0.4], density=0.5)
    report = export(opened, recipe, tmp_path / "out", 64)
    assert "norm.weight" in report.whole and "layers.1.input_layernorm.weight" in report.whole
    assert report.error < 1e-6 and {entry.rank for entry in report.truncations} == {8, 16}
    expected = wanted(opened, recipe)
    assert_same(merged(AutoModelForCausalLM, llamas / "base", tmp_path / "out"), expected)
    again = open_checkpoint(tmp_path / "out", "again", None, opened["base"])
    names = names_in_memory(again)
    assert_same({names[raw]: again.tensor(raw) for raw in again.tensors}, expected)


@torch.no_grad()
def test_embeddings_that_the_output_layer_is_tied_to(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    tiny_llama(tmp_path / "whole", seed=3)
    opened = open_all(base, [tmp_path / "whole"])
    recipe = make_recipe(opened, "task_arithmetic", [0.5])
    export(opened, recipe, tmp_path / "out", 64)
    expected = wanted(opened, recipe)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in model.named_parameters():
        parameter.copy_(expected[name])
    found = wrapped(AutoModelForCausalLM, base, tmp_path / "out")
    torch.testing.assert_close(found(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("headless", [True, False])
def test_a_classifier_with_an_experts_head(tmp_path: Path, headless: bool) -> None:
    """Biases, norms and the head are kept as a whole; the base may have been saved without a head."""
    base = tiny_bert_base(tmp_path / "base") if headless else tiny_bert(tmp_path / "base", labels=3)
    classifier(base, tmp_path / "five", 5, 1, bias="all")
    tiny_bert(tmp_path / "four", labels=4, seed=4)
    opened = open_all(base, [tmp_path / "five", tmp_path / "four"])
    recipe = make_recipe(opened, "task_arithmetic", [0.7, 0.3])
    for head, labels in (("five", 5), ("four", 4)):
        report = export(opened, recipe, tmp_path / f"out-{head}", 64, head)
        assert {"classifier.bias", "classifier.weight", "embeddings.LayerNorm.weight"} <= set(report.whole)
        options = {"num_labels": labels, "ignore_mismatched_sizes": not headless}
        found = merged(AutoModelForSequenceClassification, base, tmp_path / f"out-{head}", **options)
        assert_same(found, wanted(opened, recipe, head))
    if headless:
        export(opened, recipe, tmp_path / "out", 64)
        assert_same(merged(AutoModel, base, tmp_path / "out"), wanted(opened, recipe))


def test_images_with_convolutions_and_renamed_modules(tmp_path: Path) -> None:
    base = tiny_vit(tmp_path / "base")
    tiny_vit(tmp_path / "one", labels=5, seed=1)
    opened = open_all(base, [tmp_path / "one"])
    recipe = make_recipe(opened, "task_arithmetic", [0.6])
    report = export(opened, recipe, tmp_path / "out", 64, "one")
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    found = merged(AutoModelForImageClassification, base, tmp_path / "out", **options)
    assert_same(found, wanted(opened, recipe, "one"))
    # A class token belongs to a module with others in it, which is then kept as a whole.
    assert "embeddings.patch_embeddings.projection.weight" in report.whole


def test_layers_that_store_in_by_out(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    for seed, name in enumerate(("base", "one")):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    opened = open_all(tmp_path / "base", [tmp_path / "one"])
    recipe = make_recipe(opened, "task_arithmetic", [0.6])
    assert export(opened, recipe, tmp_path / "out", 64).error < 1e-6
    assert_same(merged(AutoModelForCausalLM, tmp_path / "base", tmp_path / "out"), wanted(opened, recipe))


def test_large_matrices(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the leading part is found: exactly where the rank suffices, and nearly the best where it does not."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(300, 5, generator=generator).double(), torch.randn(5, 200, generator=generator).double()
    noise = torch.randn(300, 200, generator=generator).double()
    monkeypatch.setattr(exporting, "WHOLE_UP_TO", 0)
    up, down = exporting._factors(left @ right, 8)
    assert up.shape == (300, 5)
    torch.testing.assert_close(up.double() @ down.double(), left @ right, rtol=1e-5, atol=1e-5)
    delta = left @ right + noise
    up, down = exporting._factors(delta, 8)
    values = torch.linalg.svdvals(delta)
    best = float(values[8:].square().sum().sqrt())
    assert best <= float((up.double() @ down.double() - delta).norm()) <= 1.001 * best


def test_nothing_is_written_where_nothing_changes(llamas: Path, tmp_path: Path) -> None:
    opened = open_all(llamas / "base", [llamas / "one"])
    report = export(opened, make_recipe(opened, "task_arithmetic", [0.0]), tmp_path / "out", 4)
    assert report == AdapterReport(4, (), ()) and report.error == 0.0
    assert read_header(tmp_path / "out" / ADAPTER_WEIGHTS) == {}


class TestErrors:
    @pytest.fixture
    def opened(self, llamas: Path) -> dict[str, Checkpoint]:
        return open_all(llamas / "base", [llamas / "one"])

    def test_layer_plans(self, opened: dict[str, Checkpoint], tmp_path: Path) -> None:
        recipe = make_recipe(opened, "task_arithmetic", [1.0])
        planned = recipe.model_copy(update={"layers": [PlannedLayer(layer=0)]})
        with pytest.raises(InvalidInput, match="cannot rearrange the layers") as caught:
            export(opened, planned, tmp_path / "out", 4)
        assert caught.value.field == "recipe.layers" and not (tmp_path / "out").exists()

    def test_ranks_and_heads(self, opened: dict[str, Checkpoint], tmp_path: Path) -> None:
        recipe = make_recipe(opened, "task_arithmetic", [1.0])
        with pytest.raises(InvalidInput, match="a rank of 0"):
            export(opened, recipe, tmp_path / "out", 0)
        with pytest.raises(InvalidInput, match="'two' is no expert"):
            export(opened, recipe, tmp_path / "out", 4, "two")

    def test_existing_files_stay(self, opened: dict[str, Checkpoint], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("x")
        with pytest.raises(Conflict, match="out exists already"):
            export(opened, make_recipe(opened, "task_arithmetic", [1.0]), tmp_path / "out", 4)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]

    def test_a_failure_leaves_nothing(
        self, opened: dict[str, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(exporting, "save_file", fail)
        with pytest.raises(Exception, match="no space is left"):
            export(opened, make_recipe(opened, "task_arithmetic", [1.0]), tmp_path / "out", 4)
        assert not list(tmp_path.iterdir())
