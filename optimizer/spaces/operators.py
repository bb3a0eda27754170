"""An operator of its own for every group of parameters, with its coefficients and options: layer-wise fusion search.

Differences from the papers' code: an operator is chosen for each coefficient group (layer group × module set), not for
all module sets of a layer group together, and slerp takes the two experts with the largest scores of the group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from optimizer.errors import InvalidInput
from optimizer.problem import OperatorInfo, Problem
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.space import Genome, JobSpace, OperatorOptions, Variable, WarmStart, make_groups, search_space
from optimizer.spec import Bounds, ChoiceVariable, JobSpec, RangeVariable, Scalar, Strict
from optimizer.structured import SMALLEST_SUM, choice, experts_of, read, refuse_ignored, same

_ADDITIVE = ("linear", "task_arithmetic")
"""Operators in which a coefficient of 1 for one expert and 0 for the others gives that expert itself."""


class OperatorChoice(Strict):
    """An operator that a group of parameters may be merged with."""

    operator: str = Field(description="One that needs the models' weights only; GET /api/v1/operators lists them.")
    options: dict[str, Scalar | RangeVariable | ChoiceVariable] = Field(
        default_factory=dict,
        max_length=32,
        description="Its options; {low, high} or {choices} makes one a variable, with a value of its own in each group.",
        examples=[{"density": {"low": 0.01, "high": 1.0}}],
    )
    coefficients: Literal["each", "one"] | float | None = Field(
        default=None,
        description=(
            "A variable for `each` expert, `one` for all of them, or a number that is fixed. By default `each`, and `one` "
            "for operators that have one. Those that run between two models have a score for each expert: the two with the "
            "largest are taken, at the softmax of their scores."
        ),
    )
    bounds: Bounds | None = Field(
        default=None, description="Bounds of the coefficients; `merge.bounds` or the operator's own by default."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:  # a bare string is the operator
        return {"operator": value} if isinstance(value, str) else value


_UNIT = Bounds(low=0.0, high=1.0)
_SHARE = RangeVariable(low=0.01, high=1.0)
_USUAL = [
    OperatorChoice(operator="linear", bounds=_UNIT),
    OperatorChoice(operator="task_arithmetic", coefficients="one", bounds=_UNIT),
    OperatorChoice(
        operator="ties", coefficients=1.0, options={"scale": RangeVariable(low=0.0, high=1.0), "density": _SHARE}
    ),
    OperatorChoice(operator="slerp", bounds=_UNIT),
]


class OperatorsOptions(Strict):
    """Options of `operators`."""

    operators: list[OperatorChoice] = Field(
        default=_USUAL,
        min_length=1,
        max_length=16,
        description="The operators to choose from; by default the papers': linear, task_arithmetic, ties and slerp.",
        examples=[["linear", {"operator": "ties", "options": {"density": {"low": 0.1, "high": 1.0}}}]],
    )


@dataclass(frozen=True)
class Part:
    """The variables of one operator in a group.

    Attributes:
        choice: as the user gave it.
        info: of the operator.
        label: unique among the operators.
        columns: the experts that have a coefficient, ``("",)`` for one in common; empty for a fixed one.
        begin: where its variables begin among those of a group.
        varied: its variable options, which follow the coefficients.
    """

    choice: OperatorChoice
    info: OperatorInfo
    label: str
    columns: tuple[str, ...]
    begin: int
    varied: tuple[str, ...]

    @property
    def end(self) -> int:
        """Where its variables end."""
        return self.begin + len(self.columns) + len(self.varied)


@dataclass(frozen=True)
class _Row:
    """What a group of parameters is merged with; groups with the same ``key`` share a node."""

    part: int
    inputs: tuple[str, ...]
    options: tuple[tuple[str, Scalar], ...]
    coefficients: list[float]
    tables: dict[str, float]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.part, self.inputs, tuple((name, repr(value)) for name, value in self.options)


@dataclass(frozen=True)
class OperatorSpace(JobSpace):
    """For each group the operator, then the coefficients and options of all of them; those not chosen count for nothing.

    Attributes:
        groups: the coefficient groups.
        parts: the operators.
        mixed: the models that an interpolation runs between two of.
    """

    groups: tuple[Selector, ...] = ()
    parts: tuple[Part, ...] = ()
    mixed: tuple[str, ...] = ()

    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome: a node for each operator in use, chained so that each group costs its own operator only."""
        values = read(self, genome)
        width = len(self.variables) // len(self.groups)
        found: dict[tuple[Any, ...], list[tuple[Selector, _Row]]] = {}
        for number, group in enumerate(self.groups):
            row = self._row(values[number * width : (number + 1) * width])
            found.setdefault(row.key, []).append((group, row))
        root: Leaf | Merge | None = None
        for key in sorted(found, key=str):
            root = _behind(root, self._node(found[key]))
        return Recipe(models=self.problem.models, root=root or Leaf(model="base"))

    def _row(self, values: Sequence[Scalar]) -> _Row:
        number = int(values[0])
        part = self.parts[number]
        own = values[part.begin : part.end]
        numbers, varied = [float(value) for value in own[: len(part.columns)]], own[len(part.columns) :]
        options: dict[str, Scalar] = {
            name: value
            for name, value in part.choice.options.items()
            if not isinstance(value, RangeVariable | ChoiceVariable)
        }
        tables: dict[str, float] = {}
        for name, value in zip(part.varied, varied, strict=True):
            given = part.choice.options[name]
            if isinstance(given, ChoiceVariable):
                options[name] = given.choices[int(value)]
            else:
                tables[name] = float(value)
        inputs, coefficients = self._coefficients(part, numbers)
        return _Row(number, inputs, tuple(sorted(options.items())), coefficients, tables)

    def _coefficients(self, part: Part, numbers: list[float]) -> tuple[tuple[str, ...], list[float]]:
        experts = experts_of(self.problem)
        if part.info.columns == "interpolation":
            return self._pair(part, numbers)
        size = len(experts) if part.info.columns == "per_expert" else 1
        numbers = numbers or [float(part.choice.coefficients or 0.0)]
        numbers = numbers * size if len(numbers) == 1 else numbers
        average = part.info.columns == "per_expert" and not part.info.uses_base
        if average and abs(math.fsum(numbers)) < SMALLEST_SUM:
            numbers = [1.0 / size] * size
        return tuple(experts), numbers

    def _pair(self, part: Part, numbers: list[float]) -> tuple[tuple[str, ...], list[float]]:
        """The two models with the largest scores, in the job's order, and the softmax weight of the second."""
        if len(part.columns) <= 1:
            first, second = len(self.mixed) - 2, len(self.mixed) - 1
            t = numbers[0] if numbers else float(part.choice.coefficients or 0.0)
            return (self.mixed[first], self.mixed[second]), [t]
        first, second = sorted(sorted(range(len(numbers)), key=lambda number: -numbers[number])[:2])
        t = 1.0 / (1.0 + math.exp(numbers[first] - numbers[second]))
        return (self.mixed[first], self.mixed[second]), [t]

    def _node(self, rows: Sequence[tuple[Selector, _Row]]) -> Merge:
        first = rows[0][1]
        return Merge(
            operator=self.parts[first.part].info.name,
            options=dict(first.options),
            base=Leaf(model="base"),
            inputs=[Leaf(model=name) for name in first.inputs],
            groups=[group for group, _ in rows],
            coefficients=[row.coefficients for _, row in rows],
            tables={name: [[row.tables[name]] for _, row in rows] for name in sorted(first.tables)} or None,
        )

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: models alone where linear or task_arithmetic may say so, and its own recipes."""
        if recipe.layers is not None:
            return None
        if isinstance(recipe.root, Leaf):
            return self._model(recipe.root) if recipe.root.layer is None else None
        genome = self.uniform()
        known = {group.model_dump_json(): number for number, group in enumerate(self.groups)}
        for node in _nodes(recipe.root):
            for number, group in enumerate(node.groups or ()):
                row = known.get(group.model_dump_json())
                if row is None or not self._write(genome, row, node, number):
                    return None
        return genome if same(self.recipe(genome), recipe) else None

    def _model(self, leaf: Leaf) -> Genome | None:
        """A model alone; the base as task vectors with coefficients of 0."""
        names = ("task_arithmetic",) if leaf.model == "base" else _ADDITIVE
        wanted: dict[str, float | list[float]] = {} if leaf.model == "base" else {leaf.model: 1.0}
        for number, part in enumerate(self.parts):
            able = leaf.model in part.columns or (leaf.model == "base" and part.columns)
            if part.info.name in names and able and (leaf.model == "base" or self._complete):
                return self._everywhere(number, wanted)
        return None

    def _write(self, genome: Genome, group: int, node: Merge, row: int) -> bool:
        """Write one row of a node into the genome; returns whether any operator here has such rows."""
        for number, part in enumerate(self.parts):
            numbers = self._numbers(part, node, row) if part.info.name == node.operator else None
            if numbers is not None:
                begin = group * (self.dim // len(self.groups))
                genome[begin] = number + 0.5
                genome[begin + part.begin : begin + part.end] = numbers
                return True
        return False

    def _numbers(self, part: Part, node: Merge, row: int) -> list[float] | None:
        numbers: list[float] | None = list(node.coefficients[row])
        if part.info.columns == "interpolation":
            names = [child.model for child in node.inputs if isinstance(child, Leaf)]
            numbers = self._scores(part, names, node.coefficients[row][0])
        elif len(part.columns) < 2:
            numbers = node.coefficients[row][: len(part.columns)]
        tables = {name: table[row][0] for name, table in (node.tables or {}).items()}
        options = _option_numbers(part, node.options | tables)
        if numbers is None or options is None or len(numbers) != len(part.columns):
            return None
        return numbers + options

    def _scores(self, part: Part, names: Sequence[str], t: float) -> list[float] | None:
        """Scores of all models whose softmax gives ``t`` between these two."""
        if len(part.columns) <= 1:
            return [t][: len(part.columns)]
        if not 0 < t < 1 or len(names) != 2 or not set(names) <= set(self.mixed):
            return None
        apart = math.log(t) - math.log1p(-t)
        bounds = self._bounds(part)
        scores = dict.fromkeys(self.mixed, bounds.low)
        scores[names[0]], scores[names[1]] = bounds.high - max(apart, 0.0), bounds.high + min(apart, 0.0)
        return list(scores.values())

    def _bounds(self, part: Part) -> Bounds:
        first = self.variables[part.begin]
        return Bounds(low=first.low, high=first.high)

    def point(self, coefficients: dict[str, float | list[float]]) -> Genome:
        """See `JobSpace.point`: of the first operator that has a coefficient for each expert."""
        number = self._tabular
        if number is None:
            return super().point(coefficients)
        for name, value in coefficients.items():
            if name not in self.parts[number].columns:
                raise InvalidInput(
                    f"{name!r} has no coefficient here",
                    field="coefficients",
                    remedy=f"use: {', '.join(self.parts[number].columns)}",
                )
            if isinstance(value, list) and len(value) != len(self.groups):
                raise InvalidInput(
                    f"{len(value)} numbers given, the job has {len(self.groups)} coefficient groups",
                    field=f"coefficients.{name}",
                )
        return self._everywhere(number, coefficients)

    def uniform(self) -> Genome:
        """See `JobSpace.uniform`: the first operator everywhere, with equal coefficients."""
        return self._everywhere(0, None)

    def _everywhere(self, number: int, coefficients: Mapping[str, float | list[float]] | None) -> Genome:
        """One operator in all groups; the others' variables, and its own without ``coefficients``, as in `uniform`."""
        width = self.dim // len(self.groups)
        genome = _middle(self.variables)
        table = genome.reshape(len(self.groups), width)
        table[:, 0] = number + 0.5
        for part in self.parts:
            columns = slice(part.begin, part.begin + len(part.columns))
            share = 1.0 / len(experts_of(self.problem))
            scaled = part.info.columns == "scale"
            if part.info.columns == "per_expert" or scaled:
                table[:, columns] = 1.0 if scaled else share
        genome[:] = self.clip(genome)
        part = self.parts[number]
        if coefficients is not None:
            for column, name in enumerate(part.columns):
                table[:, part.begin + column] = coefficients.get(name, 0.0)
        return genome

    def warm_starts(self, spec: JobSpec) -> list[WarmStart]:
        """See `JobSpace.warm_starts`; with the uniform merge comes one by each other operator."""
        out = super().warm_starts(spec)
        if spec.warm_starts.uniform:
            for number, part in enumerate(self.parts[1:], start=1):
                genome = self._everywhere(number, None)
                out.append(WarmStart(f"uniform {part.label}", genome, self.recipe(genome)))
        return out

    @property
    def _complete(self) -> bool:
        return all(any(group.matches(tensor) for group in self.groups) for tensor in self.problem.layout.shared)

    @property
    def _tabular(self) -> int | None:
        experts = tuple(experts_of(self.problem))
        tables = (
            n for n, part in enumerate(self.parts) if part.info.columns == "per_expert" and part.columns == experts
        )
        return next(tables, None)

    @property
    def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `JobSpace.axes`: groups and experts, where an operator has a coefficient for each of them."""
        if self._tabular is None:
            return (), ()
        return tuple(group.label for group in self.groups), self.parts[self._tabular].columns


def _behind(root: Leaf | Merge | None, node: Merge) -> Merge:
    """``node`` in its groups, ``root`` in all others. What is in a group costs nothing of the other operators.

    Nodes are not each other's base: their task vectors are relative to the job's base.
    """
    if root is None:
        return node
    return Merge(
        operator="linear", base=root, inputs=[node], groups=node.groups, coefficients=[[1.0]] * len(node.coefficients)
    )


def _nodes(root: Merge) -> Iterator[Merge]:
    """The nodes that `_behind` put together."""
    node: Leaf | Merge = root
    while isinstance(node, Merge):
        child = node.inputs[0]
        if node.operator != "linear" or len(node.inputs) > 1 or not isinstance(child, Merge):
            yield node
            return
        yield child
        node = node.base


def _option_numbers(part: Part, found: Mapping[str, Scalar]) -> list[float] | None:
    """What stands in the genome for the options of a node; None where they are not such as the part has."""
    numbers = []
    for name, given in part.choice.options.items():
        value = found.get(name)
        if isinstance(given, ChoiceVariable) and value in given.choices:
            numbers.append(given.choices.index(value) + 0.5)
        elif isinstance(given, RangeVariable) and value is not None:
            numbers.append(float(value))
        elif value != given:
            return None
    return numbers


def _middle(variables: Sequence[Variable]) -> Genome:
    return np.array([(variable.low + variable.high) / 2 for variable in variables])


def _named(options: OperatorsOptions) -> list[tuple[str, OperatorOptions]]:
    return [(wanted.operator, wanted.options) for wanted in options.operators]


@search_space(
    "operators",
    summary="An operator of its own for each group of layers and modules, with its coefficients and options.",
    reference="Su and Geiping 2025, Fine, I'll Merge It Myself, arXiv 2502.04030; MedSAMix 2025, arXiv 2508.11032",
    options=OperatorsOptions,
    operators=_named,
)
def make(spec: JobSpec, problem: Problem, options: OperatorsOptions) -> OperatorSpace:
    """Make the space; see `optimizer.space.search_space`."""
    refuse_ignored(spec, "operators", ("operator", "options", "modifiers"))
    groups = make_groups(spec.merge.granularity, problem.layout, spec.merge.frozen)
    if not groups:
        raise InvalidInput("every module kind is frozen", field="merge.frozen", remedy="leave something to merge")
    experts = experts_of(problem)
    mixed = experts if len(experts) > 1 else ["base", *experts]
    parts: list[Part] = []
    names: list[tuple[str, Variable]] = []
    for wanted in options.operators:
        part, own = _part(spec, problem, wanted, mixed, 1 + len(names))
        repeated = sum(earlier.info.name == part.info.name for earlier in parts)
        part = replace(part, label=f"{part.label} {repeated + 1}") if repeated else part
        parts.append(part)
        names += [(f"{part.label} {name}", variable) for name, variable in own]
    within = [("operator", choice("operator", [part.label for part in parts])), *names]
    variables = [replace(variable, name=f"{name} @ {group.label}") for group in groups for name, variable in within]
    return OperatorSpace(tuple(variables), problem, tuple(groups), tuple(parts), tuple(mixed))


def _part(
    spec: JobSpec, problem: Problem, wanted: OperatorChoice, mixed: Sequence[str], begin: int
) -> tuple[Part, list[tuple[str, Variable]]]:
    """An operator and its variables with their short names."""
    info = _info(problem, wanted.operator)
    columns = _columns(wanted, info, experts_of(problem), mixed)
    bounds = wanted.bounds or spec.merge.bounds or Bounds(low=info.low, high=info.high)
    single = {"per_expert": "coefficient", "interpolation": "t", "scale": "scale"}[info.columns]
    variables = [(name or single, Variable(name, bounds.low, bounds.high)) for name in columns]
    varied = []
    for name, value in wanted.options.items():
        if isinstance(value, ChoiceVariable):
            variables.append((name, choice(name, [str(each) for each in value.choices])))
        elif isinstance(value, RangeVariable):
            if value.per_expert:
                raise InvalidInput(
                    "an option has one value in each group here",
                    field="merge.space.options.operators",
                    remedy="leave out `per_expert`",
                )
            kind: Literal["integer", "real"] = "integer" if value.integer else "real"
            variables.append((name, Variable(name, value.low, value.high, kind)))
        else:
            continue
        varied.append(name)
    return Part(wanted, info, info.name, columns, begin, tuple(varied)), variables


def _info(problem: Problem, name: str) -> OperatorInfo:
    info = problem.operators.get(name)
    if info is None:
        raise InvalidInput(f"nothing is known of the operator {name!r}", field="merge.space.options.operators")
    count = len(problem.models) - 1
    most = count if info.max_experts is None or info.columns == "interpolation" else info.max_experts
    if not info.min_experts <= count <= most:
        raise InvalidInput(
            f"{name} does not merge {count} experts",
            field="merge.space.options.operators",
            remedy="leave it out, or choose other experts",
        )
    return info


def _columns(
    wanted: OperatorChoice, info: OperatorInfo, experts: Sequence[str], mixed: Sequence[str]
) -> tuple[str, ...]:
    if isinstance(wanted.coefficients, float):
        return ()
    if wanted.coefficients == "one" or info.columns == "scale":
        return ("",)
    return tuple(mixed if info.columns == "interpolation" else experts)
