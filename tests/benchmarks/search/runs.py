"""What to run in which order, and the files of what was run: what went through is not run again."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.algorithms.base import ALGORITHMS
from optimizer.errors import InvalidInput, JobError
from tests.benchmarks.search.bench import Bench, anchors
from tests.benchmarks.search.common import RESULTS
from tests.benchmarks.search.peers import run_peer
from tests.benchmarks.search.problems import CACHE, PROBLEMS

DIGITS = ("digits-2", "digits-4", "digits-8")
STAGES: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = (
    (DIGITS, (50, 200)),
    (("minilm",), (50, 200)),
    (("smollm2",), (50,)),
    (DIGITS, (1000,)),
    (("smollm2",), (200,)),
    (("minilm",), (1000,)),
    (("smollm2",), (1000,)),
)
"""Problems and budgets, what tells most for its time first."""

SEEDS = {"minilm": 2, "smollm2": 1} | dict.fromkeys(DIGITS, 3)
_PLAIN_SUM: dict[str, Any] = {"normalise": False, "weightings": 1}
GRID = [round(0.1 * step, 1) for step in range(1, 13)]


@dataclass(frozen=True)
class Wish:
    """A run that is wanted.

    Attributes:
        problem, seed, budget: of the run.
        who: an algorithm as on the command line (``cma_es``, ``cma_es:{"sigma0": 0.2}``), or ``peer/NAME``.
    """

    problem: str
    who: str
    seed: int
    budget: int

    def path(self, out: Path) -> Path:
        """Return the file of the run."""
        return out / self.problem / f"{slug(self.who)}-{self.budget}-{self.seed}.json"


@dataclass
class Choice:
    """What the command line chooses.

    Attributes:
        kind: `single` or `several` objectives; also the name of the directory of the runs.
        who: algorithms and peers.
        problems, budgets: of the runs.
        seeds: so many for each; by default as many as `SEEDS` says.
        cache, out: directories of the problems and of the runs.
        minutes: begin no run after so long.
    """

    kind: str
    who: list[str]
    problems: list[str] = field(default_factory=lambda: list(PROBLEMS))
    budgets: list[int] = field(default_factory=lambda: [50, 200, 1000])
    seeds: int | None = None
    cache: Path = CACHE
    out: Path = RESULTS
    minutes: float | None = None

    @property
    def directory(self) -> Path:
        """Of the runs."""
        return self.out / f"{self.kind}_runs"


def parser(kind: str, name: str, who: Sequence[str]) -> argparse.ArgumentParser:
    """Return the command line that both benchmarks share."""
    out = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.search.{name}")
    out.add_argument("--quick", action="store_true", help="digits, two algorithms and one peer, 30 evaluations")
    out.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    out.add_argument(
        "--algorithms",
        nargs="+",
        dest="who",
        default=list(who),
        metavar="NAME[:OPTIONS]",
        help="NAME@SHARE+NAME for phases, peer/NAME for peers",
    )
    out.add_argument("--budgets", nargs="+", type=int, default=[50, 200, 1000])
    out.add_argument("--seeds", type=int, help="so many for each; 3 for digits, 2 for minilm, 1 for smollm2 by default")
    out.add_argument("--cache", type=Path, default=CACHE, help="directory of the problems")
    out.add_argument("--out", type=Path, default=RESULTS, help="directory of the figures")
    out.add_argument("--minutes", type=float, help="begin no run after so long; the next call goes on")
    out.set_defaults(kind=kind)
    return out


def choose(found: argparse.Namespace) -> Choice:
    """Turn a parsed command line into a choice."""
    if found.quick:
        return quick(found.kind, found.cache, found.out)
    return Choice(**{name: value for name, value in vars(found).items() if name != "quick"})


def quick(kind: str, cache: Path, out: Path) -> Choice:
    """Return the small choice that shows whether it works."""
    who = ["random", "cma_es", "peer/pycma"] if kind == "single" else ["random", "nsga2", "peer/pymoo-20"]
    return Choice(kind, who, ["digits-2"], [30], 1, cache, out)


def slug(who: str) -> str:
    """Return a name that files can have."""
    return re.sub(r"[^A-Za-z0-9_.=]+", "_", who).strip("_")


def algorithm_of(who: str, *, plain_sum: bool) -> dict[str, Any]:
    """Return the job spec's `algorithm` for ``NAME`` or ``NAME:{JSON}``, or its `phases` for ``NAME@SHARE+NAME``.

    Args:
        plain_sum: let it follow the plain sum of the losses where it has a choice (`normalise`, `weightings`), since that
            is what it is judged by.
    """
    if "+" in who.partition(":")[0]:
        parts = [part.partition("@") for part in who.split("+")]
        return {
            "phases": [
                {"algorithm": algorithm_of(name, plain_sum=plain_sum), **({"share": float(share)} if share else {})}
                for name, _, share in parts
            ]
        }
    name, _, text = who.partition(":")
    options = json.loads(text) if text else {}
    if plain_sum and name in ALGORITHMS:
        fields = ALGORITHMS[name].Options.model_fields
        options = {option: value for option, value in _PLAIN_SUM.items() if option in fields} | options
    return {"name": name, "options": options}


def wishes(choice: Choice) -> Iterator[Wish]:
    """Yield the runs of a choice, what tells most for its time first."""
    listed = {budget for _, budgets in STAGES for budget in budgets}
    others = tuple(budget for budget in choice.budgets if budget not in listed)
    for problems, budgets in ((tuple(PROBLEMS), others), *STAGES):
        chosen = [problem for problem in problems if problem in choice.problems]
        most = max([choice.seeds or SEEDS[problem] for problem in chosen], default=0)
        for seed in range(most):
            for budget in budgets:
                for problem in chosen:
                    if budget in choice.budgets and seed < (choice.seeds or SEEDS[problem]):
                        yield from (Wish(problem, who, seed, budget) for who in choice.who)


def carry_out(choice: Choice) -> None:
    """Run what is wanted and not there yet, until the time is over."""
    began = time.monotonic()
    benches: dict[str, Bench] = {}
    for wish in wishes(choice):
        path = wish.path(choice.directory)
        if path.exists() and "losses" in json.loads(path.read_text()):
            continue
        if choice.minutes is not None and time.monotonic() - began > choice.minutes * 60:
            break
        bench = benches.get(wish.problem) or _open(wish.problem, choice)
        benches[wish.problem] = bench
        found = _run(bench, wish)
        write(path, {**vars(wish), **found})
        _tell(wish, found, bench)
    for bench in benches.values():
        bench.close()


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, separators=(",", ":")) + "\n", encoding="utf-8")
    partial.replace(path)


def read(directory: Path) -> list[dict[str, Any]]:
    """Return all runs that were written below a directory."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*/*-*-*.json"))]


def read_anchors(directory: Path) -> dict[str, dict[str, Any]]:
    """Return what is there without a search, by problem: see `bench.anchors`."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(directory.glob("*/anchors.json"))}


def _open(problem: str, choice: Choice) -> Bench:
    bench = Bench(PROBLEMS[problem], choice.cache, several=choice.kind == "several")
    path = choice.directory / problem / "anchors.json"
    if not path.exists():
        about = {
            "objectives": [objective.name for objective in bench.problem.objectives],
            "weights": bench.weights.tolist(),
            "variables": bench.space.dim,
        }
        write(path, {**about, "anchors": anchors(bench, GRID)})
    return bench


def _run(bench: Bench, wish: Wish) -> dict[str, Any]:
    """Run it; an algorithm that refuses the problem, or that breaks down, says why."""
    kind, _, peer = wish.who.partition("/")
    try:
        if kind == "peer":
            run = run_peer(peer, bench, wish.seed, wish.budget)
        else:
            algorithm = algorithm_of(wish.who, plain_sum=not bench.several)
            run = bench.run(algorithm, wish.seed, wish.budget)
    except InvalidInput as error:
        return {"refused": f"{error}"}
    except (JobError, ArithmeticError, ValueError, IndexError, TypeError, KeyError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return run.plain()


def _tell(wish: Wish, found: dict[str, Any], bench: Bench) -> None:
    why = found.get("refused") or found.get("failed")
    if why is None:
        best = found["losses"][found["best"]] if found["best"] is not None else None
        total = None if best is None else sum(w * loss for w, loss in zip(bench.weights, best, strict=True))
        shown = "nothing feasible" if total is None else f"{total:.4f}"
        why = f"{shown} in {found['proposing'] + found['evaluating']:.1f} s, of which proposing {found['proposing']:.1f} s"
    sys.stderr.write(f"{wish.problem} {wish.who} seed {wish.seed} budget {wish.budget}: {why}\n")
