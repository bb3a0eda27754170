"""Asking experts: once for a machine, in their own weights, with the objective's head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optimizer.errors import InvalidInput
from optimizer.ports import Result, Task
from optimizer.problem import Problem
from optimizer.space import make_space
from optimizer.spec import JobSpec, parse_spec
from tests.jobs import TASKS, write_job
from workers.evaluators.divergence import Divergence
from workers.merging.cache import Cache
from workers.prepare import prepare
from workers.references import References
from workers.roots import Roots
from workers.worker import EvaluationWorker

NAMES = tuple(TASKS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    write_job(folder)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `Divergence` was asked to observe, by the dtype of the model's weights."""
    calls: list[str] = []
    observe = Divergence.observe

    def counted(self: Divergence, model: Any, *arguments: Any) -> Any:
        calls.append(str(model.dtype))
        return observe(self, model, *arguments)

    monkeypatch.setattr(Divergence, "observe", counted)
    return calls


def job(root: Path, evaluator: str = "divergence", workers: dict[str, Any] | None = None, **options: Any) -> JobSpec:
    """A job of two classifiers with heads of their own, each compared with experts on its task's texts."""
    objectives = [
        {
            "name": name,
            "evaluator": evaluator,
            "options": options,
            "data": {"path": f"data/{name}.jsonl"},
            "head": name,
        }
        for name in NAMES
    ]
    return parse_spec(
        {
            "base": "models/base",
            "experts": [{"name": name, "path": f"models/{name}"} for name in NAMES],
            "merge": {"heads": ["classifier.*", "*pooler.*"], "granularity": {"layers": "whole"}},
            "objectives": objectives,
            "budget": {"evaluations": 10},
            "seed": 3,
            "workers": workers or {},
        }
    )


def worker(root: Path, spec: JobSpec, cache: Cache | None = None) -> tuple[EvaluationWorker, Problem]:
    problem = prepare(spec, Roots([root]))
    return EvaluationWorker(spec, problem, Roots([root]), "worker", cache=cache), problem


def evaluate(made: tuple[EvaluationWorker, Problem], spec: JobSpec, coefficients: list[float], **task: Any) -> Result:
    genome: NDArray[np.float64] = np.array(coefficients)
    recipe = make_space(spec, made[1]).recipe(genome).to_json()
    result = made[0].evaluate(Task(0, recipe, **task))
    assert result.failure is None, result.failure
    return result


@pytest.mark.parametrize("evaluator", ["divergence", "alignment"])
def test_each_expert_is_found_by_its_own_objective(evaluator: str, root: Path) -> None:
    spec = job(root, evaluator)
    made = worker(root, spec)
    first, second = (evaluate(made, spec, found).scores for found in ([1.0, 0.0], [0.0, 1.0]))
    for own, other, name in ((first, second, NAMES[0]), (second, first, NAMES[1])):
        assert own[name].mean() == pytest.approx(0.0, abs=1e-6)
        assert other[name].mean() > 0.01


def test_the_first_candidate_is_not_the_last_expert_that_was_asked(root: Path) -> None:
    spec = job(root)
    fresh, used = worker(root, spec), worker(root, spec)
    evaluate(used, spec, [0.3, 0.9])
    one, two = (evaluate(made, spec, [0.5, 0.2]).scores for made in (fresh, used))
    for name in NAMES:
        np.testing.assert_array_equal(one[name].values, two[name].values)


def test_asking_leaves_the_merge_that_was_there(root: Path, asked: list[str]) -> None:
    spec = job(root)
    made = worker(root, spec)
    expected = evaluate(made, spec, [0.5, 0.2]).scores[NAMES[0]].values
    measure = made[0]._measures[0]
    References(made[0]._models, made[1].models).provide(measure.evaluator, measure.head)
    assert len(asked) == 3
    model = made[0]._models.model(measure.head, measure.evaluator.auto_class)
    np.testing.assert_array_equal(measure.evaluator.evaluate(model)["js_divergence"].values, expected)


def test_workers_of_a_machine_ask_once(root: Path, tmp_path: Path, asked: list[str]) -> None:
    spec = job(root)
    scores = [evaluate(worker(root, spec, Cache(tmp_path)), spec, [0.5, 0.2]).scores for _ in range(2)]
    assert len(asked) == 2
    for name in NAMES:
        np.testing.assert_array_equal(scores[0][name].values, scores[1][name].values)
    worker(root, job(root, batch_size=3), Cache(tmp_path))  # another job that asks the same
    assert len(asked) == 2
    worker(root, job(root, experts=list(NAMES)), Cache(tmp_path))  # each also about the other's texts
    assert len(asked) == 4
    worker(root, job(root, top=2), Cache(tmp_path))
    assert len(asked) == 6
    worker(root, job(root, workers={"dtype": "bfloat16"}), Cache(tmp_path))
    assert asked[6:] == ["torch.bfloat16"] * 2


def test_parts_ask_nobody(root: Path, asked: list[str]) -> None:
    spec = job(root)
    made = worker(root, spec)
    whole = evaluate(made, spec, [0.5, 0.2]).scores
    part = evaluate(made, spec, [0.5, 0.2], items=5).scores
    assert len(asked) == 2
    assert all(len(part[name].values) == 5 for name in NAMES)
    assert set(part[NAMES[0]].values.round(4)) <= set(whole[NAMES[0]].values.round(4))


def test_an_expert_that_the_job_does_not_have_is_named(root: Path) -> None:
    with pytest.raises(InvalidInput, match="no expert 'nobody'") as caught:
        prepare(job(root, experts=[NAMES[0], "nobody"]), Roots([root]))
    assert caught.value.field == "objectives.0.options.experts"
    assert caught.value.remedy == f"use some of: {', '.join(NAMES)}"
