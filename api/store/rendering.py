"""From rows to the views that the REST API answers with."""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import object_session

from api.store import lifecycle
from api.store.models import CandidateRow, ExportRow, JobRow, TokenRow
from api.views import (
    CandidateSummary,
    ExportOptions,
    ExportView,
    GroupView,
    JobSummary,
    JobView,
    ObjectiveView,
    PhaseState,
    PhaseView,
    PlannedPhaseView,
    Progress,
    TokenView,
    VerificationView,
)
from optimizer.problem import Problem
from optimizer.space import Variable, make_space
from optimizer.spec import JobSpec


def progress(job: JobRow) -> Progress:
    """Return a job's counters."""
    return Progress(
        budget=job.budget,
        proposed=job.proposed,
        completed=job.completed,
        failed=job.failed,
        duplicates=job.duplicates,
        front=job.front,
        elapsed_s=job.elapsed_s,
        cost=job.cost or {},
        to_verify=job.to_verify,
        verified=job.verified,
    )


def objectives(job: JobRow) -> list[ObjectiveView]:
    """Return a job's objectives."""
    return [ObjectiveView.model_validate(objective) for objective in job.objectives]


def job_summary(job: JobRow) -> JobSummary:
    """Return a job as lists show it."""
    return JobSummary(**_job_fields(job))


def job_view(job: JobRow) -> JobView:
    """Return a job as its page shows it; needs the row's session."""
    view = JobView(**_job_fields(job), spec=job.spec)
    if job.problem is not None:
        problem = Problem.model_validate(job.problem)
        space = make_space(JobSpec.model_validate(job.spec), problem)
        groups, columns = space.axes
        view.groups = [GroupView(label=label) for label in groups]
        view.columns = list(columns)
        view.variables = [_variable(variable) for variable in space.variables]
        view.parameters = sum(math.prod(tensor.shape) for tensor in problem.layout.shared)
        view.phases = _phases(job, problem)
        view.findings = problem.findings
    return view


def _phases(job: JobRow, problem: Problem) -> list[PhaseView]:
    session = object_session(job)
    last = select(CandidateRow.phase).where(CandidateRow.job_id == job.id).order_by(CandidateRow.index.desc()).limit(1)
    current = (session.scalar(last) if session and problem.phases else None) or 0
    out = []
    for number, phase in enumerate(problem.phases):
        state: PhaseState = "waiting" if number > current else "over"
        if number == current and job.state not in lifecycle.ENDED:
            state = "under_way"
        out.append(PhaseView(**PlannedPhaseView.of(phase).model_dump(), state=state))
    return out


def candidate_summary(row: CandidateRow, verification: VerificationView | None = None) -> CandidateSummary:
    """Return a candidate as tables show it."""
    return CandidateSummary(**candidate_fields(row), verification=verification)


def candidate_fields(row: CandidateRow) -> dict[str, Any]:
    """Return the fields of a candidate that tables and its own page share."""
    return {
        "index": row.index,
        "phase": row.phase,
        "generation": row.generation,
        "origin": row.origin,
        "label": row.label,
        "partial": row.items,
        "state": row.state,
        "values": row.values,
        "errors": row.errors,
        "stopped": row.stopped,
        "estimated": row.estimated,
        "violation": row.violation,
        "on_front": row.on_front,
        "duplicate_of": row.duplicate_of,
        "fingerprint": row.fingerprint,
        "failure": row.failure,
        "seconds": row.seconds,
        "cost": row.cost or {},
        "created_at": row.created_at,
        "finished_at": row.finished_at,
    }


def export_view(row: ExportRow) -> ExportView:
    """Return an export."""
    return ExportView(
        id=row.id,
        job_id=row.job_id,
        candidate=row.candidate,
        head=row.head,
        options=ExportOptions.model_validate(row.options or {}),
        state=row.state,
        progress=row.progress,
        path=row.path,
        error=row.error,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )


def token_view(row: TokenRow) -> TokenView:
    """Return a token, without anything secret."""
    return TokenView(
        id=row.id,
        name=row.name,
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
    )


def _job_fields(job: JobRow) -> dict[str, Any]:
    return {
        "id": job.id,
        "name": job.name,
        "state": job.state,
        "requested": job.requested,
        "reason": job.reason,
        "algorithm": job.algorithm,
        "operator": job.operator,
        "objectives": objectives(job),
        "progress": progress(job),
        "best": job.best,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "cloned_from": job.cloned_from,
    }


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "low": variable.low,
        "high": variable.high,
        "kind": variable.kind,
        "choices": list(variable.choices),
    }
