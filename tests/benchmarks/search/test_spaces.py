"""The benchmark of structured spaces runs, and says what it should."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.benchmarks.search import spaces


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> spaces.Study:
    return spaces.Study(tmp_path_factory.mktemp("study"), steps=5)


def test_every_comparison_has_its_cases() -> None:
    found = spaces.cases()
    assert len({case.label for case in found}) == len(found)
    assert [case.label for case in found if case.group == "actions"] == ["random", "nsga2", "cma_es", "rmm"]


@pytest.mark.parametrize("group", ["prune", "operators", "actions", "plans"])
@pytest.mark.slow
def test_searches_find_something(study: spaces.Study, group: str) -> None:
    case = next(case for case in reversed(spaces.cases()) if case.group == group)
    found = study.search(case, seed=0, evaluations=9)
    row = spaces._row(case, [found])
    assert len(found.curve) == len(row["curve"]) == 9
    assert found.curve == sorted(found.curve, reverse=True)
    assert math.isfinite(row["median test loss"]) and 0 <= row["median test accuracy"] <= 1
    assert group != "prune" or row["layers"] == [4]


@pytest.mark.slow
def test_repetitions_cost_nothing(study: spaces.Study) -> None:
    case = next(case for case in spaces.cases() if case.label.startswith("remove, average"))
    found = study.search(case, seed=0, evaluations=40)  # of six layers two can be removed in fifteen ways
    assert len(set(found.curve)) <= 15 and len(found.curve) == 40


def test_the_plot_draws(study: spaces.Study, tmp_path: Path) -> None:
    figure_of = pytest.importorskip("matplotlib.figure").Figure
    rows = [
        {"group": group, "case": group, "curve": [1.0, 0.5]} for group in ("prune", "operators", "actions", "plans")
    ]
    figure = figure_of()
    spaces.plot({"rows": rows}, figure)
    figure.savefig(tmp_path / "plot.svg")
    assert len(figure.axes) == 4
