"""Gaussian processes, forests and quadratics: what they predict, their slopes, and what they are not moved by."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import approx_fprime

from optimizer.surrogates.archive import Observed
from optimizer.surrogates.encoding import Encoding
from optimizer.surrogates.forest import Forest
from optimizer.surrogates.gaussian_process import GaussianProcess, Kernel, _Posterior, fit_kernel, squash
from optimizer.surrogates.models import latest_and_best, limit_values
from optimizer.surrogates.quadratic import LinkName, Quadratic, choose_link
from tests.optimizer.algorithms.driving import mixed

Array = NDArray[np.float64]


def wave(x: Array) -> Array:
    values = np.sin(4 * x[:, 0]) + x[:, 1] ** 2
    return np.asarray((values - values.mean()) / values.std(), dtype=np.float64)


def test_gradient_of_the_posterior_is_its_slope() -> None:
    random = np.random.default_rng(0)
    x = random.random((30, 5))
    posterior = _Posterior(x, wave(x), np.array([0, 1, 2, 2, 3]), 0.5)
    theta = np.append(random.normal(size=4), -3.0)
    numeric = approx_fprime(theta, lambda t: posterior(t)[0], 1e-6)
    np.testing.assert_allclose(posterior(theta)[1], numeric, rtol=1e-4, atol=1e-4)


def test_a_fitted_process_predicts_and_finds_what_matters() -> None:
    random = np.random.default_rng(1)
    x, unseen = random.random((60, 4)), random.random((100, 4))
    both = wave(np.vstack([x, unseen]))
    kernel = fit_kernel(x, both[:60], np.arange(4))
    mean, std = GaussianProcess(x, both[:60], np.arange(4), kernel).predict(unseen)
    assert np.corrcoef(mean, both[60:])[0, 1] > 0.99
    assert (std > 0).all() and np.mean(np.abs(mean - both[60:]) < 3 * std + 0.01) > 0.9
    assert kernel.scales[:2].max() < kernel.scales[2:].min()


def test_slopes_of_the_prediction() -> None:
    random = np.random.default_rng(2)
    x = random.random((25, 3))
    process = GaussianProcess(x, wave(x), np.arange(3), Kernel(np.full(3, 0.5), 1e-4, 1.3), random.random((4, 3)))
    at = random.random(3)
    mean, std, dmean, dstd = process.slopes(at)
    means, stds = process.predict(at[None])
    np.testing.assert_allclose([mean, std], [means[0], stds[0]], rtol=1e-6)
    np.testing.assert_allclose(dmean, approx_fprime(at, lambda z: process.predict(z[None])[0][0], 1e-6), atol=1e-4)
    np.testing.assert_allclose(dstd, approx_fprime(at, lambda z: process.predict(z[None])[1][0], 1e-6), atol=1e-3)


def test_what_is_in_flight_takes_variance_and_leaves_the_mean() -> None:
    random = np.random.default_rng(3)
    x, flying = random.random((20, 2)), np.array([[0.9, 0.1]])
    kernel = Kernel(np.full(2, 0.3), 1e-4, 1.0)
    alone = GaussianProcess(x, wave(x), np.arange(2), kernel)
    believing = GaussianProcess(x, wave(x), np.arange(2), kernel, flying)
    grid = random.random((50, 2))
    np.testing.assert_allclose(believing.predict(grid)[0], alone.predict(grid)[0], atol=1e-10)
    assert believing.predict(flying)[1][0] < 0.1 * alone.predict(flying)[1][0] + 0.02


def test_repeated_and_constant_observations_do_not_break_the_fit() -> None:
    x = np.repeat(np.random.default_rng(4).random((5, 3)), 8, axis=0)
    kernel = fit_kernel(x, np.zeros(40), np.arange(3))
    mean, std = GaussianProcess(x, np.zeros(40), np.arange(3), kernel).predict(x)
    assert np.isfinite(mean).all() and np.isfinite(std).all()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_squashing_keeps_the_order(values: list[float]) -> None:
    losses = np.array(values)[:, None]
    squashed = squash(losses)[:, 0]
    order = np.argsort(losses[:, 0], kind="stable")
    assert np.isfinite(squashed).all()
    assert (np.diff(squashed[order]) >= 0).all()


def test_a_forest_predicts_and_is_less_sure_far_away() -> None:
    random = np.random.default_rng(5)
    x = random.random((200, 3))
    y = wave(x)
    mean, std = Forest(x, y, np.random.default_rng(0)).predict(x)
    again, _ = Forest(x, y, np.random.default_rng(0)).predict(x)
    assert np.corrcoef(mean, y)[0, 1] > 0.95 and (std > 0).all()
    np.testing.assert_array_equal(mean, again)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_a_quadratic_is_recovered_from_as_many_samples_as_it_has_coefficients(dim: int) -> None:
    random = np.random.default_rng(dim)
    half = random.normal(size=(dim, dim))
    curvature, linear = half @ half.T / dim, random.normal(size=dim)

    def loss(z: Array) -> Array:
        return np.asarray(0.5 * ((z @ curvature) * z).sum(axis=1) + z @ linear + 0.3, dtype=np.float64)

    count = 2 * ((dim + 1) * (dim + 2) // 2)
    z, unseen = random.uniform(-1, 1, (count, dim)), random.uniform(-1, 1, (100, dim))
    fit = Quadratic(z, loss(z), choose_link(loss(z), "identity"), np.ones(count))
    assert fit.interactions and fit.r2 > 0.999
    np.testing.assert_allclose(fit.predict(unseen), loss(unseen), atol=0.01)
    spread = np.ptp(loss(z))
    np.testing.assert_allclose(fit.curvature * spread, curvature, atol=0.05)


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "identity"])
def test_slopes_of_quadratics_behind_links(name: LinkName) -> None:
    random = np.random.default_rng(6)
    z = random.uniform(-1, 1, (20, 3))
    losses = 1 / (1 + np.exp(-(z**2).sum(axis=1)))
    fit = Quadratic(z, losses, choose_link(losses, name), np.ones(20))
    at = random.uniform(-1, 1, 3)
    value, gradient = fit.gradient(at)
    assert value == pytest.approx(fit.predict(at[None])[0])
    np.testing.assert_allclose(gradient, approx_fprime(at, lambda x: fit.predict(x[None])[0], 1e-7), atol=1e-5)
    assert fit.r2 > 0.9


def test_few_samples_of_many_variables_are_fitted_without_interactions() -> None:
    random = np.random.default_rng(7)
    z = random.uniform(-1, 1, (60, 20))
    losses = (np.linspace(0.2, 2, 20) * (z - 0.2) ** 2).sum(axis=1)
    fit = Quadratic(z, losses, choose_link(losses, "identity"), np.ones(60))
    unseen = random.uniform(-1, 1, (100, 20))
    assert not fit.interactions
    assert np.corrcoef(fit.predict(unseen), (np.linspace(0.2, 2, 20) * (unseen - 0.2) ** 2).sum(axis=1))[0, 1] > 0.95


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ([-0.9, -0.1], "sigmoid"),
        ([0.1, 0.8], "sigmoid"),
        ([-80.0, -2.0], "sigmoid"),
        ([0.2, 7.0], "softplus"),
        ([-3.0, 9.0], "identity"),
    ],
)
def test_links_follow_the_range(losses: list[float], name: str) -> None:
    link = choose_link(np.array(losses), "auto")
    assert link.name == name
    np.testing.assert_allclose(link(link.inverse(np.array(losses))), losses, atol=1e-9 * 100)


def test_features_of_mixed_spaces() -> None:
    space = mixed()
    encoding = Encoding(space)
    genomes = space.low + np.random.default_rng(8).random((40, space.dim)) * (space.high - space.low)
    units = encoding.repair(encoding.units(genomes))
    np.testing.assert_array_equal(encoding.repair(units), units)
    for genome, unit in zip(genomes, units, strict=True):
        again = encoding.genome(unit)
        pairs = zip(space.variables[2:], genome[2:], again[2:], strict=True)
        assert all(variable.read(float(a)) == variable.read(float(b)) for variable, a, b in pairs)
        np.testing.assert_array_equal(encoding.units(again), unit)
    features = encoding.features(encoding.units(genomes))
    np.testing.assert_allclose(encoding.features(units), features, atol=1e-8)
    words = features[:, encoding.owner == 5]
    distances = {round(float(np.linalg.norm(a - b)), 9) for a in words for b in words}
    assert distances == {0.0, 1.0}


def test_last_bits_of_genomes_do_not_reach_the_models() -> None:
    encoding = Encoding(mixed())
    units = encoding.repair(np.random.default_rng(9).random((50, 6)))
    genomes = np.array([encoding.genome(unit) for unit in units])
    np.testing.assert_array_equal(encoding.units(np.nextafter(genomes, np.inf)), encoding.units(genomes))


def test_the_latest_and_the_best_are_kept() -> None:
    losses = np.array([[3.0], [1.0], [5.0], [6.0], [7.0], [8.0]])
    observed = Observed(np.zeros((6, 1)), losses, np.zeros(6), np.ones(6), np.arange(6))
    np.testing.assert_array_equal(latest_and_best(observed, 4), [0, 1, 4, 5])


def test_failures_violate_more_than_violations() -> None:
    losses = np.array([[1.0], [1.0], [1.0], [np.nan]])
    observed = Observed(np.zeros((4, 1)), losses, np.array([0.0, 0.1, 2.0, 0.0]), np.ones(4), np.arange(4))
    values = limit_values(observed)
    assert values[0] < 0 < values[1] < values[2] <= values[3]
