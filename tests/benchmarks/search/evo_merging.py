"""Evo-Merging on repositories of 20 and 100 LoRA adapters: its ablations, beside baselines and plain CMA-ES.

A network of 64-48-10 neurons has learnt scikit-learn's `load_digits`; the task is the same digits with their pixels
permuted. A tenth or a fifth of the adapters (rank 8, on both layers) were trained on the task, on six digits each, some
are copies of these with the sign of B turned, most belong to other permutations, and some were trained on the task with
shuffled labels (`Counts`). They are merged as `lora_factors` does: the A's and the B's separately, so that the products
have cross terms. Each adapter has an initial A of its own, or all share one, as adapters do that were trained with the
same seed. Stages, budgets, λ and σ₀ are those of the released code (400 and 800 evaluations, 0.05).

What this shows, and why denoising gains little where the adapters are many, stands in tests/benchmarks/README.md.

Run as ``python -m tests.benchmarks.search.evo_merging [--quick] [--out DIR]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from optimizer.algorithms import ALGORITHMS, Algorithm, AlgorithmContext, Outcome
from optimizer.baseline_space import METHODS
from optimizer.space import Genome, SearchSpace, Variable
from tests.benchmarks.search.common import main
from tests.factories import make_problem, make_spec
from tests.workers.merging import running
from workers.checkpoints import Factors
from workers.merging.operator import OPERATORS

Array = NDArray[np.float64]
SIZES = (64, 48, 10)
RANK = 8
TRAIN, SEARCH = 1200, 297
EVALUATIONS = 1200
BETA = 1.5
MOVED = 32
"""Pixels that a permutation moves. With all 64 the network was sure and wrong, and no merge came above 0.42 (one seed)."""
OTHERS = 6
"""Permutations other than the task's."""
DIGITS = 6
"""Digits that an adapter of the task was trained on."""
BASE_STEPS = 60
STEPS = 200
LR = 2e-3

ABLATIONS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (1.0, {}),
    "no denoising": (2 / 3, {"denoise": False}),
    "no denoising, its evaluations too": (1.0, {"denoise": False}),
    "denoising without penalty": (1.0, {"l1_denoise": 0.0}),
    "no sign flip": (1.0, {"sign_flip": False}),
    "no scaling": (1 / 3, {"scale": False}),
}
"""Share of the evaluations, and options: as published, an ablation lacks the evaluations of the stage it lacks."""
PUBLISHED = {"full": 52.13, "no denoising": 40.94, "no sign flip": 40.06, "no scaling": 24.27, "neither": 20.75}
"""F1 in percent, Llama-3.1-8B on tasks outside the repository (arXiv 2509.12951).

The row without denoising is, to both decimals, that of LoRAHub, another search: it does not say what the stage gains.
"""


@dataclass(frozen=True)
class Counts:
    """How many adapters of each sort there are."""

    good: int = 10
    flipped: int = 10
    other: int = 60
    shuffled: int = 20

    @property
    def total(self) -> int:
        return self.good + self.flipped + self.other + self.shuffled


@dataclass(frozen=True)
class Pool:
    """A repository's adapters; whether they all begin from the same A."""

    counts: Counts
    shared: bool


FEW = Counts(4, 2, 10, 4)
"""Twenty adapters, as the released code has them."""
POOLS = {
    "100, own A": Pool(Counts(), False),
    "100, shared A": Pool(Counts(), True),
    "20, own A": Pool(FEW, False),
    "20, shared A": Pool(FEW, True),
}
QUICK = {"12, own A": Pool(Counts(2, 2, 6, 2), False), "12, shared A": Pool(Counts(2, 2, 6, 2), True)}


@dataclass(frozen=True)
class Data:
    """Images, shape (items, 64), and digits, shape (items,)."""

    images: Array
    digits: NDArray[np.int64]


@dataclass(frozen=True)
class Repository:
    """A network with its adapters and a task.

    Attributes:
        weights: of the layers, shape (out, in).
        biases: of the layers.
        up: B of each layer, shape (adapters, out, rank).
        down: A of each layer, shape (adapters, rank, in).
        search, test: the task's items.
    """

    weights: list[Array]
    biases: list[Array]
    up: list[Array]
    down: list[Array]
    search: Data
    test: Data

    @property
    def count(self) -> int:
        """Number of adapters."""
        return len(self.up[0])

    @cached_property
    def _sorted(self) -> list[Array]:
        return [np.sort(np.abs(part).reshape(self.count, -1), axis=1) for part in self.down]

    @cached_property
    def products(self) -> list[Array]:
        """B A of each layer and adapter."""
        return [np.einsum("nor,nri->noi", up, down) for up, down in zip(self.up, self.down, strict=True)]

    @cached_property
    def trimmed(self) -> list[Array]:
        """The largest fifth of each product's entries, as TIES keeps them."""
        return [np.array([_largest(part, 0.2) for part in layer]) for layer in self.products]

    def factors(self, beta: Array, alpha: Array) -> list[Array]:
        """What `lora_factors` adds to each layer: (Σ β_i B_i)(Σ β_i S_{α_i}(A_i))."""
        out: list[Array] = []
        for up, down, ordered in zip(self.up, self.down, self._sorted, strict=True):
            size = ordered.shape[1]
            kept = np.where(alpha > 0, np.maximum(1, np.round(size * alpha)), 0).astype(int)
            limits = np.where(kept > 0, ordered[np.arange(self.count), np.minimum(size - kept, size - 1)], np.inf)
            sparse = np.where(np.abs(down) >= limits[:, None, None], down, 0.0)
            out.append(np.asarray(np.tensordot(beta, up, 1) @ np.tensordot(beta, sparse, 1)))
        return out

    def baseline(self, genome: Genome) -> list[Array]:
        """What a genome of `BaselineSpace` adds to each layer."""
        method, strength, weights = METHODS[int(genome[0])], genome[1], genome[2:]
        if method == "ties":
            return [np.asarray(strength * _agreeing(layer)) for layer in self.trimmed]
        if method == "linear":
            weights = weights / weights.sum()
        elif method == "task_arithmetic":
            weights = strength * weights
        return [np.asarray(np.tensordot(weights, layer, 1)) for layer in self.products]

    def measure(self, added: Iterable[Array], data: Data) -> tuple[float, float]:
        """Cross-entropy and accuracy."""
        first, second = (weight + delta for weight, delta in zip(self.weights, added, strict=True))
        hidden = np.maximum(data.images @ first.T + self.biases[0], 0.0)
        logits = hidden @ second.T + self.biases[1]
        logits -= logits.max(axis=1, keepdims=True)
        chances = logits[np.arange(len(logits)), data.digits] - np.log(np.exp(logits).sum(axis=1))
        return float(-chances.mean()), float((logits.argmax(axis=1) == data.digits).mean())


def _largest(values: Array, share: float) -> Array:
    limit = np.sort(np.abs(values), axis=None)[-max(1, int(share * values.size))]
    return np.where(np.abs(values) >= limit, values, 0.0)


def _agreeing(deltas: Array) -> Array:
    same = np.where(np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1.0, -1.0), deltas, 0.0)
    return np.asarray(same.sum(axis=0) / np.maximum((same != 0).sum(axis=0), 1))


# --- the repository -------------------------------------------------------------------------------------------------


def make_repository(seed: int, counts: Counts, shared: bool, steps: int = STEPS) -> Repository:
    """Train the network and its adapters.

    Args:
        shared: whether all adapters begin from the same A.
        steps: of Adam, in batches of 64, for each adapter.
    """
    random = np.random.default_rng(seed)
    found = load_digits()
    order = random.permutation(len(found.target))
    images, digits = found.data[order] / 16.0, found.target[order].astype(np.int64)
    permutations = [_moved(MOVED, random) for _ in range(1 + OTHERS)]
    weights, biases = _train_base(images[:TRAIN], digits[:TRAIN], seed)
    trained = counts.good + counts.other + counts.shuffled
    chosen, labels, which = _assignments(counts, digits[:TRAIN], random)
    up, down = _train_adapters(
        (weights, biases),
        [images[:TRAIN][:, permutation] for permutation in permutations],
        (chosen, labels, which),
        seed,
        shared,
        steps,
    )
    assert len(up[0]) == trained
    for layer in range(2):
        copies = slice(0, counts.flipped)
        up[layer] = np.concatenate([up[layer], -up[layer][: counts.good][copies]])
        down[layer] = np.concatenate([down[layer], down[layer][: counts.good][copies]])
    task = images[:, permutations[0]]
    ends = (slice(TRAIN, TRAIN + SEARCH), slice(TRAIN + SEARCH, None))
    search, test = (Data(task[end], digits[end]) for end in ends)
    return Repository(weights, biases, up, down, search, test)


def _moved(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of the pixels that leaves all but ``count`` where they are."""
    out = np.arange(64)
    places = random.permutation(64)[:count]
    out[places] = random.permutation(places)
    return out


def _assignments(
    counts: Counts, digits: NDArray[np.int64], random: np.random.Generator
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], list[int]]:
    """For each adapter the images it sees, the labels of all images, and the number of its permutation (0: the task)."""
    chosen, labels, which = [], [], []
    for number in range(counts.good + counts.other + counts.shuffled):
        good, shuffled = number < counts.good, number >= counts.good + counts.other
        seen = random.permutation(10)[:DIGITS] if good else np.arange(10)
        chosen.append(np.flatnonzero(np.isin(digits, seen)))
        labels.append(random.permutation(digits) if shuffled else digits)
        which.append(0 if good or shuffled else 1 + number % OTHERS)
    return chosen, labels, which


def _train_base(images: Array, digits: NDArray[np.int64], seed: int) -> tuple[list[Array], list[Array]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [(torch.randn(o, i, generator=generator) / i**0.5).requires_grad_() for i, o in itertools.pairwise(SIZES)]
    biases = [torch.zeros(o, requires_grad=True) for o in SIZES[1:]]
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(digits)
    adam = torch.optim.Adam([*weights, *biases], lr=1e-2)
    for _ in range(BASE_STEPS):
        logits = torch.relu(x @ weights[0].T + biases[0]) @ weights[1].T + biases[1]
        adam.zero_grad()
        torch.nn.functional.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return [_array(part) for part in weights], [_array(part) for part in biases]


def _train_adapters(
    base: tuple[list[Array], list[Array]],
    images: list[Array],
    assignments: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], list[int]],
    seed: int,
    shared: bool,
    steps: int,
) -> tuple[list[Array], list[Array]]:
    """All adapters at once, as batched products; initialised as PEFT does, B with zeros."""
    generator = torch.Generator().manual_seed(seed + 1)
    chosen, labels, which = assignments
    count = len(chosen)
    weights, biases = ([torch.tensor(part, dtype=torch.float32) for part in parts] for parts in base)
    down, up = [], []
    for i, o in itertools.pairwise(SIZES):
        first = (torch.rand(1 if shared else count, RANK, i, generator=generator) * 2 - 1) / i**0.5
        down.append(first.expand(count, -1, -1).clone().requires_grad_())
        up.append(torch.zeros(count, o, RANK, requires_grad=True))
    x = torch.tensor(np.array(images), dtype=torch.float32)
    y = torch.tensor(np.array(labels))
    random = np.random.default_rng(seed + 2)
    adam = torch.optim.Adam([*down, *up], lr=LR)
    for _ in range(steps):
        picked = np.array([random.choice(indices, 64) for indices in chosen])
        batch = torch.stack([x[which[n], picked[n]] for n in range(count)])
        target = torch.stack([y[n, picked[n]] for n in range(count)])
        hidden = torch.relu(_layer(batch, weights[0], biases[0], up[0], down[0]))
        logits = _layer(hidden, weights[1], biases[1], up[1], down[1])
        adam.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").div(64).backward()  # type: ignore[no-untyped-call]
        adam.step()
    return [_array(part) for part in up], [_array(part) for part in down]


def _layer(x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x @ weight.T + bias + (x @ down.transpose(1, 2)) @ up.transpose(1, 2)


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy())


# --- the searches ---------------------------------------------------------------------------------------------------

Added = Callable[[Genome], list[Array]]


def search(algorithm: Algorithm, added: Added, repository: Repository, evaluations: int) -> tuple[Genome, list[float]]:
    """Run a search; returns the best genome by its loss alone, and the best loss after each evaluation."""
    best: tuple[float, Genome] = (np.inf, algorithm.context.start)
    curve: list[float] = []
    while len(curve) < evaluations:
        proposals = algorithm.ask(min(algorithm.batch_size, evaluations - len(curve)))
        if not proposals:
            break
        for proposal in proposals:
            loss = repository.measure(added(proposal.genome), repository.search)[0]
            best = min(best, (loss, proposal.genome), key=lambda pair: pair[0])
            algorithm.tell(Outcome(len(curve), proposal.genome, np.array([loss])))
            curve.append(best[0])
    return best[1], curve


def evo_space(count: int) -> SearchSpace:
    """In a plain box the first half are densities."""
    return SearchSpace(
        (
            *(Variable(f"alpha {n}", 0.0, 1.0) for n in range(count)),
            *(Variable(f"beta {n}", -BETA, BETA) for n in range(count)),
        )
    )


def make(name: str, space: SearchSpace, start: Genome, seed: int, evaluations: int, **options: Any) -> Algorithm:
    """An algorithm of the registry."""
    cls = ALGORITHMS[name]
    context = AlgorithmContext(space, np.ones(1), seed, start, 1, evaluations)
    return cls(context, cls.Options.model_validate(options))


def compare(repository: Repository, seed: int, evaluations: int) -> dict[str, dict[str, Any]]:
    """Loss and accuracy of everything on the search and test items."""
    count = repository.count
    uniform, whole = np.full(count, 1.0 / count), np.ones(count)
    out: dict[str, dict[str, Any]] = {}

    def note(name: str, parts: list[Array], curve: list[float] | None = None) -> None:
        loss, accuracy = repository.measure(parts, repository.test)
        out[name] = {
            "search loss": repository.measure(parts, repository.search)[0],
            "test loss": loss,
            "test accuracy": accuracy,
            "evaluations": len(curve or []),
            "curve": [round(value, 5) for value in (curve or [])[:: max(1, evaluations // 60)]],
        }

    def two_stages(genome: Genome) -> list[Array]:
        return repository.factors(genome[count:], genome[:count])

    for name, (share, options) in ABLATIONS.items():
        spent = round(share * evaluations)
        start = np.concatenate([whole, uniform])
        algorithm = make("evo_merging", evo_space(count), start, seed, spent, **options)
        best, curve = search(algorithm, two_stages, repository, spent)
        note(name, two_stages(best), curve)
        out[name]["mean kept"] = float(best[:count].mean())
    note("neither", repository.factors(uniform, whole))
    space = SearchSpace(tuple(Variable(f"beta {n}", -BETA, BETA) for n in range(count)))
    for name, sigma in (("CMA-ES, its σ₀", None), ("CMA-ES, σ₀ = 0.05", 0.05 / (2 * BETA))):
        options = {} if sigma is None else {"sigma0": sigma}
        plain = make("cma_es", space, uniform, seed, evaluations, **options)
        best, curve = search(plain, lambda beta: repository.factors(beta, whole), repository, evaluations)
        note(name, repository.factors(best, whole), curve)
    for name, parts, spent in _baselines(repository, seed):
        note(name, parts)
        out[name]["evaluations"] = spent
    note("network alone", [np.zeros_like(weight) for weight in repository.weights])
    return out


def _baselines(repository: Repository, seed: int) -> list[tuple[str, list[Array], int]]:
    """The best of each sort of baseline, on the products, with the evaluations that all took together."""
    spec = make_spec(
        experts=[{"name": f"a{number}", "path": f"a{number}"} for number in range(repository.count)],
        objectives=[{"name": "task", "evaluator": "classification", "data": {"path": "x"}, "metric": "loss"}],
    )
    cls = ALGORITHMS["baselines"]
    options = cls.Options()
    space = cls.make_space(spec, make_problem(spec), options)
    algorithm = cls(AlgorithmContext(space, np.ones(1), seed, space.uniform()), options)
    found: list[tuple[float, str, Genome]] = []
    while proposals := algorithm.ask(100):
        for proposal in proposals:
            loss = repository.measure(repository.baseline(proposal.genome), repository.search)[0]
            found.append((loss, str(proposal.label), proposal.genome))
            algorithm.tell(Outcome(len(found), proposal.genome, np.array([loss])))
    sorts = {
        "best single adapter": "a",
        "uniform average": "uniform",
        "TIES": "TIES",
        "task arithmetic": "task",
        "greedy soup": "greedy",
        "weighted by metrics": "weighted",
    }
    return [
        (
            sort,
            repository.baseline(min((row for row in found if row[1].startswith(prefix)), key=lambda row: row[0])[2]),
            len(found),
        )
        for sort, prefix in sorts.items()
    ]


def agreement(repository: Repository, seed: int) -> float:
    """Largest difference between `Repository.factors` and the operator itself, for a random genome."""
    random = np.random.default_rng(seed)
    beta, alpha = random.uniform(-BETA, BETA, repository.count), random.random(repository.count)
    ours = repository.factors(beta, alpha)
    worst = 0.0
    for layer, weight in enumerate(repository.weights):
        base = torch.tensor(weight)
        low_rank = [
            Factors(torch.tensor(up), torch.tensor(down), 1.0)
            for up, down in zip(repository.up[layer], repository.down[layer], strict=True)
        ]
        tensors = [base] * (1 + repository.count)
        theirs = running.merge(
            OPERATORS["lora_factors"],
            tensors,
            beta.tolist(),
            each={"density": tuple(alpha.tolist())},
            low_rank=low_rank,
        )
        worst = max(worst, float((theirs - base - torch.tensor(ours[layer])).abs().max()))
    return worst


def run(quick: bool) -> dict[str, Any]:
    """Measure; see the module."""
    pools = QUICK if quick else POOLS
    seeds = [0] if quick else [0, 1, 2, 3, 4]
    evaluations = 150 if quick else EVALUATIONS
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in pools}
    worst = 0.0
    for name, pool in pools.items():
        for seed in seeds:
            repository = make_repository(seed, pool.counts, pool.shared, steps=60 if quick else STEPS)
            worst = max(worst, agreement(repository, seed))
            results[name].append(compare(repository, seed, evaluations))
    return {
        "options": {
            "adapters": {name: vars(pool.counts) for name, pool in pools.items()},
            "rank": RANK,
            "evaluations": evaluations,
            "seeds": seeds,
        },
        "difference to the operator": worst,
        "published F1": PUBLISHED,
        "means": {name: _means(rows) for name, rows in results.items()},
        "results": results,
    }


def _means(rows: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    return {
        name: {
            measure: round(float(np.mean([row[name][measure] for row in rows])), 4)
            for measure in rows[0][name]
            if measure != "curve"
        }
        for name in rows[0]
    }


def plot(measured: dict[str, Any], figure: Any) -> None:
    """Test accuracy of everything, for every repository."""
    axes = figure.subplots()
    pools = measured["means"]
    height = 0.8 / len(pools)
    for place, (pool, means) in enumerate(pools.items()):
        names = list(means)
        where = np.arange(len(names)) + (place - (len(pools) - 1) / 2) * height
        axes.barh(where, [means[name]["test accuracy"] for name in names], height=0.9 * height, label=pool)
        axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on held-out items")
    axes.legend()


if __name__ == "__main__":
    main("evo_merging", run, plot)
