"""The space of Evo-Merging: how much of each expert is kept, and with which coefficient it enters the merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout
from optimizer.problem import OperatorInfo, Problem
from optimizer.recipe import Merge, Recipe, Selector
from optimizer.space import Genome, MergeSpace, SearchSpace, make_merge_space
from optimizer.spec import Bounds, Granularity, JobSpec, MergeSpec, RangeVariable

Indices = NDArray[np.int64]

DENSITY = "density"
BOUND = 1.5
_LEAST = 1e-3  # where an operator refuses a density of 0


@dataclass(frozen=True)
class EvoSpace(MergeSpace):
    """A `MergeSpace` in which points that nothing says a density of keep everything."""

    @cached_property
    def scales(self) -> Indices:
        """Indices of the coefficients."""
        rows, cols = self.table
        return np.arange(rows * cols)

    @cached_property
    def kept(self) -> Indices:
        """Indices of the densities; none where the job fixed them."""
        begin = self.scales.size
        for varied in self.varied:
            count = varied.rows * varied.cols
            if varied.modifier is None and varied.name == DENSITY:
                return np.arange(begin, begin + count)
            begin += count
        return np.arange(0)

    def point(self, coefficients: dict[str, float | list[float]]) -> Genome:
        """See `MergeSpace.point`; the densities are the largest."""
        genome = super().point(coefficients)
        genome[self.kept] = self.high[self.kept]
        return genome

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: also merges over other groups that all have the same coefficients and densities."""
        found = super().adopt(recipe)
        node = recipe.root
        if found is not None or recipe.layers is not None or self.modifiers or not isinstance(node, Merge):
            return found
        if node.operator != self.problem.operator.name:
            return None
        spread = self._spread(node)
        return None if spread is None else super().adopt(recipe.model_copy(update={"root": spread}))

    def _spread(self, node: Merge) -> Merge | None:
        """``node`` over this space's groups and with its densities where they stand here; None where its rows differ."""
        tables, options = dict(node.tables or {}), dict(node.options)
        rows, cols = len(self.groups), len(node.inputs)
        if DENSITY not in tables:
            options.setdefault(DENSITY, _schema(self.problem.operator).get("default", 1.0))
            if self.kept.size:
                tables[DENSITY] = [[float(options.pop(DENSITY))] * cols]
        constant = all(row == table[0] for table in (node.coefficients, *tables.values()) for row in table)
        layout = self.problem.layout
        if node.groups is None or not constant or covered(node.groups, layout) != covered(self.groups, layout):
            return None
        return node.model_copy(
            update={
                "groups": list(self.groups),
                "coefficients": [node.coefficients[0]] * rows,
                "options": dict(sorted(options.items())),
                "tables": {name: [table[0]] * rows for name, table in tables.items()} or None,
            }
        )


def make_evo_space(spec: JobSpec, problem: Problem, *, densities: bool) -> EvoSpace:
    """Make the space that a job searches with Evo-Merging.

    The operator's ``density`` becomes a variable of each expert from 0 to 1, and coefficients are bounded by ±1.5,
    unless the job says otherwise. The whole model is one group, unless the job asks for a granularity other than the
    default (``groups`` of one layer are layers by themselves).

    Args:
        densities: whether densities are searched; otherwise everything is kept, or what the job fixed.

    Raises:
        InvalidInput: the operator has no coefficient and density of each expert, the job asks for a space of another
            form, or it fixed the densities that are to be searched.
    """
    merge = spec.merge
    _check(merge, problem.operator, densities)
    options = dict(merge.options)
    if DENSITY not in options:
        low = _lowest(problem.operator)
        options[DENSITY] = RangeVariable(low=low, high=1.0, per_expert=True) if densities else 1.0
    changes: dict[str, Any] = {"options": options, "bounds": merge.bounds or Bounds(low=-BOUND, high=BOUND)}
    if merge.granularity == Granularity():
        changes["granularity"] = Granularity(layers="whole")
    made = make_merge_space(spec.model_copy(update={"merge": merge.model_copy(update=changes)}), problem)
    return EvoSpace(**{field.name: getattr(made, field.name) for field in fields(MergeSpace)})


def split(space: SearchSpace) -> tuple[Indices, Indices, Indices]:
    """Return the indices of the variables of stage 1, of stage 2, and of the coefficients among the latter.

    In a box that stands for nothing the first half are densities and the others coefficients.
    """
    if isinstance(space, EvoSpace):
        rest = np.setdiff1d(np.arange(space.dim), space.kept)
        return space.kept, rest, space.scales
    half = space.dim // 2
    return np.arange(half), np.arange(half, space.dim), np.arange(half, space.dim)


def _check(merge: MergeSpec, operator: OperatorInfo, densities: bool) -> None:
    if merge.space is not None:
        raise InvalidInput(
            "Evo-Merging searches densities and coefficients of experts",
            field="merge.space",
            remedy="leave it out, or choose another algorithm",
        )
    if operator.columns != "per_expert" or DENSITY not in operator.varies:
        raise InvalidInput(
            f"{operator.name} has no coefficient and density of its own for each expert",
            field="merge.operator",
            remedy="use lora_factors for LoRA adapters, as published, or prune for any models",
        )
    if densities and not isinstance(merge.options.get(DENSITY, RangeVariable(low=0, high=1)), RangeVariable):
        raise InvalidInput(
            "the density is fixed, and the first stage would search it",
            field=f"merge.options.{DENSITY}",
            remedy="leave it out, or set the algorithm's option `denoise` to false",
        )


def _lowest(operator: OperatorInfo) -> float:
    schema = _schema(operator)
    return _LEAST if "exclusiveMinimum" in schema else float(schema.get("minimum", 0.0))


def _schema(operator: OperatorInfo) -> dict[str, Any]:
    found: dict[str, Any] = operator.options_schema.get("properties", {}).get(DENSITY, {})
    return found


def covered(groups: Sequence[Selector], layout: Layout) -> set[str]:
    """Return the names of the shared parameters that stand in one of the groups."""
    return {tensor.name for tensor in layout.shared if any(group.matches(tensor) for group in groups)}
