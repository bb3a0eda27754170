"""The benchmarks run; what they measure is judged by `make bench`, at full size on a quiet machine."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.store import measure


def test_the_store_benchmark_runs_at_a_small_size(tmp_path: Path) -> None:
    results = list(measure("SQLite", f"sqlite:///{tmp_path / 'small.db'}", 500))
    assert {"progression", "load"} <= {result.operation.split("(")[0].strip() for result in results}
    assert all(result.seconds > 0 for result in results)
