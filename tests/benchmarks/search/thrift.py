"""Fewer evaluations: `python -m tests.benchmarks.search.thrift [--quick]`.

Real jobs, by the controller, a store and workers, on three problems: experts for two or three digits each and three
strangers (400 images), once by accuracy and once by loss, and the demo's encoders with the language of a word as the task
(1,000 words, by accuracy). What counts is the number of items that a job scored in all, verification on the search's items
included; test items only judge.

- Searches: the same job with nothing saved, with each way of saving, and with all of them, at the same seeds, by `cma_es`;
  and on the digits by searches with models, with races and without. Compared are
  the values, on all search items and on test items, of what a user would take: of the candidates that were
  measured on all items in the end, the best. Beside it stands what the plain job had reached with as many items.
- Estimates: all candidates of the plain jobs, each estimated from 10 to 200 items by every method, with the first
  candidates (base, experts, uniform merge) as references: root mean squared error, and how often the 95 % error bar holds
  what all items say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import migrations
from api.store.sql import SqlStore
from api.views import CandidateSummary
from optimizer.controller import Controller, ControllerConfig
from optimizer.fitness.estimators import Anchors, Estimator, Method, clustered_anchors, random_anchors
from optimizer.spec import JobSpec, parse_spec
from tests.benchmarks.search.common import main
from tests.benchmarks.search.digits import DigitsExpert, Images, images, train_base, train_expert, write_images
from tests.benchmarks.search.kept import results
from workers.demo.experts import HEADS, TRAININGS, copy_base, train
from workers.demo.tasks import make_tasks, write_split
from workers.pool import LocalPoolFactory

CACHE = Path(__file__).parents[1] / ".cache" / "thrift"
EVALUATIONS, SEEDS = 100, 3
VERIFIED = 4
MOST = 1000
SIZES = (10, 20, 50, 100, 200)
MODELLING = ("trust_region", "bayesian")
METHODS: tuple[Method, ...] = ("mean", "weighted", "regression", "mp_irt", "gmp_irt")

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """A job's models and data.

    Attributes:
        folder: of its models and data.
        make: writes them there.
        fields: of the spec.
        fiftieth: one fiftieth of the search's items.
        sign: 1 where more is better, -1 where less is.
    """

    folder: str
    make: Callable[[Path], None]
    fields: Mapping[str, Any]
    fiftieth: int
    sign: int = 1


_EXPERTS = (
    DigitsExpert("low", (0, 1, 2), seed=1),
    DigitsExpert("middle", (3, 4), seed=2),
    DigitsExpert("high", (5, 6, 7), seed=3),
    DigitsExpert("last", (8, 9), seed=4),
    DigitsExpert("shuffled-a", (0, 1, 2, 3, 4), shuffled=True, seed=11),
    DigitsExpert("shuffled-b", (5, 6, 7, 8, 9), shuffled=True, seed=12),
    DigitsExpert("too-hot", (0, 9), lr=2e-2, seed=13),
)
_IMAGES = 400


def _make_digits(root: Path) -> None:
    data = images()
    pixels = torch.cat([data["search"].pixels, data["test"].pixels])
    unseen = Images(pixels, torch.cat([data["search"].digits, data["test"].digits]))
    order = torch.arange(len(unseen.digits))
    for split, chosen in (("search", order[:_IMAGES]), ("test", order[_IMAGES:])):
        write_images(root / "data" / split, unseen.pick(chosen), range(10))
    train_base(root / "models" / "base", data["train"])
    for expert in _EXPERTS:
        train_expert(expert, root / "models" / "base", root / "models" / expert.name, data["train"])


def _make_language(root: Path) -> None:
    tasks = {task.name: task for task in make_tasks(1000, 1000)}
    for split, rows in (("search", tasks["language"].search), ("test", tasks["language"].test)):
        write_split(root / "data" / f"{split}.jsonl", rows)
    copy_base(root / "models" / "base")
    for training in TRAININGS:
        train(training, tasks[training.task], root / "models" / "base", root / "models" / training.name, lambda _: None)


def _spec(experts: list[str], objective: dict[str, Any], heads: list[str], metric: str = "accuracy") -> dict[str, Any]:
    data = {"path": "data"}
    return {
        "base": "models/base",
        "experts": [{"name": name, "path": f"models/{name}"} for name in experts],
        "merge": {
            "operator": "task_arithmetic",
            "granularity": {"layers": "each"},
            "bounds": {"low": -0.25, "high": 1.25},
            "heads": heads,
        },
        "objectives": [
            objective | {"metric": metric, "data": data | {"split": "search"}, "test": data | {"split": "test"}}
        ],
        "algorithm": {"name": "cma_es"},
        "workers": {"count": 1, "cpus": 1, "device": "cpu", "dtype": "float32"},
    }


_DIGITS = [expert.name for expert in _EXPERTS]
_READ = {"name": "digits", "evaluator": "image_classification", "options": {"batch_size": 200}}
_SPELLED = {
    "name": "language",
    "evaluator": "text_classification",
    "options": {"max_length": 16, "batch_size": 64},
    "head": "language",
}
PROBLEMS = {
    "digits, accuracy": Problem("digits", _make_digits, _spec(_DIGITS, _READ, []), 8),
    "digits, loss": Problem("digits", _make_digits, _spec(_DIGITS, _READ, [], "loss"), 8, -1),
    "language, accuracy": Problem(
        "language", _make_language, _spec([training.name for training in TRAININGS], _SPELLED, list(HEADS)), 20
    ),
}


def kinds(problem: Problem) -> dict[str, dict[str, Any]]:
    """Return by name the spec's fields for each way of saving; item responses are for right and wrong only."""
    others: Method = "gmp_irt" if problem.sign > 0 else "regression"

    def estimation(method: Method, items: int) -> dict[str, Any]:
        return {"cache": False, "estimation": {"method": method, "items": items}}

    methods = METHODS if problem.sign > 0 else METHODS[:3]
    fitness = {
        "none": {"cache": False},
        "cache": {},
        "racing": {"cache": False, "racing": {"enabled": True}},
        **{f"{method}, {problem.fiftieth}": estimation(method, problem.fiftieth) for method in methods},
        "weighted, 50": estimation("weighted", 50),
        f"{others}, 50": estimation(others, 50),
        "weighted, 50, cache": estimation("weighted", 50) | {"cache": True},
    }
    out: dict[str, dict[str, Any]] = {name: {"fitness": each} for name, each in fitness.items()}
    for searcher in MODELLING if problem.folder == "digits" else ():  # what they learn from losers are estimates
        out[searcher] = {"algorithm": searcher, "fitness": fitness["none"]}
        out[f"{searcher}, racing"] = {"algorithm": searcher, "fitness": fitness["racing"]}
    return out


@dataclass(frozen=True)
class Task:
    """One job."""

    problem: str
    kind: str
    seed: int
    evaluations: int
    verified: int = VERIFIED


@cache
def root_of(problem: str) -> Path:
    """Return the directory of a problem, everything in it."""
    root = CACHE / PROBLEMS[problem].folder
    if not (root / "complete").exists():
        root.mkdir(parents=True, exist_ok=True)
        PROBLEMS[problem].make(root)
        (root / "complete").touch()
    return root


def spec_of(task: Task) -> JobSpec:
    """Return a job's spec."""
    problem = PROBLEMS[task.problem]
    kind = kinds(problem)[task.kind]
    fitness = kind["fitness"] | {"verification": {"candidates": task.verified, "baselines": True}}
    more = {"name": task.kind, "seed": task.seed, "fitness": fitness, "budget": {"evaluations": task.evaluations}}
    return parse_spec({**problem.fields, **kind, **more})


def run_jobs(task: Task) -> dict[str, Any]:
    """Run a job. With the cache on, an earlier one with another seed is in the store, as for a user's second job."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/runs.db"
        migrations.upgrade(url)
        store = SqlStore(url)
        spec = spec_of(task)
        if spec.fitness.cache:
            _run(store, task.problem, spec.model_copy(update={"seed": task.seed + 1000}))
        job = _run(store, task.problem, spec)
        try:
            return {**vars(task), **_told(store, job, task)}
        finally:
            store.close()


def _run(store: SqlStore, problem: str, spec: JobSpec) -> str:
    job, _ = store.create_job(spec)
    Controller(store, LocalPoolFactory([root_of(problem)]), ControllerConfig("benchmark", poll_s=0.01)).run_next(job.id)
    if (view := store.get_job(job.id)).state != "completed":
        raise RuntimeError(f"the job {view.state}: {view.reason}")
    return job.id


def _told(store: SqlStore, job: str, task: Task) -> dict[str, Any]:
    """What a job found, and for how many items."""
    found = [c for c in store.list_candidates(job, limit=MOST).items if c.duplicate_of is None]
    sign = PROBLEMS[task.problem].sign
    spent, so_far, best = 0.0, [], -np.inf * sign
    for candidate in found:
        spent += candidate.cost.get("items", 0.0)
        if candidate.values is not None and candidate.partial is None:
            best = sign * max(sign * best, sign * candidate.values[0])
        so_far.append([spent, best])
    known = {c.index: value for c in found if (value := _known(c)) is not None}
    chosen = max((c for c in found if c.index in known), key=lambda c: sign * known[c.index])
    out: dict[str, Any] = {
        "items": store.get_job(job).progress.cost.get("items", 0.0) - _test_items(found),
        "search": _known(chosen),
        "test": chosen.verification.test[_name(task)].value if chosen.verification else None,
        "claimed": chosen.values[0] if chosen.values else None,
        "curve": so_far,
        "stopped": sum(c.stopped for c in found),
    }
    if task.kind == "none":
        scores = [store.get_candidate(job, c.index).items for c in found]
        out["scores"] = [each[_name(task)] for each in scores if each]
        out["first"] = sum(c.origin == "warm_start" for c in found)
    return out


def _name(task: Task) -> str:
    return str(PROBLEMS[task.problem].fields["objectives"][0]["name"])


def _known(candidate: CandidateSummary) -> float | None:
    """A candidate's accuracy on all search items, where these were measured."""
    verification = candidate.verification
    if verification is None or not verification.search:
        return None
    return next(iter(verification.search.values())).value


def _test_items(found: list[CandidateSummary]) -> float:
    return float(sum(each.items for c in found if c.verification for each in c.verification.test.values()))


# --- estimates ----------------------------------------------------------------------------------------------------------


def estimates(scores: list[list[float]], first: int, sizes: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Return for each method and number of items how far estimates of a job's candidates are from what all items say.

    Args:
        scores: of the job's candidates, one for each item.
        first: how many of them are the references.
        repeats: with so many choices of anchors.
    """
    answers = np.array(scores)
    binary = bool(np.isin(answers, (0.0, 1.0)).all())
    references, candidates = answers[:first], answers[first:]
    out = []
    for method in METHODS if binary else METHODS[:3]:
        for size in (size for size in sizes if size < answers.shape[1]):
            found = [_estimated(method, size, seed, references, candidates) for seed in range(repeats)]
            away = np.concatenate([values - candidates.mean(axis=1) for values, _ in found])
            held = np.concatenate([1.96 * errors for _, errors in found]) >= np.abs(away)
            agree = [_rank_correlation(values, candidates.mean(axis=1)) for values, _ in found]
            out.append(
                {
                    "method": method,
                    "items": size,
                    "error": round(float(np.sqrt((away**2).mean())), 4),
                    "held": round(float(held.mean()), 3),
                    "rank correlation": round(float(np.mean(agree)), 3),
                }
            )
    return out


def _estimated(method: Method, size: int, seed: int, references: Matrix, candidates: Matrix) -> tuple[Matrix, Matrix]:
    anchors: Anchors = (
        random_anchors(np.random.default_rng(seed).permutation(references.shape[1]), size)
        if method in ("mean", "regression")
        else clustered_anchors(references, size, seed)
    )
    estimator = Estimator(method, references, anchors)
    found = [estimator.estimate(row[anchors.places]) for row in candidates]
    return np.array([each.value for each in found]), np.array([each.error for each in found])


def _rank_correlation(one: Matrix, other: Matrix) -> float:
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(one) == 0 or np.ptp(other) == 0 else float(spearmanr(one, other).statistic)


# --- the benchmark ------------------------------------------------------------------------------------------------------


def run(quick: bool, *, seeds: int = SEEDS, evaluations: int = EVALUATIONS, processes: int = 1) -> dict[str, Any]:
    """Run all jobs; what an interrupted call has run is not run again (`CACHE`).

    Args:
        quick: three jobs of 12 evaluations on the digits instead.
        seeds: of each job; the first is 0.
        evaluations: of each job.
        processes: jobs at once.
    """
    if quick:
        tasks = [Task("digits, accuracy", kind, 0, 12, 2) for kind in ("none", "racing", "gmp_irt, 8")]
    else:
        tasks = [
            Task(problem, kind, seed, evaluations)
            for seed in range(seeds)
            for problem, made in PROBLEMS.items()
            for kind in kinds(made)
        ]
    for problem in {task.problem for task in tasks}:
        root_of(problem)
    found = results(tasks, run_jobs, None if quick else CACHE / "jobs", processes)
    errors = {
        problem: estimates(plain[0]["scores"], plain[0]["first"], (10,) if quick else SIZES, 1 if quick else 5)
        for problem in dict.fromkeys(task.problem for task in tasks)
        if (plain := [each for each in found if each["problem"] == problem and each["kind"] == "none"])
    }
    jobs = [{key: value for key, value in each.items() if key not in ("scores", "first")} for each in found]
    return {"summary": summary(jobs), "estimates": errors, "jobs": jobs}


def summary(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each problem and kind the means over the seeds.

    ``share`` is the number of items by that of the plain job, ``plain`` what the plain job had reached with as many.
    """
    plain = {(job["problem"], job["seed"]): job for job in jobs if job["kind"] == "none"}
    out = []
    for problem, kind in dict.fromkeys((job["problem"], job["kind"]) for job in jobs):
        mine = [job for job in jobs if (job["problem"], job["kind"]) == (problem, kind)]
        pairs = [(job, plain[problem, job["seed"]]) for job in mine]
        out.append(
            {
                "problem": problem,
                "kind": kind,
                "seeds": len(mine),
                "items": round(float(np.mean([job["items"] for job in mine]))),
                "share": round(float(np.mean([job["items"] / other["items"] for job, other in pairs])), 3),
                **{
                    what: round(float(np.mean([job[what] for job in mine])), 4)
                    for what in ("search", "test", "claimed")
                },
                "plain": round(float(np.mean([_reached(other, job["items"]) for job, other in pairs])), 4),
            }
        )
    return out


def _reached(job: dict[str, Any], items: float) -> float:
    """The best of a job after so many items, or of its first candidate."""
    return float(next((best for spent, best in reversed(job["curve"]) if spent <= items), job["curve"][0][1]))


def plot(measured: dict[str, Any], figure: Any) -> None:
    """Draw the accuracy on search and test items against the number of items scored, a panel for each problem."""
    problems = list(dict.fromkeys(row["problem"] for row in measured["summary"]))
    for axes, problem in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems, strict=True):
        for number, row in enumerate(row for row in measured["summary"] if row["problem"] == problem):
            axes.plot([row["items"]] * 2, [row["search"], row["test"]], color=f"C{number}", linewidth=0.8)
            axes.plot(row["items"], row["search"], "o", color=f"C{number}", label=row["kind"])
            axes.plot(row["items"], row["test"], "x", color=f"C{number}")
        axes.set_xscale("log")
        axes.set_xlabel("items scored")
        axes.set_title(problem)
        axes.legend(fontsize="xx-small")
    figure.axes[0].set_ylabel("value on all items (o search, x test)")


if __name__ == "__main__":
    main("thrift", run, plot, seeds=SEEDS, evaluations=EVALUATIONS, processes=1)
