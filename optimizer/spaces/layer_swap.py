"""One model's layers at the bottom, another's in the middle, another's at the top, with borders that the search moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np
from pydantic import Field

from optimizer.errors import InvalidInput
from optimizer.geometry import MODULE_KINDS, ModuleKind, Position
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.space import Genome, JobSpace, Variable, search_space
from optimizer.spec import JobSpec, Scalar, Strict
from optimizer.structured import (
    Ends,
    Outside,
    Weights,
    averaged,
    check_models,
    choice,
    count_layers,
    models_option,
    outside_option,
    read,
    refuse_ignored,
    same,
    weights_of,
)


class LayerSwapOptions(Strict):
    """Options of `layer_swap`."""

    models: list[str] | None = models_option("the base and all experts")
    borders: int = Field(
        default=2, ge=1, le=16, description="Places at which one model's layers end and another's begin."
    )
    blend: int = Field(
        default=0,
        ge=0,
        le=64,
        description=(
            "Layers on either side of a border over which one model passes into the next: the weights are a moving "
            "average over so many layers below and above."
        ),
    )
    outside: Outside = outside_option("choice")


@dataclass(frozen=True)
class LayerSwapSpace(JobSpace):
    """Borders, then the model of each segment from the bottom to the top, then what is in no layer.

    Attributes:
        models: the ones to choose from.
        borders: how many.
        blend: the option.
        ends: what is in no layer.
        kinds: the module kinds that are not frozen; None for all.
    """

    models: tuple[str, ...] = ()
    borders: int = 2
    blend: int = 0
    ends: Ends = field(default_factory=lambda: Ends("base", (), ()))
    kinds: tuple[ModuleKind, ...] | None = None

    @property
    def layers(self) -> int:
        """Number of layers of the models."""
        return self.problem.layout.layers

    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome: one average of the models with rows for the segments."""
        values = read(self, genome)
        segments = 2 * self.borders + 1
        rows: list[tuple[list[Position], Weights]] = []
        for position, weights in self._weights(values[:segments]):
            if rows and rows[-1][1] == weights:
                rows[-1][0].append(position)
            else:
                rows.append(([position], weights))
        outside = [([part], weights) for part, weights in self.ends.weights(values[segments:]).items()]
        return Recipe(models=self.problem.models, root=self._root([*outside, *rows]))

    def _weights(self, values: Sequence[Scalar]) -> list[tuple[Position, Weights]]:
        """The weights of the models in each layer."""
        borders = sorted(int(value) for value in values[: self.borders])
        own = np.zeros((self.layers, len(self.models)))
        edges = [0, *borders, self.layers]
        for number, (begin, end) in enumerate(pairwise(edges)):
            own[begin:end, int(values[self.borders + number])] = 1.0
        around = [
            own[max(0, layer - self.blend) : layer + self.blend + 1].mean(axis=0).tolist()
            for layer in range(self.layers)
        ]
        return [
            (layer, {name: weight for name, weight in zip(self.models, row, strict=True) if weight})
            for layer, row in enumerate(around)
        ]

    def _root(self, rows: Sequence[tuple[list[Position], Weights]]) -> Leaf | Merge:
        kinds = list(self.kinds) if self.kinds is not None else None
        first = rows[0][1]
        if all(weights == first for _, weights in rows):
            return averaged([(Selector(modules=kinds), first)])
        shared = self.problem.layout.shared
        groups = [(Selector(positions=where, modules=kinds), weights) for where, weights in rows]
        return averaged([(g, w) for g, w in groups if any(g.matches(tensor) for tensor in shared)])

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: models alone, and its own recipes, but for some with blended segments shorter than that."""
        positions: list[Position] = [*range(self.layers), *self.ends.parts]
        found = weights_of(recipe.root, positions) if recipe.layers is None else None
        numbers = self.ends.numbers(found) if found is not None else None
        if found is None or numbers is None or not set(found) >= set(positions):
            return None
        models = [max(found[layer], key=found[layer].__getitem__) for layer in range(self.layers)]
        runs = [(name, len(list(run))) for name, run in groupby(models)]
        if len(runs) > self.borders + 1 or not set(models) <= set(self.models):
            return None
        borders = np.cumsum([length for _, length in runs])[:-1].tolist()
        segments = [self.models.index(name) + 0.5 for name, _ in runs]
        missing = self.borders - len(borders)
        genome = np.array(
            [*borders, *[self.layers] * missing, *segments, *segments[-1:] * missing, *numbers], dtype=np.float64
        )
        return genome if same(self.recipe(genome), recipe) else None

    def uniform(self) -> Genome:
        """See `JobSpace.uniform`: borders at equal distances, the models in turn; the average is out of reach."""
        segments = self.borders + 1
        borders = [self.layers * (number + 1) / segments for number in range(self.borders)]
        names = [name for name in self.models if name != "base"] or list(self.models)
        models = [self.models.index(names[number % len(names)]) + 0.5 for number in range(segments)]
        return np.array([*borders, *models, *self.ends.middle])


@search_space(
    "layer_swap",
    summary="One model's layers at the bottom, others' above, with borders that the search moves.",
    reference="Bandarkar et al. 2024, Layer Swapping for Zero-Shot Cross-Lingual Transfer, arXiv 2410.01335",
    options=LayerSwapOptions,
)
def make(spec: JobSpec, problem: Problem, options: LayerSwapOptions) -> LayerSwapSpace:
    """Make the space; see `optimizer.space.search_space`."""
    layers = count_layers(problem, "layer_swap", rearranged=False)
    refuse_ignored(spec, "layer_swap", ("operator", "options", "modifiers", "granularity", "bounds"))
    models = check_models(options.models, problem, list(problem.models))
    frozen = spec.merge.frozen
    kinds = tuple(kind for kind in MODULE_KINDS if kind not in frozen) if frozen else None
    if not any(Selector(modules=kinds and list(kinds)).matches(tensor) for tensor in problem.layout.shared):
        raise InvalidInput("every module kind is frozen", field="merge.frozen", remedy="leave something to merge")
    ends = Ends.of(options.outside, models, problem, frozen)
    variables = (
        *(Variable(f"border {number + 1}", 0.0, float(layers), "integer") for number in range(options.borders)),
        *(choice(f"model of {name}", models) for name in _segments(options.borders + 1)),
        *ends.variables,
    )
    return LayerSwapSpace(variables, problem, models, options.borders, options.blend, ends, kinds)


def _segments(count: int) -> list[str]:
    names = {2: ["the bottom", "the top"], 3: ["the bottom", "the middle", "the top"]}
    return names.get(count) or [f"segment {number + 1}" for number in range(count)]
