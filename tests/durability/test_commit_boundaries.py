"""A controller killed at any commit boundary loses nothing, repeats nothing, and changes nothing of what follows."""

from __future__ import annotations

import shutil
import signal
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import pytest

from api.store.sql import SqlStore
from optimizer.spec import parse_spec
from tests.durability.child import live
from tests.durability.rows import Rows, history
from tests.forks import forks
from tests.jobs import write_data, write_job

LIFE_S = 60


class Bench:
    """A job, and lives of controllers that run it."""

    def __init__(self, template: Path, folder: Path, items: int = 6) -> None:
        self.template = template
        self.root = folder / "root"
        self.folder = folder
        self.job = write_job(
            self.root,
            items=items,
            algorithm={"name": "cma_es", "options": {"population": 4}},
            budget={"evaluations": 12},
            parallel_evaluations=2,
            workers={"count": 2},
        )
        self.spec = parse_spec(self.job)

    def thrifty(self, fitness: dict[str, Any], evaluations: int) -> Self:
        """Judge candidates by ``fitness``, and the best in the end on items that the search does not see."""
        write_data(self.root / "unseen", items=8, seed=8)
        objectives = [one | {"test": {"path": f"unseen/data/{one['name']}.jsonl"}} for one in self.job["objectives"]]
        self.spec = parse_spec(
            self.job
            | {
                "objectives": objectives,
                "budget": {"evaluations": evaluations},
                "fitness": fitness | {"verification": {"candidates": 2, "baselines": False}},
            }
        )
        return self

    def new(self, name: str) -> tuple[str, str]:
        """Return the URL of a fresh store with the job in it, and the job's id."""
        url = f"sqlite:///{shutil.copy(self.template, self.folder / f'{name}.db')}"
        store = SqlStore(url)
        job, _ = store.create_job(self.spec)
        store.close()
        return url, job.id

    def live(self, url: str, kill_at: int | None) -> tuple[int | None, list[str], list[int]]:
        """Run one life; return its exit code, the boundaries it passed, and the candidates it submitted."""
        boundaries, submitted = self.folder / "boundaries", self.folder / "submitted"
        for log in (boundaries, submitted):
            log.write_bytes(b"")
        process: ForkServerProcess = forks().Process(target=live, args=(url, self.root, kill_at, boundaries, submitted))
        process.start()
        process.join(LIFE_S)
        assert process.exitcode is not None, "the controller hangs"
        return (
            process.exitcode,
            boundaries.read_text().split(),
            [int(line) for line in submitted.read_text().split()],
        )


RACING = {"racing": {"enabled": True, "first_items": 8, "error": 0.4}}
ESTIMATION = {"estimation": {"method": "weighted", "items": 8}}
NAMES = {"claim", "start", "add_candidates", "add_evaluation", "set_state"}
VERIFYING = {"begin_verification", "add_verification"}


def paid(rows: Rows) -> set[int]:
    """Candidates that have an outcome, and as -1, -2, … those that were verified."""
    verified = {-row[0] - 1 for row in rows if row[-3] is not None and row[-3]["state"] == "completed"}
    return verified | {row[0] for row in rows if row[-1] is not None}


def one_of_each(boundaries: list[str]) -> list[int]:
    """One of each kind of boundary, from the middle of the job."""
    places = {name: [n for n, one in enumerate(boundaries, 1) if one == name] for name in boundaries}
    return sorted(found[len(found) // 2] for found in places.values())


def check(bench: Bench, names: set[str], *, every: bool) -> Rows:
    """Kill a controller at boundaries of a job, all of them or one of each kind; return what the job found."""
    url, job_id = bench.new("whole")
    code, boundaries, submitted = bench.live(url, None)
    assert code == 0
    whole = history(url, job_id)
    assert sum(number >= 0 for number in paid(whole)) == bench.spec.budget.evaluations
    assert sorted(submitted) == sorted(paid(whole))
    assert {name.split(":")[1] for name in boundaries} >= names
    for kill_at in range(1, len(boundaries) + 1) if every else one_of_each(boundaries):
        url, job_id = bench.new(f"killed-{kill_at}")
        code, passed, _ = bench.live(url, kill_at)
        assert code == -signal.SIGKILL
        done = paid(history(url, job_id))
        if passed[-1] != "after:set_state":  # the job had not ended yet
            code, _, again = bench.live(url, None)
            assert code == 0
            assert not done & set(again), f"repeated after a kill at {passed[-1]} (boundary {kill_at})"
        assert history(url, job_id) == whole, f"differs after a kill at {passed[-1]} (boundary {kill_at})"
    return whole


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_commit_boundaries(sqlite_template: Path, tmp_path: Path, every: bool) -> None:
    check(Bench(sqlite_template, tmp_path), NAMES, every=every)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_while_candidates_race(sqlite_template: Path, tmp_path: Path) -> None:
    bench = Bench(sqlite_template, tmp_path, items=40).thrifty(RACING, 20)
    rows = check(bench, NAMES | VERIFYING, every=True)
    assert sum(row[10] for row in rows) > 2, "too few candidates lost a race"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_while_candidates_are_estimated(sqlite_template: Path, tmp_path: Path) -> None:
    bench = Bench(sqlite_template, tmp_path, items=40).thrifty(ESTIMATION, 12)
    rows = check(bench, NAMES | VERIFYING | {"set_anchors"}, every=True)
    assert sum(row[11] is not None and min(row[11]) > 0 for row in rows) == 12 - 4
