"""The comparison on real merge problems at its smallest size, and the arithmetic of its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.algorithms.base import ALGORITHMS
from optimizer.fitness.aggregate import ItemScores
from optimizer.ports import Failure, Result, Task
from tests.benchmarks.search import beyond, front, single_objective
from tests.benchmarks.search.bench import Bench, Outcomes, best_of_front
from tests.benchmarks.search.problems import PROBLEMS, cities
from tests.benchmarks.search.runs import STAGES, Choice, algorithm_of, carry_out, read, slug, wishes
from tests.benchmarks.search.table import auto_table, baseline, several_rows, single_rows, tables

ABOUT = {
    "objectives": ["a", "b"],
    "weights": [1.0, 2.0],
    "variables": 3,
    "anchors": {
        "base": {"search": [2.0, 4.0], "test": [2.5, 4.0]},
        "expert": {"search": [4.0, 2.0], "test": [4.0, 2.0]},
        "uniform": {"search": [3.0, 3.0], "test": [3.0, 3.0]},
        "task arithmetic 0.4": {"search": [1.0, 3.0], "test": [1.0, 3.5]},
    },
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems")
    PROBLEMS["digits-2"].root(path)
    return path


def made(losses: list[list[float] | None], *, who: str = "x", budget: int = 4) -> dict[str, Any]:
    times = {"proposing": 0.5, "evaluating": 1.0, "partial": 0}
    about = {"problem": "digits-2", "who": who, "seed": 0, "budget": budget}
    return about | times | {"losses": losses, "best": 0, "test": [1.0, 1.0]}


@pytest.mark.slow
def test_small_run_of_single_objective_searches(cache: Path) -> None:
    measured = single_objective.run(True, cache)
    rows = {row["who"]: row for row in measured["runs"]}
    assert set(rows) == {"random", "cma_es", "peer/pycma"} and not measured["refused"]
    assert all(row["evaluating"] > 0 and row["score"] <= 1 and 0 <= row["area"] <= 1 for row in rows.values())
    assert max(row["score"] for row in rows.values()) == 1
    about = measured["problems"]["digits-2"]
    anchors = about["anchors"]
    assert {"base", "uniform", *PROBLEMS["digits-2"].experts} < set(anchors)
    # Merging matters here: uniform beats base and experts, a tuned factor beats uniform, a search beats that.
    tuned = next(row["search"][0] for name, row in anchors.items() if name.startswith("task arithmetic"))
    assert tuned < anchors["uniform"]["search"][0] == baseline(about) < anchors["base"]["search"][0] - 0.1
    assert rows["peer/pycma"]["loss"] < tuned
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    single_objective.plot(measured, figure := Figure())
    assert len(figure.axes[0].lines) == 3


@pytest.mark.slow
def test_small_run_of_fronts(cache: Path) -> None:
    pytest.importorskip("pymoo")
    measured = front.run(True, cache)
    rows = {row["who"]: row for row in measured["runs"]}
    assert set(rows) == {"random", "nsga2", "peer/pymoo-20"} and not measured["refused"]
    assert all(0.3 < row["score"] <= 1 and row["front"] >= 1 for row in rows.values())
    assert measured["problems"]["digits-2"]["objectives"] == ["digits-01234", "digits-56789"]
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    front.plot(measured, figure := Figure())
    assert len(figure.axes) == 1


@pytest.mark.slow
def test_a_new_job_begins_with_the_front_of_an_earlier_one(cache: Path) -> None:
    measured = beyond.measure(["digits-2"], cache, 1, who=["random"], small=True)
    (row,) = measured["warm_starts"]
    cold, warm = row["from nothing"], row["from a job"]
    assert len(cold) == len(warm) == 20 and 1 <= row["handed on"] <= 20
    assert np.all(np.diff(cold) <= 0) and np.all(np.diff(warm) <= 0)
    assert warm[row["handed on"] - 1] <= cold[3], "the earlier job had the same warm starts"
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    beyond.plot(measured, figure := Figure())
    assert len(figure.axes[0].lines) == 2


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.slow
def test_direct_scores_are_the_workers(cache: Path, several: bool) -> None:
    bench = Bench(PROBLEMS["digits-2"], cache, several=several)
    evaluator, space = bench.evaluator, bench.space
    assert evaluator._checked is not None  # it compares them on random merges, and raises
    genome = space.low + np.random.default_rng(5).random(space.dim) * (space.high - space.low)
    recipe = space.recipe(genome)
    for task in (Task(0, recipe.to_json()), Task(0, recipe.to_json(), items=7)):
        found, expected = evaluator._scored(task), evaluator._worker.evaluate(task)
        assert found is not None and set(found.scores) == set(expected.scores)
        for name, scores in expected.scores.items():
            np.testing.assert_allclose(found.scores[name].values, scores.values, rtol=1e-4, atol=1e-4)
    assert evaluator._scored(Task(0, recipe.to_json(), slopes=True)) is None
    bench.close()


def test_what_is_handed_on_is_the_best_of_the_front() -> None:
    losses = [[3.0, 1.0], [1.0, 4.0], None, [4.0, 4.0], [2.0, 2.0]]
    assert best_of_front(losses, np.array([1.0, 1.0])) == [0, 4, 1]
    assert best_of_front([None], np.array([1.0])) == []


def test_auto_beside_the_best() -> None:
    runs = [made([[4.0, 4.0], [2.0, 1.0]], who="x"), made([[3.0, 2.0]], who="auto"), made([[2.0, 1.0]], who="a@0.5+b")]
    table = auto_table(single_rows(runs, {"digits-2": ABOUT}))
    assert table.splitlines()[2] == "| digits-2 | 4 | 0.25 | x | 1.00 | 0.75 |"


@pytest.mark.slow
def test_runs_are_kept_and_repeat(cache: Path, tmp_path: Path) -> None:
    chosen = Choice("single", ["random", "no_such"], ["digits-2"], [12], 1, cache, tmp_path)
    carry_out(chosen)
    first = read(chosen.directory)
    files = {path: path.stat().st_mtime_ns for path in chosen.directory.glob("*/random-*.json")}
    carry_out(chosen)
    assert {path: path.stat().st_mtime_ns for path in files} == files and len(files) == 1
    refused, done = sorted(first, key=lambda run: "losses" in run)
    assert "no_such" in refused["refused"] and done["who"] == "random"
    assert len(done["losses"]) == 12 and len(done["test"]) == 1 and done["stopped"] is None
    bench = Bench(PROBLEMS["digits-2"], cache, several=False)
    again = bench.run({"name": "random", "options": {}}, 0, 12)
    other = bench.run({"name": "random", "options": {}}, 1, 12)
    bench.close()
    assert again.plain()["losses"] == done["losses"] != other.plain()["losses"]
    assert done["losses"][3] == pytest.approx(again.losses[3], rel=1e-6)
    assert "no_such on digits-2" in tables(tmp_path)


def test_kept_outcomes_are_what_was_measured(tmp_path: Path) -> None:
    kept = Outcomes(tmp_path / "kept.sqlite", "these items")
    scores = {
        "a": ItemScores(np.array([0.5, np.nan], dtype=np.float32), np.array([1, 3], dtype=np.float32)),
        "b": ItemScores(np.array([1.5], dtype=np.float32)),
    }
    slopes = np.arange(8, dtype=np.float64).reshape((2, 1, 2, 2))
    kept.put("f", Task(3, {}, slopes=True), Result(3, scores, seconds={"merge": 0.25}, slopes=slopes))
    kept.put("g", Task(4, {}), Result(4, failure=Failure("x", "y")))
    assert kept.get("f", Task(3, {})) is None and kept.get("g", Task(4, {})) is None
    found = kept.get("f", Task(9, {}, slopes=True))
    kept.close()
    assert found is not None and found.index == 9 and found.seconds == {"merge": 0.25}
    np.testing.assert_array_equal(found.scores["a"].values, scores["a"].values)
    np.testing.assert_array_equal(found.scores["a"].weights, scores["a"].weights)
    assert found.scores["b"].weights is None
    np.testing.assert_array_equal(found.slopes, slopes)
    elsewhere = Outcomes(tmp_path / "kept.sqlite", "other items")
    assert elsewhere.get("f", Task(9, {}, slopes=True)) is None
    elsewhere.close()


def test_scores_of_single_objective_runs() -> None:
    # Weighted sums of the anchors are 10, 8 and 9: the start is 8. The best known run reaches 4.
    runs = [made([[4.0, 4.0], None, [2.0, 2.0], [2.0, 1.0]]), made([[3.0, 2.0], [9.0, 9.0]], who="y")]
    first, second = single_rows([*runs, {"problem": "digits-2", "who": "z", "refused": "no"}], {"digits-2": ABOUT})
    assert baseline(ABOUT) == 8
    assert (first["loss"], first["score"], first["test"]) == (4, 1, 3)
    assert first["area"] == pytest.approx((0 + 0 + 0.5 + 1) / 4)  # 12 is worse than the start: not below 0
    assert second["score"] == second["area"] == pytest.approx(0.25)  # one that stops keeps what it has


def test_hypervolume_of_several_objectives() -> None:
    # The worst anchor is (4, 4). Both points together dominate 2·1 + 1·2 - 1·1 … of that box.
    runs = [made([[2.0, 3.0], None]), made([[3.0, 2.0], [5.0, 1.0]], who="y")]
    first, second = several_rows(runs, {"digits-2": ABOUT})
    assert first["hypervolume"] == second["hypervolume"] == 2
    assert first["score"] == pytest.approx(2 / 3) and (first["front"], second["front"]) == (1, 2)


def test_order_of_runs() -> None:
    order = list(wishes(Choice("single", ["a", "b"], budgets=[50, 200, 1000])))
    assert [wish.problem for wish in order[:4]] == ["digits-2", "digits-2", "digits-4", "digits-4"]
    assert len(set(order)) == len(order) == 2 * (9 * 3 + 3 * 2 + 3)
    assert {budget for _, budgets in STAGES for budget in budgets} == {50, 200, 1000}
    few = list(wishes(Choice("single", ["a"], ["smollm2"], [7], 2)))
    assert [(wish.problem, wish.seed, wish.budget) for wish in few] == [("smollm2", 0, 7), ("smollm2", 1, 7)]


def test_algorithms_as_on_the_command_line() -> None:
    assert algorithm_of("random", plain_sum=True) == {"name": "random", "options": {}}
    assert algorithm_of('cma_es:{"sigma0": 0.2}', plain_sum=True)["options"] == {"normalise": False, "sigma0": 0.2}
    assert algorithm_of("cma_es", plain_sum=False)["options"] == {}
    assert slug('cma_es:{"sigma0": 0.2}') == "cma_es_sigma0_0.2"
    assert set(single_objective.everyone()) == {"peer/pycma", "peer/ngopt", *ALGORITHMS}
    assert {"nsga2", "random", "cma_es"} < set(front.everyone())


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_jobs(name: str) -> None:
    problem = PROBLEMS[name]
    single = problem.spec(several=False, evaluations=5, algorithm={"name": "random"})
    several = problem.spec(several=True, evaluations=5, algorithm={"name": "nsga2"}, seed=3, split="test")
    assert len(single.experts) == len(problem.experts) and 2 <= len(several.objectives) <= 4
    assert {objective.data and objective.data.split for objective in several.objectives} == {
        "test"
    } and several.seed == 3


def test_records_of_cities() -> None:
    texts = dict(cities())
    assert len(texts) > 1000 and all(text.count(" | ") == 30 for text in list(texts.values())[:100])
    assert texts == dict(cities())
