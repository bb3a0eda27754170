"""Measuring real models on data: the numbers by hand, the cache, jobs and exports end to end, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from optimizer.errors import InputsChanged, InvalidData, InvalidInput, JobError
from optimizer.geometry import Layout
from optimizer.ports import Task
from optimizer.recipe import CalibrationId, Leaf, Merge, PlannedLayer, Recipe, Selector
from optimizer.space import make_space
from optimizer.spec import Calibration, JobSpec, parse_spec
from tests.forks import forks
from tests.jobs import TASKS, write_job
from tests.workers.evaluators.cases import CASES, Row, build, open_model, words
from tests.workers.merging.test_data_driven import reference
from tests.workers.models import (
    VOCABULARY,
    model_ids,
    open_models,
    tiny_bert,
    tiny_bert_base,
    tiny_llama,
    tokenizer,
)
from workers.checkpoints import Checkpoint
from workers.evaluators.base import EVALUATORS, Evaluator
from workers.export import export_checkpoint
from workers.merging import calibration as module
from workers.merging.cache import Cache
from workers.merging.calibration import Calibrations, check_items, load_items, load_measurements
from workers.merging.calibration_statistics import measure
from workers.merging.engine import MergeEngine
from workers.merging.operator import Numbers
from workers.merging.resident import ResidentModels
from workers.prepare import prepare
from workers.roots import Roots
from workers.worker import EvaluationWorker

CPU = torch.device("cpu")
HEADS = ("classifier.*", "score.*")
LIKELY = sorted(name for name in CASES if EVALUATORS[name].predictions is not Evaluator.predictions)
"""Evaluators whose scores are likelihoods."""
Models = tuple[dict[str, Checkpoint], Layout]
ROWS: dict[str, list[Row]] = {
    "one": [{"text": words(1 + 3 * n % 7, n), "label": n % 3} for n in range(9)],
    "two": [{"text": words(2 + 5 * n % 9, 50 + n), "label": n % 2} for n in range(7)],
}
"""Items of different lengths: in a batch they would be padded."""


# --- models and data --------------------------------------------------------------------------------------------------


def write_items(root: Path, rows: Mapping[str, list[Row]] = ROWS) -> None:
    for name, items in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def specs(**changes: Any) -> dict[str, Calibration]:
    """Calibration data of both experts."""
    return {
        name: Calibration.model_validate(
            {"evaluator": "text_classification", "data": {"path": f"{name}.jsonl"}} | changes
        )
        for name in ROWS
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    tiny_bert_base(folder / "base", spread=0.5)
    tiny_bert(folder / "one", labels=3, seed=1, spread=0.5)
    tiny_bert(folder / "two", labels=2, seed=2, spread=0.5)
    write_items(folder)
    return folder


@pytest.fixture(scope="module")
def models(root: Path) -> Models:
    return open_models(root / "base", {name: root / name for name in ROWS})


def calibrations(
    models: Models, root: Path, calibration: Mapping[str, Calibration] | None = None, cache: Cache | None = None
) -> Calibrations:
    items = load_items(calibration or specs(), *models, Roots([root]))
    return Calibrations(*models, items, cache=cache)


def answers(found: Calibrations, layout: Layout, model: str, question: str) -> dict[str, Numbers]:
    return {tensor.name: found.get(model, tensor, question) for tensor in layout.shared}


def recipe_of(
    models: Models,
    operator: str,
    row: list[float],
    calibration: Mapping[str, CalibrationId] | None = None,
    **options: Any,
) -> Recipe:
    root = Merge(
        operator=operator,
        options=options,
        base=Leaf(model="base"),
        inputs=[Leaf(model=name) for name in models[0] if name != "base"],
        groups=[Selector()],
        coefficients=[row],
    )
    return Recipe(models=model_ids(models[0]), root=root, calibration=dict(calibration) if calibration else None)


def merged(models: Models, recipe: Recipe, measurements: Calibrations, cache: Cache | None = None) -> dict[str, Tensor]:
    engine = MergeEngine(*models, cache=cache, measurements=measurements)
    return {tensor.name: engine.merged(recipe, tensor) for tensor in engine.result_layout(recipe).shared}


# --- the same numbers, by hand ----------------------------------------------------------------------------------------


def open_bert(path: Path) -> PreTrainedModel:
    model = BertForSequenceClassification.from_pretrained(path)
    return cast("PreTrainedModel", model.eval())  # type: ignore[no-untyped-call]


def items_of(name: str) -> Iterator[tuple[dict[str, Tensor], int]]:
    for row in ROWS[name]:
        yield dict(tokenizer()(row["text"], return_tensors="pt")), row["label"]


def fisher_by_hand(path: Path, name: str, labels: str) -> dict[str, Tensor]:
    model = open_bert(path)
    sums: dict[str, Tensor] = {}
    for inputs, label in items_of(name):
        classes = model(**inputs).logits.shape[1]
        for chosen in [label] if labels == "data" else range(classes):
            model.zero_grad()
            likelihoods = model(**inputs).logits[0].log_softmax(dim=0)
            likelihoods[chosen].backward()
            share = 1.0 if labels == "data" else float(likelihoods[chosen].detach().exp())
            for key, parameter in model.named_parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                sums[key] = sums.get(key, 0) + share * gradient.square() / len(ROWS[name])
    return {key.removeprefix("bert."): tensor for key, tensor in sums.items() if not key.startswith("classifier")}


@contextmanager
def watched(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what every module of some kinds reads, token by token."""
    read: dict[str, list[Tensor]] = {}
    handles = []
    for key, child in model.named_modules():
        if isinstance(child, kinds):

            def hook(_: nn.Module, args: tuple[Tensor, ...], key: str = key) -> None:
                read.setdefault(key, []).append(args[0].detach().reshape(-1, args[0].shape[-1]))

            handles.append(child.register_forward_pre_hook(hook))
    yield read
    for handle in handles:
        handle.remove()


def inputs_by_hand(path: Path, name: str) -> dict[str, Tensor]:
    """What every linear layer and norm reads, by the name of its weight."""
    model = open_bert(path)
    with torch.no_grad(), watched(model, (nn.Linear, nn.LayerNorm)) as read:
        for inputs, _ in items_of(name):
            model(**inputs)
    found = {f"{key.removeprefix('bert.')}.weight": torch.cat(rows) for key, rows in read.items()}
    return {key: rows for key, rows in found.items() if not key.startswith("classifier")}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()) + 1e-12)


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("labels", ["data", "expected"])
def test_fisher_information_is_the_mean_of_squared_gradients(
    models: Models, root: Path, name: str, labels: str
) -> None:
    question = "fisher" if labels == "data" else "fisher_expected"
    found = answers(calibrations(models, root), models[1], name, question)
    expected = fisher_by_hand(root / name, name, labels)
    assert found.keys() == expected.keys()
    for key, numbers in found.items():
        close(numbers["fisher"], expected[key])
    norm = torch.cat([tensor.flatten() for tensor in expected.values()]).norm()
    assert all(float(numbers["norm"]) == pytest.approx(float(norm), rel=1e-4) for numbers in found.values())


def test_sampled_labels_give_the_expectation_in_the_long_run(models: Models, root: Path) -> None:
    items = load_items(specs(), *models, Roots([root]))["one"]
    model = open_bert(root / "one")
    parameters = {"w": model.get_parameter("bert.encoder.layer.0.output.dense.weight")}

    def asked(question: str, seed: int) -> Tensor:
        return measure(question, model, items.evaluator, parameters, seed)["w"]["fisher"]

    draws = torch.stack([asked("fisher_sampled", seed) for seed in range(60)])
    assert torch.equal(draws[7], asked("fisher_sampled", 7))
    assert len({float(draw.sum()) for draw in draws}) > 10
    total, error = draws.flatten(1).sum(dim=1).mean(), draws.flatten(1).sum(dim=1).std() / 60**0.5
    assert abs(float(total - asked("fisher_expected", 0).sum())) < 4 * float(error)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_gram_matrices_and_activations_are_those_of_what_layers_read(models: Models, root: Path) -> None:
    found = calibrations(models, root)
    expected = inputs_by_hand(root / "one", "one")
    grams, activations = (answers(found, models[1], "one", question) for question in ("gram", "activation"))
    linear = {key for key in expected if "LayerNorm" not in key}
    assert {key for key, numbers in grams.items() if numbers} == linear
    assert {key for key, numbers in activations.items() if numbers} == set(expected)
    for key, rows in expected.items():
        close(activations[key]["activation"], rows.abs().mean(dim=0))
        assert float(activations[key]["axis"]) == (1.0 if key in linear else 0.0)
    for key in linear:
        close(grams[key]["gram"], expected[key].T @ expected[key] / len(expected[key]))
        assert float(grams[key]["axis"]) == 1.0


def test_the_batch_size_of_an_evaluator_does_not_matter(models: Models, root: Path) -> None:
    one, many = (calibrations(models, root, specs(options={"batch_size": size})) for size in (1, 64))
    assert one.identity("one") == many.identity("one")
    for question in ("fisher", "gram"):
        left, right = (answers(found, models[1], "one", question) for found in (one, many))
        assert all(torch.equal(left[key][kind], right[key][kind]) for key in left for kind in left[key])


def measured(name: str, path: Path, question: str, weights: Callable[[str], bool]) -> dict[str, Numbers]:
    """Ask about all weights of an evaluator's tiny model."""
    model = open_model(name, path).eval()  # type: ignore[no-untyped-call]
    evaluator = build(name, path, CASES[name].rows, **{**CASES[name].options, "batch_size": 1})
    parameters = {key: parameter for key, parameter in model.named_parameters() if weights(key)}
    return measure(question, model, evaluator, parameters, 0)


@pytest.mark.parametrize("name", LIKELY)
def test_every_evaluator_of_likelihoods_can_be_measured_on(name: str, tmp_path: Path) -> None:
    path = CASES[name].checkpoint(tmp_path)
    for question in ("fisher", "fisher_sampled"):
        found = measured(name, path, question, lambda _: True)
        assert found and sum(float(numbers["fisher"].sum()) for numbers in found.values()) > 0.0
    grams = measured(name, path, "gram", lambda _: True)
    assert all(bool((torch.linalg.eigvalsh(numbers["gram"]) > -1e-3).all()) for numbers in grams.values())
    assert any("mlp" in key or "intermediate" in key for key in grams)
    assert not any("embed" in key for key in grams)


def test_an_output_layer_has_a_gram_matrix_unless_it_is_tied_to_the_embeddings(tmp_path: Path) -> None:
    for tied in (True, False):
        path = tiny_llama(tmp_path / str(tied), tied=tied)
        assert ("lm_head.weight" in measured("causal_lm", path, "gram", lambda _: True)) is not tied


def test_an_expectation_over_all_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="too many") as caught:
        measured("causal_lm", tiny_llama(tmp_path), "fisher_expected", lambda _: True)
    assert caught.value.remedy == "use `sampled` or `data`"


def test_transposed_layers_say_which_dimension_is_the_input(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    config.num_labels = 3
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer(bert=False).save_pretrained(tmp_path)
    found = measured("text_classification", tmp_path, "gram", lambda _: True)
    numbers = found["transformer.h.0.mlp.c_fc.weight"]
    assert numbers["gram"].shape == (16, 16) and float(numbers["axis"]) == 0.0
    assert found["transformer.h.0.mlp.c_proj.weight"]["gram"].shape == (64, 64)


def test_numbers_that_are_not_finite_are_refused_by_name(root: Path) -> None:
    model = open_bert(root / "one")
    weight = model.get_parameter("bert.encoder.layer.0.output.dense.weight")
    with torch.no_grad():
        weight.fill_(torch.nan)
    evaluator = build("text_classification", root / "one", ROWS["one"], batch_size=1)
    with pytest.raises(JobError, match="'w' is not finite"):
        measure("fisher", model, evaluator, {"w": weight}, 0)


def test_unknown_questions_and_evaluators_without_likelihoods_are_refused(models: Models, root: Path) -> None:
    with pytest.raises(InvalidInput, match="'moon' cannot be measured"):
        calibrations(models, root).get("one", models[1].shared[0], "moon")
    evaluator = build("text_classification", root / "one", ROWS["one"])
    with pytest.raises(InvalidInput, match="gives no likelihoods"):
        Evaluator.predictions(evaluator, open_bert(root / "one"))


# --- merging ----------------------------------------------------------------------------------------------------------


def test_fisher_merging_of_real_models(models: Models, root: Path) -> None:
    measurements = calibrations(models, root)
    found = merged(models, recipe_of(models, "fisher", [0.6, 0.3], normalise=False), measurements)
    known = {name: fisher_by_hand(root / name, name, "data") for name in ROWS}
    for tensor in models[1].shared:
        parts = [0.6 * (known["one"][tensor.name] + 1e-6), 0.3 * (known["two"][tensor.name] + 1e-6)]
        engine = MergeEngine(*models)
        thetas = [engine.source(name, tensor, CPU) for name in ROWS]
        expected = (parts[0] * thetas[0] + parts[1] * thetas[1]) / (parts[0] + parts[1])
        torch.testing.assert_close(found[tensor.name], expected, rtol=1e-3, atol=1e-3)


def test_ranges_of_fisher_merging_may_cut_through_a_tensor(models: Models, root: Path) -> None:
    measurements = calibrations(models, root)
    tables = [[0.6, 0.3], [0.1, 0.8]]
    left, right = (merged(models, recipe_of(models, "fisher", row), measurements) for row in tables)
    plain = recipe_of(models, "fisher", [0.5, 0.5])
    first, second, *others = models[1].flat
    place = left[first.name].numel() + 7  # within the second parameter
    node = plain.root.model_copy(update={"groups": None, "breaks": [place], "coefficients": tables})
    found = merged(models, plain.model_copy(update={"root": node}), measurements)
    flat = torch.cat([left[second.name].flatten()[:7], right[second.name].flatten()[7:]])
    assert torch.equal(found[first.name], left[first.name])
    assert torch.equal(found[second.name].flatten(), flat)
    assert all(torch.equal(found[tensor.name], right[tensor.name]) for tensor in others)


def test_regmean_of_real_models_brings_outputs_closer_than_the_average(models: Models, root: Path) -> None:
    found = merged(models, recipe_of(models, "regmean", [1.0, 1.0], off_diagonal=1.0), calibrations(models, root))
    average = merged(models, recipe_of(models, "linear", [1.0, 1.0]), calibrations(models, root))
    engine = MergeEngine(*models)
    read = {name: inputs_by_hand(root / name, name) for name in ROWS}
    checked = 0
    for tensor in models[1].shared:
        if tensor.name not in read["one"] or "LayerNorm" in tensor.name:
            torch.testing.assert_close(found[tensor.name], average[tensor.name], rtol=1e-6, atol=1e-6)
            continue

        def error(weight: Tensor, tensor: Any = tensor) -> float:
            return sum(
                float((rows[tensor.name] @ (weight - engine.source(name, tensor, CPU)).T).square().mean())
                for name, rows in read.items()
            )

        assert error(found[tensor.name]) < error(average[tensor.name])
        checked += 1
    assert checked == 13


PLUS = {
    "vocab_size": 64,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
"""The model that reference/make_data_driven.py merges."""


def write_plus(root: Path) -> Models:
    """Write its Berts, each expert with a head, and the items behind its token ids."""
    known = reference()
    for name in ("base", "one", "two"):
        config = BertConfig(**PLUS)  # type: ignore[arg-type]
        model: Any = BertModel(config) if name == "base" else BertForSequenceClassification(config)
        model.double()
        inner = model if name == "base" else model.bert
        state = {key.removeprefix(f"plus/{name}/"): value for key, value in known.items() if f"plus/{name}/" in key}
        result = inner.load_state_dict(state, strict=False)
        assert not result.unexpected_keys and all(key.startswith("pooler") for key in result.missing_keys)
        model.save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        if name != "base":
            rows = known[f"plus/ids/{name}"][:, 1:-1].tolist()
            items: list[Row] = [{"text": " ".join(VOCABULARY[number] for number in ids), "label": 0} for ids in rows]
            write_items(root, {name: items})
    return open_models(root / "base", {name: root / name for name in ROWS}, ("classifier.*", "pooler.*"))


def test_regmean_plusplus_is_fusion_benchs(tmp_path: Path) -> None:
    models = write_plus(tmp_path)
    found = merged(models, recipe_of(models, "regmean_plusplus", [1.0]), calibrations(models, tmp_path))
    assert len(found) == 5 + 3 * 16
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, reference()[f"plus/merged/{name}"], rtol=1e-10, atol=1e-10)
    plain = merged(models, recipe_of(models, "regmean", [1.0, 1.0]), calibrations(models, tmp_path))
    off = [name for name in found if not torch.allclose(found[name], plain[name], rtol=1e-6, atol=1e-6)]
    assert len(off) == 3 * 6 and all(name.endswith(".weight") and "embeddings" not in name for name in off)


def test_regmean_plusplus_is_prepared_once_for_all_scales(
    models: Models, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    cache = Cache(tmp_path)
    whole = merged(models, recipe_of(models, "regmean_plusplus", [1.0]), calibrations(models, root, cache=cache))
    assert calls["gram"] == 2 * (1 + 2 + 1)
    half = merged(
        models, recipe_of(models, "regmean_plusplus", [0.5]), calibrations(models, root, cache=Cache(tmp_path))
    )
    merged(models, recipe_of(models, "regmean_plusplus", [0.0]), calibrations(models, root, cache=cache))
    assert calls["gram"] == 8
    engine = MergeEngine(*models)
    for tensor in models[1].shared:
        expected = (engine.source("base", tensor, CPU) + whole[tensor.name]) / 2
        torch.testing.assert_close(half[tensor.name], expected, rtol=1e-5, atol=1e-6)
    merged(
        models, recipe_of(models, "regmean_plusplus", [1.0], off_diagonal=0.5), calibrations(models, root, cache=cache)
    )
    assert calls["gram"] == 16


def behind(recipe: Recipe, operator: str, **options: Any) -> Recipe:
    """The recipe with a modifier behind its root."""
    node = Merge(
        operator=operator,
        options=options,
        base=Leaf(model="base"),
        inputs=[recipe.root],
        groups=[Selector()],
        coefficients=[[1.0]],
    )
    return recipe.model_copy(update={"root": node})


def test_aim_holds_back_any_other_merge_where_the_base_is_active(models: Models, root: Path) -> None:
    base = {"base": specs(head="one")["one"]}
    measurements = calibrations(models, root, base)
    plain = recipe_of(models, "ties", [0.5, 0.5])
    before, after = (merged(models, recipe, measurements) for recipe in (plain, behind(plain, "aim", omega=0.3)))
    known = answers(measurements, models[1], "base", "activation")
    engine = MergeEngine(*models)
    for tensor in models[1].shared:
        start = engine.source("base", tensor, CPU)
        left: Any = 1.0
        if known[tensor.name]:
            activation = known[tensor.name]["activation"]
            left = 1.0 - 0.7 * activation / activation.max()
        expected = start + (before[tensor.name] - start) * left
        torch.testing.assert_close(after[tensor.name], expected, rtol=1e-5, atol=1e-6)
    assert sum(bool(numbers) for numbers in known.values()) == 13 + 5


def test_merged_inputs_cannot_be_measured(models: Models, root: Path) -> None:
    plain = recipe_of(models, "fisher", [0.5, 0.5])
    assert isinstance(plain.root, Merge)
    inner = recipe_of(models, "linear", [0.5, 0.5]).root
    nested = plain.root.model_copy(update={"inputs": [plain.root.inputs[0], inner]})
    with pytest.raises(InvalidInput, match="inputs cannot be merges themselves"):
        merged(models, plain.model_copy(update={"root": nested}), calibrations(models, root))


def test_a_planned_layer_is_measured_where_it_comes_from(models: Models, root: Path) -> None:
    measurements = calibrations(models, root)
    plain = recipe_of(models, "fisher", [0.5, 0.5])
    twice = plain.model_copy(update={"layers": [PlannedLayer(layer=0), PlannedLayer(layer=0), PlannedLayer(layer=1)]})
    one, three = (merged(models, recipe, measurements) for recipe in (plain, twice))
    name = "encoder.layer.{}.output.dense.weight"
    for depth, layer in enumerate((0, 0, 1)):
        assert torch.equal(three[name.format(depth)], one[name.format(layer)])


def test_experts_in_bfloat16_are_measured_in_float32(root: Path, tmp_path: Path) -> None:
    tiny_bert_base(tmp_path / "base", dtype=torch.bfloat16)
    for seed, (name, labels) in enumerate({"one": 3, "two": 2}.items(), start=1):
        tiny_bert(tmp_path / name, labels=labels, seed=seed, dtype=torch.bfloat16)
    write_items(tmp_path)
    models = open_models(tmp_path / "base", {name: tmp_path / name for name in ROWS})
    measurements = calibrations(models, tmp_path)
    assert measurements.get("one", models[1].shared[0], "fisher")["fisher"].dtype == torch.float32
    found = merged(models, recipe_of(models, "regmean", [0.5, 0.5]), measurements)
    assert all(tensor.dtype == torch.bfloat16 and bool(tensor.isfinite().all()) for tensor in found.values())


# --- computed once ----------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often models are run, by question."""
    calls: Counter[str] = Counter()

    def count(question: str, *arguments: Any) -> dict[str, Numbers]:
        calls[question] += 1
        return measure(question, *arguments)

    monkeypatch.setattr(module, "measure", count)
    return calls


def test_models_are_run_once_for_all_engines_that_share_a_directory(
    models: Models, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    recipes = [recipe_of(models, "fisher", [0.5, 0.5]), recipe_of(models, "fisher", [0.9, 0.2])]
    first = [merged(models, recipe, calibrations(models, root, cache=Cache(tmp_path))) for recipe in recipes]
    second = [merged(models, recipe, calibrations(models, root, cache=Cache(tmp_path))) for recipe in recipes]
    assert calls == {"fisher": 2}
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    merged(
        models,
        recipe_of(models, "fisher", [0.5, 0.5], labels="sampled"),
        calibrations(models, root, cache=Cache(tmp_path)),
    )
    assert calls == {"fisher": 2, "fisher_sampled": 2}


def test_without_a_cache_answers_stay_in_memory(models: Models, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    measurements = calibrations(models, root)
    for row in ([0.5, 0.5], [0.1, 0.7]):
        merged(models, recipe_of(models, "regmean", row), measurements)
    assert calls == {"gram": 2}


def test_other_items_other_heads_and_other_models_are_measured_anew(models: Models, root: Path) -> None:
    plain = calibrations(models, root).identity("one")
    changed = [
        specs(data={"path": "one.jsonl", "limit": 3}),
        specs(data={"path": "two.jsonl"}),
        specs(options={"max_length": 8}),
        specs(head="two", data={"path": "two.jsonl"}),
    ]
    found = {calibrations(models, root, {"one": each["one"]}).identity("one") for each in changed}
    assert len(found) == 4 and plain not in found
    assert calibrations(models, root).identity("one") == plain
    assert calibrations(models, root).identity("two") != plain


def test_parameters_that_do_not_fit_together_are_measured_in_portions(
    models: Models, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = ("fisher", "gram")
    whole = {question: answers(calibrations(models, root), models[1], "one", question) for question in questions}
    monkeypatch.setattr(module, "ROOM", 1_000)
    calls = counted(monkeypatch)
    seen = []
    for _ in range(2):
        found = calibrations(models, root, cache=Cache(tmp_path))
        for question, expected in whole.items():
            parts = answers(found, models[1], "one", question)
            assert all(torch.equal(parts[key][kind], expected[key][kind]) for key in parts for kind in parts[key])
        seen.append(dict(calls))
    assert seen[0] == seen[1] and min(seen[0].values()) > 10


def _rebuild(root: Path, cache: Path, start: Any, results: Any) -> None:
    torch.set_num_threads(1)
    models = open_models(root / "base", {name: root / name for name in ROWS})
    start.wait()
    found = merged(models, recipe_of(models, "fisher", [0.4, 0.7]), calibrations(models, root, cache=Cache(cache)))
    results.put({name: tensor.numpy() for name, tensor in found.items()})


def test_two_processes_at_once_agree_bit_for_bit(models: Models, root: Path, tmp_path: Path) -> None:
    context = forks()
    start, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_rebuild, args=(root, tmp_path, start, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    one, two = (results.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert all((one[name] == two[name]).all() for name in one)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 4 and all(file.suffix == ".safetensors" for file in files)  # two models: information and norm


# --- jobs, recipes and exports ----------------------------------------------------------------------------------------


def job(root: Path, merge: dict[str, Any], **changes: Any) -> JobSpec:
    data = write_job(root, items=12, **changes)
    data["merge"] = data["merge"] | {"granularity": {"layers": "whole"}} | merge
    return parse_spec(data)


def data_of(name: str, **changes: Any) -> dict[str, Any]:
    return {"evaluator": "text_classification", "data": {"path": f"data/{name}.jsonl"}} | changes


EXPERTS = {name: data_of(name) for name in TASKS}


@pytest.mark.parametrize(
    "merge",
    [
        {"operator": "fisher", "calibration": EXPERTS},
        {"operator": "regmean", "calibration": EXPERTS},
        {"operator": "regmean_plusplus", "calibration": EXPERTS},
        {
            "operator": "linear",
            "modifiers": [{"operator": "aim", "target": "merged"}],
            "calibration": {"base": data_of("colour", head="colour")},
        },
    ],
    ids=lambda merge: cast("str", merge["operator"]),
)
def test_a_job_scores_what_its_recipe_rebuilds_elsewhere(merge: dict[str, Any], tmp_path: Path) -> None:
    spec, roots = job(tmp_path, merge), Roots([tmp_path])
    problem = prepare(spec, roots)
    assert set(problem.calibration) == set(merge["calibration"])
    space = make_space(spec, problem)
    recipe = space.recipe(space.uniform())
    assert recipe.calibration == problem.calibration
    worker = EvaluationWorker(spec, problem, roots, "worker", cache=Cache(tmp_path / "cache"))
    result = worker.evaluate(Task(0, recipe.to_json()))
    assert result.failure is None and set(result.scores) == set(TASKS)

    again = Recipe.parse(json.loads(json.dumps(recipe.to_json())))
    assert again.fingerprint == recipe.fingerprint
    paths = {name: tmp_path / "models" / name for name in ("base", *TASKS)}
    models = open_models(paths["base"], {name: paths[name] for name in TASKS}, spec.merge.heads)
    measurements = load_measurements(again, *models, roots)
    out = export_checkpoint(
        again,
        *models,
        tmp_path / "out",
        head="colour",
        title="x",
        scores={},
        spec=spec,
        progress=lambda _: None,
        measurements=measurements,
    )
    resident = ResidentModels(*models, MergeEngine(*models, measurements=measurements), CPU, torch.float32)
    resident.apply(again)
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[f"bert.{name}"], tensor) for name, tensor in resident.shared.items())
    with pytest.raises(InvalidInput, match="needs data to measure the models on"):
        MergeEngine(*models).merged(again, next(t for t in models[1].shared if t.name.endswith("query.weight")))


def test_changed_data_stop_a_job_and_a_rebuild(tmp_path: Path) -> None:
    spec, roots = job(tmp_path, {"operator": "fisher", "calibration": EXPERTS}), Roots([tmp_path])
    problem = prepare(spec, roots)
    space = make_space(spec, problem)
    recipe = space.recipe(space.uniform())
    models = open_models(
        tmp_path / "models/base", {name: tmp_path / "models" / name for name in TASKS}, spec.merge.heads
    )
    known = load_measurements(recipe, *models, roots)
    path = tmp_path / "cal.jsonl"
    path.write_text((tmp_path / "data/colour.jsonl").read_text())
    elsewhere = spec.model_dump(mode="json")
    elsewhere["merge"]["calibration"]["colour"]["data"]["path"] = "cal.jsonl"
    assert prepare(parse_spec(elsewhere), roots).calibration["colour"].digest == problem.calibration["colour"].digest
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "data/colour.jsonl").write_text("".join(lines[1:] + lines[:1]))
    for call in (
        lambda: EvaluationWorker(
            spec.model_copy(update={"objectives": spec.objectives[1:]}), without_first(problem), roots, "w"
        ),
        lambda: load_measurements(recipe, *models, roots),
        lambda: check_items({}, recipe.calibration or {}),
    ):
        with pytest.raises(InputsChanged) as caught:
            call()
        assert caught.value.field == "merge.calibration.colour.data"
    changed = prepare(spec, roots)
    foreign = recipe.model_copy(update={"calibration": changed.calibration})
    assert foreign.fingerprint != recipe.fingerprint
    with pytest.raises(InvalidInput, match="measured 'colour' on other data") as refused:
        MergeEngine(*models, measurements=known).check(foreign)
    assert refused.value.field == "recipe.calibration.colour"


def without_first(problem: Any) -> Any:
    return problem.model_copy(update={"objectives": problem.objectives[1:]})


def test_a_recipe_of_the_users_gets_the_jobs_data(tmp_path: Path) -> None:
    spec, roots = job(tmp_path, {"operator": "fisher", "calibration": EXPERTS}), Roots([tmp_path])
    problem = prepare(spec, roots)
    space = make_space(spec, problem)
    own = space.recipe(space.uniform()).model_copy(update={"calibration": None})
    start = {"candidates": [{"recipe": own.to_json()}]}
    again = spec.model_dump(mode="json") | {"warm_starts": start}
    prepare(parse_spec(again), roots)
    _, found = space.encode(parse_spec(again).warm_starts.candidates[0])
    assert found.calibration == problem.calibration


def test_the_first_256_items_are_used_unless_the_data_say_otherwise(models: Models, root: Path) -> None:
    rows = [{"text": words(2, number), "label": number % 3} for number in range(300)]
    (root / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for limit, expected in ((None, 256), (270, 270), (5, 5)):
        calibration = {"one": specs(data={"path": "many.jsonl", "limit": limit})["one"]}
        assert len(load_items(calibration, *models, Roots([root]))["one"].evaluator) == expected


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"calibration": {}}, "merge.calibration.colour", "fisher measures 'colour' on data, but none are named"),
    ({"calibration": {"colour": data_of("colour")}}, "merge.calibration.shape", "none are named"),
    ({"operator": "regmean", "calibration": {}}, "merge.calibration.colour", "regmean measures"),
    (
        {"operator": "linear", "modifiers": [{"operator": "aim", "target": "merged"}], "calibration": EXPERTS},
        "merge.calibration.base",
        "aim measures 'base' on data",
    ),
    ({"calibration": EXPERTS | {"moon": data_of("colour")}}, "merge.calibration.moon", "no model 'moon'"),
    ({"calibration": EXPERTS | {"base": data_of("colour")}}, "merge.calibration.base.head", "must name whose it uses"),
    ({"calibration": EXPERTS | {"shape": data_of("shape", head="moon")}}, "merge.calibration.shape.head", "'moon'"),
    (
        {"calibration": EXPERTS | {"shape": data_of("shape", evaluator="moon")}},
        "merge.calibration.shape.evaluator",
        None,
    ),
    (
        {"calibration": EXPERTS | {"shape": data_of("shape", options={"moon": 1})}},
        "merge.calibration.shape.options.moon",
        None,
    ),
    ({"calibration": EXPERTS | {"shape": data_of("moon")}}, "merge.calibration.shape.data.path", "does not exist"),
    (
        {"calibration": EXPERTS, "modifiers": [{"operator": "task_arithmetic", "target": "experts"}]},
        "merge.modifiers.0.target",
        "measures the experts as they are",
    ),
]


@pytest.mark.parametrize(("merge", "field", "message"), BAD, ids=[field for _, field, _ in BAD])
def test_what_is_missing_is_said_before_anything_runs(
    merge: dict[str, Any], field: str, message: str | None, tmp_path: Path
) -> None:
    spec = job(tmp_path, {"operator": "fisher"} | merge)
    with pytest.raises(InvalidInput, match=message) as caught:
        prepare(spec, Roots([tmp_path]))
    assert caught.value.field == field


def test_bad_rows_are_refused_by_row(tmp_path: Path) -> None:
    spec = job(tmp_path, {"operator": "fisher", "calibration": EXPERTS | {"shape": data_of("colour")}})
    with pytest.raises(InvalidData, match="line") as caught:  # three classes, but the expert knows two
        prepare(spec, Roots([tmp_path]))
    assert caught.value.field == "merge.calibration.shape.data.columns.label"


# --- the evaluators' side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(CASES) - set(LIKELY)))
def test_an_evaluator_without_likelihoods_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"{name} gives no likelihoods") as caught:
        measured(name, CASES[name].checkpoint(tmp_path), "fisher", lambda _: True)
    assert caught.value.field == "evaluator"


@pytest.mark.parametrize("name", LIKELY)
@pytest.mark.parametrize("size", [1, 3])
def test_predictions_are_what_the_loss_is_the_likelihood_of(name: str, size: int, tmp_path: Path) -> None:
    path = CASES[name].checkpoint(tmp_path)
    model = open_model(name, path).eval()  # type: ignore[no-untyped-call]
    evaluator = build(name, path, CASES[name].rows, **{**CASES[name].options, "batch_size": size})
    scores = evaluator.evaluate(model)["loss"]
    weights = scores.weights if scores.weights is not None else 1.0
    total = 0.0
    with torch.no_grad():
        for prediction in evaluator.predictions(model):
            draws, classes = prediction.log_likelihoods.shape
            assert prediction.observed.shape == (draws,) and bool((prediction.observed < classes).all())
            assert bool(prediction.log_likelihoods.logsumexp(dim=1).abs().max() < 1e-4)
            total -= float(prediction.log_likelihoods.gather(1, prediction.observed[:, None]).sum())
    assert total == pytest.approx(float((scores.values * weights).sum()), rel=1e-4)
