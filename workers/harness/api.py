"""What the evaluator needs of this package; importing it imports the harness."""

from __future__ import annotations

import lm_eval

from workers.harness.items import Prompting, ask, build, digest, identity, metrics_of, score
from workers.harness.language_model import ResidentLM
from workers.harness.rules import check_generation
from workers.harness.tasks import load_tasks

VERSION: str = lm_eval.__version__

__all__ = [
    "VERSION",
    "Prompting",
    "ResidentLM",
    "ask",
    "build",
    "check_generation",
    "digest",
    "identity",
    "load_tasks",
    "metrics_of",
    "score",
]
