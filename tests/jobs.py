"""A complete small job on disk: real checkpoints, real data, seconds to run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.workers.models import WORDS, tiny_bert, tiny_bert_base

TASKS = {"colour": 3, "shape": 2}
"""Tasks (and their experts) with their number of classes."""


def write_models(root: Path) -> None:
    """Write a headless base and one expert for each task below ``root/models``."""
    tiny_bert_base(root / "models" / "base", seed=0)
    for seed, (name, labels) in enumerate(TASKS.items(), start=1):
        tiny_bert(root / "models" / name, labels=labels, seed=seed)


def write_data(root: Path, items: int = 24, seed: int = 7) -> None:
    """Write ``root/data/<task>.jsonl`` with so many random texts and labels each."""
    rng = random.Random(seed)
    for name, labels in TASKS.items():
        rows = [{"text": " ".join(rng.choices(WORDS, k=5)), "label": rng.randrange(labels)} for _ in range(items)]
        path = root / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_job(root: Path, items: int = 24, **changes: Any) -> dict[str, Any]:
    """Write models and data below ``root`` and return a job over them, as plain data.

    Args:
        root: the server's root directory.
        items: of each objective.
        changes: top-level fields of the spec to replace.
    """
    write_models(root)
    write_data(root, items)
    job: dict[str, Any] = {
        "name": "tiny job",
        "base": "models/base",
        "experts": [{"name": name, "path": f"models/{name}"} for name in TASKS],
        "merge": {"heads": ["classifier.*", "*pooler.*"], "granularity": {"layers": "each"}},
        "objectives": [
            {
                "name": name,
                "evaluator": "text_classification",
                "data": {"path": f"data/{name}.jsonl"},
                "metric": "loss",
                "head": name,
            }
            for name in TASKS
        ],
        "algorithm": {"name": "cma_es"},
        "budget": {"evaluations": 24},
        "seed": 3,
    }
    return job | changes
