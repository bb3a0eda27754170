"""Every multi-objective search on five real merge problems: `python -m tests.benchmarks.search.front`.

Measured is the hypervolume after each budget, beside pymoo's NSGA-II as its users run it, and beside searches that follow
one number. Options, files and resuming as in `single_objective`.
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
from tests.benchmarks.search.table import several_rows

NAME = "front"
PEERS = ("peer/pymoo", "peer/pymoo-20")
BESIDE = ("cma_es", "random", "m2n2")
"""Searches without several objectives, to compare with."""


def run(small: bool, cache: Path = CACHE) -> dict[str, Any]:
    """Run the benchmark; a small one keeps nothing but the problem."""
    if not small:
        return measure(Choice("several", everyone(), cache=cache))
    with tempfile.TemporaryDirectory() as out:
        return measure(quick("several", cache, Path(out)))


def everyone() -> list[str]:
    """Return all multi-objective algorithms, those to compare with, and peers."""
    return [*PEERS, *(name for name, cls in ALGORITHMS.items() if cls.multi_objective or name in BESIDE)]


def measure(choice: Choice) -> dict[str, Any]:
    """Carry out what is chosen and return the figures of all runs there are, also earlier ones."""
    carry_out(choice)
    runs, anchors = read(choice.directory), read_anchors(choice.directory)
    return {
        "problems": anchors,
        "runs": several_rows(runs, anchors),
        "refused": [run for run in runs if "losses" not in run],
    }


def plot(measured: dict[str, Any], figure: Any) -> None:
    """Draw the hypervolume of each algorithm after each budget, a panel for each problem."""
    rows = measured["runs"]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    panels = figure.subplots(1, max(1, len(problems)), squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        mine = [row for row in rows if row["problem"] == problem]
        for who in sorted({row["who"] for row in mine}):
            budgets = sorted({row["budget"] for row in mine if row["who"] == who})
            shares = [
                np.mean([row["score"] for row in mine if (row["who"], row["budget"]) == (who, budget)])
                for budget in budgets
            ]
            axes.plot(budgets, shares, marker="o", linestyle="--" if who.startswith("peer/") else "-", label=who)
        axes.set(xscale="log", xlabel="evaluations", title=problem)
    panels[0].set_ylabel("share of the best known hypervolume")
    panels[-1].legend(fontsize="x-small")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    found = parser("several", NAME, everyone()).parse_args(arguments)
    began = time.perf_counter()
    measured = measure(choose(found))
    save(NAME, measured, found.out, time.perf_counter() - began, quick=found.quick)
    draw(NAME, measured, found.out, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
