"""Hostile recipes and uploads: each is refused by a typed error that names the field, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from api.endpoint.offer import all_experts, parse_offer
from optimizer.errors import InvalidCheckpoint, InvalidInput, PathNotAllowed
from tests.api.endpoint.conftest import (
    ADAPTERS,
    ITEMS,
    LABELS,
    Endpoint,
    error,
    evaluate,
    make_recipe,
    make_rows,
    materialise,
    offer_data,
    open_session,
    repository,
    running,
)
from workers.roots import Roots

GUARDED: dict[str, Any] = {
    "operators": ["linear", "task_arithmetic"],
    "max_share": 0.9,
    "limits": {"numbers": 50, "nodes": 3},
}


@pytest.fixture(scope="module")
def guarded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An endpoint whose owner allows little."""
    with running(models, tmp_path_factory.mktemp("guarded"), **GUARDED) as found:
        yield found


@pytest.fixture
def strict(guarded: Endpoint) -> Any:
    """A client of it."""
    with guarded.http() as client:
        yield client


def refused(http: httpx.Client, recipe: Any) -> tuple[int, str, str | None]:
    """Send a recipe that must be refused, and look that nothing of it is kept."""
    session = open_session(http)
    answer = http.post(f"{session}/candidates", json={"recipe": recipe})
    assert http.get(session).json()["candidates"] == 0
    http.delete(session)
    return error(answer)


def leaf(view: Any, name: str) -> dict[str, Any]:
    return {"models": make_recipe(view, 1.0)["models"], "root": {"model": name}}


def chain(view: Any, length: int) -> dict[str, Any]:
    """So many merges inside each other."""
    recipe = make_recipe(view, 0.5, 0.5)
    root: dict[str, Any] = recipe["root"]
    for _ in range(length - 1):
        root = root | {"base": root}
    return recipe | {"root": root}


def test_what_the_owner_does_not_evaluate(strict: httpx.Client) -> None:
    view = repository(strict)
    good = make_recipe(view, 0.5, 0.5)
    assert refused(strict, make_recipe(view, 0.5, 0.5, operator="ties")) == (422, "not_offered", "recipe.root.operator")
    assert refused(strict, leaf(view, "a1")) == (422, "not_offered", "recipe.root")
    assert refused(strict, leaf(view, "base")) == (422, "not_offered", "recipe.root")
    assert refused(strict, make_recipe(view, 1.0)) == (422, "not_offered", "recipe.root")
    assert refused(strict, make_recipe(view, 1.0, 0.05)) == (422, "not_offered", "recipe.root")
    assert refused(strict, make_recipe(view)) == (422, "not_offered", "recipe.root")
    planned = good | {"layers": [{"layer": 0}, {"layer": 1}]}
    assert refused(strict, planned) == (422, "not_offered", "recipe.layers")
    moved = make_recipe(view, 0.5, 0.5, base={"model": "base", "layer": 0})
    assert refused(strict, moved) == (422, "not_offered", "recipe.root")
    calibrated = good | {
        "calibration": {"base": {"spec": {"evaluator": "x", "data": {"path": "/etc"}}, "digest": "0" * 64}}
    }
    assert refused(strict, calibrated) == (422, "not_offered", "recipe.calibration")
    assert refused(strict, chain(view, 5)) == (422, "not_offered", "recipe.root")


def test_a_mixture_within_the_rules_is_evaluated(strict: httpx.Client) -> None:
    session = open_session(strict)
    view = evaluate(strict, session, materialise(strict, session, make_recipe(repository(strict), 1.0, 0.2)))
    assert view["state"] == "done"


def test_models_that_are_not_the_owners(strict: httpx.Client) -> None:
    view = repository(strict)
    good = make_recipe(view, 0.5, 0.5)
    unknown = good | {"models": good["models"] | {"passwd": {"ref": {"path": "/etc/passwd"}, "digest": "0" * 64}}}
    assert refused(strict, unknown) == (422, "invalid_input", "recipe.models.passwd")
    other = good | {"models": good["models"] | {"a1": {"ref": {"path": "a1"}, "digest": "1" * 64}}}
    assert refused(strict, other) == (409, "conflict", "recipe.models.a1")
    unlisted = make_recipe(view, 0.5, 0.5, base={"model": "nobody"})
    assert refused(strict, unlisted)[:2] == (422, "invalid_input")


def test_recipes_of_absurd_size(strict: httpx.Client) -> None:
    view = repository(strict)
    groups = [{"positions": [0]}] * 60
    wide = make_recipe(view, groups=groups, coefficients=[[0.5] * ADAPTERS] * 60)
    assert refused(strict, wide) == (422, "not_offered", "recipe.root")
    deep = chain(view, 200)
    assert refused(strict, deep)[:2] == (422, "invalid_input")
    assert refused(strict, make_recipe(view, 1e308, 1e308))[:2] == (422, "invalid_input")
    assert refused(strict, make_recipe(view, coefficients=[[]]))[:2] == (422, "invalid_input")


@pytest.mark.parametrize(
    "recipe",
    [
        None,
        [],
        "model",
        {},
        {"root": {}},
        {"models": {}, "root": {"model": "base"}},
        {"models": {"base": 7}, "root": {"model": "base"}},
        {"models": {}, "root": {"operator": "linear", "base": {}, "inputs": [], "coefficients": []}},
    ],
)
def test_what_is_no_recipe(strict: httpx.Client, recipe: Any) -> None:
    assert refused(strict, recipe)[:2] == (422, "invalid_input")


def test_coefficients_that_no_operator_takes(strict: httpx.Client) -> None:
    view = repository(strict)
    assert refused(strict, make_recipe(view, coefficients=[[0.5]]))[:2] == (422, "invalid_input")
    assert refused(strict, make_recipe(view, 0.5, 0.5, options={"density": 3}))[:2] == (422, "invalid_input")
    assert refused(strict, make_recipe(view, 0.5, 0.5, groups=[{"tensors": ["no.such"]}]))[:2] == (422, "invalid_input")
    body = '{"recipe": {"root": {"model": "base"}, "models": {}, "coefficients": [[NaN]]}}'
    session = open_session(strict)
    answer = strict.post(f"{session}/candidates", content=body, headers={"Content-Type": "application/json"})
    assert error(answer)[:2] == (422, "invalid_input")


UPLOADS: list[tuple[dict[str, Any], str, str]] = [
    ({"evaluator": "image_classification"}, "not_offered", "evaluator"),
    ({"evaluator": "../../etc"}, "not_offered", "evaluator"),
    ({"rows": make_rows(9)}, "not_offered", "rows"),
    ({"rows": make_rows(10_001)}, "not_offered", "rows"),
    ({"rows": make_rows(9) * 4}, "not_offered", "rows"),
    ({"rows": []}, "invalid_input", "rows"),
    ({"rows": [7] * 20}, "invalid_input", "rows.0"),
    ({"rows": [*make_rows(20), {"text": "w1", "label": LABELS}]}, "invalid_data", "set.columns.label"),
    ({"rows": [*make_rows(20), {"text": "w1"}]}, "invalid_data", "set.columns.label"),
    ({"rows": [*make_rows(20), {"text": {"path": "/etc/passwd"}, "label": 1}]}, "invalid_data", "set.columns.text"),
    ({"options": {"batch_size": 0}}, "invalid_input", "set.options.batch_size"),
    ({"options": {"trust_remote_code": True}}, "invalid_input", "set.options.trust_remote_code"),
    ({"columns": {"text": "no such"}}, "invalid_data", "set.columns.text"),
    ({"columns": {"picture": "text"}}, "invalid_data", "set.columns.picture"),
    ({"head": "nobody"}, "invalid_input", "set.head"),
    ({"path": "own.jsonl"}, "invalid_input", "path"),
]


@pytest.mark.parametrize(("changes", "code", "field"), UPLOADS)
def test_uploads_that_are_refused(
    http: httpx.Client, session: str, changes: dict[str, Any], code: str, field: str
) -> None:
    body = {"evaluator": "text_classification", "rows": make_rows(20)} | changes
    assert error(http.post(f"{session}/sets", json=body)) == (422, code, field)
    assert http.get(session).json()["sets"] == []


def test_nothing_is_taken_where_the_owner_wants_no_uploads(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, uploads=None) as found, found.http() as http:
        session = open_session(http)
        assert repository(http).uploads is None
        answer = http.post(f"{session}/sets", json={"evaluator": "text_classification", "rows": make_rows(20)})
        assert error(answer)[:2] == (422, "not_offered")


def test_a_session_takes_so_many_sets(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, uploads={"sets": 2, "min_items": 5}) as found, found.http() as http:
        session = open_session(http)
        answers = [
            http.post(f"{session}/sets", json={"evaluator": "text_classification", "rows": make_rows(20, seed)})
            for seed in range(3)
        ]
    assert [answer.status_code for answer in answers] == [201, 201, 422]


PARTS: list[tuple[list[dict[str, Any]], int, str, str]] = [
    ([{"set": "nobody's"}], 404, "not_found", "parts.0.set"),
    ([{"set": "own", "items": [0, 1]}], 422, "not_offered", "parts.0.items"),
    ([{"set": "own", "items": [0, 1, 2, 3, 3]}], 422, "invalid_input", "parts.0.items"),
    ([{"set": "own", "items": [0, 1, 2, 3, -1]}], 422, "invalid_input", "parts.0.items"),
    ([{"set": "own", "items": [0, 1, 2, 3, ITEMS]}], 422, "invalid_input", "parts.0.items"),
    ([{"set": "own", "items": []}], 422, "invalid_input", "parts.0.items"),
    ([{"set": "own"}, {"set": "own"}], 422, "invalid_input", "parts"),
    ([], 422, "invalid_input", "parts"),
    ([{"set": "own"}] * 65, 422, "invalid_input", "parts"),
]


@pytest.mark.parametrize(("parts", "status", "code", "field"), PARTS)
def test_evaluations_that_are_refused(
    http: httpx.Client, session: str, parts: list[dict[str, Any]], status: int, code: str, field: str
) -> None:
    fingerprint = materialise(http, session, make_recipe(repository(http), 0.5, 0.5))
    before = repository(http).usage
    answer = http.post(f"{session}/evaluations", json={"candidate": fingerprint, "parts": parts})
    assert error(answer) == (status, code, field)
    assert repository(http).usage == before


def test_what_is_not_there(http: httpx.Client, session: str) -> None:
    body = {"candidate": "0" * 64, "parts": [{"set": "own"}]}
    assert error(http.post(f"{session}/evaluations", json=body)) == (404, "not_found", "candidate")
    assert error(http.get(f"{session}/evaluations/{'0' * 64}")) == (404, "not_found", "evaluation")
    assert error(http.get(f"/sessions/{'x' * 32}")) == (410, "gone", "session")
    assert error(http.get("/nothing")) == (404, "not_found", None)
    assert error(http.put("/sessions", json={})) == (405, "method_not_allowed", None)
    assert error(http.get("/repository", headers={"Host": "evil.example"})) == (403, "forbidden", "Host")


OFFERS: list[tuple[dict[str, Any], str]] = [
    ({"models": [], "experts": []}, "models"),
    ({"sets": [], "uploads": None}, "sets"),
    ({"operator": "linear"}, "operator"),
    ({"uploads": {"min_items": 10, "max_items": 5}}, "uploads"),
    ({"limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
    ({"sets": [offer_data()["sets"][0]] * 2}, "sets"),
    ({"decimals": -1}, "decimals"),
]


@pytest.mark.parametrize(("changes", "field"), OFFERS)
def test_offers_that_are_none(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_offer(offer_data(**changes))
    assert str(caught.value.field).startswith(field)


MODELS: list[tuple[dict[str, Any], type[InvalidInput], str]] = [
    ({"base": "nowhere"}, InvalidCheckpoint, "base.path"),
    ({"base": "/etc"}, PathNotAllowed, "base.path"),
    ({"models": ["../"]}, PathNotAllowed, "models.0"),
    ({"models": ["base/nowhere"]}, InvalidInput, "models.0"),
    ({"models": ["adapters/a0", "adapters"]}, InvalidInput, "models"),
    ({"operators": ["alchemy"]}, InvalidInput, "operators.0"),
    ({"operators": ["fisher"]}, InvalidInput, "operators.0"),
    ({"heads": ["classifier.*"]}, InvalidInput, "sets.0.head"),
    ({"sets": [{"name": "own", "evaluator": "text_classification"}]}, InvalidInput, "sets.0.data"),
    (
        {"sets": [{"name": "own", "evaluator": "text_classification", "data": {"path": "/etc/passwd"}}]},
        PathNotAllowed,
        "",
    ),
]


@pytest.mark.parametrize(("changes", "cls", "field"), MODELS)
def test_offers_that_do_not_fit_the_models(
    models: Path, tmp_path: Path, changes: dict[str, Any], cls: type[InvalidInput], field: str
) -> None:
    with pytest.raises(cls) as caught, running(models, tmp_path, **changes):
        pass
    assert str(caught.value.field).startswith(field)


def test_an_empty_directory_has_no_experts(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidCheckpoint, match="neither a checkpoint nor an adapter"):
        all_experts(parse_offer(offer_data(models=["empty"])), Roots([tmp_path]))
