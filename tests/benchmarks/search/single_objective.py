"""Every single-objective search on five real merge problems: `python -m tests.benchmarks.search.single_objective`.

Beside mergeopt's algorithms run pycma and nevergrad's default as their users run them (`peers`). `--problems`,
`--algorithms`, `--budgets` and `--seeds` choose; a run that was interrupted goes on where it was. Writes
``single_objective.json`` and ``.svg``; `table` makes tables of all runs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.algorithms.base import ALGORITHMS
from tests.benchmarks.search.common import draw, save
from tests.benchmarks.search.problems import CACHE
from tests.benchmarks.search.runs import Choice, carry_out, choose, parser, quick, read, read_anchors
from tests.benchmarks.search.table import single_rows

NAME = "single_objective"
PEERS = ("peer/pycma", "peer/ngopt")


def run(small: bool, cache: Path = CACHE) -> dict[str, Any]:
    """Run the benchmark; a small one keeps nothing but the problem."""
    if not small:
        return measure(Choice("single", everyone(), cache=cache))
    with tempfile.TemporaryDirectory() as out:
        return measure(quick("single", cache, Path(out)))


def everyone() -> list[str]:
    """Return all algorithms and peers."""
    return [*PEERS, *ALGORITHMS]


def measure(choice: Choice) -> dict[str, Any]:
    """Carry out what is chosen and return the figures of all runs there are, also earlier ones."""
    carry_out(choice)
    runs, anchors = read(choice.directory), read_anchors(choice.directory)
    return {
        "problems": anchors,
        "runs": single_rows(runs, anchors),
        "refused": [run for run in runs if "losses" not in run],
    }


def plot(measured: dict[str, Any], figure: Any) -> None:
    """Draw the mean area of each algorithm over its problems, budget by budget."""
    axes = figure.subplots()
    rows = measured["runs"]
    budgets = sorted({row["budget"] for row in rows})
    means = {
        who: [_mean([row for row in rows if (row["who"], row["budget"]) == (who, budget)]) for budget in budgets]
        for who in sorted({row["who"] for row in rows})
    }
    for who, areas in sorted(means.items(), key=lambda item: -np.nanmean(item[1])):
        axes.plot(budgets, areas, marker="o", linestyle="--" if who.startswith("peer/") else "-", label=who)
    axes.set(xscale="log", xlabel="evaluations", ylabel="area under the best so far", title="five merge problems")
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))


def _mean(rows: list[dict[str, Any]]) -> float:
    by_problem: dict[str, list[float]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row["area"])
    return float(np.mean([np.mean(areas) for areas in by_problem.values()])) if rows else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    found = parser("single", NAME, everyone()).parse_args(arguments)
    began = time.perf_counter()
    measured = measure(choose(found))
    save(NAME, measured, found.out, time.perf_counter() - began, quick=found.quick)
    draw(NAME, measured, found.out, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
