"""Recipes: one merged model described completely as data.

A recipe is a small expression. Its leaves are models; its nodes are operators with a table of coefficients (one row
for each group of parameters, one column for each input). The same recipe gives the same weights on any machine, and
its fingerprint is the SHA-256 of its canonical JSON, in which models stand by the digest of their content, so that
neither where they are stored nor what a user calls them matters.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from optimizer.errors import from_validation
from optimizer.geometry import ModuleKind, Position, TensorInfo
from optimizer.spec import ModelRef, Scalar, Strict

UNKNOWN_DIGEST = "0" * 64
"""Stands for a digest that was not computed, where a spec is only checked and nothing is stored."""


class ModelId(Strict):
    """A model a recipe is made from."""

    ref: ModelRef = Field(description="Where it was found.")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 over its weights, whatever their storage.")


class Selector(Strict):
    """A group of parameters: those at one of the positions and of one of the kinds; None means any."""

    positions: list[Position] | None = None
    modules: list[ModuleKind] | None = None

    def matches(self, tensor: TensorInfo) -> bool:
        """Whether the group contains ``tensor``."""
        return (self.positions is None or tensor.position in self.positions) and (
            self.modules is None or tensor.kind in self.modules
        )

    @property
    def label(self) -> str:
        """A short name for axes and tables, e.g. ``"layer 3 · mlp"``."""
        parts = []
        if self.positions is not None:
            numbers = [position for position in self.positions if isinstance(position, int)]
            words: list[str] = [position for position in self.positions if not isinstance(position, int)]
            if numbers:
                words.append(f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]}-{numbers[-1]}")
            parts.append(" + ".join(words))
        if self.modules is not None:
            parts.append(" + ".join(self.modules))
        return " · ".join(parts) or "all"


class Leaf(Strict):
    """A model as it is."""

    model: str = Field(description="Name of one of the recipe's models.")


class Merge(Strict):
    """An operator applied to its inputs.

    Parameters that no group selects are the base's, unchanged.
    """

    operator: str
    options: dict[str, Scalar] = Field(default_factory=dict)
    base: Leaf | Merge = Field(description="What task vectors are relative to.")
    inputs: list[Leaf | Merge] = Field(min_length=1)
    groups: list[Selector] = Field(min_length=1)
    coefficients: list[list[float]] = Field(description="One row for each group, one column for each coefficient.")

    @model_validator(mode="after")
    def _rectangular(self) -> Merge:
        widths = {len(row) for row in self.coefficients}
        if len(self.coefficients) != len(self.groups) or len(widths) != 1:
            raise ValueError(f"coefficients: {len(self.groups)} rows of equal length are needed, one for each group")
        return self

    def row(self, tensor: TensorInfo) -> list[float] | None:
        """Return the coefficients of ``tensor`` (the first group that contains it decides), or None."""
        for selector, row in zip(self.groups, self.coefficients, strict=True):
            if selector.matches(tensor):
                return row
        return None


class Recipe(Strict):
    """One merged model."""

    format: Literal[1] = 1
    models: dict[str, ModelId] = Field(description="The base (under the name `base`) and the experts.")
    root: Leaf | Merge

    @model_validator(mode="after")
    def _known_models(self) -> Recipe:
        unknown = sorted(leaves(self.root) - set(self.models))
        if unknown:
            raise ValueError(f"root: names models that the recipe does not list: {', '.join(unknown)}")
        return self

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as stored and exchanged."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def parse(cls, data: object, field: str = "recipe") -> Recipe:
        """Validate plain data; raises `InvalidInput` that names the field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise from_validation(error, field) from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, as 64 hexadecimal digits."""
        digests = {name: model.digest for name, model in self.models.items()}
        return hashlib.sha256(canonical_json(_canonical(self.root, digests)).encode()).hexdigest()


def leaves(node: Leaf | Merge) -> set[str]:
    """Return the names of all models below ``node``."""
    if isinstance(node, Leaf):
        return {node.model}
    return leaves(node.base).union(*(leaves(child) for child in node.inputs))


def canonical_json(data: Any) -> str:
    """Return the one JSON text of ``data``: keys sorted, no spaces, -0.0 as 0.0, NaN refused (``ValueError``)."""
    return json.dumps(_positive_zero(data), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _canonical(node: Leaf | Merge, digests: dict[str, str]) -> Any:
    if isinstance(node, Leaf):
        return digests[node.model]
    return {
        "operator": node.operator,
        "options": node.options,
        "base": _canonical(node.base, digests),
        "inputs": [_canonical(child, digests) for child in node.inputs],
        "groups": [group.model_dump(mode="json") for group in node.groups],
        "coefficients": node.coefficients,
    }


def _positive_zero(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _positive_zero(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_positive_zero(value) for value in data]
    return data + 0.0 if isinstance(data, float) else data


Merge.model_rebuild()
Recipe.model_rebuild()
