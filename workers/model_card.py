"""The README of an exported model: what it was made of, how well it scores, how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from optimizer.recipe import Leaf, Merge, Recipe
from optimizer.spec import JobSpec
from workers.checkpoints import Checkpoint

UNKNOWN = "not stated"
_MAX_CARD = 1_000_000  # bytes


def model_card(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    *,
    head: str | None,
    title: str,
    scores: Mapping[str, float],
    spec: JobSpec | None,
) -> str:
    """Return the model card as Markdown with YAML front matter."""
    hubs = [model.ref.hub for model in recipe.models.values() if model.ref.hub]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "mergeopt"]}
    if hubs:
        front |= {"base_model": hubs, "base_model_relation": "merge"}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {' '.join(title.split())}",
        "A merge of fine-tuned models, found by a search with mergeopt.",
        "## Models",
        _table(
            ("Name", "Reference", "Licence", "SHA-256 of its weights"),
            [
                (name, f"`{model.ref}`", licence(checkpoints[name].path), f"`{model.digest}`")
                for name, model in recipe.models.items()
            ],
        ),
        "The licence of each model applies to the merged one as well; check that they allow it.",
        f"The head and the config are those of {f'the expert `{head}`' if head else 'the base'}.",
        "## Recipe",
        _summary(recipe.root),
        f"The whole recipe is in `recipe.json`; its fingerprint is `{recipe.fingerprint}`.",
    ]
    if scores:
        parts += ["## Scores", "On the data the search saw:"]
        parts += [_table(("Objective", "Value"), [(name, f"{value:.6g}") for name, value in scores.items()])]
    parts += [
        "## How to reproduce",
        "Enqueue `recipe.json` as a candidate of a mergeopt job over the same models (compare the digests above) and "
        "export it: the same recipe gives the same weights.",
    ]
    if spec is not None:
        parts += ["The job that found it:", f"```yaml\n{_spec(spec)}```"]
    return "\n\n".join(parts) + "\n"


def licence(path: Path) -> str:
    """Return the licence in the front matter of a checkpoint's own model card, or `UNKNOWN`."""
    try:
        with (path / "README.md").open(encoding="utf-8") as file:
            text = file.read(_MAX_CARD)
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return UNKNOWN
    found = front.get("license") if isinstance(front, dict) else None
    return _cell(str(found)) if found else UNKNOWN


def _summary(root: Leaf | Merge) -> str:
    if isinstance(root, Leaf):
        return f"The model `{root.model}` as it is."
    options = ", ".join(f"{name} = {value}" for name, value in root.options.items())
    lines = [f"Operator `{root.operator}`" + (f" with {options}." if options else ".")]
    width = len(root.coefficients[0])
    names = [child.model if isinstance(child, Leaf) else f"merge {number}" for number, child in enumerate(root.inputs)]
    columns = names if width == len(names) else [f"from {names[0]} to {names[-1]}"]
    rows = [
        (label, *(f"{number:.4g}" for number in row)) for label, row in zip(_rows(root), root.coefficients, strict=True)
    ]
    lines.append(_table(("Parameters", *columns), rows))
    return "\n\n".join(lines)


def _rows(merge: Merge) -> list[str]:
    if merge.groups is not None:
        return [group.label for group in merge.groups]
    bounds = ["0", *map(str, merge.breaks or []), "end"]
    return [f"parameters {begin} to {end}" for begin, end in pairwise(bounds)]


def _spec(spec: JobSpec) -> str:
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True), sort_keys=False)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
