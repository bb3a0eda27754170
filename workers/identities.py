"""What the score of an item depends on, beside the merge and the item itself."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers

from optimizer.recipe import canonical_json
from optimizer.spec import JobSpec, Objective
from workers.evaluators.base import Evaluator

# Configs, tokenizers, image processors and templates; weights have a digest of their own.
_FILES = {".json", ".jinja", ".model", ".txt"}


def measure_of(spec: JobSpec, objective: Objective, metric: str, evaluator: Evaluator, models: list[Any]) -> str:
    """Return the SHA-256 over all that the scores of an objective's items depend on, beside the merge and the item.

    Args:
        spec: the job.
        objective: of the job.
        metric: which of the evaluator's.
        evaluator: the objective's.
        models: as plain data, the digests of the models that have a part in it beside the merge: weights and other files
            (`digest_of_files`) of that whose head is used, and weights of those that it is compared with.

    Returns:
        64 hexadecimal digits; none where the evaluator's scores must not be remembered.
    """
    if not evaluator.remembered:
        return ""
    workers = spec.workers
    device = "cpu" if workers.device == "cpu" or (workers.device == "auto" and not workers.gpus) else "cuda"
    text = canonical_json(
        {
            "evaluator": [evaluator.name, evaluator.version, metric, evaluator.depends_on()],
            "options": evaluator.options.model_dump(mode="json"),
            "columns": {} if objective.data is None else objective.data.columns,
            "models": models,
            "merge": [sorted(spec.merge.heads), spec.merge.vocabulary],
            "numbers": [device, workers.dtype, torch.__version__, transformers.__version__],
        }
    )
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_files(model_dir: Path) -> str:
    """Return the SHA-256 over the names and contents of a checkpoint's files other than its weights."""
    digest = hashlib.sha256()
    for path in sorted(model_dir.iterdir()):
        if path.suffix in _FILES and path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
