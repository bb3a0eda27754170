"""The protocol over real HTTP: description, sessions, candidates, evaluations, and what local evaluation gives."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest

from optimizer.fitness.aggregate import ItemScores
from optimizer.recipe import Recipe
from tests.api.endpoint.conftest import (
    ADAPTERS,
    ITEMS,
    Endpoint,
    error,
    evaluate,
    make_recipe,
    make_rows,
    materialise,
    open_session,
    repository,
    running,
)
from tests.service import until
from workers.endpoint.protocol import EvaluationView, read_scores, write_scores

UPLOAD = {"evaluator": "text_classification", "rows": make_rows(ITEMS, seed=5)}


def test_the_repository_is_described(http: httpx.Client) -> None:
    view = repository(http)
    assert [model.name for model in view.models] == ["base", *(f"a{number}" for number in range(ADAPTERS))]
    assert len({model.id for model in view.models}) == ADAPTERS + 1
    assert view.layout.layers == 2
    assert any(tensor.name.endswith("attention.self.query.weight") for tensor in view.layout.tensors)
    assert {"linear", "ties", "lora_factors"} <= {operator.name for operator in view.operators}
    assert "fisher" not in {operator.name for operator in view.operators}  # nothing is measured on calibration data
    (own,) = view.sets
    assert (own.name, own.items) == ("own", ITEMS)
    assert own.metrics.items() >= {"accuracy": "maximise", "loss": "minimise"}.items()


def test_ids_say_nothing_of_the_weights_but_stay(endpoint: Endpoint, http: httpx.Client) -> None:
    repo = endpoint.desk.repository
    ids = {model.name: model.id for model in repository(http).models}
    assert not set(ids.values()) & {checkpoint.digest for checkpoint in repo.checkpoints.values()}
    assert {model.name: model.id for model in repository(http).models} == ids


def test_no_path_of_the_owner_is_told(models: Path, http: httpx.Client, session: str) -> None:
    texts = [http.get("/repository").text, http.post(f"{session}/sets", json={**UPLOAD, "head": "nobody"}).text]
    assert not any(str(models) in text or "jsonl" in text for text in texts)


def test_a_candidate_scores_as_it_does_locally_bit_for_bit(
    endpoint: Endpoint, http: httpx.Client, session: str
) -> None:
    uploaded = http.post(f"{session}/sets", json=UPLOAD).json()
    recipe = make_recipe(repository(http), 0.7, -0.4, 0.2, 0.9, operator="lora_factors")
    view = EvaluationView.model_validate(
        evaluate(http, session, materialise(http, session, recipe), {"set": "own"}, {"set": uploaded["digest"]})
    )
    repo = endpoint.desk.repository
    scorer = repo.scorer()
    fingerprint, real = repo.candidate(recipe)
    assert view.parts is not None
    for part, found in zip(view.parts, (repo.own["own"], repo._prepared[uploaded["digest"]]), strict=True):
        local = scorer.score(fingerprint, real, found, None, lambda: False)
        for metric, scores in local.items():
            assert (read_scores(part.scores[metric]).values == scores.values).all()
            assert part.scores[metric].mean == scores.mean()
    assert view.cost.items == 2 * ITEMS
    assert view.cost.tokens > 0


def test_the_fingerprint_is_the_recipes_own(http: httpx.Client, session: str) -> None:
    recipe = make_recipe(repository(http), 0.5, 0.5)
    assert materialise(http, session, recipe) == Recipe.parse(recipe).fingerprint


def test_a_part_of_a_set_is_evaluated_in_the_order_asked_for(http: httpx.Client, session: str) -> None:
    fingerprint = materialise(http, session, make_recipe(repository(http), 0.5, 0.3))
    items = [7, 3, 11, 0, 30, 2]
    whole = evaluate(http, session, fingerprint)["parts"][0]
    part = evaluate(http, session, fingerprint, {"set": "own", "items": items})["parts"][0]
    assert part["items"] == len(items)
    chosen = [whole["scores"]["loss"]["values"][item] for item in items]
    assert part["scores"]["loss"]["values"] == pytest.approx(chosen, rel=1e-5)


def test_an_evaluation_is_computed_once_whoever_asks(endpoint: Endpoint, http: httpx.Client) -> None:
    recipe = make_recipe(repository(http), 0.25, 0.75)
    other = endpoint.desk.store.create_token("other")[1]
    first = open_session(http)
    fingerprint = materialise(http, first, recipe)
    computed = evaluate(http, first, fingerprint)
    again = evaluate(http, first, fingerprint)
    assert again == computed
    with endpoint.http(other) as colleague:
        second = open_session(colleague)
        theirs = evaluate(colleague, second, materialise(colleague, second, recipe))
    assert theirs["parts"] == computed["parts"]
    done = [entry for entry in endpoint.audit() if entry["action"] == "evaluation.computed"]
    assert [entry["candidate"] for entry in done].count(fingerprint) == 1


def test_the_same_evaluation_asked_for_at_once_is_one(endpoint: Endpoint, http: httpx.Client, session: str) -> None:
    fingerprint = materialise(http, session, make_recipe(repository(http), 0.33, 0.44, 0.1))
    found: list[dict[str, object]] = []

    def ask() -> None:
        with endpoint.http() as client:
            found.append(evaluate(client, session, fingerprint))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(view == found[0] for view in found)
    done = [entry for entry in endpoint.audit() if entry["action"] == "evaluation.computed"]
    assert [entry["candidate"] for entry in done].count(fingerprint) == 1


def test_results_outlive_the_server_and_are_paid_for_once(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path) as first, first.http() as http:
        session = open_session(http)
        recipe = make_recipe(repository(http), 0.6, 0.6)
        before = evaluate(http, session, materialise(http, session, recipe))
        assert before["cost"]["items"] == ITEMS
    with running(models, tmp_path, token=first.token) as second, second.http() as http:
        assert error(http.get(session)) == (410, "gone", "session")
        session = open_session(http)
        after = evaluate(http, session, materialise(http, session, recipe))
        usage = repository(http).usage
    assert after["parts"] == before["parts"]
    assert after["cost"]["items"] == 0
    assert (usage.evaluations, usage.items) == (1, ITEMS)


def test_an_evaluation_under_way_is_answered_with_202_and_can_be_called_off(
    models: Path, tmp_path: Path, gate: threading.Event
) -> None:
    with running(models, tmp_path) as found, found.http() as http:
        session = open_session(http)
        fingerprint = materialise(http, session, make_recipe(repository(http), 0.6, 0.6))
        body = {"candidate": fingerprint, "parts": [{"set": "own"}]}
        answer = http.post(f"{session}/evaluations", json=body, params={"wait_s": 0.1})
        assert answer.status_code == 202
        assert answer.json()["state"] in ("queued", "running")
        path = answer.headers["Location"].removeprefix("/v1")
        assert http.get(path, params={"wait_s": 0.1}).status_code == 202
        assert http.delete(path).status_code == 204
        assert error(http.get(path)) == (404, "not_found", "evaluation")
        gate.set()
        until("what was called off has ended", lambda: not found.desk._evaluations._pieces)
        assert evaluate(http, session, fingerprint)["state"] == "done"
        done = [entry for entry in found.audit() if entry["action"] == "evaluation.computed"]
        assert [entry.get("code") for entry in done] == ["cancelled", None]


def test_a_stopping_server_keeps_nobody_waiting(models: Path, tmp_path: Path, gate: threading.Event) -> None:
    answers: list[httpx.Response] = []
    with running(models, tmp_path) as found, found.http() as http:
        session = open_session(http)
        fingerprint = materialise(http, session, make_recipe(repository(http), 0.6, 0.6))
        body = {"candidate": fingerprint, "parts": [{"set": "own"}]}

        def ask() -> None:
            with found.http() as client:
                answers.append(client.post(f"{session}/evaluations", json=body, params={"wait_s": 30}))

        thread = threading.Thread(target=ask)
        thread.start()
        until("it is asked", lambda: found.desk._evaluations._pieces or None)
    thread.join(10)
    assert not thread.is_alive()
    assert [answer.status_code for answer in answers] == [202]


def test_an_infeasible_candidate_says_why(http: httpx.Client, session: str) -> None:
    fingerprint = materialise(http, session, make_recipe(repository(http), 0.0, 0.0, operator="linear"))
    view = evaluate(http, session, fingerprint)
    assert view["state"] == "failed"
    assert view["failure"]["code"] == "infeasible"
    assert view["parts"] is None


@pytest.mark.parametrize("scores", ["items", "aggregate"])
def test_scores_are_rounded_and_aggregated_as_the_owner_says(models: Path, tmp_path: Path, scores: str) -> None:
    with running(models, tmp_path, scores=scores, decimals=2) as found, found.http() as http:
        session = open_session(http)
        view = evaluate(http, session, materialise(http, session, make_recipe(repository(http), 0.3, 0.8)))
    loss = view["parts"][0]["scores"]["loss"]
    assert loss["mean"] == round(loss["mean"], 2)
    if scores == "aggregate":
        assert loss["values"] is None
    else:
        assert all(value == round(value, 2) for value in loss["values"])
        assert len(loss["values"]) == ITEMS


def test_a_coarse_layout_names_no_parameter_and_takes_no_single_one(models: Path, tmp_path: Path) -> None:
    with running(models, tmp_path, detail="layers") as found, found.http() as http:
        view = repository(http)
        assert {tensor.name for tensor in view.layout.tensors} == {
            *(f"{layer}.{kind}.shared" for layer in (0, 1) for kind in ("attention", "mlp", "norm")),
            *("input.embeddings.shared", "input.norm.shared", "output.head.shared"),
        }
        session = open_session(http)
        groups = [{"positions": [0]}, {"positions": [1], "modules": ["mlp"]}]
        layers = make_recipe(view, groups=groups, coefficients=[[0.5, 0.5, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
        assert evaluate(http, session, materialise(http, session, layers))["state"] == "done"
        single = make_recipe(view, 0.5, 0.5, groups=[{"tensors": ["*"]}])
        assert error(http.post(f"{session}/candidates", json={"recipe": single})) == (422, "not_offered", "recipe.root")


def test_grams_are_given_out_where_the_owner_says_so(models: Path, tmp_path: Path, http: httpx.Client) -> None:
    assert error(http.get("/repository/grams")) == (422, "not_offered", "grams")
    with running(models, tmp_path, grams=True) as found, found.http() as client:
        grams = client.get("/repository/grams", params={"cuts": "tensors"})
        assert grams.status_code == 200
        assert len(grams.json()["edges"]) > 10


def test_scores_that_are_not_finite_travel_as_null() -> None:
    scores = ItemScores(np.array([1.25, math.nan, math.inf], dtype=np.float32), np.array([1, 2, 3], dtype=np.float32))
    sent = write_scores(scores, keep_items=True, decimals=1)
    assert sent.values == [1.2, None, None]
    assert sent.mean is None
    back = read_scores(sent)
    assert np.isnan(back.values[1:]).all()
    assert back.weights is not None
    assert back.weights.tolist() == [1, 2, 3]
