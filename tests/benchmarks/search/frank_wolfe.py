"""Frank-Wolfe merging as a pool of experts fills up with models that do not belong.

Four experts of two or three digits each, and 0, 4, 16 or 64 strangers that learned shuffled labels, merged by real
workers on scikit-learn's scans: does the merge of what belongs stay as good? Then how well derivatives by probes agree
with exact ones, and what memory both take as the pool grows.

    python -m tests.benchmarks.search.frank_wolfe [--quick] [--out DIR]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimizer.algorithms import ALGORITHMS, AlgorithmContext
from optimizer.fitness.aggregate import aggregate
from optimizer.frank_wolfe_domain import Array, Table
from optimizer.ports import Candidate, Evaluation, EvaluationPool, Result, Task
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Recipe
from optimizer.search import Search
from optimizer.space import MergeSpace, make_space
from optimizer.spec import JobSpec, parse_spec
from tests.benchmarks.search.common import main
from tests.benchmarks.search.digits import DigitsExpert, images, train_base, train_expert, write_images
from workers.pool import LocalPoolFactory

CACHE = Path(__file__).parents[1] / ".cache" / "frank-wolfe"
GROUPS = ((0, 1, 2), (3, 4), (5, 6, 7), (8, 9))
STRANGERS = (0, 4, 16, 64)
BUDGET = 60
"""Evaluations of each search, and one more for each expert; six for each where derivatives are measured by differences."""

SEARCHES: dict[str, dict[str, Any]] = {
    "hard": {},
    "hard, by layers": {"granularity": "layers"},
    "hard, pairwise steps": {"away": "pairwise"},
    "hard, unchecked": {"check": False},
    "hard, as published": {
        "granularity": "layers",
        "step": "harmonic",
        "iterations": 10,
        "start": "merge",
        "base_vertex": False,
        "form": "cosine",
        "check": False,
    },
    "soft": {"variant": "soft"},
    "soft, by layers": {"variant": "soft", "granularity": "layers"},
    "hard, by differences": {"oracle": "differences"},
    "hard, by perturbations": {"oracle": "spsa"},
}
QUICK = ("hard", "hard, by differences")


def experts(strangers: int, steps: int) -> list[DigitsExpert]:
    """The pool: who belongs, then the strangers."""
    pool = [DigitsExpert(f"digits-{i}", digits, steps, seed=i) for i, digits in enumerate(GROUPS, start=1)]
    return pool + [
        DigitsExpert(f"stranger-{i}", GROUPS[i % 4], steps // 2, lr=2e-3, shuffled=True, seed=100 + i)
        for i in range(strangers)
    ]


def make(root: Path, strangers: int, steps: int) -> None:
    """Train what is not there yet, and write the data."""
    torch.set_num_threads(1)
    data = images()
    for number, digits in enumerate(GROUPS, start=1):
        for split in ("search", "test"):
            path = root / "data" / f"digits-{number}" / split
            if not path.exists():
                write_images(path, data[split], digits)
    models = root / "models"
    models.mkdir(parents=True, exist_ok=True)
    train_base(models / "base", data["train"])
    for expert in experts(strangers, steps):
        train_expert(expert, models / "base", models / expert.name, data["train"])


def job(names: Sequence[str], split: str, algorithm: dict[str, Any], evaluations: int) -> JobSpec:
    """The job: the loss on each group of digits, one coefficient for each layer and expert."""
    return parse_spec(
        {
            "base": "models/base",
            "experts": [{"name": name, "path": f"models/{name}"} for name in names],
            "merge": {"granularity": {"layers": "each"}, "heads": []},
            "objectives": [
                {
                    "name": f"{metric}-{number}",
                    "evaluator": "image_classification",
                    "options": {"batch_size": 256},
                    "data": {"path": f"data/digits-{number}", "split": split},
                    "metric": metric,
                }
                for number in range(1, len(GROUPS) + 1)
                for metric in (("loss",) if split == "search" else ("loss", "accuracy"))
            ],
            "algorithm": algorithm,
            "budget": {"evaluations": evaluations},
            "warm_starts": {"experts": False},
            "workers": {"count": 1, "cpus": 1, "device": "cpu"},
        }
    )


class Bench:
    """A pool of workers for one set of experts, and its searches."""

    def __init__(self, root: Path, strangers: int, steps: int) -> None:
        self.names = [expert.name for expert in experts(strangers, steps)]
        self._factory = LocalPoolFactory([root])
        self.spec, self.problem, self._search = self._open("search")
        _, self._test_problem, self._test = self._open("test")
        space = make_space(self.spec, self.problem)
        assert isinstance(space, MergeSpace)
        self.space = space

    def _open(self, split: str) -> tuple[JobSpec, Problem, EvaluationPool]:
        spec = job(self.names, split, {"name": "frank_wolfe"}, BUDGET)
        problem = self._factory.prepare(spec)
        return spec, problem, self._factory.open(spec, problem)

    def close(self) -> None:
        """Stop the workers."""
        self._search.close()
        self._test.close()
        self._factory.close()

    def score(self, recipe: Recipe, **task: Any) -> Result:
        """Evaluate one merge on the items of the search."""
        return _result(self._search, Task(0, recipe.to_json(), **task))

    def losses(self, table: Array) -> Array:
        """The losses of a table of coefficients on the items of the search."""
        result = self.score(self.space.recipe(table.ravel()))
        return np.array(aggregate(self.problem.objectives, result.scores))

    def test(self, recipe: Recipe) -> float:
        """The mean accuracy over the groups of digits, on the test items."""
        result = _result(self._test, Task(0, recipe.to_json()))
        values = aggregate(self._test_problem.objectives, result.scores)
        named = zip(self._test_problem.objectives, values, strict=True)
        return float(np.mean([value for objective, value in named if objective.metric == "accuracy"]))

    def run(self, options: dict[str, Any], evaluations: int) -> dict[str, Any]:
        """Run a search; the merge with the lowest sum of losses counts."""
        began = time.perf_counter()
        spec = job(self.names, "search", {"name": "frank_wolfe", "options": options}, evaluations)
        search = Search(spec, self.problem.model_copy(update={"phases": []}))  # those of this spec
        recipes: dict[int, Recipe] = {}
        new = search.first()
        while new:
            recipes |= {candidate.index: Recipe.parse(dict(candidate.recipe)) for candidate in new}
            search.add(new)
            for candidate in list(search.waiting):
                search.record(self._evaluated(candidate))
            new = search.next()
        full = [e for i, e in search.evaluations.items() if e.values is not None and search.candidates[i].items is None]
        best = min(full, key=lambda evaluation: sum(evaluation.values or ()))
        return {
            "accuracy": self.test(recipes[best.index]),
            "search_loss": float(np.mean(best.values or ())),
            "evaluations": len(search.evaluations),
            "stopped": search.stop_reason,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _evaluated(self, candidate: Candidate) -> Evaluation:
        task = Task(candidate.index, candidate.recipe, candidate.items, candidate.slopes)
        result = _result(self._search, task)
        values = tuple(aggregate(self.problem.objectives, result.scores)) if result.failure is None else None
        return Evaluation(candidate.index, values, failure=result.failure, slopes=result.slopes)


def _result(pool: EvaluationPool, task: Task) -> Result:
    pool.submit(task)
    while True:
        for result in pool.wait(1.0):
            return result


def baselines(bench: Bench) -> dict[str, float]:
    """Accuracies of what needs no search, and of task arithmetic with its one scale tuned on the search items."""
    rows, cols = bench.space.table

    def filled(value: float) -> Recipe:
        return bench.space.recipe(np.full(rows * cols, value))

    out = {"base": bench.test(_alone(bench, "base")), "uniform": bench.test(filled(1 / cols))}
    out["task arithmetic 0.3"] = bench.test(filled(0.3))
    scales = np.linspace(0.05, 1.0, 20)
    tuned = min(scales, key=lambda scale: float(bench.losses(np.full((rows, cols), scale)).sum()))
    out["task arithmetic, tuned"] = bench.test(filled(float(tuned)))
    alone = {
        name: float(np.sum(aggregate(bench.problem.objectives, bench.score(_alone(bench, name)).scores)))
        for name in bench.names
    }
    out["best single expert"] = bench.test(_alone(bench, min(alone, key=lambda name: alone[name])))
    out["four experts, tuned"] = bench.test(_four(bench))
    return out


def _alone(bench: Bench, name: str) -> Recipe:
    return Recipe(models=bench.problem.models, root=Leaf(model=name))


def _four(bench: Bench) -> Recipe:
    """What who knows the four could do: their task arithmetic, tuned."""
    rows, cols = bench.space.table

    def table(scale: float) -> Array:
        out = np.zeros((rows, cols))
        out[:, : len(GROUPS)] = scale
        return out

    best = min(np.linspace(0.05, 1.0, 20), key=lambda scale: float(bench.losses(table(scale)).sum()))
    return bench.space.recipe(table(float(best)).ravel())


# --- derivatives by probes beside exact ones ------------------------------------------------------------------------


def agreement(bench: Bench, steps: Sequence[float], points: int) -> list[dict[str, float | bool]]:
    """Cosine of both derivatives over the vertices, and how often both choose the same, by distance of the probes.

    The points are random merges near the uniform one.
    """
    random = np.random.default_rng(0)
    domain = Table(bench.space, with_base=True)
    rows, cols = bench.space.table
    found: dict[tuple[float, bool], list[tuple[float, bool]]] = {}
    for _ in range(points):
        weights = np.broadcast_to(random.dirichlet(np.full(cols + 1, 0.5))[1:], (rows, cols))
        point = domain.begin(weights.ravel())
        result = bench.score(bench.space.recipe(point.genome), slopes=True)
        assert result.slopes is not None
        exact = domain.derivatives(point, result.slopes)
        assert exact is not None
        reference = exact.sum(axis=(0, 1))
        here = np.array(aggregate(bench.problem.objectives, result.scores))
        for h in steps:
            for central in (False, True):
                probes = domain.probes(point, h, central, True)
                changes = [(bench.losses(probe.genome) - here) / probe.step for probe in probes]
                probed = domain.measured(point, probes, changes, True).sum(axis=(0, 1))
                cosine = float(reference @ probed / np.linalg.norm(reference) / np.linalg.norm(probed))
                found.setdefault((h, central), []).append((cosine, bool(reference.argmin() == probed.argmin())))
    return [
        {
            "h": h,
            "central": central,
            "cosine": float(np.mean([cosine for cosine, _ in pairs])),
            "same_choice": float(np.mean([same for _, same in pairs])),
        }
        for (h, central), pairs in found.items()
    ]


# --- memory -----------------------------------------------------------------------------------------------------------

_MEASURE = """
import re, sys, threading, time
from pathlib import Path
from optimizer.ports import Task
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from tests.benchmarks.search.frank_wolfe import large_job
from workers.prepare import prepare
from workers.roots import Roots
from workers.worker import EvaluationWorker

root, experts = Path(sys.argv[1]), int(sys.argv[2])
spec = large_job(experts)
problem = prepare(spec, Roots([root]))
worker = EvaluationWorker(spec, problem, Roots([root]), "worker")
merge = Merge(operator="task_arithmetic", base=Leaf(model="base"), inputs=[Leaf(model="expert-0")],
              groups=[Selector()], coefficients=[[0.5]])
recipe = Recipe(models=problem.models, root=merge).to_json()
worker.evaluate(Task(0, recipe))
status, peak, done = Path("/proc/self/status"), 0, False

def now():
    return int(re.search(r"RssAnon:\\s+(\\d+)", status.read_text())[1])

def watch():
    global peak
    while not done:
        peak = max(peak, now())
        time.sleep(0.0005)

before = now()
thread = threading.Thread(target=watch)
thread.start()
result = worker.evaluate(Task(0, recipe, slopes=True))
done = True
thread.join()
assert result.slopes is not None
print(before, peak)
"""


def write_large(root: Path, experts: int) -> int:
    """Write a base of some size and that many experts beside it; return how many bytes one of them has."""
    from transformers import ViTConfig, ViTForImageClassification

    small = CACHE.absolute() / "models" / "base"
    shapes = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1024}
    config = ViTConfig.from_pretrained(small)
    config.update(shapes)
    torch.manual_seed(0)
    for name in ("base", *(f"expert-{number}" for number in range(experts))):
        path = root / "models" / name
        if not path.exists():
            ViTForImageClassification(config).save_pretrained(path)
            shutil.copy(small / "preprocessor_config.json", path)
    return (root / "models" / "base" / "model.safetensors").stat().st_size


def large_job(experts: int) -> JobSpec:
    """A job over models of `write_large`."""
    names = [f"expert-{number}" for number in range(experts)]
    plain = job(names, "search", {"name": "frank_wolfe"}, 10)
    return plain.model_copy(update={"objectives": plain.objectives[:1]})


def memory(root: Path, experts: int) -> dict[str, float]:
    """Memory in MB that is a worker's own (not mapped from files): before slopes, and at most while it measures them."""
    command = [sys.executable, "-c", _MEASURE, str(root), str(experts)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    before, peak = (int(number) / 1024 for number in printed[-2:])
    return {"experts": experts, "before_mb": before, "peak_mb": peak}


def memories(pools: Sequence[int]) -> dict[str, Any]:
    """`memory` for pools of several sizes, of models large enough to see."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        shutil.copytree(CACHE.absolute() / "data", root / "data")
        size = write_large(root, pools[-1])
        return {"model_mb": size / 2**20, "pools": [memory(root, experts) for experts in pools]}


def context_numbers(bench: Bench) -> int:
    """How many numbers the algorithm keeps of a point, whatever the size of the models."""
    cls = ALGORITHMS["frank_wolfe"]
    context = AlgorithmContext(bench.space, np.ones(len(GROUPS)), 0, bench.space.uniform())
    return int(cls(context, cls.Options()).ask(1)[0].genome.size)


# --- all together -------------------------------------------------------------------------------------------------------


def run(quick: bool) -> dict[str, Any]:
    """Measure everything; see `tests.benchmarks.search.common.main`."""
    root = CACHE.with_name(CACHE.name + ("-quick" if quick else "")).absolute()
    steps = 16 if quick else 80
    pools = (0, 2) if quick else STRANGERS
    make(root, pools[-1], steps)
    rows: list[dict[str, Any]] = []
    for strangers in pools:
        bench = Bench(root, strangers, steps)
        try:
            searches = {}
            for name in QUICK if quick else SEARCHES:
                probes = (6 if "differences" in name and not quick else 1) * (len(bench.names) + 1)
                budget = (10 if quick else BUDGET) + probes
                searches[name] = bench.run(SEARCHES[name], budget)
            rows.append({"strangers": strangers, "baselines": baselines(bench), "searches": searches})
            if strangers == pools[min(2, len(pools) - 1)]:
                agreed = agreement(bench, (0.01, 0.4) if quick else (0.01, 0.05, 0.1, 0.2, 0.4), 1 if quick else 5)
                numbers = context_numbers(bench)
        finally:
            bench.close()
    grown = {} if quick else memories((4, 16, 64))
    return {
        "options": SEARCHES,
        "pools": rows,
        "agreement": agreed,
        "memory": grown,
        "numbers_kept": numbers,
    }


def plot(data: dict[str, Any], figure: Any) -> None:
    """Draw the accuracies by the number of strangers, and the agreement of derivatives."""
    left, right = figure.subplots(1, 2)
    pools = [str(row["strangers"]) for row in data["pools"]]
    for kind, style in (("searches", "-o"), ("baselines", "--x")):
        for name in data["pools"][0][kind]:
            found = [row[kind][name] for row in data["pools"]]
            values = [value["accuracy"] if kind == "searches" else value for value in found]
            left.plot(pools, values, style, label=name, markersize=4)
    left.set(xlabel="strangers beside four experts", ylabel="mean test accuracy")
    left.legend(fontsize=6)
    for central in (False, True):
        chosen = [entry for entry in data["agreement"] if entry["central"] is central]
        name = "both sides" if central else "one side"
        right.plot([entry["h"] for entry in chosen], [entry["cosine"] for entry in chosen], "-o", label=name)
    right.set(xlabel="distance of probes", ylabel="cosine with exact derivatives", xscale="log")
    right.legend(fontsize=6)


if __name__ == "__main__":
    main("frank_wolfe", run, plot)
