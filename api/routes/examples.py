"""Examples for the OpenAPI document, made of the views themselves so that they cannot drift from them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from api.views import (
    CandidateSummary,
    CandidateView,
    EventView,
    ExportView,
    FrontView,
    GroupView,
    JobSummary,
    JobView,
    ObjectiveView,
    PhaseView,
    PlannedPhaseView,
    Point,
    Progress,
    Progression,
    ValidationView,
)
from optimizer.problem import Finding
from optimizer.spec import parse_spec


def _objective(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "evaluator": "text_classification",
        "data": {"path": f"data/{name}", "split": "search"},
        "metric": "loss",
        "head": name,
    }


SPEC: dict[str, Any] = {
    "name": "two word tasks",
    "base": "base",
    "experts": [
        {"name": "language", "path": "experts/language"},
        {"name": "polarity", "path": "experts/polarity"},
    ],
    "merge": {"operator": "task_arithmetic", "granularity": {"layers": "each"}, "bounds": {"low": -0.2, "high": 1.2}},
    "objectives": [_objective("language"), _objective("polarity")],
    "algorithm": {"name": "auto"},
    "budget": {"evaluations": 200},
    "seed": 1,
}

_JOB_ID = "7f3c9a52e1b04d68"
_AT = datetime(2026, 1, 15, 9, 30, tzinfo=UTC)
_DONE = datetime(2026, 1, 15, 9, 31, tzinfo=UTC)
_OBJECTIVES = [
    ObjectiveView(name=name, evaluator="text_classification", metric="loss", direction="minimise")
    for name in ("language", "polarity")
]
_PROGRESS = Progress(budget=200, proposed=24, completed=21, failed=1, duplicates=1, front=4, elapsed_s=31.5)
_FINDING = Finding(
    severity="info", model="polarity", message="1 tensor is kept as a head", tensors=["classifier.weight"]
)
_GROUPS = ["input", "layer 0", "layer 1"]
_COLUMNS = ["language", "polarity"]
_COEFFICIENTS = [[0.6, 0.4], [0.7, 0.2], [0.5, 0.5]]

_BASELINES = PlannedPhaseView(algorithm="baselines", evaluations=20, why="to know what the search has to beat")
_SEARCH = PlannedPhaseView(algorithm="nsga2", evaluations=180, why="there are two objectives and no slopes")

JOB_SUMMARY = JobSummary(
    id=_JOB_ID,
    name="two word tasks",
    state="running",
    requested="run",
    algorithm="auto",
    operator="task_arithmetic",
    objectives=_OBJECTIVES,
    progress=_PROGRESS,
    best=[0.61, 0.34],
    created_at=_AT,
    started_at=_AT,
)
JOB = JobView(
    **JOB_SUMMARY.model_dump(),
    spec=parse_spec(SPEC).model_dump(mode="json"),
    groups=[GroupView(label=label) for label in _GROUPS],
    columns=_COLUMNS,
    variables=[
        {"name": f"{column} @ {group}", "low": -0.2, "high": 1.2, "kind": "real", "choices": []}
        for group in _GROUPS
        for column in _COLUMNS
    ],
    parameters=22_713_216,
    phases=[
        PhaseView(**_BASELINES.model_dump(), state="over"),
        PhaseView(**_SEARCH.model_dump(), state="under_way"),
    ],
    findings=[_FINDING],
)
VALIDATION = ValidationView(
    spec=JOB.spec,
    findings=[_FINDING],
    variables=6,
    groups=_GROUPS,
    columns=_COLUMNS,
    phases=[_BASELINES, _SEARCH],
)

CANDIDATE_SUMMARY = CandidateSummary(
    index=17,
    phase=1,
    generation=2,
    origin="algorithm",
    state="completed",
    values=[0.63, 0.36],
    on_front=True,
    fingerprint="5e" * 32,
    seconds={"merge": 0.05, "evaluate": 0.7},
    created_at=_AT,
    finished_at=_DONE,
)
_LEAF = {"ref": {"path": "base"}, "digest": "0a" * 32}
CANDIDATE = CandidateView(
    **CANDIDATE_SUMMARY.model_dump(),
    genome=[number for row in _COEFFICIENTS for number in row],
    recipe={
        "format": 1,
        "models": {"base": _LEAF, **{name: _LEAF | {"ref": {"path": f"experts/{name}"}} for name in _COLUMNS}},
        "root": {
            "operator": "task_arithmetic",
            "options": {},
            "base": {"model": "base"},
            "inputs": [{"model": name} for name in _COLUMNS],
            "groups": [{"positions": ["input"]}, {"positions": [0]}, {"positions": [1]}],
            "coefficients": _COEFFICIENTS,
        },
    },
    parents=[5, 9],
    worker="worker-0",
    items={"language": [0.2, 1.1], "polarity": [0.4, 0.3]},
)
FRONT = FrontView(
    objectives=_OBJECTIVES,
    front=[Point(index=17, values=[0.63, 0.36], on_front=True, phase=1)],
    baselines=[Point(index=0, values=[1.4, 0.69], on_front=False, label="base", origin="warm_start")],
    dominated=[Point(index=12, values=[0.8, 0.41], on_front=False, phase=1)],
    partial=[Point(index=15, values=[0.7, 0.35], on_front=False, phase=1, partial=50)],
    total=21,
)
PROGRESSION = Progression(
    objectives=_OBJECTIVES, index=[0, 3, 17], best=[[1.4, 0.69], [0.8, 0.34], [0.63, 0.34]], loss=[1.05, 0.6, 0.52]
)
EVENT = EventView(
    id=42,
    job_id=_JOB_ID,
    type="candidate.evaluated",
    data={
        "index": 17,
        "state": "completed",
        "values": [0.63, 0.36],
        "on_front": True,
        "label": None,
        "partial": None,
        "progress": _PROGRESS.model_dump(),
    },
    at=_DONE,
)
EXPORT = ExportView(
    id="b81f6d0e2c9a4375", job_id=_JOB_ID, candidate=17, head="language", state="queued", progress=0, created_at=_AT
)
