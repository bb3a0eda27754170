"""A worker measures just the items it is asked for, and what scores depend on is part of what they are remembered under."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.store.sql import SqlStore
from optimizer.controller import Controller, ControllerConfig
from optimizer.errors import InvalidData
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.known import PlacedScores
from optimizer.fitness.racing import Terms
from optimizer.fitness.subset import item_order
from optimizer.ports import Task
from optimizer.problem import Problem
from optimizer.space import make_space
from optimizer.spec import parse_spec
from tests.durability.rows import history
from tests.jobs import write_data, write_job
from workers.pool import LocalPoolFactory
from workers.prepare import prepare, quick_digest
from workers.roots import Roots
from workers.worker import EvaluationWorker

ITEMS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def job(root: Path) -> dict[str, Any]:
    found = write_job(root, items=ITEMS, budget={"evaluations": 8})
    first = found["objectives"][0]
    return found | {"objectives": [*found["objectives"], first | {"name": "right", "metric": "accuracy"}]}


@pytest.fixture(scope="module")
def worker(job: dict[str, Any], root: Path) -> Iterator[tuple[EvaluationWorker, Task]]:
    spec = parse_spec(job)
    problem = prepare(spec, Roots([root]))
    space = make_space(spec, problem)
    yield EvaluationWorker(spec, problem, Roots([root]), "one"), Task(0, space.recipe(space.uniform()).to_json())


def asked(task: Task, **places: list[int]) -> Task:
    return Task(task.index, task.recipe, places={name: np.array(at, dtype=np.int64) for name, at in places.items()})


def test_only_these_items_in_this_order(worker: tuple[EvaluationWorker, Task]) -> None:
    evaluate, task = worker[0].evaluate, worker[1]
    whole = evaluate(task).scores
    found = evaluate(asked(task, colour=[7, 2], shape=[], right=[2, 5])).scores
    assert set(found) == {"colour", "right"}
    np.testing.assert_allclose(found["colour"].values, whole["colour"].values[[7, 2]], rtol=1e-4)
    assert found["right"].values.tolist() == whole["right"].values[[2, 5]].tolist()
    everything = list(range(ITEMS))
    again = evaluate(asked(task, colour=everything, shape=everything, right=everything)).scores
    for name, scores in whole.items():
        assert again[name].values.tobytes() == scores.values.tobytes()


def race_against(rival: float, known: Mapping[str, PlacedScores] | None = None) -> Terms:
    """A race by the loss of colours, against a reference that has this loss on every item."""
    losses = np.full(ITEMS, rival, dtype=np.float32) + np.linspace(0, 1e-3, ITEMS, dtype=np.float32)
    return Terms((4, 8), ("colour",), (1.0,), ((losses,),), (None,), "sum", (1.0,), 0.3, known or {})


def test_who_loses_a_race_is_measured_no_further(worker: tuple[EvaluationWorker, Task]) -> None:
    evaluate, task = worker[0].evaluate, worker[1]
    order = item_order(3, ITEMS)
    places = dict.fromkeys(("colour", "shape", "right"), order)
    whole = evaluate(task).scores
    lost = evaluate(replace(task, places=places, race=race_against(-9.0)))
    assert (lost.stopped, lost.lost_to, lost.cost.items) == (4, 0, 8)
    for name, scores in lost.scores.items():
        np.testing.assert_allclose(scores.values, whole[name].values[order[:4]], rtol=1e-4)
    won = evaluate(replace(task, places=places, race=race_against(9.0)))
    assert (won.stopped, won.cost.items) == (None, 2 * ITEMS)
    for name, scores in won.scores.items():
        np.testing.assert_allclose(scores.values, whole[name].values[order], rtol=1e-4)


def test_what_is_known_counts_in_a_race(worker: tuple[EvaluationWorker, Task]) -> None:
    order = item_order(3, ITEMS)
    known = PlacedScores(order[:4], ItemScores(np.full(4, 5.0, dtype=np.float32)))
    places = {"colour": order[4:], "shape": order, "right": order[4:]}
    found = worker[0].evaluate(replace(worker[1], places=places, race=race_against(0.1, {"colour": known})))
    assert (found.stopped, set(found.scores)) == (4, {"shape"})


def test_test_items_are_measured_when_they_are_asked_for(job: dict[str, Any], root: Path) -> None:
    write_data(root / "unseen", items=5, seed=8)
    first, *others = job["objectives"]
    spec = parse_spec(job | {"objectives": [first | {"test": {"path": "unseen/data/colour.jsonl"}}, *others]})
    problem = prepare(spec, Roots([root]))
    assert problem.objectives[0].test is not None
    assert (problem.objectives[0].test.items, len(problem.objectives[0].test_items.item_digests)) == (5, 5)
    evaluate = EvaluationWorker(spec, problem, Roots([root]), "one").evaluate
    space = make_space(spec, problem)
    none = {name: np.empty(0, dtype=np.int64) for name in ("colour", "shape", "right")}
    recipe = space.recipe(space.uniform()).to_json()
    found = evaluate(Task(0, recipe, places=none, test={"colour": np.array([3, 1])}))
    assert (found.scores, found.cost.items, len(found.test["colour"].values)) == ({}, 2, 2)
    whole = evaluate(Task(0, recipe, places=none, test={"colour": np.arange(5)}))
    np.testing.assert_allclose(found.test["colour"].values, whole.test["colour"].values[[3, 1]], rtol=1e-4)


def test_test_items_that_the_search_sees_are_refused(job: dict[str, Any], root: Path) -> None:
    first = job["objectives"][0]
    data = first["data"] | {"limit": 6}
    with pytest.raises(InvalidData, match="6 of 12 test items") as caught:
        prepare(parse_spec(job | {"objectives": [first | {"data": data, "test": first["data"]}]}), Roots([root]))
    assert caught.value.field == "objectives.0.test"


def measures(job: dict[str, Any], root: Path, **changes: Any) -> list[str]:
    return [objective.measure for objective in prepare(parse_spec(job | changes), Roots([root])).objectives]


def test_what_scores_depend_on(job: dict[str, Any], root: Path) -> None:
    before = measures(job, root)
    assert len(set(before)) == 3
    assert all(len(measure) == 64 for measure in before)
    same = {"name": "other", "seed": 9, "algorithm": {"name": "random"}, "budget": {"evaluations": 3}}
    assert measures(job, root, **same) == before
    for change in ({"workers": {"dtype": "bfloat16"}}, {"merge": job["merge"] | {"heads": ["classifier.*", "*pool*"]}}):
        assert not set(measures(job, root, **change)) & set(before)
    first, *others = job["objectives"]
    changed = [first | {"options": {"max_length": 8}}, *others]
    assert [a == b for a, b in zip(measures(job, root, objectives=changed), before, strict=True)] == [False, True, True]


def test_other_tokenizers_give_other_scores(job: dict[str, Any], root: Path) -> None:
    before = measures(job, root)
    path = root / "models" / "colour" / "tokenizer_config.json"
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"do_lower_case": False}))
    try:
        assert [a == b for a, b in zip(measures(job, root), before, strict=True)] == [False, True, False]
    finally:
        path.write_text(kept)


def test_nothing_is_remembered_where_the_job_does_not_want_it(job: dict[str, Any], root: Path) -> None:
    assert measures(job, root, fitness={"cache": False}) == [""] * 3
    assert [o.measure for o in prepare(parse_spec(job), Roots([root]), quick_digest).objectives] == [""] * 3


def test_identities_are_not_stored_with_the_problem(job: dict[str, Any], root: Path) -> None:
    problem = prepare(parse_spec(job), Roots([root]))
    assert [len(objective.item_digests) for objective in problem.objectives] == [ITEMS] * 3
    stored = Problem.model_validate(problem.model_dump(mode="json"))
    assert [(o.measure, o.digests) for o in stored.objectives] == [("", "")] * 3


def test_a_second_job_finds_the_scores_of_the_first(job: dict[str, Any], root: Path, sqlite_url: str) -> None:
    store = SqlStore(sqlite_url)
    spec = parse_spec(job)
    jobs = [store.create_job(spec)[0].id for _ in range(2)]
    controller = Controller(store, LocalPoolFactory([root]), ControllerConfig("test", poll_s=0.01))
    for job_id in jobs:
        assert controller.run_next(job_id)
    first, second = (store.list_candidates(job_id).items for job_id in jobs)
    assert all(candidate.seconds for candidate in first if candidate.duplicate_of is None)
    assert not any(candidate.seconds for candidate in second)
    store.close()
    assert history(sqlite_url, jobs[1]) == history(sqlite_url, jobs[0])
