"""From recipe files, and mergekit's, to models: finding and checking what they name, outside of any job."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.errors import InvalidCheckpoint, InvalidInput, PathNotAllowed
from optimizer.geometry import Layout
from optimizer.mergekit import (
    Configuration,
    Imported,
    base_reference,
    model_names,
    model_ref,
    to_recipe,
    vocabulary_rule,
)
from optimizer.recipe import UNKNOWN_DIGEST, ModelId, Recipe
from optimizer.spec import USUAL_HEADS, JobSpec, ModelRef
from workers.alignment import align, vocabulary_of
from workers.checkpoints import Checkpoint, open_checkpoint, read_json
from workers.compatibility import inspect, raise_on_errors
from workers.export import export_checkpoint
from workers.export_adapter import AdapterReport, export_adapter
from workers.merging.cache import Cache
from workers.merging.calibration import load_measurements
from workers.merging.engine import Measurements, MergeEngine
from workers.model_card import Score
from workers.naming import canonical_names
from workers.roots import Roots


@dataclass(frozen=True)
class Places:
    """Where models are.

    Attributes:
        roots: directories that references lead into.
        given: directories of single models, by their name in the recipe; they go before the references.
    """

    roots: Roots
    given: Mapping[str, Path]

    def find(self, name: str, ref: ModelRef) -> Path:
        """Return a model's directory.

        Raises:
            InvalidCheckpoint, PathNotAllowed: there is none, or it is outside the roots.
        """
        if name in self.given:
            if not self.given[name].is_dir():
                raise InvalidCheckpoint(f"{self.given[name]} is no directory", field=f"models.{name}")
            return self.given[name]
        try:
            return self.roots.resolve(ref, f"models.{name}")
        except (InvalidCheckpoint, PathNotAllowed) as error:
            remedy = f"name the directory it is relative to with --root, or its own with --model {name}=DIRECTORY"
            raise type(error)(error.message, field=error.field, remedy=remedy) from error


@dataclass(frozen=True)
class Opened:
    """A recipe with everything that it is computed from.

    Attributes:
        recipe: the merged model.
        checkpoints: ``base`` and the experts by name.
        layout: what they share.
        measurements: what calibration data say of them, where the recipe has any.
        cache: of what operators prepare; in memory by default.
    """

    recipe: Recipe
    checkpoints: Mapping[str, Checkpoint]
    layout: Layout
    measurements: Measurements | None = None
    cache: Cache | None = None


def open_recipe(recipe: Recipe, places: Places) -> Opened:
    """Open the models of a recipe and check that they are those it was made for; fills in digests that it lacks.

    Raises:
        InvalidCheckpoint: a model is missing, another one, or does not fit the others.
        InputsChanged: calibration data are not those that the recipe was made with.
        InvalidInput: the recipe has no base, or names operators, options or data that there are not.
    """
    if "base" not in recipe.models:
        raise InvalidInput("the recipe has no model `base`", field="recipe.models")
    joined = next((model.vocabulary for model in recipe.models.values() if model.vocabulary is not None), None)
    order = ["base", *(name for name in (joined.order if joined is not None else recipe.models) if name != "base")]
    refs = {name: recipe.models[name].ref for name in order if name in recipe.models}
    checkpoints = align(_open(refs, places), joined.rule if joined is not None else "refuse")
    models = {}
    for name, known in recipe.models.items():
        _check_model(known, checkpoints[name])
        models[name] = known.model_copy(update={"digest": checkpoints[name].digest})
    layout = _layout(checkpoints, USUAL_HEADS if recipe.heads is None else recipe.heads)
    recipe = recipe.model_copy(update={"models": models})
    MergeEngine(checkpoints, layout).check(recipe)
    return Opened(recipe, checkpoints, layout, load_measurements(recipe, checkpoints, layout, places.roots))


def write_model(
    opened: Opened,
    out: Path,
    *,
    title: str,
    head: str | None = None,
    tokenizer_from: str | None = None,
    adapter_rank: int | None = None,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
    scores: Mapping[str, Score] | None = None,
    test_scores: Mapping[str, Score] | None = None,
    overfitted: Sequence[str] = (),
    spec: JobSpec | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> AdapterReport | None:
    """Write the model that a recipe describes; the same recipe and models give the same files, bit for bit.

    Args:
        opened: from `open_recipe`.
        out, title, head, tokenizer_from, overwrite, max_shard_bytes, scores, test_scores, overfitted, spec, progress: see
            `export_checkpoint`.
        adapter_rank: write a LoRA adapter of this rank to the base instead of a whole model.

    Returns:
        What an adapter lost; None for a whole model.

    Raises:
        InvalidInput, Conflict, InfeasibleCandidate, MergeoptError: see `export_checkpoint` and `export_adapter`; nothing
            is left behind.
    """
    common: dict[str, Any] = {
        "head": head,
        "title": title,
        "scores": scores or {},
        "test_scores": test_scores,
        "overfitted": overfitted,
        "spec": spec,
        "progress": progress,
        "overwrite": overwrite,
        "measurements": opened.measurements,
        "cache": opened.cache,
    }
    models = (opened.recipe, opened.checkpoints, opened.layout, out)
    if adapter_rank is None:
        export_checkpoint(*models, tokenizer_from=tokenizer_from, max_shard_bytes=max_shard_bytes, **common)
        return None
    if vocabulary_of(opened.checkpoints["base"]) is not None or tokenizer_from is not None:
        raise InvalidInput(
            "an adapter has its base's vocabulary and tokenizer",
            field="as_adapter",
            remedy="write the whole model, or leave out --tokenizer-from",
        )
    return export_adapter(*models, rank=adapter_rank, **common)


def import_recipe(configuration: Configuration, places: Places) -> Imported:
    """Return the recipe that gives what mergekit gives for a configuration, over the models that it names.

    Raises:
        InvalidCheckpoint: a model is missing, or they do not fit together.
        InvalidInput: the file says what has no counterpart here; with its YAML path.
    """
    names = model_names(configuration)
    base = base_reference(configuration)
    refs = {name: model_ref(reference, places.roots.holds) for reference, name in names.items()}
    refs = {"base": refs[names[base]], **refs}
    checkpoints = align(_open(refs, places), vocabulary_rule(configuration))
    layout = _layout(checkpoints, [])
    models = {
        name: ModelId(ref=refs[name], digest=found.digest, vocabulary=vocabulary_of(found))
        for name, found in checkpoints.items()
    }
    imported = to_recipe(configuration, models, layout, canonical_names(checkpoints["base"]))
    recipe = imported.recipe.model_copy(update={"heads": []})
    MergeEngine(checkpoints, layout).check(recipe)
    return Imported(recipe, imported.notes)


def _open(refs: Mapping[str, ModelRef], places: Places) -> dict[str, Checkpoint]:
    base = open_checkpoint(places.find("base", refs["base"]), "base", "models.base")
    others = {
        name: open_checkpoint(places.find(name, ref), name, f"models.{name}", base)
        for name, ref in refs.items()
        if name != "base"
    }
    return {"base": base, **others}


def _check_model(known: ModelId, found: Checkpoint) -> None:
    if known.digest not in (found.digest, UNKNOWN_DIGEST):
        raise InvalidCheckpoint(
            f"{found.source} is not the model {found.name!r} that the recipe was made for: its digest is "
            f"{found.digest[:12]}…, not {known.digest[:12]}…",
            field=f"models.{found.name}",
            remedy=f"find the right one; --model {found.name}=DIRECTORY says where it is",
        )
    if known.vocabulary is not None and known.vocabulary != vocabulary_of(found):
        raise InvalidCheckpoint(
            f"the tokenizer in {found.source} is not the one that {found.name!r} had when the recipe was made",
            field=f"models.{found.name}",
            remedy="restore the tokenizer's files",
        )


def _layout(checkpoints: Mapping[str, Checkpoint], heads: list[str]) -> Layout:
    base, *experts = checkpoints.values()
    layout, findings = inspect(base, experts, heads)
    raise_on_errors(findings)
    return layout


def number_of_layers(configuration: Configuration, places: Places) -> int | None:
    """Return how many layers the models of a configuration have; None where its base cannot be read here."""
    try:
        ref = model_ref(base_reference(configuration), places.roots.holds)
        if ref.hub is not None and "base" not in places.given:
            return None  # nothing is downloaded for the sake of a default
        found = read_json(places.find("base", ref) / "config.json").get("num_hidden_layers")
    except InvalidInput:
        return None
    return found if isinstance(found, int) else None
