"""Search spaces: named, typed, bounded variables, encoded as one vector (the genome) and decoded to a recipe.

Every genome is a vector of float64. A continuous variable stands as its value, an integer as a number that is rounded,
a choice as a number in [0, number of choices) that is rounded down. So any algorithm that proposes real vectors inside
the bounds works on any space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from optimizer.errors import InvalidInput, from_validation
from optimizer.geometry import MODULE_KINDS, Layout, ModuleKind, Position
from optimizer.problem import Problem
from optimizer.recipe import UNKNOWN_DIGEST, Leaf, Merge, Recipe, Selector
from optimizer.registry import Registry
from optimizer.spec import (
    CandidateInput,
    ChoiceVariable,
    Granularity,
    JobSpec,
    Modifier,
    RangeVariable,
    Scalar,
    SpaceSpec,
    Strict,
)

Genome = NDArray[np.float64]
_SINGLE = {"interpolation": "t", "scale": "scale"}
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
class WarmStart:
    """A candidate that is evaluated first; ``genome`` is None where the space cannot express it."""

    label: str
    genome: Genome | None
    recipe: Recipe


@dataclass(frozen=True)
class JobSpace(SearchSpace, ABC):
    """A space of a job: its genomes stand for recipes. One of no fixed length has no variables, and clips by itself.

    Attributes:
        problem: the job's inputs.
    """

    problem: Problem

    @abstractmethod
    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome to the recipe it stands for; raises `InvalidInput` for one of the wrong length."""

    @abstractmethod
    def adopt(self, recipe: Recipe) -> Genome | None:
        """Return a genome whose recipe gives the same weights as ``recipe``; None where the space has none.

        It may lie outside the bounds. Only forms that searches write need be recognised.
        """

    @abstractmethod
    def uniform(self) -> Genome:
        """Return the uniform merge, or the nearest there is, inside the bounds: where searches start."""

    def point(self, coefficients: dict[str, float | list[float]]) -> Genome:
        """Return the genome with these coefficients; raises `InvalidInput` where the space has none."""
        del coefficients
        raise InvalidInput(
            "this search space has no coefficients",
            field="coefficients",
            remedy="give a genome or a recipe",
        )

    def values(self, given: dict[str, Scalar]) -> Genome:
        """Return the genome of these values of a job's parameters; raises `InvalidInput` where it has none."""
        del given
        raise InvalidInput(
            "this job has no parameters", field="values", remedy="give coefficients, a genome or a recipe"
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
        elif candidate.values is not None:
            genome = self.values(candidate.values)
        else:
            genome = self.point(candidate.coefficients or {})
        if genome.shape == (self.dim,):
            self._check_bounds(genome)
        return genome, self.recipe(genome)

    def warm_starts(self, spec: JobSpec) -> list[WarmStart]:
        """Return what is evaluated first, as ``spec.warm_starts`` asks: models alone, and the uniform merge.

        They have a genome where the space can express them.
        """
        wanted = spec.warm_starts
        names = [name for name in self.problem.models if (wanted.base if name == "base" else wanted.experts)]
        if not self.problem.alone:
            names = []
        if not self.problem.operator.uses_base:
            names = [name for name in names if name != "base"]
        out = [self._alone(name) for name in names]
        if wanted.uniform:
            genome = self.uniform()
            out.append(WarmStart("uniform", genome, self.recipe(genome)))
        return out

    def _alone(self, name: str) -> WarmStart:
        """A model as it is."""
        recipe = Recipe(models=self.problem.models, root=Leaf(model=name))
        genome = self.adopt(recipe)
        return WarmStart(name, genome, recipe if genome is None else self.recipe(genome))

    def _foreign(self, data: dict[str, Any]) -> Recipe:
        recipe = Recipe.parse(data)
        for name, model in recipe.models.items():
            known = self.problem.models.get(name)
            same = known is not None and known.vocabulary == model.vocabulary
            if known is None or not same or known.digest not in (model.digest, UNKNOWN_DIGEST):
                raise InvalidInput(
                    f"model {name!r} is not the job's",
                    field=f"recipe.models.{name}",
                    remedy="use the job's own models",
                )
        if recipe.calibration is None and self.problem.calibration:
            recipe = recipe.model_copy(update={"calibration": self.problem.calibration})
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

    @property
    def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Labels of the groups and of the columns of the table that the UI shows; empty where there is none."""
        return (), ()


@dataclass(frozen=True)
class Varied:
    """An option that the search varies: a table of variables, row by row.

    Attributes:
        name: the option's.
        rows: 1, or one for each coefficient group.
        cols: 1, or one for each expert.
        modifier: number of the modifier whose option it is; None for the operator's.
    """

    name: str
    rows: int = 1
    cols: int = 1
    modifier: int | None = None


@dataclass(frozen=True)
class MergeSpace(JobSpace):
    """Coefficients (group by group, expert by expert), then the variable options.

    Attributes:
        groups: the coefficient groups.
        columns: names of the coefficients in a group: the experts, ``("t",)`` or ``("scale",)``.
        varied: the variable options, in the order of their variables.
        fixed: the operator's fixed options; a list has a value for each expert.
        modifiers: what changes the experts or the result, with its fixed options.
    """

    groups: tuple[Selector, ...] = ()
    columns: tuple[str, ...] = ()
    varied: tuple[Varied, ...] = ()
    fixed: dict[str, Scalar | list[float]] = field(default_factory=dict)
    modifiers: tuple[tuple[Modifier, dict[str, Scalar]], ...] = ()

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
        values = [
            variable.read(number)
            for variable, number in zip(self.variables[rows * cols :], genome[rows * cols :].tolist(), strict=True)
        ]
        read, begin = {}, 0
        for varied in self.varied:
            end = begin + varied.rows * varied.cols
            read[varied] = values[begin:end]
            begin = end
        return self._recipe(coefficients, read)

    def _recipe(self, coefficients: list[list[float]], read: Mapping[Varied, list[Scalar]]) -> Recipe:
        options, tables = self._options(read)
        node: Leaf | Merge = Merge(
            operator=self.problem.operator.name,
            options=options,
            base=Leaf(model="base"),
            inputs=[self._modified(Leaf(model=name), "experts", read) for name in self._inputs()],
            groups=list(self.groups),
            coefficients=coefficients,
            tables=tables or None,
        )
        root = self._modified(node, "merged", read)
        return Recipe(models=self.problem.models, root=root, calibration=self.problem.calibration or None)

    def _options(self, read: Mapping[Varied, list[Scalar]]) -> tuple[dict[str, Scalar], dict[str, list[list[float]]]]:
        """The operator's options: those that are the same everywhere, and the tables of the others."""
        rows = len(self.groups)
        options = {name: value for name, value in self.fixed.items() if not isinstance(value, list)}
        tables = {name: [value] * rows for name, value in self.fixed.items() if isinstance(value, list)}
        for varied, values in read.items():
            if varied.modifier is not None:
                continue
            if (varied.rows, varied.cols) == (1, 1):
                options[varied.name] = values[0]
            else:
                numbers = [float(value) for value in values]
                table = [numbers[row * varied.cols : (row + 1) * varied.cols] for row in range(varied.rows)]
                tables[varied.name] = table if varied.rows == rows else table * rows
        return dict(sorted(options.items())), dict(sorted(tables.items()))

    def _modified(self, node: Leaf | Merge, target: str, read: Mapping[Varied, list[Scalar]]) -> Leaf | Merge:
        """``node`` behind the modifiers of the experts, or of the merged model. The base itself is never modified."""
        if node == Leaf(model="base"):
            return node
        for number, (modifier, fixed) in enumerate(self.modifiers):
            if modifier.target == target:
                values = {varied.name: values[0] for varied, values in read.items() if varied.modifier == number}
                node = Merge(
                    operator=modifier.operator,
                    options=dict(sorted((fixed | values).items())),
                    base=Leaf(model="base"),
                    inputs=[node],
                    groups=[Selector()],
                    coefficients=[[1.0]],
                )
        return node

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

    def warm_starts(self, spec: JobSpec) -> list[WarmStart]:
        """Return what is evaluated first, as ``spec.warm_starts`` asks.

        Where an operator has no coefficient of its own for an expert, or modifiers change the experts, each expert
        stands as it is, without a genome.
        """
        wanted = spec.warm_starts
        out: list[WarmStart] = []
        for name, values in self._points().items():
            if not (wanted.base if name == "base" else wanted.experts) or not self.problem.alone:
                continue
            if values is None:
                out.append(WarmStart(name, None, Recipe(models=self.problem.models, root=Leaf(model=name))))
            else:
                out.append(self._start(name, self.point(values)))
        if wanted.uniform:
            out.append(self._start("uniform", self.point(self._middle())))
        return out

    def uniform(self) -> Genome:
        """Return the uniform merge, moved inside the bounds: where searches start."""
        return self.clip(self.point(self._middle()))

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: models alone, and merges by the same operator over the same groups."""
        node = recipe.root
        if recipe.layers is not None or self.modifiers:
            return None
        if isinstance(node, Leaf):
            values = self._points().get(node.model) if node.layer is None else None
            return None if values is None else self.point(values)
        return self._adopt_merge(node)

    def _adopt_merge(self, node: Merge) -> Genome | None:
        names = [child.model for child in node.inputs if isinstance(child, Leaf) and child.layer is None]
        same = node.operator == self.problem.operator.name and node.base == Leaf(model="base")
        if not same or node.groups != list(self.groups) or len(names) != len(node.inputs):
            return None
        columns = list(self.columns)
        if len(self.columns) == len(node.coefficients[0]) == 1:
            if names != self._inputs():
                return None
        elif set(names) <= set(columns):
            columns = names
        else:
            return None
        point = dict(zip(columns, np.array(node.coefficients).T.tolist(), strict=True))
        genome = self.point(point)
        options = self._numbers(node)
        if options is None:
            return None
        genome[len(self.groups) * len(self.columns) :] = options
        found = self.recipe(genome).root
        kept = isinstance(found, Merge) and (found.options, found.tables) == (node.options, node.tables)
        return genome if kept else None

    def _numbers(self, node: Merge) -> list[float] | None:
        """What stands in the genome for the options of ``node``; None if it lacks one."""
        numbers: list[float] = []
        begin = len(self.groups) * len(self.columns)
        for varied in self.varied:
            if (varied.rows, varied.cols) == (1, 1):
                values: list[Any] = [node.options.get(varied.name)]
            else:
                values = [value for row in (node.tables or {}).get(varied.name, [])[: varied.rows] for value in row]
            if len(values) != varied.rows * varied.cols:
                return None
            for value in values:
                variable = self.variables[begin + len(numbers)]
                if value is None or (variable.kind == "choice" and value not in variable.choices):
                    return None
                numbers.append(variable.choices.index(value) + 0.5 if variable.kind == "choice" else float(value))
        return numbers

    @property
    def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `JobSpace.axes`."""
        return tuple(group.label for group in self.groups), self.columns

    def _inputs(self) -> list[str]:
        experts = [name for name in self.problem.models if name != "base"]
        return _endpoints(experts) if self.columns == ("t",) else experts

    def _start(self, label: str, genome: Genome) -> WarmStart:
        return WarmStart(label, genome, self.recipe(genome))

    def _points(self) -> dict[str, dict[str, float | list[float]] | None]:
        """The coefficients at which each model stands alone; None where there are none."""
        experts = [name for name in self.problem.models if name != "base"]
        if self.columns == ("t",) and not self.modifiers:
            first, last = _endpoints(experts)
            return {first: {"t": 0.0}, last: {"t": 1.0}}
        points: dict[str, dict[str, float | list[float]] | None] = (
            {"base": {}} if self.problem.operator.uses_base else {}
        )
        alone = self.columns not in (("scale",), ("t",)) and not self.modifiers
        return points | {name: {name: 1.0} if alone else None for name in experts}

    def _middle(self) -> dict[str, float | list[float]]:
        if self.columns in (("t",), ("scale",)):
            return {"t": 0.5} if self.columns == ("t",) else {"scale": 1.0}
        return dict.fromkeys(self.columns, 1.0 / len(self.columns))


MakeSpace = Callable[[JobSpec, Problem, Any], JobSpace]
OperatorOptions = Mapping[str, Scalar | list[float] | RangeVariable | ChoiceVariable]
NamedOperators = Callable[[Any], Sequence[tuple[str, OperatorOptions]]]


@dataclass(frozen=True)
class SpaceKind:
    """A registered form of search space.

    Attributes:
        name: what `SpaceSpec.name` says.
        summary: one sentence.
        reference: paper or origin, with its year.
        options: model of its options.
        make: makes it; raises `InvalidInput` naming the field.
        operators: from its options to the operators that they name, each with its options.
    """

    name: str
    summary: str
    reference: str
    options: type[Strict]
    make: MakeSpace
    operators: NamedOperators


SPACES: Registry[SpaceKind] = Registry("search space", "optimizer.spaces")


def search_space(
    name: str, *, summary: str, reference: str, options: type[Strict], operators: NamedOperators = lambda _: ()
) -> Callable[[MakeSpace], MakeSpace]:
    """Register a form of search space under ``name``; the function is called with spec, problem and options.

    What ``operators`` names stands in ``problem.operators`` then.
    """

    def decorate(make: MakeSpace) -> MakeSpace:
        SPACES.register(name)(SpaceKind(name, summary, reference, options, make, operators))
        return make

    return decorate


def make_space(spec: JobSpec, problem: Problem) -> JobSpace:
    """Make the search space of a job from its spec and its inputs.

    Raises:
        InvalidInput: the operator does not fit the number of experts, or nothing is left to search.
    """
    if spec.parameters:
        from optimizer.parameter_space import make_parameter_space  # which builds on this module

        return make_parameter_space(spec, problem)
    if spec.merge.space is None:
        return make_merge_space(spec, problem)
    kind, options = _space_kind(spec.merge.space)
    return kind.make(spec, problem, options)


def named_operators(spec: JobSpec) -> Sequence[tuple[str, OperatorOptions]]:
    """Return the operators, with their options, that the search space of a job names besides the job's own."""
    if spec.merge.space is None:
        return ()
    kind, options = _space_kind(spec.merge.space)
    return kind.operators(options)


def _space_kind(chosen: SpaceSpec) -> tuple[SpaceKind, Strict]:
    kind = SPACES.find(chosen.name, "merge.space.name")
    try:
        return kind, kind.options.model_validate(chosen.options)
    except ValidationError as error:
        raise from_validation(error, "merge.space.options") from error


def make_merge_space(spec: JobSpec, problem: Problem) -> MergeSpace:
    """Make the space of an operator's coefficients and variable options; see `make_space`."""
    groups = make_groups(spec.merge.granularity, problem.layout, spec.merge.frozen)
    if not groups:
        raise InvalidInput("every module kind is frozen", field="merge.frozen", remedy="leave something to merge")
    operator = problem.operator
    experts = problem.experts
    columns = tuple(experts) if operator.columns == "per_expert" else (_SINGLE[operator.columns],)
    bounds = spec.merge.bounds
    low, high = (bounds.low, bounds.high) if bounds else (operator.low, operator.high)
    variables = [Variable(f"{column} @ {group.label}", low, high) for group in groups for column in columns]
    varied: list[Varied] = []
    fixed: dict[str, Scalar | list[float]] = {}
    for name, value in spec.merge.options.items():
        if isinstance(value, RangeVariable | ChoiceVariable):
            found, more = _varied(name, value, groups, experts)
            varied.append(found)
            variables += more
        elif isinstance(value, list) and len(value) != len(experts):
            raise InvalidInput(
                f"{len(value)} numbers given for {len(experts)} experts",
                field=f"merge.options.{name}",
                remedy="give one number, or one for each expert",
            )
        else:
            fixed[name] = value
    modifiers = []
    for number, modifier in enumerate(spec.merge.modifiers):
        own: dict[str, Scalar] = {}
        for name, value in modifier.options.items():
            if isinstance(value, RangeVariable | ChoiceVariable):
                varied.append(Varied(name, modifier=number))
                variables.append(make_variable(f"{modifier.operator} ({modifier.target}) {name}", value))
            else:
                own[name] = value
        modifiers.append((modifier, own))
    return MergeSpace(
        tuple(variables), problem, tuple(groups), columns, tuple(varied), fixed, modifiers=tuple(modifiers)
    )


def _varied(
    name: str, value: RangeVariable | ChoiceVariable, groups: Sequence[Selector], experts: Sequence[str]
) -> tuple[Varied, list[Variable]]:
    """An operator's variable option and its variables."""
    where = [group.label for group in groups] if isinstance(value, RangeVariable) and value.per_group else [""]
    whose = list(experts) if isinstance(value, RangeVariable) and value.per_expert else [""]
    variables = [
        make_variable(name + (f" of {expert}" if expert else "") + (f" @ {label}" if label else ""), value)
        for label in where
        for expert in whose
    ]
    return Varied(name, len(where), len(whose)), variables


def make_variable(name: str, value: RangeVariable | ChoiceVariable) -> Variable:
    """Return the variable that a spec declares."""
    if isinstance(value, ChoiceVariable):
        return Variable(name, 0.0, float(len(value.choices)), "choice", tuple(value.choices))
    return Variable(name, value.low, value.high, "integer" if value.integer else "real")


def make_groups(granularity: Granularity, layout: Layout, frozen: Sequence[ModuleKind] = ()) -> list[Selector]:
    """Return the coefficient groups: layer groups × module groups, those without any parameter left out."""
    if granularity.layers == "tensors":
        return [Selector(tensors=[tensor.name]) for tensor in layout.shared if tensor.kind not in frozen]
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
