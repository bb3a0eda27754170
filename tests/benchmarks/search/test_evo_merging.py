"""The small run of the benchmark: its shape, and what always holds."""

from __future__ import annotations

import pytest

from tests.benchmarks.search.evo_merging import ABLATIONS, Counts, Repository, make_repository, run


@pytest.mark.slow
def test_quick_run() -> None:
    measured = run(True)
    assert measured["difference to the operator"] < 1e-9
    for means in measured["means"].values():
        assert set(ABLATIONS) < set(means)
        for found in means.values():
            assert 0.0 <= found["test accuracy"] <= 1.0
        assert means["full"]["search loss"] < means["no scaling"]["search loss"]
        assert means["full"]["search loss"] < means["neither"]["search loss"]


def test_flipped_copies_undo_what_they_are_copies_of() -> None:
    repository: Repository = make_repository(1, Counts(2, 1, 1, 0), shared=True, steps=5)
    for layer in repository.products:
        assert abs(layer[0] + layer[-1]).max() == 0.0
        assert abs(layer[0]).max() > 0.0
