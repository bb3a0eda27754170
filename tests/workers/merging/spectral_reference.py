"""The reference results of reference/make_spectral.py, and running an operator on the same models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.workers.merging import running
from workers.merging.operator import OPERATORS

DATA = Path(__file__).parent / "reference" / "data" / "spectral.safetensors"
COUNTS = (1, 2, 3, 5)
STAR_WEIGHTS = (0.5, 0.3, 0.4, 0.2, -0.1)


@cache
def data() -> dict[str, Tensor]:
    return load_file(DATA)


def parameters(case: str, count: int) -> Iterator[tuple[str, Tensor, list[Tensor], Tensor]]:
    """Yield name, base, the first ``count`` experts and the reference of every parameter that the case has."""
    for name, (base, experts) in model(count).items():
        if f"{case}/{count}/{name}" in data():
            yield name, base, list(experts), data()[f"{case}/{count}/{name}"]


def model(count: int) -> dict[str, tuple[Tensor, tuple[Tensor, ...]]]:
    names = [key.removeprefix("base/") for key in data() if key.startswith("base/")]
    return {
        name: (data()[f"base/{name}"], tuple(data()[f"expert{number}/{name}"] for number in range(count)))
        for name in names
    }


def compare(case: str, count: int, operator: str, options: dict[str, Any]) -> int:
    """Check every parameter of a case to 1e-10; returns how many differ from the base by more than 1e-3."""
    entry = OPERATORS[operator]
    row = STAR_WEIGHTS[:count] if entry.info.columns == "per_expert" else (1.0,)
    moved = 0
    for _, base, experts, wanted in parameters(case, count):
        found = running.merge(entry, [base, *experts], row, options=options, model=model(count))
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)
        moved += bool((wanted - base).abs().max() > 1e-3)
    return moved
