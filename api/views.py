"""What the REST API answers with: one set of models for the store's queries, the routes, OpenAPI and the client."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from optimizer.ports import JobState, Origin, Request
from optimizer.problem import Finding, PlannedPhase
from optimizer.spec import Direction, Strict, Use

T = TypeVar("T")


class View(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="forbid")


class Page(View, Generic[T]):
    """One page of a list."""

    items: list[T]
    next_cursor: str | None = Field(default=None, description="Pass as `cursor` for the next page; null on the last.")


class ObjectiveView(View):
    """An axis of the front."""

    name: str
    evaluator: str
    metric: str | None = Field(
        default=None, description="Null until the job has been prepared, if left to the default."
    )
    direction: Direction | None = None
    use: Use = "objective"
    weight: float = 1.0


class Progress(View):
    """Counters of a job."""

    budget: int = Field(description="Evaluations it may spend.")
    proposed: int = Field(default=0, description="Candidates recorded, duplicates included.")
    completed: int = Field(default=0, description="Candidates with scores.")
    failed: int = Field(default=0, description="Candidates without a score.")
    duplicates: int = Field(default=0, description="Candidates that cost no evaluation.")
    front: int = Field(default=0, description="Candidates on the front.")
    elapsed_s: float = Field(default=0.0, description="Running time so far, in seconds.")
    cost: dict[str, float] = Field(
        default_factory=dict,
        description="What evaluations cost so far: items, tokens, requests, money; zeros left out.",
    )
    to_verify: int = Field(default=0, description="Candidates to measure anew on test items, once the search is over.")
    verified: int = Field(default=0, description="Those of them that have been.")


class JobSummary(View):
    """A job in a list."""

    id: str
    name: str
    state: JobState
    requested: Request = Field(description="What the user last asked for: run, pause or cancel.")
    reason: str | None = Field(default=None, description="Why it is in this state, where there is more to say.")
    algorithm: str
    operator: str
    objectives: list[ObjectiveView]
    progress: Progress
    best: list[float | None] = Field(description="Best value of each objective so far, null before the first.")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    cloned_from: str | None = None


class GroupView(View):
    """Rows of the coefficient heat map."""

    label: str


PhaseState = Literal["waiting", "under_way", "over"]


class PlannedPhaseView(View):
    """A phase of a job with everything settled."""

    algorithm: str
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the algorithm.")
    evaluations: int = Field(description="Evaluations it may spend; the last phase also what others left over.")
    patience: int | None = Field(
        default=None, description="Evaluations in a row without an improvement of the front that end it."
    )
    keep_experts: int | None = Field(default=None, description="How many experts it searches among; null for all.")
    why: str = Field(default="", description="Where mergeopt chose it: why.")

    @classmethod
    def of(cls, phase: PlannedPhase) -> PlannedPhaseView:
        """Make it from what the job's inputs say."""
        return PlannedPhaseView(
            algorithm=phase.algorithm.name,
            options=phase.algorithm.options,
            evaluations=phase.evaluations,
            patience=phase.patience,
            keep_experts=phase.keep_experts,
            why=phase.why,
        )


class PhaseView(PlannedPhaseView):
    """A phase of a job, and where it stands."""

    state: PhaseState


class JobView(JobSummary):
    """A job as its page shows it."""

    spec: dict[str, Any] = Field(description="The job spec as submitted, defaults filled in.")
    groups: list[GroupView] = Field(default_factory=list, description="Coefficient groups, once prepared.")
    columns: list[str] = Field(default_factory=list, description="Names of the coefficients in a group, once prepared.")
    variables: list[dict[str, Any]] = Field(
        default_factory=list, description="The genome's variables with their bounds."
    )
    parameters: int | None = Field(
        default=None, description="Numbers that are merged, once prepared: the length of the vector that ranges are of."
    )
    phases: list[PhaseView] = Field(
        default_factory=list, description="Who proposes candidates when, once prepared; what `auto` stands for."
    )
    findings: list[Finding] = Field(default_factory=list, description="The compatibility report.")


CandidateState = Literal["pending", "completed", "failed", "cancelled"]
VerificationState = Literal["waiting", "completed", "failed"]


class IntervalView(View):
    """A mean over items, and the interval in which it would probably lie on as many others."""

    value: float
    low: float = Field(description="Lower end of the 95 % bootstrap interval (BCa over items).")
    high: float = Field(description="Upper end.")
    items: int = Field(description="Number of items; 1 where only their mean is known, which has no interval.")


class VerificationView(View):
    """A candidate measured anew at the end of the search."""

    state: VerificationState
    search: dict[str, IntervalView] = Field(default_factory=dict, description="By objective, on all search items.")
    test: dict[str, IntervalView] = Field(
        default_factory=dict, description="By objective that has any, on test items, which the search never saw."
    )
    overfitted: list[str] = Field(
        default_factory=list,
        description=(
            "Objectives whose interval on the test items lies entirely on the worse side of that on the search items: the "
            "search has fitted its items, or the test items are harder (see how the baselines fare)."
        ),
    )
    failure: dict[str, str] | None = Field(default=None, description="`code` and `message` when it failed.")
    seconds: dict[str, float] = Field(default_factory=dict, description="What it took, by part.")
    finished_at: datetime | None = None


class CandidateSummary(View):
    """A candidate in a table or on a plot. A duplicate shows the outcome it shares."""

    index: int
    phase: int = Field(default=0, description="Number of the job's phase that it belongs to, from 0.")
    generation: int
    origin: Origin
    label: str | None = None
    partial: int | None = Field(
        default=None,
        description="How many items of each objective it was measured on; null for all. It joins no front then.",
    )
    stopped: bool = Field(
        default=False,
        description="Whether it was not measured on all because it was clear that it loses; its values are estimates.",
    )
    estimated: bool = Field(
        default=False,
        description="Whether its values are estimated from the anchor items, on which alone it was measured.",
    )
    state: CandidateState
    values: list[float] | None = Field(default=None, description="One for each objective, in the job's order.")
    errors: list[float] | None = Field(
        default=None, description="Standard errors of the values, where these are estimates."
    )
    violation: float = 0.0
    on_front: bool = False
    duplicate_of: int | None = None
    fingerprint: str
    failure: dict[str, str] | None = Field(default=None, description="`code` and `message` when it failed.")
    seconds: dict[str, float] = Field(default_factory=dict, description="What the evaluation took, by part.")
    cost: dict[str, float] = Field(
        default_factory=dict, description="What it cost: items, tokens, requests, money; zeros left out."
    )
    created_at: datetime
    finished_at: datetime | None = None
    verification: VerificationView | None = Field(
        default=None, description="What it came to when the search was over, where it was among the best or a baseline."
    )


class CandidateView(CandidateSummary):
    """One candidate, whole."""

    genome: list[float] | None
    recipe: dict[str, Any]
    parents: list[int]
    worker: str = ""
    items: dict[str, list[float]] = Field(default_factory=dict, description="Per-item scores by objective.")
    test_items: dict[str, list[float]] = Field(
        default_factory=dict, description="Per-item scores of test items by objective, once verified."
    )


class Point(View):
    """A candidate on the front's plot."""

    index: int
    values: list[float]
    errors: list[float] | None = Field(
        default=None, description="Standard errors of the values, where these are estimates."
    )
    on_front: bool
    label: str | None = None
    origin: Origin = "algorithm"
    phase: int = 0
    partial: int | None = Field(default=None, description="Items it was measured on, where not on all.")
    violation: float = 0.0
    verification: VerificationView | None = Field(default=None, description="Of the front and the baselines, if any.")


class FrontView(View):
    """The non-dominated candidates, and a sample of the others to draw behind them."""

    objectives: list[ObjectiveView]
    front: list[Point]
    baselines: list[Point] = Field(
        description=(
            "The base, each expert, the uniform merge, the user's own, and what algorithms gave a label (greedy soup); the "
            "first 1,000."
        )
    )
    dominated: list[Point] = Field(description="At most `limit` of the rest, evenly spread over the search.")
    partial: list[Point] = Field(
        default_factory=list,
        description="Candidates that were measured on some items only, at most `limit`; their values are estimates.",
    )
    total: int = Field(description="Candidates with scores, all told.")


class Progression(View):
    """Best value so far of each objective, and of their weighted mean, at each evaluated candidate where one improved."""

    objectives: list[ObjectiveView]
    index: list[int]
    best: list[list[float]] = Field(description="One row for each entry of `index`, one number for each objective.")
    loss: list[float] = Field(
        description="For each entry of `index` the lowest weighted mean of the objectives so far, maximised ones negated."
    )


class EventView(View):
    """Something that happened in a job."""

    id: int
    job_id: str
    type: str = Field(
        description="job.state, candidates.proposed, candidate.evaluated, candidate.verified, export.progress, …"
    )
    data: dict[str, Any]
    at: datetime


ExportState = Literal["queued", "running", "completed", "failed"]


class ExportOptions(Strict):
    """How an export is written."""

    tokenizer_from: str | None = Field(
        default=None,
        max_length=64,
        description=(
            "Model (`base` or an expert) whose tokenizer, chat template and generation config it gets; that of the head's "
            "expert by default, else the base."
        ),
    )
    as_adapter: int | None = Field(
        default=None, ge=1, le=65536, description="Write a LoRA adapter of this rank to the base, not a whole model."
    )
    overwrite: bool = Field(default=False, description="Replace an earlier export of the same candidate.")


class ExportView(View):
    """An export of a candidate to a checkpoint directory."""

    id: str
    job_id: str
    candidate: int
    head: str | None = Field(default=None, description="The expert whose head was written.")
    options: ExportOptions = Field(default=ExportOptions(), description="How it is written.")
    state: ExportState
    progress: float = Field(ge=0, le=1)
    path: str | None = Field(default=None, description="Where it is, once completed.")
    error: dict[str, str] | None = None
    created_at: datetime
    finished_at: datetime | None = None


class TokenView(View):
    """An access token; the secret itself is shown once, when it is made."""

    id: int
    name: str
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None


class ValidationView(View):
    """What a valid job spec comes to."""

    valid: Literal[True] = True
    spec: dict[str, Any] = Field(description="The job spec with its defaults filled in.")
    findings: list[Finding] = Field(description="The compatibility report.")
    variables: int = Field(description="Dimensions of the search space.")
    groups: list[str] = Field(description="Labels of the coefficient groups.")
    columns: list[str] = Field(description="Names of the coefficients in a group.")
    phases: list[PlannedPhaseView] = Field(
        default_factory=list, description="Who would propose candidates when; what `auto` would stand for."
    )
    estimate: dict[str, float] = Field(
        default_factory=dict,
        description=(
            "Most that all evaluations of the budget are thought to cost, without repeated requests and kept answers: "
            "items, tokens, requests, money; zeros left out."
        ),
    )


class QueuedView(View):
    """An enqueued candidate's place in the job's queue."""

    queued: int = Field(description="Number under which events report what became of it.")


class AlgorithmView(View):
    """A search algorithm that jobs may name."""

    name: str
    summary: str = Field(description="One sentence.")
    reference: str = Field(description="Paper or origin.")
    multi_objective: bool = Field(description="Whether it looks for a whole front rather than one weighted optimum.")
    needs_items: bool = Field(default=False, description="Whether it learns from the score of each item.")
    races: bool = Field(default=False, description="Whether candidates can be stopped early by `fitness.racing`.")
    options_schema: dict[str, Any] = Field(description="JSON schema of `algorithm.options`.")


class SpaceView(View):
    """A form of search space that jobs may name."""

    name: str
    summary: str = Field(description="One sentence.")
    reference: str = Field(description="Paper or origin.")
    options_schema: dict[str, Any] = Field(description="JSON schema of `merge.space.options`.")


class StatusView(View):
    """The service can answer."""

    status: Literal["ok"] = "ok"


class VersionView(View):
    """What is running."""

    version: str = Field(description="Version of mergeopt.", examples=["0.1.0"])
    api: str = Field(default="v1", description="Version of the REST API.")


class ErrorBody(View):
    """What went wrong."""

    code: str = Field(examples=["invalid_input"])
    message: str = Field(examples=["`low` must be below `high`"])
    field: str | None = Field(default=None, examples=["merge.bounds"])
    remedy: str | None = Field(default=None, examples=["swap them?"])
    problems: list[dict[str, str | None]] = Field(
        default_factory=list, description="All problems, when there are several."
    )


class ErrorView(View):
    """The one JSON error shape of every route."""

    error: ErrorBody
