"""Recipes: one merged model described completely as data.

A recipe is a small expression. Its leaves are models; its nodes are operators with a table of coefficients (one row
for each group of parameters, one column for each input). A layer plan may say what stands at which depth. The same
recipe gives the same weights on any machine, and its fingerprint is the SHA-256 of its canonical JSON, in which models
stand by the digest of their content, so that neither where they are stored nor what a user calls them matters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from optimizer.errors import from_validation
from optimizer.geometry import ModuleKind, Position, TensorInfo
from optimizer.spec import Calibration, ModelRef, Scalar, Strict

UNKNOWN_DIGEST = "0" * 64
"""Stands for a digest that was not computed, where a spec is only checked and nothing is stored."""


class JoinedVocabulary(Strict):
    """By which rule the vocabularies of several models were brought to one (`workers.alignment`)."""

    rule: Literal["base", "union"] = Field(description="`merge.vocabulary` of the job.")
    order: list[str] = Field(min_length=1, description="Names of the models in the order in which tokens get numbers.")
    digest: str = Field(
        pattern=r"^[0-9a-f]{64}$", description="SHA-256 over the tokens and this model's rows for them."
    )


class ModelId(Strict):
    """A model a recipe is made from."""

    ref: ModelRef = Field(description="Where it was found.")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 over its weights, whatever their storage.")
    vocabulary: JoinedVocabulary | None = Field(
        default=None, description="Which tokens the rows of its embeddings stand for, where not for its own in order."
    )


class Selector(Strict):
    """A group of parameters: at one of the positions, of one of the kinds, under one of the names; None means any."""

    positions: list[Position] | None = None
    modules: list[ModuleKind] | None = None
    tensors: list[str] | None = Field(default=None, description="Canonical names; `*` matches anything.")

    def matches(self, tensor: TensorInfo) -> bool:
        """Whether the group contains ``tensor``."""
        return (
            (self.positions is None or tensor.position in self.positions)
            and (self.modules is None or tensor.kind in self.modules)
            and (self.tensors is None or any(fnmatchcase(tensor.name, pattern) for pattern in self.tensors))
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
        if self.tensors is not None:
            parts.append(" + ".join(self.tensors))
        return " · ".join(parts) or "all"


class Leaf(Strict):
    """A model as it is."""

    model: str = Field(description="Name of one of the recipe's models.")
    layer: int | None = Field(
        default=None,
        ge=0,
        description="The model's layer to take in place of the one that is being made; nothing outside the layers.",
    )
    values: dict[str, Scalar] | None = Field(
        default=None,
        description="What a model behind services is set to, in jobs without checkpoints: parameters and their values.",
    )


class Merge(Strict):
    """An operator applied to its inputs.

    The table of coefficients has a row for each group of parameters (``groups``; the first one that contains a
    parameter decides, and those in none are the base's, unchanged), or for each range of the flat vector of all shared
    parameters, see `Layout.flat` (``breaks``: row k holds from ``breaks[k-1]`` up to, not including, ``breaks[k]``).
    """

    operator: str
    options: dict[str, Scalar] = Field(default_factory=dict)
    base: Leaf | Merge = Field(description="What task vectors are relative to.")
    inputs: list[Leaf | Merge] = Field(min_length=1)
    groups: list[Selector] | None = Field(default=None, min_length=1)
    breaks: list[int] | None = Field(
        default=None,
        description="Ascending positions, from 1, in the flat vector of all shared parameters in order of depth.",
    )
    coefficients: list[list[float]] = Field(description="One row for each group or range, one column a coefficient.")
    tables: dict[str, list[list[float]]] | None = Field(
        default=None,
        description="Options that differ: by name a table with the coefficients' rows and one column, or one an input.",
    )

    @model_validator(mode="after")
    def _rectangular(self) -> Merge:
        if (self.groups is None) == (self.breaks is None):
            raise ValueError("give exactly one of `groups` and `breaks`")
        rows = len(self.groups) if self.groups is not None else len(self.breaks or []) + 1
        if len(self.coefficients) != rows or len({len(row) for row in self.coefficients}) != 1:
            raise ValueError(f"coefficients: {rows} rows of equal length are needed, one for each group or range")
        for name, table in (self.tables or {}).items():
            if len(table) != rows or {len(row) for row in table} not in ({1}, {len(self.inputs)}):
                raise ValueError(f"tables.{name}: {rows} rows of 1 or {len(self.inputs)} numbers are needed")
            if name in self.options:
                raise ValueError(f"tables.{name}: the option stands under `options` as well")
        if self.breaks is not None and self.breaks != sorted(set(self.breaks)):
            raise ValueError("breaks: positions must ascend, without repetition")
        if self.breaks and self.breaks[0] < 1:
            raise ValueError("breaks: the first position is at least 1")
        return self

    def row(self, tensor: TensorInfo) -> int | None:
        """Return the number of the first group that contains ``tensor``, or None; for tables of groups."""
        return next((number for number, group in enumerate(self.groups or []) if group.matches(tensor)), None)


class PlannedLayer(Strict):
    """What stands at one depth of a model whose layers are rearranged.

    The node is applied to layer ``layer`` of the models, wherever the result stands: its groups and breaks, and
    operators that look at the depth, mean the position in the models. What the config says of single layers (kinds of
    attention) moves along.
    """

    layer: int = Field(ge=0, description="Layer of the recipe's models that it is made from.")
    node: Leaf | Merge | None = Field(default=None, description="What it is made of; the recipe's root by default.")
    scale: float = Field(
        default=1.0,
        description=(
            "Factor of what each sub-layer (attention, MLP) adds to the residual stream; 0 makes it the identity, "
            "except in models that normalise after the addition."
        ),
    )


class CalibrationId(Strict):
    """Data that an operator measured a model on."""

    spec: Calibration
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 over the items.")


class Recipe(Strict):
    """One merged model."""

    format: Literal[1] = 1
    models: dict[str, ModelId] = Field(description="The base (under the name `base`) and the experts.")
    root: Leaf | Merge
    layers: list[PlannedLayer] | None = Field(
        default=None, min_length=1, description="The layers from first to last; those of the base by default."
    )
    heads: list[str] | None = Field(
        default=None,
        description=(
            "Patterns of parameters that are not merged but stay each model's own, where not those that are usual "
            "(`merge.heads`); the same for all recipes of a job, and no part of the fingerprint."
        ),
    )
    calibration: dict[str, CalibrationId] | None = Field(
        default=None, description="By model, the data that operators such as Fisher merging measured it on."
    )

    @model_validator(mode="after")
    def _known_models(self) -> Recipe:
        unknown = sorted(self.used - set(self.models))
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
    def values(self) -> dict[str, Scalar]:
        """The parameters' values in a job without checkpoints; empty for what is merged."""
        return (self.root.values or {}) if isinstance(self.root, Leaf) else {}

    @property
    def used(self) -> set[str]:
        """Names of the models that the recipe is made from."""
        nodes = [self.root, *(planned.node for planned in self.layers or [] if planned.node is not None)]
        return set().union(*(leaves(node) for node in nodes))

    @property
    def identities(self) -> dict[str, str]:
        """What each model's tensors are known by: its digest, with that of its rows where vocabularies were joined."""
        return {name: self._identity(model) for name, model in self.models.items()}

    def _identity(self, model: ModelId) -> str:
        if model.vocabulary is None or model.digest == UNKNOWN_DIGEST:
            return model.digest
        # Rows that a model lacks come from the others, so their content counts.
        others = [self.models[name].digest for name in model.vocabulary.order if name in self.models]
        text = canonical_json([model.digest, model.vocabulary.digest, others])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, as 64 hexadecimal digits.

        Recipes that differ may give the same weights: a plan that leaves all layers as they are has another fingerprint
        than none.
        """
        digests = self.identities
        data = canonical(self.root, digests)
        if self.layers is not None or self.calibration is not None:
            planned = [
                [entry.layer, entry.scale, canonical(entry.node or self.root, digests)] for entry in self.layers or []
            ]
            # A model's data matters only where an operator measures it, but the recipe does not know which ones do.
            data = {"root": data, "layers": planned, "calibration": self._calibration(digests)}
        return hashlib.sha256(canonical_json(data).encode()).hexdigest()

    def _calibration(self, digests: dict[str, str]) -> dict[str, Any]:
        return {
            digests[name]: [
                found.digest,
                found.spec.data.columns,
                found.spec.evaluator,
                found.spec.options,
                digests.get(found.spec.head or name),
            ]
            for name, found in (self.calibration or {}).items()
        }


def leaves(node: Leaf | Merge) -> set[str]:
    """Return the names of all models below ``node``."""
    if isinstance(node, Leaf):
        return {node.model}
    return leaves(node.base).union(*(leaves(child) for child in node.inputs))


def canonical_json(data: Any) -> str:
    """Return the one JSON text of ``data``: keys sorted, no spaces, -0.0 as 0.0, NaN refused (``ValueError``)."""
    return json.dumps(_positive_zero(data), sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(node: Leaf | Merge, digests: Mapping[str, str]) -> Any:
    """Return what a node means as plain data, with models standing by the digest of their content."""
    if isinstance(node, Leaf):
        if node.values is not None:
            return {"model": digests[node.model], "values": node.values}
        return digests[node.model] if node.layer is None else [digests[node.model], node.layer]
    data = {
        "operator": node.operator,
        "options": node.options,
        "base": canonical(node.base, digests),
        "inputs": [canonical(child, digests) for child in node.inputs],
        "coefficients": node.coefficients,
    }
    if node.groups is not None:
        data["groups"] = [group.model_dump(mode="json", exclude_none=True) for group in node.groups]
    if node.breaks is not None:
        data["breaks"] = node.breaks
    if node.tables:
        data["tables"] = node.tables
    return data


def _positive_zero(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _positive_zero(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_positive_zero(value) for value in data]
    return data + 0.0 if isinstance(data, float) else data


Merge.model_rebuild()
PlannedLayer.model_rebuild()
Recipe.model_rebuild()
