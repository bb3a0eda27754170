"""Exports: queued by the API, claimed and reported by export workers."""

from __future__ import annotations

import secrets

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from api.store import events, lifecycle, rendering, verifications
from api.store.candidates import find_candidate
from api.store.columns import utc_now
from api.store.engine import Database, expiry
from api.store.models import CandidateRow, ExportRow, RecipeRow
from api.store.ports import DEFAULT_EXPORT, ExportTask
from api.views import ExportOptions, ExportState, ExportView
from optimizer.errors import Conflict, InvalidInput, LeaseLost, NotFound
from optimizer.spec import JobSpec


class Exports(Database):
    """Keeps the exports of candidates."""

    def create_export(
        self, job_id: str, candidate: int, head: str | None, options: ExportOptions = DEFAULT_EXPORT
    ) -> ExportView:
        """Queue an export of an evaluated candidate.

        Raises:
            NotFound: no such job or candidate.
            Conflict: the candidate has no scores.
            InvalidInput: ``head`` is no expert of the job, or ``options.tokenizer_from`` none of its models.
        """
        with self.write() as session:
            job = lifecycle.lock_job(session, job_id)
            if job is None:
                raise lifecycle.no_job(job_id)
            row = find_candidate(session, job_id, candidate)
            if row.state != "completed":
                raise Conflict(
                    f"candidate {candidate} is {row.state}", field="candidate", remedy="choose one that has scores"
                )
            experts = [expert["name"] for expert in job.spec["experts"]]
            if head is not None and head not in experts:
                raise InvalidInput(f"{head!r} is no expert", field="head", remedy=f"use one of: {', '.join(experts)}")
            if options.tokenizer_from not in (None, "base", *experts):
                raise InvalidInput(
                    f"{options.tokenizer_from!r} is no model of the job",
                    field="tokenizer_from",
                    remedy=f"use one of: base, {', '.join(experts)}",
                )
            export = ExportRow(
                id=secrets.token_hex(8),
                job_id=job_id,
                candidate=candidate,
                head=head,
                options=options.model_dump(mode="json", exclude_defaults=True) or None,
                state="queued",
                progress=0.0,
                created_at=utc_now(),
                lease_token=0,
            )
            session.add(export)
            _report(session, export)
            return rendering.export_view(export)

    def get_export(self, export_id: str) -> ExportView:
        """Return one export; raises `NotFound`."""
        with self.read() as session:
            export = session.get(ExportRow, export_id)
            if export is None:
                raise NotFound(f"there is no export {export_id!r}", field="export_id")
            return rendering.export_view(export)

    def list_exports(self, job_id: str) -> list[ExportView]:
        """Return a job's exports, newest first; raises `NotFound`."""
        with self.read() as session:
            lifecycle.find_job(session, job_id)
            query = select(ExportRow).where(ExportRow.job_id == job_id)
            rows = session.scalars(query.order_by(ExportRow.created_at.desc(), ExportRow.id.desc()))
            return [rendering.export_view(row) for row in rows]

    def claim_export(self, owner: str, ttl_s: float) -> ExportTask | None:
        """Take the oldest export that waits, or whose worker's claim expired; None if there is none."""
        with self.write() as session:
            now = self.now(session)
            export = session.scalar(
                select(ExportRow)
                .where(
                    or_(
                        ExportRow.state == "queued",
                        and_(ExportRow.state == "running", ExportRow.lease_expires_at <= now),
                    )
                )
                .order_by(ExportRow.created_at, ExportRow.id)
                .limit(1)
                .with_for_update(key_share=True, skip_locked=True)
            )
            if export is None:
                return None
            export.state = "running"
            export.progress = 0.0
            export.lease_owner = owner
            export.lease_token += 1
            export.lease_expires_at = expiry(now, ttl_s)
            task = _task(session, export)
            _report(session, export)
            return task

    def update_export(
        self,
        task: ExportTask,
        *,
        state: ExportState,
        progress: float,
        ttl_s: float,
        path: str | None = None,
        error: dict[str, str] | None = None,
    ) -> None:
        """Record progress and extend the claim; a state other than running gives it up.

        Raises:
            LeaseLost: another worker has it now, it is finished, or its job was deleted.
        """
        with self.write() as session:
            export = session.scalar(select(ExportRow).where(ExportRow.id == task.id).with_for_update(key_share=True))
            if export is None or export.state != "running" or export.lease_token != task.token:
                raise LeaseLost(f"export {task.id} is no longer this worker's")
            export.state, export.progress, export.path, export.error = state, progress, path, error
            if state == "running":
                export.lease_expires_at = expiry(self.now(session), ttl_s)
            else:
                export.lease_owner = export.lease_expires_at = None
                export.finished_at = utc_now() if state in ("completed", "failed") else None
            _report(session, export)


def _task(session: Session, export: ExportRow) -> ExportTask:
    job = lifecycle.find_job(session, export.job_id)
    candidate = find_candidate(session, export.job_id, export.candidate)
    recipe = session.get_one(RecipeRow, (export.job_id, export.candidate))
    names = [objective["name"] for objective in job.objectives]
    original = export.candidate if candidate.duplicate_of is None else candidate.duplicate_of
    return ExportTask(
        id=export.id,
        job_id=export.job_id,
        candidate=export.candidate,
        head=export.head,
        token=export.lease_token,
        recipe=recipe.recipe,
        spec=JobSpec.model_validate(job.spec),
        # Estimates on some of the items are not what a model card should say.
        scores=dict(zip(names, candidate.values or [], strict=True)) if _is_measured(candidate) else {},
        options=ExportOptions.model_validate(export.options or {}),
        verification=verifications.views(session, job.id, [original]).get(original),
    )


def _is_measured(candidate: CandidateRow) -> bool:
    return candidate.items is None and not candidate.estimated


def _report(session: Session, export: ExportRow) -> None:
    data = {
        "export_id": export.id,
        "candidate": export.candidate,
        "state": export.state,
        "progress": export.progress,
        "path": export.path,
    }
    events.append(session, export.job_id, ("export.progress", data))
