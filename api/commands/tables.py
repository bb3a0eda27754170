"""Views as Rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from api.views import (
    AlgorithmView,
    CandidateSummary,
    JobSummary,
    JobView,
    PhaseView,
    PlannedPhaseView,
    SpaceView,
    TokenView,
    ValidationView,
)
from optimizer.problem import EvaluatorInfo, Finding, GraderInfo, OperatorInfo

STATE_STYLES = {
    "queued": "yellow",
    "running": "cyan",
    "paused": "magenta",
    "completed": "green",
    "failed": "red",
    "cancelled": "dim",
}
_SEVERITY_STYLES = {"error": "red", "warning": "yellow", "info": "dim"}


def number(value: float | None) -> str:
    """Return a score for people."""
    return "–" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Return a time for people, as h:mm:ss."""
    return str(timedelta(seconds=int(seconds)))


def state(name: str) -> Text:
    """Return a state in its colour."""
    return Text(name, style=STATE_STYLES.get(name, ""))


def plain_table(*columns: str) -> Table:
    """Return an empty table without a box, whose first column is never broken: it holds what people copy."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=place == 0)
    return table


def spent(job: JobSummary) -> int:
    """Return the evaluations a job has spent."""
    return job.progress.completed + job.progress.failed


def jobs_table(jobs: Iterable[JobSummary]) -> Table:
    """Return a list of jobs."""
    table = plain_table("job", "state", "name", "spent", "front", "best", "algorithm", "created")
    for job in jobs:
        table.add_row(
            job.id,
            state(job.state),
            Text(job.name),
            f"{spent(job)}/{job.progress.budget}",
            str(job.progress.front),
            ", ".join(number(value) for value in job.best),
            job.algorithm,
            f"{job.created_at.astimezone():%Y-%m-%d %H:%M}",
        )
    return table


def job_panel(job: JobView, elapsed_s: float | None = None) -> RenderableType:
    """Return a job with its progress bar and its best value of each objective.

    Args:
        elapsed_s: running time, where it is known better than the job says.
    """
    title = Text.assemble((job.name, "bold"), f"  {job.id}  ", state(job.state))
    if job.reason:
        title.append(f"  {job.reason}", style="dim")
    progress = job.progress
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        ProgressBar(total=progress.budget, completed=min(spent(job), progress.budget), width=40),
        f"{spent(job)}/{progress.budget}",
        duration(progress.elapsed_s if elapsed_s is None else elapsed_s),
        f"front {progress.front}",
        f"failed {progress.failed}",
        f"duplicates {progress.duplicates}",
    )
    best = plain_table("objective", "metric", "direction", "best")
    for objective, value in zip(job.objectives, job.best, strict=True):
        best.add_row(objective.name, objective.metric or "default", objective.direction or "", number(value))
    return Group(title, bar, best)


def candidates_table(candidates: Iterable[CandidateSummary], objectives: Sequence[str]) -> Table:
    """Return candidates with a column for each objective."""
    table = plain_table("candidate", *objectives, "origin", "phase", "generation", "state")
    for candidate in candidates:
        values: Sequence[float | None] = candidate.values or [None] * len(objectives)
        table.add_row(
            str(candidate.index) + (f" ({candidate.label})" if candidate.label else ""),
            *(number(value) for value in values),
            candidate.origin,
            str(candidate.phase + 1),
            str(candidate.generation),
            candidate.state if candidate.partial is None else f"{candidate.state} on {candidate.partial} items",
        )
    return table


_PHASE_STYLES = {"waiting": "dim", "under_way": "cyan", "over": "green"}


def phases_table(phases: Sequence[PlannedPhaseView]) -> Table:
    """Return who proposes candidates when, and why where mergeopt chose."""
    table = plain_table("phase", "algorithm", "evaluations", "experts", "why")
    for number, phase in enumerate(phases, start=1):
        name = phase.algorithm + "".join(f" {key}={value}" for key, value in phase.options.items())
        style = _PHASE_STYLES[phase.state] if isinstance(phase, PhaseView) else ""
        experts = "all" if phase.keep_experts is None else str(phase.keep_experts)
        table.add_row(str(number), Text(name, style=style), str(phase.evaluations), experts, Text(phase.why))
    return table


def catalog_table(entries: Iterable[AlgorithmView | SpaceView | OperatorInfo | EvaluatorInfo | GraderInfo]) -> Table:
    """Return what jobs may name, with a sentence each."""
    table = plain_table("name", "what it does", "traits")
    for entry in entries:
        traits = []
        if isinstance(entry, AlgorithmView):
            traits = [
                *(["several objectives"] if entry.multi_objective else []),
                *(["per-item scores"] if entry.needs_items else []),
                *(["races"] if entry.races else []),
            ]
        table.add_row(entry.name, Text(entry.summary), ", ".join(traits))
    return table


def findings_table(findings: Iterable[Finding]) -> Table:
    """Return a compatibility report."""
    table = plain_table("severity", "model", "finding", "tensors")
    for finding in findings:
        table.add_row(
            Text(finding.severity, style=_SEVERITY_STYLES[finding.severity]),
            finding.model,
            Text(finding.message),
            ", ".join(finding.tensors[:3]) + (" …" if len(finding.tensors) > 3 else ""),
        )
    return table


def cost_text(cost: Mapping[str, float]) -> str:
    """Return a cost in words: ``1,200 requests, 340,000 tokens, 0.51 in money``."""
    names = {"requests": "requests", "tokens": "tokens", "money": "in money"}
    return ", ".join(f"{cost[part]:,.6g} {name}" for part, name in names.items() if cost.get(part))


def validation_panel(validation: ValidationView) -> RenderableType:
    """Return what a valid job spec comes to."""
    line = Text.assemble(("valid", "green"), f": {validation.variables} variables")
    if validation.groups:
        line.append(
            f", {len(validation.groups)} coefficient groups × {len(validation.columns)} ({', '.join(validation.columns)})"
        )
    parts: list[RenderableType] = [line]
    if any(validation.estimate.get(part) for part in ("requests", "money")):
        parts.append(Text(f"about {cost_text(validation.estimate)} at most"))
    if validation.phases:
        parts.append(phases_table(validation.phases))
    if validation.findings:
        parts.append(findings_table(validation.findings))
    return Group(*parts)


def tokens_table(tokens: Iterable[TokenView]) -> Table:
    """Return a list of access tokens."""
    table = plain_table("id", "name", "created", "expires", "last used")
    for token in tokens:
        times = [
            f"{at.astimezone():%Y-%m-%d %H:%M}" if at else "never"
            for at in (token.created_at, token.expires_at, token.last_used_at)
        ]
        table.add_row(str(token.id), Text(token.name), *times)
    return table
