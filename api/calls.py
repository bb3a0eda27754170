"""The REST API as functions: each returns the request to make and the type of the answer. Both clients share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from api.views import (
    AlgorithmView,
    CandidateState,
    CandidateSummary,
    CandidateView,
    EventView,
    ExportOptions,
    ExportView,
    FrontView,
    JobSummary,
    JobView,
    Page,
    Progression,
    QueuedView,
    SpaceView,
    StatusView,
    ValidationView,
    VersionView,
)
from optimizer.ports import JobState
from optimizer.problem import EvaluatorInfo, GraderInfo, OperatorInfo
from optimizer.spec import CandidateInput, JobSpec

if TYPE_CHECKING:  # the store's package loads SQLAlchemy, which a client has no need of
    from api.store.ports import CandidateSort

T = TypeVar("T")

PREFIX = "/api/v1"

SpecLike = JobSpec | Mapping[str, Any]
"""A job spec, or the plain data of one, which only the server checks."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and what it answers.

    Attributes:
        method: GET, POST or DELETE.
        path: below the API's prefix.
        answer: type of the JSON answer; ``type(None)`` for none.
        params: of the query; those that are None are left out.
        body: plain data, sent as JSON, or None.
        headers: beside the usual ones; those that are None are left out.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    answer: type[T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    headers: Mapping[str, str | None] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """Return the arguments of an httpx client's ``build_request``."""
        return {
            "method": self.method,
            "url": PREFIX + self.path,
            "params": {name: value for name, value in self.params.items() if value is not None},
            "json": self.body,
            "headers": {name: value for name, value in self.headers.items() if value is not None},
        }

    def parse(self, content: bytes) -> T:
        """Return the answer that ``content`` holds."""
        return TypeAdapter(self.answer).validate_json(content or b"null")

    def after(self, cursor: str | None) -> Call[T]:
        """Return the call for the page that begins at ``cursor``."""
        return replace(self, params={**self.params, "cursor": cursor})


def _job(job_id: str, rest: str = "") -> str:
    return f"/jobs/{quote(job_id, safe='')}{rest}"


def _plain(spec: SpecLike) -> Any:
    # What the user did not set is left to the server's defaults.
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, JobSpec) else dict(spec)


def submit(spec: SpecLike, *, idempotency_key: str | None = None) -> Call[JobView]:
    """Submit a job; with a key that was used before, the earlier job is returned."""
    return Call("POST", "/jobs", JobView, body=_plain(spec), headers={"Idempotency-Key": idempotency_key})


def validate(spec: SpecLike) -> Call[ValidationView]:
    """Check a job spec as a submission would, and record nothing."""
    return Call("POST", "/jobs/validate", ValidationView, body=_plain(spec))


def list_jobs(
    *, state: JobState | None = None, name: str | None = None, cursor: str | None = None, limit: int | None = None
) -> Call[Page[JobSummary]]:
    """Return a page of jobs, newest first."""
    return Call(
        "GET", "/jobs", Page[JobSummary], params={"state": state, "name": name, "cursor": cursor, "limit": limit}
    )


def get_job(job_id: str) -> Call[JobView]:
    """Return one job."""
    return Call("GET", _job(job_id), JobView)


def delete_job(job_id: str) -> Call[None]:
    """Delete a job that is not running, with all that belongs to it."""
    return Call("DELETE", _job(job_id), type(None))


def pause(job_id: str) -> Call[JobView]:
    """Ask a job to pause."""
    return Call("POST", _job(job_id, "/pause"), JobView)


def resume(job_id: str, budget: Mapping[str, float] | None = None) -> Call[JobView]:
    """Ask a paused job to go on; ``budget`` (`requests`, `tokens`, `money`) is what it may spend in all from now on."""
    return Call("POST", _job(job_id, "/resume"), JobView, body={"budget": dict(budget)} if budget else None)


def cancel(job_id: str) -> Call[JobView]:
    """Ask a job to end for good."""
    return Call("POST", _job(job_id, "/cancel"), JobView)


def clone(
    job_id: str, changes: Mapping[str, Any] | None = None, *, idempotency_key: str | None = None
) -> Call[JobView]:
    """Submit a job like another one, with changes merged deeply into its spec; null puts a field back to its default."""
    return Call(
        "POST",
        _job(job_id, "/clone"),
        JobView,
        body={"changes": dict(changes or {})},
        headers={"Idempotency-Key": idempotency_key},
    )


def list_candidates(
    job_id: str,
    *,
    sort: CandidateSort | None = None,
    objective: str | None = None,
    on_front: bool | None = None,
    partial: bool | None = None,
    state: CandidateState | None = None,
    cursor: str | None = None,
    limit: int | None = None,
) -> Call[Page[CandidateSummary]]:
    """Return a page of candidates; the sorts by value need an objective."""
    params = {
        "sort": sort, "objective": objective, "on_front": on_front, "partial": partial, "state": state,
        "cursor": cursor, "limit": limit,
    }  # fmt: skip
    return Call("GET", _job(job_id, "/candidates"), Page[CandidateSummary], params=params)


def get_candidate(job_id: str, index: int) -> Call[CandidateView]:
    """Return one candidate with its recipe and per-item scores."""
    return Call("GET", _job(job_id, f"/candidates/{index}"), CandidateView)


def enqueue(job_id: str, candidate: CandidateInput | Mapping[str, Any]) -> Call[QueuedView]:
    """Have a candidate of your own evaluated next."""
    body = candidate.model_dump(mode="json") if isinstance(candidate, CandidateInput) else dict(candidate)
    return Call("POST", _job(job_id, "/candidates"), QueuedView, body=body)


def front(job_id: str, *, limit: int | None = None) -> Call[FrontView]:
    """Return the Pareto front, the baselines, and at most ``limit`` dominated and partially evaluated candidates each."""
    return Call("GET", _job(job_id, "/front"), FrontView, params={"limit": limit})


def progression(job_id: str) -> Call[Progression]:
    """Return the best-so-far curve of each objective."""
    return Call("GET", _job(job_id, "/progression"), Progression)


def events(job_id: str | None = None, *, after: int = 0, limit: int | None = None) -> Call[list[EventView]]:
    """Return the events with an id above ``after`` that are there now, oldest first; of all jobs without a job."""
    return Call("GET", events_path(job_id), list[EventView], params={"follow": False, "after": after, "limit": limit})


def events_path(job_id: str | None) -> str:
    """Return the path of a job's event stream, or of everyone's."""
    return "/events" if job_id is None else _job(job_id, "/events")


def export(
    job_id: str,
    candidate: int,
    *,
    head: str | None = None,
    tokenizer_from: str | None = None,
    as_adapter: int | None = None,
    overwrite: bool = False,
) -> Call[ExportView]:
    """Write an evaluated candidate as a checkpoint or adapter, with an expert's head and a model's tokenizer."""
    options = ExportOptions(tokenizer_from=tokenizer_from, as_adapter=as_adapter, overwrite=overwrite)
    body = {"candidate": candidate, "head": head, **options.model_dump(exclude_defaults=True)}
    return Call("POST", _job(job_id, "/exports"), ExportView, body=body)


def list_exports(job_id: str) -> Call[list[ExportView]]:
    """Return a job's exports, newest first."""
    return Call("GET", _job(job_id, "/exports"), list[ExportView])


def get_export(export_id: str) -> Call[ExportView]:
    """Return one export."""
    return Call("GET", f"/exports/{quote(export_id, safe='')}", ExportView)


def algorithms() -> Call[list[AlgorithmView]]:
    """Return all search algorithms."""
    return Call("GET", "/algorithms", list[AlgorithmView])


def spaces() -> Call[list[SpaceView]]:
    """Return all search spaces of another form than a table of coefficients."""
    return Call("GET", "/spaces", list[SpaceView])


def operators() -> Call[list[OperatorInfo]]:
    """Return all merge operators."""
    return Call("GET", "/operators", list[OperatorInfo])


def evaluators() -> Call[list[EvaluatorInfo]]:
    """Return all evaluators."""
    return Call("GET", "/evaluators", list[EvaluatorInfo])


def graders() -> Call[list[GraderInfo]]:
    """Return all graders of generated answers."""
    return Call("GET", "/graders", list[GraderInfo])


def job_schema() -> Call[dict[str, Any]]:
    """Return the JSON schema of the job spec."""
    return Call("GET", "/schema/job", dict[str, Any])


def health() -> Call[StatusView]:
    """Return whether the process is alive."""
    return Call("GET", "/health", StatusView)


def ready() -> Call[StatusView]:
    """Return whether the service can do its work; raises `Unavailable` otherwise."""
    return Call("GET", "/ready", StatusView)


def server_version() -> Call[VersionView]:
    """Return the service's version."""
    return Call("GET", "/version", VersionView)
