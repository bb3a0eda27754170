"""Search spaces: named, typed, bounded variables, encoded as one vector (the genome) and decoded to a recipe.

Every genome is a vector of float64. A continuous variable stands as its value, an integer as a number that is rounded,
a choice as a number in [0, number of choices) that is rounded down. So any algorithm that proposes real vectors inside
the bounds works on any space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InvalidInput
from optimizer.geometry import MODULE_KINDS, Layout, ModuleKind, Position
from optimizer.problem import Problem
from optimizer.recipe import UNKNOWN_DIGEST, Leaf, Merge, Recipe, Selector
from optimizer.spec import CandidateInput, ChoiceVariable, Granularity, JobSpec, RangeVariable, Scalar

Genome = NDArray[np.float64]
Kind = Literal["real", "integer", "choice"]


@dataclass(frozen=True)
class Variable:
    """One dimension of the genome.

    Attributes:
        name: e.g. ``"language @ layer 3"``.
        low, high: inclusive bounds of the number that stands in the genome.
        kind: how the number is read.
        choices: the values of a `choice`.
    """

    name: str
    low: float
    high: float
    kind: Kind = "real"
    choices: tuple[Scalar, ...] = ()

    def read(self, number: float) -> Scalar:
        """Return the value that ``number`` stands for."""
        if self.kind == "integer":
            return round(number)
        if self.kind == "choice":
            return self.choices[min(int(number), len(self.choices) - 1)]
        return number


@dataclass(frozen=True)
class SearchSpace:
    """The bounded box that an algorithm searches.

    Attributes:
        variables: one for each dimension of the genome, in order.
    """

    variables: tuple[Variable, ...]

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.variables)

    @cached_property
    def low(self) -> Genome:
        """Lower bounds, shape (dim,)."""
        return np.array([variable.low for variable in self.variables])

    @cached_property
    def high(self) -> Genome:
        """Upper bounds, shape (dim,)."""
        return np.array([variable.high for variable in self.variables])

    def clip(self, genome: Genome) -> Genome:
        """Return ``genome`` moved inside the bounds."""
        return np.clip(genome, self.low, self.high)


@dataclass(frozen=True)
class MergeSpace(SearchSpace):
    """The space of a job: coefficients (group by group, expert by expert), then the operator's variable options.

    Attributes:
        problem: the job's inputs.
        groups: the coefficient groups.
        columns: names of the coefficients in a group: the experts, or ``("t",)``.
        fixed: the operator's fixed options.
    """

    problem: Problem
    groups: tuple[Selector, ...] = ()
    columns: tuple[str, ...] = ()
    fixed: dict[str, Scalar] = field(default_factory=dict)

    @property
    def table(self) -> tuple[int, int]:
        """Rows and columns of the coefficient table."""
        return len(self.groups), len(self.columns)

    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome, shape (dim,), to the recipe it stands for."""
        if genome.shape != (self.dim,):
            raise InvalidInput(f"the genome has {genome.size} numbers, the job's space has {self.dim}", field="genome")
        rows, cols = self.table
        coefficients = genome[: rows * cols].reshape(rows, cols).tolist()
        tail = zip(self.variables[rows * cols :], genome[rows * cols :].tolist(), strict=True)
        options = self.fixed | {variable.name: variable.read(number) for variable, number in tail}
        return self.merge(coefficients, options)

    def merge(self, coefficients: list[list[float]], options: dict[str, Scalar]) -> Recipe:
        """Return the recipe with this coefficient table, shape (groups, columns)."""
        experts = [name for name in self.problem.models if name != "base"]
        inputs = experts if self.columns != ("t",) else _endpoints(experts)
        return Recipe(
            models=self.problem.models,
            root=Merge(
                operator=self.problem.operator.name,
                options=dict(sorted(options.items())),
                base=Leaf(model="base"),
                inputs=[Leaf(model=name) for name in inputs],
                groups=list(self.groups),
                coefficients=coefficients,
            ),
        )

    def encode(self, candidate: CandidateInput) -> tuple[Genome | None, Recipe]:
        """Return the genome (None for a foreign recipe) and the recipe of a candidate that a user gave.

        Raises:
            InvalidInput: wrong length, outside the bounds, an unknown expert, or a recipe of other models.
        """
        if candidate.recipe is not None:
            return None, self._foreign(candidate.recipe)
        if candidate.genome is not None:
            genome = np.array(candidate.genome)
        else:
            genome = self.point(candidate.coefficients or {})
        if genome.shape == (self.dim,):
            self._check_bounds(genome)
        return genome, self.recipe(genome)

    def point(self, coefficients: dict[str, float | list[float]]) -> Genome:
        """Return the genome with these coefficients (a number, or one for each group); the rest 0, options at mid-range.

        The result may lie outside the bounds: algorithms clip, warm starts are evaluated as they are.
        """
        rows, cols = self.table
        table = np.zeros((rows, cols))
        for name, value in coefficients.items():
            if name not in self.columns:
                raise InvalidInput(
                    f"{name!r} has no coefficient here",
                    field="coefficients",
                    remedy=f"use: {', '.join(self.columns)}",
                )
            if isinstance(value, list) and len(value) != rows:
                raise InvalidInput(
                    f"{len(value)} numbers given, the job has {rows} coefficient groups",
                    field=f"coefficients.{name}",
                )
            table[:, self.columns.index(name)] = value
        middle = (self.low + self.high)[rows * cols :] / 2
        return np.concatenate([table.ravel(), middle])

    def warm_starts(self, spec: JobSpec) -> list[tuple[str, Genome]]:
        """Return the labelled genomes that are evaluated first, as ``spec.warm_starts`` asks."""
        wanted, out = spec.warm_starts, []
        if self.columns == ("t",):
            ends = _endpoints([name for name in self.problem.models if name != "base"])
            points = {ends[0]: {"t": 0.0}, ends[1]: {"t": 1.0}}
            middle: dict[str, float] = {"t": 0.5}
        else:
            points = {"base": {}} if self.problem.operator.uses_base else {}
            points |= {name: {name: 1.0} for name in self.columns}
            middle = dict.fromkeys(self.columns, 1.0 / len(self.columns))
        for name, values in points.items():
            if wanted.base if name == "base" else wanted.experts:
                out.append((name, self.point(dict(values))))
        if wanted.uniform:
            out.append(("uniform", self.point(dict(middle))))
        return out

    def uniform(self) -> Genome:
        """Return the uniform merge, moved inside the bounds: where searches start."""
        value = 0.5 if self.columns == ("t",) else 1.0 / len(self.columns)
        return self.clip(self.point(dict.fromkeys(self.columns, value)))

    def _foreign(self, data: dict[str, Any]) -> Recipe:
        recipe = Recipe.parse(data)
        known = {name: model.digest for name, model in self.problem.models.items()}
        for name, model in recipe.models.items():
            if known.get(name) not in (model.digest, UNKNOWN_DIGEST):
                raise InvalidInput(
                    f"model {name!r} is not the job's",
                    field=f"recipe.models.{name}",
                    remedy="use the job's own models",
                )
        return recipe

    def _check_bounds(self, genome: Genome) -> None:
        outside = np.flatnonzero((genome < self.low) | (genome > self.high) | ~np.isfinite(genome))
        if outside.size:
            variable = self.variables[outside[0]]
            raise InvalidInput(
                f"{variable.name} = {genome[outside[0]]:g} is outside [{variable.low:g}, {variable.high:g}]",
                field="genome",
                remedy="stay inside the job's bounds",
            )


def make_space(spec: JobSpec, problem: Problem) -> MergeSpace:
    """Make the search space of a job from its spec and its inputs.

    Raises:
        InvalidInput: the operator does not fit the number of experts, or nothing is left to search.
    """
    groups = make_groups(spec.merge.granularity, problem.layout, spec.merge.frozen)
    if not groups:
        raise InvalidInput("every module kind is frozen", field="merge.frozen", remedy="leave something to merge")
    operator = problem.operator
    experts = [expert.name for expert in spec.experts]
    columns = tuple(experts) if operator.columns == "per_expert" else ("t",)
    bounds = spec.merge.bounds
    low, high = (bounds.low, bounds.high) if bounds else (operator.low, operator.high)
    variables = [Variable(f"{column} @ {group.label}", low, high) for group in groups for column in columns]
    fixed: dict[str, Scalar] = {}
    for name, value in spec.merge.options.items():
        if isinstance(value, RangeVariable):
            variables.append(Variable(name, value.low, value.high, "integer" if value.integer else "real"))
        elif isinstance(value, ChoiceVariable):
            variables.append(Variable(name, 0.0, float(len(value.choices)), "choice", tuple(value.choices)))
        elif not isinstance(value, list):
            fixed[name] = value
    return MergeSpace(tuple(variables), problem, tuple(groups), columns, fixed)


def make_groups(granularity: Granularity, layout: Layout, frozen: Sequence[ModuleKind] = ()) -> list[Selector]:
    """Return the coefficient groups: layer groups × module groups, those without any parameter left out."""
    rest: list[ModuleKind] = [kind for kind in MODULE_KINDS if kind not in frozen]
    modules: list[list[ModuleKind]] = []
    for chosen in granularity.modules:
        modules.append([kind for kind in chosen if kind in rest])
        rest = [kind for kind in rest if kind not in chosen]
    modules.append(rest)
    everything = len(modules) == 1 and not frozen
    groups = [
        Selector(positions=where, modules=None if everything else kinds)
        for where in _layer_groups(granularity, layout.layers)
        for kinds in modules
        if kinds
    ]
    return [group for group in groups if any(group.matches(tensor) for tensor in layout.shared)]


def _layer_groups(granularity: Granularity, layers: int) -> list[list[Position] | None]:
    if granularity.layers == "whole":
        return [None]
    size = granularity.group_size if granularity.layers == "groups" else 1
    blocks: list[list[Position] | None] = [
        list(range(first, min(first + size, layers))) for first in range(0, layers, size)
    ]
    return [["input"], *blocks, ["output"]]


def _endpoints(experts: list[str]) -> list[str]:
    """The two models an interpolation runs between: two experts, or the base and the only one."""
    return ["base", *experts][-2:]
