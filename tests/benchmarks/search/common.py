"""What all benchmarks of searches share: their command line, and the figures and plots they leave behind."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Run = Callable[..., dict[str, Any]]
Plot = Callable[[dict[str, Any], Any], None]


def main(name: str, run: Run, plot: Plot, **sizes: int) -> None:
    """Run a benchmark as a command: ``--quick`` for a small one, ``--out DIR`` for where the figures go.

    Writes ``NAME.json`` (what ``run`` returned, with the date, the machine and the time it took) and ``NAME.svg``.

    Args:
        run: from whether it is to be quick, to plain data with all that was measured.
        plot: draws those data on a figure of matplotlib, which it is handed empty.
        sizes: further arguments of ``run``, each an option of the command with this default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.search.{name}")
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the figures")
    for size, default in sizes.items():
        parser.add_argument(f"--{size}", type=int, default=default, help=f"{default} by default")
    arguments = parser.parse_args()
    began = time.perf_counter()
    measured = run(arguments.quick, **{size: getattr(arguments, size) for size in sizes})
    save(name, measured, arguments.out, time.perf_counter() - began, quick=arguments.quick)
    draw(name, measured, arguments.out, plot)


def save(name: str, measured: dict[str, Any], out: Path, seconds: float, *, quick: bool) -> Path:
    """Write what was measured, and on what, as JSON; return the file."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(seconds, 1),
        "quick": quick,
    }
    path = out / f"{name}.json"
    path.write_text(json.dumps(about | measured, indent=1) + "\n", encoding="utf-8")
    return path


def draw(name: str, measured: dict[str, Any], out: Path, plot: Plot) -> Path:
    """Draw what was measured; return the file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    plot(measured, figure)
    path = out / f"{name}.svg"
    # Without a date and with fixed ids, the same figures give the same file.
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(path, metadata={"Date": None})
    return path
