"""The benchmark of Frank-Wolfe merging, small: that it runs, and what of it holds at any size."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.search import frank_wolfe


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frank_wolfe, "CACHE", tmp_path / "frank-wolfe")
    found = frank_wolfe.run(True)
    assert [row["strangers"] for row in found["pools"]] == [0, 2]
    for row in found["pools"]:
        assert set(row["searches"]) == set(frank_wolfe.QUICK)
        for entry in row["searches"].values():
            assert 0 < entry["accuracy"] <= 1 and entry["evaluations"] >= 10
    near, far = (
        [entry["cosine"] for entry in found["agreement"] if entry["h"] == h and entry["central"]] for h in (0.01, 0.4)
    )
    assert near[0] > 0.99 and near[0] > far[0], "derivatives by probes approach the exact ones"
