"""The merge-and-score protocol, version 1: what a client and the owner of some models say to each other over HTTP.

The owner's server describes its models, merges what recipes say, and scores the merges; weights never leave it. The page
api/endpoint/README.md describes the protocol, api/endpoint/openapi.json is its OpenAPI document. Requests refuse unknown
fields; clients ignore fields of answers that they do not know, so that a server may say more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from optimizer.fitness.aggregate import ItemScores
from optimizer.geometry import Layout
from optimizer.problem import EvaluatorInfo, OperatorInfo
from optimizer.spec import Direction, Strict

PROTOCOL = 1
PREFIX = "/v1"
LONGEST_WAIT_S = 30.0
"""Longest time for which a request waits for an evaluation."""

Digest = r"^[0-9a-f]{64}$"
Detail = Literal["tensors", "layers"]
State = Literal["queued", "running", "done", "failed", "cancelled"]


class Answer(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


# --- the repository ---------------------------------------------------------------------------------------------------


class ModelView(Answer):
    """One of the owner's models."""

    name: str
    id: str = Field(
        pattern=Digest,
        description="Changes whenever the weights do, and says nothing else of them. Recipes carry it as `digest`.",
    )


class SetView(Answer):
    """Items that candidates can be evaluated on: a named set of the owner's, or one that was uploaded."""

    name: str = Field(description="The owner's name for it, or the digest of an uploaded set.")
    evaluator: str
    metrics: dict[str, Direction] = Field(description="Metric to its direction; the first is the default.")
    whole_only: list[str] = Field(
        default_factory=list, description="Metrics that only all items together have, not a part of them."
    )
    items: int = Field(ge=1, description="Number of items.")
    digest: str = Field(pattern=Digest, description="Changes whenever the items, the evaluator or its options do.")
    head: str | None = Field(default=None, description="Whose head the merged model has.")


class UploadView(Answer):
    """What query sets may be uploaded."""

    evaluators: list[EvaluatorInfo]
    min_items: int
    max_items: int
    heads: list[str] = Field(description="Models that have a head of their own, one of which a set may ask for.")
    heads_needed: list[str] = Field(description="Evaluators that need one of these heads.")


class ScoringView(Answer):
    """What answers hold."""

    scores: Literal["items", "aggregate"] = Field(description="A score for each item, or their mean only.")
    decimals: int | None = Field(description="Scores are rounded to so many decimals; null where they are not.")
    min_items: int = Field(description="Fewest items that an evaluation on a part of a set may have.")


class RulesView(Answer):
    """Which candidates the owner evaluates."""

    max_share: float = Field(
        description="Largest share of the coefficients that one expert may have; 1 where it may stand alone."
    )
    plans: bool = Field(description="Whether recipes may rearrange layers.")
    grams: bool = Field(description="Whether inner products of the models are given out.")
    max_numbers: int = Field(description="Most coefficients and options of a recipe, in all its tables.")


class LimitsView(Answer):
    """What one token may do."""

    requests_per_minute: int
    evaluations: int | None = Field(description="Evaluations of a candidate on a set, in all; null for any number.")
    items: int | None = Field(description="Items of all these evaluations; null for any number.")
    in_flight: int = Field(description="Evaluations under way at once.")
    sessions: int = Field(description="Sessions that are open at once.")
    session_ttl_s: float = Field(description="Seconds after its last use when a session ends.")
    body_bytes: int = Field(description="Largest request body.")


class UsageView(Answer):
    """What this token has used up of it."""

    evaluations: int
    items: int


class RepositoryView(Answer):
    """What the owner offers."""

    protocol: int = Field(description="Version of the protocol.")
    name: str
    base: str = Field(description="Name of the common ancestor, always `base`.")
    models: list[ModelView] = Field(description="The base and the experts.")
    detail: Detail = Field(
        description="`layers`: the layout has one entry for each layer and kind of module, not the parameters themselves."
    )
    layout: Layout
    operators: list[OperatorInfo] = Field(description="Operators that recipes may use, with their options.")
    sets: list[SetView] = Field(description="The owner's named sets.")
    uploads: UploadView | None = Field(description="Null where nothing may be uploaded.")
    scoring: ScoringView
    rules: RulesView
    limits: LimitsView
    usage: UsageView


# --- sessions ---------------------------------------------------------------------------------------------------------


class SetUpload(Strict):
    """A labelled query set."""

    evaluator: str = Field(description="How it is measured; one of those that the repository names.", max_length=100)
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the evaluator.")
    columns: dict[str, str] = Field(
        default_factory=dict,
        max_length=32,
        description="Which column plays which role, where the names differ from the evaluator's.",
    )
    head: str | None = Field(default=None, max_length=100, description="Whose head the merged model has.")
    rows: list[dict[str, Any]] = Field(
        min_length=1, description="The items.", examples=[[{"text": "Haus", "label": "German"}]]
    )


class SessionView(Answer):
    """A session: query sets and candidates of one client, kept for a while."""

    id: str
    expires_at: datetime = Field(description="When it ends, unless it is used before.")
    sets: list[SetView] = Field(description="Those that were uploaded.")
    candidates: int = Field(description="Number of materialised candidates.")


class CandidateUpload(Strict):
    """A candidate to materialise."""

    recipe: dict[str, Any] = Field(
        description="A recipe over the repository's models, as canonical JSON.",
        examples=[
            {
                "format": 1,
                "models": {
                    "base": {"ref": {"path": "base"}, "digest": "a0" * 32},
                    "german": {"ref": {"path": "german"}, "digest": "a1" * 32},
                },
                "root": {
                    "operator": "task_arithmetic",
                    "base": {"model": "base"},
                    "inputs": [{"model": "german"}],
                    "groups": [{"positions": [0, 1]}, {"positions": [2, 3]}],
                    "coefficients": [[0.4], [0.7]],
                },
            }
        ],
    )


class CandidateView(Answer):
    """A materialised candidate."""

    fingerprint: str = Field(
        pattern=Digest, description="SHA-256 of the canonical recipe: the same recipe has the same."
    )


# --- evaluations ------------------------------------------------------------------------------------------------------


class Part(Strict):
    """A set, or a part of one, to evaluate on."""

    set: str = Field(max_length=100, description="Name of a set of the owner's, or digest of an uploaded one.")
    items: list[int] | None = Field(
        default=None,
        min_length=1,
        description="Positions in the set, each once; all items by default.",
        examples=[[0, 1, 2]],
    )


class EvaluationRequest(Strict):
    """A candidate to evaluate on one or several sets, with one merge."""

    candidate: str = Field(pattern=Digest, description="Fingerprint of a candidate that was materialised.")
    parts: list[Part] = Field(
        min_length=1, max_length=64, description="What it is evaluated on.", examples=[[{"set": "language"}]]
    )


class MetricScores(Answer):
    """The scores of one metric.

    A score that is not finite (a loss that is NaN) is null.
    """

    mean: float | None = Field(description="Mean over the items, weighted where they have weights.")
    values: list[float | None] | None = Field(
        default=None, description="One for each item asked for, in that order; null where only means are given."
    )
    weights: list[float] | None = Field(default=None, description="What an item counts in the mean; null for the same.")


class CostView(Answer):
    """What an evaluation took."""

    items: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0


class PartView(Answer):
    """What came of one part."""

    set: str
    digest: str = Field(description="Of the set.")
    items: int = Field(description="Number of items.")
    scores: dict[str, MetricScores] = Field(description="By metric.")


class FailureView(Answer):
    """Why a candidate has no scores."""

    code: str
    message: str


class EvaluationView(Answer):
    """An evaluation, under way or over."""

    id: str = Field(pattern=Digest, description="The same for the same candidate and parts.")
    candidate: str
    state: State
    parts: list[PartView] | None = Field(default=None, description="In the order of the request; null unless done.")
    failure: FailureView | None = None
    cost: CostView = Field(description="Of what was computed for it; nothing for what had been computed before.")

    OVER: ClassVar[frozenset[str]] = frozenset({"done", "failed", "cancelled"})

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in self.OVER


# --- scores -----------------------------------------------------------------------------------------------------------


def write_scores(scores: ItemScores, keep_items: bool, decimals: int | None) -> MetricScores:
    """Return scores as they are sent.

    Args:
        scores: shape (items,).
        keep_items: whether each item's is sent, or their mean only.
        decimals: to which they are rounded, if they are. The mean is that of the unrounded ones.
    """
    mean = _sent(scores.mean(), decimals)
    if not keep_items:
        return MetricScores(mean=mean)
    weights = None if scores.weights is None else [float(weight) for weight in scores.weights]
    return MetricScores(mean=mean, values=[_sent(float(value), decimals) for value in scores.values], weights=weights)


def read_scores(scores: MetricScores) -> ItemScores:
    """Return scores that were sent; where only their mean was, it stands for all items together."""
    if scores.values is None:
        return ItemScores(_received([scores.mean]))
    weights = None if scores.weights is None else np.array(scores.weights, dtype=np.float32)
    return ItemScores(_received(scores.values), weights)


def _sent(value: float, decimals: int | None) -> float | None:
    if not math.isfinite(value):
        return None
    return value if decimals is None else round(value, decimals)


def _received(values: Sequence[float | None]) -> NDArray[np.float32]:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float32)
