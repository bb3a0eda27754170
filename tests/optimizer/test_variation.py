"""What crossover, mutation and first populations do on mixed variables."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from optimizer.variation import Variation, VariationOptions, first_population
from tests.optimizer.algorithms.driving import mixed

SPACE = mixed()


def variation(seed: int = 0, **options: float | str) -> Variation:
    random = np.random.Generator(np.random.PCG64(seed))
    return Variation(SPACE, VariationOptions.model_validate(options), random)


def assert_canonical(genome: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    assert (genome >= SPACE.low).all() and (genome <= SPACE.high).all()
    assert (genome[2:4] == np.round(genome[2:4])).all()
    assert (genome[4:] % 1 == 0.5).all()


@given(st.integers(0, 10**6))
def test_children_are_inside_canonical_and_new(seed: int) -> None:
    vary = variation(seed)
    a, b, c = (vary.repair(SPACE.low + vary.random.random(6) * (SPACE.high - SPACE.low)) for _ in range(3))
    for _ in range(6):
        child, parents = vary.child(a, b, c)
        assert_canonical(child)
        assert (child != a).any()
        assert parents == 3 or (child != b).any()


def test_differences_move_reals_and_pick_discrete_values() -> None:
    vary = variation(variation="differential", mutation_probability=1e-12)
    a, b, c = SPACE.low + 0.5, SPACE.low + 1.5, SPACE.low + 0.75
    a[:2], b[:2], c[:2] = [0.3, 0.0], [0.5, -1.0], [0.4, -0.5]
    children = np.array([vary.child(a, b, c)[0] for _ in range(50)])
    np.testing.assert_allclose(children[:, :2], np.tile([0.35, -0.25], (50, 1)))
    parents = np.array([vary.repair(parent) for parent in (a, b, c)])
    for place in range(2, 6):
        assert set(children[:, place]) == set(parents[:, place])


def test_both_ways_take_turns_by_chance() -> None:
    vary = variation()
    a, b, c = (vary.repair(SPACE.low + part * (SPACE.high - SPACE.low)) for part in (0.2, 0.5, 0.8))
    counts = [vary.child(a, b, c)[1] for _ in range(100)]
    assert 30 < counts.count(2) < 70
    assert counts.count(2) + counts.count(3) == 100


def test_first_population_holds_the_start_mixtures_and_a_cover() -> None:
    vary = variation()
    start = vary.repair(SPACE.low + 0.5 * (SPACE.high - SPACE.low))
    genomes = np.array(first_population(21, start, [start], vary))
    assert genomes.shape == (21, 6)
    assert (genomes[0] == start).all()
    for genome in genomes:
        assert_canonical(genome)
    near = np.abs(genomes[1:11, :2] - start[:2]) / (SPACE.high - SPACE.low)[:2]
    assert near.mean() < 0.15
    cover = np.sort((genomes[11:, 0] - SPACE.low[0]) / (SPACE.high - SPACE.low)[0])
    assert (np.floor(cover * 10) == np.arange(10)).all(), "one in each tenth"


def test_a_known_start_is_not_proposed() -> None:
    vary = variation()
    start = vary.repair((SPACE.low + SPACE.high) / 2)
    assert all((genome != start).any() for genome in first_population(8, None, [start], vary))
