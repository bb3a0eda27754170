"""Examples for the endpoint's OpenAPI document, made of the protocol's own models so that they cannot drift from them."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from optimizer.geometry import make_layout
from optimizer.problem import EvaluatorInfo, Grams, OperatorInfo
from workers.endpoint.protocol import (
    PROTOCOL,
    CandidateView,
    CostView,
    EvaluationView,
    LimitsView,
    MetricScores,
    ModelView,
    PartView,
    RepositoryView,
    RulesView,
    ScoringView,
    SessionView,
    SetView,
    UploadView,
    UsageView,
)

_METRICS = {"accuracy": "maximise", "loss": "minimise"}

SET = SetView.model_validate(
    {"name": "5e" * 32, "evaluator": "text_classification", "metrics": _METRICS, "items": 64, "digest": "5e" * 32}
)
REPOSITORY = RepositoryView(
    protocol=PROTOCOL,
    name="forty word adapters",
    base="base",
    models=[ModelView(name="base", id="a0" * 32), ModelView(name="german", id="a1" * 32)],
    detail="tensors",
    layout=make_layout([("layers.0.attention.query.weight", (384, 384), "F32")]),
    operators=[
        OperatorInfo(name="linear", summary="Averages the experts' weights.", reference="arXiv 2203.05482", high=1.0)
    ],
    sets=[SET.model_copy(update={"name": "language", "digest": "5d" * 32})],
    uploads=UploadView(
        evaluators=[
            EvaluatorInfo.model_validate(
                {"name": "text_classification", "summary": "Classifies texts.", "metrics": _METRICS, "columns": {}}
            )
        ],
        min_items=32,
        max_items=10_000,
        heads=[],
        heads_needed=[],
    ),
    scoring=ScoringView(scores="aggregate", decimals=4, min_items=32),
    rules=RulesView(max_share=0.95, plans=False, grams=False, max_numbers=100_000),
    limits=LimitsView(
        requests_per_minute=600,
        evaluations=10_000,
        items=None,
        in_flight=8,
        sessions=4,
        session_ttl_s=3600,
        body_bytes=16_777_216,
    ),
    usage=UsageView(evaluations=120, items=7680),
)
GRAMS = Grams.pack([0, 147_456], np.array([[[3.0, 2.5], [2.5, 3.5]]]))
SESSION = SessionView(
    id="pX3c9a52e1b04d68fQ0uZ1yT2vR7wK4b",
    expires_at=datetime(2026, 1, 15, 10, 30, tzinfo=UTC),
    sets=[SET],
    candidates=1,
)
CANDIDATE = CandidateView(fingerprint="c4" * 32)
EVALUATION = EvaluationView(
    id="4f" * 32,
    candidate="c4" * 32,
    state="done",
    parts=[
        PartView(
            set="language",
            digest="5d" * 32,
            items=64,
            scores={"accuracy": MetricScores(mean=0.7031), "loss": MetricScores(mean=0.8127)},
        )
    ],
    cost=CostView(items=64, tokens=512, seconds=0.41),
)
