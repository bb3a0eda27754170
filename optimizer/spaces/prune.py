"""Removing layers, and selecting or merging each of those that stay, down to a target size.

GPTailor draws the numbers of the removed layers, any two of which must differ. Here each layer has a score, and those
with the largest are removed: every genome has exactly the target's number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np
from pydantic import Field

from optimizer.errors import InvalidInput
from optimizer.plans import additions, prune, scaled
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe, Selector
from optimizer.space import Genome, JobSpace, Variable, WarmStart, search_space
from optimizer.spec import Bounds, JobSpec, Scalar, Strict
from optimizer.structured import (
    LARGEST_ADDITION,
    averaged,
    check_scales,
    choice,
    count_layers,
    equal_shares,
    experts_of,
    hidden_scales,
    layers_of,
    planned,
    read,
    refuse_ignored,
    same,
    scales_option,
)

Blocks = Literal["remove", "select", "merge"]
AVERAGE = "average"


class PruneOptions(Strict):
    """Options of `prune`."""

    layers: int | None = Field(default=None, ge=1, description="Number of layers that stay.", examples=[24])
    share: float = Field(
        default=0.75, gt=0, le=1, description="Share of the layers that stay, where `layers` does not say how many."
    )
    blocks: Blocks = Field(
        default="merge",
        description=(
            "What becomes of a layer that stays: nothing (`remove`), it is the source's or one expert's (`select`), or it "
            "is the source's, one expert's, or several experts' merged by task arithmetic (`merge`)."
        ),
    )
    source: str = Field(
        default="base",
        description=(
            "The model that is pruned: the `base`, an expert, or the `average` of the experts. Its layers stand where no "
            "expert is selected, and what is in no layer is its own."
        ),
    )
    factor: Bounds = Field(
        default=Bounds(low=0.0, high=1.0), description="Bounds of the factor of the task vectors of a merged layer."
    )
    output_scales: bool = Field(default=False, description="Scale the hidden state behind each layer.")
    scales: Bounds = scales_option()


@dataclass(frozen=True)
class PruneSpace(JobSpace):
    """For each layer a score (those with the largest are removed), what it is made of, and an output scale.

    Attributes:
        kept: number of layers that stay.
        blocks: the option.
        source: what a layer without experts is made of, and what is in no layer.
        candidates: the experts that layers may be made of.
        output_scales: the option.
    """

    kept: int = 0
    blocks: Blocks = "merge"
    source: Leaf | Merge = Leaf(model="base")  # noqa: RUF009 - immutable
    candidates: tuple[str, ...] = ()
    output_scales: bool = False

    @property
    def layers(self) -> int:
        """Number of layers of the models."""
        return self.problem.layout.layers

    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome, shape (layers · variables of a layer,)."""
        rows = self._rows(read(self, genome))
        removed = self._removed([float(row[0]) for row in rows]) if self._removes else []
        first = int(self._removes)
        parts = [self._block(row[first:]) for row in rows]
        plan = prune(self.layers, removed, [names for names, _ in parts], [factor for _, factor in parts])
        plan = [self._source_for_none(entry, parts[entry.layer][0]) for entry in plan]
        if self.output_scales:
            scales = [float(rows[entry.layer][-1]) for entry in plan]
            plan = scaled(plan, additions(scales, "output", LARGEST_ADDITION))
        return planned(self.problem, self.source, plan)

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: its own recipes, and the source alone where nothing is to be removed."""
        plan = layers_of(recipe, self.problem)
        if recipe.root != self.source or len(plan) != self.kept or len({entry.layer for entry in plan}) != len(plan):
            return None
        scales = hidden_scales(plan, "output")
        genome = self._genome(list(set(range(self.layers)) - {entry.layer for entry in plan}), [])
        table = genome.reshape(self.layers, -1)
        for depth, entry in enumerate(plan):
            block = self._block_numbers(entry.node)
            if block is None or scales is None:
                return None
            first = int(self._removes)
            table[entry.layer, first : first + len(block)] = block
            if self.output_scales:
                table[entry.layer, -1] = scales[depth]
        return genome if same(self.recipe(genome), recipe) else None

    def uniform(self) -> Genome:
        """See `JobSpace.uniform`: high and low layers removed in turn; of the others all experts' average, if possible."""
        return self._genome(self._orders()["high and low"], self.candidates if self.blocks == "merge" else [])

    def warm_starts(self, spec: JobSpec) -> list[WarmStart]:
        """Return pruned models only, as others miss the target: by three orders of removal, and of each expert."""
        wanted = spec.warm_starts
        genomes: dict[str, Genome] = {}
        orders = self._orders()
        for label, order in orders.items():
            if wanted.base:
                genomes[f"without {label} layers"] = self._genome(order, [])
        if wanted.experts and self.blocks != "remove":
            genomes |= {f"{name} pruned": self._genome(orders["high and low"], [name]) for name in self.candidates}
        if wanted.uniform:
            genomes["uniform pruned"] = self.uniform()
        return [WarmStart(label, genome, self.recipe(genome)) for label, genome in genomes.items()]

    @property
    def _removes(self) -> bool:
        return self.kept < self.layers

    def _rows(self, values: list[Scalar]) -> list[list[Scalar]]:
        width = len(values) // self.layers
        return [values[begin : begin + width] for begin in range(0, len(values), width)] or [[]] * self.layers

    def _removed(self, scores: Sequence[float]) -> list[int]:
        order = sorted(range(self.layers), key=lambda layer: -scores[layer])
        return sorted(order[: self.layers - self.kept])

    def _block(self, values: Sequence[Scalar]) -> tuple[list[str], float]:
        """The experts of a layer, and the factor of their task vectors."""
        if self.blocks == "remove":
            return [], 1.0
        if self.blocks == "select":
            number = int(values[0])
            return ([self.candidates[number - 1]] if number else []), 1.0
        bits = values[: len(self.candidates)]
        names = [name for name, bit in zip(self.candidates, bits, strict=True) if bit]
        return names, float(values[len(self.candidates)])

    def _source_for_none(self, entry: PlannedLayer, names: Sequence[str]) -> PlannedLayer:
        return entry if names else entry.model_copy(update={"node": None})

    def _block_numbers(self, node: Leaf | Merge | None) -> list[float] | None:
        if node is None or node == self.source:
            return self._numbers([], None)
        if isinstance(node, Leaf):
            return self._numbers([node.model], None)
        names = [child.model for child in node.inputs if isinstance(child, Leaf)]
        return self._numbers(names, node.coefficients[0][0])

    def _numbers(self, names: Sequence[str], factor: float | None) -> list[float] | None:
        """What stands in the genome for a layer of these experts; None where nothing does."""
        if not set(names) <= set(self.candidates) or (self.blocks == "remove" and names):
            return None
        if self.blocks == "remove":
            return []
        if self.blocks == "select":
            return [self.candidates.index(names[0]) + 1.5 if names else 0.5] if len(names) < 2 else None
        low, high = self._factor_bounds
        share = min(max(1.0 / max(len(names), 1), low), high)
        return [*(1.5 if name in names else 0.5 for name in self.candidates), share if factor is None else factor]

    @property
    def _factor_bounds(self) -> tuple[float, float]:
        variable = self.variables[int(self._removes) + len(self.candidates)]
        return variable.low, variable.high

    def _genome(self, order: Sequence[int], names: Sequence[str]) -> Genome:
        """The genome that removes the first layers in ``order`` and makes the others of these experts."""
        scores = np.zeros(self.layers)
        scores[list(order)] = 1.0 - np.arange(len(order)) / max(self.layers, 1)
        rows = [
            [*([score] if self._removes else []), *(self._numbers(names, None) or []), *([1.0] * self.output_scales)]
            for score in scores.tolist()
        ]
        return np.array(rows, dtype=np.float64).ravel()

    def _orders(self) -> dict[str, list[int]]:
        """Orders in which layers are removed; the first and the last one come last, as in GPTailor's code."""
        middle = self.layers // 2
        high, low = list(range(self.layers - 2, middle - 1, -1)), list(range(middle - 1, 0, -1))
        ends = [layer for layer in dict.fromkeys((self.layers - 1, 0)) if layer not in (*high, *low)]
        turns = [layer for pair in zip_longest(high, low) for layer in pair if layer is not None]
        outward = sorted((*high, *low), key=lambda layer: (abs(layer - middle), layer))
        return {"high": [*high, *low, *ends], "middle": [*outward, *ends], "high and low": [*turns, *ends]}


@search_space(
    "prune",
    summary="Removes layers down to a target size, and selects or merges each of those that stay.",
    reference="Su et al. 2025, GPTailor, arXiv 2506.20480",
    options=PruneOptions,
)
def make(spec: JobSpec, problem: Problem, options: PruneOptions) -> PruneSpace:
    """Make the space; see `optimizer.space.search_space`."""
    layers = count_layers(problem, "prune")
    refuse_ignored(spec, "prune", ("operator", "options", "modifiers", "granularity", "bounds", "frozen"))
    kept = options.layers or max(1, round(options.share * layers))
    if kept > layers:
        raise InvalidInput(
            f"{kept} layers cannot stay: the models have {layers}",
            field="merge.space.options.layers",
            remedy=f"use 1 to {layers}",
        )
    source = _source(options.source, problem)
    candidates = [name for name in experts_of(problem) if source != Leaf(model=name)]
    variables = [
        variable
        for layer in range(layers)
        for variable in (
            *([Variable(f"remove layer {layer}", 0.0, 1.0)] if kept < layers else []),
            *_block_variables(options, candidates, layer),
        )
    ]
    if not variables:
        raise InvalidInput(
            "nothing is left to search",
            field="merge.space.options",
            remedy="remove a layer, or select or merge blocks",
        )
    scales = options.output_scales
    return PruneSpace(tuple(variables), problem, kept, options.blocks, source, tuple(candidates), scales)


def _block_variables(options: PruneOptions, candidates: Sequence[str], layer: int) -> list[Variable]:
    out = []
    if options.blocks == "select":
        out.append(choice(f"model of layer {layer}", [options.source, *candidates]))
    if options.blocks == "merge":
        out += [Variable(f"{name} in layer {layer}", 0.0, 2.0, "choice", (False, True)) for name in candidates]
        out.append(Variable(f"factor of layer {layer}", options.factor.low, options.factor.high))
    if options.output_scales:
        bounds = check_scales(options.scales)
        out.append(Variable(f"scale behind layer {layer}", bounds.low, bounds.high))
    return out


def _source(name: str, problem: Problem) -> Leaf | Merge:
    if name in problem.models:
        return Leaf(model=name)
    if name != AVERAGE:
        raise InvalidInput(
            f"{name!r} is no model of the job",
            field="merge.space.options.source",
            remedy=f"use {AVERAGE!r} or one of: {', '.join(problem.models)}",
        )
    return averaged([(Selector(), equal_shares(experts_of(problem)))])
