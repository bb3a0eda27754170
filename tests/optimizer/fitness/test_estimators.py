"""Estimates from a few items: how near they come, and how often they are as near as their error bars say."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer.fitness.estimators import Anchors, Estimator, Method, clustered_anchors, random_anchors
from optimizer.fitness.irt import ItemResponses, fit, mixture

Vector = NDArray[np.float64]
ITEMS, MODELS = 300, 5


@dataclass
class World:
    """Answers (0 or 1) or losses of some models and a merge of them, simulated."""

    references: Vector
    merge: Vector

    @classmethod
    def answers(cls, seed: int) -> World:
        random = np.random.default_rng(seed)
        slopes = np.column_stack([np.abs(random.normal(1, 0.4, ITEMS)), random.normal(0, 0.6, ITEMS)])
        hardness, abilities = random.normal(0, 1.2, ITEMS), random.normal(0, 0.8, (MODELS, 2))
        of_merge = random.dirichlet(np.ones(MODELS)) @ abilities + [0.3, 0.0]
        solved = 1 / (1 + np.exp(-(np.vstack([abilities, of_merge]) @ slopes.T - hardness)))
        found = (random.random(solved.shape) < solved).astype(float)
        return cls(found[:-1], found[-1])

    @classmethod
    def losses(cls, seed: int) -> World:
        random = np.random.default_rng(seed)
        base = random.gamma(2.0, 0.3, ITEMS)
        references = np.array([base * np.exp(0.3 * random.normal(size=ITEMS)) for _ in range(MODELS)])
        return cls(references, random.dirichlet(np.ones(MODELS)) @ references + 0.05 * random.normal(size=ITEMS))


def anchors(world: World, method: Method, count: int, seed: int) -> Anchors:
    if method in ("mean", "regression"):
        return random_anchors(np.random.default_rng(seed).permutation(ITEMS), count)
    return clustered_anchors(world.references, count, seed)


def errors(world: type[World], kind: str, method: Method, count: int, repeats: int = 40) -> tuple[float, float]:
    """The root mean squared error, and how often the 95 % error bar holds the truth."""
    away, held = [], 0
    for seed in range(repeats):
        made: World = getattr(world, kind)(seed)
        chosen = anchors(made, method, count, seed)
        found = Estimator(method, made.references, chosen).estimate(made.merge[chosen.places])
        away.append(found.value - made.merge.mean())
        held += abs(away[-1]) <= 1.96 * found.error
    return float(np.sqrt(np.mean(np.square(away)))), held / repeats


@pytest.mark.parametrize("method", ["mean", "regression", "mp_irt"])
def test_error_bars_hold_about_as_often_as_they_say(method: Method) -> None:
    assert errors(World, "answers", method, 40)[1] >= 0.85


def test_item_responses_need_fewer_answers_than_a_mean() -> None:
    assert errors(World, "answers", "mp_irt", 20)[0] < 0.8 * errors(World, "answers", "mean", 20)[0]


def test_regression_needs_far_fewer_losses_than_a_mean() -> None:
    rmse, held = errors(World, "losses", "regression", 40)
    assert rmse < 0.5 * errors(World, "losses", "mean", 40)[0]
    assert held >= 0.85


@given(st.integers(0, 2**31), st.sampled_from(["mean", "weighted", "regression", "mp_irt", "gmp_irt"]))
@settings(max_examples=15, deadline=None)
def test_estimates_repeat_and_come_back_from_what_was_kept(seed: int, method: Method) -> None:
    world = World.answers(seed)
    chosen = anchors(world, method, 16, seed % 1000)
    assert chosen.weights.sum() == pytest.approx(1)
    assert len(set(chosen.places.tolist())) == len(chosen.places)
    made = Estimator(method, world.references, chosen)
    kept = json.loads(json.dumps([chosen.to_json(), made.responses_json()]))
    responses = None if kept[1] is None else ItemResponses.of(kept[1])
    again = Estimator(method, world.references, Anchors.of(kept[0]), responses)
    scores = world.merge[chosen.places]
    assert again.estimate(scores) == made.estimate(scores)


def test_on_all_items_there_is_nothing_to_estimate() -> None:
    world = World.losses(0)
    found = Estimator("regression", world.references, random_anchors(np.arange(ITEMS), ITEMS)).estimate(world.merge)
    assert found.value == pytest.approx(world.merge.mean())
    assert found.error == 0.0


@pytest.mark.parametrize(
    ("references", "method", "used"),
    [
        (np.empty((0, ITEMS)), "regression", "mean"),
        (np.empty((0, ITEMS)), "gmp_irt", "mean"),
        (World.losses(1).references, "gmp_irt", "regression"),
        (World.answers(1).references, "gmp_irt", "gmp_irt"),
    ],
)
def test_what_stands_in_where_a_method_does_not_apply(references: Vector, method: Method, used: Method) -> None:
    assert Estimator(method, references, random_anchors(np.arange(ITEMS), 20)).method == used


def test_references_that_are_alike_do_no_harm() -> None:
    world = World.losses(2)
    chosen = random_anchors(np.random.default_rng(0).permutation(ITEMS), 12)
    constant = np.ones((3, ITEMS))
    found = Estimator("regression", constant, chosen).estimate(world.merge[chosen.places])
    assert found.value == pytest.approx(world.merge[chosen.places].mean())
    alike = clustered_anchors(constant, 12, 0)
    assert (len(set(alike.places.tolist())), alike.weights.tolist()) == (12, [1 / 12] * 12)


@pytest.mark.parametrize("method", ["mean", "weighted", "regression", "gmp_irt"])
def test_a_few_right_answers_do_not_prove_that_all_are_right(method: Method) -> None:
    world = World.answers(4)
    chosen = anchors(world, method, 20, 0)
    found = Estimator(method, world.references, chosen).estimate(np.ones(20))
    assert 0.02 < found.error < 0.1


def test_the_mixture_finds_the_model_that_answers_alike() -> None:
    world = World.answers(3)
    items = fit(world.references, 2)
    weights, covariance = mixture(items, np.arange(ITEMS), world.references[2])
    assert (
        items.probabilities(weights) @ world.references[2] > items.probabilities(np.full(5, 0.2)) @ world.references[2]
    )
    assert (np.linalg.eigvalsh(covariance) > 0).all()
