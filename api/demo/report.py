"""The demo's final table: what the search found beside what people merge by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from api.views import FrontView


@dataclass(frozen=True)
class Row:
    """Test scores of one model.

    Attributes:
        name: what it is.
        scores: accuracy for each task.
        candidate: its number in the job, for the search's own.
    """

    name: str
    scores: Sequence[float]
    candidate: int | None = None

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks."""
        return float(np.mean(self.scores))

    @property
    def worst(self) -> float:
        """Lowest accuracy of all tasks."""
        return min(self.scores)

    def normalised(self, experts: Mapping[str, float]) -> list[float]:
        """Return each score divided by that of the task's own expert."""
        return [score / expert for score, expert in zip(self.scores, experts.values(), strict=True)]

    def as_json(self, tasks: Sequence[str], experts: Mapping[str, float]) -> dict[str, Any]:
        """Return the row as it stands in ``result.json``."""
        normalised = self.normalised(experts)
        return {
            "candidate": self.candidate,
            "scores": dict(zip(tasks, self.scores, strict=True)),
            "mean": self.mean,
            "worst": self.worst,
            "normalised_mean": float(np.mean(normalised)),
            "normalised_worst": min(normalised),
        }


def _relative(front: FrontView) -> dict[int, np.ndarray[Any, np.dtype[np.float64]]]:
    """Search losses of each front member relative to those of the task's own expert, by candidate."""
    baselines = {point.label: point.values for point in front.baselines}
    experts = np.array([baselines[objective.name][n] for n, objective in enumerate(front.objectives)])
    return {point.index: np.array(point.values) / experts for point in front.front}


def front_sample(front: FrontView, count: int) -> list[int]:
    """Return candidates of the front to show: the best by mean and by worst task on search data, then evenly spread ones."""
    relative = _relative(front)
    values = {point.index: np.array(point.values) for point in front.front}
    chosen = [min(values, key=lambda i: values[i].mean()), min(relative, key=lambda i: relative[i].max())]
    rest = sorted((index for index in values if index not in chosen), key=lambda i: values[i].mean())
    places = np.linspace(0, len(rest) - 1, min(len(rest), count)).round().astype(int)
    return list(dict.fromkeys(chosen + [rest[place] for place in places]))


def best_of(front: FrontView, rows: Sequence[Row]) -> dict[str, Row]:
    """Return the rows that are best by mean and by worst task, chosen on search data alone."""
    by_candidate = {row.candidate: row for row in rows}
    relative = _relative(front)
    values = {point.index: np.array(point.values) for point in front.front}
    return {
        "mean": by_candidate[min(values, key=lambda i: values[i].mean())],
        "worst": by_candidate[min(relative, key=lambda i: relative[i].max())],
    }


def print_table(
    console: Console,
    experts: Mapping[str, float],
    baselines: Sequence[Row],
    front: Sequence[Row],
    best: Mapping[str, Row],
) -> None:
    """Print accuracies on the test split, each also as a share of what the task's own expert reaches."""
    table = Table(
        title="Accuracy on unseen test data, and its share of what the task's expert reaches",
        box=None,  # it has to fit 80 columns
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for name in (*experts, "mean", "worst task"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in baselines:
        table.add_row(*_cells(row.name, row, experts))
    table.add_row()
    marked = {id(best["mean"]): "best by mean", id(best["worst"]): "best by worst task"}
    if best["mean"] is best["worst"]:
        marked = {id(best["mean"]): "best by both"}
    for row in sorted(front, key=lambda row: id(row) not in marked):
        name = f"{marked.get(id(row), 'front')} #{row.candidate}"
        table.add_row(*_cells(name, row, experts), style="bold green" if id(row) in marked else None)
    console.print(table)


def verdict(
    console: Console,
    baselines: Sequence[Row],
    best: Mapping[str, Row],
    experts: Mapping[str, float],
) -> bool:
    """Say whether the search beats every baseline by mean and by worst task on test data."""
    mean = max(baselines, key=lambda row: row.mean)
    worst = max(baselines, key=lambda row: min(row.normalised(experts)))
    ours, theirs = min(best["worst"].normalised(experts)), min(worst.normalised(experts))
    console.print(f"By mean: {best['mean'].mean:.4f} against {mean.mean:.4f} ({mean.name})")
    console.print(f"By worst task, relative to its expert: {ours:.4f} against {theirs:.4f} ({worst.name})")
    won = best["mean"].mean > mean.mean and ours > theirs
    if not won:
        console.print("[red]The search does not beat every baseline here.[/red]")
    return won


def _cells(name: str, row: Row, experts: Mapping[str, float]) -> list[str]:
    normalised = row.normalised(experts)
    pairs = [*zip(row.scores, normalised, strict=True), (row.mean, np.mean(normalised)), (row.worst, min(normalised))]
    return [name, *(f"{score:.3f} {part:4.0%}" for score, part in pairs)]
