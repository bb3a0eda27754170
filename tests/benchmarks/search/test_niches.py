"""The benchmark of M2N2, small: that it runs, and what holds however few evaluations there are."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.benchmarks.search.niches import SIZE, digits, materialise, pair_space, plot, right, run, trained


@pytest.mark.slow
def test_a_small_run_has_everything() -> None:
    measured = run(True)
    methods = measured["summary"]
    assert {"M2N2", "GA", "MAP-Elites", "M2N2, no crossover"} <= {*methods["scratch"]}
    assert {"M2N2", "M2N2, no split", "brute force"} <= {*methods["pre-trained"]}
    pairs = {name: each["test"] for name, each in methods["pre-trained"].items()}
    assert abs(pairs["M2N2, no split"] - pairs["brute force"]) < 6, "without a split there is only the arc of SLERP"
    best = {(each["name"], each["seed"]): each["search"] for each in measured["runs"] if each["start"] == "pre-trained"}
    for seed in measured["seeds"]["pre-trained"]:
        assert best["M2N2", seed] > best["M2N2, no split", seed], "split points reach what the arc has not"
    assert measured["speed"]["tables, numbers of the longest genome"] < SIZE / 10
    figure = Figure()
    plot(measured, figure)
    assert len(figure.axes) == 2


def test_tables_are_the_models() -> None:
    random = np.random.Generator(np.random.PCG64(0))
    pair = [trained(random, 0, 4), trained(random, 5, 9)]
    space = pair_space(pair)
    data = digits()
    for number, name in enumerate(("low", "high")):
        model = materialise(space.table(space.alone(name)), pair)
        np.testing.assert_array_equal(model, pair[number])
        known = right(model, data.images, data.labels)
        of_kind = (data.labels < 5) == (name == "low")
        assert known[of_kind].mean() > 0.6 and known[~of_kind].mean() < 0.1
