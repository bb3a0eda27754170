"""The README's tables and the endpoint's OpenAPI file, made from the code.

`python -m tests.readme_tables` (`make readme`) writes them anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import typer
from fastapi import FastAPI
from typer.core import TyperArgument, TyperGroup

from api.app import create_app, route_table
from api.cli import app as cli
from api.endpoint.app import create_endpoint_app
from api.settings import Settings, settings_table
from api.store.sql import SqlStore
from optimizer.algorithms import ALGORITHMS, Algorithm
from optimizer.problem import OperatorInfo, Problem
from optimizer.space import SPACES
from optimizer.spec import JobSpec
from workers.evaluators.base import EVALUATORS
from workers.graders.base import GRADERS
from workers.merging.operator import OPERATORS

README = Path(__file__).parents[1] / "README.md"
ENDPOINT = README.parent / "api" / "endpoint"
ENDPOINT_PAGE = ENDPOINT / "README.md"
ENDPOINT_OPENAPI = ENDPOINT / "openapi.json"
_MARKED = re.compile(r"(<!-- table: (?P<name>\w+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def settings() -> str:
    """Settings: environment variable, default, help."""
    return _table(("variable", "default", "what it is"), ((f"`{n}`", _code(d), h) for n, d, h in settings_table()))


def routes() -> str:
    """REST routes with their summaries."""
    return _routes(create_app(SqlStore("sqlite:///unused.db"), Settings(), inspect=_nothing))


def endpoint_routes() -> str:
    """Routes of the merge-and-score endpoint with their summaries."""
    return _routes(create_endpoint_app(None, Settings()))


def _routes(app: FastAPI) -> str:
    rows = ((f"`{method} {path}`", summary) for method, path, summary in route_table(app))
    return _table(("route", "what it does"), rows)


def endpoint_openapi() -> str:
    """The OpenAPI document of the merge-and-score protocol, as its file has it."""
    return json.dumps(create_endpoint_app(None, Settings()).openapi(), indent=1, ensure_ascii=False) + "\n"


def commands() -> str:
    """CLI commands with the first sentence of their help."""
    return _table(("command", "what it does"), _commands(typer.main.get_group(cli), "mergeopt"))


def algorithms() -> str:
    """Search algorithms."""
    rows = ((f"`{name}`", found.summary, _abilities(found), found.reference) for name, found in ALGORITHMS.items())
    return _table(("algorithm", "what it does", "for", "source"), rows)


def _abilities(found: type[Algorithm]) -> str:
    objectives = "several objectives" if found.multi_objective else "their weighted sum"
    return f"{objectives}; per-item scores" if found.needs_items else objectives


def spaces() -> str:
    """Search spaces of another form than a table of coefficients."""
    rows = ((f"`{name}`", found.summary, found.reference) for name, found in SPACES.items())
    return _table(("space", "what it varies", "source"), rows)


def operators() -> str:
    """Merge operators, with what a search varies and what they need."""
    rows = (
        (f"`{name}`", found.info.summary, _traits(found.info), found.info.reference)
        for name, found in OPERATORS.items()
    )
    return _table(("operator", "what it does", "coefficients; needs", "source"), rows)


_COLUMNS = {"per_expert": "one an expert", "interpolation": "`t` between two", "scale": "one scale"}
_NEEDS = {
    "weights": "",
    "factors": "LoRA experts",
    "items": "calibration data",
    "gradients": "calibration data, gradients",
}


def _traits(info: OperatorInfo) -> str:
    traits = [_COLUMNS[info.columns], _NEEDS[info.needs]]
    return "; ".join([*filter(None, traits), *(["also a modifier"] if info.modifier else [])])


def evaluators() -> str:
    """Evaluators with their metrics."""
    rows = (
        (f"`{name}`", found.summary, ", ".join(f"`{metric}`" for metric in found.metrics) or "named in its options")
        for name, found in EVALUATORS.items()
    )
    return _table(("evaluator", "what it measures", "metrics"), rows)


def graders() -> str:
    """Graders of generated answers, with the columns of the data that they read."""
    rows = (
        (f"`{name}`", found.summary, ", ".join(f"`{role}`" for role in found.columns))
        for name, found in GRADERS.items()
    )
    return _table(("grader", "what it scores", "columns"), rows)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (settings, routes, endpoint_routes, commands, algorithms, spaces, operators, evaluators, graders)
}


def render(text: str) -> str:
    """Return a README's text with every marked table made anew."""
    return _MARKED.sub(lambda match: f"{match[1]}{TABLES[match['name']]()}{match[4]}", text)


def _nothing(spec: JobSpec) -> Problem:
    raise NotImplementedError


def _commands(group: TyperGroup, prefix: str) -> Iterable[tuple[str, str]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _commands(command, f"{prefix} {name}")
        else:
            arguments = " ".join(str(p.name).upper() for p in command.params if isinstance(p, TyperArgument))
            yield f"`{prefix} {name}{' ' + arguments if arguments else ''}`", command.get_short_help_str(200)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |\n" for row in lines
    )


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    for page in (README, ENDPOINT_PAGE):
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    ENDPOINT_OPENAPI.write_text(endpoint_openapi(), encoding="utf-8")
