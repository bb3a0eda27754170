"""Commands that work on files of this machine, without the service. Everything heavy is imported inside of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.progress import Progress

from api.commands.common import AsAdapter, Overwrite, TokenizerFrom, err, out, read_document, read_mapping
from optimizer.errors import Conflict, InvalidInput
from optimizer.mergekit import asks_for_search, read_configuration, to_job
from optimizer.recipe import Recipe

if TYPE_CHECKING:
    from optimizer.mergekit import Configuration
    from workers.rebuild import Places

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Roots = Annotated[
    list[Path] | None,
    typer.Option(
        "--root",
        help="Directory that paths of models and data are relative to; may be repeated. The current one by default.",
        show_default=False,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Where one model is, as NAME=DIRECTORY; may be repeated.", show_default=False),
]


def merge(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe.json; - is stdin.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)],
    root: Roots = None,
    model: Models = None,
    head: Annotated[
        str | None, typer.Option("--head", help="Expert whose head the checkpoint gets.", show_default=False)
    ] = None,
    tokenizer_from: TokenizerFrom = None,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest file of weights, e.g. 500MB.")] = "5GB",
    as_adapter: AsAdapter = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the model that a recipe describes, bit for bit the same on every machine."""
    found = Recipe.parse(_recipe_of(read_mapping(recipe)), recipe)
    size = _bytes(shard_size)
    from workers.rebuild import open_recipe, write_model

    places = _places(root, model)
    with Progress(console=err(), transient=True) as progress:
        task = progress.add_task("merging", total=1.0)
        report = write_model(
            open_recipe(found, places),
            target.absolute(),
            title=target.absolute().name,
            head=head,
            tokenizer_from=tokenizer_from,
            overwrite=overwrite,
            max_shard_bytes=size,
            adapter_rank=as_adapter,
            progress=lambda done: progress.update(task, completed=done),
        )
    if report is not None:
        err().print(f"the adapter differs from the merge by {report.error:.2%} of what that changes", style="dim")
    typer.echo(target)


def import_file(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="mergekit's configuration file; - is stdin.", show_default=False)
    ],
    target: Annotated[
        Path | None,
        typer.Option("--out", help="File to write, YAML or JSON; standard output by default.", show_default=False),
    ] = None,
    as_recipe: Annotated[
        bool | None,
        typer.Option(
            "--recipe/--job",
            help="Make a recipe, with lists evaluated layer by layer; or a job, in which lists and ranges are searched. A "
            "job by default where there are any.",
            show_default=False,
        ),
    ] = None,
    root: Roots = None,
    model: Models = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Turn a mergekit configuration into a recipe, or into a job to complete with objectives and a budget."""
    if target is not None and target.exists() and not overwrite:
        raise Conflict(f"{target} exists already", remedy="choose another file, or add --overwrite")
    configuration = read_configuration(read_document(file), file)
    make_recipe = not asks_for_search(configuration) if as_recipe is None else as_recipe
    places = _places(root, model)
    data, notes = _recipe(configuration, places) if make_recipe else _job(configuration, places)
    for note in notes:
        err().print(f"note: {note}", style="dim", markup=False, soft_wrap=True)
    as_json = target.suffix.lower() == ".json" if target is not None else make_recipe
    text = json.dumps(data, indent=2) + "\n" if as_json else yaml.safe_dump(data, sort_keys=False, width=120)
    if target is None:
        typer.echo(text, nl=False)
        return
    target.write_text(text, encoding="utf-8")
    what = "recipe" if make_recipe else "job; add objectives and a budget, and submit it"
    out().print(f"{target}: a {what}", soft_wrap=True, markup=False)


def _recipe(configuration: Configuration, places: Places) -> tuple[dict[str, Any], list[str]]:
    from workers.rebuild import import_recipe

    imported = import_recipe(configuration, places)
    return imported.recipe.to_json(), imported.notes


def _job(configuration: Configuration, places: Places) -> tuple[dict[str, Any], list[str]]:
    from workers.rebuild import number_of_layers

    return to_job(configuration, places.roots.holds, number_of_layers(configuration, places))


def _recipe_of(data: dict[str, Any]) -> Any:
    """The recipe in a file: the file's own content, or that of a candidate as `show --json` prints it."""
    return data["recipe"] if "recipe" in data and "root" not in data else data


def _places(roots: list[Path] | None, models: list[str] | None) -> Places:
    from workers.rebuild import Places
    from workers.roots import Roots as Directories

    given = {}
    for text in models or []:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise InvalidInput(f"{text!r} names no model", field="--model", remedy="write it as NAME=DIRECTORY")
        given[name] = Path(path).absolute()
    return Places(Directories(roots or [Path.cwd()]), given)


def _bytes(text: str) -> float:
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    if size <= 0:
        raise InvalidInput(f"{text!r} is no size", field="--shard-size", remedy="write e.g. 500MB or 5GB")
    return size
