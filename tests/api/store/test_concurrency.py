"""Several threads and processes on one database: no job is held twice, no event is missed, no writer is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

import migrations
from api.store import events
from api.store.sql import SqlStore
from optimizer.errors import Conflict, LeaseLost, NotFound
from optimizer.spec import CandidateInput
from tests.api.store.helpers import SPEC, TTL, candidate, claimed, propose, scored, started
from tests.factories import make_problem, make_spec
from tests.forks import forks

JOBS = 10


def claim_all(url: str, owner: str) -> list[str]:
    """Claim jobs until none is left for a while; return their ids."""
    store, found, empty = SqlStore(url), [], 0
    while empty < 5:
        lease = store.claim(owner, TTL)
        if lease is None:
            empty += 1
            time.sleep(0.02)
        else:
            found.append(lease.job_id)
    store.close()
    return found


def run_job(url: str, name: str, evaluations: int) -> str:
    """Run a job from its submission to its end; return its id."""
    store = SqlStore(url)
    job, _ = store.create_job(make_spec(name=name))
    lease = claimed(store, job.id, owner=name)
    store.start(lease, make_problem(SPEC))
    propose(store, lease, evaluations)
    for index in range(evaluations):
        store.add_evaluation(lease, scored(index, [index, -index]))
        store.renew(lease, TTL, float(index))
    store.set_state(lease, "completed")
    store.close()
    return job.id


@pytest.fixture(params=["threads", "processes"])
def workers(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "threads":
        with ThreadPoolExecutor(4) as threads:
            yield threads
    else:
        with ProcessPoolExecutor(2, forks()) as processes:
            yield processes


def test_no_two_claimers_hold_the_same_job(store: SqlStore, database_url: str, workers: Executor) -> None:
    ids = {store.create_job(SPEC)[0].id for _ in range(JOBS)}
    claims = [workers.submit(claim_all, database_url, f"claimer {number}") for number in range(4)]
    found = [job_id for claim in claims for job_id in claim.result()]
    assert len(found) == JOBS
    assert set(found) == ids


def test_what_abandoned_jobs_were_asked_is_done_once(store: SqlStore, database_url: str, workers: Executor) -> None:
    ids = set()
    for number in range(JOBS):
        lease = started(store)
        store.request(lease.job_id, "cancel" if number % 2 else "pause")
        store.renew(lease, 0, 1.0)
        ids.add(lease.job_id)
    waits, _ = store.create_job(SPEC)
    claims = [workers.submit(claim_all, database_url, f"claimer {number}") for number in range(4)]
    assert [job_id for claim in claims for job_id in claim.result()] == [waits.id]
    for job_id in ids:
        told = [event.data["state"] for event in store.events(job_id, 0)]
        assert told == ["queued", "running", store.get_job(job_id).state]
    assert sorted(store.get_job(job_id).state for job_id in ids) == ["cancelled"] * 5 + ["paused"] * 5


def test_writers_wait_for_each_other_and_readers_miss_nothing(
    store: SqlStore, database_url: str, workers: Executor
) -> None:
    runs = [workers.submit(run_job, database_url, f"job {number}", 10) for number in range(4)]
    seen: list[int] = []
    while True:
        done = all(run.done() for run in runs)
        found = store.events(None, seen[-1] if seen else 0, limit=7)
        seen += [event.id for event in found]
        if done and not found:
            break
    everything = [event.id for event in store.events(None, 0)]
    assert seen == everything
    for run in runs:
        job_id = run.result()
        assert store.get_job(job_id).progress.completed == 10
        told = store.events(job_id, 0)
        evaluated = [event.data["index"] for event in told if event.type == "candidate.evaluated"]
        assert evaluated == list(range(10))
        assert told[-1].data["state"] == "completed"


def test_a_later_event_is_not_visible_before_an_earlier_one(store: SqlStore) -> None:
    """The case that loses events: ids are drawn in one order and committed in the other."""
    slow, quick = (store.create_job(SPEC)[0].id for _ in range(2))
    after = store.events(None, 0)[-1].id
    drawn, may_commit = threading.Event(), threading.Event()

    def hold_an_id() -> None:
        with store.write() as session:
            events.append(session, slow, ("job.note", {"message": "first"}))
            drawn.set()
            may_commit.wait(30)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(hold_an_id)
        assert drawn.wait(30)
        second = threads.submit(store.request, quick, "pause")
        time.sleep(0.3)
        assert store.events(None, after) == []
        assert not second.done()
        may_commit.set()
        first.result()
        second.result()
    assert [event.job_id for event in store.events(None, after)] == [slow, quick]


def test_one_outcome_of_many_at_once(store: SqlStore) -> None:
    lease = started(store)
    propose(store, lease, 1)
    with ThreadPoolExecutor(4) as threads:
        recorded = list(threads.map(lambda value: store.add_evaluation(lease, scored(0, [value, value])), range(8)))
    assert sum(recorded) == 1
    assert store.get_job(lease.job_id).progress.completed == 1


def test_one_generation_of_many_at_once(store: SqlStore) -> None:
    lease = started(store)

    def add(_: int) -> bool:
        try:
            store.add_candidates(lease, [candidate(0), candidate(1)])
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(add, range(8))) == 1
    assert store.get_job(lease.job_id).progress.proposed == 2


def test_one_job_for_a_key_used_at_once(store: SqlStore) -> None:
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: store.create_job(SPEC, "key"), range(8)))
    assert len({view.id for view, _ in made}) == 1
    assert sum(created for _, created in made) == 1


def test_numbers_of_enqueued_candidates_are_unique(store: SqlStore) -> None:
    job, _ = store.create_job(SPEC)
    wish = CandidateInput(genome=[0.0] * 8)
    with ThreadPoolExecutor(4) as threads:
        numbers = list(threads.map(lambda _: store.enqueue(job.id, wish), range(12)))
    assert sorted(numbers) == list(range(1, 13))


def test_no_two_workers_claim_the_same_export(store: SqlStore) -> None:
    lease = started(store)
    propose(store, lease, 1)
    store.add_evaluation(lease, scored(0, [1.0, 1.0]))
    wanted = {store.create_export(lease.job_id, 0, None).id for _ in range(4)}

    def claim(_: int) -> str | None:
        task = store.claim_export("worker", TTL)
        return None if task is None else task.id

    with ThreadPoolExecutor(4) as threads:
        found = [export for export in threads.map(claim, range(12)) if export is not None]
    assert sorted(found) == sorted(wanted)


def test_deletion_while_exports_report(store: SqlStore) -> None:
    """Locks are taken in one order, so that neither side is thrown out as a deadlock's victim."""
    for _ in range(5):
        lease = started(store)
        propose(store, lease, 1)
        store.add_evaluation(lease, scored(0, [1.0, 1.0]))
        store.create_export(lease.job_id, 0, None)
        task = store.claim_export("worker", TTL)
        assert task is not None
        store.set_state(lease, "completed")
        reported = threading.Event()

        def report(task: object = task, reported: threading.Event = reported) -> bool:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    store.update_export(task, state="running", progress=0.5, ttl_s=TTL)  # type: ignore[arg-type]
                except LeaseLost:
                    return True
                reported.set()
                time.sleep(0.001)
            return False

        with ThreadPoolExecutor(2) as threads:
            reporter = threads.submit(report)
            assert reported.wait(30)
            store.delete_job(lease.job_id)
            assert reporter.result()
        with pytest.raises(NotFound):
            store.get_job(lease.job_id)


def upgrade_and_submit(url: str) -> str:
    """What every process of a deployment does when all of them start at once on an empty database."""
    migrations.upgrade(url)
    store = SqlStore(url)
    job, _ = store.create_job(SPEC)
    store.close()
    return job.id


def test_a_fresh_sqlite_file_opened_by_many_at_once(tmp_path: Path) -> None:
    for attempt in range(3):
        url = f"sqlite:///{tmp_path}/{attempt}.db"
        with ThreadPoolExecutor(4) as threads:
            assert len(set(threads.map(upgrade_and_submit, [url] * 4))) == 4
