"""The engine's benchmark runs; what it measures is judged at full size on a quiet machine."""

from __future__ import annotations

import torch

from tests.benchmarks.engine import OPERATORS_MEASURED, measure


def test_it_measures_every_operator_at_a_small_size() -> None:
    results = list(measure(torch.float32, 3, 2 * 64**2, [1], side=64))
    assert [result.operator for result in results] == list(OPERATORS_MEASURED)
    assert all(result.seconds > 0 and result.copy_seconds > 0 and result.ratio > 0 for result in results)
    assert {result.target for result in results if result.operator in ("linear", "ties")} == {1.3, 3.0}
