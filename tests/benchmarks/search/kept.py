"""Independent runs whose results are written as they end, so that what was interrupted goes on where it was.

What was run is known by its description alone: after a change to what it measures, delete the directory.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Task = TypeVar("Task")


def results(
    tasks: Sequence[Task], run: Callable[[Task], dict[str, Any]], directory: Path | None, processes: int = 1
) -> list[dict[str, Any]]:
    """Return the result of each task, in their order; those that have a file are not run again.

    Args:
        tasks: dataclasses of plain data.
        run: a function of a module, as it runs in other processes where there are several.
        directory: of the files; None to keep nothing.
        processes: how many run at once.
    """
    if directory is None:
        return [run(task) for task in tasks]
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{_digest(task)}.json" for task in tasks]
    new = [(run, task, path) for task, path in zip(tasks, paths, strict=True) if not path.exists()]
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            for _ in pool.imap_unordered(_run, new):
                pass
    else:
        for each in new:
            _run(each)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _run(what: tuple[Callable[[Any], dict[str, Any]], Any, Path]) -> None:
    run, task, path = what
    text = json.dumps(run(task))
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _digest(task: Any) -> str:
    return hashlib.sha256(json.dumps(asdict(task), sort_keys=True).encode()).hexdigest()[:16]
