"""Evaluators that ask services, for tests: built over rows, with candidates as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimizer.parameter_space import MODEL, parameter_problem
from optimizer.recipe import Leaf, Recipe
from tests.workers.evaluators.cases import FIELD, Row, as_rows
from workers.evaluators.asking import AskingEvaluator
from workers.evaluators.base import EVALUATORS, Inputs
from workers.policy import Policy
from workers.services.sharing import Services

LOOPBACK = Policy(hosts=(), private_hosts=True)
QUICK = {"backoff_s": 0.01, "attempts": 3}
"""Limits with which faults take no time."""


def asking(
    name: str,
    rows: Sequence[Row],
    port: int,
    *,
    services: Services | None = None,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> AskingEvaluator:
    """Return an evaluator that may ask a server on loopback, with quick retries."""
    cls = EVALUATORS[name]
    assert issubclass(cls, AskingEvaluator)
    policy = Policy(hosts=(f"127.0.0.1:{port}",), private_hosts=True)
    options = {"limits": QUICK, **options}
    inputs = Inputs(as_rows(rows, columns), None, FIELD, policy, services=services or Services())  # type: ignore[arg-type]
    return cls(cls.Options.model_validate(options), inputs)


def candidate(**values: Any) -> Recipe:
    """Return a candidate of a job without checkpoints."""
    return Recipe(models=parameter_problem().models, root=Leaf(model=MODEL, values=values))
