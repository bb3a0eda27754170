"""Slopes and evaluations on a part of the items, by a real worker on real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from optimizer.fitness.subset import item_order
from optimizer.ports import Result, Task
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Recipe
from optimizer.space import MergeSpace, make_space
from optimizer.spec import JobSpec, parse_spec
from tests.jobs import TASKS, write_job
from tests.workers.adapter_models import causal
from tests.workers.models import WORDS, tiny_llama
from workers.evaluators.base import Cancelled, Evaluator
from workers.evaluators.text_classification import TextClassification
from workers.prepare import prepare
from workers.roots import Roots
from workers.slopes import NOISE
from workers.worker import EvaluationWorker

Array = NDArray[np.float64]


class Bench:
    """A worker of a job, and the tables that it evaluates."""

    def __init__(self, root: Path, job: dict[str, Any]) -> None:
        self.spec: JobSpec = parse_spec(job)
        self.problem: Problem = prepare(self.spec, Roots([root]))
        self.worker = EvaluationWorker(self.spec, self.problem, Roots([root]), "worker")
        space = make_space(self.spec, self.problem)
        assert isinstance(space, MergeSpace)
        self.space = space

    def run(self, table: Array, **task: Any) -> Result:
        result = self.worker.evaluate(Task(0, self.space.recipe(table.ravel()).to_json(), **task))
        assert result.failure is None, result.failure
        return result

    def losses(self, table: Array) -> Array:
        scores = self.run(table).scores
        return np.array([scores[objective.name].mean() for objective in self.problem.objectives])

    def slopes(self, table: Array, **task: Any) -> Array:
        found = self.run(table, slopes=True, **task).slopes
        assert found is not None
        return found

    def differences(self, table: Array, h: float = 0.01) -> Array:
        """Central differences of the losses along every task vector, group by group: (objectives, groups, experts)."""
        out = np.empty((len(self.problem.objectives), *table.shape))
        for place in np.ndindex(*table.shape):
            up, down = table.copy(), table.copy()
            up[place] += h
            down[place] -= h
            out[:, *place] = (self.losses(up) - self.losses(down)) / (2 * h)
        return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slopes")


@pytest.fixture(scope="module")
def job(root: Path) -> dict[str, Any]:
    """Two classifiers with heads of their own, coefficients for each layer."""
    return write_job(root)


@pytest.fixture(scope="module")
def berts(root: Path, job: dict[str, Any]) -> Bench:
    return Bench(root, job)


def language_job(root: Path, **changes: Any) -> dict[str, Any]:
    """A tied language model, an expert that is a whole model and one that is a LoRA adapter."""
    models = root / "models"
    if not (models / "llama").exists():
        tiny_llama(models / "llama", seed=0)
        tiny_llama(models / "whole", seed=1)
        causal(models / "llama", models / "lora", seed=2)
        rng = np.random.default_rng(0)
        rows = [{"text": " ".join(rng.choice(WORDS, int(rng.integers(3, 9))))} for _ in range(12)]
        (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job: dict[str, Any] = {
        "base": "models/llama",
        "experts": [{"name": name, "path": f"models/{name}"} for name in ("whole", "lora")],
        "objectives": [
            {"name": "texts", "evaluator": "causal_lm", "data": {"path": "texts.jsonl"}, "metric": "loss"},
        ],
        "budget": {"evaluations": 4},
    }
    return job | changes


TABLE = np.array([[0.2, 0.3], [0.1, 0.4], [0.35, -0.05]])


def test_slopes_are_the_derivatives_of_the_losses(berts: Bench) -> None:
    table = TABLE
    found = berts.slopes(table)
    assert found.shape == (2, 2, 3, 4)
    measured = berts.differences(table)
    np.testing.assert_allclose(found[0, :, :, 1:3], measured, rtol=0.02, atol=0.02 * np.abs(measured).max())
    assert not found[0, :, :, 0].any(), "the base lies at no distance from itself"
    own = np.einsum("ogm,gm->og", found[0, :, :, 1:3], table)
    np.testing.assert_allclose(found[0, :, :, 3], own, rtol=1e-3, atol=1e-4 * np.abs(own).max())


def test_cosines_are_those_with_the_weights_themselves_tensor_by_tensor(berts: Bench) -> None:
    table = TABLE
    found = berts.slopes(table)[1]
    models = berts.worker._models
    model = models.model("shape", "AutoModelForSequenceClassification")
    parameters = models.parameters("shape", "AutoModelForSequenceClassification")
    assert parameters is not None
    evaluator = next(measure.evaluator for measure in berts.worker._measures if measure.head == "shape")
    assert isinstance(evaluator, TextClassification)
    for weight in parameters.values():
        weight.requires_grad_(True)
    batches = [(model(**batch.inputs).logits, batch.targets) for batch in evaluator._batches]
    loss = cross_entropy(torch.cat([logits for logits, _ in batches]), torch.cat([labels for _, labels in batches]))
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    longest = max(float(gradient.norm()) for gradient in gradients if gradient is not None)
    expected = np.zeros_like(found[1])
    sources = [*models.checkpoints, None]
    for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
        weight.requires_grad_(False)
        tensor = next(tensor for tensor in berts.problem.layout.shared if tensor.name == name)
        group = next(number for number, group in enumerate(berts.space.groups) if group.matches(tensor))
        for column, source in enumerate(sources):
            there = weight if source is None else models._engine.source(source, tensor, torch.device("cpu"))
            if gradient is not None and float(gradient.norm()) > NOISE * longest:
                cosine = torch.nn.functional.cosine_similarity(gradient.double().ravel(), there.double().ravel(), 0)
                expected[group, column] += float(cosine)
    np.testing.assert_allclose(found[list(TASKS).index("shape")], expected, rtol=1e-3, atol=1e-4)


def test_the_model_is_left_as_it_was(berts: Bench) -> None:
    table = np.full(berts.space.table, 0.3)
    before = berts.losses(table)
    berts.slopes(table)
    for head in TASKS:
        model = berts.worker._models.model(head, "AutoModelForSequenceClassification")
        assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())
        assert not any(weight._post_accumulate_grad_hooks for weight in model.parameters())
    np.testing.assert_array_equal(berts.losses(table), before)


def test_objectives_on_the_same_items_share_a_pass_and_have_the_same_slopes(root: Path, job: dict[str, Any]) -> None:
    again = {**job["objectives"][0], "name": "again", "metric": "accuracy"}
    found = Bench(root, {**job, "objectives": [*job["objectives"], again]})
    slopes = found.slopes(np.full(found.space.table, 0.3))
    assert slopes.shape[1] == 3
    np.testing.assert_array_equal(slopes[:, 0], slopes[:, 2])
    assert np.abs(slopes[:, 0] - slopes[:, 1]).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tied_weights_adapters_and_bfloat16(root: Path, dtype: str) -> None:
    bench = Bench(root, language_job(root))
    table = np.full(bench.space.table, 0.3)
    exact = bench.differences(table)
    found = Bench(root, language_job(root, workers={"dtype": dtype})).slopes(table)[0, :, :, 1:3]
    close = 0.02 if dtype == "float32" else 0.1
    np.testing.assert_allclose(found, exact, rtol=close, atol=close * np.abs(exact).max())


def test_frozen_parameters_count_nowhere(root: Path) -> None:
    job = language_job(root, merge={"frozen": ["embeddings", "norm"], "granularity": {"layers": "whole"}})
    bench = Bench(root, job)
    table = np.full(bench.space.table, 0.3)
    exact = bench.differences(table)
    np.testing.assert_allclose(bench.slopes(table)[0, :, :, 1:3], exact, rtol=0.02, atol=0.02 * np.abs(exact).max())


def test_an_evaluator_without_likelihoods_has_no_slopes_and_that_is_no_failure(
    root: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextClassification, "predictions", Evaluator.predictions)
    bench = Bench(root, job)
    assert not any(objective.differentiable for objective in bench.problem.objectives)
    result = bench.run(np.full(bench.space.table, 0.3), slopes=True)
    assert result.slopes is None and set(result.scores) == set(TASKS)


def test_prepared_objectives_say_that_they_have_slopes(berts: Bench) -> None:
    assert all(objective.differentiable for objective in berts.problem.objectives)


def test_layer_plans_have_no_slopes(berts: Bench) -> None:
    recipe = Recipe.parse(
        {
            "models": {name: model.model_dump(mode="json") for name, model in berts.problem.models.items()},
            "root": Leaf(model="base").model_dump(),
            "layers": [{"layer": 1}, {"layer": 0}],
        }
    )
    result = berts.worker.evaluate(Task(0, recipe.to_json(), slopes=True))
    assert result.failure is None and result.slopes is None


def test_infinite_slopes_are_none(berts: Bench) -> None:
    result = berts.run(np.full(berts.space.table, 1e18), slopes=True)
    assert result.slopes is None


def test_a_cancelled_backward_pass_says_so(berts: Bench) -> None:
    calls = iter([False] * 2 + [True] * 100)  # two evaluators have one batch each
    task = Task(0, berts.space.recipe(np.full(berts.space.dim, 0.3)).to_json(), slopes=True)
    with pytest.raises(Cancelled):
        berts.worker.evaluate(task, lambda: next(calls))
    berts.run(np.full(berts.space.table, 0.3), slopes=True)


# --- a part of the items ------------------------------------------------------------------------------------------------


def test_parts_are_nested_and_the_same_for_every_candidate(berts: Bench) -> None:
    order = item_order(berts.spec.seed, 24)
    for fill in (0.1, 0.6):
        table = np.full(berts.space.table, fill)
        whole = berts.run(table).scores
        for items in (1, 5, 6, 23):
            part = berts.run(table, items=items).scores
            for name in TASKS:
                expected = whole[name].values[order[:items]]
                np.testing.assert_allclose(part[name].values, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_mean_over_items_is_measured_on_all(root: Path, job: dict[str, Any]) -> None:
    objectives = [job["objectives"][0] | {"metric": "macro_f1"}, job["objectives"][1]]
    bench = Bench(root, job | {"objectives": objectives})
    assert [objective.whole for objective in bench.problem.objectives] == [True, False]
    table = np.full(bench.space.table, 0.2)
    part, whole = bench.run(table, items=5).scores, bench.run(table).scores
    first, second = (objective.name for objective in bench.problem.objectives)
    np.testing.assert_array_equal(part[first].values, whole[first].values)
    assert len(part[second].values) == 5


@pytest.mark.parametrize("items", [24, 1000])
def test_as_many_items_as_there_are_means_all_in_their_order(berts: Bench, items: int) -> None:
    table = np.full(berts.space.table, 0.2)
    for name, scores in berts.run(table, items=items).scores.items():
        np.testing.assert_array_equal(scores.values, berts.run(table).scores[name].values)


def test_slopes_of_a_part_are_those_of_its_items(root: Path) -> None:
    bench = Bench(root, language_job(root))
    table = np.full(bench.space.table, 0.3)
    part, whole = bench.slopes(table, items=4), bench.slopes(table)
    rows = (root / "texts.jsonl").read_text().splitlines()
    chosen = [rows[item] for item in item_order(bench.spec.seed, len(rows))[:4]]
    (root / "four.jsonl").write_text("\n".join(chosen))
    job = language_job(root)
    job["objectives"][0]["data"] = {"path": "four.jsonl"}
    np.testing.assert_allclose(part, Bench(root, job).slopes(table), rtol=1e-4, atol=1e-6)
    assert np.abs(part - whole).max() > 1e-4


def test_the_order_of_items_depends_on_seed_and_number_only() -> None:
    assert item_order(3, 50).tolist() == item_order(3, 50).tolist()
    assert sorted(item_order(3, 50).tolist()) == list(range(50))
    assert item_order(3, 50).tolist() != item_order(4, 50).tolist()
    assert item_order(3, 51).tolist()[:50] != item_order(3, 50).tolist()
