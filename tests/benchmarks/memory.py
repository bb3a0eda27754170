"""How much memory of its own a merge takes: ``python -m tests.benchmarks.memory [--json PATH]``.

Random Llama checkpoints on disk, 2, 4, 8 and 16 experts, each pool in a fresh process. Measured is what the process holds
besides mapped files (``Anonymous`` in smaps_rollup), as the most at any time during three candidates, less what it
held before: the resident model is in it, the experts must not be. The target is a peak that does not depend on the
number of experts: at most one model and `SCRATCH`.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from optimizer.recipe import Leaf, Merge, ModelId, Recipe, Selector
from optimizer.spec import ModelRef
from tests.benchmarks.checkpoints import nbytes, random_llama
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.compatibility import inspect
from workers.merging.cache import Cache
from workers.merging.engine import MergeEngine

EXPERTS = (2, 4, 8, 16)
OPERATORS = ("linear", "task_arithmetic", "ties", "nested")
SCRATCH = 256 * 2**20
"""Bytes besides the model that a merge of these sizes may take: 50 MB for compiling kernels, blocks, a few tensors."""

_CANDIDATES = 3


@dataclass(frozen=True)
class Measured:
    """One pool's figures in bytes.

    Attributes:
        mapped: all checkpoints together, which are mapped files.
        model: the merged model, resident.
        peak: most memory of its own at any time, the model included.
    """

    operator: str
    experts: int
    mapped: int
    model: int
    peak: int

    @property
    def scratch(self) -> int:
        """What the merge takes besides the model."""
        return self.peak - self.model


class Peak:
    """The most memory of its own that this process holds while the block runs, less what it held before.

    Looked at every other millisecond; what comes and goes in less is missed.
    """

    def __enter__(self) -> Peak:
        self.bytes = 0
        # What was freed before would be taken anew, or given back, while the block runs.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._before = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous() - self._before)


def anonymous() -> int:
    """Return the bytes of this process's memory that are no pages of files."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("the system does not tell")


def recipe(checkpoints: dict[str, Checkpoint], operator: str, scale: float) -> Recipe:
    """A merge of all experts with one coefficient; ``nested`` adds to the base a part of what ties of them makes."""
    experts: list[Leaf | Merge] = [Leaf(model=name) for name in checkpoints if name != "base"]
    inner = Merge(
        operator="ties" if operator == "nested" else operator,
        base=Leaf(model="base"),
        inputs=experts,
        groups=[Selector()],
        coefficients=[[scale / len(experts)] * len(experts)],
    )
    outer = Merge(
        operator="task_arithmetic",
        base=Leaf(model="base"),
        inputs=[inner],
        groups=[Selector()],
        coefficients=[[0.7]],
    )
    unknown = ModelRef(path="x")
    return Recipe(
        models={name: ModelId(ref=unknown, digest=checkpoint.digest) for name, checkpoint in checkpoints.items()},
        root=outer if operator == "nested" else inner,
    )


def measure(folder: Path, operator: str, count: int, cache: Path | None = None) -> Measured:
    """Merge ``count`` experts of ``folder`` in this process.

    Args:
        folder: has checkpoints ``base``, ``0``, ``1``, …
        operator: one of `OPERATORS`.
        count: number of experts.
        cache: directory for what the operator prepares.
    """
    checkpoints = {name: open_checkpoint(folder / name, name) for name in ["base", *map(str, range(count))]}
    experts = [checkpoint for name, checkpoint in checkpoints.items() if name != "base"]
    layout, _ = inspect(checkpoints["base"], experts, [])
    engine = MergeEngine(checkpoints, layout, cache=Cache(cache))
    recipes = [recipe(checkpoints, operator, scale) for scale in (0.5, 1.0, 1.5)[:_CANDIDATES]]
    # Libraries allocate on their first use.
    engine.apply(recipes[0], {tensor.name: torch.zeros(tensor.shape) for tensor in layout.shared})
    with Peak() as peak:
        resident = {tensor.name: torch.zeros(tensor.shape) for tensor in layout.shared}
        for candidate in recipes:
            engine.apply(candidate, resident)
    size = nbytes(checkpoints)
    model = sum(tensor.nbytes for tensor in resident.values())
    return Measured(operator, count, size * len(checkpoints), model, peak.bytes)


def in_a_process(call: Callable[..., Measured], *arguments: object) -> Measured:
    """Return a function's result, computed in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def main() -> int:
    """Measure, print a table, and return 1 if a merge takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--hidden", type=int, default=1024, help="size of the models: 8 · layers · hidden² parameters")
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    console, table = Console(), Table("operator", "experts", "mapped MB", "model MB", "peak MB", "peak − model MB")
    results: list[Measured] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ["base", *map(str, range(max(EXPERTS)))]:
            seed = 0 if name == "base" else int(name) + 1
            random_llama(folder / name, seed, layers=options.layers, hidden=options.hidden)
        for operator in OPERATORS:
            for count in EXPERTS:
                found = in_a_process(measure, folder, operator, count, folder / "cache")
                results.append(found)
                numbers = (found.mapped, found.model, found.peak, found.scratch)
                table.add_row(operator, str(count), *(f"{number / 2**20:.0f}" for number in numbers))
    console.print(table)
    if options.json:
        rows = [asdict(result) | {"scratch": result.scratch} for result in results]
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(result.scratch > SCRATCH for result in results))


if __name__ == "__main__":
    sys.exit(main())
