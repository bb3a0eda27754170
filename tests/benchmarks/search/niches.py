"""M2N2 and its baselines on `load_digits`, as in its paper (arXiv 2508.16204): from scratch, and from pre-trained pairs.

The network has 64 inputs (0 to 16, not scaled), 256 hidden units with ReLU and 10 outputs: 19,210 parameters. The first
80 % of the scans are what the search sees, scored right or wrong one by one; accuracies are on the other 360, of the
candidate that did best on the search's. Pre-trained models had 10 steps of Adam on the digits 0 to 4, or 5 to 9. The
searches are the registered ones, asked and told one candidate at a time as in the paper.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from optimizer.algorithms import ALGORITHMS, AlgorithmContext, Outcome, Proposal
from optimizer.geometry import make_layout
from optimizer.problem import Grams, OperatorInfo, Problem, ResolvedObjective
from optimizer.recipe import ModelId
from optimizer.space import Genome, SearchSpace, Variable
from optimizer.spec import ModelRef
from optimizer.tables import Table, TableSpace
from tests.benchmarks.search.common import main
from tests.benchmarks.search.kept import results

Floats = NDArray[np.float32]
Bits = NDArray[np.bool_]

SHAPES = ((64, 256), (256,), (256, 10), (10,))
SIZES = [int(np.prod(shape)) for shape in SHAPES]
SIZE = sum(SIZES)
BLOCK = 720
"""Scans whose hidden layer is in the processor's cache at once."""
BOUND = 5.0
"""Weights are searched between -5 and 5, which nothing ever reached."""
CACHE = Path(__file__).parents[1] / ".cache" / "niches"
FIRST_SEED = 42
POINTS = 50
"""Points of a curve."""


@dataclass(frozen=True)
class Method:
    """A search with its options: an algorithm's name, or `pycma` for `PlainCma`."""

    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)


def _scratch() -> dict[str, Method]:
    noise = {"mutation": 0.01 / (2 * BOUND)}
    free = {"attraction": False, "duplicates": True, **noise}
    ga = {"alpha": 0.0, **free}
    return {
        "M2N2": Method("m2n2", noise),
        "M2N2, no split": Method("m2n2", {"cuts": "none", **noise}),
        "M2N2, no attraction": Method("m2n2", free),
        "M2N2, no crossover": Method("m2n2", {"crossover": False, **noise}),
        "GA": Method("m2n2", ga),
        "GA, no crossover": Method("m2n2", {"crossover": False, **ga}),
        "MAP-Elites": Method("map_elites", {"item_groups": (digits().labels % 2).tolist(), **noise}),
        "pycma, separable": Method("pycma", {"CMA_diagonal": True}),
        "pycma, step size only": Method("pycma", {"CMA_diagonal": True, "CMA_on": 0}),
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
    """The scans: those the search sees, and the others; images have shape (items, 65), ones last."""

    images: Floats
    labels: NDArray[np.int64]
    test_images: Floats
    test_labels: NDArray[np.int64]


@cache
def digits() -> Digits:
    """Return the scans in the order of scikit-learn, split after 80 %."""
    images, labels = load_digits(return_X_y=True)
    images, cut = np.hstack([images, np.ones((len(images), 1))]).astype(np.float32), int(len(images) * 0.8)
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


def right(weights: Floats, images: Floats, labels: NDArray[np.int64]) -> Bits:
    """Return which images the network with these weights, shape (19210,), gets right.

    The images are `Digits.images`, with a last column of ones for the offsets: as these follow the matrices in the flat
    vector, both are one matrix.
    """
    _, second, third = np.cumsum(SIZES[:3])
    inner, outer = weights[:second].reshape(-1, SHAPES[0][1]), weights[second:third].reshape(SHAPES[2])
    outputs = np.empty((len(images), len(outer.T)), np.float32)
    hidden = np.empty((min(BLOCK, len(images)), len(outer)), np.float32)
    for begin in range(0, len(images), BLOCK):
        block = images[begin : begin + BLOCK]
        part = np.matmul(block, inner, out=hidden[: len(block)])
        np.maximum(part, 0, out=part)
        np.matmul(part, outer, out=outputs[begin : begin + BLOCK])
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
        slope = _slope(weights, data.images[chosen, :-1].astype(np.float64), data.labels[chosen])
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


class Searcher(Protocol):
    """What a search is driven by."""

    def ask(self, count: int) -> list[Proposal]:
        """Return proposals."""

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome."""


class PlainCma:
    """pycma without bounds, as the released code of M2N2 calls it, but with a covariance that fits into memory.

    Its full covariance of 19,210 variables would learn next to nothing in 50,000 evaluations (a rate of 2e-8 a
    generation), so it is between one that is diagonal and none at all (``CMA_on`` = 0).
    """

    POPULATION, SIGMA = 20, 0.01

    def __init__(self, start: Genome, random: np.random.Generator, options: dict[str, Any]) -> None:
        quiet = {"verbose": -9, "verb_log": 0, "signals_filename": None}
        own = {"seed": np.nan, "randn": lambda *shape: random.standard_normal(shape), "popsize": self.POPULATION}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it regrets the absence of moviepy, and options that are None
            from cma import CMAEvolutionStrategy

            self._strategy = CMAEvolutionStrategy(start, self.SIGMA, quiet | own | options)
        self._queue: list[Genome] = []
        self._told: list[Outcome] = []

    def ask(self, count: int) -> list[Proposal]:
        """Return the next of the generation."""
        if not self._queue:
            self._queue = list(self._strategy.ask())
        out, self._queue = self._queue[:count], self._queue[count:]
        return [Proposal(genome) for genome in out]

    def tell(self, outcome: Outcome) -> None:
        """Take in one of the generation; it never stops, as in the released code."""
        self._told += [outcome] if outcome.own else []
        if len(self._told) == self.POPULATION:
            losses = [float(told.losses[0]) for told in self._told if told.losses is not None]
            self._strategy.tell([told.genome for told in self._told], losses)
            self._told = []


def search(task: Task) -> dict[str, Any]:
    """Run one search; returns the test accuracy as it grew, what the last best candidate had, and its speed."""
    random = np.random.Generator(np.random.PCG64(task.seed))
    if task.start == "scratch":
        # A third one for a grid in which both of the others are in the same cell.
        models = [random_model(random).astype(np.float64) for _ in range(3)]
        genomes, start = models[:2], models[2]
        space: SearchSpace = box()
        weights: Callable[[Genome], Floats] = lambda genome: genome.astype(np.float32)  # noqa: E731
    else:
        pair = [trained(random, 0, 4), trained(random, 5, 9)]
        space = tables = pair_space(pair)
        genomes, start = [tables.alone(name) for name in ("low", "high")], tables.uniform()
        weights = lambda genome: materialise(tables.table(genome), pair)  # noqa: E731
    method = task.method
    if method.algorithm == "pycma":
        searcher: Searcher = PlainCma(genomes[0], random, method.options)
        genomes = []
    else:
        cls = ALGORITHMS[method.algorithm]
        context = AlgorithmContext(space, np.ones(1), task.seed, start, budget=task.evaluations)
        searcher = cls(context, cls.Options.model_validate(method.options))
    return {"start": task.start, "name": task.name, "seed": task.seed} | _drive(
        searcher, genomes, weights, task.evaluations
    )


def _drive(
    searcher: Searcher, foreign: Sequence[Genome], weights: Callable[[Genome], Floats], evaluations: int
) -> dict[str, Any]:
    data, best, curve = digits(), (-1.0, 0.0), []
    spent = np.zeros(evaluations + len(foreign))
    covered = np.zeros(len(data.labels), dtype=bool)
    began, busy, longest, largest = time.perf_counter(), time.process_time(), 0, 0.0
    for number in range(-len(foreign), evaluations):
        since = time.perf_counter()
        genome = foreign[number + len(foreign)] if number < 0 else searcher.ask(1)[0].genome
        spent[number] += time.perf_counter() - since
        model = weights(genome)
        correct = right(model, data.images, data.labels)
        accuracy = float(correct.mean())
        if accuracy > best[0]:
            best = accuracy, float(right(model, data.test_images, data.test_labels).mean())
            largest = float(np.abs(model).max())
        since = time.perf_counter()
        gains = (correct.astype(np.float32),)
        searcher.tell(Outcome(number + len(foreign), genome, np.array([-accuracy]), own=number >= 0, gains=gains))
        spent[number] += time.perf_counter() - since
        covered |= correct
        longest = max(longest, len(genome))
        if (number + 1) % max(1, evaluations // POINTS) == 0 and number >= 0:
            curve.append([number + 1, round(100 * best[1], 2)])
    return {
        "test": round(100 * best[1], 2),
        "search": round(100 * best[0], 2),
        "ever right": round(100 * float(covered.mean()), 2),
        "curve": curve,
        "largest weight": round(largest, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "CPU seconds": round(time.process_time() - busy, 1),
        "search ms per candidate": round(1000 * float(np.median(spent)), 4),
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
    """Measure M2N2 from a pair as tables and as full vectors, one after the other.

    Candidates per second of CPU, and what the search itself takes of one: the median, which other processes do not move.
    """
    seed = FIRST_SEED
    tables = search(Task("pre-trained", "M2N2", Method("m2n2"), seed, evaluations))
    random = np.random.Generator(np.random.PCG64(seed))
    pair = [trained(random, 0, 4), trained(random, 5, 9)]
    began = time.process_time()
    found = list(plain_numpy(pair, evaluations, seed))
    took = time.process_time() - began
    return {
        "evaluations": evaluations,
        "tables, per CPU second": round(evaluations / max(tables["CPU seconds"], 0.1), 1),
        "tables, search ms per candidate": tables["search ms per candidate"],
        "full vectors, per CPU second": round(evaluations / took, 1),
        "full vectors, search ms per candidate": round(1000 * float(np.median([spent for _, spent in found])), 4),
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
) -> dict[str, Any]:
    """Run all methods on all seeds; what an interrupted call has run is not run again (`CACHE`).

    Args:
        quick: 40 evaluations from scratch, and 120 on two pairs, instead.
        scratch: evaluations from scratch.
        pretrained: evaluations from a pre-trained pair.
        seeds: number of runs from scratch; the first seed is 42.
        pairs: number of pre-trained pairs, each with a seed of its own; the first is 42.
        processes: searches at once.
    """
    if quick:
        scratch, pretrained, seeds, pairs = 40, 120, 1, 2
    numbers = {"scratch": range(FIRST_SEED, FIRST_SEED + seeds), "pre-trained": range(FIRST_SEED, FIRST_SEED + pairs)}
    budgets = {"scratch": scratch, "pre-trained": pretrained}
    methods = {"scratch": _scratch(), "pre-trained": _pretrained()}
    tasks = [
        Task(start, name, method, seed, budgets[start])
        for start, seeds_of in numbers.items()
        for seed in seeds_of
        for name, method in methods[start].items()
    ]
    found = results(tasks, search, None if quick else CACHE, processes)
    found += [brute_force(seed, 50 if quick else 1000) for seed in numbers["pre-trained"]]
    return {
        "evaluations": budgets,
        "seeds": {start: list(seeds_of) for start, seeds_of in numbers.items()},
        "options": {start: _told(kinds) for start, kinds in methods.items()},
        "summary": {start: _summary(found, start) for start in numbers},
        "CPU seconds": round(sum(each.get("CPU seconds", 0.0) for each in found), 1),
        "speed": speed(120 if quick else 5000),
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
        best = np.mean([each["search"] for each in runs])
        out[name] = {
            "test": round(float(tests.mean()), 2),
            "standard error": round(error, 2),
            "search": round(float(best), 2),
        }
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
    main("niches", run, plot, seeds=10, pairs=10, processes=1)
