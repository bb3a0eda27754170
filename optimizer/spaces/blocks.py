"""Depth-wise integration: at every depth any of the models' blocks behind each other, in any order, and an output scale.

The papers' code has a bit for each block and a choice among all orders. Here each block has a number: it is taken above
one half, and the larger it is, the earlier it comes. Of more blocks than are allowed the smallest are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil

import numpy as np
from pydantic import Field

from optimizer.errors import InvalidInput
from optimizer.plans import additions, scaled
from optimizer.problem import Problem
from optimizer.recipe import Leaf, PlannedLayer, Recipe
from optimizer.space import Genome, JobSpace, Variable, search_space
from optimizer.spec import Bounds, JobSpec, Scalar, Strict
from optimizer.structured import (
    LARGEST_ADDITION,
    Ends,
    Outside,
    check_models,
    check_scales,
    count_layers,
    experts_of,
    hidden_scales,
    layers_of,
    models_option,
    outside_option,
    planned,
    read,
    refuse_ignored,
    same,
    scales_option,
    weights_of,
)

_TAKEN = 0.5


class BlocksOptions(Strict):
    """Options of `blocks`."""

    models: list[str] | None = models_option("the experts")
    most_layers: int | None = Field(
        default=None,
        ge=1,
        description="Layers of the deepest allowed model, no fewer than the models have; by default a quarter more.",
    )
    fixed_layers: int = Field(
        default=0, ge=0, le=512, description="So many layers at either end are the first model's, whatever is searched."
    )
    ordered: bool = Field(
        default=True,
        description="Let the search order the blocks of a depth; otherwise they come as `models` lists them.",
    )
    output_scales: bool = Field(default=True, description="Scale the hidden state behind the blocks of each depth.")
    scales: Bounds = scales_option()
    outside: Outside = outside_option("choice")


@dataclass(frozen=True)
class BlocksSpace(JobSpace):
    """For each layer that is not fixed a number for each model and an output scale, then what is in no layer.

    Attributes:
        models: whose blocks may stand at a depth; where none is taken it is the base's.
        most_layers: of the result.
        fixed: layers at either end that are the first model's.
        ordered, output_scales: the options.
        ends: what is in no layer.
    """

    models: tuple[str, ...] = ()
    most_layers: int = 1
    fixed: int = 0
    ordered: bool = True
    output_scales: bool = True
    ends: Ends = field(default_factory=lambda: Ends("base", (), ()))

    @property
    def layers(self) -> int:
        """Number of layers of the models."""
        return self.problem.layout.layers

    @property
    def free(self) -> range:
        """The layers that are not fixed."""
        return range(self.fixed, self.layers - self.fixed)

    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome: the plan of all blocks that are taken."""
        values = read(self, genome)
        rows = self._rows(values)
        left_out = self._left_out(rows)
        plan: list[PlannedLayer] = []
        scales: list[float] = []
        for layer in range(self.layers):
            row = rows[layer - self.fixed] if layer in self.free else None
            names = self._blocks(row, layer, left_out) if row is not None else [self.models[0]]
            plan += [PlannedLayer(layer=layer, node=Leaf(model=name)) for name in names]
            scales += [1.0] * (len(names) - 1)
            scales.append(float(row[-1]) if row is not None and self.output_scales else 1.0)
        if self.output_scales:
            plan = scaled(plan, additions(scales, "output", LARGEST_ADDITION))
        outside = values[len(values) - len(self.ends.variables) :]
        return planned(self.problem, self.ends.root(outside), plan)

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: models alone, and its own recipes."""
        plan = layers_of(recipe, self.problem)
        outside = weights_of(recipe.root, self.ends.parts)
        numbers = self.ends.numbers(outside) if outside is not None else None
        scales = hidden_scales(plan, "output")
        if numbers is None or scales is None:
            return None
        blocks: dict[int, list[str]] = {}
        behind: dict[int, float] = {}
        for layer, run in groupby(zip(plan, scales, strict=True), key=lambda pair: pair[0].layer):
            for entry, scale in run:
                if not isinstance(entry.node, Leaf):
                    return None
                blocks.setdefault(layer, []).append(entry.node.model)
                behind[layer] = scale
        genome = self._genome(blocks, numbers)
        width = len(self.models) + self.output_scales
        for number, layer in enumerate(self.free):
            if self.output_scales:
                genome[number * width + width - 1] = behind.get(layer, 1.0)
        return genome if same(self.recipe(genome), recipe) else None

    def uniform(self) -> Genome:
        """See `JobSpace.uniform`: the models' blocks in turn, one at each depth."""
        turns = {layer: [self.models[layer % len(self.models)]] for layer in range(self.layers)}
        return self._genome(turns, self.ends.middle)

    def _rows(self, values: Sequence[Scalar]) -> list[list[float]]:
        width = len(self.models) + self.output_scales
        numbers = [float(value) for value in values[: len(self.free) * width]]
        return [numbers[begin : begin + width] for begin in range(0, len(numbers), width)]

    def _left_out(self, rows: Sequence[Sequence[float]]) -> set[tuple[int, int]]:
        """Layer and model of the blocks that would be too many: the smallest, but one at each depth."""
        spare: list[tuple[float, int, int]] = []
        depth = self.layers
        for layer, row in zip(self.free, rows, strict=True):
            taken = sorted((-row[number], number) for number in self._taken(row))
            depth += max(0, len(taken) - 1)
            spare += [(-value, layer, number) for value, number in taken[1:]]
        return {(layer, number) for _, layer, number in sorted(spare)[: max(0, depth - self.most_layers)]}

    def _taken(self, row: Sequence[float]) -> list[int]:
        return [number for number in range(len(self.models)) if row[number] > _TAKEN]

    def _blocks(self, row: Sequence[float], layer: int, left_out: set[tuple[int, int]]) -> list[str]:
        taken = [number for number in self._taken(row) if (layer, number) not in left_out]
        if self.ordered:
            taken.sort(key=lambda number: -row[number])
        return [self.models[number] for number in taken] or ["base"]

    def _genome(self, blocks: dict[int, list[str]], outside: Sequence[float]) -> Genome:
        rows = []
        for layer in self.free:
            names = blocks.get(layer, [])
            keys = {name: 1.0 - 0.4 * place / max(1, len(names)) for place, name in enumerate(names)}
            rows.append([*(keys.get(name, 0.0) for name in self.models), *([1.0] * self.output_scales)])
        return np.array([*(number for row in rows for number in row), *outside], dtype=np.float64)


@search_space(
    "blocks",
    summary="At every depth the blocks of any of the models behind each other, in any order, with an output scale.",
    reference="Su and Geiping 2025, Fine, I'll Merge It Myself (depth-wise integration), arXiv 2502.04030",
    options=BlocksOptions,
)
def make(spec: JobSpec, problem: Problem, options: BlocksOptions) -> BlocksSpace:
    """Make the space; see `optimizer.space.search_space`."""
    layers = count_layers(problem, "blocks")
    refuse_ignored(spec, "blocks", ("operator", "options", "modifiers", "granularity", "bounds", "frozen"))
    models = check_models(options.models, problem, experts_of(problem))
    most = options.most_layers or ceil(1.25 * layers)
    if most < layers or 2 * options.fixed_layers >= layers:
        name = "most_layers" if most < layers else "fixed_layers"
        raise InvalidInput(
            f"the models have {layers} layers",
            field=f"merge.space.options.{name}",
            remedy=f"use at least {layers}" if most < layers else f"use less than {layers / 2:g}",
        )
    ends = Ends.of(options.outside, models, problem)
    bounds = check_scales(options.scales)
    variables: list[Variable] = []
    for layer in range(options.fixed_layers, layers - options.fixed_layers):
        variables += [Variable(f"{name} {layer}", 0.0, 1.0) for name in models]
        if options.output_scales:
            variables.append(Variable(f"scale behind layer {layer}", bounds.low, bounds.high))
    variables += ends.variables
    return BlocksSpace(
        tuple(variables), problem, models, most, options.fixed_layers, options.ordered, options.output_scales, ends
    )
