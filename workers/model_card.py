"""The README of an exported model: what it was made of, how well it scores, how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from optimizer.fitness.intervals import Interval
from optimizer.mergekit.methods import METHODS
from optimizer.recipe import Leaf, Merge, Recipe, leaves
from optimizer.spec import JobSpec
from workers.checkpoints import Checkpoint
from workers.merging.operator import operator_info

UNKNOWN = "not stated"
FOUND = "A merge of fine-tuned models, found by a search with mergeopt."
_MAX_CARD = 1_000_000  # bytes

Score = float | Interval


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside the recipe.

    Attributes:
        title: its heading.
        head: expert whose head and config the model has; None for the base's.
        tokenizer_from: model whose tokenizer it has, if not that of ``head``.
        scores: on the data that the search saw, by objective; with its interval where it is known.
        test_scores: on other data, by objective.
        overfitted: objectives by which the model is worse on other data than chance explains.
        spec: the job that found it.
        no_mergekit: why there is no ``mergekit.yml``; None where there is one.
        adapter_rank: of the adapter that was written in place of a whole model.
    """

    title: str
    head: str | None = None
    tokenizer_from: str | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    test_scores: Mapping[str, Score] = field(default_factory=dict)
    spec: JobSpec | None = None
    no_mergekit: str | None = None
    adapter_rank: int | None = None
    overfitted: Sequence[str] = ()


def model_card(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], facts: CardFacts) -> str:
    """Return the model card as Markdown with YAML front matter."""
    licences = {name: licence(checkpoints[name].source) for name in recipe.models if name in checkpoints}
    head, text = facts.head or "base", facts.tokenizer_from or facts.head or "base"
    parts = [
        f"---\n{yaml.safe_dump(_front(recipe, licences), sort_keys=False)}---",
        f"# {' '.join(facts.title.split())}",
        "A merge of fine-tuned models, made with mergeopt." if facts.spec is None else FOUND,
        "## Models",
        _table(
            ("Name", "Reference", "Licence", "SHA-256 of its weights"),
            [
                (name, f"`{model.ref}`", licences.get(name, UNKNOWN), f"`{model.digest}`")
                for name, model in recipe.models.items()
            ],
        ),
        "The licence of each model applies to the merged one as well; check that they allow it.",
        f"The head and the config are those of {_whose(head)}, tokenizer and chat template those of {_whose(text)}.",
        *_vocabulary(recipe),
        "## Recipe",
        _summary(recipe.root),
        *_layers(recipe),
        f"The whole recipe is in `recipe.json`; its fingerprint is `{recipe.fingerprint}`.",
        *_scores(facts),
        "## How to reproduce",
        *_reproduce(recipe, facts),
    ]
    if facts.spec is not None:
        parts += ["The job that found it:", f"```yaml\n{_spec(facts.spec)}```"]
    return "\n\n".join(parts) + "\n"


def _front(recipe: Recipe, licences: Mapping[str, str]) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "mergeopt"]}
    known = set(licences.values())
    if len(known) == 1 and UNKNOWN not in known:
        front["license"] = known.pop()
    hubs = [model.ref.hub for model in recipe.models.values() if model.ref.hub]
    return front | ({"base_model": hubs, "base_model_relation": "merge"} if hubs else {})


def _whose(name: str) -> str:
    return "the base" if name == "base" else f"the expert `{name}`"


def _vocabulary(recipe: Recipe) -> list[str]:
    found = next((model.vocabulary for model in recipe.models.values() if model.vocabulary is not None), None)
    if found is None:
        return []
    what = (
        "those of the base"
        if found.rule == "base"
        else f"those of all models, numbered in the order {_listed(found.order)}"
    )
    return [f"The models' vocabularies differ; the tokens of this one are {what}, and rows were merged by token."]


def _layers(recipe: Recipe) -> list[str]:
    if recipe.layers is None:
        return []
    lines = []
    for depth, planned in enumerate(recipe.layers):
        what = "the recipe's root" if planned.node is None else _listed(sorted(leaves(planned.node)))
        lines.append((str(depth), str(planned.layer), what, f"{planned.scale:g}"))
    return [
        f"The model has {len(recipe.layers)} layers:",
        _table(("Depth", "Made from layer", "Of", "Scale"), lines),
    ]


def _scores(facts: CardFacts) -> list[str]:
    if not facts.scores and not facts.test_scores:
        return []
    rows = [
        (name, *(_score(found[name]) if name in found else "" for found in (facts.scores, facts.test_scores)))
        for name in {**facts.scores, **facts.test_scores}
    ]
    note = "" if facts.test_scores else " It was not measured on other data, so expect less than this there."
    if any(isinstance(found, Interval) for found in facts.test_scores.values()):
        note += " In brackets: 95 % bootstrap intervals over the items."
    out = ["## Scores", f"The search saw the search data.{note}", _table(("Objective", "Search", "Test"), rows)]
    if facts.overfitted:
        out.append(
            f"**Worse on the test data than chance explains: {_listed(facts.overfitted)}.** The intervals do not touch: the "
            "search has fitted its own items, or the test items are harder. Trust the test column."
        )
    return out


def _score(found: Score) -> str:
    if isinstance(found, Interval):
        return f"{found.value:.6g} ({found.low:.4g} to {found.high:.4g})"
    return f"{found:.6g}"


def _reproduce(recipe: Recipe, facts: CardFacts) -> list[str]:
    options = "".join(
        f" {option} {value}"
        for option, value in (
            ("--head", facts.head),
            ("--tokenizer-from", facts.tokenizer_from),
            ("--as-adapter", facts.adapter_rank),
        )
        if value is not None
    )
    out = [
        "On a machine that has the models (mergeopt compares the digests above), with the directory they are in:",
        f"```sh\nmergeopt merge recipe.json out{options} --root DIRECTORY\n```",
        "The same recipe gives the same weights, bit for bit.",
    ]
    if facts.adapter_rank is not None:
        return out
    if facts.no_mergekit is not None:
        return [*out, f"mergekit cannot make this model: {facts.no_mergekit}."]
    random = any(method.random and method.operator in operators_of(recipe.root) for method in METHODS.values())
    same = "draws other random numbers for it" if random else "gives the same numbers, up to rounding"
    return [*out, f"`mergekit.yml` describes the same merge for mergekit 0.1.5, which {same}."]


def operators_of(node: Leaf | Merge) -> set[str]:
    """Return the names of the operators in a node and below it."""
    if isinstance(node, Leaf):
        return set()
    return {node.operator}.union(*(operators_of(child) for child in (node.base, *node.inputs)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


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


def _summary(node: Leaf | Merge) -> str:
    """A node, then the merges among its inputs."""
    if isinstance(node, Leaf):
        return f"The model `{node.model}` as it is."
    options = ", ".join(f"{name} = {value}" for name, value in node.options.items())
    children = [(f"merge {number}", child) for number, child in enumerate((*node.inputs, node.base))]
    names = [child.model if isinstance(child, Leaf) else name for name, child in children[:-1]]
    shown = node.tables or {}
    each = [(name, place) for name, table in shown.items() for place in range(len(table[0]))]
    columns = [
        *_columns(node, names),
        *(f"{name} of {names[n]}" if len(shown[name][0]) > 1 else name for name, n in each),
    ]
    rows = [
        (label, *(f"{number:.4g}" for number in (*row, *(shown[name][line][place] for name, place in each))))
        for line, (label, row) in enumerate(zip(_rows(node), node.coefficients, strict=True))
    ]
    lines = [
        f"Operator `{node.operator}`" + (f" with {options}." if options else "."),
        _table(("Parameters", *columns), rows),
    ]
    for name, child in children:
        if isinstance(child, Merge):
            lines += [f"{name.capitalize()}:", _summary(child)]
    return "\n\n".join(lines)


def _columns(node: Merge, names: list[str]) -> list[str]:
    kind = operator_info(node.operator).columns
    if kind == "per_expert":
        return names
    return ["scale"] if kind == "scale" else [f"from {names[0]} to {names[-1]}"]


def _rows(merge: Merge) -> list[str]:
    if merge.groups is not None:
        return [group.label for group in merge.groups]
    bounds = ["0", *map(str, merge.breaks or []), "end"]
    return [f"parameters {begin} to {end}" for begin, end in pairwise(bounds)]


def _spec(spec: JobSpec) -> str:
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True), sort_keys=False)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
