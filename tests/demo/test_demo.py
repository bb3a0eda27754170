"""The demo's parts, and the whole of it as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from api.demo.job import job_spec
from api.demo.report import Row, best_of, front_sample, verdict
from api.demo.scoring import GRID, baselines
from api.views import FrontView, ObjectiveView, Point
from optimizer.recipe import leaves
from tests.factories import make_problem
from workers.demo.tasks import make_tasks, write_split

NAMES = ("language", "polarity", "continent")


def test_splits_are_disjoint_the_same_every_time_and_big_enough() -> None:
    tasks = make_tasks(50, 100)
    assert tuple(task.name for task in tasks) == NAMES
    assert tasks == make_tasks(50, 100)
    for task in tasks:
        parts = [{text for text, _ in rows} for rows in (task.train, task.search, task.test)]
        assert len(parts[1]) == 50
        assert len(parts[2]) == 100
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert len(parts[0]) > 4000
        assert {label for _, label in task.test} <= set(task.labels)


def test_a_split_is_written_as_jsonl(tmp_path: Path) -> None:
    rows = (("wörter", "German"), ("words", "English"))
    write_split(tmp_path / "a" / "test.jsonl", rows)
    lines = (tmp_path / "a" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": text, "label": label} for text, label in rows]


def test_the_baselines_are_those_people_use() -> None:
    problem = make_problem(job_spec(make_tasks(50, 100)))
    found = {baseline.name: baseline.recipes for baseline in baselines(problem)}
    assert set(found) == {
        "base",
        *(f"expert {name}" for name in (*NAMES, "shuffled-labels", "too-hot")),
        "uniform soup",
        "task arithmetic, grid",
        "TIES, defaults",
    }
    assert len(found["task arithmetic, grid"]) == len(GRID)
    assert leaves(found["uniform soup"][0].root) == set(problem.models)


def front() -> FrontView:
    """A front of three candidates, and the experts as baselines with a loss of 1 on their own task."""
    objectives = [ObjectiveView(name=name, evaluator="text_classification") for name in NAMES]

    def point(index: int, values: list[float], label: str | None = None) -> Point:
        return Point(index=index, values=values, on_front=label is None, label=label)

    experts = [point(n, [1.0 if i == n else 2.0 for i in range(3)], name) for n, name in enumerate(NAMES)]
    members = [point(10, [1.1, 1.1, 1.6]), point(11, [1.3, 1.3, 1.3]), point(12, [1.0, 1.5, 1.5])]
    return FrontView(objectives=objectives, front=members, baselines=experts, dominated=[], total=6)


def test_the_best_are_chosen_on_search_data_and_judged_on_test_data(capsys: pytest.CaptureFixture[str]) -> None:
    view = front()
    assert set(front_sample(view, 8)) == {10, 11, 12}
    rows = [Row(f"#{index}", [0.5, 0.6, 0.7], index) for index in (10, 11, 12)]
    best = best_of(view, rows)
    assert (best["mean"].candidate, best["worst"].candidate) == (10, 11)
    experts = dict.fromkeys(NAMES, 0.8)
    console = Console()
    assert verdict(console, [Row("soup", [0.4, 0.5, 0.5])], best, experts)
    assert not verdict(console, [Row("soup", [0.5, 0.5, 0.9])], best, experts)
    assert "does not beat" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_whole_demo(tmp_path: Path) -> None:
    home = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "api", "demo", "--home", str(home)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((home / "result.json").read_text())
    assert set(result) == {"job_id", "baselines", "front", "best", "exported", "seconds"}
    assert set(result["exported"]) == set(NAMES)
    for path in result["exported"].values():
        assert (Path(path) / "model.safetensors").exists()
