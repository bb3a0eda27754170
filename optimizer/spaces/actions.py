"""Sequences of actions that lay a model block by block: take a model's block, take the merged one's, skip, go back.

Reinforced Model Merging has an agent act in this space (`optimizer.algorithms.rmm`); here a genome is a sequence of a
fixed length, so that any search can act. In the paper an episode lasts until it is past the last layer, and going back
from the first one ends it with a penalty. Here going back from the first layer does nothing, what comes after the last
layer counts for nothing, and layers that a sequence does not reach are the merged model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from optimizer.errors import InvalidInput
from optimizer.problem import OperatorInfo, Problem
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe, Selector
from optimizer.space import Genome, JobSpace, OperatorOptions, WarmStart, search_space
from optimizer.spec import JobSpec, Scalar, Strict
from optimizer.structured import (
    check_models,
    choice,
    count_layers,
    experts_of,
    layers_of,
    models_option,
    planned,
    read,
    refuse_ignored,
    same,
)


class MergedModel(Strict):
    """A merge of all experts whose blocks may be taken."""

    operator: str = Field(description="One that needs the models' weights only; GET /api/v1/operators lists them.")
    options: dict[str, Scalar] = Field(default_factory=dict, max_length=32, description="Its options.")
    coefficient: float | None = Field(
        default=None,
        ge=-10,
        le=10,
        description=(
            "Of every expert, or the only one; by default 1 / number of experts, half-way between two models, or a scale "
            "of 1."
        ),
    )


class ActionsOptions(Strict):
    """Options of `actions`."""

    models: list[str] | None = models_option("the experts")
    merged: list[MergedModel] = Field(
        default=[MergedModel(operator="ties", coefficient=1.0)],
        min_length=1,
        max_length=8,
        description="The merged models; what is in no layer is the first one's, as are layers that nothing is said of.",
    )
    steps: int | None = Field(
        default=None, ge=1, le=10_000, description="Length of a sequence; by default twice the number of layers."
    )
    most_layers: int | None = Field(
        default=None,
        ge=1,
        description="What goes beyond so many layers is left out; by default twice those of a model.",
    )


@dataclass(frozen=True)
class ActionSpace(JobSpace):
    """One choice of an action for each step.

    Attributes:
        nodes: whose blocks can be taken: the models, then the merged ones.
        names: what they are called.
        merged: the number of the first merged one.
        most_layers: of the result.
    """

    nodes: tuple[Leaf | Merge, ...] = ()
    names: tuple[str, ...] = ()
    merged: int = 0
    most_layers: int = 1

    @property
    def layers(self) -> int:
        """Number of layers of the models."""
        return self.problem.layout.layers

    @property
    def skip(self) -> int:
        """Number of the action that leaves a layer out; the next one goes back."""
        return len(self.nodes)

    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome, shape (steps,): the plan of the blocks that are taken."""
        path = self.path([int(value) for value in read(self, genome)])
        plan = [
            PlannedLayer(layer=layer, node=None if number == self.merged else self.nodes[number])
            for layer, number in path
        ]
        return planned(self.problem, self.nodes[self.merged], plan)

    def path(self, actions: Sequence[int]) -> list[tuple[int, int]]:
        """Return layer and number of the blocks that actions take, from first to last; at least one."""
        layer = 0
        path: list[tuple[int, int]] = []
        for action in actions:
            if layer == self.layers:
                break
            if action < self.skip:
                path.append((layer, action))
            layer = max(0, layer - 1) if action > self.skip else layer + 1
        path += [(rest, self.merged) for rest in range(layer, self.layers)]
        return path[: self.most_layers] or [(0, self.merged)]

    def genome(self, actions: Sequence[int]) -> Genome:
        """Return the genome of these actions; skipping, which counts for nothing after the last layer, fills the rest."""
        rest = self.dim - len(actions)
        return np.array([*actions, *[self.skip] * rest], dtype=np.float64) + 0.5

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: its own recipes, models alone where all parameters are in layers, and the merged one."""
        nodes = list(self.nodes)
        if recipe.root != nodes[self.merged] and recipe.layers is not None:
            return None
        outside = any(not isinstance(tensor.position, int) for tensor in self.problem.layout.shared)
        if recipe.root not in nodes or (outside and recipe.root != nodes[self.merged]):
            return None
        actions: list[int] = []
        layer = 0
        for entry in layers_of(recipe, self.problem):
            node = recipe.root if entry.node is None else entry.node
            if node not in nodes or entry.scale != 1.0:
                return None
            step = self.skip + 1 if entry.layer < layer else self.skip
            actions += [step] * abs(entry.layer - layer) + [nodes.index(node)]
            layer = entry.layer + 1
        actions += [self.skip] * (self.layers - layer)
        genome = self.genome(actions[: self.dim])
        plain = Recipe(models=recipe.models, root=nodes[self.merged], layers=layers_of(recipe, self.problem))
        return (
            genome if same(_written_out(self.recipe(genome), self.problem), _written_out(plain, self.problem)) else None
        )

    def uniform(self) -> Genome:
        """See `JobSpace.uniform`: the first merged model, as far as a sequence reaches."""
        return self.genome(([self.merged] * self.layers)[: self.dim])

    def warm_starts(self, spec: JobSpec) -> list[WarmStart]:
        """See `JobSpace.warm_starts`; besides, each model's blocks, and each merged model."""
        out = super().warm_starts(spec)
        for number, name in enumerate(self.names):
            wanted = spec.warm_starts.experts if number < self.merged else spec.warm_starts.uniform
            if wanted and number != self.merged and self.dim >= self.layers:
                genome = self.genome([number] * self.layers)
                out.append(WarmStart(f"blocks of {name}", genome, self.recipe(genome)))
        return out


def _written_out(recipe: Recipe, problem: Problem) -> Recipe:
    """The same with every layer's node."""
    layers = [
        entry.model_copy(update={"node": recipe.root if entry.node is None else entry.node})
        for entry in layers_of(recipe, problem)
    ]
    return recipe.model_copy(update={"layers": layers})


def _named(options: ActionsOptions) -> list[tuple[str, OperatorOptions]]:
    return [(merged.operator, merged.options) for merged in options.merged]


@search_space(
    "actions",
    summary="Lays a model by actions: take a model's block, or that of a merge of all, skip one, go back.",
    reference="Han et al. 2025, Reinforced Model Merging, arXiv 2503.21272",
    options=ActionsOptions,
    operators=_named,
)
def make(spec: JobSpec, problem: Problem, options: ActionsOptions) -> ActionSpace:
    """Make the space; see `optimizer.space.search_space`."""
    layers = count_layers(problem, "actions")
    refuse_ignored(spec, "actions", ("operator", "options", "modifiers", "granularity", "bounds", "frozen"))
    models = check_models(options.models, problem, experts_of(problem))
    merged = [_merged(wanted, problem, number) for number, wanted in enumerate(options.merged)]
    names = list(models)
    for wanted in options.merged:
        again = sum(name.startswith(f"merged by {wanted.operator}") for name in names)
        names.append(f"merged by {wanted.operator}" + (f" {again + 1}" if again else ""))
    variables = tuple(
        choice(f"action {step + 1}", [*names, "skip", "back"]) for step in range(options.steps or 2 * layers)
    )
    nodes: tuple[Leaf | Merge, ...] = (*(Leaf(model=name) for name in models), *merged)
    return ActionSpace(variables, problem, nodes, tuple(names), len(models), options.most_layers or 2 * layers)


def _merged(wanted: MergedModel, problem: Problem, number: int) -> Merge:
    info = _info(wanted.operator, problem, number)
    experts = experts_of(problem)
    inputs = ["base", *experts][-2:] if info.columns == "interpolation" else experts
    usual = {"per_expert": 1.0 / len(experts), "interpolation": 0.5, "scale": 1.0}[info.columns]
    size = len(experts) if info.columns == "per_expert" else 1
    return Merge(
        operator=wanted.operator,
        options=dict(sorted(wanted.options.items())),
        base=Leaf(model="base"),
        inputs=[Leaf(model=name) for name in inputs],
        groups=[Selector()],
        coefficients=[[usual if wanted.coefficient is None else wanted.coefficient] * size],
    )


def _info(name: str, problem: Problem, number: int) -> OperatorInfo:
    field = f"merge.space.options.merged.{number}.operator"
    info = problem.operators.get(name)
    if info is None:
        raise InvalidInput(f"nothing is known of the operator {name!r}", field=field)
    count = len(problem.models) - 1
    if not info.min_experts <= count <= (info.max_experts or count) and info.columns != "interpolation":
        raise InvalidInput(f"{name} does not merge {count} experts", field=field, remedy="choose another operator")
    return info
