"""Job specs and problems for tests: small, valid, and without any file behind them."""

from __future__ import annotations

import hashlib
from typing import Any

from optimizer.geometry import Layout, make_layout
from optimizer.problem import OperatorInfo, Problem, ResolvedObjective, TestItems
from optimizer.recipe import ModelId
from optimizer.spec import Direction, JobSpec, ModelRef, parse_spec

# Accuracy-like measures go up, all others down.
_MAXIMISED = ("accuracy", "f1")
_ITEMS = 20


def make_spec(**changes: Any) -> JobSpec:
    """Return a valid spec: task arithmetic of two experts, an objective to maximise and one to minimise.

    Args:
        changes: top-level fields of the spec to replace, as plain data or models.
    """
    data: dict[str, Any] = {
        "name": "two tasks",
        "base": {"path": "models/base"},
        "experts": [{"name": name, "path": f"models/{name}"} for name in ("language", "polarity")],
        "merge": {"operator": "task_arithmetic"},
        "objectives": [
            _objective("language", "accuracy", "maximise"),
            _objective("polarity", "loss", "minimise"),
        ],
        "algorithm": {"name": "random"},
        "budget": {"evaluations": 20},
        "seed": 1,
    }
    if "phases" in changes:
        del data["algorithm"]
    return parse_spec(data | changes)


def make_problem(spec: JobSpec, layers: int = 4) -> Problem:
    """Return a problem that fits ``spec``: ``layers`` layers of two tensors each, every model with its own digest."""
    assert spec.base is not None
    return Problem(
        models={"base": _model(spec.base)} | {expert.name: _model(expert) for expert in spec.experts},
        layout=make_small_layout(layers),
        operator=OperatorInfo(
            name=spec.merge.operator,
            summary="The base plus a weighted sum of task vectors.",
            reference="arXiv:2212.04089",
            varies=["density"] if spec.merge.operator in ("lora_factors", "prune") else [],
        ),
        objectives=[
            ResolvedObjective(
                name=objective.name,
                metric=objective.metric or "loss",
                direction=objective.direction or _direction(objective.metric),
                use=objective.use,
                weight=objective.weight,
                at_least=objective.constraint.at_least if objective.constraint else None,
                at_most=objective.constraint.at_most if objective.constraint else None,
                items=_ITEMS,
                test=TestItems(items=_ITEMS, data_digest=_digest(objective.test.path)) if objective.test else None,
                data_digest=_digest(objective.data.path if objective.data else objective.name),
            )
            for objective in spec.objectives
        ],
    )


def make_small_layout(layers: int = 4) -> Layout:
    """Return a layout of ``layers`` layers with an attention and an MLP matrix of shape (4, 4) each."""
    kinds = ("attention.query.weight", "mlp.up_proj.weight")
    return make_layout((f"layers.{layer}.{kind}", (4, 4), "F32") for layer in range(layers) for kind in kinds)


def _objective(name: str, metric: str, direction: Direction) -> dict[str, Any]:
    return {
        "name": name,
        "evaluator": "text_classification",
        "data": {"path": f"data/{name}.jsonl"},
        "metric": metric,
        "direction": direction,
        "head": name,
    }


def _direction(metric: str | None) -> Direction:
    return "maximise" if metric in _MAXIMISED else "minimise"


def _model(ref: ModelRef) -> ModelId:
    # An expert carries a name as well, which is no part of where the model is.
    return ModelId(ref=ModelRef(path=ref.path, hub=ref.hub, revision=ref.revision), digest=_digest(str(ref)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
