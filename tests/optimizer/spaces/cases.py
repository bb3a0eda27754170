"""Search spaces over tiny real checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from optimizer.geometry import Layout
from optimizer.problem import Problem
from optimizer.space import SPACES, JobSpace, make_space, named_operators
from optimizer.spec import JobSpec
from tests.factories import make_problem, make_spec
from tests.workers.merging.deep_models import save
from tests.workers.models import model_ids, open_models
from workers.checkpoints import Checkpoint
from workers.merging.engine import MergeEngine
from workers.merging.operator import operator_info

HEADS = ["classifier.*", "*pooler.*"]


@dataclass(frozen=True)
class Case:
    """A kind of space with options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.options.values()), *map(str, self.merge.values())])[:60]

    def spec(self, experts: tuple[str, ...] = ("one", "two")) -> JobSpec:
        merge = {"space": {"name": self.name, "options": self.options}, **self.merge}
        return make_spec(
            experts=[{"name": name, "path": name} for name in experts],
            merge=merge,
            objectives=[{"name": "o", "evaluator": "causal_lm", "data": {"path": "d"}, "metric": "loss"}],
        )


CASES = [
    *(Case(name) for name in SPACES),
    Case("operators", {}, {"granularity": {"layers": "groups", "group_size": 2, "modules": [["attention"], ["mlp"]]}}),
    Case(
        "operators",
        {
            "operators": [
                "task_arithmetic",
                {"operator": "ties", "options": {"normalise": {"choices": ["mean", "sum"]}, "density": 0.5}},
                {
                    "operator": "ties",
                    "options": {"density": {"low": 0.1, "high": 0.9}},
                    "bounds": {"low": -1, "high": 1},
                },
                {"operator": "iso_c"},
                {"operator": "slerp", "coefficients": "one"},
            ]
        },
        {"granularity": {"layers": "whole"}, "frozen": ["embeddings"]},
    ),
    Case("prune", {"blocks": "remove", "layers": 2, "source": "average"}),
    Case("prune", {"blocks": "select", "share": 0.5, "source": "one", "output_scales": True}),
    Case("prune", {"layers": 4, "output_scales": True}),
    Case("data_flow", {"models": ["base", "one"], "repeats": 1, "inputs": "layers", "outside": "linear"}),
    Case("data_flow", {"repeats": 2, "inputs": "none", "most_layers": 3, "outside": "average"}),
    Case("blocks", {"ordered": False, "output_scales": False, "most_layers": 4, "outside": "base"}),
    Case("blocks", {"fixed_layers": 1, "models": ["base", "two", "one"]}),
    Case("layer_swap", {"borders": 1, "blend": 1, "outside": "linear"}, {"frozen": ["norm"]}),
    Case("layer_swap", {"borders": 5, "models": ["one", "two"]}),
    Case("actions", {"steps": 3, "most_layers": 2, "models": ["two"]}),
    Case("actions", {"merged": [{"operator": "slerp"}, {"operator": "ties", "options": {"density": 0.3}}]}),
]


@cache
def models(model_type: str) -> tuple[dict[str, Checkpoint], Layout, MergeEngine]:
    """A base and the experts `one` and `two`, with the engine over them."""
    root = Path(mkdtemp(prefix="mergeopt-spaces-"))
    paths = {name: save(model_type, root / name, seed) for seed, name in enumerate(("base", "one", "two"))}
    base = paths.pop("base")
    checkpoints, layout = open_models(base, paths, HEADS)
    return checkpoints, layout, MergeEngine(checkpoints, layout)


def real_problem(case: Case, model_type: str = "llama", experts: tuple[str, ...] = ("one", "two")) -> Problem:
    """The case's problem over real checkpoints."""
    checkpoints, layout, _ = models(model_type)
    used = {name: checkpoints[name] for name in ("base", *experts)}
    spec = case.spec(experts)
    operators = {name: operator_info(name) for name, _ in named_operators(spec)}
    changes = {"models": model_ids(used), "layout": layout, "operators": operators}
    return make_problem(spec).model_copy(update=changes)


def real_space(case: Case, model_type: str = "llama", experts: tuple[str, ...] = ("one", "two")) -> JobSpace:
    """The case's space over real checkpoints."""
    return make_space(case.spec(experts), real_problem(case, model_type, experts))
