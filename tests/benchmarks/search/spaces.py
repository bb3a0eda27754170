"""Structured search spaces on a small vision transformer: `python -m tests.benchmarks.search.spaces [--quick]`.

A transformer of six layers is trained on handwritten digits, and three experts on a third of the digits each. Every
case is a space and an algorithm over several seeds; all of a comparison have the same evaluations, warm starts included.
It minimises the cross-entropy of the search items, and what it found is measured on other items.

- `prune`: four of six layers stay; layers are only removed (of the base, or of the experts' average), or also selected,
  or also merged.
- `operators` against each of its operators alone.
- `actions` by evolution, by random search, and by the agent it comes from (`rmm`), with the episodes that its released
  code gives it.
- the other layer plans, for comparison.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimizer.algorithms.base import AlgorithmContext, Outcome, parse_options
from optimizer.ports import Task as Measurement
from optimizer.problem import Problem
from optimizer.recipe import Recipe
from optimizer.space import Genome, JobSpace, make_space
from optimizer.spec import JobSpec, parse_spec
from tests.benchmarks.search.common import main
from tests.benchmarks.search.digits import DigitsExpert, images, train_base, train_expert, write_images
from tests.benchmarks.search.kept import results
from workers.prepare import prepare
from workers.roots import Roots
from workers.worker import EvaluationWorker

LAYERS = 6
EXPERTS = (
    DigitsExpert("low", (0, 1, 2, 3), seed=1),
    DigitsExpert("middle", (4, 5, 6), seed=2),
    DigitsExpert("high", (7, 8, 9), seed=3),
)
CACHE = Path(__file__).parents[1] / ".cache" / "spaces"
EVALUATIONS, EPISODES, SEEDS = 200, 700, 3
LATE = 100
"""The last evaluations, whose mean says what a search has learned."""
REPEATS = 200
"""Proposals in a row that are known already, after which a search is at its end."""


@dataclass(frozen=True)
class Case:
    """A space and an algorithm.

    Attributes:
        group: which comparison it belongs to.
        label: unique.
        merge: the job's ``merge``.
        algorithm: who searches.
        evaluations: in a full run.
    """

    group: str
    label: str
    merge: dict[str, Any]
    algorithm: str
    evaluations: int = EVALUATIONS


@dataclass(frozen=True)
class Task:
    """A case on a seed."""

    case: Case
    seed: int
    evaluations: int


@dataclass
class Found:
    """What a search found.

    Attributes:
        curve: the best search loss so far by evaluation.
        test, accuracy: of the last of them on the test items.
        late: mean search loss of the last evaluations of what it proposed.
        layers: of the best.
        variables: of the space.
    """

    curve: list[float] = field(default_factory=list)
    late: float = np.nan
    test: float = np.nan
    accuracy: float = np.nan
    layers: int = 0
    variables: int = 0


def cases() -> list[Case]:
    """Return all cases."""
    groups: dict[str, Any] = {"granularity": {"layers": "groups", "group_size": 2}}
    four = {"layers": 4}

    def space(name: str, **options: Any) -> dict[str, Any]:
        return {"space": {"name": name, "options": options}}

    ties = {"operator": "ties", "options": {"density": {"low": 0.01, "high": 1.0, "per_group": True}}}
    prunings: dict[str, dict[str, Any]] = {
        "remove, base": {**four, "blocks": "remove"},
        "remove, average": {**four, "blocks": "remove", "source": "average"},
        "remove + select": {**four, "blocks": "select"},
        "remove + select + merge": {**four, "blocks": "merge"},
        "remove + select + merge, average": {**four, "blocks": "merge", "source": "average"},
    }
    out = [
        Case("prune", f"{label} ({name})", space("prune", **options), name)
        for label, options in prunings.items()
        for name in ("nsga2", "cma_es")
    ]
    singles: dict[str, dict[str, Any]] = {
        "linear": {"operator": "linear"},
        "task arithmetic": {"operator": "task_arithmetic"},
        "ties": ties,
    }
    for name in ("nsga2", "cma_es"):
        out += [Case("operators", f"{label} ({name})", {**groups, **merge}, name) for label, merge in singles.items()]
        out.append(Case("operators", f"operators ({name})", {**groups, **space("operators")}, name))
    out += [Case("actions", name, space("actions"), name, EPISODES) for name in ("random", "nsga2", "cma_es", "rmm")]
    out += [
        Case("plans", f"{kind} ({name})", space(kind), name)
        for kind in ("layer_swap", "data_flow", "blocks")
        for name in ("nsga2", "cma_es")
    ]
    return out


class Study:
    """The models, the data, and what was measured of which recipe.

    Args:
        root: directory that they are written to.
        steps: of the base's training.
    """

    def __init__(self, root: Path, steps: int) -> None:
        self._root = root
        self._losses: dict[str, dict[str, tuple[float, float] | None]] = {"search": {}, "test": {}}
        data = images()
        for split in ("search", "test"):
            write_images(root / "data" / split, data[split], range(10))
        train_base(root / "base", data["train"], LAYERS, steps)
        for expert in EXPERTS:
            train_expert(expert, root / "base", root / expert.name, data["train"])
        self._workers: dict[str, EvaluationWorker] = {}

    def spec(self, case: Case, split: str) -> JobSpec:
        """Return the case's job on the items of a split."""
        objective = {
            "evaluator": "image_classification",
            "data": {"path": f"data/{split}"},
            "options": {"batch_size": 512},
        }
        return parse_spec(
            {
                "base": "base",
                "experts": [{"name": expert.name, "path": expert.name} for expert in EXPERTS],
                "merge": case.merge | {"heads": []},
                "objectives": [{**objective, "name": metric, "metric": metric} for metric in ("loss", "accuracy")],
                "algorithm": case.algorithm,
                "budget": {"evaluations": EVALUATIONS},
            }
        )

    def prepare(self, case: Case, split: str = "search") -> tuple[JobSpec, Problem]:
        """Return the case's job and what was found of its inputs."""
        spec = self.spec(case, split)
        return spec, prepare(spec, Roots([self._root]))

    def measure(self, case: Case, recipe: Recipe, split: str = "search") -> tuple[float, float] | None:
        """Return mean cross-entropy and accuracy of a recipe; None if it has none."""
        known = self._losses[split]
        if recipe.fingerprint not in known:
            worker = self._worker(case, split)
            result = worker.evaluate(Measurement(0, recipe.to_json()))
            values = [result.scores[name].mean() for name in ("loss", "accuracy")] if result.failure is None else []
            known[recipe.fingerprint] = (values[0], values[1]) if values and np.isfinite(values).all() else None
        return known[recipe.fingerprint]

    def _worker(self, case: Case, split: str) -> EvaluationWorker:
        if split not in self._workers:  # the models and the data are the same in all cases
            self._workers[split] = EvaluationWorker(*self.prepare(case, split), Roots([self._root]), "bench")
        return self._workers[split]

    def search(self, case: Case, seed: int, evaluations: int) -> Found:
        """Run a case once."""
        spec, problem = self.prepare(case)
        space = make_space(spec, problem)
        cls, options = parse_options(spec.algorithm)
        context = AlgorithmContext(space, np.ones(1), seed, space.uniform(), budget=evaluations)
        run = _Run(self, case, space, evaluations)
        algorithm = cls(context, options)
        for start in space.warm_starts(spec):
            if (outcome := run.add(start.genome, start.recipe, own=False)) is not None:
                algorithm.tell(outcome)
        while not run.over:
            outcomes = []
            for proposal in algorithm.ask(algorithm.batch_size):
                genome = space.clip(proposal.genome)
                outcomes.append(run.add(genome, space.recipe(genome), own=True))
            for outcome in outcomes:
                if outcome is not None:
                    algorithm.tell(outcome)
        return run.found()


class _Run:
    """One search: counts evaluations, in which repetitions are free, and keeps the best."""

    def __init__(self, study: Study, case: Case, space: JobSpace, evaluations: int) -> None:
        self._study, self._case, self._space, self._most = study, case, space, evaluations
        self._seen: set[str] = set()
        self._curve: list[float] = []
        self._proposed: list[float] = []
        self._best: Recipe | None = None
        self._index = self._repeats = 0

    @property
    def over(self) -> bool:
        """Whether the budget is spent, or nothing new comes any more."""
        return len(self._curve) >= self._most or self._repeats >= REPEATS

    def add(self, genome: Genome | None, recipe: Recipe, *, own: bool) -> Outcome | None:
        """Evaluate a candidate; returns its outcome where it has a genome."""
        scores = self._study.measure(self._case, recipe)
        self._repeats += 1
        if recipe.fingerprint not in self._seen and len(self._curve) < self._most:
            self._seen.add(recipe.fingerprint)
            self._repeats = 0
            loss = scores[0] if scores is not None else np.inf
            best = self._curve[-1] if self._curve else np.inf
            if loss < best:
                self._best = recipe
            self._curve.append(min(best, loss))
        if own and scores is not None:
            self._proposed.append(scores[0])
        self._index += 1
        if genome is None:
            return None
        losses = None if scores is None else np.array(scores[:1])
        return Outcome(self._index - 1, genome, losses, own=own)

    def found(self) -> Found:
        """Return what was found."""
        curve = self._curve + self._curve[-1:] * (self._most - len(self._curve))
        late = float(np.mean(self._proposed[-LATE:])) if self._proposed else np.nan
        out = Found(curve, late, variables=self._space.dim)
        if self._best is not None:
            out.test, out.accuracy = self._study.measure(self._case, self._best, "test") or (np.nan, np.nan)
            out.layers = len(self._best.layers) if self._best.layers is not None else LAYERS
        return out


def run(quick: bool, seeds: int = SEEDS) -> dict[str, Any]:
    """Measure every case; a quick run takes one seed, few evaluations and a base that hardly learned.

    What an interrupted call has run is not run again (`CACHE`).
    """
    torch.set_num_threads(1)
    seeds, steps = (1, 60) if quick else (seeds, 400)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory).resolve() if quick else CACHE
        study = Study(root, steps)
        tasks = [Task(case, seed, 30 if quick else case.evaluations) for case in cases() for seed in range(seeds)]
        found = results(
            tasks,
            lambda task: asdict(study.search(task.case, task.seed, task.evaluations)),
            None if quick else root / "runs",
        )
    return {
        "seeds": seeds,
        "layers": LAYERS,
        "rows": [
            _row(case, [Found(**each) for task, each in zip(tasks, found, strict=True) if task.case == case])
            for case in cases()
        ],
    }


def _row(case: Case, found: Sequence[Found]) -> dict[str, Any]:
    curves = np.array([each.curve for each in found])
    return {
        "group": case.group,
        "case": case.label,
        "algorithm": case.algorithm,
        "merge": case.merge,
        "variables": found[0].variables,
        "evaluations": len(found[0].curve),
        "loss": [round(float(each.curve[-1]), 5) for each in found],
        "median loss": round(float(np.median(curves[:, -1])), 4),
        "median test loss": round(float(np.median([each.test for each in found])), 4),
        "median test accuracy": round(float(np.median([each.accuracy for each in found])), 4),
        "median loss of the last": round(float(np.median([each.late for each in found])), 4),
        "layers": [each.layers for each in found],
        "curve": np.median(curves, axis=0).round(5).tolist(),
    }


def plot(measured: dict[str, Any], figure: Any) -> None:
    """Draw the best search loss so far, a panel for each comparison."""
    groups = list(dict.fromkeys(row["group"] for row in measured["rows"]))
    figure.set_size_inches(10, 7)
    panels = figure.subplots(2, 2).ravel()
    for panel, group in zip(panels, groups, strict=True):
        for row in measured["rows"]:
            if row["group"] == group:
                panel.plot(range(1, len(row["curve"]) + 1), row["curve"], label=row["case"])
        panel.set(title=group, xlabel="evaluations", ylabel="best search loss (median)", yscale="log")
        panel.legend(fontsize=6)


if __name__ == "__main__":
    main("spaces", run, plot, seeds=SEEDS)
