"""What was run is not run again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.search.kept import results


@dataclass(frozen=True)
class Square:
    """A task."""

    number: int


CALLS: list[int] = []


def square(task: Square) -> dict[str, Any]:
    """Run it."""
    CALLS.append(task.number)
    if task.number < 0:
        raise ValueError("negative")
    return {"square": task.number**2}


def test_each_is_run_once(tmp_path: Path) -> None:
    CALLS.clear()
    assert results([Square(2), Square(3)], square, tmp_path) == [{"square": 4}, {"square": 9}]
    assert results([Square(3), Square(4), Square(2)], square, tmp_path) == [{"square": n} for n in (9, 16, 4)]
    assert CALLS == [2, 3, 4]


def test_what_ended_before_a_failure_is_kept(tmp_path: Path) -> None:
    CALLS.clear()
    with pytest.raises(ValueError, match="negative"):
        results([Square(5), Square(-1), Square(6)], square, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert results([Square(5)], square, tmp_path) == [{"square": 25}]
    assert CALLS == [5, -1]


def test_nothing_is_kept_without_a_directory() -> None:
    CALLS.clear()
    assert results([Square(2)], square, None) == results([Square(2)], square, None) == [{"square": 4}]
    assert CALLS == [2, 2]


@pytest.mark.slow
def test_several_processes(tmp_path: Path) -> None:
    found = results([Square(number) for number in range(4)], square, tmp_path, processes=2)
    assert found == [{"square": number**2} for number in range(4)]
