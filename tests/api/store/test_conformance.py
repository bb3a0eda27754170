"""Every rule of `optimizer.ports.RunStore` and `api.store.ports.JobStore`, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import LargeBinary, func, select, type_coerce, update

from api.store import outcomes
from api.store.columns import utc_now
from api.store.models import Base, CandidateRow, ItemScoresRow, JobRow
from api.store.ports import BestCandidates, JobStore
from api.store.sql import SqlStore
from optimizer.errors import Conflict, InvalidInput, LeaseLost, NotFound
from optimizer.fitness.aggregate import to_losses
from optimizer.fitness.cost import Cost
from optimizer.pareto import front_mask
from optimizer.ports import Evaluation, Failure, Lease, Remembered, Request, RunStore, Verification
from optimizer.problem import Grams, PlannedPhase
from optimizer.recipe import Leaf, Merge, Recipe
from optimizer.space import SPACES, JobSpace, SpaceKind, make_space
from optimizer.spec import CandidateInput, Strict
from tests.api.store.helpers import (
    SPACE,
    SPEC,
    TTL,
    candidate,
    claimed,
    everything,
    failed,
    items,
    propose,
    repeat,
    scored,
    started,
    walk,
)
from tests.factories import make_problem, make_spec

PROBLEM = make_problem(SPEC)
# Data may stay between the examples of one test: every example makes a job of its own.
shared_store = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_one_object_is_both_stores(store: SqlStore) -> None:
    controller_side: RunStore = store
    api_side: JobStore = store
    assert controller_side.claim("one", TTL) is None
    assert api_side.list_jobs().items == []


class TestJobs:
    def test_a_new_job_waits(self, store: SqlStore) -> None:
        view, created = store.create_job(SPEC)
        assert created
        assert (view.state, view.requested, view.progress.budget) == ("queued", "run", 20)
        assert view.spec == SPEC.model_dump(mode="json")
        assert [o.direction for o in view.objectives] == ["maximise", "minimise"]
        assert view.best == [None, None]
        assert store.get_job(view.id) == view

    def test_space_is_shown_once_known(self, store: SqlStore) -> None:
        spec = make_spec(merge={"options": {"density": {"choices": [0.5, 0.9]}}})
        job, _ = store.create_job(spec)
        assert (job.groups, job.columns, job.variables) == ([], [], [])
        view = store.get_job(started(store, spec).job_id)
        assert [group.label for group in view.groups] == ["layer 0", "layer 1", "layer 2", "layer 3"]
        assert view.columns == ["language", "polarity"]
        assert len(view.variables) == 9
        assert view.parameters == 4 * 2 * 16
        assert view.variables[-1] == {"name": "density", "low": 0, "high": 2, "kind": "choice", "choices": [0.5, 0.9]}

    def test_resolved_objectives_are_shown(self, store: SqlStore) -> None:
        spec = make_spec(objectives=[{"name": "o", "evaluator": "e", "data": {"path": "d"}}])
        job, _ = store.create_job(spec)
        assert (job.objectives[0].metric, job.objectives[0].direction) == (None, None)
        shown = store.get_job(started(store, spec).job_id).objectives[0]
        assert (shown.evaluator, shown.metric, shown.direction) == ("e", "loss", "minimise")

    def test_idempotency_key(self, store: SqlStore) -> None:
        first, _ = store.create_job(SPEC, "key")
        again, created = store.create_job(make_spec(), "key")
        assert (again.id, created) == (first.id, False)
        with pytest.raises(Conflict, match="different spec"):
            store.create_job(make_spec(seed=2), "key")
        assert len(store.list_jobs().items) == 1
        assert store.create_job(SPEC, "other")[1]

    def test_clones_know_where_they_come_from(self, store: SqlStore) -> None:
        original, _ = store.create_job(SPEC)
        clone, _ = store.create_job(SPEC, cloned_from=original.id)
        assert clone.cloned_from == original.id
        store.delete_job(original.id)
        assert store.get_job(clone.id).cloned_from is None
        with pytest.raises(NotFound):
            store.create_job(SPEC, cloned_from=original.id)

    def test_list_newest_first_with_filters(self, store: SqlStore) -> None:
        ids = [store.create_job(make_spec(name=name))[0].id for name in ("alpha", "50%_beta", "Alphabet")]
        assert [job.id for job in store.list_jobs().items] == ids[::-1]
        assert [job.id for job in store.list_jobs(name="alph").items] == [ids[2], ids[0]]
        assert [job.id for job in store.list_jobs(name="%_").items] == [ids[1]]
        store.request(ids[0], "pause")
        assert [job.id for job in store.list_jobs(state="paused").items] == [ids[0]]
        assert [job.id for job in store.list_jobs(state="queued", name="alph").items] == [ids[2]]

    def test_list_cursor_is_stable_under_inserts(self, store: SqlStore) -> None:
        ids = [store.create_job(SPEC)[0].id for _ in range(5)]
        first = store.list_jobs(limit=2)
        store.create_job(SPEC)
        second = store.list_jobs(limit=2, cursor=first.next_cursor)
        third = store.list_jobs(limit=2, cursor=second.next_cursor)
        assert [job.id for page in (first, second, third) for job in page.items] == ids[::-1]
        assert third.next_cursor is None

    def test_unknown_ids(self, store: SqlStore) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.get_job("none"),
            lambda: store.request("none", "run"),
            lambda: store.delete_job("none"),
            lambda: store.list_candidates("none"),
            lambda: store.get_candidate("none", 0),
            lambda: store.front("none"),
            lambda: store.progression("none"),
            lambda: store.best("none", 1),
            lambda: store.enqueue("none", CandidateInput(genome=[0.0] * 8)),
            lambda: store.events("none", 0),
            lambda: store.create_export("none", 0, None),
            lambda: store.list_exports("none"),
            lambda: store.get_export("none"),
            lambda: store.delete_token(1),
        ]
        for call in calls:
            with pytest.raises(NotFound):
                call()

    def test_what_the_database_cannot_hold_is_the_callers_mistake(self, store: SqlStore) -> None:
        job, _ = store.create_job(SPEC)
        with pytest.raises((InvalidInput, NotFound)):
            store.get_candidate(job.id, 10**30)
        with pytest.raises((InvalidInput, NotFound)):
            store.get_job("\0")


class TestRequests:
    def test_a_queued_job_pauses_and_resumes_at_once(self, store: SqlStore) -> None:
        job, _ = store.create_job(SPEC)
        assert store.request(job.id, "pause").state == "paused"
        assert store.claim("one", TTL) is None
        assert store.request(job.id, "run").state == "queued"
        assert claimed(store).job_id == job.id

    def test_cancel_takes_pending_candidates_along(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 2)
        store.add_candidates(lease, [repeat(candidate(1), 2)])
        store.add_evaluation(lease, scored(0, [0.5, 0.5]))
        store.request(lease.job_id, "pause")
        store.set_state(lease, "paused")
        view = store.request(lease.job_id, "cancel")
        assert view.state == "cancelled"
        assert view.finished_at is not None
        page = store.list_candidates(lease.job_id)
        assert [item.state for item in page.items] == ["completed", "cancelled", "cancelled"]

    def test_a_held_job_is_only_asked(self, store: SqlStore) -> None:
        lease = started(store)
        for request in ("pause", "run", "cancel"):
            view = store.request(lease.job_id, request)
            assert (view.state, view.requested) == ("running", request)
            assert store.renew(lease, TTL, 1.0) == request

    def test_a_claimed_job_that_has_not_started_is_held(self, store: SqlStore) -> None:
        job, _ = store.create_job(SPEC)
        lease = claimed(store)
        assert store.request(job.id, "pause").state == "queued"
        assert store.renew(lease, TTL, 0.0) == "pause"

    @pytest.mark.parametrize(("request_", "state"), [("pause", "paused"), ("cancel", "cancelled")])
    def test_without_a_live_lease_it_takes_effect_at_once(self, store: SqlStore, request_: Any, state: str) -> None:
        lease = started(store)
        store.renew(lease, 0, 1.0)
        assert store.request(lease.job_id, request_).state == state
        with pytest.raises(LeaseLost):  # the controller may come back
            store.renew(lease, TTL, 2.0)

    @pytest.mark.parametrize("state", ["completed", "cancelled", "failed"])
    def test_an_ended_job_cannot_be_steered(self, store: SqlStore, state: Any) -> None:
        lease = started(store)
        store.set_state(lease, state, "because")
        for request in ("pause", "cancel", *(["run"] if state != "failed" else [])):
            with pytest.raises(Conflict) as caught:
                store.request(lease.job_id, request)  # type: ignore[arg-type]
            assert caught.value.remedy == "clone it"
        assert store.get_job(lease.job_id).reason == "because"

    def test_a_failed_job_may_run_again(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 1)
        store.set_state(lease, "failed", "a checkpoint is gone")
        view = store.request(lease.job_id, "run")
        assert (view.state, view.reason, view.finished_at) == ("queued", None, None)
        again = claimed(store)
        store.start(again, PROBLEM)
        assert store.add_evaluation(again, scored(0, [1.0, 1.0]))


class TestLeases:
    def test_oldest_first_and_each_once(self, store: SqlStore) -> None:
        ids = [store.create_job(SPEC)[0].id for _ in range(3)]
        assert [claimed(store).job_id for _ in ids] == ids
        assert store.claim("one", TTL) is None

    def test_a_certain_job_or_none(self, store: SqlStore) -> None:
        ids = [store.create_job(SPEC)[0].id for _ in range(2)]
        assert claimed(store, ids[1]).job_id == ids[1]
        assert store.claim("one", TTL, ids[1]) is None
        assert store.claim("one", TTL, "none") is None

    def test_an_expired_lease_is_taken_over(self, store: SqlStore) -> None:
        first = started(store)
        store.renew(first, 0, 3.0)
        second = claimed(store, owner="two")
        assert (second.job_id, second.owner) == (first.job_id, "two")
        assert second.token > first.token
        assert store.get_job(first.job_id).state == "running"
        assert store.load(second).elapsed_s == 3.0

    def test_an_expired_lease_that_nobody_took_still_writes(self, store: SqlStore) -> None:
        lease = started(store)
        store.renew(lease, 0, 1.0)
        propose(store, lease, 1)
        assert store.renew(lease, TTL, 2.0) == "run"
        assert store.claim("two", TTL) is None

    @pytest.mark.parametrize(
        "write",
        [
            lambda store, lease: store.renew(lease, TTL, 9.0),
            lambda store, lease: store.load(lease),
            lambda store, lease: store.items(lease, 0, 9),
            lambda store, lease: store.start(lease, PROBLEM),
            lambda store, lease: store.enqueued(lease),
            lambda store, lease: store.add_candidates(lease, [candidate(1)], [1]),
            lambda store, lease: store.reject_enqueued(lease, 1, Failure("invalid_input", "too long")),
            lambda store, lease: store.add_evaluation(lease, scored(0, [0.5, 0.5])),
            lambda store, lease: store.set_state(lease, "completed"),
            lambda store, lease: store.release(lease),
        ],
    )
    @pytest.mark.parametrize("loss", ["taken over", "released", "deleted"])
    def test_fencing(self, store: SqlStore, write: Callable[[SqlStore, Lease], object], loss: str) -> None:
        stale = started(store)
        propose(store, stale, 1)
        store.enqueue(stale.job_id, CandidateInput(genome=[0.0] * 8))
        if loss == "taken over":
            store.renew(stale, 0, 1.0)
            claimed(store, owner="two")
        elif loss == "released":
            store.release(stale)
        else:
            store.set_state(stale, "cancelled")
            store.delete_job(stale.job_id)
        before = None if loss == "deleted" else everything(store, stale.job_id)
        with pytest.raises(LeaseLost):
            write(store, stale)
        assert before is None or everything(store, stale.job_id) == before

    def test_release_lets_another_go_on_at_once(self, store: SqlStore) -> None:
        first = started(store)
        store.release(first)
        assert store.get_job(first.job_id).state == "running"
        assert claimed(store, owner="two").token > first.token

    @pytest.mark.parametrize("state", ["paused", "completed", "failed", "cancelled"])
    def test_a_job_that_stops_gives_up_its_lease(self, store: SqlStore, state: Any) -> None:
        lease = started(store)
        store.request(lease.job_id, "pause")
        store.set_state(lease, state, "why")
        view = store.get_job(lease.job_id)
        assert (view.state, view.reason, view.finished_at is not None) == (state, "why", state != "paused")
        with pytest.raises(LeaseLost):
            store.renew(lease, TTL, 1.0)
        assert store.claim("two", TTL) is None

    def test_run_requested_while_pausing_is_not_forgotten(self, store: SqlStore) -> None:
        lease = started(store)
        store.request(lease.job_id, "pause")
        store.request(lease.job_id, "run")
        store.set_state(lease, "paused")  # the controller had read `pause` already
        assert claimed(store, owner="two").job_id == lease.job_id

    def test_a_job_that_paused_for_a_reason_waits_for_its_user(self, store: SqlStore) -> None:
        lease = started(store)
        store.set_state(lease, "paused", "the service's token has expired")
        assert store.claim("two", TTL) is None
        view = store.get_job(lease.job_id)
        assert (view.state, view.requested, view.reason) == ("paused", "pause", "the service's token has expired")
        assert store.request(lease.job_id, "run").state == "queued"
        assert claimed(store, owner="two").job_id == lease.job_id

    def test_start_keeps_the_first_problem_and_start_time(self, store: SqlStore) -> None:
        lease = started(store)
        began = store.get_job(lease.job_id).started_at
        store.release(lease)
        again = claimed(store)
        store.start(again, make_problem(SPEC, layers=2))
        assert store.load(again).problem == PROBLEM
        assert store.get_job(lease.job_id).started_at == began

    def test_start_refuses_what_makes_no_search_space(self, store: SqlStore) -> None:
        kinds = ["attention", "mlp", "embeddings", "norm", "head", "other"]
        spec = make_spec(merge={"frozen": kinds})
        job, _ = store.create_job(spec)
        lease = claimed(store)
        with pytest.raises(InvalidInput, match="frozen"):
            store.start(lease, make_problem(spec))
        assert store.get_job(job.id).state == "queued"


class TestRequestsThatTheHolderDoesNotCarryOut:
    """A controller that stops, dies or has not heard of a request does not take it along."""

    OBEYED = pytest.mark.parametrize(("request_", "state"), [("pause", "paused"), ("cancel", "cancelled")])

    @staticmethod
    def states(store: SqlStore, job_id: str) -> list[str]:
        return [event.data["state"] for event in store.events(job_id, 0) if event.type == "job.state"]

    @staticmethod
    def abandoned(store: SqlStore, request: Request | None, *, start: bool = True) -> Lease:
        """Return the expired lease of a job that was asked for something while it was live."""
        if start:
            lease = started(store)
            propose(store, lease, 1)
        else:
            store.create_job(SPEC)
            lease = claimed(store)
        if request is not None:
            view = store.request(lease.job_id, request)
            assert (view.state, view.requested) == ("running" if start else "queued", request)
        store.renew(lease, 0, 1.0)
        return lease

    @OBEYED
    def test_released(self, store: SqlStore, request_: Any, state: str) -> None:
        lease = started(store)
        propose(store, lease, 1)
        store.request(lease.job_id, request_)
        store.release(lease)
        assert store.get_job(lease.job_id).state == state
        assert self.states(store, lease.job_id) == ["queued", "running", state]
        assert store.get_candidate(lease.job_id, 0).state == ("pending" if state == "paused" else "cancelled")
        assert store.claim("two", TTL) is None
        with pytest.raises(LeaseLost):
            store.renew(lease, TTL, 1.0)
        store.delete_job(lease.job_id)

    @pytest.mark.parametrize("start", [True, False])
    @OBEYED
    def test_expired(self, store: SqlStore, request_: Any, state: str, start: bool) -> None:
        lease = self.abandoned(store, request_, start=start)
        assert store.claim("two", TTL) is None
        view = store.get_job(lease.job_id)
        assert (view.state, view.requested, view.finished_at is None) == (state, request_, state == "paused")
        assert self.states(store, lease.job_id) == ["queued", *(["running"] if start else []), state]
        before = everything(store, lease.job_id)
        assert store.claim("two", TTL) is None
        with pytest.raises(LeaseLost):  # the controller may come back
            store.set_state(lease, "completed")
        assert everything(store, lease.job_id) == before
        store.delete_job(lease.job_id)

    @OBEYED
    def test_they_come_before_the_job_that_is_taken(self, store: SqlStore, request_: Any, state: str) -> None:
        waits, _ = store.create_job(SPEC)
        busy = claimed(store)
        gone = [self.abandoned(store, request_), self.abandoned(store, request_, start=False)]
        store.release(busy)
        assert claimed(store).job_id == waits.id
        assert [store.get_job(lease.job_id).state for lease in gone] == [state, state]

    def test_a_claim_of_one_job_leaves_the_others(self, store: SqlStore) -> None:
        one, other = self.abandoned(store, "cancel"), self.abandoned(store, "cancel")
        assert store.claim("two", TTL, one.job_id) is None
        assert [store.get_job(lease.job_id).state for lease in (one, other)] == ["cancelled", "running"]

    def test_a_live_lease_is_left_alone(self, store: SqlStore) -> None:
        leases = [started(store), started(store)]
        store.request(leases[0].job_id, "pause")
        store.request(leases[1].job_id, "cancel")
        before = [everything(store, lease.job_id) for lease in leases]
        assert store.claim("two", TTL) is None
        assert [everything(store, lease.job_id) for lease in leases] == before

    def test_cancelled_while_pausing(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 1)
        store.request(lease.job_id, "pause")
        store.request(lease.job_id, "cancel")
        store.set_state(lease, "paused", "the controller had read `pause` already")
        view = store.get_job(lease.job_id)
        assert (view.state, view.reason, view.finished_at is None) == ("cancelled", None, False)
        assert self.states(store, lease.job_id) == ["queued", "running", "cancelled"]
        assert store.get_candidate(lease.job_id, 0).state == "cancelled"

    def test_a_paused_job_that_was_to_cancel(self, store: SqlStore) -> None:
        """As earlier versions may have left it."""
        job, _ = store.create_job(SPEC)
        store.request(job.id, "pause")
        with store.write() as session:
            session.get_one(JobRow, job.id).requested = "cancel"
        assert store.claim("one", TTL) is None
        assert store.get_job(job.id).state == "cancelled"

    @pytest.mark.parametrize("state", ["completed", "failed"])
    def test_a_job_that_ended_first_stays_as_it_is(self, store: SqlStore, state: Any) -> None:
        lease = started(store)
        store.request(lease.job_id, "cancel")
        store.set_state(lease, state, "why")
        before = everything(store, lease.job_id)
        assert store.claim("two", TTL) is None
        assert everything(store, lease.job_id) == before

    @pytest.mark.parametrize("settled", [True, False])
    def test_a_paused_one_resumes_where_it_stood(self, store: SqlStore, settled: bool) -> None:
        lease = self.abandoned(store, "pause")
        if settled:
            assert store.claim("two", TTL) is None
        assert store.request(lease.job_id, "run").state == ("queued" if settled else "running")
        again = claimed(store, owner="two")
        log = store.load(again)
        assert (again.job_id, len(log.candidates), log.elapsed_s) == (lease.job_id, 1, 1.0)
        store.start(again, PROBLEM)
        assert store.add_evaluation(again, scored(0, [1.0, 1.0]))

    @pytest.mark.parametrize(
        ("first", "then", "state"),
        [
            ("cancel", "cancel", "cancelled"),
            ("cancel", "pause", "paused"),
            ("cancel", "run", "running"),
            ("pause", "pause", "paused"),
            ("pause", "cancel", "cancelled"),
            ("pause", "run", "running"),
            (None, "run", "running"),
        ],
    )
    def test_until_then_a_later_request_replaces_it(self, store: SqlStore, first: Any, then: Any, state: str) -> None:
        lease = self.abandoned(store, first)
        view = store.get_job(lease.job_id)
        assert (view.state, view.requested) == ("running", first or "run")
        view = store.request(lease.job_id, then)
        assert (view.state, view.requested) == (state, then)
        assert store.get_job(lease.job_id) == view
        if state == "running":
            assert claimed(store, owner="two").job_id == lease.job_id
        else:
            assert store.claim("two", TTL) is None
            assert self.states(store, lease.job_id) == ["queued", "running", state]

    @pytest.mark.parametrize("request_", ["pause", "cancel"])
    def test_until_then_it_can_be_deleted(self, store: SqlStore, request_: Any) -> None:
        lease = self.abandoned(store, request_)
        store.delete_job(lease.job_id)
        with pytest.raises(NotFound):
            store.get_job(lease.job_id)
        assert store.claim("two", TTL) is None

    def test_one_that_goes_on_elsewhere_cannot_be_deleted(self, store: SqlStore) -> None:
        lease = self.abandoned(store, None)
        with pytest.raises(Conflict):
            store.delete_job(lease.job_id)
        store.request(lease.job_id, "cancel")
        store.delete_job(lease.job_id)


class TestCandidates:
    def test_log_is_read_back_as_written(self, store: SqlStore) -> None:
        lease = started(store)
        warm = candidate(0, generation=-1, origin="warm_start", label="language", parents=())
        foreign = candidate(1, origin="user", genome=None)
        tiny = np.nextafter(np.full(SPACE.dim, 0.1), 1.0)
        written = [warm, foreign, candidate(2, genome=tiny), repeat(warm, 3)]
        store.add_candidates(lease, written)
        outcome = scored(0, [0.1 + 0.2, 1e-300], seconds={"merge": 0.5}, worker="w", violation=0.25)
        store.add_evaluation(lease, outcome)
        store.add_evaluation(lease, failed(1))
        log = store.load(lease)
        assert (log.spec, log.problem, log.elapsed_s) == (SPEC, PROBLEM, 0.0)
        assert log.evaluations == {0: outcome, 1: failed(1)}
        assert len(log.candidates) == len(written)
        for read, original in zip(log.candidates, written, strict=True):
            plain = vars(read) | {"genome": None, "recipe": dict(read.recipe)}
            assert plain == vars(original) | {"genome": None, "recipe": dict(original.recipe)}
            assert (read.genome is None) == (original.genome is None)
            if read.genome is not None and original.genome is not None:
                assert read.genome.tobytes() == original.genome.tobytes()

    def test_recipes_of_a_log(self, store: SqlStore) -> None:
        """Those to be evaluated are plain dicts; the others are read late, and travel as plain dicts too."""
        lease = started(store)
        first, second = propose(store, lease, 2)
        store.add_evaluation(lease, scored(0, [0.5, 0.5]))
        evaluated, pending = (read.recipe for read in store.load(lease).candidates)
        assert type(pending) is dict
        assert pending == second.recipe
        assert dict(evaluated) == first.recipe
        assert pickle.loads(pickle.dumps(evaluated)) == first.recipe
        assert (len(evaluated), repr(evaluated)) == (len(first.recipe), repr(dict(evaluated)))

    @pytest.mark.parametrize("indices", [[1], [0, 2], [0, 0], [1, 0]])
    def test_indices_have_no_gaps(self, store: SqlStore, indices: list[int]) -> None:
        lease = started(store)
        before = everything(store, lease.job_id)
        with pytest.raises(Conflict, match="next candidates"):
            store.add_candidates(lease, [candidate(index) for index in indices])
        assert everything(store, lease.job_id) == before

    def test_a_generation_is_all_or_nothing(self, store: SqlStore) -> None:
        lease = started(store)
        queued = store.enqueue(lease.job_id, CandidateInput(genome=[0.0] * 8))
        before = everything(store, lease.job_id)
        with pytest.raises(Conflict):
            store.add_candidates(lease, [candidate(0), repeat(candidate(5), 1)], [queued])
        with pytest.raises(Conflict, match="do not wait"):
            store.add_candidates(lease, [candidate(0)], [queued, queued + 1])
        assert everything(store, lease.job_id) == before
        assert [waiting.id for waiting in store.enqueued(lease)] == [queued]

    def test_duplicates_share_the_outcome_of_their_original(self, store: SqlStore) -> None:
        lease = started(store)
        original = propose(store, lease, 1)[0]
        store.add_candidates(lease, [repeat(original, 1)])  # before the outcome
        store.add_evaluation(lease, scored(0, [0.9, 0.1], items={"language": items([1, 0])}, seconds={"merge": 1.0}))
        store.add_candidates(lease, [repeat(original, 2), candidate(3), repeat(candidate(3), 4)])  # after it
        shown = store.list_candidates(lease.job_id).items
        assert [(c.state, c.values, c.on_front) for c in shown[:3]] == [
            ("completed", [0.9, 0.1], True),
            ("completed", [0.9, 0.1], False),
            ("completed", [0.9, 0.1], False),
        ]
        assert [c.state for c in shown[3:]] == ["pending", "pending"]
        store.add_evaluation(lease, failed(3))
        shown = store.list_candidates(lease.job_id).items
        assert [(c.state, c.failure) for c in shown[3:]] == [("failed", shown[3].failure)] * 2
        assert store.get_candidate(lease.job_id, 2).items == {"language": [1.0, 0.0]}
        progress = store.get_job(lease.job_id).progress
        assert (progress.proposed, progress.duplicates, progress.completed, progress.failed) == (5, 3, 1, 1)
        assert [c.index for c in walk(store, lease.job_id, 2, sort="value", objective="language")] == [0, 1, 2]
        assert set(store.load(lease).evaluations) == {0, 3}
        assert store.front(lease.job_id).total == 1

    @pytest.mark.parametrize("duplicate_of", [1, 2, 7])
    def test_a_duplicate_repeats_an_earlier_original(self, store: SqlStore, duplicate_of: int) -> None:
        lease = started(store)
        original = propose(store, lease, 1)[0]
        store.add_candidates(lease, [repeat(original, 1)])
        with pytest.raises(Conflict, match="repeats no original"):
            store.add_candidates(lease, [candidate(2, fingerprint=original.fingerprint, duplicate_of=duplicate_of)])

    def test_a_fingerprint_must_match(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 1)
        with pytest.raises(Conflict, match="repeats no original"):
            store.add_candidates(lease, [candidate(1, duplicate_of=0)])

    def test_one_candidate_whole(self, store: SqlStore) -> None:
        lease = started(store)
        written = propose(store, lease, 2)[1]
        scores = {"language": items([0.25, 0.75]), "polarity": items([1.5], weights=[3.0])}
        store.add_evaluation(lease, scored(1, [0.5, 1.5], items=scores, worker="w1", seconds={"merge": 0.5}))
        assert store.items(lease, 2, 5) == store.items(lease, 0, 1) == {}
        (found,) = store.items(lease, 0, 2).values()
        np.testing.assert_equal(
            {name: (part.values, part.weights) for name, part in found.items()},
            {name: (part.values, part.weights) for name, part in scores.items()},
        )
        view = store.get_candidate(lease.job_id, 1)
        assert view.genome is not None
        assert written.genome is not None
        assert view.genome == written.genome.tolist()
        assert (view.recipe, view.parents, view.worker) == (written.recipe, [0], "w1")
        assert view.items == {"language": [0.25, 0.75], "polarity": [1.5]}
        assert view.seconds == {"merge": 0.5}
        with pytest.raises(NotFound):
            store.get_candidate(lease.job_id, 2)

    def test_item_scores_are_stored_exactly(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 1)
        values = np.array([0.1, np.nan, np.inf, -0.0], dtype=np.float32)
        score = items(values.tolist(), weights=[1, 2, 3, 4])
        store.add_evaluation(lease, scored(0, [0.5, 0.5], items={"polarity": score}))
        with store.read() as session:
            row = session.scalars(select(ItemScoresRow)).one()
        assert (row.objective, row.values.tobytes()) == (1, values.tobytes())
        assert row.weights is not None
        assert row.weights.tolist() == [1, 2, 3, 4]


class TestEvaluations:
    def test_an_outcome_is_recorded_once(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 2)
        assert store.add_evaluation(lease, scored(0, [0.5, 0.5]))
        assert store.add_evaluation(lease, failed(1))
        before = everything(store, lease.job_id)
        for late in (scored(0, [0.9, 0.1]), failed(0), scored(1, [0.9, 0.1])):
            assert not store.add_evaluation(lease, late)
        assert everything(store, lease.job_id) == before

    def test_bad_outcomes_change_nothing(self, store: SqlStore) -> None:
        lease = started(store)
        original = propose(store, lease, 1)[0]
        store.add_candidates(lease, [repeat(original, 1)])
        before = everything(store, lease.job_id)
        bad: list[tuple[Evaluation, type[Exception]]] = [
            (scored(9, [0.5, 0.5]), NotFound),
            (scored(1, [0.5, 0.5]), Conflict),
            (scored(0, [0.5]), InvalidInput),
            (scored(0, [0.5, float("nan")]), InvalidInput),
            (scored(0, [0.5, float("inf")]), InvalidInput),
            (scored(0, [0.5, 0.5], violation=float("nan")), InvalidInput),
            (scored(0, [0.5, 0.5], items={"other": items([1.0])}), InvalidInput),
            (scored(0, [0.5, 0.5], failure=Failure("x", "y")), InvalidInput),
            (scored(0, [0.5, 0.5], slopes=np.zeros((2, 3, 4, 4))), InvalidInput),
            (scored(0, [0.5, 0.5], slopes=np.zeros(8)), InvalidInput),
            (Evaluation(0, None), InvalidInput),
        ]
        for outcome, error in bad:
            with pytest.raises(error):
                store.add_evaluation(lease, outcome)
            assert everything(store, lease.job_id) == before

    def test_no_outcome_before_the_start(self, store: SqlStore) -> None:
        store.create_job(make_spec(objectives=[{"name": "o", "evaluator": "e", "data": {"path": "d"}}]))
        lease = claimed(store)
        propose(store, lease, 1)
        with pytest.raises(Conflict, match="never started"):
            store.add_evaluation(lease, scored(0, [0.5]))

    @shared_store
    @given(
        outcomes=st.lists(
            st.one_of(
                st.none(),
                st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from([0.0, 0.0, 0.5])),
            ),
            min_size=1,
            max_size=12,
        ),
        seed=st.integers(0, 99),
    )
    def test_front_counters_and_best_agree_with_definitions(
        self, store: SqlStore, outcomes: list[tuple[int, int, float] | None], seed: int
    ) -> None:
        lease = started(store)
        propose(store, lease, len(outcomes))
        order = np.random.default_rng(seed).permutation(len(outcomes)).tolist()
        for index in order:
            outcome = outcomes[index]
            store.add_evaluation(
                lease, failed(index) if outcome is None else scored(index, outcome[:2], violation=outcome[2])
            )
        losses = np.array([_losses(outcome) for outcome in outcomes])
        expected = front_mask(losses)
        shown = store.list_candidates(lease.job_id).items
        assert [item.on_front for item in shown] == expected.tolist()
        view = store.get_job(lease.job_id)
        completed = sum(outcome is not None for outcome in outcomes)
        counted = (view.progress.completed, view.progress.failed, view.progress.front)
        assert counted == (completed, len(outcomes) - completed, expected.sum())
        feasible = losses[~np.isnan(losses).any(axis=1)]
        best = [None, None] if not len(feasible) else (feasible.min(axis=0) * [-1, 1]).tolist()
        assert view.best == best
        front = store.front(lease.job_id)
        assert [point.index for point in front.front] == np.flatnonzero(expected).tolist()
        assert front.total == completed
        _check_progression(store, lease.job_id, losses[order], order)

    def test_what_is_only_reported_decides_nothing(self, store: SqlStore) -> None:
        first, second = (objective.model_dump(mode="json") for objective in SPEC.objectives)
        spec = make_spec(objectives=[first, second | {"use": "report"}])
        lease = started(store, spec)
        propose(store, lease, 3)
        for index, values in enumerate([(0.5, 0.1), (0.4, 0.0), (0.6, 9.0)]):
            store.add_evaluation(lease, scored(index, values))
        front = store.front(lease.job_id)
        assert [point.index for point in front.front] == [2]
        assert [objective.use for objective in front.objectives] == ["objective", "report"]
        assert store.get_job(lease.job_id).best == [0.6, 0.0]
        assert store.progression(lease.job_id).loss == [-0.5, -0.5, -0.6]

    def test_costs_are_kept_and_added_up(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 2)
        store.add_evaluation(lease, replace(scored(0, (0.5, 0.1)), cost=Cost(items=20, tokens=300)))
        store.add_evaluation(lease, replace(failed(1), cost=Cost(requests=2, money=0.25)))
        shown = [item.cost for item in store.list_candidates(lease.job_id).items]
        assert shown == [{"items": 20, "tokens": 300}, {"requests": 2, "money": 0.25}]
        total = {"items": 20, "tokens": 300, "requests": 2, "money": 0.25}
        assert store.get_job(lease.job_id).progress.cost == total
        assert store.load(lease).evaluations[0].cost == Cost(items=20, tokens=300)


def _losses(outcome: tuple[int, int, float] | None) -> list[float]:
    if outcome is None or outcome[2] > 0:
        return [np.nan, np.nan]
    losses: list[float] = to_losses(PROBLEM.objectives, outcome[:2]).tolist()
    return losses


def _check_progression(store: SqlStore, job_id: str, losses: Any, order: list[int]) -> None:
    best, lowest, expected = np.array([np.inf, np.inf]), np.inf, []
    for index, row in zip(order, losses, strict=True):
        if (row < best).any() or row.mean() < lowest:
            best, lowest = np.fmin(best, row), min(lowest, float(row.mean()))
            expected.append((index, (best * [-1, 1]).tolist(), lowest))
    curve = store.progression(job_id)
    assert list(zip(curve.index, curve.best, curve.loss, strict=True)) == expected


class TestPages:
    @pytest.fixture
    def job_id(self, store: SqlStore) -> str:
        lease = started(store)
        store.add_candidates(lease, [candidate(i, origin="warm_start", generation=-1, label=f"s{i}") for i in range(2)])
        propose(store, lease, 8, first=2)
        for index, values in enumerate([(3, 1), (1, 2), (2, 2), (3, 3), (1, 1), (2, 0.5)]):
            store.add_evaluation(lease, scored(index, values))
        store.add_evaluation(lease, failed(6))
        return lease.job_id

    def test_order_filters_and_cursors(self, store: SqlStore, job_id: str) -> None:
        expected: list[tuple[dict[str, Any], list[int]]] = [
            ({}, [*range(10)]),
            ({"sort": "-index"}, [*range(9, -1, -1)]),
            ({"sort": "value", "objective": "language"}, [1, 4, 2, 5, 0, 3]),
            ({"sort": "-value", "objective": "language"}, [3, 0, 5, 2, 4, 1]),
            ({"sort": "value", "objective": "polarity"}, [5, 0, 4, 1, 2, 3]),
            ({"on_front": True}, [0, 5]),
            ({"on_front": False, "state": "completed"}, [1, 2, 3, 4]),
            ({"state": "failed"}, [6]),
            ({"state": "pending", "sort": "-index"}, [9, 8, 7]),
            ({"sort": "-value", "objective": "language", "on_front": True}, [0, 5]),
        ]
        for options, indices in expected:
            for limit in (1, 2, 3, 100):
                assert [item.index for item in walk(store, job_id, limit, **options)] == indices

    def test_cursor_is_stable_under_inserts(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 6)
        for index in range(4):
            store.add_evaluation(lease, scored(index, [index, 0]))
        by_value = store.list_candidates(lease.job_id, sort="-value", objective="language", limit=2)
        by_index = store.list_candidates(lease.job_id, limit=2)
        store.add_evaluation(lease, scored(4, [9, 0]))
        store.add_evaluation(lease, scored(5, [0.5, 0]))
        rest = walk_from(store, lease.job_id, by_value.next_cursor, sort="-value", objective="language")
        assert [c.index for c in by_value.items] + rest == [3, 2, 1, 5, 0]
        assert walk_from(store, lease.job_id, by_index.next_cursor) == [2, 3, 4, 5]

    def test_bad_questions(self, store: SqlStore, job_id: str) -> None:
        bad: list[tuple[dict[str, Any], str]] = [
            ({"cursor": "%%%"}, "cursor"),
            ({"cursor": "e30"}, "cursor"),
            ({"cursor": "WyJpbmRleCIsICJ4Il0"}, "cursor"),
            ({"limit": 0}, "limit"),
            ({"limit": 1001}, "limit"),
            ({"sort": "name"}, "sort"),
            ({"sort": "value"}, "objective"),
            ({"sort": "value", "objective": "none"}, "objective"),
            ({"state": "none"}, "state"),
        ]
        for options, field in bad:
            with pytest.raises(InvalidInput) as caught:
                store.list_candidates(job_id, **options)
            assert caught.value.field == field

    def test_a_cursor_of_another_order_is_refused(self, store: SqlStore, job_id: str) -> None:
        cursor = store.list_candidates(job_id, sort="value", objective="language", limit=1).next_cursor
        for options in ({}, {"sort": "-index"}, {"sort": "value", "objective": "polarity"}):
            with pytest.raises(InvalidInput):
                store.list_candidates(job_id, cursor=cursor, **options)  # type: ignore[arg-type]
        for bad in (cursor, "WyJqb2JzIiwgIngiLCAieCJd", "WyJqb2JzIiwgIjIwMjYtMDEtMDEiLCAieCJd"):
            with pytest.raises(InvalidInput):
                store.list_jobs(cursor=bad)

    def test_front_baselines_and_the_rest(self, store: SqlStore, job_id: str) -> None:
        view = store.front(job_id)
        assert [point.index for point in view.front] == [0, 5]
        assert [(point.index, point.label) for point in view.baselines] == [(0, "s0"), (1, "s1")]
        assert view.partial == []
        assert [(point.index, point.values) for point in view.dominated] == [(2, [2, 2]), (3, [3, 3]), (4, [1, 1])]
        assert [point.index for point in store.front(job_id, limit=2).dominated] == [2, 4]
        assert store.front(job_id, limit=0).dominated == []
        assert view.total == 6


def walk_from(store: SqlStore, job_id: str, cursor: str | None, **options: Any) -> list[int]:
    page = store.list_candidates(job_id, cursor=cursor, **options)
    assert page.next_cursor is None
    return [item.index for item in page.items]


class TestOrder:
    """`load` returns outcomes in the order in which they were recorded, to the last one."""

    def test_it_is_the_order_of_recording(self, store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        lease = started(store)
        now = utc_now()
        monkeypatch.setattr(outcomes, "utc_now", lambda: now)  # all within one millisecond
        propose(store, lease, 12)
        store.add_candidates(lease, [repeat(candidate(3), 12)])
        order = [7, 3, 11, 0, 1, 10, 2, 9, 8, 4, 6, 5]
        for index in order:
            outcome = failed(index) if index % 5 == 0 else scored(index, [0.5, 0.5])
            assert store.add_evaluation(lease, outcome)
            assert not store.add_evaluation(lease, outcome)
        assert list(store.load(lease).evaluations) == order

    def test_a_takeover_goes_on_behind_it(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 4)
        store.add_evaluation(lease, scored(3, [0.5, 0.5]))
        store.release(lease)
        again = claimed(store)
        for index in (2, 0):
            store.add_evaluation(again, scored(index, [0.5, 0.5]))
        assert list(store.load(again).evaluations) == [3, 2, 0]

    def test_what_older_versions_recorded_comes_first_by_index(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 6)
        for index in (4, 0, 2):
            store.add_evaluation(lease, scored(index, [0.5, 0.5]))
        with store.write() as session:
            session.execute(update(CandidateRow).values(recorded=None))
        for index in (5, 1):
            store.add_evaluation(lease, scored(index, [0.5, 0.5]))
        assert list(store.load(lease).evaluations) == [0, 2, 4, 5, 1]


class TestPartialEvaluations:
    def test_the_log_knows_phases_items_and_slopes(self, store: SqlStore) -> None:
        lease = started(store)
        written = [candidate(0), candidate(1, phase=2, items=8), candidate(2, phase=3, slopes=True, items=4)]
        store.add_candidates(lease, written)
        read = store.load(lease).candidates
        assert [(c.phase, c.items, c.slopes) for c in read] == [(0, None, False), (2, 8, False), (3, 4, True)]
        shown = store.list_candidates(lease.job_id).items
        assert [(c.phase, c.partial) for c in shown] == [(0, None), (2, 8), (3, 4)]
        view = store.get_candidate(lease.job_id, 1)
        assert (view.phase, view.partial) == (2, 8)

    def test_they_are_no_match_for_whole_ones(self, store: SqlStore) -> None:
        lease = started(store)
        store.add_candidates(
            lease,
            [
                candidate(0, items=5),
                candidate(1),
                candidate(2),
                candidate(3, items=5, origin="warm_start", label="language"),
            ],
        )
        for index, values in enumerate([(1.0, 0.0), (0.6, 0.5), (0.5, 0.6), (1.0, 0.0)]):
            store.add_evaluation(lease, scored(index, values))
        job = store.get_job(lease.job_id)
        assert (job.best, job.progress.front, job.progress.completed) == ([0.6, 0.5], 1, 4)
        curve = store.progression(lease.job_id)
        assert (curve.index, curve.best) == ([1], [[0.6, 0.5]])
        view = store.front(lease.job_id)
        assert [point.index for point in view.front] == [1]
        assert view.baselines == []
        assert [point.index for point in view.dominated] == [2]
        assert [(point.index, point.partial, point.values) for point in view.partial] == [
            (0, 5, [1.0, 0.0]),
            (3, 5, [1.0, 0.0]),
        ]
        assert [point.index for point in store.front(lease.job_id, limit=1).partial] == [0]
        assert [c.index for c in walk(store, lease.job_id, 2, sort="-value", objective="language")] == [1, 2]
        assert [c.index for c in walk(store, lease.job_id, 2, partial=True)] == [0, 3]
        assert [c.index for c in walk(store, lease.job_id, 2, partial=False)] == [1, 2]
        assert [event.data["partial"] for event in store.events(lease.job_id, 0) if "partial" in event.data] == [
            *(5, None, None, 5)
        ]
        assert store.best(lease.job_id, 9).recipes.keys() == {1}

    def test_a_recipe_may_be_measured_in_part_and_as_a_whole(self, store: SqlStore) -> None:
        lease = started(store)
        same = candidate(0).fingerprint
        store.add_candidates(
            lease,
            [
                candidate(0, items=5),
                candidate(1, fingerprint=same),
                candidate(2, fingerprint=same, items=4, duplicate_of=0),
                candidate(3, fingerprint=same, items=4, duplicate_of=1),
                candidate(4, fingerprint=same, duplicate_of=1),
            ],
        )
        store.add_evaluation(lease, scored(0, [0.9, 0.1]))
        store.add_evaluation(lease, scored(1, [0.7, 0.3]))
        store.add_candidates(lease, [candidate(5, fingerprint=same, items=5, duplicate_of=0)])
        store.add_candidates(lease, [candidate(6, fingerprint=same, items=3, duplicate_of=1)])
        shown = {c.index: c.values for c in store.list_candidates(lease.job_id).items}
        part, whole = [0.9, 0.1], [0.7, 0.3]
        assert shown == {0: part, 1: whole, 2: part, 3: whole, 4: whole, 5: part, 6: whole}
        # Sorting by value walks along what was measured on all items.
        by_value = [c.index for c in walk(store, lease.job_id, 2, sort="value", objective="language")]
        assert by_value == [1, 3, 4, 6]

    @pytest.mark.parametrize("items_", [None, 6])
    def test_an_original_must_cover_its_duplicates(self, store: SqlStore, items_: int | None) -> None:
        lease = started(store)
        original = candidate(0, items=5)
        store.add_candidates(lease, [original])
        wrong = candidate(1, fingerprint=original.fingerprint, items=items_, duplicate_of=0)
        with pytest.raises(Conflict, match="repeats no original"):
            store.add_candidates(lease, [wrong])

    def test_a_card_says_nothing_of_estimates(self, store: SqlStore) -> None:
        lease = started(store)
        store.add_candidates(lease, [candidate(0, items=5)])
        store.add_evaluation(lease, scored(0, [0.9, 0.1]))
        store.create_export(lease.job_id, 0, None)
        task = store.claim_export("worker", TTL)
        assert task is not None
        assert task.scores == {}


class TestSlopes:
    def test_they_are_read_back_as_they_were(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 3, slopes=True)
        slopes = np.random.default_rng(3).normal(size=(2, 2, 4, 4))
        slopes[0, 0, 0] = [np.nextafter(0.1, 1), -0.0, np.nan, np.inf]
        store.add_evaluation(lease, scored(1, [0.5, 0.5], slopes=slopes))
        store.add_evaluation(lease, scored(0, [0.5, 0.5]))
        assert not store.add_evaluation(lease, scored(0, [0.5, 0.5], slopes=slopes))
        read = store.load(lease).evaluations
        assert read[0].slopes is None
        found = read[1].slopes
        assert found is not None
        assert (found.shape, found.dtype, found.tobytes()) == (slopes.shape, slopes.dtype, slopes.tobytes())

    def test_they_are_a_little_endian_array(self, store: SqlStore) -> None:
        lease = started(store)
        propose(store, lease, 1, slopes=True)
        slopes = np.arange(8.0).reshape(2, 2, 1, 2)[..., ::-1]
        store.add_evaluation(lease, scored(0, [0.5, 0.5], slopes=slopes))
        table = Base.metadata.tables["slopes"]
        with store.read() as session:
            stored = session.scalar(select(type_coerce(table.c["values"], LargeBinary)))
        assert stored == slopes.astype("<f8").tobytes()


class TestProblems:
    def test_grams_are_kept_out_of_views_but_not_of_the_log(self, store: SqlStore) -> None:
        grams = Grams.pack([0, 64, 128], np.random.default_rng(0).normal(size=(2, 3, 3)))
        problem = PROBLEM.model_copy(update={"grams": grams})
        store.create_job(SPEC)
        lease = claimed(store)
        store.start(lease, problem)
        assert store.load(lease).problem == problem
        assert grams.packed not in everything(store, lease.job_id)
        with store.read() as session:
            stored = session.get_one(JobRow, lease.job_id).problem
        assert stored is not None
        assert grams.packed not in json.dumps(stored)

    def test_phases_and_which_is_under_way(self, store: SqlStore) -> None:
        spec = make_spec(phases=[{"algorithm": "random"}, {"algorithm": "cma_es", "keep_experts": 1}])
        names = ("random", "cma_es", "random")
        phases = [
            PlannedPhase(
                algorithm={"name": name, "options": {"sigma0": 0.2} if name == "cma_es" else {}},
                evaluations=5,
                why=f"because of {number}",
            )
            for number, name in enumerate(names)
        ]
        job, _ = store.create_job(spec)
        assert (job.algorithm, job.phases) == ("random → cma_es", [])
        lease = claimed(store)
        store.start(lease, make_problem(spec).model_copy(update={"phases": phases}))

        def states() -> list[str]:
            return [phase.state for phase in store.get_job(job.id).phases]

        first, second, _ = store.get_job(job.id).phases
        assert (first.algorithm, first.evaluations, first.why) == ("random", 5, "because of 0")
        assert second.options == {"sigma0": 0.2}
        assert states() == ["under_way", "waiting", "waiting"]
        store.add_candidates(lease, [candidate(0), candidate(1, phase=1)])
        assert states() == ["over", "under_way", "waiting"]
        store.set_state(lease, "completed")
        assert states() == ["over", "over", "waiting"]


class OtherOptions(Strict):
    """Options of a space that has none."""


class OtherSpace(JobSpace):
    """One without a table and without variables: its genomes are as long as they like."""

    def recipe(self, genome: Any) -> Recipe:
        if genome.size == 0:
            raise InvalidInput("an empty genome", field="genome")
        coefficients = [[float(value), 1.0 - float(value)] for value in genome]
        breaks = [8 * number for number in range(1, len(genome))]
        inputs = [Leaf(model=name) for name in self.problem.models if name != "base"]
        node = Merge(
            operator="linear", base=Leaf(model="base"), inputs=inputs, breaks=breaks, coefficients=coefficients
        )
        return Recipe(models=self.problem.models, root=node)

    def adopt(self, recipe: Recipe) -> None:
        del recipe

    def uniform(self) -> Any:
        return np.array([0.5])

    def clip(self, genome: Any) -> Any:
        return np.clip(genome, 0, 1)


@pytest.fixture
def other_space(monkeypatch: pytest.MonkeyPatch) -> str:
    assert "other" not in SPACES
    kind = SpaceKind(
        name="other",
        summary="s",
        reference="r",
        options=OtherOptions,
        make=lambda spec, problem, options: OtherSpace((), problem),
        operators=lambda options: (),
    )
    monkeypatch.setitem(SPACES._entries, "other", kind)
    return "other"


class TestOtherSpaces:
    def test_a_job_of_another_form(self, store: SqlStore, other_space: str) -> None:
        spec = make_spec(merge={"operator": "linear", "space": other_space})
        lease = started(store, spec)
        view = store.get_job(lease.job_id)
        assert (view.groups, view.columns, view.variables) == ([], [], [])
        space = make_space(spec, make_problem(spec))
        genome = np.array([0.25, 0.5, 0.75])
        recipe = space.recipe(genome)
        store.add_candidates(
            lease, [candidate(0, genome=genome, recipe=recipe.to_json(), fingerprint=recipe.fingerprint)]
        )
        assert store.get_candidate(lease.job_id, 0).genome == [0.25, 0.5, 0.75]
        assert store.enqueue(lease.job_id, CandidateInput(genome=[0.5, 0.5])) == 1
        assert store.enqueue(lease.job_id, CandidateInput(recipe=recipe.to_json())) == 2
        for wrong, field in (
            ({"coefficients": {"language": 1.0}}, "coefficients"),
            ({"recipe": {"root": {}}}, "recipe"),
        ):
            with pytest.raises(InvalidInput) as caught:
                store.enqueue(lease.job_id, CandidateInput(**wrong))
            assert str(caught.value.field).startswith(field)

    def test_an_unknown_one_does_not_start(self, store: SqlStore) -> None:
        spec = make_spec(merge={"space": "none_such"})
        store.create_job(spec)
        with pytest.raises(InvalidInput) as caught:
            store.start(claimed(store), make_problem(spec))
        assert caught.value.field == "merge.space.name"


class TestBest:
    def test_the_front_by_weighted_loss(self, store: SqlStore) -> None:
        lease = started(store)
        assert store.best(lease.job_id, 3).recipes == {}
        propose(store, lease, 3)
        store.add_candidates(lease, [candidate(3, label="greedy soup"), candidate(4)])
        for index, values in enumerate([(0.9, 0.9), (0.8, 0.1), (0.5, 0.05), (0.85, 0.3), (0.1, 0.9)]):
            store.add_evaluation(lease, scored(index, values))
        found = store.best(lease.job_id, 3)
        assert list(found.recipes) == [1, 3, 2]
        assert found.recipes[3] == candidate(3).recipe
        assert found.labels == {3: "greedy soup"}
        assert found.models == PROBLEM.models
        assert list(store.best(lease.job_id, 1).recipes) == [1]

    def test_of_a_job_that_was_never_begun(self, store: SqlStore) -> None:
        job, _ = store.create_job(SPEC)
        assert store.best(job.id, 3) == BestCandidates({}, {}, {})
        with pytest.raises(NotFound):
            store.best("none", 3)


class TestEnqueued:
    def test_from_queue_to_candidate(self, store: SqlStore) -> None:
        lease = started(store)
        wishes = [CandidateInput(coefficients={"language": 0.5}, label="a"), CandidateInput(genome=[0.1] * 8)]
        numbers = [store.enqueue(lease.job_id, wish) for wish in wishes]
        assert numbers == [1, 2]
        waiting = store.enqueued(lease)
        assert [(item.id, item.candidate) for item in waiting] == list(zip(numbers, wishes, strict=True))
        store.add_candidates(lease, [candidate(0, origin="user")], taken=[1])
        store.reject_enqueued(lease, 2, Failure("invalid_input", "outside the bounds"))
        assert store.enqueued(lease) == []
        with pytest.raises(Conflict):
            store.reject_enqueued(lease, 2, Failure("invalid_input", "again"))
        with pytest.raises(Conflict):
            store.add_candidates(lease, [candidate(1)], taken=[1])
        assert store.enqueue(lease.job_id, wishes[0]) == 3

    def test_before_the_job_runs_but_not_after(self, store: SqlStore) -> None:
        job, _ = store.create_job(SPEC)
        assert store.enqueue(job.id, CandidateInput(genome=[0.0] * 8)) == 1
        store.request(job.id, "cancel")
        with pytest.raises(Conflict):
            store.enqueue(job.id, CandidateInput(genome=[0.0] * 8))

    def test_what_the_space_does_not_have_is_refused_once_the_job_is_prepared(self, store: SqlStore) -> None:
        lease = started(store)
        for wrong in (CandidateInput(genome=[0.0]), CandidateInput(genome=[9.0] * 8)):
            with pytest.raises(InvalidInput):
                store.enqueue(lease.job_id, wrong)
        recipe = make_space(SPEC, PROBLEM).recipe(np.full(8, 0.5)).to_json()
        recipe["root"]["options"] = {"no_such": 1}
        with pytest.raises(InvalidInput) as caught:
            store.enqueue(lease.job_id, CandidateInput(recipe=recipe))
        assert caught.value.field == "recipe.root.options.no_such"
        assert store.enqueued(lease) == []


class TestEvents:
    def test_everything_is_told_in_order(self, store: SqlStore) -> None:
        lease = started(store)
        store.add_candidates(lease, [candidate(i, origin="warm_start", generation=-1) for i in range(2)])
        store.add_candidates(lease, [candidate(2, generation=0), candidate(3, generation=0, phase=1, label="soup")])
        store.add_evaluation(lease, scored(1, [0.5, 0.25]))
        store.enqueue(lease.job_id, CandidateInput(genome=[0.0] * 8))
        store.reject_enqueued(lease, 1, Failure("invalid_input", "too short"))
        export = store.create_export(lease.job_id, 1, "language")
        store.set_state(lease, "failed", "why")
        told = store.events(lease.job_id, 0)
        assert [(event.type, event.data) for event in told] == [
            ("job.state", {"state": "queued", "reason": None}),
            ("job.state", {"state": "running", "reason": None}),
            ("candidates.proposed", {"first": 0, "count": 2, "phase": 0, "generation": -1, "origin": "warm_start"}),
            ("candidates.proposed", {"first": 2, "count": 1, "phase": 0, "generation": 0, "origin": "algorithm"}),
            ("candidates.proposed", {"first": 3, "count": 1, "phase": 1, "generation": 0, "origin": "algorithm"}),
            (
                "candidate.evaluated",
                {
                    "index": 1,
                    "state": "completed",
                    "values": [0.5, 0.25],
                    "violation": 0.0,
                    "on_front": True,
                    "label": None,
                    "partial": None,
                    "stopped": False,
                    "errors": None,
                    "progress": store.get_job(lease.job_id).progress.model_dump(mode="json"),
                },
            ),
            ("candidate.enqueued", {"queued": 1}),
            ("candidate.rejected", {"queued": 1, "code": "invalid_input", "message": "too short"}),
            (
                "export.progress",
                {"export_id": export.id, "candidate": 1, "state": "queued", "progress": 0.0, "path": None},
            ),
            ("job.state", {"state": "failed", "reason": "why"}),
        ]
        ids = [event.id for event in told]
        assert ids == sorted(set(ids))
        assert [event.id for event in store.events(lease.job_id, ids[2], limit=3)] == ids[3:6]

    def test_one_job_or_all(self, store: SqlStore) -> None:
        first, second = (store.create_job(SPEC)[0].id for _ in range(2))
        store.request(first, "pause")
        assert [event.job_id for event in store.events(None, 0)] == [first, second, first]
        assert [event.data["state"] for event in store.events(first, 0)] == ["queued", "paused"]

    def test_a_takeover_is_noted(self, store: SqlStore) -> None:
        lease = started(store)
        store.release(lease)
        claimed(store, owner="two")
        last = store.events(lease.job_id, 0)[-1]
        assert (last.type, last.data["message"].split()[0]) == ("job.note", "two")

    def test_ids_are_never_used_again(self, store: SqlStore) -> None:
        gone, _ = store.create_job(SPEC)
        seen = store.events(None, 0)[-1].id
        store.delete_job(gone.id)
        store.create_job(SPEC)
        assert [event.id > seen for event in store.events(None, 0)] == [True]

    def test_requests_without_effect_tell_nothing(self, store: SqlStore) -> None:
        job, _ = store.create_job(SPEC)
        store.request(job.id, "pause")
        before = store.events(job.id, 0)
        store.request(job.id, "pause")
        assert store.events(job.id, 0) == before


class TestExports:
    @pytest.fixture
    def job_id(self, store: SqlStore) -> str:
        lease = started(store)
        original = propose(store, lease, 3)[0]
        store.add_candidates(lease, [repeat(original, 3)])
        store.add_evaluation(lease, scored(0, [0.75, 0.5]))
        store.add_evaluation(lease, failed(1))
        return lease.job_id

    def test_only_what_has_scores(self, store: SqlStore, job_id: str) -> None:
        for index in (1, 2):
            with pytest.raises(Conflict) as caught:
                store.create_export(job_id, index, None)
            assert caught.value.field == "candidate"
        with pytest.raises(NotFound):
            store.create_export(job_id, 9, None)
        with pytest.raises(InvalidInput) as refused:
            store.create_export(job_id, 0, "nobody")
        assert refused.value.field == "head"
        assert store.list_exports(job_id) == []

    def test_from_queue_to_directory(self, store: SqlStore, job_id: str) -> None:
        first, second = (store.create_export(job_id, index, head) for index, head in ((0, "language"), (3, None)))
        assert [view.id for view in store.list_exports(job_id)] == [second.id, first.id]
        task = store.claim_export("worker", TTL)
        assert task is not None
        assert (task.id, task.candidate, task.head) == (first.id, 0, "language")
        assert (task.recipe, task.spec) == (candidate(0).recipe, SPEC)
        assert task.scores == {"language": 0.75, "polarity": 0.5}
        store.update_export(task, state="running", progress=0.5, ttl_s=TTL)
        assert store.get_export(first.id).progress == 0.5
        store.update_export(task, state="completed", progress=1.0, ttl_s=TTL, path="exports/x")
        done = store.get_export(first.id)
        assert (done.state, done.path, done.finished_at is not None) == ("completed", "exports/x", True)
        with pytest.raises(LeaseLost):
            store.update_export(task, state="running", progress=0.1, ttl_s=TTL)
        other = store.claim_export("worker", TTL)
        assert other is not None
        assert (other.id, other.scores) == (second.id, task.scores)
        store.update_export(other, state="failed", progress=0.3, ttl_s=TTL, error={"code": "full", "message": "disk"})
        assert store.get_export(second.id).error == {"code": "full", "message": "disk"}
        assert store.claim_export("worker", TTL) is None

    def test_an_expired_claim_is_taken_over_and_fenced(self, store: SqlStore, job_id: str) -> None:
        store.create_export(job_id, 0, None)
        stale = store.claim_export("one", 0)
        fresh = store.claim_export("two", TTL)
        assert stale is not None
        assert fresh is not None
        assert fresh.token > stale.token
        before = store.get_export(fresh.id)
        with pytest.raises(LeaseLost):
            store.update_export(stale, state="completed", progress=1.0, ttl_s=TTL, path="elsewhere")
        assert store.get_export(fresh.id) == before
        store.update_export(fresh, state="completed", progress=1.0, ttl_s=TTL, path="here")


class TestDeletion:
    def test_nothing_is_left(self, store: SqlStore) -> None:
        lease = started(store)
        original = propose(store, lease, 2)[0]
        store.add_candidates(lease, [repeat(original, 2)])
        store.add_evaluation(
            lease,
            scored(0, [0.5, 0.5], items={"language": items([1.0])}, slopes=np.ones((2, 2, 1, 4))),
            [Remembered("m", "f", bytes(16), items([1.0]))],
        )
        store.begin_verification(lease, [0])
        store.add_verification(lease, Verification(0, items={"language": items([1.0])}))
        store.enqueue(lease.job_id, CandidateInput(genome=[0.0] * 8))
        store.create_export(lease.job_id, 0, None)
        task = store.claim_export("worker", TTL)
        assert task is not None
        with pytest.raises(Conflict):
            store.delete_job(lease.job_id)
        assert len(store.list_exports(lease.job_id)) == 1
        store.set_state(lease, "completed")
        with store.read() as session:
            filled = {name for name, table in Base.metadata.tables.items() if session.scalar(_count(table))}
        assert filled == set(Base.metadata.tables) - {"tokens"}
        store.delete_job(lease.job_id)
        with store.read() as session:
            assert [name for name, table in Base.metadata.tables.items() if session.scalar(_count(table))] == []
        with pytest.raises(LeaseLost):
            store.update_export(task, state="running", progress=0.5, ttl_s=TTL)

    def test_other_jobs_stay(self, store: SqlStore) -> None:
        kept, gone = started(store), started(store)
        for lease in (kept, gone):
            propose(store, lease, 1)
        before = everything(store, kept.job_id)
        store.set_state(gone, "completed")
        store.delete_job(gone.job_id)
        assert everything(store, kept.job_id) == before

    def test_not_while_a_controller_prepares_it(self, store: SqlStore) -> None:
        job, _ = store.create_job(SPEC)
        claimed(store)
        with pytest.raises(Conflict):
            store.delete_job(job.id)


def _count(table: Any) -> Any:
    return select(func.count()).select_from(table)


class TestTokens:
    def test_life_of_a_token(self, store: SqlStore) -> None:
        assert not store.has_tokens()
        view, secret = store.create_token("laptop")
        assert secret.startswith("mo_")
        assert store.has_tokens()
        used = store.check_token(secret)
        assert used is not None
        assert (used.id, used.name) == (view.id, "laptop")
        assert store.list_tokens()[0].last_used_at is not None
        for wrong in ("", secret + "x", secret[:-1], "mo_", "\ud800"):
            assert store.check_token(wrong) is None
        store.delete_token(view.id)
        assert store.check_token(secret) is None
        assert not store.has_tokens()

    def test_an_expired_token_is_none(self, store: SqlStore) -> None:
        _, secret = store.create_token("short", ttl_s=1e-6)
        assert store.check_token(secret) is None
        assert not store.has_tokens()
        assert len(store.list_tokens()) == 1

    def test_the_secret_is_not_stored(self, store: SqlStore) -> None:
        _, secret = store.create_token("laptop")
        with store.read() as session:
            stored = session.execute(select(Base.metadata.tables["tokens"])).one()
        assert secret.removeprefix("mo_") not in json.dumps(list(stored), default=str)

    def test_use_is_recorded_once_a_minute(self, store: SqlStore) -> None:
        _, secret = store.create_token("laptop")
        first, second = store.check_token(secret), store.check_token(secret)
        assert first is not None
        assert second is not None
        assert store.list_tokens()[0].last_used_at == second.last_used_at == first.last_used_at

    def test_bad_lifetimes(self, store: SqlStore) -> None:
        for ttl_s in (0, -1, float("nan"), 1e300):
            with pytest.raises(InvalidInput):
                store.create_token("laptop", ttl_s)


class TestCommitHook:
    def test_it_is_called_around_every_commit_of_the_controller(self, database_url: str) -> None:
        calls: list[str] = []
        store = SqlStore(database_url, on_commit=calls.append)
        lease = started(store)
        propose(store, lease, 1)
        store.add_evaluation(lease, scored(0, [0.5, 0.5]))
        store.renew(lease, TTL, 1.0)
        store.enqueue(lease.job_id, CandidateInput(genome=[0.0] * 8))
        store.reject_enqueued(lease, 1, Failure("x", "y"))
        store.set_state(lease, "completed")
        store.close()
        operations = ["claim", "start", "add_candidates", "add_evaluation", "renew", "reject_enqueued", "set_state"]
        assert calls == [f"{when}:{operation}" for operation in operations for when in ("before", "after")]

    def test_raising_before_the_commit_rolls_back(self, database_url: str) -> None:
        class CrashError(Exception):
            pass

        def crash(boundary: str) -> None:
            if boundary == "before:add_candidates":
                raise CrashError

        store = SqlStore(database_url, on_commit=crash)
        lease = started(store)
        before = everything(store, lease.job_id)
        with pytest.raises(CrashError):
            propose(store, lease, 1)
        assert everything(store, lease.job_id) == before
        store.close()
