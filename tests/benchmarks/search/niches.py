"""M2N2 and its baselines on `load_digits`, as in its paper (arXiv 2508.16204): from scratch, and from pre-trained pairs.

The network has 64 inputs (0 to 16, not scaled), 256 hidden units with ReLU and 10 outputs: 19,210 parameters. The first
80 % of the scans are what the search sees, scored right or wrong one by one; accuracies are on the other 360, of the
candidate that did best on the search's. Pre-trained models had 10 steps of Adam on the digits 0 to 4, or 5 to 9. The
searches are the registered ones, asked and told one candidate at a time as in the paper.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from optimizer.algorithms import ALGORITHMS, Algorithm, AlgorithmContext, Outcome
from optimizer.geometry import make_layout
from optimizer.problem import Grams, OperatorInfo, Problem, ResolvedObjective
from optimizer.recipe import ModelId
from optimizer.space import Genome, SearchSpace, Variable
from optimizer.spec import ModelRef
from optimizer.tables import Table, TableSpace
from tests.benchmarks.search.common import main

Floats = NDArray[np.float32]
Bits = NDArray[np.bool_]

SHAPES = ((64, 256), (256,), (256, 10), (10,))
SIZES = [int(np.prod(shape)) for shape in SHAPES]
SIZE = sum(SIZES)
BOUND = 5.0
"""Weights are searched between -5 and 5, which nothing ever reached."""
FIRST_SEED = 42
POINTS = 50
"""Points of a curve."""


@dataclass(frozen=True)
class Method:
    """A search with its options."""

    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)


def _scratch() -> dict[str, Method]:
    noise = {"mutation": 0.01 / (2 * BOUND)}
    ga = {"alpha": 0.0, "attraction": False, **noise}
    return {
        "M2N2": Method("m2n2", noise),
        "M2N2, no split": Method("m2n2", {"cuts": "none", **noise}),
        "M2N2, no attraction": Method("m2n2", {"attraction": False, **noise}),
        "M2N2, no crossover": Method("m2n2", {"crossover": False, **noise}),
        "GA": Method("m2n2", ga),
        "GA, no crossover": Method("m2n2", {"crossover": False, **ga}),
        "MAP-Elites": Method("map_elites", {"item_groups": (digits().labels % 2).tolist(), **noise}),
        "separable CMA-ES": Method(
            "cma_es", {"covariance": "diagonal", "population": 20, "sigma0": 0.01 / (2 * BOUND), "normalise": False}
        ),
    }


def _pretrained() -> dict[str, Method]:
    return {
        "M2N2": Method("m2n2"),
        "M2N2, no attraction": Method("m2n2", {"attraction": False}),
        "M2N2, no split": Method("m2n2", {"cuts": "none"}),
        "M2N2, linear": Method("m2n2", {"mixing": "linear"}),
        "GA": Method("m2n2", {"alpha": 0.0, "attraction": False, "duplicates": True}),
        "GA, no duplicates": Method("m2n2", {"alpha": 0.0, "attraction": False}),
        "MAP-Elites": Method("map_elites", {"item_groups": (digits().labels % 2).tolist()}),
    }


@dataclass(frozen=True)
class Digits:
    """The scans: those the search sees, and the others."""

    images: Floats
    labels: NDArray[np.int64]
    test_images: Floats
    test_labels: NDArray[np.int64]


@cache
def digits() -> Digits:
    """Return the scans in the order of scikit-learn, split after 80 %."""
    images, labels = load_digits(return_X_y=True)
    images, cut = images.astype(np.float32), int(len(images) * 0.8)
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


def right(weights: Floats, images: Floats, labels: NDArray[np.int64]) -> Bits:
    """Return which images the network with these weights, shape (19210,), gets right."""
    first, second, third = np.cumsum(SIZES[:3])
    hidden = images @ weights[:first].reshape(SHAPES[0])
    hidden += weights[first:second]
    np.maximum(hidden, 0, out=hidden)
    outputs = hidden @ weights[second:third].reshape(SHAPES[2])
    outputs += weights[third:]
    return np.asarray(outputs.argmax(axis=1) == labels)


def random_model(random: np.random.Generator) -> Floats:
    """Return random weights, 0.01 · N(0, 1)."""
    return (0.01 * random.standard_normal(SIZE)).astype(np.float32)


def trained(random: np.random.Generator, low: int, high: int, steps: int = 10) -> Floats:
    """Return a model after some full-batch steps of Adam (3e-3) on the digits from ``low`` to ``high``."""
    data = digits()
    chosen = (data.labels >= low) & (data.labels <= high)
    weights = random_model(random).astype(np.float64)
    mean, square = np.zeros(SIZE), np.zeros(SIZE)
    for step in range(1, steps + 1):
        slope = _slope(weights, data.images[chosen].astype(np.float64), data.labels[chosen])
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        weights -= 0.003 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return weights.astype(np.float32)


def _slope(weights: Genome, images: Genome, labels: NDArray[np.int64]) -> Genome:
    """The gradient of the mean cross-entropy."""
    first, second, third = np.cumsum(SIZES[:3])
    inner, outer = weights[:first].reshape(SHAPES[0]), weights[second:third].reshape(SHAPES[2])
    hidden = np.maximum(images @ inner + weights[first:second], 0)
    outputs = hidden @ outer + weights[third:]
    chances = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    chances[np.arange(len(labels)), labels] -= 1
    chances /= len(labels)
    back = (chances @ outer.T) * (hidden > 0)
    return np.concatenate([(images.T @ back).ravel(), back.sum(0), (hidden.T @ chances).ravel(), chances.sum(0)])


# --- spaces -------------------------------------------------------------------------------------------------------------


@cache
def box() -> SearchSpace:
    """Return the space of all weights."""
    return SearchSpace(tuple(Variable(f"w{number}", -BOUND, BOUND) for number in range(SIZE)))


def pair_space(pair: Sequence[Floats]) -> TableSpace:
    """Return the tables over a pair of models, with inner products for every position (and a base that is 0)."""
    names = ("layers.0.matrix", "layers.0.offset", "layers.1.matrix", "layers.1.offset")
    models = np.array([np.zeros(SIZE), *pair], dtype=np.float64)
    products = np.einsum("ik,jk->kij", models, models)
    problem = Problem(
        models={name: ModelId(ref=ModelRef(path=name), digest="0" * 64) for name in ("base", "low", "high")},
        layout=make_layout((name, shape, "F32") for name, shape in zip(names, SHAPES, strict=True)),
        operator=OperatorInfo(name="linear", summary="Averages.", reference="arXiv 2203.05482", uses_base=False),
        objectives=[
            ResolvedObjective(
                name="digits",
                metric="accuracy",
                direction="maximise",
                weight=1.0,
                items=len(digits().labels),
                data_digest="0" * 64,
            )
        ],
        grams=Grams.pack(list(range(SIZE + 1)), products),
    )
    return TableSpace(variables=(), problem=problem)


def materialise(table: Table, pair: Sequence[Floats]) -> Floats:
    """Return the weights that a table of two models stands for."""
    widths = np.diff([0, *table.breaks.tolist(), SIZE])
    first, second = (np.repeat(column.astype(np.float32), widths) for column in table.coefficients.T[1:])
    return np.asarray(first * pair[0] + second * pair[1])


# --- one search ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One search: a method on one seed."""

    start: str
    name: str
    method: Method
    seed: int
    evaluations: int


def search(task: Task) -> dict[str, Any]:
    """Run one search; returns the test accuracy as it grew, what the last best candidate had, and its speed."""
    random = np.random.Generator(np.random.PCG64(task.seed))
    if task.start == "scratch":
        seeds = [random_model(random) for _ in range(2)]
        context = AlgorithmContext(box(), np.ones(1), task.seed, seeds[0].astype(np.float64), budget=task.evaluations)
        genomes = [seed.astype(np.float64) for seed in seeds]
        weights: Callable[[Genome], Floats] = lambda genome: genome.astype(np.float32)  # noqa: E731
    else:
        pair = [trained(random, 0, 4), trained(random, 5, 9)]
        space = pair_space(pair)
        context = AlgorithmContext(space, np.ones(1), task.seed, space.uniform(), budget=task.evaluations)
        genomes = [space.alone(name) for name in ("low", "high")]
        weights = lambda genome: materialise(space.table(genome), pair)  # noqa: E731
    cls = ALGORITHMS[task.method.algorithm]
    algorithm = cls(context, cls.Options.model_validate(task.method.options))
    return {"start": task.start, "name": task.name, "seed": task.seed} | _drive(
        algorithm, genomes, weights, task.evaluations
    )


def _drive(
    algorithm: Algorithm, foreign: Sequence[Genome], weights: Callable[[Genome], Floats], evaluations: int
) -> dict[str, Any]:
    data, best, curve, spent = digits(), (-1.0, 0.0), [], 0.0
    covered = np.zeros(len(data.labels), dtype=bool)
    began, longest = time.perf_counter(), 0
    for number in range(-len(foreign), evaluations):
        since = time.perf_counter()
        genome = foreign[number + len(foreign)] if number < 0 else algorithm.ask(1)[0].genome
        spent += time.perf_counter() - since
        model = weights(genome)
        correct = right(model, data.images, data.labels)
        accuracy = float(correct.mean())
        if accuracy > best[0]:
            best = accuracy, float(right(model, data.test_images, data.test_labels).mean())
        since = time.perf_counter()
        gains = (correct.astype(np.float32),)
        algorithm.tell(Outcome(number + len(foreign), genome, np.array([-accuracy]), own=number >= 0, gains=gains))
        spent += time.perf_counter() - since
        covered |= correct
        longest = max(longest, len(genome))
        if (number + 1) % max(1, evaluations // POINTS) == 0 and number >= 0:
            curve.append([number + 1, round(100 * best[1], 2)])
    return {
        "test": round(100 * best[1], 2),
        "search": round(100 * best[0], 2),
        "ever right": round(100 * float(covered.mean()), 2),
        "curve": curve,
        "per second": round(evaluations / (time.perf_counter() - began), 1),
        "search ms per candidate": round(1000 * spent / max(1, evaluations), 4),
        "longest genome": longest,
    }


def brute_force(seed: int, points: int) -> dict[str, Any]:
    """Try SLERP at evenly spaced places between a pair; returns the test accuracy of the best on the search's items."""
    random, data = np.random.Generator(np.random.PCG64(seed)), digits()
    pair = [trained(random, 0, 4), trained(random, 5, 9)]
    cosine = float(pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1]))
    angle, best = np.arccos(cosine), (-1.0, pair[0])
    for t in np.linspace(0, 1, points):
        child = (np.sin((1 - t) * angle) * pair[0] + np.sin(t * angle) * pair[1]) / np.sin(angle)
        child = child.astype(np.float32)
        best = max(best, (float(right(child, data.images, data.labels).mean()), child), key=lambda found: found[0])
    test = float(right(best[1], data.test_images, data.test_labels).mean())
    return {
        "start": "pre-trained",
        "name": "brute force",
        "seed": seed,
        "test": round(100 * test, 2),
        "search": round(100 * best[0], 2),
    }


# --- the same with full vectors -----------------------------------------------------------------------------------------


def plain_numpy(pair: Sequence[Floats], evaluations: int, seed: int) -> Iterator[tuple[float, float]]:
    """M2N2 from a pair, written straight down with an archive of full vectors; yields accuracy and its own seconds."""
    random, data = np.random.default_rng(seed), digits()
    archive, scores = np.zeros((21, SIZE), np.float32), np.zeros((21, len(data.labels)))
    for number, model in enumerate(pair):
        archive[number], scores[number] = model, right(model, data.images, data.labels)
    for _ in range(evaluations):
        since = time.perf_counter()
        z = scores[:20].sum(axis=0)
        shares = scores[:20] / np.where(z, z, 1)
        fitness = shares.sum(axis=1)
        a = random.choice(20, p=fitness / fitness.sum())
        pull = np.maximum(0, shares - shares[a]).sum(axis=1)
        b = random.choice(20, p=pull / pull.sum() if pull.any() else fitness / fitness.sum())
        one, two = archive[a], archive[b]
        cosine = float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
        angle, t, split = np.arccos(np.clip(cosine, -1, 1)), random.random(), random.integers(SIZE)
        weight = np.where(np.arange(SIZE) < split, t, 1 - t).astype(np.float32)
        if np.sin(angle) > 1e-6:
            child = np.sin((1 - weight) * angle) / np.sin(angle) * one + np.sin(weight * angle) / np.sin(angle) * two
        else:
            child = (1 - weight) * one + weight * two
        spent = time.perf_counter() - since
        archive[20], scores[20] = child, right(child.astype(np.float32), data.images, data.labels)
        since = time.perf_counter()
        z = scores.sum(axis=0)
        worst = int(np.argmin((scores / np.where(z, z, 1)).sum(axis=1)))
        archive[worst], scores[worst] = archive[20], scores[20]
        yield float(scores[20].mean()), spent + time.perf_counter() - since


def speed(evaluations: int) -> dict[str, Any]:
    """Measure M2N2 from a pair as tables and as full vectors, one after the other: candidates per second."""
    seed = FIRST_SEED
    tables = search(Task("pre-trained", "M2N2", Method("m2n2"), seed, evaluations))
    random = np.random.Generator(np.random.PCG64(seed))
    pair = [trained(random, 0, 4), trained(random, 5, 9)]
    began = time.perf_counter()
    found = list(plain_numpy(pair, evaluations, seed))
    took = time.perf_counter() - began
    return {
        "evaluations": evaluations,
        "tables, per second": tables["per second"],
        "tables, search ms per candidate": tables["search ms per candidate"],
        "full vectors, per second": round(evaluations / took, 1),
        "full vectors, search ms per candidate": round(1000 * sum(spent for _, spent in found) / evaluations, 4),
        "full vectors, best on the search's items": round(100 * max(accuracy for accuracy, _ in found), 2),
        "tables, best on the search's items": tables["search"],
        "tables, numbers of the longest genome": tables["longest genome"],
        "full vectors, numbers": SIZE,
    }


# --- the benchmark ------------------------------------------------------------------------------------------------------


def run(
    quick: bool,
    *,
    scratch: int = 50_000,
    pretrained: int = 10_000,
    seeds: int = 10,
    pairs: int = 10,
    processes: int = 1,
    methods: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run all methods on all seeds.

    Args:
        quick: 60 evaluations from scratch, and 200 on two pairs, instead, without CMA-ES, which takes longest.
        scratch: evaluations from scratch.
        pretrained: evaluations from a pre-trained pair.
        seeds: number of runs from scratch; the first seed is 42.
        pairs: number of pre-trained pairs, each with a seed of its own; the first is 42.
        processes: searches at once.
        methods: names of the methods from scratch, where not all.
    """
    if quick:
        scratch, pretrained, seeds, pairs = 60, 200, 1, 2
        methods = [name for name in _scratch() if "CMA-ES" not in name]
    wanted = {name: method for name, method in _scratch().items() if methods is None or name in methods}
    numbers = {"scratch": range(FIRST_SEED, FIRST_SEED + seeds), "pre-trained": range(FIRST_SEED, FIRST_SEED + pairs)}
    budgets = {"scratch": scratch, "pre-trained": pretrained}
    tasks = [
        Task(start, name, method, seed, budgets[start])
        for start, kinds in (("scratch", wanted), ("pre-trained", _pretrained()))
        for name, method in kinds.items()
        for seed in numbers[start]
    ]
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            found = pool.map(search, tasks, chunksize=1)
    else:
        found = [search(task) for task in tasks]
    found += [brute_force(seed, 50 if quick else 1000) for seed in numbers["pre-trained"]]
    return {
        "evaluations": budgets,
        "seeds": {start: list(seeds_of) for start, seeds_of in numbers.items()},
        "options": {"scratch": _told(wanted), "pre-trained": _told(_pretrained())},
        "summary": {start: _summary(found, start) for start in ("scratch", "pre-trained")},
        "speed": speed(200 if quick else 5000),
        "runs": found,
    }


def _told(methods: dict[str, Method]) -> dict[str, Any]:
    """The options as they stand in the figures, without the list of items' groups."""
    return {
        name: {"algorithm": method.algorithm}
        | {key: value if key != "item_groups" else "odd and even digits" for key, value in method.options.items()}
        for name, method in methods.items()
    }


def _summary(found: Sequence[dict[str, Any]], start: str) -> dict[str, Any]:
    """Test accuracy in per cent by method: mean, standard error, and the curve's mean."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(each["name"] for each in found if each["start"] == start):
        runs = [each for each in found if (each["start"], each["name"]) == (start, name)]
        tests = np.array([each["test"] for each in runs])
        error = float(tests.std(ddof=1) / np.sqrt(len(tests))) if len(tests) > 1 else 0.0
        out[name] = {"test": round(float(tests.mean()), 2), "standard error": round(error, 2)}
        if "curve" in runs[0]:
            curves = np.array([each["curve"] for each in runs])
            out[name]["curve"] = np.round(curves.mean(axis=0), 2).tolist()
    return out


def plot(measured: dict[str, Any], figure: Any) -> None:
    """Draw the mean test accuracy against evaluations, from scratch and from pairs."""
    for axes, (start, methods) in zip(figure.subplots(1, 2), measured["summary"].items(), strict=True):
        for name, each in methods.items():
            if "curve" in each:
                axes.plot(*np.array(each["curve"]).T, label=f"{name} {each['test']:.1f}")
            else:
                axes.axhline(each["test"], color="grey", linestyle=":", label=f"{name} {each['test']:.1f}")
        axes.set(title=start, xlabel="evaluations", ylabel="test accuracy, %")
        axes.legend(fontsize="x-small")


if __name__ == "__main__":
    main("niches", run, plot)
