"""What operators take, as a ratio to a copy: ``python -m tests.benchmarks.engine [--json PATH]``.

The copy moves as many bytes as a merge must at least: the base (where the operator uses it) and every expert read once,
the result written once. Both run in turn in one process, on tensors in memory, and the best of several runs counts.
What an operator prepares once (limits, ranks) is there already, as it is for every candidate of a search but the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tests.workers.merging.running import PlainFacts, make_info
from workers.merging.operator import OPERATORS, Numbers, Parameter, Whole, make_options

SIDE = 2048
"""The parameters are square matrices."""

REPEATS = 9

_LINEAR = {torch.float32: 1.3, torch.bfloat16: 1.5}
_SPARSE = {torch.float32: 3.0, torch.bfloat16: 3.0}
_NONE: dict[torch.dtype, float] = {}
OPERATORS_MEASURED: Mapping[str, tuple[str, dict[str, Any], dict[torch.dtype, float]]] = {
    "linear": ("linear", {}, _LINEAR),
    "task_arithmetic": ("task_arithmetic", {}, _LINEAR),
    "ties": ("ties", {}, _SPARSE),
    "ties, sum": ("ties", {"normalise": "sum"}, _SPARSE),
    "dare_linear": ("dare_linear", {}, _SPARSE),
    "dare_ties": ("dare_ties", {}, _SPARSE),
    "dare_ties, mean": ("dare_ties", {"normalise": "mean"}, _NONE),
    "breadcrumbs": ("breadcrumbs", {}, _NONE),
    "della_linear": ("della_linear", {}, _NONE),
    "della": ("della", {}, _NONE),
}
"""By label: operator, options, and the target where there is one."""


@dataclass(frozen=True)
class Measured:
    """One operator's figures.

    Attributes:
        operator: with its form.
        dtype: of models and result.
        experts: how many are merged.
        threads: how many it may use.
        seconds: of a merge.
        copy_seconds: of the copy.
        target: largest ratio allowed, or None.
    """

    operator: str
    dtype: str
    experts: int
    threads: int
    seconds: float
    copy_seconds: float
    target: float | None

    @property
    def ratio(self) -> float:
        """Time of the merge by that of the copy."""
        return self.seconds / self.copy_seconds


@dataclass
class Prepared(PlainFacts):
    """`PlainFacts` that are computed once."""

    known: dict[str, Numbers] = field(default_factory=dict)

    def of_tensor(self, question: str, compute: Any, *, of: Any = None, settings: Any = None) -> Numbers:
        key = f"{question} {of} {settings}"
        if key not in self.known:
            self.known[key] = super().of_tensor(question, compute, of=of, settings=settings)
        return self.known[key]

    def seed(self, number: int, settings: Mapping[str, Any] | None = None) -> int:
        return 0x9E3779B97F4A7C15 * (number + 1) & (2**64 - 1)


def measure(
    dtype: torch.dtype, experts: int, parameters: int, threads: Iterable[int], side: int = SIDE
) -> Iterator[Measured]:
    """Yield what each operator takes with models of about so many parameters."""
    count = max(1, parameters // side**2)
    models = [_model(count, side, dtype, number) for number in range(experts + 1)]
    out = [torch.empty(side, side, dtype=dtype) for _ in range(count)]
    facts = [_facts(part[0], part[1:]) for part in zip(*models, strict=True)]
    before = torch.get_num_threads()
    try:
        for number in threads:
            torch.set_num_threads(number)
            calls = {label: _merge(facts, out, experts, *OPERATORS_MEASURED[label][:2]) for label in OPERATORS_MEASURED}
            calls |= {f"copy {reads}": _copy(models[0], dtype, reads + 1) for reads in (experts, experts + 1)}
            best = _best(calls)
            for label, (name, _, target) in OPERATORS_MEASURED.items():
                copy = best[f"copy {experts + OPERATORS[name].info.uses_base}"]
                kind = str(dtype).removeprefix("torch.")
                yield Measured(label, kind, experts, number, best[label], copy, target.get(dtype))
    finally:
        torch.set_num_threads(before)


def _model(count: int, side: int, dtype: torch.dtype, number: int) -> list[Tensor]:
    """A model's parameters; all models but the first are near that one."""
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
    out = []
    for _ in range(count):
        tensor = torch.randn(side, side, generator=base) * 0.02
        out.append((tensor if number == 0 else tensor + 0.002 * torch.randn(side, side, generator=own)).to(dtype))
    return out


def _facts(base: Tensor, experts: tuple[Tensor, ...]) -> Prepared:
    whole: Whole = (base, tuple(experts))
    return Prepared(make_info("layers.0.mlp.weight", whole), whole)


def _merge(
    facts: list[Prepared], out: list[Tensor], experts: int, name: str, options: dict[str, Any]
) -> Callable[[], None]:
    entry = OPERATORS[name]
    chosen, row = make_options(entry, options, "options"), tuple(0.9 / experts for _ in range(experts))

    def run() -> None:
        for known, target in zip(facts, out, strict=True):
            base, models = known.whole
            entry.merge(Parameter(known.info, 1, base, models, row, chosen, known), target)

    return run


def _copy(model: list[Tensor], dtype: torch.dtype, units: int) -> Callable[[], None]:
    """A copy that reads and writes so many times a model's bytes, together."""
    size = sum(tensor.numel() for tensor in model) * units // 2
    source, target = torch.ones(size, dtype=dtype), torch.empty(size, dtype=dtype)

    def run() -> None:
        target.copy_(source)

    return run


def _best(calls: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Seconds of each, taken in turn so that what else the machine does meets all of them."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()  # compiles, prepares, and touches the memory
    for _ in range(REPEATS):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def main() -> int:
    """Measure, print a table, and return 1 if an operator takes too long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--parameters", type=int, default=15 * SIDE**2, help="of a model (default: 63 million)")
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    results = [
        result
        for dtype in (torch.float32, torch.bfloat16)
        for experts in options.experts
        for result in measure(dtype, experts, options.parameters, options.threads)
    ]
    console = Console()
    console.print(_table(results))
    if options.json:
        options.json.write_text(json.dumps([vars(result) | {"ratio": result.ratio} for result in results], indent=1))
    return int(any(result.target is not None and result.ratio > result.target for result in results))


def _table(results: list[Measured]) -> Table:
    """Operators by columns of type, experts and threads."""
    columns = list(dict.fromkeys((result.dtype, result.experts, result.threads) for result in results))
    table = Table("operator", *(f"{dtype}, {experts} experts, {threads} thr." for dtype, experts, threads in columns))
    for label in OPERATORS_MEASURED:
        own = {(found.dtype, found.experts, found.threads): found for found in results if found.operator == label}
        table.add_row(label, *(_cell(own[column]) for column in columns))
    return table


def _cell(result: Measured) -> str:
    missed = result.target is not None and result.ratio > result.target
    return f"[red]{result.ratio:.2f}[/red]" if missed else f"{result.ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
