"""What every evaluation pool keeps, on real checkpoints: in this process, and on Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.errors import InputsChanged, InvalidInput, JobError
from optimizer.ports import EvaluationPool, PoolFactory, Result, Task
from optimizer.problem import Problem
from optimizer.space import make_space
from optimizer.spec import JobSpec, parse_spec
from tests.jobs import TASKS, write_data, write_job
from workers.merging.cache import Cache
from workers.pool import LocalPoolFactory, RayPoolFactory

SLOW_ITEMS = 4000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and data whose evaluation takes a second or so."""
    folder = tmp_path_factory.mktemp("pool")
    write_job(folder)
    (folder / "data").rename(folder / "quick")
    write_data(folder, SLOW_ITEMS)
    return folder


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def factory(request: pytest.FixtureRequest, root: Path) -> Iterator[PoolFactory]:
    """Each kind of pool."""
    cache = Cache(root / "cache" / request.param)
    factory: PoolFactory = (
        LocalPoolFactory([root], cache) if request.param == "local" else RayPoolFactory([root], cache=cache)
    )
    yield factory
    factory.close()


# A worker on Ray takes many seconds to start. What two tests of it would show in the same way, one shows quickly.
quick_here_slow_on_ray = pytest.mark.parametrize(
    "factory",
    ["local", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])],
    indirect=True,
    scope="module",
)
only_on_ray = pytest.mark.parametrize(
    "factory", [pytest.param("ray", marks=pytest.mark.ray)], indirect=True, scope="module"
)

Opened = tuple[JobSpec, Problem, EvaluationPool]


@pytest.fixture(scope="module")
def opened(factory: PoolFactory, root: Path) -> Iterator[Opened]:
    """A pool for all tests that leave it as they found it, with nothing under way."""
    spec = job(root, count=2)
    problem = factory.prepare(spec)
    pool = factory.open(spec, problem)
    yield spec, problem, pool
    pool.close()


def job(root: Path, data: str = "quick", **workers: Any) -> JobSpec:
    objectives = [
        {
            "name": name,
            "evaluator": "text_classification",
            "data": {"path": f"{data}/{name}.jsonl"},
            "metric": "loss",
            "head": name,
        }
        for name in TASKS
    ]
    return parse_spec(
        {
            "base": "models/base",
            "experts": [{"name": name, "path": f"models/{name}"} for name in TASKS],
            "merge": {"heads": ["classifier.*", "*pooler.*"]},
            "objectives": objectives,
            "budget": {"evaluations": 10},
            "workers": {"cpus": 0.25} | workers,  # one pool stays open beside the others, on however few cores
        }
    )


def tasks(spec: JobSpec, problem: Problem, count: int) -> list[Task]:
    """Different candidates, the same for every pool."""
    space = make_space(spec, problem)
    genomes = np.random.default_rng(0).random((count, space.dim))
    return [Task(index, space.recipe(genome).to_json()) for index, genome in enumerate(genomes)]


def drain(pool: EvaluationPool, count: int, timeout_s: float = 120) -> dict[int, Result]:
    """Wait for ``count`` results; each index may come once only."""
    found: dict[int, Result] = {}
    deadline = time.monotonic() + timeout_s
    while len(found) < count and time.monotonic() < deadline:
        for result in pool.wait(0.2):
            assert result.index not in found
            found[result.index] = result
    assert len(found) == count
    return found


def run(factory: PoolFactory, spec: JobSpec, make: Callable[[JobSpec, Problem], list[Task]]) -> dict[int, Result]:
    """Evaluate tasks in a pool of their own."""
    problem = factory.prepare(spec)
    pool = factory.open(spec, problem)
    try:
        todo = make(spec, problem)
        for task in todo:
            pool.submit(task)
        return drain(pool, len(todo))
    finally:
        pool.close()


@pytest.mark.slow
def test_workers_keep_what_operators_prepare_for_each_other(factory: PoolFactory, root: Path) -> None:
    plain = job(root, count=2)
    spec = plain.model_copy(update={"merge": plain.merge.model_copy(update={"operator": "iso_c"})})
    found = run(factory, spec, lambda spec, problem: tasks(spec, problem, 4))
    assert not any(result.failure for result in found.values())
    kind = "local" if isinstance(factory, LocalPoolFactory) else "ray"
    kept = [path for path in (root / "cache" / kind).rglob("*") if path.is_file()]
    assert kept and all(path.suffix == ".safetensors" for path in kept)


def test_every_task_comes_back_once_with_the_same_scores_from_every_kind_of_pool(opened: Opened, root: Path) -> None:
    spec, problem, pool = opened
    for task in tasks(spec, problem, 10):
        pool.submit(task)
    found = drain(pool, 10)
    one = run(LocalPoolFactory([root]), job(root), lambda spec, problem: tasks(spec, problem, 10))
    for index, result in found.items():
        assert result.failure is None
        assert result.seconds.keys() == {"merge", "evaluate"}
        for name in TASKS:
            np.testing.assert_array_equal(result.scores[name].values, one[index].scores[name].values)


def test_a_bad_recipe_fails_alone(opened: Opened) -> None:
    spec, problem, pool = opened
    good, bad, other = tasks(spec, problem, 3)
    recipe = dict(bad.recipe)
    recipe["root"] = {**recipe["root"], "operator": "blend"}
    for task in (good, Task(bad.index, recipe), other):
        pool.submit(task)
    found = drain(pool, 3)
    assert [found[index].failure is None for index in range(3)] == [True, False, True]
    failure = found[1].failure
    assert failure is not None
    assert "blend" in failure.message


@pytest.mark.parametrize("attempts", [1, 2])
@quick_here_slow_on_ray
def test_an_evaluation_that_takes_too_long_is_given_up(factory: PoolFactory, root: Path, attempts: int) -> None:
    too_long(factory, root, attempts)


@only_on_ray
def test_an_evaluation_that_takes_too_long_on_ray_is_given_up_at_once(factory: PoolFactory, root: Path) -> None:
    """That a task goes to a new worker shows below, where one dies."""
    too_long(factory, root, attempts=1)


def too_long(factory: PoolFactory, root: Path, attempts: int) -> None:
    found = run(
        factory,
        job(root, "data", timeout_s=0.02, attempts=attempts),
        lambda spec, problem: tasks(spec, problem, 1),
    )
    failure = found[0].failure
    assert failure is not None
    assert failure.code == "evaluation_timeout"
    assert f"{attempts} attempts" in failure.message


@quick_here_slow_on_ray
def test_close_drops_what_is_under_way(factory: PoolFactory, root: Path) -> None:
    spec = job(root, "data")
    problem = factory.prepare(spec)
    pool = factory.open(spec, problem)
    for task in tasks(spec, problem, 50):
        pool.submit(task)
    drain_one(pool)
    began = time.monotonic()
    pool.close()
    whole = time.monotonic() - began
    assert whole < 30, "closing must not wait for the 49 others"


def drain_one(pool: EvaluationPool) -> None:
    while not pool.wait(0.2):
        pass


def test_withdraw_takes_back_what_no_worker_has_begun(opened: Opened) -> None:
    spec, problem, pool = opened
    first, *others = tasks(spec, problem, 20)
    pool.submit(first)
    drain(pool, 1)
    for task in others:
        pool.submit(task)
    taken = pool.withdraw()
    found = drain(pool, len(others) - len(taken))
    assert taken
    assert set(taken) | set(found) == {task.index for task in others}
    assert not set(taken) & set(found)


def test_a_node_with_other_files_is_no_worker_of_the_job(factory: PoolFactory, root: Path) -> None:
    spec = job(root)
    problem = factory.prepare(spec)
    stale = problem.models | {"shape": problem.models["shape"].model_copy(update={"digest": "1" * 64})}
    pool = factory.open(spec, problem.model_copy(update={"models": stale}))
    try:
        with pytest.raises(InputsChanged, match="'shape'"):
            for _ in range(300):
                pool.wait(0.2)
    finally:
        pool.close()


@quick_here_slow_on_ray
def test_a_job_that_no_worker_can_load_ends_with_its_reason(factory: PoolFactory, root: Path) -> None:
    spec = job(root)
    problem = factory.prepare(spec)
    weights = root / "models" / "shape" / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    try:
        pool = factory.open(spec, problem)
        try:
            with pytest.raises((InvalidInput, JobError), match="shape"):
                for _ in range(300):
                    pool.wait(0.2)
        finally:
            pool.close()
    finally:
        weights.write_bytes(kept)


def test_objectives_that_differ_in_the_metric_alone_share_a_pass(root: Path) -> None:
    from workers.roots import Roots
    from workers.worker import EvaluationWorker

    spec = job(root)
    twice = [*spec.objectives, spec.objectives[0].model_copy(update={"name": "accuracy", "metric": "accuracy"})]
    spec = spec.model_copy(update={"objectives": twice})
    problem = LocalPoolFactory([root]).prepare(spec)
    worker = EvaluationWorker(spec, problem, Roots([root]), "worker")
    assert len(worker._measures) == 2
    result = worker.evaluate(tasks(spec, problem, 1)[0])
    assert set(result.scores) == {*TASKS, "accuracy"}
    assert set(np.unique(result.scores["accuracy"].values)) <= {0.0, 1.0}


@only_on_ray
def test_a_dead_worker_costs_its_evaluation_and_a_new_one_takes_over(factory: PoolFactory, root: Path) -> None:
    spec = job(root, "data", count=1)
    problem = factory.prepare(spec)
    pool = factory.open(spec, problem)
    try:
        first, second, *others = tasks(spec, problem, 50)
        pool.submit(first)
        worker = drain(pool, 1)[0].worker
        pool.submit(second)
        os.kill(int(worker.rsplit(":", 1)[1]), signal.SIGKILL)
        again = drain(pool, 1)[1]
        assert again.failure is None
        assert again.worker != worker
        for task in others:
            pool.submit(task)
        began = time.monotonic()
        pool.close()
        assert time.monotonic() - began < 30, "closing must not wait for the 48 others"
    finally:
        pool.close()
