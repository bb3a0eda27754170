"""What many coefficients cost: ``python -m tests.benchmarks.ranges [--json PATH]``.

One pass of task arithmetic over three random Llama experts, in one process, with 1, 10, 100 and 1,000 split points at
random places (which cut through tensors, as M2N2's do) and with one group of coefficients, one a layer and one a
parameter, as a ratio to the pass with a single coefficient a model. Each recipe is compiled anew every time, as in
a search. The pass over memory is the same for all; what a range costs besides is one more call of the operator. The
target is `TARGET` times the plain pass, and `RANGE_S` for each row.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from optimizer.recipe import Leaf, Merge, ModelId, Recipe, Selector
from optimizer.spec import ModelRef
from tests.benchmarks.checkpoints import random_llama
from workers.checkpoints import open_checkpoint
from workers.compatibility import inspect
from workers.merging.engine import MergeEngine

TARGET = 1.2
RANGE_S = 1e-4
_EXPERTS = ("one", "two", "three")
_REPEATS = 7


@dataclass(frozen=True)
class Measured:
    """One way to divide the parameters: rows of the table, the best of a few passes, and its ratio to one row's."""

    division: str
    rows: int
    seconds: float
    ratio: float

    @property
    def slow(self) -> bool:
        """Whether it misses the target."""
        return self.seconds > TARGET * self.seconds / self.ratio + RANGE_S * self.rows


def recipes(engine: MergeEngine) -> list[tuple[str, Recipe]]:
    """Return the recipes by what divides their parameters; the first has one row."""
    shared, layers = engine.layout.shared, range(engine.layout.layers)
    total = sum(int(np.prod(tensor.shape)) for tensor in shared)
    random = np.random.default_rng(5)
    groups: dict[str, Sequence[Selector]] = {
        "one group": [Selector()],
        "a group a layer": [Selector(positions=[layer]) for layer in layers] + [Selector()],
        "a group a parameter": [Selector(tensors=[tensor.name]) for tensor in shared],
    }
    found = [(name, _recipe(engine, len(rows), groups=list(rows))) for name, rows in groups.items()]
    for count in (1, 10, 100, 1000):
        breaks = sorted({int(number) for number in random.integers(1, total, count)})
        found.append((f"{count} split points", _recipe(engine, len(breaks) + 1, breaks=breaks)))
    return found


def measure(folder: Path, dtype: torch.dtype) -> list[Measured]:
    """Measure all divisions on the checkpoints of ``folder``, in turn, several times."""
    checkpoints = {name: open_checkpoint(folder / name, name) for name in ("base", *_EXPERTS)}
    layout, _ = inspect(checkpoints["base"], [checkpoints[name] for name in _EXPERTS], [])
    engine = MergeEngine(checkpoints, layout)
    targets = {tensor.name: torch.empty(tensor.shape, dtype=dtype) for tensor in layout.shared}
    cases = recipes(engine)
    best = dict.fromkeys((name for name, _ in cases), float("inf"))
    for _ in range(_REPEATS):
        for name, recipe in cases:
            again = recipe.model_copy()  # one that was not compiled yet
            began = time.perf_counter()
            engine.apply(again, targets)
            best[name] = min(best[name], time.perf_counter() - began)
    one = best[cases[0][0]]
    return [Measured(name, len(_rows(recipe)), best[name], best[name] / one) for name, recipe in cases]


def _recipe(
    engine: MergeEngine, rows: int, *, groups: list[Selector] | None = None, breaks: list[int] | None = None
) -> Recipe:
    table = np.random.default_rng(rows).uniform(0, 1, (rows, len(_EXPERTS)))
    root = Merge(
        operator="task_arithmetic",
        base=Leaf(model="base"),
        inputs=[Leaf(model=name) for name in _EXPERTS],
        groups=groups,
        breaks=breaks,
        coefficients=table.tolist(),
    )
    models = {name: ModelId(ref=ModelRef(path=name), digest="0" * 64) for name in engine.checkpoints}
    return Recipe(models=models, root=root)


def _rows(recipe: Recipe) -> list[list[float]]:
    assert isinstance(recipe.root, Merge)
    return recipe.root.coefficients


def main() -> int:
    """Measure, print a table, and return 1 if a division costs more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--hidden", type=int, default=1024, help="size of the models: 8 · layers · hidden² parameters")
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    console, table = Console(), Table("dtype", "division", "rows", "seconds", "ratio")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for seed, name in enumerate(("base", *_EXPERTS)):
                random_llama(folder / name, seed, layers=options.layers, hidden=options.hidden, dtype=dtype)
            for result in measure(folder, dtype):
                name = str(dtype).removeprefix("torch.")
                found.append({"dtype": name} | asdict(result) | {"slow": result.slow})
                mark = "[red]" if result.slow else ""
                table.add_row(
                    name, result.division, str(result.rows), f"{result.seconds:.4f}", f"{mark}{result.ratio:.2f}"
                )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(any(row["slow"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
