"""A controller killed at any commit boundary loses nothing, repeats nothing, and changes nothing of what follows."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from api.store.sql import SqlStore
from optimizer.spec import parse_spec
from tests.durability.child import live
from tests.durability.rows import Rows, history
from tests.jobs import write_job

LIFE_S = 60


@pytest.fixture(scope="module")
def forks() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.durability.child"])
    return context


class Bench:
    """A job, and lives of controllers that run it."""

    def __init__(self, forks: multiprocessing.context.ForkServerContext, template: Path, folder: Path) -> None:
        self.forks = forks
        self.template = template
        self.root = folder / "root"
        self.folder = folder
        self.spec = parse_spec(
            write_job(
                self.root,
                items=6,
                algorithm={"name": "cma_es", "options": {"population": 4}},
                budget={"evaluations": 12},
                parallel_evaluations=2,
                workers={"count": 2},
            )
        )

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
        process: ForkServerProcess = self.forks.Process(
            target=live, args=(url, self.root, kill_at, boundaries, submitted)
        )
        process.start()
        process.join(LIFE_S)
        assert process.exitcode is not None, "the controller hangs"
        return (
            process.exitcode,
            boundaries.read_text().split(),
            [int(line) for line in submitted.read_text().split()],
        )


def scored(rows: Rows) -> set[int]:
    """Candidates that have an outcome."""
    return {row[0] for row in rows if row[-1] is not None}


def test_killed_at_every_commit_boundary(
    forks: multiprocessing.context.ForkServerContext, sqlite_template: Path, tmp_path: Path
) -> None:
    bench = Bench(forks, sqlite_template, tmp_path)
    url, job_id = bench.new("whole")
    code, boundaries, submitted = bench.live(url, None)
    assert code == 0
    whole = history(url, job_id)
    assert len(scored(whole)) == 12
    assert sorted(submitted) == sorted(scored(whole))
    assert {name.split(":")[1] for name in boundaries} >= {
        "claim",
        "start",
        "add_candidates",
        "add_evaluation",
        "set_state",
    }

    for kill_at in range(1, len(boundaries) + 1):
        url, job_id = bench.new(f"killed-{kill_at}")
        code, passed, _ = bench.live(url, kill_at)
        assert code == -signal.SIGKILL
        done = scored(history(url, job_id))
        if passed[-1] != "after:set_state":  # the job had not ended yet
            code, _, again = bench.live(url, None)
            assert code == 0
            assert not done & set(again), f"repeated after a kill at {passed[-1]} (boundary {kill_at})"
        assert history(url, job_id) == whole, f"differs after a kill at {passed[-1]} (boundary {kill_at})"
