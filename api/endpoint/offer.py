"""What the owner of some models offers through an endpoint: one file, YAML or JSON, and nothing that is not in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from api.endpoint.limits import Limits
from optimizer.errors import InvalidCheckpoint, InvalidInput, from_validation
from optimizer.spec import USUAL_HEADS, DataSpec, Expert, ModelRef, Name, Strict, Workers
from workers.checkpoints import ADAPTER_CONFIG
from workers.endpoint.protocol import Detail
from workers.roots import Roots

UPLOADABLE = ["text_classification", "multiple_choice", "causal_lm"]
"""Evaluators whose items are plain text, so that they can be sent as JSON."""


class OwnSet(Strict):
    """A named set of items that clients may evaluate on without seeing them."""

    name: Name = Field(description="How clients call it.", examples=["language"])
    evaluator: str = Field(description="Kind of measure.", examples=["text_classification"])
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the evaluator.")
    data: DataSpec | None = Field(default=None, description="The items, unless the evaluator brings its own.")
    head: str | None = Field(default=None, description="Name of the expert whose head is used.")


class UploadRules(Strict):
    """Which query sets clients may upload."""

    evaluators: list[str] = Field(
        default=UPLOADABLE, min_length=1, description="Kinds of measures; their items must be plain text and numbers."
    )
    min_items: int = Field(
        default=32,
        ge=1,
        description="Fewest items: scores on single items of their choice tell clients most of a model.",
    )
    max_items: int = Field(default=10_000, ge=1, le=1_000_000, description="Most items of a set.")
    sets: int = Field(default=8, ge=1, le=1000, description="Most sets in a session.")

    @model_validator(mode="after")
    def _ordered(self) -> UploadRules:
        if self.min_items > self.max_items:
            raise ValueError("min_items: it must not be above `max_items`")
        return self


class Offer(Strict):
    """What is offered, to whom it concerns and within which limits; the defaults give away little."""

    name: str = Field(default="mergeopt endpoint", min_length=1, max_length=200, description="Shown to clients.")
    base: ModelRef = Field(description="The common ancestor of the experts.")
    models: list[str] = Field(
        default_factory=list,
        max_length=1000,
        description="Directories of experts: checkpoints or LoRA adapters, or directories full of them.",
    )
    experts: list[Expert] = Field(
        default_factory=list, max_length=1000, description="Experts by name, beside those in `models`."
    )
    heads: list[str] = Field(
        default=USUAL_HEADS, max_length=64, description="Patterns of parameters that stay each expert's own."
    )
    operators: list[str] | None = Field(
        default=None, min_length=1, description="Operators that recipes may use; all that need only weights by default."
    )
    detail: Detail = Field(
        default="tensors",
        description="`layers` tells clients the number of layers and kinds of modules, but no parameters.",
    )
    max_share: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="Largest share of the coefficients that one expert may have in a candidate; 1 lets it stand alone.",
    )
    plans: bool = Field(default=False, description="Whether recipes may rearrange layers.")
    grams: bool = Field(default=False, description="Whether inner products of the models' weights are given out.")
    sets: list[OwnSet] = Field(default_factory=list, max_length=1000, description="Named sets of the owner's.")
    uploads: UploadRules | None = Field(
        default_factory=UploadRules, description="Which query sets clients may upload; null for none."
    )
    scores: Literal["items", "aggregate"] = Field(
        default="aggregate", description="Whether clients get a score for each item, or their mean only."
    )
    decimals: int | None = Field(
        default=4, ge=0, le=12, description="Scores are rounded to so many decimals; null gives them as they are."
    )
    min_items: int = Field(default=32, ge=1, description="Fewest items that an evaluation on a part of a set may have.")
    limits: Limits = Field(default_factory=Limits, description="What each token may do.")
    workers: Workers = Field(
        default_factory=Workers, description="`count` merged models in memory, on which device and in which type."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Offer:
        names = [own.name for own in self.sets]
        if len(names) != len(set(names)):
            raise ValueError("sets: the names must be unique")
        if not self.models and not self.experts:
            raise ValueError("models: there is nothing to merge; name directories of checkpoints or adapters")
        if not self.sets and self.uploads is None:
            raise ValueError("sets: without uploads there must be a set to evaluate on")
        return self


def parse_offer(data: object) -> Offer:
    """Validate plain data; raises `InvalidInput` that names the field."""
    try:
        return Offer.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from error


def all_experts(offer: Offer, roots: Roots) -> list[Expert]:
    """Return the experts by name: those listed, and every checkpoint and adapter in the directories of ``models``.

    Raises:
        InvalidCheckpoint: there is none in a directory.
        InvalidInput: a name is no good, or stands for two.
        PathNotAllowed: a directory is outside the roots.
    """
    out = list(offer.experts)
    for number, text in enumerate(offer.models):
        field = f"models.{number}"
        out += list(_inside(text, roots.path(text, field), field))
    doubled = sorted({expert.name for expert in out if [other.name for other in out].count(expert.name) > 1})
    if doubled or any(expert.name == "base" for expert in out):
        raise InvalidInput(
            f"the name {(doubled or ['base'])[0]!r} stands for more than one model",
            field="models",
            remedy="rename the directory, or list it among the `experts` under another name",
        )
    return out


def _inside(text: str, directory: Path, field: str) -> Iterator[Expert]:
    found = _models_in(directory)
    if not found:
        raise InvalidCheckpoint(
            f"{text!r} holds neither a checkpoint nor an adapter, nor directories that do",
            field=field,
            remedy="name the directory that save_pretrained wrote, or one that holds several such",
        )
    for path in found:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", path.name)[:64]
        if not name[:1].isalnum():
            raise InvalidInput(f"{path.name!r} is no name for an expert", field=field, remedy="rename the directory")
        yield Expert(name=name, path=str(path))


def _models_in(directory: Path) -> Sequence[Path]:
    if _is_model(directory):
        return [directory]
    return (
        sorted(path for path in directory.iterdir() if path.is_dir() and _is_model(path)) if directory.is_dir() else []
    )


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file()
