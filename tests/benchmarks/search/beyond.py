"""What hand-over between searches gains, and beginning with a finished job: `python -m tests.benchmarks.search.beyond`.

On the real merge problems that `single_objective` runs. *Phases*: each alone and in turn, at the same budget; the runs are
those of `single_objective`, by `--algorithms "A@0.5+B"`. *Warm starts*: a job with several objectives is run to its end;
then the job with one objective over the same models begins with nothing, or with the best of that one's front, as
`warm_starts.jobs` has it. Writes ``beyond.json`` and ``.svg``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.search.bench import Bench, Run
from tests.benchmarks.search.common import RESULTS, draw, save
from tests.benchmarks.search.problems import CACHE, PROBLEMS
from tests.benchmarks.search.runs import DIGITS, algorithm_of

NAME = "beyond"
EARLIER = "auto"
EARLIER_BUDGET = 200
BUDGET = 100
AT = (30, 50, 100)
SEARCHES = ("auto", "cma_es", "bayesian")


def warm_starts(
    problem: str, cache: Path, seeds: int, who: Sequence[str], earlier_budget: int, budget: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each new job: its least loss after some evaluations, from nothing and from an earlier job."""
    several, single = (Bench(PROBLEMS[problem], cache, several=kind) for kind in (True, False))
    try:
        for seed in range(seeds):
            first = several.run(algorithm_of(EARLIER, plain_sum=False), seed + 100, earlier_budget)
            for name in who:
                algorithm = algorithm_of(name, plain_sum=True)
                cold = single.run(algorithm, seed, budget)
                warm = single.run(algorithm, seed, budget, first.front)
                yield {
                    "problem": problem,
                    "who": name,
                    "seed": seed,
                    "handed on": len(first.front),
                    "from nothing": _curve(cold, single, budget),
                    "from a job": _curve(warm, single, budget),
                }
    finally:
        several.close()
        single.close()


def _curve(run: Run, bench: Bench, budget: int) -> list[float]:
    sums = [np.inf if row is None else float(np.array(row) @ bench.weights) for row in run.losses]
    so_far = np.minimum.accumulate(np.append(sums, np.full(budget - len(sums), np.inf)))
    return [round(float(value), 5) for value in so_far]


def measure(
    problems: Sequence[str], cache: Path, seeds: int, *, who: Sequence[str] = SEARCHES, small: bool = False
) -> dict[str, Any]:
    """Run it and return the figures."""
    budgets = (20, 20) if small else (EARLIER_BUDGET, BUDGET)
    rows = []
    for problem in problems:
        for row in warm_starts(problem, cache, seeds, who, *budgets):
            rows.append(row)
            _tell(row)
    return {"earlier": {"algorithm": EARLIER, "evaluations": budgets[0]}, "at": list(AT), "warm_starts": rows}


def _tell(row: dict[str, Any]) -> None:
    for how in ("from nothing", "from a job"):
        shown = ", ".join(f"{row[how][place - 1]:.4f}" for place in AT if place <= len(row[how]))
        sys.stderr.write(f"{row['problem']} {row['who']} seed {row['seed']} {how}: {shown}\n")


def plot(measured: dict[str, Any], figure: Any) -> None:
    """Draw the best so far, from nothing and from an earlier job, a panel for each problem."""
    rows = measured["warm_starts"]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    panels = figure.subplots(1, max(1, len(problems)), squeeze=False)[0]
    for axes, problem in zip(panels, problems, strict=True):
        for number, who in enumerate(dict.fromkeys(row["who"] for row in rows)):
            mine = [row for row in rows if (row["problem"], row["who"]) == (problem, who)]
            for how, line in (("from nothing", ":"), ("from a job", "-")):
                curves = np.array([row[how] for row in mine])
                axes.plot(
                    np.arange(1, curves.shape[1] + 1), curves.mean(axis=0), f"C{number}{line}", label=f"{who}, {how}"
                )
        axes.set(xlabel="evaluations", title=problem)
    panels[0].set_ylabel("least loss so far")
    panels[-1].legend(fontsize="x-small")


def run(small: bool, cache: Path = CACHE) -> dict[str, Any]:
    """Run the benchmark; a small one on two digits experts."""
    return measure(["digits-2"] if small else DIGITS, cache, 1 if small else 3, small=small)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.search.{NAME}")
    parser.add_argument("--quick", action="store_true", help="one problem and few evaluations")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(DIGITS))
    parser.add_argument("--algorithms", nargs="+", dest="who", default=list(SEARCHES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory of the problems")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the figures")
    found = parser.parse_args(arguments)
    began = time.perf_counter()
    if found.quick:
        measured = run(True, found.cache)
    else:
        measured = measure(found.problems, found.cache, found.seeds, who=found.who)
    save(NAME, measured, found.out, time.perf_counter() - began, quick=found.quick)
    draw(NAME, measured, found.out, plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
