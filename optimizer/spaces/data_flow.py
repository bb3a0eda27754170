"""A path through the layers of several models: the data-flow space of evolutionary model merging.

Paths are never too deep and never empty: of more chosen layers than are allowed those with the largest indicators stay,
and where none is chosen the one with the largest does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from typing import Literal

import numpy as np
from pydantic import Field

from optimizer.plans import additions, data_flow, scaled
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

Inputs = Literal["none", "models", "layers"]
_IN, _OUT = 0.5, -0.5


class DataFlowOptions(Strict):
    """Options of `data_flow`."""

    models: list[str] | None = models_option("the experts")
    repeats: int = Field(
        default=3, ge=1, le=10, description="How often the row of all layers of all models is passed through."
    )
    most_layers: int | None = Field(
        default=None,
        ge=1,
        description="Layers of the deepest allowed path; by default half as many again as a model has.",
    )
    inputs: Inputs = Field(
        default="models",
        description=(
            "What scales the hidden state that a layer takes in: nothing (`none`), a factor for each pair of `models` that "
            "the path goes from and to, or one for each pair of `layers`, as in the paper (the square of the number of all "
            "models' layers)."
        ),
    )
    scales: Bounds = scales_option()
    outside: Outside = outside_option("choice")


@dataclass(frozen=True)
class DataFlowSpace(JobSpace):
    """An indicator for each place in the repeated row of layers, then the input scales, then what is in no layer.

    Attributes:
        models: in the order of the row.
        repeats: how often the row is passed through.
        most_layers: of a path.
        inputs: the option.
        ends: what is in no layer.
    """

    models: tuple[str, ...] = ()
    repeats: int = 1
    most_layers: int = 1
    inputs: Inputs = "none"
    ends: Ends = field(default_factory=lambda: Ends("base", (), ()))

    @property
    def layers(self) -> int:
        """Number of layers of the models."""
        return self.problem.layout.layers

    @property
    def row(self) -> int:
        """Number of layers of all models."""
        return self.layers * len(self.models)

    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome: the plan of its path."""
        values = read(self, genome)
        places, outside = self.repeats * self.row, len(self.ends.variables)
        indicator = self._allowed([float(value) for value in values[:places]])
        plan = data_flow(self.models, self.layers, indicator)
        if self.inputs != "none":
            path = [place % self.row for place, value in enumerate(indicator) if value > 0]
            table = [float(value) for value in values[places : len(values) - outside]]
            scales = [1.0, *(table[self._pair(left, right)] for left, right in pairwise(path))]
            plan = scaled(plan, additions(scales, "input", LARGEST_ADDITION))
        return planned(self.problem, self.ends.root(self._outside(values)), plan)

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: models alone, and its own recipes."""
        plan = layers_of(recipe, self.problem)
        outside = weights_of(recipe.root, self.ends.parts)
        numbers = self.ends.numbers(outside) if outside is not None else None
        path = self._path(plan)
        scales = hidden_scales(plan, "input")
        if numbers is None or path is None or scales is None:
            return None
        genome = self._genome(path, numbers)
        for (left, right), scale in zip(pairwise(path), scales[1:], strict=True):
            if self.inputs != "none":
                genome[self.repeats * self.row + self._pair(left % self.row, right % self.row)] = scale
        return genome if same(self.recipe(genome), recipe) else None

    def uniform(self) -> Genome:
        """See `JobSpace.uniform`: the first model; a path has no average."""
        numbers = self.ends.numbers_of(self.models[0])
        return self._genome(range(self.layers), self.ends.middle if numbers is None else numbers)

    def _allowed(self, indicator: list[float]) -> list[float]:
        """The indicator of a path that is neither empty nor too deep."""
        order = sorted(range(len(indicator)), key=lambda place: -indicator[place])
        chosen = [place for place in order if indicator[place] > 0][: self.most_layers] or order[:1]
        out = [0.0] * len(indicator)
        for place in chosen:
            out[place] = 1.0
        return out

    def _pair(self, left: int, right: int) -> int:
        """The number of the scale of layer ``right``'s input behind ``left`` in the row."""
        if self.inputs == "layers":
            return left * self.row + right
        return left // self.layers * len(self.models) + right // self.layers

    def _outside(self, values: Sequence[Scalar]) -> Sequence[Scalar]:
        return values[len(values) - len(self.ends.variables) :]

    def _genome(self, path: Sequence[int], outside: Sequence[float]) -> Genome:
        genome = np.ones(self.dim)
        genome[: self.repeats * self.row] = _OUT
        genome[list(path)] = _IN
        genome[self.dim - len(outside) :] = outside
        return genome

    def _path(self, plan: Sequence[PlannedLayer]) -> list[int] | None:
        """The earliest places at which a plan's layers follow each other; None where there are none."""
        path: list[int] = []
        for entry in plan:
            if not isinstance(entry.node, Leaf) or entry.node.model not in self.models or entry.node.layer is not None:
                return None
            place = self.models.index(entry.node.model) * self.layers + entry.layer
            while path and place <= path[-1]:
                place += self.row
            if place >= self.repeats * self.row:
                return None
            path.append(place)
        return path


@search_space(
    "data_flow",
    summary="Any path through the layers of several models, also with repetitions, and the scales between them.",
    reference="Akiba et al. 2024, Evolutionary Optimization of Model Merging Recipes, arXiv 2403.13187",
    options=DataFlowOptions,
)
def make(spec: JobSpec, problem: Problem, options: DataFlowOptions) -> DataFlowSpace:
    """Make the space; see `optimizer.space.search_space`."""
    layers = count_layers(problem, "data_flow")
    refuse_ignored(spec, "data_flow", ("operator", "options", "modifiers", "granularity", "bounds", "frozen"))
    models = check_models(options.models, problem, experts_of(problem))
    row = [f"{name} {layer}" for name in models for layer in range(layers)]
    passes = [f" (pass {number + 1})" if options.repeats > 1 else "" for number in range(options.repeats)]
    ends = Ends.of(options.outside, models, problem)
    bounds = check_scales(options.scales)
    between = {"none": [], "models": list(models), "layers": row}[options.inputs]
    variables = (
        *(Variable(f"layer {name}{which}", -1.0, 1.0) for which in passes for name in row),
        *(Variable(f"scale from {left} to {right}", bounds.low, bounds.high) for left in between for right in between),
        *ends.variables,
    )
    most = options.most_layers or ceil(1.5 * layers)
    return DataFlowSpace(variables, problem, models, options.repeats, most, options.inputs, ends)
