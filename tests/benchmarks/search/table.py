"""All runs of `single_objective` and `front` as tables in Markdown: `python -m tests.benchmarks.search.table [--out DIR]`.

Scores are comparable over problems: 0 is the best of what is there without a search (the base, an expert, the uniform
merge), 1 the best that any run at any budget found. The area is the mean of the best score so far over all evaluations of
the budget, not below 0. For several objectives, the hypervolume below the worst anchor of each objective, as a share of
that of all runs' points together.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.pareto import front_mask, hypervolume
from tests.benchmarks.search.common import RESULTS
from tests.benchmarks.search.problems import PROBLEMS
from tests.benchmarks.search.runs import read, read_anchors

Found = list[dict[str, Any]]
BASELINES = ("base", "uniform")


# --- one objective -------------------------------------------------------------------------------------------------


def single_rows(runs: Found, anchors: dict[str, dict[str, Any]]) -> Found:
    """Return a row for each run that went through: score, area, test loss, seconds."""
    done = [run for run in runs if "losses" in run]
    best = {problem: min(_sums(run, anchors).min() for run in _of(done, problem)) for problem in _problems(done)}
    rows = []
    for run in done:
        problem = run["problem"]
        start = baseline(anchors[problem])
        so_far = np.minimum.accumulate(_sums(run, anchors))
        so_far = np.append(so_far, np.full(run["budget"] - len(so_far), so_far[-1]))
        scores = (start - so_far) / max(start - best[problem], 1e-12)
        weights = np.array(anchors[problem]["weights"])
        rows.append(
            {name: run[name] for name in ("problem", "who", "seed", "budget", "proposing", "evaluating", "partial")}
            | {"loss": float(so_far[-1]), "score": float(scores[-1]), "area": float(scores.clip(min=0).mean())}
            | {"test": None if run["test"] is None else float(np.array(run["test"]) @ weights)}
        )
    return rows


def baseline(about: dict[str, Any]) -> float:
    """Return the least loss among the base, the experts and the uniform merge."""
    weights = np.array(about["weights"])
    names = [name for name in about["anchors"] if not name.startswith("task arithmetic")]
    found = [about["anchors"][name]["search"] for name in names]
    return min(float(np.array(losses) @ weights) for losses in found if losses is not None)


def _sums(run: dict[str, Any], anchors: dict[str, dict[str, Any]]) -> NDArray[np.float64]:
    weights = np.array(anchors[run["problem"]]["weights"])
    return np.array([np.inf if row is None else float(np.array(row) @ weights) for row in run["losses"]])


# --- several objectives --------------------------------------------------------------------------------------------


def several_rows(runs: Found, anchors: dict[str, dict[str, Any]]) -> Found:
    """Return a row for each run that went through: its hypervolume as a share of the best known, seconds."""
    done = [run for run in runs if "losses" in run]
    rows = []
    for problem in _problems(done):
        reference = worst(anchors[problem])
        mine = _of(done, problem)
        fronts = [_front(run) for run in mine]
        whole = hypervolume(_nondominated(np.vstack(fronts)), reference)
        for run, front in zip(mine, fronts, strict=True):
            volume = hypervolume(front, reference)
            rows.append(
                {name: run[name] for name in ("problem", "who", "seed", "budget", "proposing", "evaluating")}
                | {"hypervolume": volume, "score": volume / whole if whole else 0.0, "front": len(front)}
            )
    return rows


def worst(about: dict[str, Any]) -> NDArray[np.float64]:
    """Return the worst loss of the anchors in each objective, but no worse than the base's by more than its size.

    A stranger in the pool can be so bad that beside it every front looks the same.
    """
    found = [row["search"] for row in about["anchors"].values() if row["search"] is not None]
    base = np.array(about["anchors"]["base"]["search"])
    return np.asarray(np.minimum(np.array(found).max(axis=0), 2 * base), dtype=np.float64)


def _front(run: dict[str, Any]) -> NDArray[np.float64]:
    measured = [row for row in run["losses"] if row is not None]
    return _nondominated(np.array(measured, dtype=np.float64))


def _nondominated(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.unique(losses[front_mask(losses)], axis=0)


# --- tables --------------------------------------------------------------------------------------------------------


def single_tables(rows: Found) -> list[str]:
    """Return a table for each budget: score and area by algorithm and problem, best mean area first."""
    return _tables(
        rows, lambda row: row["area"], lambda group: f"{_mean(group, 'score'):.2f} / {_mean(group, 'area'):.2f}"
    )


def several_tables(rows: Found) -> list[str]:
    """Return a table for each budget: share of the hypervolume by algorithm and problem."""
    return _tables(rows, lambda row: row["score"], lambda group: f"{_mean(group, 'score'):.3f}")


def _tables(rows: Found, rank: Any, cell: Any) -> list[str]:
    out = []
    for budget in sorted({row["budget"] for row in rows}):
        mine = [row for row in rows if row["budget"] == budget]
        problems = [problem for problem in PROBLEMS if any(row["problem"] == problem for row in mine)]
        grouped: dict[str, dict[str, Found]] = defaultdict(lambda: defaultdict(list))
        for row in mine:
            grouped[row["who"]][row["problem"]].append(row)

        def mean(by_problem: dict[str, Found]) -> float:
            return float(np.mean([np.mean([rank(row) for row in group]) for group in by_problem.values()]))

        # who was not run everywhere cannot be compared by a mean
        order = sorted(grouped, key=lambda who: (-len(grouped[who]), -mean(grouped[who])))
        lines = [
            f"| {budget} evaluations | {' | '.join(problems)} | mean | s |",
            f"| --- |{' --- |' * (len(problems) + 2)}",
        ]
        for who in order:
            groups = grouped[who]
            cells = [cell(groups[problem]) if problem in groups else "–" for problem in problems]
            seconds = np.mean([row["proposing"] for group in groups.values() for row in group])
            lines.append(f"| {_name(who)} | {' | '.join(cells)} | {mean(groups):.2f} | {seconds:.1f} |")
        out.append("\n".join(lines))
    return out


def auto_table(rows: Found) -> str:
    """Return how far `auto` is behind the best of all algorithms and peers, problem by problem and budget by budget.

    Phases that only a benchmark tries are no algorithms and do not count as the best.
    """
    lines = ["| problem | evaluations | `auto` | best | | behind |", "| --- | --- | --- | --- | --- | --- |"]
    for problem in PROBLEMS:
        for budget in sorted({row["budget"] for row in rows if row["problem"] == problem}):
            mine = [
                row for row in rows if (row["problem"], row["budget"]) == (problem, budget) and "+" not in row["who"]
            ]
            scores = {who: _mean([row for row in mine if row["who"] == who], "score") for who in _whos(mine)}
            if "auto" not in scores:
                continue
            best = max(scores, key=lambda who: scores[who])
            cells = [problem, f"{budget:,}", f"{scores['auto']:.2f}", _name(best), f"{scores[best]:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {scores[best] - scores['auto']:.2f} |")
    return "\n".join(lines)


def _whos(rows: Found) -> list[str]:
    return list(dict.fromkeys(row["who"] for row in rows))


def final_table(rows: Found, anchors: dict[str, dict[str, Any]]) -> str:
    """Return the losses on the test items: what is there without a search, and each algorithm at its largest budget."""
    problems = [problem for problem in PROBLEMS if problem in anchors]
    lines = [f"| loss on test items | {' | '.join(problems)} |", f"| --- |{' --- |' * len(problems)}"]
    kinds = {"base": _anchor("base"), "best expert": _anchor("expert"), "uniform": _anchor("uniform")}
    for title, pick in (kinds | {"task arithmetic, tuned": _anchor("task")}).items():
        lines.append(f"| {title} | {' | '.join(f'{pick(anchors[problem]):.3f}' for problem in problems)} |")
    for who in sorted({row["who"] for row in rows}):
        cells = []
        for problem in problems:
            mine = [row for row in rows if (row["who"], row["problem"]) == (who, problem) and row["test"] is not None]
            most = max((row["budget"] for row in mine), default=0)
            mine = [row for row in mine if row["budget"] == most]
            cells.append(f"{_mean(mine, 'test'):.3f} ({most})" if mine else "–")
        lines.append(f"| {_name(who)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _anchor(kind: str) -> Any:
    def pick(about: dict[str, Any]) -> float:
        weights = np.array(about["weights"])

        def is_one(name: str) -> bool:
            if kind == "expert":
                return name not in BASELINES and not name.startswith("task arithmetic")
            return name.startswith("task arithmetic") if kind == "task" else name == kind

        found = [row for name, row in about["anchors"].items() if is_one(name) and row["search"] is not None]
        best = min(found, key=lambda row: float(np.array(row["search"]) @ weights))
        return float(np.array(best["test"]) @ weights)

    return pick


def refusals(runs: Found) -> str:
    """Return who could not be run, and why, each once."""
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for run in runs:
        if "losses" not in run:
            why = run["refused"] if "refused" in run else run["failed"]
            by_reason[run["who"], why].append(run["problem"])
    return "\n".join(
        f"- {_name(who)} on {', '.join(dict.fromkeys(where))}: {why}" for (who, why), where in by_reason.items()
    )


def tables(out: Path) -> str:
    """Return everything that was run below ``out`` as Markdown."""
    parts: list[str] = []
    single, several = out / "single_runs", out / "several_runs"
    if runs := read(single):
        rows = single_rows(runs, read_anchors(single))
        parts += ["## One objective: final score / area under the best so far", *single_tables(rows)]
        parts += ["## `auto` beside the best", auto_table(rows)]
        parts += [final_table(rows, read_anchors(single)), refusals(runs)]
    if runs := read(several):
        parts += [
            "## Several objectives: share of the hypervolume",
            *several_tables(several_rows(runs, read_anchors(several))),
        ]
        parts.append(refusals(runs))
    return "\n\n".join(part for part in parts if part) + "\n"


def _of(runs: Iterable[dict[str, Any]], problem: str) -> Found:
    return [run for run in runs if run["problem"] == problem]


def _problems(runs: Found) -> list[str]:
    return [problem for problem in PROBLEMS if any(run["problem"] == problem for run in runs)]


def _mean(group: Found, name: str) -> float:
    return round(float(np.mean([row[name] for row in group])), 4) + 0.0  # no -0.00


def _name(who: str) -> str:
    return who.removeprefix("peer/") + (" (peer)" if who.startswith("peer/") else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables to the standard output."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.search.table")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the figures")
    sys.stdout.write(tables(parser.parse_args(arguments).out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
