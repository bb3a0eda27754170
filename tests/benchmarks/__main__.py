"""`make bench`: every benchmark, one after the other; each prints what it measured, on what."""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("store", "engine", "ranges", "memory", "peer")


def main() -> int:
    """Run all benchmarks and return the number of those that missed their target."""
    return sum(subprocess.call([sys.executable, "-m", f"tests.benchmarks.{name}"]) != 0 for name in BENCHMARKS)


if __name__ == "__main__":
    sys.exit(main())
