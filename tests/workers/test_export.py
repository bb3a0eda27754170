from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from optimizer.errors import Conflict, InfeasibleCandidate, InvalidInput, MergeoptError
from optimizer.fitness.intervals import Interval
from optimizer.geometry import Layout
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.spec import JobSpec
from tests.workers.models import make_recipe, open_models, tiny_bert, tiny_bert_base, tiny_llama, tiny_vit
from workers.checkpoints import INDEX, WEIGHTS, Checkpoint, open_checkpoint
from workers.export import export_checkpoint
from workers.merging.engine import MergeEngine
from workers.merging.resident import ResidentModels
from workers.model_card import licence

IDS = torch.tensor([[2, 8, 9, 10, 3], [2, 20, 21, 22, 3]])
TEXT = "AutoModelForSequenceClassification"
Models = tuple[dict[str, Checkpoint], Layout]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    tiny_bert_base(root / "base")
    one = tiny_bert(root / "one", labels=2, seed=1)
    (one / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# One\n")
    tiny_bert(root / "two", labels=4, seed=2)
    return open_models(root / "base", {"one": one, "two": root / "two"})


def export(
    models: Models, out: Path, row: list[float] | None = None, *, head: str | None = "one", **kwargs: Any
) -> Path:
    recipe = kwargs.pop("recipe", None) or make_recipe(models[0], "task_arithmetic", row or [0.6, 0.3])
    defaults: dict[str, Any] = {"title": "Test", "scores": {}, "spec": None, "progress": lambda _: None}
    return export_checkpoint(recipe, *models, out, head=head, **(defaults | kwargs))


def resident(models: Models, recipe: Recipe, head: str | None, auto_class: str) -> PreTrainedModel:
    device = torch.device("cpu")
    found = ResidentModels(*models, MergeEngine(*models), device, torch.float32)
    found.apply(recipe)
    return found.model(head, auto_class)


def reload(auto_class: Any, path: Path) -> PreTrainedModel:
    """Load with plain transformers; every tensor of the file must be one of the model's, and the other way round."""
    model, info = auto_class.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    out: PreTrainedModel = model
    return out


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Tensor = IDS) -> Tensor:
    out: Tensor = model(inputs).logits
    return out


@pytest.mark.parametrize("head", ["one", "two"])
@pytest.mark.parametrize(("operator", "row"), [("task_arithmetic", [0.6, 0.3]), ("ties", [0.5, 0.7]), ("slerp", [0.4])])
def test_plain_transformers_computes_exactly_what_the_resident_model_does(
    models: Models, tmp_path: Path, head: str, operator: str, row: list[float]
) -> None:
    recipe = make_recipe(models[0], operator, row)
    out = export(models, tmp_path / "out", recipe=recipe, head=head)
    found = reload(AutoModelForSequenceClassification, out)
    assert torch.equal(logits(found), logits(resident(models, recipe, head, TEXT)))
    tokens = AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"]
    assert tokens == [2, 8, 9, 3]


def test_shards_load_the_same(models: Models, tmp_path: Path) -> None:
    whole = export(models, tmp_path / "whole")
    shards = export(models, tmp_path / "shards", max_shard_bytes=5_000)
    assert not (shards / WEIGHTS).exists() and not (whole / INDEX).exists()
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 3 and all(f"-of-{len(files):05d}" in file.name for file in files)
    assert open_checkpoint(whole, "a").digest == open_checkpoint(shards, "b").digest
    first, second = (logits(reload(AutoModelForSequenceClassification, path)) for path in (whole, shards))
    assert torch.equal(first, second)
    index = json.loads((shards / INDEX).read_text())
    with safe_open(whole / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(index["weight_map"]) == set(file.keys())


def test_the_base_without_a_head(models: Models, tmp_path: Path) -> None:
    out = export(models, tmp_path / "out", head=None)
    found = reload(AutoModel, out)
    wanted = resident(models, make_recipe(models[0], "task_arithmetic", [0.6, 0.3]), None, "AutoModel")
    with torch.no_grad():
        assert torch.equal(found(IDS).last_hidden_state, wanted(IDS).last_hidden_state)


def test_an_expert_alone_is_that_expert(models: Models, tmp_path: Path) -> None:
    out = export(models, tmp_path / "out", [1.0, 0.0])
    assert open_checkpoint(out, "out").digest == models[0]["one"].digest


def test_images(tmp_path: Path) -> None:
    tiny_vit(tmp_path / "base")
    tiny_vit(tmp_path / "one", labels=5, seed=1)
    models = open_models(tmp_path / "base", {"one": tmp_path / "one"})
    recipe = make_recipe(models[0], "task_arithmetic", [0.5])
    out = export(models, tmp_path / "out", recipe=recipe)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = logits(reload(AutoModelForImageClassification, out), pixels)
    assert torch.equal(found, logits(resident(models, recipe, "one", "AutoModelForImageClassification"), pixels))
    processor = AutoImageProcessor.from_pretrained(out)  # type: ignore[no-untyped-call]
    assert processor.size["height"] == 8


@pytest.mark.parametrize("twice", [False, True])
def test_tied_embeddings(tmp_path: Path, twice: bool) -> None:
    tiny_llama(tmp_path / "base")
    tiny_llama(tmp_path / "one", seed=1)
    if twice:
        tensors = load_file(tmp_path / "one" / WEIGHTS)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "one" / WEIGHTS, {"format": "pt"})
    models = open_models(tmp_path / "base", {"one": tmp_path / "one"})
    recipe = make_recipe(models[0], "linear", [0.5])
    out = export(models, tmp_path / "out", recipe=recipe)
    found = reload(AutoModelForCausalLM, out)
    assert torch.equal(logits(found), logits(resident(models, recipe, "one", "AutoModelForCausalLM")))
    assert (
        found.get_parameter("lm_head.weight").data_ptr() == found.get_parameter("model.embed_tokens.weight").data_ptr()
    )
    assert (out / "generation_config.json").is_file()


def test_it_has_the_bases_type(tmp_path: Path) -> None:
    tiny_bert_base(tmp_path / "base", dtype=torch.bfloat16)
    tiny_bert(tmp_path / "one", labels=2, seed=1)
    models = open_models(tmp_path / "base", {"one": tmp_path / "one"})
    out = export(models, tmp_path / "out", [0.5])
    assert {meta.dtype for meta in open_checkpoint(out, "out").tensors.values()} == {"BF16"}
    assert reload(AutoModelForSequenceClassification, out).dtype == torch.bfloat16


def test_whole_numbers_are_the_bases(tmp_path: Path) -> None:
    name = "embeddings.position_ids"
    for model, prefix, shift in ((tiny_bert_base(tmp_path / "base"), "", 0), (tiny_bert(tmp_path / "one"), "bert.", 1)):
        tensors = load_file(model / WEIGHTS) | {prefix + name: torch.arange(64).view(1, 64) + shift}
        save_file(tensors, model / WEIGHTS, {"format": "pt"})
    models = open_models(tmp_path / "base", {"one": tmp_path / "one"})
    out = export(models, tmp_path / "out", [0.5])
    assert torch.equal(open_checkpoint(out, "out").tensor("bert." + name), torch.arange(64).view(1, 64))
    recipe = make_recipe(models[0], "task_arithmetic", [0.5])
    found = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(logits(found), logits(resident(models, recipe, "one", TEXT)))


def test_tensors_are_aligned_in_the_file(models: Models, tmp_path: Path) -> None:
    """Mapped weights then give the same last bits as those in memory; see `workers.export._items`."""
    model = reload(AutoModelForSequenceClassification, export(models, tmp_path / "out"))
    misaligned = [name for name, value in model.named_parameters() if value.dim() > 1 and value.data_ptr() % 64]
    assert misaligned == []


def test_files_beside_the_weights(models: Models, tmp_path: Path) -> None:
    spec = JobSpec.model_validate(
        {
            "name": "my job",
            "base": "base",
            "experts": [{"name": "one", "path": "one"}, {"name": "two", "path": "two"}],
            "objectives": [{"name": "polarity", "evaluator": "text_classification", "data": {"path": "data"}}],
            "budget": {"evaluations": 10},
        }
    )
    recipe = make_recipe(models[0], "ties", [0.6, 0.3], density=0.4)
    seen: list[float] = []
    out = export(
        models,
        tmp_path / "deep" / "out",
        recipe=recipe,
        head="two",
        title="A title | with\nlines",
        scores={"polarity": 0.123456789},
        spec=spec,
        progress=seen.append,
    )
    assert seen[0] == 0.0 and seen[-1] == 1.0 and seen == sorted(seen) and len(seen) > 10
    assert Recipe.parse(json.loads((out / "recipe.json").read_text())) == recipe
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32" and len(config["id2label"]) == 4
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "base_model" not in front
    for part in (
        "# A title | with lines\n",
        f"| one | `{models[0]['one'].path}` | mit | `{models[0]['one'].digest}` |",
        "| two |",
        "| not stated |",
        "Operator `ties` with density = 0.4.",
        "| all | 0.6 | 0.3 |",
        "| polarity | 0.123457 |",
        recipe.fingerprint,
        "name: my job",
    ):
        assert part in card, part
    assert list(tmp_path.glob("deep/.*")) == []


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\n- a\n---", "---\n{{\n---", "---\nlicense:\n---", "---"]
)
def test_cards_without_a_licence(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence(tmp_path) == "not stated"


def test_an_existing_target_is_left_alone(models: Models, tmp_path: Path) -> None:
    for target in (tmp_path / "full", tmp_path / "empty"):
        target.mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("full", "empty", "dangling"):
        with pytest.raises(Conflict, match=f"{name} exists already"):
            export(models, tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "full"]


def test_two_exports_to_the_same_place_at_once(models: Models, tmp_path: Path) -> None:
    outcomes: list[object] = []
    ready = threading.Barrier(2)

    def run() -> None:
        def progress(done: float) -> None:
            if done == 0.0:
                ready.wait(30)

        try:
            outcomes.append(export(models, tmp_path / "out", progress=progress))
        except Conflict as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(outcome) is Conflict for outcome in outcomes) == [False, True]
    reload(AutoModelForSequenceClassification, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failures_leave_nothing_behind(models: Models, tmp_path: Path) -> None:
    def stop(done: float) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(models, tmp_path / "out", progress=stop)
    with pytest.raises(InfeasibleCandidate):
        export(models, tmp_path / "out", recipe=make_recipe(models[0], "linear", [0.5, -0.5]))
    with pytest.raises(InvalidInput, match="'three' is no expert"):
        export(models, tmp_path / "out", head="three")
    with pytest.raises(InvalidInput, match="unknown operator"):
        export(models, tmp_path / "out", recipe=make_recipe(models[0], "magic", [0.5, 0.5]))
    (tmp_path / "file").write_text("x")
    with pytest.raises(MergeoptError, match="could not be written"):
        export(models, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_overwriting_keeps_the_old_one_until_the_new_is_complete(models: Models, tmp_path: Path) -> None:
    out = export(models, tmp_path / "out", [0.1, 0.1])
    old = open_checkpoint(out, "old").digest

    def stop(done: float) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(models, out, [0.2, 0.2], overwrite=True, progress=stop)
    assert open_checkpoint(out, "old").digest == old
    export(models, out, [0.2, 0.2], overwrite=True)
    assert open_checkpoint(out, "new").digest != old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_exports_are_overwritten(models: Models, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("keep")
    (tmp_path / "link").symlink_to(export(models, tmp_path / "out"))
    for name in ("mine", "link"):
        with pytest.raises(Conflict, match="is no earlier export"):
            export(models, tmp_path / name, overwrite=True)
    assert (tmp_path / "mine" / "thesis").read_text() == "keep" and (tmp_path / "link").is_symlink()


def test_a_model_is_not_overwritten_by_what_is_made_of_it(models: Models, tmp_path: Path) -> None:
    out = export(models, tmp_path / "out")
    before = sorted(path.name for path in out.iterdir())
    again = open_models(out, {"one": out})
    with pytest.raises(Conflict, match="holds the model 'base'"):
        export(again, out, [0.5], overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == before


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "one", "two")):
        tiny_llama(tmp_path / name, seed=number)
        (tmp_path / name / "chat_template.jinja").write_text(name)
        for file, field in (("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id")):
            data = json.loads((tmp_path / name / file).read_text())
            (tmp_path / name / file).write_text(json.dumps(data | {field: 10 + number}))
    (tmp_path / "two" / "chat_template.jinja").unlink()
    models = open_models(tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"})
    for given, wanted in (("one", "one"), ("base", "base"), (None, "two")):
        out = export(models, tmp_path / f"out-{given}", head="two", tokenizer_from=given)
        number = ("base", "one", "two").index(wanted)
        for file in ("generation_config.json", "config.json"):
            assert json.loads((out / file).read_text())["eos_token_id"] == 10 + number
        template = out / "chat_template.jinja"
        # A model without a template has none: the base's would speak to it in tokens it was not trained on.
        assert (template.read_text() if template.exists() else "two") == wanted
        text = "the base" if wanted == "base" else f"the expert `{wanted}`"
        assert f"tokenizer and chat template those of {text}." in (out / "README.md").read_text()
    with pytest.raises(InvalidInput, match="'three' is no model"):
        export(models, tmp_path / "out", head="two", tokenizer_from="three")


def test_the_card_says_what_was_measured_and_how_to_repeat_it(tmp_path: Path) -> None:
    for number, name in enumerate(("base", "one")):
        tiny_llama(tmp_path / name, seed=number)
        (tmp_path / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    models = open_models(tmp_path / "base", {"one": tmp_path / "one"})
    out = export(models, tmp_path / "out", [0.5], scores={"a": 0.5}, test_scores={"a": 0.25, "b": 2.0})
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "| Objective | Search | Test |\n| --- | --- | --- |\n| a | 0.5 | 0.25 |\n| b |  | 2 |" in card
    assert "mergeopt merge recipe.json out --head one --root DIRECTORY" in card
    assert "not measured on other data" not in card
    assert yaml.safe_load((out / "mergekit.yml").read_text())["merge_method"] == "task_arithmetic"
    assert "Worse on the test data" not in card
    found = {"a": Interval(0.5, 0.25, 0.75, 8)}, {"a": Interval(0.125, 0.0, 0.2, 9)}
    out = export(models, tmp_path / "fooled", [0.5], scores=found[0], test_scores=found[1], overfitted=["a"])
    card = (out / "README.md").read_text()
    assert "| a | 0.5 (0.25 to 0.75) | 0.125 (0 to 0.2) |" in card
    assert "**Worse on the test data than chance explains: `a`.**" in card
    chain = make_recipe(models[0], "task_arithmetic", [0.5]).model_copy(
        update={"root": Merge(operator="linear", base=Leaf(model="base"), groups=[Selector()], coefficients=[[1.0]],
                              inputs=[make_recipe(models[0], "task_arithmetic", [0.25]).root])}
    )  # fmt: skip
    out = export(models, tmp_path / "chain", recipe=chain)
    card = (out / "README.md").read_text()
    same = yaml.safe_load((out / "mergekit.yml").read_text())  # the outer merge changes nothing
    assert same["models"][1]["parameters"] == {"weight": 0.25}
    assert "Merge 0:\n\nOperator `task_arithmetic`." in card


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("cannot mount a small file system here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(models: Models, small_disk: Path) -> None:
    with pytest.raises(MergeoptError, match="no space is left") as caught:
        export(models, small_disk / "out")
    assert type(caught.value) is MergeoptError and caught.value.remedy
    assert list(small_disk.iterdir()) == []


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """The system refuses this process to write beyond 20 KB of a file while the block runs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow(models: Models, tmp_path: Path) -> None:
    """The same failure where no file system can be mounted."""
    with pytest.raises(MergeoptError, match="no space is left; nothing was kept"), small_files():
        export(models, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
