"""A merge problem with items for searches with archives: tables or coefficients over models as plain vectors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms import ALGORITHMS, Algorithm, AlgorithmContext, Outcome
from optimizer.problem import Grams, Problem
from optimizer.recipe import Selector
from optimizer.space import Genome, JobSpace
from optimizer.spec import JobSpec
from optimizer.tables import linear_table, near
from tests.factories import make_problem, make_small_layout, make_spec
from tests.optimizer.algorithms.driving import Case

LAYERS = 8
LAYOUT = make_small_layout(LAYERS)
Vector = NDArray[np.float64]


def job(case: Case, objectives: int = 2, **merge: Any) -> tuple[JobSpec, Problem]:
    """A job of two experts, with inner products for every position."""
    random = np.random.default_rng(0)
    base = random.normal(size=LAYOUT.size)
    models = np.array([base, *(base + 0.5 * random.normal(size=LAYOUT.size) for _ in range(2))])
    edges = list(range(LAYOUT.size + 1))
    parts = [models[:, begin:end] for begin, end in pairwise(edges)]
    spec = make_spec(merge={"operator": "task_arithmetic", "granularity": {"layers": "each"}, **merge})
    spec = spec.model_copy(
        update={
            "objectives": spec.objectives[:objectives],
            "algorithm": spec.algorithm.model_copy(update={"name": case.name, "options": case.options}),
        }
    )
    found = make_problem(spec, layers=LAYERS)
    return spec, found.model_copy(update={"grams": Grams.pack(edges, np.array([part @ part.T for part in parts]))})


def make(case: Case, objectives: int = 2, seed: int = 3, parallel: int = 1, **merge: Any) -> tuple[Algorithm, JobSpace]:
    """The algorithm on its own space."""
    spec, problem = job(case, objectives, **merge)
    cls = ALGORITHMS[case.name]
    options = cls.Options.model_validate(case.options)
    space = cls.make_space(spec, problem, options)
    return cls(AlgorithmContext(space, np.ones(objectives), seed, space.uniform(), parallel), options), space


def judge(space: JobSpace, objectives: int = 2) -> Callable[[int, Genome, bool], Outcome]:
    """Right or wrong on 40 items of each objective.

    The first objective's items need the first expert in the early layers and the second one in the late layers, those of
    the second the other way round. Each item looks at one layer and has a threshold of its own.
    """
    layers = [layer % LAYERS for layer in range(40)]
    thresholds = np.linspace(0.35, 0.95, 40)

    def evaluate(index: int, genome: Genome, own: bool) -> Outcome:
        recipe = space.recipe(genome)
        table = linear_table(recipe, LAYOUT, ["base", "language", "polarity"])
        assert table is not None
        shares = near(table, [Selector(positions=[layer]) for layer in range(LAYERS)], LAYOUT)
        early = np.arange(LAYERS) < LAYERS // 2
        gains = []
        for flip in range(objectives):
            wanted = np.where(early == (flip == 0), shares[:, 1], shares[:, 2])
            gains.append((wanted[layers] >= thresholds).astype(np.float32))
        return Outcome(index, genome, np.array([-float(part.mean()) for part in gains]), own=own, gains=tuple(gains))

    return evaluate


def accuracy(outcome: Outcome) -> float:
    """The mean over objectives."""
    return 0.0 if outcome.losses is None else -float(outcome.losses.mean())
