"""Runs searches on a problem by the product's own path: `optimizer.search.Search` and an evaluation worker, in process.

An evaluation is a pure function of the recipe, so each is kept on disk under the recipe's fingerprint, for all algorithms
and for runs to come; the seconds it took are kept with it.
"""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from optimizer.algorithms.base import parse_options
from optimizer.errors import InfeasibleCandidate, JobError
from optimizer.fitness.aggregate import ItemScores, aggregate, to_losses
from optimizer.fitness.subset import item_order
from optimizer.pareto import front_mask
from optimizer.phases import plan
from optimizer.ports import Candidate, Evaluation, Failure, Result, Task
from optimizer.problem import Grams, Problem
from optimizer.recipe import Recipe
from optimizer.search import Search
from optimizer.space import Genome, JobSpace, make_space
from optimizer.spec import CandidateInput, JobSpec
from tests.benchmarks.search.problems import MergeProblem, Scorer
from workers.merging.kernels import WORTH, fused_sum
from workers.prepare import prepare
from workers.roots import Roots
from workers.worker import EvaluationWorker

Losses = NDArray[np.float64]
UNBOUNDED = 1_000_000
_COMPARED = 3
HANDED_ON = 20
"""As many as `api.warm_starts` takes from a job."""


@dataclass
class Run:
    """What a run of an algorithm on a problem found.

    Attributes:
        losses: of each evaluation in the order in which they were proposed, shape (objectives,); None for one that
            failed or was measured on some of the items only.
        best: index of the evaluation with the least weighted sum of losses, or None.
        test: the best one's losses on the test items, shape (objectives,).
        partial, slopes: how many evaluations were on some of the items only, or wanted a backward pass.
        proposing, evaluating: seconds the algorithm took, and the evaluations when they were made.
        stopped: why it ended before its budget, or None.
        variables: dimensions of its space; 0 where it has no fixed length.
        front: the best candidates of its front, as `warm_starts.jobs` takes them.
    """

    losses: list[list[float] | None] = field(default_factory=list)
    best: int | None = None
    test: list[float] | None = None
    partial: int = 0
    slopes: int = 0
    proposing: float = 0.0
    evaluating: float = 0.0
    stopped: str | None = None
    variables: int = 0
    front: list[Recipe] = field(default_factory=list, repr=False)

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        losses = [None if row is None else [float(f"{value:.7g}") for value in row] for row in self.losses]
        rounded = {name: round(getattr(self, name), 2) for name in ("proposing", "evaluating")}
        found = {name: value for name, value in vars(self).items() if name != "front"}
        return found | rounded | {"losses": losses}


class Outcomes:
    """Results by recipe, on disk.

    Args:
        path: of the file; one process writes it at a time, others wait.
        about: what they depend on beside the recipe.
    """

    def __init__(self, path: Path, about: str) -> None:
        self._database = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.execute("CREATE TABLE IF NOT EXISTS outcomes (key BLOB PRIMARY KEY, result BLOB) WITHOUT ROWID")
        self._about = about

    def get(self, fingerprint: str, task: Task) -> Result | None:
        """Return what is known of a task."""
        row = self._database.execute("SELECT result FROM outcomes WHERE key = ?", [self._key(fingerprint, task)])
        found = row.fetchone()
        return None if found is None else _unpack(found[0], task.index)

    def put(self, fingerprint: str, task: Task, result: Result) -> None:
        """Keep what was found, unless it failed."""
        if result.failure is None:
            row = [self._key(fingerprint, task), _pack(result)]
            self._database.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _key(self, fingerprint: str, task: Task) -> bytes:
        text = json.dumps([self._about, fingerprint, task.items, task.slopes])
        return hashlib.sha256(text.encode()).digest()[:16]


def _pack(result: Result) -> bytes:
    arrays: dict[str, NDArray[Any]] = {f"values {name}": scores.values for name, scores in result.scores.items()}
    arrays |= {f"weights {name}": s.weights for name, s in result.scores.items() if s.weights is not None}
    arrays |= {f"seconds {name}": np.array(value) for name, value in result.seconds.items()}
    if result.slopes is not None:
        arrays["slopes"] = result.slopes
    into = io.BytesIO()
    np.savez(into, **arrays)  # type: ignore[arg-type]
    return into.getvalue()


def _unpack(data: bytes, index: int) -> Result:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    parts: dict[str, dict[str, Any]] = {"values": {}, "weights": {}, "seconds": {}}
    for name, array in found.items():
        kind, _, what = name.partition(" ")
        if what:
            parts[kind][what] = array
    scores = {name: ItemScores(values, parts["weights"].get(name)) for name, values in parts["values"].items()}
    seconds = {name: float(value) for name, value in parts["seconds"].items()}
    return Result(index, scores, seconds=seconds, slopes=found.get("slopes"))


class Bench:
    """A problem with its worker, on which any number of algorithms can be run.

    Args:
        problem: the merge problem.
        cache: directory with the problems, in which evaluations are kept too.
        several: with the objectives of multi-objective searches.
    """

    def __init__(self, problem: MergeProblem, cache: Path, *, several: bool) -> None:
        self.merge = problem
        self.several = several
        self._root = problem.root(cache)
        self._roots = Roots([self._root])
        self._grams: dict[tuple[str, ...], Grams | None] = {}
        self.evaluator = self._evaluator("search")
        self._test: Evaluator | None = None

    @property
    def problem(self) -> Problem:
        """The job's inputs as found."""
        return self.evaluator.problem

    @property
    def weights(self) -> Losses:
        """Of the objectives, shape (objectives,)."""
        return np.array([objective.weight for objective in self.problem.objectives])

    @cached_property
    def space(self) -> JobSpace:
        """The job's own search space."""
        return make_space(self._spec({"name": "random"}, 1, 0), self.problem)

    def run(self, algorithm: dict[str, Any], seed: int, budget: int, begin: Sequence[Recipe] = ()) -> Run:
        """Run one of mergeopt's algorithms as a job would; raises `InvalidInput` where it refuses the job.

        Args:
            begin: recipes of an earlier job to begin with, as `warm_starts.jobs` gives them to a new one.
        """
        spec = self._spec(algorithm, budget, seed)
        given = [CandidateInput(recipe=recipe.to_json()) for recipe in begin]
        spec = spec.model_copy(update={"warm_starts": spec.warm_starts.model_copy(update={"candidates": given})})
        return search(spec, self._prepared(spec), self.evaluator, self.test_losses)

    def _prepared(self, spec: JobSpec) -> Problem:
        """The inputs as `prepare` finds them for this algorithm; what does not depend on it is found once."""
        phases = plan(spec, self.problem)
        wanted = [parse_options(phase.algorithm) for phase in phases]
        cuts = tuple(sorted({found for cls, options in wanted if (found := cls.cuts(options)) is not None}))
        if cuts and cuts not in self._grams:
            self._grams[cuts] = prepare(spec, self._roots).grams
        return self.problem.model_copy(update={"phases": phases, "grams": self._grams.get(cuts)})

    def losses(self, recipe: Recipe) -> tuple[Losses | None, float]:
        """Return a recipe's losses on the search items, None if it failed, and the seconds it took."""
        return self.evaluator.losses(recipe)

    def test_losses(self, recipe: Recipe) -> list[float] | None:
        """Return a recipe's losses on the test items."""
        self._test = self._test or self._evaluator("test")
        losses, _ = self._test.losses(recipe)
        return None if losses is None else losses.tolist()

    def close(self) -> None:
        """Close the files of kept evaluations."""
        for evaluator in (self.evaluator, self._test):
            if evaluator is not None:
                evaluator.outcomes.close()

    def _spec(self, algorithm: dict[str, Any], budget: int, seed: int, split: str = "search") -> JobSpec:
        return self.merge.spec(several=self.several, evaluations=budget, algorithm=algorithm, seed=seed, split=split)

    def _evaluator(self, split: str) -> Evaluator:
        spec = self._spec({"name": "random"}, UNBOUNDED, 0, split)
        problem = prepare(spec, self._roots)
        direct = None if self.merge.direct is None else self.merge.direct(self._root, problem, split)
        return Evaluator(spec, problem, self._roots, self._root / "evaluations.sqlite", direct)


class Evaluator:
    """A worker behind the kept evaluations; the worker is made when something is not known.

    Args:
        spec, problem: the job and its inputs.
        roots: where these are.
        path: of the kept evaluations.
        direct: scores most merges faster; a few are compared with the worker's before.
    """

    def __init__(self, spec: JobSpec, problem: Problem, roots: Roots, path: Path, direct: Scorer | None = None) -> None:
        self.problem = problem
        self._spec, self._direct = spec, direct
        digests = [[objective.name, objective.metric, objective.data_digest] for objective in problem.objectives]
        self.outcomes = Outcomes(path, json.dumps([digests, spec.workers.dtype]))
        self._make: Callable[[], EvaluationWorker] = lambda: EvaluationWorker(spec, problem, roots, "benchmark")

    @cached_property
    def _worker(self) -> EvaluationWorker:
        # The kernels that models of usual size run on: small parameters alone would not have them compiled.
        zeros = torch.zeros(WORTH)
        fused_sum(torch.empty(WORTH), [zeros, zeros], [0.5, 0.5])
        return self._make()

    def evaluate(self, task: Task, fingerprint: str) -> Result:
        """Return a task's result, from disk where it is known."""
        found = self.outcomes.get(fingerprint, task)
        if found is None:
            found = self._scored(task) or self._worker.evaluate(task)
            self.outcomes.put(fingerprint, task, found)
        return found

    def _scored(self, task: Task) -> Result | None:
        """What the fast way says, where there is one and it can."""
        began = time.perf_counter()
        scores = None if self._checked is None or task.slopes else self._checked(Recipe.parse(task.recipe))
        if scores is None:
            return None
        if task.items is not None:
            scores = {name: self._part(found, task.items) for name, found in scores.items()}
        return Result(task.index, scores, seconds={"evaluate": time.perf_counter() - began})

    def _part(self, scores: ItemScores, items: int) -> ItemScores:
        values = scores.values
        return ItemScores(values[item_order(self._spec.seed, len(values))[:items]] if items < len(values) else values)

    @cached_property
    def _checked(self) -> Scorer | None:
        """The fast way, once it has been found to say what the worker says."""
        if self._direct is None:
            return None
        random = np.random.default_rng(0)
        space = make_space(self._spec, self.problem)
        for _ in range(_COMPARED):
            recipe = space.recipe(space.low + random.random(space.dim) * (space.high - space.low))
            expected, found = self._worker.evaluate(Task(0, recipe.to_json())).scores, self._direct(recipe) or {}
            for name, scores in expected.items():
                np.testing.assert_allclose(found[name].values, scores.values, rtol=1e-4, atol=1e-4)
        return self._direct

    def losses(self, recipe: Recipe) -> tuple[Losses | None, float]:
        """Return a recipe's losses, None if it failed, and the seconds it took."""
        result = self.evaluate(Task(0, recipe.to_json()), recipe.fingerprint)
        evaluation = outcome_of(self.problem, result)
        seconds = sum(result.seconds.values())
        return None if evaluation.values is None else to_losses(self.problem.objectives, evaluation.values), seconds


def outcome_of(problem: Problem, result: Result) -> Evaluation:
    """Turn a worker's result into the outcome that a search is told, as the controller does."""
    failed = Evaluation(result.index, None, failure=result.failure, seconds=result.seconds)
    if result.failure is not None:
        return failed
    try:
        values = aggregate(problem.objectives, result.scores)
    except InfeasibleCandidate as error:
        return replace(failed, failure=Failure(error.code, str(error)))
    return replace(failed, values=tuple(values), items=dict(result.scores), slopes=result.slopes)


def search(spec: JobSpec, problem: Problem, evaluator: Evaluator, test: Callable[[Recipe], list[float] | None]) -> Run:
    """Run a job to its end; the only place here that knows how `Search` is driven."""
    run = Run()
    items: dict[int, Mapping[str, ItemScores]] = {}
    recipes: dict[int, Recipe] = {}
    began = time.perf_counter()
    found = Search(spec, problem, items.__getitem__)
    run.variables = found.algorithm.context.space.dim
    new = found.first()
    while new:
        found.add(new)
        for candidate in new:
            if candidate.duplicate_of is None:
                run.proposing += time.perf_counter() - began
                evaluation = _evaluate(evaluator, candidate, run)
                began = time.perf_counter()
                recipes[candidate.index] = Recipe.parse(dict(candidate.recipe))
                items[candidate.index] = evaluation.items
                found.record(evaluation)
        new = found.next()
    run.proposing += time.perf_counter() - began
    if not found.finished:
        raise JobError(f"{spec.algorithm.name} waits although it has been told everything")
    if len(run.losses) < spec.budget.evaluations:
        run.stopped = found.stop_reason
    order = [candidate.index for candidate in found.candidates if candidate.duplicate_of is None]
    weights = np.array([objective.weight for objective in problem.objectives])
    finish(run, weights)
    run.front = [recipes[order[place]] for place in best_of_front(run.losses, weights)]
    run.test = None if run.best is None else test(recipes[order[run.best]])
    return run


def best_of_front(losses: Sequence[list[float] | None], weights: Losses) -> list[int]:
    """Return the places of the non-dominated losses with the least weighted sums, at most `HANDED_ON`."""
    known = [place for place, row in enumerate(losses) if row is not None]
    found = np.array([losses[place] for place in known], dtype=np.float64).reshape(len(known), len(weights))
    front = [place for place, joins in zip(known, front_mask(found), strict=True) if joins]
    return sorted(front, key=lambda place: float(np.array(losses[place]) @ weights))[:HANDED_ON]


def finish(run: Run, weights: Losses) -> None:
    """Find a run's best evaluation."""
    sums = [np.inf if row is None else float(np.array(row) @ weights) for row in run.losses]
    if np.isfinite(sums).any():
        run.best = int(np.argmin(sums))


def _evaluate(evaluator: Evaluator, candidate: Candidate, run: Run) -> Evaluation:
    task = Task(candidate.index, candidate.recipe, items=candidate.items, slopes=candidate.slopes)
    result = evaluator.evaluate(task, candidate.fingerprint)
    evaluation = outcome_of(evaluator.problem, result)
    whole = evaluation.values is not None and candidate.items is None
    losses = to_losses(evaluator.problem.objectives, evaluation.values) if whole and evaluation.values else None
    run.losses.append(None if losses is None else losses.tolist())
    run.partial += candidate.items is not None
    run.slopes += candidate.slopes
    run.evaluating += sum(result.seconds.values())
    return evaluation


def anchors(bench: Bench, grid: Sequence[float]) -> dict[str, dict[str, list[float] | None]]:
    """Return what is there without a search, by name: losses on the search and on the test items.

    These are the base, each expert, the uniform merge, and task arithmetic with one coefficient for all, chosen on the
    search items from ``grid``.
    """
    spec = bench.merge.spec(several=bench.several, evaluations=1, algorithm={"name": "random"})
    found = {start.label: start.recipe for start in bench.space.warm_starts(spec)}
    rows = {factor: bench.space.recipe(_same(bench, factor)) for factor in grid}
    tuned = min(grid, key=lambda factor: _weighted(bench, rows[factor]))
    found[f"task arithmetic {tuned:g}"] = rows[tuned]
    out: dict[str, dict[str, list[float] | None]] = {}
    for name, recipe in found.items():
        losses, _ = bench.losses(recipe)
        out[name] = {"search": None if losses is None else losses.tolist(), "test": bench.test_losses(recipe)}
    return out


def _same(bench: Bench, factor: float) -> Genome:
    return bench.space.point(dict.fromkeys(bench.merge.experts, factor))


def _weighted(bench: Bench, recipe: Recipe) -> float:
    losses, _ = bench.losses(recipe)
    return np.inf if losses is None else float(losses @ bench.weights)
