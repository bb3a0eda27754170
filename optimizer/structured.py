"""What search spaces of other forms than a table of coefficients have in common: models, layers, and what is in none."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from optimizer.errors import InvalidInput
from optimizer.geometry import ModuleKind, Position
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe, Selector
from optimizer.space import Genome, JobSpace, Variable
from optimizer.spec import Bounds, JobSpec, MergeSpec, Scalar

Outside = Literal["base", "average", "choice", "linear"]
Weights = Mapping[str, float]
"""By model, how much of it; they sum to 1."""

SMALLEST_SUM = 1e-6
"""Weights that sum to less are taken as equal, so that no genome stands for an average that is not defined."""
_STACK = re.compile(r"^(.*?)\.\d+\.")
_PARTS: tuple[Literal["input", "output"], ...] = ("input", "output")
_WHERE = {"input": "before the layers", "output": "after the layers"}


def outside_option(default: Outside) -> Any:
    """The option `outside`."""
    return Field(
        default=default,
        description=(
            "What is made of the parameters in no layer (embeddings, final norm, output layer): they are the `base`'s, "
            "the `average` of the models, one model's by `choice` (one for those before the layers, one for those "
            "after), or a weighted average of them (`linear`)."
        ),
    )


def models_option(default: str) -> Any:
    """The option `models`."""
    return Field(
        default=None,
        min_length=1,
        max_length=64,
        description=f"Names of the models whose layers are used, in order; by default {default}.",
        examples=[["base", "language"]],
    )


def read(space: JobSpace, genome: Genome) -> list[Scalar]:
    """Return the values that a genome stands for, choices as their number; raises `InvalidInput` for a wrong length."""
    if genome.shape != (space.dim,):
        raise InvalidInput(f"the genome has {genome.size} numbers, the job's space has {space.dim}", field="genome")
    pairs = zip(space.variables, genome.tolist(), strict=True)
    return [
        chosen(variable, number) if variable.kind == "choice" else variable.read(number) for variable, number in pairs
    ]


def chosen(variable: Variable, number: float) -> int:
    """Return the number of the choice that ``number`` stands for."""
    return max(0, min(int(number), len(variable.choices) - 1))


def choice(name: str, values: Sequence[str]) -> Variable:
    """Return a variable that chooses one of ``values``."""
    return Variable(name, 0.0, float(len(values)), "choice", tuple(values))


def experts_of(problem: Problem) -> list[str]:
    """Return the experts' names, in order."""
    return [name for name in problem.models if name != "base"]


def check_models(names: Sequence[str] | None, problem: Problem, default: Sequence[str]) -> tuple[str, ...]:
    """Return the models that an option `models` names; raises `InvalidInput` for a stranger or a repetition."""
    for number, name in enumerate(names or ()):
        if name not in problem.models or name in (names or ())[:number]:
            raise InvalidInput(
                f"{name!r} is {'listed twice' if name in problem.models else 'no model of the job'}",
                field=f"merge.space.options.models.{number}",
                remedy=f"use each of these at most once: {', '.join(problem.models)}",
            )
    return tuple(names or default)


def count_layers(problem: Problem, kind: str, *, rearranged: bool = True) -> int:
    """Return the number of layers of the models.

    Raises:
        InvalidInput: there are none, or where they are to be ``rearranged``, several stacks of them.
    """
    layers = problem.layout.layers
    names = [tensor.name for tensor in problem.layout.shared if isinstance(tensor.position, int)]
    stacks = {match[1] for name in names if (match := _STACK.match(name))}
    if layers == 0 or (rearranged and len(stacks) > 1):
        what = f"several stacks of layers ({', '.join(sorted(stacks))})" if layers else "no layers"
        raise InvalidInput(
            f"the models have {what}, which the space {kind!r} cannot rearrange",
            field="merge.space.name",
            remedy="leave out `merge.space`, or use the space `operators`",
        )
    return layers


def refuse_ignored(spec: JobSpec, kind: str, settings: Collection[str]) -> None:
    """Raise `InvalidInput` if one of those parts of `merge` is set, which this kind of space does not look at."""
    for name in settings:
        if getattr(spec.merge, name) != MergeSpec.model_fields[name].get_default(call_default_factory=True):
            raise InvalidInput(
                f"the space {kind!r} does not use `{name}`", field=f"merge.{name}", remedy="leave it out"
            )


def equal_shares(models: Sequence[str]) -> dict[str, float]:
    """Return equal weights of the models."""
    return dict.fromkeys(models, 1.0 / len(models))


def normalised(models: Sequence[str], numbers: Sequence[float]) -> dict[str, float]:
    """Return non-negative numbers as weights that sum to 1; equal ones where they sum to almost nothing."""
    total = math.fsum(numbers)
    if total < SMALLEST_SUM:
        return equal_shares(models)
    return {model: number / total for model, number in zip(models, numbers, strict=True) if number}


def averaged(rows: Sequence[tuple[Selector, Weights]]) -> Leaf | Merge:
    """Return a node in which each group of parameters is an average of models with weights of its own.

    Parameters in no group are the base's. Where one model is all there is, the node is that model.
    """
    used = {name: None for _, weights in rows for name, weight in weights.items() if weight}
    if not rows or (len(used) == 1 and rows[0][0] == Selector()):
        return Leaf(model=next(iter(used), "base"))
    return Merge(
        operator="linear",
        base=Leaf(model="base"),
        inputs=[Leaf(model=name) for name in used],
        groups=[group for group, _ in rows],
        coefficients=[[float(weights.get(name, 0.0)) for name in used] for _, weights in rows],
    )


@dataclass(frozen=True)
class Ends:
    """What is made of the parameters in no layer, and its variables.

    Attributes:
        kind: the option.
        models: the ones to choose from.
        parts: where there are such parameters at all.
    """

    kind: Outside
    models: tuple[str, ...]
    parts: tuple[Literal["input", "output"], ...]

    @classmethod
    def of(cls, kind: Outside, models: Sequence[str], problem: Problem, frozen: Collection[ModuleKind] = ()) -> Ends:
        """Make it for a problem; ``frozen`` parameters are not its business."""
        found = {tensor.position for tensor in problem.layout.shared if tensor.kind not in frozen}
        return cls(kind, tuple(models), tuple(part for part in _PARTS if part in found))

    @property
    def variables(self) -> tuple[Variable, ...]:
        """Its variables, part by part."""
        if self.kind == "choice":
            return tuple(choice(f"model {_WHERE[part]}", self.models) for part in self.parts)
        if self.kind == "linear":
            return tuple(Variable(f"{name} {_WHERE[part]}", 0.0, 1.0) for part in self.parts for name in self.models)
        return ()

    def weights(self, values: Sequence[Scalar]) -> dict[Position, Weights]:
        """Return the weights of the models by part."""
        if self.kind == "base":
            return {part: {"base": 1.0} for part in self.parts}
        if self.kind == "average":
            return {part: equal_shares(self.models) for part in self.parts}
        if self.kind == "choice":
            return {part: {self.models[int(value)]: 1.0} for part, value in zip(self.parts, values, strict=True)}
        size = len(self.models)
        rows = [[float(value) for value in values[begin : begin + size]] for begin in range(0, len(values), size)]
        return {part: normalised(self.models, row) for part, row in zip(self.parts, rows, strict=True)}

    def root(self, values: Sequence[Scalar]) -> Leaf | Merge:
        """Return the root of a recipe whose layers are all planned."""
        weights = list(self.weights(values).items())
        if len({tuple(row.items()) for _, row in weights}) <= 1:
            return averaged([(Selector(), row) for _, row in weights[:1]])
        return averaged([(Selector(positions=[part]), row) for part, row in weights])

    def numbers(self, found: Mapping[Position, Weights]) -> list[float] | None:
        """Return what stands in the genome for these weights; None where nothing does."""
        out: list[float] = []
        for part in self.parts:
            weights = {name: weight for name, weight in found.get(part, {}).items() if weight}
            if self.kind in ("base", "average"):
                continue
            if not weights or not set(weights) <= set(self.models) or (self.kind == "choice" and len(weights) != 1):
                return None
            if self.kind == "choice":
                out.append(self.models.index(next(iter(weights))) + 0.5)
            else:
                out += [weights.get(name, 0.0) for name in self.models]
        return out

    @property
    def middle(self) -> list[float]:
        """What stands in the genome for the middle of its variables: equal weights, or the first expert."""
        if self.kind == "choice":
            first = next((number for number, name in enumerate(self.models) if name != "base"), 0)
            return [first + 0.5] * len(self.parts)
        return [1.0 / len(self.models) for _ in self.variables]

    def numbers_of(self, model: str) -> list[float] | None:
        """Return what stands in the genome for the parameters of one model; None where nothing does."""
        if (
            self.parts
            and self.kind in ("base", "average")
            and [model] != (["base"] if self.kind == "base" else list(self.models))
        ):
            return None
        return self.numbers({part: {model: 1.0} for part in self.parts})


def weights_of(node: Leaf | Merge, positions: Sequence[Position]) -> dict[Position, Weights] | None:
    """Return the weights of the models at each position in a node that `averaged` made; None for any other."""
    if isinstance(node, Leaf):
        return {position: {node.model: 1.0} for position in positions} if node.layer is None else None
    names = [child.model for child in node.inputs if isinstance(child, Leaf) and child.layer is None]
    if node.operator != "linear" or node.groups is None or len(names) != len(node.inputs):
        return None
    out: dict[Position, Weights] = {}
    for group, row in zip(node.groups, node.coefficients, strict=True):
        for position in positions if group.positions is None else group.positions:
            out.setdefault(position, dict(zip(names, row, strict=True)))
    return out


def planned(problem: Problem, root: Leaf | Merge, layers: Sequence[PlannedLayer]) -> Recipe:
    """Return the recipe of a plan; none is written down for layers that are all as they would be without one."""
    plain = [entry.layer for entry in layers] == list(range(problem.layout.layers)) and all(
        entry.scale == 1.0 and entry.node in (None, root) for entry in layers
    )
    return Recipe(models=problem.models, root=root, layers=None if plain else list(layers))


def layers_of(recipe: Recipe, problem: Problem) -> list[PlannedLayer]:
    """Return the plan of a recipe, also where it has none."""
    if recipe.layers is not None:
        return recipe.layers
    return [PlannedLayer(layer=layer, node=recipe.root) for layer in range(problem.layout.layers)]


def same(left: Recipe, right: Recipe) -> bool:
    """Whether two recipes are the same but for the last bits of their numbers."""
    return _close(_plain(left), _plain(right))


def _plain(recipe: Recipe) -> Any:
    return recipe.model_dump(mode="json", include={"root", "layers"})


def _close(left: Any, right: Any) -> bool:
    if isinstance(left, float | int) and isinstance(right, float | int):
        return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_close(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_close, left, right))
    return bool(left == right)


LARGEST_ADDITION = 1e6
"""Limit of what `optimizer.plans.additions` makes of the scales that a search proposes."""


def hidden_scales(layers: Sequence[PlannedLayer], at: Literal["input", "output"]) -> list[float] | None:
    """Return the scales of the hidden state that `optimizer.plans.additions` turned into those of a plan."""
    factors = [entry.scale for entry in layers]
    if not all(factor > 0 for factor in factors):
        return None
    ratios = [left / right for left, right in pairwise(factors)]
    return [1.0, *ratios] if at == "input" else [*ratios, 1.0]


def scales_option() -> Any:
    """The option `scales`."""
    return Field(
        default=Bounds(low=0.5, high=2.0),
        description="Bounds of the scales of the hidden state; they must be positive.",
    )


def check_scales(bounds: Bounds) -> Bounds:
    """Return ``bounds``; raises `InvalidInput` if they allow a scale that is not positive."""
    if bounds.low <= 0:
        raise InvalidInput(
            f"scales of the hidden state are positive, not {bounds.low:g}",
            field="merge.space.options.scales.low",
            remedy="use for example 0.5 to 2",
        )
    return bounds
