"""What the API and the export worker need from the store, beside the controller's `RunStore`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from api.views import (
    CandidateSummary,
    CandidateView,
    EventView,
    ExportOptions,
    ExportState,
    ExportView,
    FrontView,
    JobSummary,
    JobView,
    Page,
    Progression,
    TokenView,
    VerificationView,
)
from optimizer.ports import JobState, Request
from optimizer.recipe import ModelId
from optimizer.spec import CandidateInput, JobSpec, RaisedBudget

CandidateSort = Literal["index", "-index", "value", "-value"]


DEFAULT_EXPORT = ExportOptions()


@dataclass(frozen=True)
class ExportTask:
    """An export that a worker has claimed.

    Attributes:
        token: fencing token of the claim.
        recipe: of the candidate.
        spec: of the job.
        scores: the candidate's values by objective name; none where it was measured on some items only.
        verification: what it came to when the search was over, if it was verified.
    """

    id: str
    job_id: str
    candidate: int
    head: str | None
    token: int
    recipe: dict[str, Any]
    spec: JobSpec
    scores: dict[str, float]
    options: ExportOptions = DEFAULT_EXPORT
    verification: VerificationView | None = None


@dataclass(frozen=True)
class BestCandidates:
    """What another job can begin with.

    Attributes:
        models: of the job, by name; empty before it was prepared.
        recipes: of its best candidates by index, the best first.
        labels: of those that have one.
    """

    models: dict[str, ModelId]
    recipes: dict[int, dict[str, Any]]
    labels: dict[int, str]


class JobStore(Protocol):
    """Jobs as the API sees them.

    Unknown ids raise `NotFound`; what the state forbids raises `Conflict`; a database that cannot be used now raises
    `Unavailable`, from every method.
    """

    def create_job(
        self, spec: JobSpec, idempotency_key: str | None = None, cloned_from: str | None = None
    ) -> tuple[JobView, bool]:
        """Record a new job and return it with True; a key used before returns the earlier job with False.

        A key that was used with a different spec raises `Conflict`.
        """

    def list_jobs(
        self, *, state: JobState | None = None, name: str | None = None, cursor: str | None = None, limit: int = 50
    ) -> Page[JobSummary]:
        """Return jobs, newest first; ``name`` filters by substring. A malformed cursor raises `InvalidInput`."""

    def get_job(self, job_id: str) -> JobView:
        """Return one job."""

    def request(self, job_id: str, request: Request, budget: RaisedBudget | None = None) -> JobView:
        """Ask a job to run, pause or cancel; until that is carried out, a later request replaces it.

        A job that no controller holds (it waits, is paused, or its controller's lease expired) obeys at once.
        """

    def delete_job(self, job_id: str) -> None:
        """Delete a job that is not running, with all that belongs to it.

        One that was to pause or cancel counts as running only while its controller's lease is live.
        """

    def list_candidates(
        self,
        job_id: str,
        *,
        sort: CandidateSort = "index",
        objective: str | None = None,
        on_front: bool | None = None,
        partial: bool | None = None,
        state: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page[CandidateSummary]:
        """Return candidates; the sorts by value need an ``objective`` and leave out candidates without whole scores."""

    def get_candidate(self, job_id: str, index: int) -> CandidateView:
        """Return one candidate with its recipe and per-item scores."""

    def front(self, job_id: str, limit: int = 2000) -> FrontView:
        """Return the front, the baselines, and at most ``limit`` dominated and partially evaluated points each."""

    def progression(self, job_id: str) -> Progression:
        """Return the best-so-far curve of each objective."""

    def best(self, job_id: str, count: int) -> BestCandidates:
        """Return a job's models, and of the candidates on its front the ``count`` best by weighted mean of the losses."""

    def enqueue(self, job_id: str, candidate: CandidateInput) -> int:
        """Queue a candidate for a job that has not ended; return its number in the queue.

        Once the job has been prepared, a candidate that its search space does not have raises `InvalidInput`; before
        that, the controller rejects it with an event.
        """

    def events(self, job_id: str | None, after: int, limit: int = 500) -> list[EventView]:
        """Return events with an id above ``after``, oldest first; of all jobs when ``job_id`` is None."""

    def create_export(
        self, job_id: str, candidate: int, head: str | None, options: ExportOptions = DEFAULT_EXPORT
    ) -> ExportView:
        """Queue an export of an evaluated candidate; a failed or pending one raises `Conflict`."""

    def get_export(self, export_id: str) -> ExportView:
        """Return one export."""

    def list_exports(self, job_id: str) -> list[ExportView]:
        """Return a job's exports, newest first."""

    def claim_export(self, owner: str, ttl_s: float) -> ExportTask | None:
        """Take the oldest export that waits, or whose worker's claim expired."""

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
        """Record progress and extend the claim; raises `LeaseLost` if another worker has it now."""

    def create_token(self, name: str, ttl_s: float | None = None) -> tuple[TokenView, str]:
        """Make an access token; return it and its secret, of which only a hash is kept."""

    def check_token(self, secret: str) -> TokenView | None:
        """Return the token with this secret, or None if there is none or it has expired."""

    def list_tokens(self) -> list[TokenView]:
        """Return all tokens."""

    def delete_token(self, token_id: int) -> None:
        """Revoke a token."""

    def has_tokens(self) -> bool:
        """Whether any valid token exists."""

    def ping(self) -> None:
        """Raise `Unavailable` if the database cannot be reached or is not at the newest migration."""
