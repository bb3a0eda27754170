"""The benchmarks of surrogate searches run at a small size."""

from __future__ import annotations

import pytest

from tests.benchmarks.search import map_front, surrogates


@pytest.mark.slow
def test_maps_front_comes_near_the_grids() -> None:
    measured = map_front.run(True)
    for problem in measured["problems"]:
        reached = problem["reached"]
        assert set(reached) == set(map_front.ALGORITHM_NAMES)
        for row in reached.values():
            assert len(row["median"]) == len(measured["budgets"])
            assert row["median"] == sorted(row["median"])
        assert reached["map"]["median"][-1] > 0.7
        assert sum(reached["map"]["median"]) > sum(reached["random"]["median"])


@pytest.mark.slow
def test_surrogates_are_measured() -> None:
    measured = surrogates.run(True)
    best = {(row["variables"], row["algorithm"]): row["median"][-1] for row in measured["quality"]}
    for dim in (5, 20):
        assert best[dim, "bayesian"] < best[dim, "random"] and best[dim, "map"] < best[dim, "random"]
    assert {row["algorithm"] for row in measured["times"]} == set(surrogates.SURROGATES)
    assert all(row["recall_s"] < row["ask_s"] for row in measured["replay"])
