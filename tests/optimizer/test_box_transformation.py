"""The map into a box is pycma's, and its own inverse."""

from __future__ import annotations

import warnings

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer.box_transformation import BoxTransformation

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it regrets the absence of moviepy
    from cma.transformations import BoxConstraintsLinQuadTransformation

Array = NDArray[np.float64]

sides = st.lists(
    st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.floats(-5e3, 5e3), st.floats(0, 1)), min_size=1, max_size=4
)
"""For each variable: a lower bound, a width, a number anywhere, and a place inside as a share of the width."""


def unpacked(rows: list[tuple[float, ...]]) -> tuple[Array, Array, Array, Array]:
    low, width, anywhere, share = np.array(rows).T
    high = low + width
    return low, high, anywhere, np.clip(low + share * (high - low), low, high)


def close(found: Array, wanted: Array, scale: Array) -> bool:
    return bool((np.abs(found - wanted) <= 1e-12 * scale).all())


@given(sides)
@settings(deadline=None)
def test_is_that_of_pycma(rows: list[tuple[float, ...]]) -> None:
    low, high, anywhere, inside = unpacked(rows)
    theirs = BoxConstraintsLinQuadTransformation(np.stack([low, high], axis=1).tolist())
    ours = BoxTransformation(low, high)
    scale = 1 + np.abs(low) + np.abs(high)
    outer = np.array([theirs._transform_i(x, i) for i, x in enumerate(anywhere.tolist())])
    assert close(ours.outer(anywhere), outer, scale + np.abs(anywhere))
    assert close(ours.inner(inside), np.array(theirs.inverse(inside)), scale)


@given(sides)
@settings(deadline=None)
def test_there_and_back(rows: list[tuple[float, ...]]) -> None:
    low, high, _, inside = unpacked(rows)
    ours = BoxTransformation(low, high)
    back = ours.outer(ours.inner(inside))
    assert (low <= back).all() and (back <= high).all()
    assert close(back, inside, 1 + np.abs(low) + np.abs(high))


def test_many_at_once() -> None:
    ours = BoxTransformation(np.zeros(3), np.ones(3))
    several = np.random.Generator(np.random.PCG64(0)).normal(0.5, 1.0, (20, 3))
    np.testing.assert_array_equal(ours.outer(several), [ours.outer(one) for one in several])


def test_outside_is_the_nearest_inside() -> None:
    ours = BoxTransformation(np.array([0.0, -1.0]), np.array([1.0, 1.0]))
    np.testing.assert_array_equal(ours.inner(np.array([1.5, -3.0])), ours.inner(np.array([1.0, -1.0])))
