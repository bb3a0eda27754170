"""Every search, as a real job over real checkpoints: it ends, and interrupted again and again it finds just the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from api.store.sql import SqlStore
from api.views import JobView
from optimizer.algorithms import ALGORITHMS
from optimizer.controller import Controller, ControllerConfig
from optimizer.spec import JobSpec, parse_spec
from tests.durability.rows import Rows, history
from tests.jobs import write_job
from tests.marks import quick_or_slow
from workers.pool import LocalPoolFactory

EVALUATIONS = 26
OPTIONS: dict[str, dict[str, Any]] = {
    "forest": {"items_min": 2},
    "frank_wolfe": {"oracle": "exact"},
}
MERGES: dict[str, dict[str, Any]] = {
    "evo_merging": {"operator": "prune", "granularity": {"layers": "whole"}},
    "rmm": {"space": "actions", "granularity": {}},
}
PHASES = [
    {"algorithm": "baselines", "share": 0.3},
    {"algorithm": "m2n2", "share": 0.2},
    {"algorithm": {"name": "frank_wolfe"}, "share": 0.2, "keep_experts": 1},
    {"algorithm": "cma_es"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def job(root: Path) -> dict[str, Any]:
    return write_job(root, items=6, budget={"evaluations": EVALUATIONS}, workers={"count": 2})


def spec_of(job: dict[str, Any], name: str) -> JobSpec:
    merge = job["merge"] | MERGES.get(name, {})
    return parse_spec(job | {"merge": merge, "algorithm": {"name": name, "options": OPTIONS.get(name, {})}})


def run(spec: JobSpec, root: Path, template: Path, url: str, every: int | None) -> Rows:
    """Run a job to its end, with a new controller, and a new store, after ``every`` so many outcomes."""
    path = Path(url.removeprefix("sqlite:///"))
    shutil.copy(template, path)
    store = SqlStore(url)
    job_id = store.create_job(spec)[0].id
    store.close()
    while True:
        view = _live(url, root, job_id, every)
        if view.state not in ("queued", "running"):
            assert view.state == "completed", view.reason
            return history(url, job_id)


def _live(url: str, root: Path, job_id: str, every: int | None) -> JobView:
    """The life of one controller; the job as it leaves it."""
    seen = 0

    def count(name: str) -> None:
        nonlocal seen
        seen += name == "after:add_evaluation"
        if seen == every:
            controller.stop()

    store = SqlStore(url, on_commit=count)
    controller = Controller(store, LocalPoolFactory([root]), ControllerConfig("test", poll_s=0.01))
    controller.run_next()
    view = store.get_job(job_id)
    store.close()
    return view


@pytest.mark.parametrize("name", quick_or_slow(ALGORITHMS, "cma_es", "frank_wolfe", "m2n2"))
def test_every_search_resumes_exactly(
    job: dict[str, Any], root: Path, sqlite_template: Path, tmp_path: Path, name: str
) -> None:
    spec = spec_of(job, name)
    whole = run(spec, root, sqlite_template, f"sqlite:///{tmp_path / 'whole.db'}", None)
    assert sum(row[-1] is not None for row in whole) > 6
    assert run(spec, root, sqlite_template, f"sqlite:///{tmp_path / 'broken.db'}", 7) == whole


def test_phases_resume_exactly(job: dict[str, Any], root: Path, sqlite_template: Path, tmp_path: Path) -> None:
    spec = parse_spec(job | {"phases": PHASES, "algorithm": {}})
    whole = run(spec, root, sqlite_template, f"sqlite:///{tmp_path / 'whole.db'}", None)
    assert run(spec, root, sqlite_template, f"sqlite:///{tmp_path / 'broken.db'}", 5) == whole
    store = SqlStore(f"sqlite:///{tmp_path / 'whole.db'}")
    view = store.list_jobs().items[0]
    phases = {candidate.phase for candidate in store.list_candidates(view.id, limit=200).items}
    store.close()
    assert phases == {0, 1, 2, 3}


def test_an_asynchronous_job_resumes_with_what_it_was_told(
    job: dict[str, Any], root: Path, sqlite_template: Path, tmp_path: Path
) -> None:
    """Which order outcomes come in is up to the workers; whatever it was, the log is replayed in it."""
    spec = parse_spec(job | {"asynchronous": True, "workers": {"count": 4}})
    rows = run(spec, root, sqlite_template, f"sqlite:///{tmp_path / 'jobs.db'}", 4)
    assert sum(row[-1] is not None for row in rows) == EVALUATIONS
