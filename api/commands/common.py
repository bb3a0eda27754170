"""What the commands share: consoles, errors, options, files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel
from rich.console import Console
from typer.core import TyperGroup

from api.client import Client
from api.documents import parse_document
from api.errors import error_view
from optimizer.errors import InvalidInput, MergeoptError, UserError

USER_ERROR, OTHER_ERROR, INTERRUPTED = 2, 1, 130

Url = Annotated[
    str | None, typer.Option("--url", help="Where the service is. Environment: MERGEOPT_URL.", show_default=False)
]
Token = Annotated[
    str | None, typer.Option("--token", help="Access token. Environment: MERGEOPT_TOKEN.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", show_default=False)]
SpecFile = Annotated[
    str, typer.Argument(metavar="FILE", help="Job spec, YAML or JSON; - reads it from stdin.", show_default=False)
]
TokenizerFrom = Annotated[
    str | None,
    typer.Option(
        "--tokenizer-from",
        help="Model whose tokenizer, chat template and generation config it gets; the head's by default, else the base's.",
        show_default=False,
    ),
]
AsAdapter = Annotated[
    int | None,
    typer.Option("--as-adapter", help="Write a LoRA adapter of this rank to the base.", min=1, show_default=False),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")]


def out() -> Console:
    """Return a console for results. Made when it is needed, because tests and pipes replace stdout."""
    return Console(highlight=False)


def err() -> Console:
    """Return a console for errors and notes."""
    return Console(stderr=True, highlight=False)


class ErrorGroup(TyperGroup):
    """A group of commands that ends with one clear message, and no traceback, where mergeopt raises an error."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except MergeoptError as error:
            fail(error)


def fail(error: MergeoptError) -> NoReturn:
    """Print an error and exit: 2 where the caller can put it right, 1 otherwise."""
    console = err()
    console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
    for problem in error_view(error).error.problems[1:]:
        where = f"{problem['field']}: " if problem["field"] else ""
        console.print(f"       {where}{problem['message']}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(USER_ERROR if isinstance(error, UserError) else OTHER_ERROR)


@contextmanager
def connect(url: str | None, token: str | None) -> Iterator[Client]:
    """A client of the service that the options, or the environment, name."""
    with Client(url, token) as client:
        yield client


def read_document(name: str) -> Any:
    """Return the plain data of a YAML or JSON file, or of stdin for ``-``; raises `InvalidInput`."""
    try:
        text = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot be read: {error.strerror}", field=name) from error
    # YAML reads JSON too; files that say what they are get the better error messages.
    return parse_document(text, "json" if Path(name).suffix.lower() == ".json" else "yaml", field=name)


def read_mapping(name: str) -> dict[str, Any]:
    """Return the plain data of a file whose top level is an object; raises `InvalidInput`."""
    data = read_document(name)
    if not isinstance(data, dict):
        raise InvalidInput("the file holds no object at its top level", field=name, remedy="begin with `name: …`")
    return data


def print_json(view: BaseModel | list[Any]) -> None:
    """Print a view, or a list of them, as JSON."""
    if isinstance(view, BaseModel):
        typer.echo(view.model_dump_json(indent=2))
    else:
        typer.echo("[" + ",\n".join(item.model_dump_json(indent=2) for item in view) + "]")
