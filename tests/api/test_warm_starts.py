"""A job that begins where others ended: what is taken over, under which names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from api.service import open_store, run_job
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import JobView
from api.warm_starts import MOST
from optimizer.errors import InvalidInput
from optimizer.recipe import Recipe
from optimizer.space import make_space
from optimizer.spec import JobSpec
from tests.api.conftest import Runner, fill, spec_json
from tests.api.test_errors import check_error
from tests.factories import make_problem, make_spec
from tests.jobs import write_job
from tests.workers.models import tiny_bert


def submitted(http: httpx.Client, *jobs: str, **changes: Any) -> JobSpec:
    """Submit a job that begins with others, and return its spec as stored."""
    spec = spec_json(**{"warm_starts": {"jobs": list(jobs)}, **changes})
    response = http.post("/jobs", json=spec)
    assert response.status_code == 201, response.text
    return JobSpec.model_validate(response.json()["spec"])


def test_the_front_becomes_candidates_of_the_new_job(http: httpx.Client, store: SqlStore, job: JobView) -> None:
    mine = {"label": "mine", "coefficients": {"language": 0.5}}
    spec = submitted(http, job.id, warm_starts={"jobs": [job.id], "candidates": [mine], "uniform": False})
    starts = spec.warm_starts
    # By weighted mean loss: 2 has 0.8 and 0.2, 0 has 0.9 and 0.5.
    labels = [f"job {job.id[:4]}… candidate {index}" for index in (2, 0)]
    assert [candidate.label for candidate in starts.candidates] == ["mine", *labels]
    assert (starts.jobs, starts.uniform) == ([], False)
    store.delete_job(job.id)  # the new one has all it needs
    space = make_space(spec, make_problem(spec))
    for candidate in starts.candidates[1:]:
        _, recipe = space.encode(candidate)
        assert space.adopt(recipe) is not None


def test_the_recipes_are_the_same_merges(http: httpx.Client, store: SqlStore, job: JobView) -> None:
    spec = submitted(http, job.id)
    for candidate, index in zip(spec.warm_starts.candidates, (2, 0), strict=True):
        original = Recipe.parse(store.get_candidate(job.id, index).recipe)
        assert Recipe.parse(candidate.recipe).fingerprint == original.fingerprint


def test_names_may_differ(http: httpx.Client, store: SqlStore, job: JobView) -> None:
    renamed = [
        {"name": new, "path": f"models/{old}"}
        for new, old in (("one", "polarity"), ("two", "language"), ("more", "more"))
    ]
    objectives = make_spec().model_dump(mode="json", exclude_unset=True)["objectives"]
    for objective in objectives:
        del objective["head"]
    spec = submitted(http, job.id, experts=renamed, objectives=objectives)
    recipe = Recipe.parse(spec.warm_starts.candidates[0].recipe)
    original = Recipe.parse(store.get_candidate(job.id, 2).recipe)
    assert set(recipe.models) == {"base", "one", "two"}
    assert [child.model for child in recipe.root.inputs] == ["two", "one"]  # type: ignore[union-attr]
    assert recipe.fingerprint == original.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": [{"name": name, "path": f"models/{name}"} for name in ("language", "other")]}, "'polarity'"),
        ({"base": "models/elsewhere"}, "'base'"),
    ],
)
def test_other_models_are_refused(http: httpx.Client, job: JobView, changes: dict[str, Any], message: str) -> None:
    objectives = [{"name": "o", "evaluator": "e", "data": {"path": "d"}}]
    spec = spec_json(warm_starts={"jobs": [job.id]}, objectives=objectives, **changes)
    for path in ("/jobs", "/jobs/validate"):
        error = check_error(http.post(path, json=spec), 422, "invalid_input")
        assert error.field == "warm_starts.jobs.0"
        assert message in error.message
        assert "same checkpoints" in (error.remedy or "")


def test_unknown_and_empty_jobs_are_named(http: httpx.Client, job: JobView, queued: JobView) -> None:
    for other, message in (("nothing", "no job 'nothing'"), (queued.id, "no candidate")):
        response = http.post("/jobs", json=spec_json(warm_starts={"jobs": [job.id, other]}))
        error = check_error(response, 422, "invalid_input")
        assert error.field == "warm_starts.jobs.1"
        assert message in error.message
    assert len(http.get("/jobs").json()["items"]) == 2


@pytest.mark.parametrize("state", ["running", "paused", "cancelled", "failed"])
def test_jobs_in_any_state_will_do(http: httpx.Client, store: SqlStore, queued: JobView, state: str) -> None:
    runner = Runner(store, queued.id)
    runner.propose(3)
    runner.score(1, 0.5, 0.5)
    if state != "running":
        runner.finish(state)
    labels = [candidate.label for candidate in submitted(http, queued.id).warm_starts.candidates]
    assert labels == [f"job {queued.id[:4]}… candidate 1"]


def test_only_the_best_of_a_long_front_and_each_merge_once(
    http: httpx.Client, store: SqlStore, queued: JobView
) -> None:
    runner = Runner(store, queued.id)
    runner.propose(MOST + 10)
    for index in range(MOST + 10):
        runner.score(index, 0.02 * index, 0.01 * index)  # less loss of the second costs accuracy of the first
    spec = submitted(http, queued.id, queued.id)
    taken = [candidate.label for candidate in spec.warm_starts.candidates]
    assert taken == [f"job {queued.id[:4]}… candidate {index}" for index in range(MOST + 9, 9, -1)]


def test_labels_say_what_the_candidate_was_called(http: httpx.Client, store: SqlStore, queued: JobView) -> None:
    runner = Runner(store, queued.id)
    runner.propose(1, label="greedy soup")
    runner.score(0, 0.5, 0.5)
    (candidate,) = submitted(http, queued.id).warm_starts.candidates
    assert candidate.label == f"job {queued.id[:4]}… candidate 0 (greedy soup)"


def test_another_granularity_is_a_merge_all_the_same(http: httpx.Client, store: SqlStore) -> None:
    job = fill(store, merge={"granularity": {"modules": [["mlp"]]}})
    recipe = store.get_candidate(job.id, 2).recipe
    assert len(recipe["root"]["groups"]) == 8
    assert len(submitted(http, job.id).warm_starts.candidates) == 2


def test_more_than_fit_are_refused(http: httpx.Client, job: JobView) -> None:
    many = [{"coefficients": {"language": number / 1000}} for number in range(999)]
    response = http.post("/jobs", json=spec_json(warm_starts={"jobs": [job.id], "candidates": many}))
    assert check_error(response, 422, "invalid_input").field == "warm_starts.candidates"


def test_a_clone_keeps_them(http: httpx.Client, store: SqlStore, job: JobView) -> None:
    first = http.post("/jobs", json=spec_json(warm_starts={"jobs": [job.id]})).json()
    store.delete_job(job.id)
    clone = http.post(f"/jobs/{first['id']}/clone", json={"changes": {"seed": 9}}).json()
    assert clone["spec"]["warm_starts"] == first["spec"]["warm_starts"]


def test_a_clone_may_name_jobs(http: httpx.Client, job: JobView) -> None:
    changes = {"warm_starts": {"jobs": [job.id]}}
    clone = http.post(f"/jobs/{job.id}/clone", json={"changes": changes}).json()
    assert len(clone["spec"]["warm_starts"]["candidates"]) == 2


def test_real_checkpoints_are_compared_by_their_weights(tmp_path: Path) -> None:
    """Two searches in this process: the second has other names, and in the end another expert."""
    job = write_job(tmp_path, items=8, budget={"evaluations": 5})
    settings = Settings(home=tmp_path / "home", roots=[tmp_path], pool="local", poll_s=0.02)
    first = run_job(settings, JobSpec.model_validate(job), lambda _: None)
    renamed = JobSpec.model_validate(
        job
        | {
            "experts": [{"name": f"my-{name}", "path": f"models/{name}"} for name in ("shape", "colour")],
            "objectives": [one | {"head": f"my-{one['head']}"} for one in job["objectives"]],
            "warm_starts": {"jobs": [first.id], "base": False, "experts": False, "uniform": False},
        }
    )
    second = run_job(settings, renamed, lambda _: None)
    assert (first.state, second.state) == ("completed", "completed")
    store = open_store(settings)
    front = [store.get_candidate(first.id, point.index) for point in store.front(first.id).front]
    taken = [one for one in store.list_candidates(second.id).items if one.origin == "user"]
    assert {one.fingerprint for one in taken} == {one.fingerprint for one in front}
    values = {one.fingerprint: one.values for one in front}
    for one in taken:
        assert one.values == pytest.approx(values[one.fingerprint], rel=1e-5)
    store.close()
    tiny_bert(tmp_path / "models" / "shape", labels=2, seed=99)
    with pytest.raises(InvalidInput, match="does not have") as caught:
        run_job(settings, renamed, lambda _: None)
    assert caught.value.field == "warm_starts.jobs.0"
