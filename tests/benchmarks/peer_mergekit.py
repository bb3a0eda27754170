"""Runs one merge with mergekit and prints what it took, as JSON; run by `tests.benchmarks.peer` with mergekit's Python.

Arguments: the YAML configuration, and the directory to write to, or nothing for a merge to memory. Nothing here may be
imported by mergekit's users, or by this project.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()

import yaml  # noqa: E402 - importing is part of what is measured
from mergekit.architecture import get_architecture_info  # type: ignore[import-not-found]  # noqa: E402
from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]  # noqa: E402
from mergekit.graph import Executor  # type: ignore[import-not-found]  # noqa: E402
from mergekit.io.tasks import LoaderCache, ReturnTensor  # type: ignore[import-not-found]  # noqa: E402
from mergekit.merge import _model_out_config, run_merge  # type: ignore[import-not-found]  # noqa: E402
from mergekit.options import MergeOptions  # type: ignore[import-not-found]  # noqa: E402
from mergekit.plan import MergePlanner  # type: ignore[import-not-found]  # noqa: E402

IMPORTED = time.perf_counter()


def in_memory(config: MergeConfiguration, options: MergeOptions) -> int:
    """Compute all tensors, keep them, and return how many there are.

    ``MergePlanner.plan_in_memory`` of version 0.1.5 fails when it validates its own tasks; these are the same ones without
    the validation.
    """
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    out = _model_out_config(config, architecture)
    planner = MergePlanner(config, architecture, options=options, out_model_config=out)
    planner._plan()
    tasks = [
        ReturnTensor.model_construct(weight_info=info, tensor_task=task, dtype=info.force_dtype or config.out_dtype)
        for info, task in planner._tensors
    ]
    executor = Executor(tasks, math_device="cpu", storage_device="cpu")
    kept = [value for _, value in executor.run(quiet=True)]
    return len(kept)


def main() -> None:
    """Merge, and print seconds for importing and for merging."""
    config = MergeConfiguration.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text()))
    options = MergeOptions(quiet=True, random_seed=0)
    began = time.perf_counter()
    if len(sys.argv) > 2:
        run_merge(config, sys.argv[2], options)
    else:
        in_memory(config, options)
    done = time.perf_counter()
    sys.stdout.write(json.dumps({"import_s": IMPORTED - BEGAN, "merge_s": done - began}) + "\n")


if __name__ == "__main__":
    main()
