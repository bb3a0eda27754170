"""The demo's job: a layer-wise search over five checkpoints, one objective for each task."""

from __future__ import annotations

from typing import Any

from optimizer.spec import JobSpec, parse_spec
from workers.demo.experts import HEADS, TRAININGS
from workers.demo.tasks import Task

SEARCH_ITEMS = 250
TEST_ITEMS = 1000
EVALUATIONS = 200


def job_spec(
    tasks: list[Task], *, split: str = "search", metric: str = "loss", evaluations: int = EVALUATIONS
) -> JobSpec:
    """Return the demo's job; with another split and metric, the same measures for the final table.

    The search minimises losses, which are smoother than accuracies: with a few hundred items, most small steps change no
    accuracy at all.
    """
    return parse_spec(
        {
            "name": "demo: three word tasks, five checkpoints",
            "base": "models/base",
            "experts": [{"name": training.name, "path": f"models/{training.name}"} for training in TRAININGS],
            "merge": {
                "operator": "task_arithmetic",
                "granularity": {"layers": "each"},
                "bounds": {"low": -0.25, "high": 1.25},
                "heads": list(HEADS),
            },
            "objectives": [_objective(task, split, metric) for task in tasks],
            "algorithm": {"name": "cma_es"},
            "budget": {"evaluations": evaluations},
            "seed": 42,
            # On the CPU everywhere, so that plain transformers there gives the very same scores.
            "workers": {"count": 2, "cpus": 1, "device": "cpu", "dtype": "float32"},
        }
    )


def _objective(task: Task, split: str, metric: str) -> dict[str, Any]:
    return {
        "name": task.name,
        "evaluator": "text_classification",
        "options": {"max_length": 16, "batch_size": 64},
        "data": {"path": f"data/{task.name}", "split": split},
        "metric": metric,
        "head": task.name,
    }
