"""Bad input, over real HTTP against the real checks: a clear error that names the field, and nothing recorded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from optimizer.space import make_space
from optimizer.spec import parse_spec
from tests.jobs import write_job
from tests.service import Service
from tests.workers.models import tiny_bert, tiny_llama
from workers.prepare import prepare
from workers.roots import Roots

Job = dict[str, Any]
Spoil = Callable[[Job, Path], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path, Job]]:
    """An API process over a fresh SQLite, its root, and a good job."""
    folder = tmp_path_factory.mktemp("bad")
    root = folder / "root"
    job = write_job(root)
    upgrade(folder / "home")
    with Service(folder / "home", root, "api") as service:
        service.wait_ready()
        with httpx.Client(base_url=f"http://127.0.0.1:{service.port}/api/v1", timeout=60) as http:
            yield http, root, job


def upgrade(home: Path) -> None:
    import migrations

    home.mkdir(parents=True)
    migrations.upgrade(f"sqlite:///{home}/mergeopt.db")


def copy_model(root: Path, name: str) -> Path:
    """A copy of an expert to spoil."""
    target = root / "models" / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(root / "models" / "shape", target)
    return target


# --- what can be wrong with a job -------------------------------------------------------------------------------------


def missing_checkpoint(job: Job, root: Path) -> None:
    job["experts"][1]["path"] = "models/nowhere"


def truncated_checkpoint(job: Job, root: Path) -> None:
    weights = copy_model(root, "truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    job["experts"][1]["path"] = "models/truncated"


def not_safetensors(job: Job, root: Path) -> None:
    (copy_model(root, "noise") / "model.safetensors").write_bytes(b"\xff" * 4096)
    job["experts"][1]["path"] = "models/noise"


def pickle_checkpoint(job: Job, root: Path) -> None:
    folder = copy_model(root, "pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    job["experts"][1]["path"] = "models/pickle"


def outside_the_roots(job: Job, root: Path) -> None:
    tiny_bert(root.parent / "outside", labels=2)
    job["experts"][1]["path"] = str(root.parent / "outside")


def outside_by_dots(job: Job, root: Path) -> None:
    outside_the_roots(job, root)
    job["experts"][1]["path"] = "models/../../outside"


def outside_by_link(job: Job, root: Path) -> None:
    outside_the_roots(job, root)
    link = root / "models" / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(root.parent / "outside")
    job["experts"][1]["path"] = "models/link"


def another_architecture(job: Job, root: Path) -> None:
    tiny_llama(root / "models" / "llama")
    job["experts"][1]["path"] = "models/llama"


def other_shapes(job: Job, root: Path) -> None:
    tiny_bert(root / "models" / "deep", labels=2, layers=3)
    job["experts"][1]["path"] = "models/deep"


def unknown_tensor(job: Job, root: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = copy_model(root, "extra") / "model.safetensors"
    save_file(load_file(weights) | {"bert.extra.weight": torch.ones(2)}, weights, metadata={"format": "pt"})
    job["experts"][1]["path"] = "models/extra"


def empty_data(job: Job, root: Path) -> None:
    (root / "data" / "empty.jsonl").write_text("")
    job["objectives"][1]["data"]["path"] = "data/empty.jsonl"


def malformed_data(job: Job, root: Path) -> None:
    (root / "data" / "malformed.jsonl").write_text('{"text": "w1", "label": 0}\n{"text": \n')
    job["objectives"][1]["data"]["path"] = "data/malformed.jsonl"


def wrong_columns(job: Job, root: Path) -> None:
    job["objectives"][1]["data"]["columns"] = {"text": "sentence"}


def label_out_of_range(job: Job, root: Path) -> None:
    (root / "data" / "labels.jsonl").write_text('{"text": "w1", "label": 0}\n{"text": "w2", "label": 7}\n')
    job["objectives"][1]["data"]["path"] = "data/labels.jsonl"


def unknown_metric(job: Job, root: Path) -> None:
    job["objectives"][1]["metric"] = "beauty"


def unknown_evaluator(job: Job, root: Path) -> None:
    job["objectives"][1]["evaluator"] = "oracle"


def unknown_operator(job: Job, root: Path) -> None:
    job["merge"]["operator"] = "blend"


def bad_operator_option(job: Job, root: Path) -> None:
    job["merge"] |= {"operator": "ties", "options": {"density": 7}}


def unknown_algorithm(job: Job, root: Path) -> None:
    job["algorithm"] = {"name": "magic"}


def bad_algorithm_option(job: Job, root: Path) -> None:
    job["algorithm"] = {"name": "cma_es", "options": {"sigma0": -1}}


def no_budget(job: Job, root: Path) -> None:
    job["budget"] = {"evaluations": 0}


def reversed_bounds(job: Job, root: Path) -> None:
    job["merge"]["bounds"] = {"low": 1.0, "high": 0.0}


def unknown_key(job: Job, root: Path) -> None:
    job["workers"] = {"cores": 3}


def missing_head(job: Job, root: Path) -> None:
    del job["objectives"][1]["head"]


def too_many_experts(job: Job, root: Path) -> None:
    job["merge"]["operator"] = "slerp"
    job["experts"].append({"name": "third", "path": "models/shape"})


def bad_warm_start(job: Job, root: Path) -> None:
    job["warm_starts"] = {"candidates": [{"coefficients": {"nobody": 1.0}}]}


def bad_warm_recipe(job: Job, root: Path) -> None:
    recipe = good_recipe(job, root)
    recipe["root"]["operator"] = "blend"
    job["warm_starts"] = {"candidates": [{"recipe": recipe}]}


def good_recipe(job: Job, root: Path) -> Any:
    """The uniform merge of a job, as a candidate's page shows it."""
    spec = parse_spec(job)
    space = make_space(spec, prepare(spec, Roots([root])))
    return space.recipe(space.uniform()).to_json()


CASES: list[tuple[Spoil, str, str]] = [
    (missing_checkpoint, "experts.1.path", "does not exist"),
    (truncated_checkpoint, "experts.1", "model.safetensors"),
    (not_safetensors, "experts.1", "model.safetensors"),
    (pickle_checkpoint, "experts.1", "pickle"),
    (outside_the_roots, "experts.1.path", "outside"),
    (outside_by_dots, "experts.1.path", "outside"),
    (outside_by_link, "experts.1.path", "outside"),
    (another_architecture, "experts", "llama"),
    (other_shapes, "experts", "layer.2"),
    (unknown_tensor, "experts", "extra.weight"),
    (empty_data, "objectives.1.data.path", "no rows"),
    (malformed_data, "objectives.1.data.path", "line 2"),
    (wrong_columns, "objectives.1.data.columns.text", "sentence"),
    (label_out_of_range, "objectives.1.data", "7"),
    (unknown_metric, "objectives.1.metric", "beauty"),
    (unknown_evaluator, "objectives.1.evaluator", "oracle"),
    (unknown_operator, "merge.operator", "blend"),
    (bad_operator_option, "merge.options.density", "less than or equal to 1"),
    (unknown_algorithm, "algorithm.name", "magic"),
    (bad_algorithm_option, "algorithm.options.sigma0", "greater than 0"),
    (no_budget, "budget.evaluations", "greater than or equal to 1"),
    (reversed_bounds, "merge.bounds", "swap"),
    (unknown_key, "workers.cores", "not permitted"),
    (missing_head, "objectives.1.head", "head"),
    (too_many_experts, "experts", "slerp"),
    (bad_warm_start, "warm_starts.candidates.0.coefficients", "nobody"),
    (bad_warm_recipe, "warm_starts.candidates.0", "blend"),
]


@pytest.mark.parametrize(("spoil", "field", "says"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_bad_job_is_refused_by_field_and_leaves_nothing(
    world: tuple[httpx.Client, Path, Job], spoil: Spoil, field: str, says: str
) -> None:
    http, root, good = world
    job = copy.deepcopy(good)
    spoil(job, root)
    for route in ("/jobs/validate", "/jobs"):
        answer = http.post(route, json=job)
        assert answer.status_code == 422, answer.text
        error = answer.json()["error"]
        assert (error["field"] or "").startswith(field), error
        assert says.lower() in json.dumps(error).lower(), error
        assert error["remedy"] or error["problems"], error
    assert http.get("/jobs").json()["items"] == []


def test_the_good_job_is_valid(world: tuple[httpx.Client, Path, Job]) -> None:
    http, _, good = world
    answer = http.post("/jobs/validate", json=good)
    assert answer.status_code == 200, answer.text
    assert answer.json()["valid"] is True


def test_a_recipe_may_be_a_warm_start(world: tuple[httpx.Client, Path, Job]) -> None:
    http, root, good = world
    job = good | {"warm_starts": {"candidates": [{"recipe": good_recipe(good, root), "label": "mine"}]}}
    answer = http.post("/jobs/validate", json=job)
    assert answer.status_code == 200, answer.text


def test_an_oversized_spec_is_refused_unread(world: tuple[httpx.Client, Path, Job]) -> None:
    http, _, good = world
    answer = http.post("/jobs", json=good | {"name": "x" * 10_000_000})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_unknown_things_and_wrong_tokens(world: tuple[httpx.Client, Path, Job]) -> None:
    http, _, _ = world
    assert http.get("/jobs/nope").json()["error"]["code"] == "not_found"
    assert http.post("/jobs/nope/exports", json={"candidate": 0}).status_code == 404
    wrong = http.get("/jobs", headers={"Authorization": "Bearer mo_wrong"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "unauthorized")
