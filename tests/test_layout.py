"""The shape of the code base, read off every file: who imports whom, and that algorithms do nothing but compute."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["optimizer", "workers", "api"]  # each may import itself and those before it
FOREIGN_TO_OPTIMIZER = {
    *("torch", "transformers", "safetensors", "datasets", "ray"),
    *("sqlalchemy", "alembic", "psycopg", "fastapi", "starlette", "uvicorn", "httpx", "typer", "rich"),
}
FOREIGN_TO_ALGORITHMS = {
    *("os", "io", "pathlib", "shutil", "tempfile", "glob", "socket", "urllib", "http", "subprocess", "multiprocessing"),
    *(
        "threading",
        "asyncio",
        "concurrent",
        "time",
        "datetime",
        "random",
        "secrets",
        "uuid",
        "logging",
        "pickle",
        "sqlite3",
    ),
}
FORBIDDEN_CALLS = {"open", "print", "input", "exec", "eval", "__import__"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module or "")
    return names


def top_level(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_downwards(package: str) -> None:
    above = set(LAYERS[LAYERS.index(package) + 1 :]) | {"tests"}
    assert modules(package)
    offences = {str(path.relative_to(ROOT)): bad for path in modules(package) if (bad := top_level(path) & above)}
    assert not offences


def test_optimizer_has_no_heavy_dependencies() -> None:
    offences = {
        str(path.relative_to(ROOT)): bad
        for path in modules("optimizer")
        if (bad := top_level(path) & FOREIGN_TO_OPTIMIZER)
    }
    assert not offences


OUTSIDE = {"controller", "ports", "search", "phases", "telling", "estimating", "measuring", "races", "verifying"}


def pure_modules() -> list[Path]:
    """The algorithms and all that they are made of."""
    return [path for path in modules("optimizer") if path.stem not in OUTSIDE]


def test_algorithms_know_nothing_of_the_outside() -> None:
    """They see spaces and outcomes only: no ports, no store, no controller, no clock, no files."""
    beyond = {f"optimizer.{name}" for name in OUTSIDE}
    for path in pure_modules():
        assert not top_level(path) & FOREIGN_TO_ALGORITHMS, path
        assert not imported(path) & beyond, path


def calls(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_algorithms_do_no_io_and_use_no_global_generator() -> None:
    """All that is random comes from the context; ``np.random`` serves for names of types and seeded generators only."""
    seeded = {"np.random.Generator", "np.random.PCG64", "np.random.RandomState"}
    for path in pure_modules():
        for name, line in calls(path):
            where = f"{path.relative_to(ROOT)}:{line} calls {name}"
            assert name not in FORBIDDEN_CALLS, where
            assert not name.startswith("np.random.") or name in seeded, where


def test_optimizer_loads_nothing_heavy() -> None:
    """In a fresh interpreter, with every module of it imported and every algorithm registered."""
    names = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in modules("optimizer")]
    names = [name.removesuffix(".__init__") for name in names]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from optimizer.algorithms import ALGORITHMS\n"
        "assert len(ALGORITHMS) >= 4\n"
        f"print(sorted({FOREIGN_TO_OPTIMIZER!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_says_what_it_is_for(package: str) -> None:
    for path in modules(package):
        assert path.name == "__init__.py" or ast.get_docstring(tree(path)), f"{path} has no docstring"
