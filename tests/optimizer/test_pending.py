"""Proposals that are found again by their genome."""

from __future__ import annotations

import numpy as np

from optimizer.pending import Pending
from tests.optimizer.algorithms.driving import reals


def pending(*rows: list[float]) -> Pending[str]:
    out: Pending[str] = Pending(reals(2))
    for number, row in enumerate(rows):
        out.add(np.array(row), f"number {number}")
    return out


def test_found_in_any_order_up_to_the_last_bits() -> None:
    out = pending([0.0, 0.1], [0.5, 0.5], [1.0, 0.0])
    assert out.pop(np.nextafter(np.array([1.0, 0.0]), 2.0)) == "number 2"
    assert out.pop(np.array([0.0, 0.1])) == "number 0"
    assert out.pop(np.array([0.5, 0.5])) == "number 1"
    assert out.pop(np.array([0.5, 0.5])) is None


def test_equal_genomes_are_found_oldest_first() -> None:
    out = pending([0.0, 0.1], [0.5, 0.5], [0.5, 0.5 + 1e-12])
    assert out.pop(np.array([0.5, 0.5 + 1e-12])) == "number 1"
    assert out.pop(np.array([0.5, 0.5])) == "number 2"


def test_what_was_evaluated_instead_stands_for_the_nearest() -> None:
    out = pending([0.0, 0.1], [0.5, 0.5])
    assert out.pop(np.array([0.1, 0.1])) is None
    assert len(out) == 1
    assert out.pop(np.array([0.5, 0.5])) == "number 1"
