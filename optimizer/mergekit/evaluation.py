"""A configuration's settings evaluated parameter by parameter: gradients along the layers, conditions on names."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, ModuleKind, Position, TensorInfo
from optimizer.mergekit.format import Configuration, Range, Reference, Settings, Source, evaluate, number
from optimizer.mergekit.methods import METHODS, Parameter, Value, to_ours
from optimizer.mergekit.references import model_names
from optimizer.recipe import Leaf, Merge, Selector
from optimizer.spec import Scalar

_NUMBER = re.compile(r"\.(\d+)\.")
_FLAGS = {"true": True, "false": False}
_SMALLEST_SUM, _SMALLEST_SHARE = 1e-8, 1e-6  # mergekit leaves smaller sums undivided


@dataclass(frozen=True)
class Part:
    """A slice, with what its settings are looked up in, and the depth at which it begins in the result."""

    sources: tuple[Source, ...]
    base: Reference | None
    scopes: tuple[Settings, ...]
    path: str
    begin: int = 0

    @property
    def length(self) -> int:
        """Layers."""
        return self.sources[0].layer_range[1] - self.sources[0].layer_range[0]

    @property
    def inputs_key(self) -> Hashable:
        """Which models it merges."""
        return tuple(source.model for source in self.sources), self.base

    @property
    def in_place(self) -> bool:
        """Whether its layers stand in all its models where they stand in the result."""
        return all(source.layer_range[0] == self.begin for source in self.sources)

    def t(self, offset: int) -> float:
        """How deep a layer stands in the slice; a slice of one layer is all the way down."""
        return offset / (self.length - 1) if self.length > 1 else 1.0


Where = Mapping[TensorInfo, tuple[Part, int]]
"""For each parameter the slice it belongs to, and the number of its layer in it."""


@dataclass
class _Row:
    """What a method computes one parameter with."""

    coefficients: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def key(self) -> Hashable:
        return self.coefficients, tuple(sorted(self.options.items()))


class Reader:
    """Evaluates a configuration for the parameters of a layout."""

    def __init__(self, configuration: Configuration, layout: Layout, names: Mapping[str, str]) -> None:
        self._configuration = configuration
        self._method = METHODS[configuration.merge_method]
        self._layout = layout
        self._raw = names
        self._names = model_names(configuration)
        self._depths = _depths(layout)

    def parts(self) -> list[Part]:
        """The slices; a list of models is one slice of all layers."""
        configuration, module = self._configuration, self._configuration.module
        common = (module.parameters, configuration.parameters)
        where = "mergekit" + (f".modules.{next(iter(configuration.modules))}" if configuration.modules else "")
        if module.slices:
            parts: list[Part] = []
            for place, part in enumerate(module.slices):
                begin = parts[-1].begin + parts[-1].length if parts else 0
                base = part.base_model or configuration.base_model
                scopes, path = (part.parameters, *common), f"{where}.slices.{place}"
                parts.append(self._checked(Part(tuple(part.sources), base, scopes, path, begin)))
            return parts
        everything = (0, self._layout.layers or 1)
        sources = [
            Source(model=entry.model, parameters=entry.parameters, layer_range=everything)
            for entry in module.models or []
        ]
        base = configuration.base_model
        if base is not None and base not in [source.model for source in sources]:
            sources.append(Source(model=base, layer_range=everything))
        return [self._checked(Part(tuple(sources), base, common, f"{where}.models"))]

    def _checked(self, part: Part) -> Part:
        models = [source.model for source in part.sources]
        if len(set(models)) != len(models):
            raise InvalidInput("a model stands twice among those merged with one another", field=part.path)
        method, name = self._method, self._configuration.merge_method
        if method.base == "required" and part.base not in models:
            raise InvalidInput(
                f"{name} needs a base among the models it merges",
                field="mergekit.base_model" if part.base is None else part.path,
                remedy="name one of them as base_model",
            )
        others = len(models) - (part.base in models)
        if method.others not in (None, others):
            raise InvalidInput(f"{name} merges {method.others} beside the base, not {others}", field=part.path)
        if name == "passthrough" and len(models) != 1:
            raise InvalidInput(f"passthrough takes one model, not {len(models)}", field=part.path)
        return part

    def node(self, where: Where) -> Leaf | Merge:
        """The node that computes some parameters, all from slices over the same models."""
        part = next(iter(where.values()))[0]
        rows = {tensor: self._row(tensor, *place) for tensor, place in where.items()}
        inputs: list[Leaf | Merge] = [self._leaf(source, where) for source in self._inputs(part)]
        if self._configuration.merge_method == "passthrough" and {row.coefficients for row in rows.values()} == {
            (1.0,)
        }:
            return inputs[0]
        groups, kept = _groups(rows)
        options, tables = self._options(kept, part.path)
        base = next((source for source in part.sources if source.model == part.base), None)
        return Merge(
            operator=self._method.operator,
            options=dict(sorted((options | dict(self._method.fixed)).items())),
            base=self._leaf(base, where) if base is not None else Leaf(model="base"),
            inputs=inputs,
            groups=groups,
            coefficients=[list(row.coefficients) for row in kept],
            tables=tables or None,
        )

    def outside(self, ends: Mapping[TensorInfo, Part]) -> Leaf | Merge:
        """The node for what stands before the first layer and after the last, from the first and the last slice."""
        by_key: dict[Hashable, list[TensorInfo]] = defaultdict(list)
        for tensor, part in ends.items():
            by_key[part.inputs_key].append(tensor)
        nodes = [self.node({tensor: (ends[tensor], 0) for tensor in tensors}) for tensors in by_key.values()]
        if not nodes:
            return Leaf(model="base")
        if len(nodes) == 1 or nodes[0] == nodes[1]:
            return nodes[0]
        return Merge(
            operator="linear",
            options={"normalise": False},
            base=Leaf(model="base"),
            inputs=nodes,
            groups=[Selector(positions=_in_order(tensor.position for tensor in found)) for found in by_key.values()],
            coefficients=[[1.0, 0.0], [0.0, 1.0]],
        )

    def _inputs(self, part: Part) -> list[Source]:
        if self._method.base == "input":
            return list(part.sources)
        others = [source for source in part.sources if source.model != part.base]
        if self._configuration.merge_method == "slerp":
            return [*(source for source in part.sources if source.model == part.base), *others]
        return others

    def _leaf(self, source: Source, where: Where) -> Leaf:
        """A source as a leaf; with its own layer where it does not stand beside the first source's."""
        layer = None
        for tensor, (part, offset) in where.items():
            own = source.layer_range[0] + offset
            if isinstance(tensor.position, int) and own != part.sources[0].layer_range[0] + offset:
                layer = own
        return Leaf(model=self._names[source.model], layer=layer)

    def _row(self, tensor: TensorInfo, part: Part, offset: int) -> _Row:
        sources = self._inputs(part)
        options: dict[str, Any] = {}
        coefficients: tuple[float, ...] = (1.0,) * (len(sources) if self._method.coefficients == "ones" else 1)
        for name, parameter in self._method.parameters.items():
            if parameter.role == "ignored":
                continue
            asked = sources if parameter.each else sources[:1]
            found = tuple(self._value(name, parameter, part, source, tensor, offset) for source in asked)
            if parameter.role == "option":
                options[parameter.option] = found if parameter.each else found[0]
            else:
                coefficients = found
        if self._method.folds:
            coefficients = _folded(coefficients, options)
        if self._method.coefficients == "share":
            total = sum(coefficients)
            coefficients = (0.5 if abs(total) < _SMALLEST_SHARE else coefficients[1] / total,)
        with_base = part.base in [source.model for source in part.sources]
        return _Row(coefficients, to_ours(self._configuration.merge_method, options, with_base))

    def _value(
        self, name: str, parameter: Parameter, part: Part, source: Source, tensor: TensorInfo, offset: int
    ) -> Any:
        scopes = (source.parameters, *part.scopes) if parameter.each else part.scopes
        seen = self._seen(tensor, offset + (source.layer_range[0] if parameter.each else part.begin))
        t = self._t(tensor, part, offset)
        for scope in scopes:
            if name in scope and (value := evaluate(scope[name], seen, t)) is not None:
                return typed(value, parameter, f"{part.path}.parameters.{name}")
        if parameter.role == "scale":
            return 1.0
        if parameter.default is None:
            whose = f" of {source.model}" if parameter.each else ""
            raise InvalidInput(f"no {name}{whose} is given for {seen}", field=f"{part.path}.parameters.{name}")
        return parameter.values.get(parameter.default, parameter.default)

    def _t(self, tensor: TensorInfo, part: Part, offset: int) -> float:
        if not isinstance(tensor.position, int):
            return 0.0
        if self._configuration.module.slices:
            return part.t(offset)
        number, depth = self._depths[tensor.name]  # every stack of layers is a module of its own
        return number / (depth - 1) if depth > 1 else 1.0

    def _seen(self, tensor: TensorInfo, layer: int) -> str:
        """The name that conditions look at: the parameter's in its own model, or in the result."""
        name = tensor.name
        if isinstance(tensor.position, int) and self._configuration.module.slices:
            name = _NUMBER.sub(f".{layer}.", name, count=1)
        return self._raw.get(name, name)

    def _options(self, rows: Sequence[_Row], path: str) -> tuple[dict[str, Scalar], dict[str, list[list[float]]]]:
        """Options that are the same everywhere, and tables of those that are not."""
        options: dict[str, Scalar] = {}
        tables: dict[str, list[list[float]]] = {}
        for name in rows[0].options:
            values = [row.options[name] for row in rows]
            each = [value if isinstance(value, tuple) else (value,) for value in values]
            distinct = {value for found in each for value in found}
            if len(distinct) == 1:
                options[name] = distinct.pop()
            elif not all(isinstance(value, float) for value in distinct):
                raise InvalidInput(f"{name} must be the same for all parameters", field=f"{path}.parameters")
            else:
                tables[name] = [list(found) for found in each]
        return options, dict(sorted(tables.items()))


def typed(value: Value | Range, parameter: Parameter, path: str) -> Any:
    """Return a setting's value in the type of its parameter, in our words.

    Raises:
        InvalidInput: it is of another type, or a range, which has no value.
    """
    if isinstance(value, Range):
        raise InvalidInput(
            "a range has no single value", field=path, remedy="import the file as a job, or give a number"
        )
    if parameter.kind is bool:
        flag = _FLAGS.get(str(value).lower())
        if flag is None:
            raise InvalidInput(f"{value!r} is neither true nor false", field=path)
        return parameter.values.get(flag, flag)
    found = number(value)
    if found is None or not math.isfinite(found) or (parameter.kind is int and not found.is_integer()):
        kind = "whole number" if parameter.kind is int else "number"
        raise InvalidInput(f"{value!r} is no {kind}", field=path)
    return int(found) if parameter.kind is int else found


def _folded(weights: tuple[float, ...], options: dict[str, Any]) -> tuple[float, ...]:
    """Coefficients with mergekit's ``normalize`` and ``lambda`` in them."""
    normalise, factor = options.pop("normalise"), options.pop("scale")
    total = sum(weights)
    divisor = total if normalise and abs(total) >= _SMALLEST_SUM else 1.0
    return tuple(weight / divisor * factor for weight in weights)


def _depths(layout: Layout) -> dict[str, tuple[int, int]]:
    """For each parameter inside a layer its number in its own stack of layers, and the stack's depth."""
    found = {
        tensor.name: (tensor.name[: match.start()], int(match[1]))
        for tensor in layout.shared
        if isinstance(tensor.position, int) and (match := _NUMBER.search(tensor.name))
    }
    depth: dict[str, int] = defaultdict(int)
    for stack, place in found.values():
        depth[stack] = max(depth[stack], place + 1)
    return {name: (place, depth[stack]) for name, (stack, place) in found.items()}


def _groups(rows: Mapping[TensorInfo, _Row]) -> tuple[list[Selector], list[_Row]]:
    """Groups of parameters with equal rows, by position and kind where that tells them apart, and their rows."""
    members: dict[Hashable, list[TensorInfo]] = defaultdict(list)
    for tensor, row in rows.items():
        members[row.key()].append(tensor)
    if len(members) == 1:
        return [Selector()], list(rows.values())[:1]
    cells: dict[tuple[Position, ModuleKind], set[Hashable]] = defaultdict(set)
    for tensor, row in rows.items():
        cells[tensor.position, tensor.kind].add(row.key())
    by_name = any(len(found) > 1 for found in cells.values())
    out: list[tuple[Selector, _Row]] = []
    for found in members.values():
        selectors = [Selector(tensors=[tensor.name for tensor in found])] if by_name else _rectangles(found, rows)
        out += [(selector, rows[found[0]]) for selector in selectors]
    return [selector for selector, _ in out], [row for _, row in out]


def _rectangles(tensors: Iterable[TensorInfo], everything: Iterable[TensorInfo]) -> list[Selector]:
    """Describe parameters by positions × kinds: positions with the same kinds go together."""
    kinds, present = _kinds_by_position(tensors), _kinds_by_position(everything)
    groups: dict[frozenset[ModuleKind] | None, list[Position]] = defaultdict(list)
    for position, found in kinds.items():
        groups[None if found == present[position] else frozenset(found)].append(position)
    return [
        Selector(
            positions=_in_order(positions) if len(positions) < len(present) else None,
            modules=sorted(found) if found is not None else None,
        )
        for found, positions in groups.items()
    ]


def _kinds_by_position(tensors: Iterable[TensorInfo]) -> dict[Position, set[ModuleKind]]:
    out: dict[Position, set[ModuleKind]] = defaultdict(set)
    for tensor in tensors:
        out[tensor.position].add(tensor.kind)
    return out


def _in_order(positions: Iterable[Position]) -> list[Position]:
    """Each position once: the input, the layers, the output."""
    found = set(positions)
    inside = sorted(place for place in found if isinstance(place, int))
    first: list[Position] = ["input"] if "input" in found else []
    last: list[Position] = ["output"] if "output" in found else []
    return [*first, *inside, *last]
