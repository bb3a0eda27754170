"""The controller: claims a job, replays its log, and keeps its workers busy until it ends.

The loop is ask, record, dispatch, record, tell. It decides nothing itself: what is proposed next is the business of
`optimizer.search`, and how candidates are scored that of the pool. Any number of controllers may run; a lease with a
fencing token makes sure that only one of them can write to a job.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from optimizer.errors import (
    InputsChanged,
    InvalidInput,
    JobPaused,
    LeaseLost,
    MergeoptError,
    RetryableError,
    Unavailable,
)
from optimizer.estimating import Estimating
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import FREE, Cost
from optimizer.measuring import Measuring, Memory
from optimizer.ports import (
    Candidate,
    EvaluationPool,
    Failure,
    JobState,
    Lease,
    PoolFactory,
    Request,
    Result,
    RunStore,
    Task,
)
from optimizer.problem import Problem
from optimizer.races import Races
from optimizer.search import Search
from optimizer.spending import Spending
from optimizer.verifying import Verifying

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ControllerConfig:
    """How a controller behaves.

    Attributes:
        owner: name written into leases, for humans.
        lease_ttl_s: how long a job stays with a controller that shows no sign of life.
        poll_s: how long the loop waits for results before it looks at requests and enqueued candidates again.
        retry_s: how long a job waits when its workers cannot be had, before it is claimable again.
    """

    owner: str
    lease_ttl_s: float = 30.0
    poll_s: float = 0.2
    retry_s: float = 5.0


class Controller:
    """Runs jobs one after the other; start several, in threads or processes, to run several at once."""

    def __init__(self, store: RunStore, pools: PoolFactory, config: ControllerConfig) -> None:
        self._store = store
        self._pools = pools
        self._config = config
        self._stop = threading.Event()

    def stop(self) -> None:
        """Make `run_forever` and a job under way return soon; the job stays claimable by any controller."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def run_forever(self) -> None:
        """Claim and run jobs until stopped."""
        while not self._stop.is_set():
            try:
                busy = self.run_next()
            except Exception:
                log.exception("the controller could not go on; it tries again")
                busy = False
                self._stop.wait(1.0)
            if not busy:
                self._stop.wait(self._config.poll_s)

    def run_next(self, job_id: str | None = None) -> bool:
        """Claim one job (``job_id``, or the oldest that waits) and run it; False if there was none to claim."""
        lease = self._store.claim(self._config.owner, self._config.lease_ttl_s, job_id)
        if lease is None:
            return False
        JobRun(self._store, self._pools, self._config, lease, self._stop).run()
        return True


class JobRun:
    """One controller's turn at one job."""

    def __init__(
        self,
        store: RunStore,
        pools: PoolFactory,
        config: ControllerConfig,
        lease: Lease,
        stop: threading.Event,
    ) -> None:
        self._store = store
        self._pools = pools
        self._config = config
        self._lease = lease
        self._stop = stop
        self._dispatched: set[int] = set()
        self._verified: set[int] = set()  # candidates that are being verified
        self._pause: str | None = None  # why the job has to, once what is in flight is back
        # Made once the inputs are known.
        self._spending: Spending
        self._measuring: Measuring
        self._verifying: Verifying

    def run(self) -> None:
        """Run the job until it ends, pauses, is taken over, or the controller is stopped."""
        try:
            with _LeaseKeeper(self._store, self._lease, self._config.lease_ttl_s) as keeper:
                final = self._run(keeper)
            # The keeper has stopped: nothing renews the lease behind the back of the final state.
            if final is None:
                self._store.release(self._lease)
            else:
                self._store.set_state(self._lease, *final)
        except LeaseLost:
            log.warning("job %s was taken over by another controller", self._lease.job_id)
        except Unavailable as error:
            # Nothing is lost: the lease runs out, and whoever claims the job next replays what was committed.
            log.warning("job %s could not be given back: %s", self._lease.job_id, error)

    def _run(self, keeper: _LeaseKeeper) -> tuple[JobState, str | None] | None:
        try:
            return self._search(keeper)
        except LeaseLost:
            raise
        except (RetryableError, Unavailable) as error:
            # The job is sound, its workers or its store cannot be had for now: whoever claims it next goes on.
            log.warning("job %s has to wait: %s", self._lease.job_id, error)
            self._stop.wait(self._config.retry_s)
            return None
        except JobPaused as error:
            return "paused", str(error)
        except MergeoptError as error:
            return "failed", str(error)
        except Exception as error:
            log.exception("job %s failed", self._lease.job_id)
            return "failed", f"internal error: {type(error).__name__}: {error}"

    def _search(self, keeper: _LeaseKeeper) -> tuple[JobState, str | None] | None:
        record = self._store.load(self._lease)
        keeper.begin(record.elapsed_s)
        problem = _same_inputs(record.problem, self._pools.prepare(record.spec))
        self._store.start(self._lease, problem)
        self._spending = Spending(record.spec.budget, record.cost, Cost.of(problem.estimate))
        search = Search(record.spec, problem, _Items(self._store, self._lease))
        search.replay(record.candidates, record.evaluations)
        if not search.candidates and (first := search.first()):
            self._add(search, first)
        memory = Memory(self._store, self._lease, enabled=record.spec.fitness.cache)
        races = Races(record.spec, problem, self._store, self._lease)
        estimating = Estimating(search, self._store, self._lease, record.anchors)
        self._measuring = Measuring(record.spec, problem, memory, races, estimating)
        self._verifying = Verifying(search, self._store, self._lease, memory, record.verified)
        pool = self._pools.open(record.spec, problem)
        try:
            return self._loop(search, pool, keeper)
        finally:
            pool.close()

    def _loop(self, search: Search, pool: EvaluationPool, keeper: _LeaseKeeper) -> tuple[JobState, str | None] | None:
        while True:
            keeper.check()
            if keeper.requested == "cancel":
                return "cancelled", None
            if self._stop.is_set():
                return None
            halt = _halt(search, keeper, self._pause or self._spent(search))
            if halt is None:
                self._take_enqueued(search)
                self._propose(search)
                self._dispatch(search, pool)
                if search.finished and self._verify(search, pool):
                    return "completed", search.stop_reason
            elif self._wind_up(search, pool, halt[0]):
                return halt
            for result in pool.wait(self._config.poll_s if self._dispatched or self._verified else 0.0):
                self._take(search, result)

    def _propose(self, search: Search) -> None:
        # What is known already costs no evaluation, and may lead to more at once.
        while new := search.next():
            self._add(search, new)

    def _spent(self, search: Search) -> str | None:
        """Which budget is spent, where anything is left to be paid for."""
        spent = self._spending.exhausted
        if spent is not None and not search.waiting:
            self._propose(search)  # the outcome that spent it may be the last that the search waited for
        return None if search.finished else spent

    def _wind_up(self, search: Search, pool: EvaluationPool, state: JobState) -> bool:
        """Finish what is in flight; return whether the job may stop now."""
        if state == "completed" and not self._dispatched:
            return self._verify(search, pool)  # the search's time is over, not that of what it found
        withdrawn = pool.withdraw()
        self._measuring.forget(withdrawn)
        self._verifying.forget(withdrawn)
        self._dispatched.difference_update(withdrawn)
        self._verified.difference_update(withdrawn)
        for index in withdrawn:
            self._spending.end(index, FREE)
        return state != "completed" and not self._dispatched and not self._verified

    def _verify(self, search: Search, pool: EvaluationPool) -> bool:
        """Keep the workers busy with what is to be verified; return whether nothing is left."""
        waiting = self._verifying.waiting
        most = min(search.spec.in_flight, search.spec.workers.count)
        for index in waiting:
            if len(self._verified) >= most or not self._spending.may_start(most):
                break
            if index in self._verified:
                continue
            task = self._verifying.task(index)
            if task is None:
                self._verifying.record(Result(index, worker="cache"))
                continue
            self._submit(pool, task, most)
            self._verified.add(index)
        return not self._verifying.waiting

    def _submit(self, pool: EvaluationPool, task: Task, most: int) -> None:
        """Hand over a task with its share of the budgets, where ``most`` may be under way at once."""
        pool.submit(replace(task, allowance=self._spending.start(task.index, most)))

    def _take(self, search: Search, result: Result) -> None:
        """Take what a worker brought: an outcome, a verification, or why the job has to pause."""
        index, verified = result.index, result.index in self._verified
        self._spending.end(index, result.cost)
        if result.pause is not None:
            # It begins anew once somebody has done something; what it cost until then counts.
            (self._verifying if verified else self._measuring).forget([index])
            self._pause = self._pause or result.pause
            self._store.add_cost(self._lease, result.cost)
        elif verified:
            self._verifying.record(result)
        else:
            self._record(search, result)
        (self._verified if verified else self._dispatched).discard(index)

    def _take_enqueued(self, search: Search) -> None:
        for item in self._store.enqueued(self._lease):
            if not search.accepts_more:
                self._store.reject_enqueued(self._lease, item.id, Failure("conflict", "the budget is spent"))
                continue
            try:
                candidate = search.enqueued(item.candidate)
            except InvalidInput as error:
                self._store.reject_enqueued(self._lease, item.id, Failure(error.code, str(error)))
                continue
            self._add(search, [candidate], taken=[item.id])

    def _add(self, search: Search, new: Sequence[Candidate], taken: Sequence[int] = ()) -> None:
        """Commit candidates, then let the search have them."""
        self._store.add_candidates(self._lease, new, taken)
        search.add(new)

    def _dispatch(self, search: Search, pool: EvaluationPool) -> None:
        # No more than the workers can be at: what waits here, not there, can still be paused.
        most = min(search.spec.in_flight, search.spec.workers.count)
        under_way = {search.candidates[index].fingerprint for index in self._dispatched}
        for candidate in search.waiting:
            if len(self._dispatched) >= most or not self._spending.may_start(most):
                return
            # The same merge on other items waits until it can begin from what is being measured.
            if candidate.index in self._dispatched or candidate.fingerprint in under_way:
                continue
            plan = self._measuring.plan(candidate)
            if plan.task is None:
                self._record(search, Result(candidate.index, worker="cache"))
                continue
            self._submit(pool, plan.task, most)
            self._dispatched.add(candidate.index)
            under_way.add(candidate.fingerprint)

    def _record(self, search: Search, result: Result) -> None:
        evaluation, fresh = self._measuring.outcome(search.candidates[result.index], result)
        self._store.add_evaluation(self._lease, evaluation, fresh)
        search.record(evaluation)


def _halt(search: Search, keeper: _LeaseKeeper, pause: str | None) -> tuple[JobState, str | None] | None:
    """The state to take once nothing is in flight any more, or None to go on; ``pause`` is why the job has to pause."""
    if pause is not None:  # first: what is still to be verified once the time is over needs the same services
        return "paused", pause
    wall_time = search.spec.budget.wall_time_s
    if wall_time is not None and keeper.elapsed_s >= wall_time:
        return "completed", f"{wall_time:g} s of running time are over"
    return ("paused", None) if keeper.requested == "pause" else None


def _same_inputs(recorded: Problem | None, found: Problem) -> Problem:
    """Return the problem a job goes on with; raises `InputsChanged` if a checkpoint or data set is not the one it had."""
    if recorded is None:
        return found
    for name, model in recorded.models.items():
        if found.models[name].digest != model.digest:
            raise InputsChanged(
                f"the checkpoint {name!r} ({model.ref}) changed since the job began", remedy="restore it"
            )
    for before, now in zip(recorded.objectives, found.objectives, strict=True):
        if before.data_digest != now.data_digest:
            raise InputsChanged(
                f"the data of objective {before.name!r} changed since the job began", remedy="restore it"
            )
        if before.test and now.test and before.test.data_digest != now.test.data_digest:
            raise InputsChanged(
                f"the test items of objective {before.name!r} changed since the job began", remedy="restore them"
            )
    objectives = [
        before.model_copy(update={"measure": now.measure, "digests": now.digests, "test": now.test})
        for before, now in zip(recorded.objectives, found.objectives, strict=True)
    ]
    return recorded.model_copy(update={"objectives": objectives})


class _Items:
    """Per-item scores of a job's candidates, read a stretch at a time: they are asked for in order of their index."""

    STRETCH = 256

    def __init__(self, store: RunStore, lease: Lease) -> None:
        self._store = store
        self._lease = lease
        self._read: Mapping[int, Mapping[str, ItemScores]] = {}

    def __call__(self, index: int) -> Mapping[str, ItemScores]:
        if index not in self._read:
            self._read = self._store.items(self._lease, index, self.STRETCH)
        return self._read[index]


class _LeaseKeeper:
    """Renews a lease from a thread of its own, so that hashing, loading and long asks never lose it."""

    def __init__(
        self, store: RunStore, lease: Lease, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._lease = lease
        self._ttl_s = ttl_s
        self._clock = clock
        self._began = clock()
        self._before_s = 0.0
        self._done = threading.Event()
        self._lost = False
        self._counting = False
        self.requested: Request = "run"
        self._thread = threading.Thread(target=self._keep, name=f"lease-{lease.job_id}", daemon=True)

    def begin(self, elapsed_s: float) -> None:
        """Start counting running time on top of ``elapsed_s``."""
        self._before_s = elapsed_s
        self._began = self._clock()
        self._counting = True

    @property
    def elapsed_s(self) -> float:
        """Running time of the job so far, in seconds."""
        return self._before_s + self._clock() - self._began

    def check(self) -> None:
        """Raise `LeaseLost` once the lease is gone."""
        if self._lost:
            raise LeaseLost(f"the lease on job {self._lease.job_id} is gone")

    def __enter__(self) -> _LeaseKeeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._counting and not self._lost:
            with contextlib.suppress(Unavailable):
                self._renew()

    def _keep(self) -> None:
        # Requests (pause, cancel) arrive with the renewal, so it is much more frequent than the lease needs.
        renewed = self._clock()
        while not self._done.wait(min(0.5, self._ttl_s / 3)):
            if not self._counting:
                continue
            try:
                self._renew()
                renewed = self._clock()
            except LeaseLost:
                self._lost = True
                return
            except Exception:
                log.warning("could not renew the lease on job %s", self._lease.job_id, exc_info=True)
                if self._clock() - renewed > self._ttl_s:
                    self._lost = True
                    return

    def _renew(self) -> None:
        self.requested = self._store.renew(self._lease, self._ttl_s, self.elapsed_s)
