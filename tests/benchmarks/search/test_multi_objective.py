"""The benchmark of multi-objective searches runs, and its most robust statements hold."""

from __future__ import annotations

import pytest

from tests.benchmarks.search.multi_objective import OURS, PEER, THEIR_STARTS, THEIRS, run


@pytest.mark.slow
def test_quick_run() -> None:
    measured = run(True)
    count = len(OURS) + PEER * len(THEIRS) * len(THEIR_STARTS)
    for rows in measured["volumes"].values():
        assert len(rows) == count
        for by_budget in rows.values():
            assert list(by_budget) == [str(budget) for budget in measured["budgets"]]
            for volumes in by_budget.values():
                assert len(volumes) == len(measured["seeds"])
                assert all(0 <= volume <= 1 for volume in volumes)
    medians = measured["medians"]
    for name in OURS[1:]:
        assert all(medians[name][budget] > medians["random"][budget] for budget in medians[name]), name
    assert set(measured["options"]) == set(OURS)
