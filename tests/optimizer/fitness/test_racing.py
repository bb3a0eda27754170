"""Races: how seldom they drop whom they must not, and how soon whom they may."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer.fitness.racing import Race, Rival, Rule, rungs

Vector = NDArray[np.float64]


def race(
    rivals: list[list[Vector]],
    *,
    rule: Rule = "sum",
    error: float = 0.05,
    tests: int = 4,
    weights: Vector | None = None,
) -> Race:
    count = len(rivals[0])
    return Race([Rival(tuple(each)) for each in rivals], np.ones(count), [weights] * count, rule, error, tests)


def stopped_at(found: Race, losses: list[Vector], steps: tuple[int, ...]) -> int | None:
    return next((n for n in steps if found.standing([each[:n] for each in losses]).lost), None)


def test_rungs_grow_and_end_before_all_items() -> None:
    assert rungs(250, 32) == (32, 64, 128)
    assert rungs(256, 32) == (32, 64, 128)
    assert rungs(32, 32) == rungs(10, 32) == ()


@pytest.mark.parametrize("binary", [False, True])
def test_an_equal_candidate_is_seldom_dropped(binary: bool) -> None:
    """Over all items its mean is exactly the reference's: each drop is an error, and these may be 5 % at most."""
    random = np.random.default_rng(1)
    steps, wrong = rungs(400, 25), 0
    for _ in range(400):
        rival = (random.random(400) < 0.6).astype(float) if binary else random.gamma(2.0, size=400)
        losses = rival + (0 if binary else random.standard_normal(400))
        if binary:  # as many items get worse as get better
            losses[random.permutation(np.flatnonzero(rival == 1))[:40]] = 0
            losses[random.permutation(np.flatnonzero(rival == 0))[:40]] = 1
        losses += rival.mean() - losses.mean()
        wrong += stopped_at(race([[rival]], tests=len(steps)), [losses], steps) is not None
    assert wrong / 400 <= 0.05


def test_the_worse_a_candidate_the_sooner_it_is_dropped() -> None:
    random = np.random.default_rng(2)
    rival, steps = random.gamma(2.0, size=400), rungs(400, 25)
    at = []
    for shift in (0.15, 0.5, 2.0):
        seen = [
            stopped_at(race([[rival]]), [rival + shift + random.standard_normal(400)], steps) or 400 for _ in range(50)
        ]
        at.append(np.mean(seen))
    assert at[0] > at[1] > at[2] == 25


def test_one_reference_that_beats_it_is_enough() -> None:
    random = np.random.default_rng(3)
    good, bad = random.random(100), random.random(100) + 5
    found = race([[bad], [good]]).standing([good[:50] + 1 + 0.1 * random.standard_normal(50)])
    assert (found.lost, found.reference) == (True, 1)
    assert found.ahead[0] == pytest.approx(1, abs=0.1)


def test_by_dominance_every_objective_must_be_lost() -> None:
    random = np.random.default_rng(4)
    rival = [random.random(100), random.random(100)]
    noise = 0.1 * random.standard_normal(50)
    mixed = [rival[0][:50] + 3 + noise, rival[1][:50] - 0.2 + noise]
    assert race([rival]).standing(mixed).lost
    assert not race([rival], rule="each").standing(mixed).lost
    assert race([rival], rule="each").standing([mixed[0], rival[1][:50] + 1 + noise]).lost


def test_few_items_that_all_differ_alike_are_no_certainty() -> None:
    rival = np.zeros(1000)
    assert not race([[rival]], error=0.01).standing([np.ones(2)]).lost
    assert race([[rival]], error=0.01).standing([np.ones(40)]).lost


def test_weights_of_items_count() -> None:
    """An item without weight decides nothing."""
    weights = np.array([0.0, 1.0] * 50)
    rival = np.zeros(100)
    losses = np.where(weights > 0, 0.0, 9.0) + 1e-3 * np.random.default_rng(5).standard_normal(100)
    found = race([[rival]], weights=weights).standing([losses[:60]])
    assert not found.lost
    assert found.ahead[0] == pytest.approx(0, abs=1e-3)


@given(st.integers(0, 2**31), st.integers(2, 60))
@settings(max_examples=50, deadline=None)
def test_the_error_is_that_of_a_sample_without_replacement(seed: int, seen: int) -> None:
    random = np.random.default_rng(seed)
    rival, losses = random.random(60), random.random(60)
    found = race([[rival]]).standing([losses[:seen]])
    sample = (losses - rival)[:seen]
    assert found.ahead[0] == pytest.approx(sample.mean())
    assert found.errors[0] == pytest.approx(sample.std(ddof=1) / np.sqrt(seen) * np.sqrt(1 - seen / 60))
