"""How long reads take in a job of 100,000 candidates: ``python -m tests.benchmarks.store [--json PATH]``.

The job has 12 layers × 3 experts, 3 objectives, per-item scores, duplicates, failures and all events. Its rows and flags
are those of the store's own write path, which is measured as well, on top of the full job.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert, text, update

import migrations
from api.store.columns import utc_now
from api.store.models import (
    CandidateRow,
    EventRow,
    ImprovementRow,
    ItemScoresRow,
    JobRow,
    ObjectiveValueRow,
    RecipeRow,
)
from api.store.sql import SqlStore
from api.views import Progress
from optimizer.fitness.aggregate import ItemScores
from optimizer.pareto import front_mask
from optimizer.ports import Evaluation, Lease
from optimizer.space import MergeSpace, make_merge_space
from optimizer.spec import JobSpec
from tests.factories import make_problem, make_spec
from tests.postgres import find_postgres, run_postgres

TARGET_S = 1.0
_CHUNK = 5000
_ITEMS = 32
_REPEATS = 3
_LAYERS = 12
# Every so many candidates one fails, and one repeats the candidate before it.
_FAILS, _REPEATED = 97, 53


@dataclass(frozen=True)
class Measured:
    """The best of several runs of one operation."""

    database: str
    operation: str
    seconds: float
    read: bool = True


def measure(name: str, url: str, count: int) -> Iterator[Measured]:
    """Fill a fresh database with a job of ``count`` candidates and yield what each operation takes."""
    migrations.upgrade(url)
    store = SqlStore(url)
    try:
        began = time.perf_counter()
        lease = _fill(store, count)
        yield Measured(name, f"(filling in {count} candidates)", time.perf_counter() - began, read=False)
        for operation, call in _reads(store, lease):
            yield Measured(name, operation, _best(call))
        for operation, call in _writes(store, lease, count):
            yield Measured(name, operation, _best(call), read=False)
    finally:
        store.close()


def _best(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _reads(store: SqlStore, lease: Lease) -> Iterator[tuple[str, Callable[[], object]]]:
    job = lease.job_id
    some = store.get_job(job).progress.proposed // 2
    deep = _middle(store, job, "index")
    deep_value = _middle(store, job, "-value")
    yield "list jobs", store.list_jobs
    yield "show the job", lambda: store.get_job(job)
    yield "first page", lambda: store.list_candidates(job)
    yield "page in the middle, by cursor", lambda: store.list_candidates(job, cursor=deep)
    yield "last page (sort=-index)", lambda: store.list_candidates(job, sort="-index")
    yield "first page by value", lambda: store.list_candidates(job, sort="value", objective="a")
    yield (
        "page in the middle by value",
        lambda: store.list_candidates(job, sort="-value", objective="b", cursor=deep_value),
    )
    yield "front by value", lambda: store.list_candidates(job, sort="-value", objective="c", on_front=True)
    yield "failed ones", lambda: store.list_candidates(job, state="failed")
    yield "pending ones (none)", lambda: store.list_candidates(job, state="pending")
    yield "one candidate", lambda: store.get_candidate(job, some)
    yield "front(limit=2000)", lambda: store.front(job, 2000)
    yield "progression", lambda: store.progression(job)
    yield "events, last 500", lambda: store.events(job, _last_event(store, job) - 500)
    yield "load()", lambda: store.load(lease)


def _middle(store: SqlStore, job: str, sort: Any) -> str | None:
    """Return a cursor in the middle, found by walking there: that is what a cursor is."""
    objective, cursor = ("b" if sort == "-value" else None), None
    for _ in range(store.get_job(job).progress.proposed // 2000):
        cursor = store.list_candidates(job, sort=sort, objective=objective, cursor=cursor, limit=1000).next_cursor
    return cursor


def _last_event(store: SqlStore, job: str) -> int:
    with store.read() as session:
        found = session.execute(text("SELECT max(id) FROM events WHERE job_id = :job"), {"job": job})
        return int(found.scalar_one())


def _writes(store: SqlStore, lease: Lease, count: int) -> Iterator[tuple[str, Callable[[], object]]]:
    template = store.load(lease).candidates[0]
    numbers = iter(range(count, count + 1000))

    def generation() -> list[int]:
        indices = [next(numbers) for _ in range(20)]
        store.add_candidates(
            lease, [replace(template, index=i, fingerprint=f"{i:064x}", recipe=dict(template.recipe)) for i in indices]
        )
        return indices

    waiting = iter(generation())

    def evaluation() -> None:
        items = {name: ItemScores(np.full(_ITEMS, 0.5, dtype=np.float32)) for name in "abc"}
        store.add_evaluation(lease, Evaluation(next(waiting), (0.5, 0.5, 0.5), items=items))

    yield "write one evaluation", evaluation
    yield "write a generation of 20", generation
    yield "renew the lease", lambda: store.renew(lease, 60, 1.0)


def _fill(store: SqlStore, count: int) -> Lease:
    spec = make_spec(
        experts=[{"name": name, "path": name} for name in ("x", "y", "z")],
        objectives=[
            {"name": n, "evaluator": "classification", "data": {"path": n}, "metric": "m", "direction": d}
            for n, d in (("a", "maximise"), ("b", "minimise"), ("c", "maximise"))
        ],
        budget={"evaluations": 10 * count},
    )
    problem = make_problem(spec, layers=_LAYERS)
    job, _ = store.create_job(spec)
    lease = store.claim("benchmark", 3600)
    if lease is None or lease.job_id != job.id:
        raise RuntimeError("the database is not fresh")
    store.start(lease, problem)
    _Filler(store, spec, make_merge_space(spec, problem), job.id, count).run()
    return lease


class _Filler:
    """Inserts in bulk what the controller would have written one by one."""

    def __init__(self, store: SqlStore, spec: JobSpec, space: MergeSpace, job_id: str, count: int) -> None:
        random = np.random.default_rng(7)
        self.store, self.spec, self.space, self.job_id, self.count = store, spec, space, job_id, count
        self.genomes = random.uniform(space.low, space.high, (count, space.dim))
        index = np.arange(count)
        self.failed = index % _FAILS == 1
        self.duplicate = (index % _REPEATED == 2) & ~np.roll(self.failed, 1)
        self.own = ~self.failed & ~self.duplicate
        # Eight are in flight, and come back in any order.
        self.recorded = np.argsort(np.argsort(index + random.integers(0, 8, count)))
        # A concave trade-off, approached slowly: the front gets a few hundred points, as searches' fronts do.
        directions = np.abs(random.normal(size=(count, 3)))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        quality = 1 - random.uniform(size=(count, 1)) ** 0.3 * np.exp(-index / count)[:, None]
        self.losses = -directions * quality
        self.values: NDArray[np.float64] = self.losses * np.array([-1.0, 1.0, -1.0])

    def run(self) -> None:
        """Insert everything, job row last, and let the database learn its statistics as it would have by then."""
        on_front = np.zeros(self.count, dtype=bool)
        on_front[self.own] = front_mask(self.losses[self.own])
        for first in range(0, self.count, _CHUNK):
            self._chunk(range(first, min(first + _CHUNK, self.count)), on_front)
        self._finish(int(on_front.sum()))
        with self.store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE"))

    def _chunk(self, indices: range, on_front: NDArray[np.bool_]) -> None:
        now, items = utc_now(), np.full(_ITEMS, 0.5, dtype=np.float32)
        rows = [self._candidate(i, bool(on_front[i])) | {"created_at": now, "finished_at": now} for i in indices]
        scored = [i for i in indices if not self.failed[i]]
        own = [i for i in indices if self.own[i]]
        with self.store.write() as session:
            session.execute(insert(CandidateRow), rows)
            session.execute(insert(RecipeRow), [self._recipe(i) for i in indices])
            session.execute(
                insert(ObjectiveValueRow),
                [self._row(i) | {"objective": m, "value": self._values(i)[m]} for i in scored for m in range(3)],
            )
            session.execute(
                insert(ItemScoresRow),
                [self._row(i) | {"objective": m, "values": items, "weights": None} for i in own for m in range(3)],
            )
            session.execute(insert(EventRow), [self._event(i, now) for i in indices if not self.duplicate[i]])

    def _finish(self, front: int) -> None:
        losses = np.where(self.own[:, None], self.losses, np.inf)
        best = np.minimum.accumulate(losses) * np.array([-1.0, 1.0, -1.0])
        lowest = np.minimum.accumulate(losses.mean(axis=1))
        improved = np.flatnonzero(np.r_[True, (best[1:] != best[:-1]).any(axis=1) | (lowest[1:] != lowest[:-1])])
        completed = np.cumsum(self.own)
        with self.store.write() as session:
            session.execute(
                insert(ImprovementRow),
                [
                    self._row(i) | {"completed": int(completed[i]), "best": best[i].tolist(), "loss": float(lowest[i])}
                    for i in improved
                ],
            )
            session.execute(
                update(JobRow)
                .where(JobRow.id == self.job_id)
                .values(
                    proposed=self.count,
                    completed=int(self.own.sum()),
                    failed=int(self.failed.sum()),
                    duplicates=int(self.duplicate.sum()),
                    front=front,
                    best=best[-1].tolist(),
                    best_loss=float(lowest[-1]),
                )
            )

    def _row(self, index: int) -> dict[str, Any]:
        return {"job_id": self.job_id, "index": int(index)}

    def _source(self, index: int) -> int:
        return index - 1 if self.duplicate[index] else index

    def _values(self, index: int) -> list[float]:
        values: list[float] = self.values[self._source(index)].tolist()
        return values

    def _candidate(self, index: int, on_front: bool) -> dict[str, Any]:
        failed, duplicate = bool(self.failed[index]), bool(self.duplicate[index])
        return self._row(index) | {
            "generation": index // 20,
            "told": index // 20 * 20,
            "phase": 2 * index // self.count,
            "origin": "warm_start" if index < 5 else "algorithm",
            "label": f"start {index}" if index < 5 else None,
            "fingerprint": f"{self._source(index):064x}",
            "parents": [index // 2, index // 3] if index > 20 else [],
            "genome": self._genome(index),
            "duplicate_of": self._source(index) if duplicate else None,
            "state": "failed" if failed else "completed",
            "values": None if failed else self._values(index),
            "violation": 0.0,
            "on_front": on_front,
            "failure": {"code": "infeasible", "message": "loss is nan"} if failed else None,
            "recorded": None if duplicate else int(self.recorded[index]),
            "seconds": {} if duplicate else {"merge": 0.05, "evaluate": 0.7},
            "worker": "" if duplicate else "worker-1",
        }

    def _recipe(self, index: int) -> dict[str, Any]:
        return self._row(index) | {"recipe": self.space.recipe(self._genome(index)).to_json()}

    def _genome(self, index: int) -> NDArray[np.float64]:
        genome: NDArray[np.float64] = self.genomes[self._source(index)]
        return genome

    def _event(self, index: int, now: Any) -> dict[str, Any]:
        progress = Progress(budget=self.count, proposed=index).model_dump()
        data = {"index": index, "state": "completed", "values": self._values(index), "progress": progress}
        return {"job_id": self.job_id, "type": "candidate.evaluated", "data": data, "at": now}


@contextmanager
def _databases() -> Iterator[list[tuple[str, str]]]:
    with tempfile.TemporaryDirectory() as folder:
        found = [("SQLite", f"sqlite:///{folder}/benchmark.db")]
        programs = find_postgres()
        if programs is None:
            yield found
            return
        with run_postgres(programs) as server:
            yield [*found, ("PostgreSQL", server.url(server.create_database()))]


def main() -> int:
    """Measure, print a table, and return 1 if a read takes too long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--candidates", type=int, default=100_000)
    options = parser.parse_args()
    console, table = Console(), Table("database", "operation", "seconds")
    results = []
    with _databases() as databases, console.status("measuring"):
        for name, url in databases:
            for result in measure(name, url, options.candidates):
                slow = result.read and result.seconds > TARGET_S
                table.add_row(name, result.operation, f"[red]{result.seconds:.4f}" if slow else f"{result.seconds:.4f}")
                results.append(result)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps([vars(result) for result in results], indent=1))
    return int(any(result.read and result.seconds > TARGET_S for result in results))


if __name__ == "__main__":
    sys.exit(main())
