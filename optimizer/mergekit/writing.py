"""From a recipe to a mergekit configuration, where mergekit can express it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.mergekit.format import Condition, evaluate
from optimizer.mergekit.methods import METHODS, Method, Parameter, Value, to_theirs
from optimizer.problem import OperatorInfo
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe

_LAYER = re.compile(r"^(?P<head>.*?\.\d+\.)(?P<tail>.+)$")
_BY_OPERATOR = {method.operator: name for name, method in METHODS.items()}

Values = Mapping[TensorInfo, float]


def to_configuration(
    recipe: Recipe,
    layout: Layout,
    names: Mapping[str, str],
    references: Mapping[str, str],
    info: Callable[[str], OperatorInfo],
) -> dict[str, Any]:
    """Return the content of a ``mergekit.yml`` that gives the same model.

    Args:
        recipe: the merged model.
        layout: of its models.
        names: the checkpoints' own names of the layout's parameters by canonical name.
        references: what mergekit is to call each model: a path, ``org/name@revision``, or ``base+adapter``.
        info: describes operators: which options they have where a recipe leaves them out.

    Raises:
        InvalidInput: mergekit cannot express it; the message says why.
    """
    if any(tensor.role == "head" for tensor in layout.tensors):
        raise _not("the experts' heads stay their own, and mergekit merges every tensor")
    rules = {model.vocabulary.rule for model in recipe.models.values() if model.vocabulary is not None}
    writer = _Writer(recipe, layout, names, references, info)
    out = writer.arranged(recipe.layers) if recipe.layers is not None else writer.whole()
    kept = Counter(tensor.dtype for tensor in layout.shared).most_common(1)[0][0]
    out |= {"dtype": "float64" if kept == "F64" else "float32", "out_dtype": _DTYPES.get(kept, "float32")}
    return out | ({"tokenizer_source": rules.pop()} if rules else {})


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class _Writer:
    """Writes the nodes of one recipe."""

    def __init__(
        self,
        recipe: Recipe,
        layout: Layout,
        names: Mapping[str, str],
        references: Mapping[str, str],
        info: Callable[[str], OperatorInfo],
    ) -> None:
        self._recipe, self._layout, self._names, self._references, self._info = recipe, layout, names, references, info

    def whole(self) -> dict[str, Any]:
        """The file of a recipe without a layer plan."""
        node = _Plain(self._recipe.root, self._layout, self._layout.shared, self._info)
        models = [
            {"model": self._references[name], **_parameters(self._settings(node.each(name), {}))}
            for name in node.models
        ]
        out: dict[str, Any] = {"merge_method": node.method}
        if node.base is not None:
            out["base_model"] = self._references[node.base]
        return {**out, "models": models, **_parameters(self._settings(node.shared, {}))}

    def arranged(self, layers: Sequence[PlannedLayer]) -> dict[str, Any]:
        """The file of a recipe with a layer plan: a slice for each run of layers that are treated alike."""
        if any(planned.scale != 1.0 for planned in layers):
            raise _not("mergekit cannot scale what a layer adds to the residual stream by one number")
        slices: list[dict[str, Any]] = []
        methods: set[str] = set()
        bases: set[str | None] = set()
        for depth, planned in enumerate(layers):
            node = self._planned(depth, planned, layers)
            methods.add(node.method)
            bases.add(node.base)
            _append(slices, self._slice(node, planned, depth))
        if len(methods) > 1 or len(bases) > 1:
            raise _not("its layers are merged by different operators or over different bases")
        base = bases.pop()
        return {
            "merge_method": methods.pop(),
            **({"base_model": self._references[base]} if base is not None else {}),
            "slices": slices,
        }

    def _planned(self, depth: int, planned: PlannedLayer, layers: Sequence[PlannedLayer]) -> _Plain:
        """A layer's node; that of the first and the last also makes what stands outside the layers."""
        inside = [tensor for tensor in self._layout.shared if tensor.position == planned.layer]
        node = _Plain(planned.node or self._recipe.root, self._layout, inside, self._info)
        for end, place in (("input", 0), ("output", len(layers) - 1)):
            outside = [tensor for tensor in self._layout.shared if tensor.position == end]
            if depth == place and outside:
                other = _Plain(self._recipe.root, self._layout, outside, self._info)
                if (other.method, other.models, other.base) != (node.method, node.models, node.base):
                    raise _not(f"what stands at the {end} is made of other models than the layer beside it")
                node.add(other)
        return node

    def _slice(self, node: _Plain, planned: PlannedLayer, depth: int) -> dict[str, Any]:
        sources = []
        for name in node.models:
            layer = node.layer(name, planned.layer)
            sources.append(
                {
                    "model": self._references[name],
                    "layer_range": [layer, layer + 1],
                    **_parameters(self._settings(node.each(name), {planned.layer: layer})),
                }
            )
        return {"sources": sources, **_parameters(self._settings(node.shared, {planned.layer: depth}))}

    def _settings(self, values: Mapping[str, Values | Value], moved: Mapping[int, int]) -> dict[str, Any]:
        """The settings of one scope; conditions look at names with the layers' numbers after ``moved``."""
        out: dict[str, Any] = {}
        for name, found in values.items():
            if not isinstance(found, Mapping):
                out[name] = found
                continue
            seen = {self._seen(tensor, moved): value for tensor, value in found.items()}
            out[name] = conditions(seen)
        return {name: setting for name, setting in out.items() if (name, setting) != ("scale", 1.0)}

    def _seen(self, tensor: TensorInfo, moved: Mapping[int, int]) -> str:
        name = self._names.get(tensor.name, tensor.name)
        if isinstance(tensor.position, int) and tensor.position in moved:
            return re.sub(r"\.\d+\.", f".{moved[tensor.position]}.", name, count=1)
        return name


class _Plain:
    """A node that mergekit can compute for some parameters, in mergekit's terms.

    Attributes:
        method: of mergekit.
        models: the recipe's names of what is merged, the base among them where mergekit wants it there.
        base: name of the base model, or None.
        shared: settings for all models, by name: a value, or one for each parameter.
    """

    def __init__(
        self,
        node: Leaf | Merge,
        layout: Layout,
        tensors: Sequence[TensorInfo],
        info: Callable[[str], OperatorInfo],
    ) -> None:
        node = _chosen(node, layout, tensors)
        self.base: str | None = None
        self.shared: dict[str, Values | Value] = {}
        self._each: dict[str, dict[str, Values | Value]] = {}
        if isinstance(node, Leaf):
            self.method, self.models = "passthrough", [node.model]
            self._each[node.model] = {"scale": dict.fromkeys(tensors, 1.0)}
            self._layers = {node.model: node.layer}
            return
        self.method = _method(node)
        self._method = METHODS[self.method]
        leaves = _leaves([*node.inputs, node.base])
        self._layers = {leaf.model: leaf.layer for leaf in leaves}
        self._inputs = [leaf.model for leaf in leaves[:-1]]
        self.models = self._inputs
        if len(set(self._inputs)) != len(self._inputs):
            raise _not("a model stands among the inputs twice")
        self._tensors = list(tensors)
        self._rows = {tensor: _row(node, tensor, layout) for tensor in tensors}
        self._place_base(node, leaves[-1].model, info)
        self._write_coefficients(node)

    def each(self, model: str) -> Mapping[str, Values | Value]:
        """The settings of one model."""
        return self._each.get(model, {})

    def layer(self, model: str, planned: int) -> int:
        """The layer of a model that stands at a place of the plan."""
        own = self._layers[model]
        return planned if own is None else own

    def add(self, other: _Plain) -> None:
        """Take over the values of other parameters from a node over the same models."""
        for mine, theirs in [(self.shared, other.shared), *((self._each[m], other._each[m]) for m in self._each)]:
            for name, found in theirs.items():
                old = mine[name]
                if isinstance(old, Mapping) and isinstance(found, Mapping):
                    mine[name] = {**old, **found}
                elif old != found:
                    raise _not(f"{name} differs between the layers and what stands outside them")

    def _place_base(self, node: Merge, base: str, info: Callable[[str], OperatorInfo]) -> None:
        """Find out what mergekit's base is, and write the options."""
        options, tables = _options(node, self._method, info(node.operator))
        translated, with_base = to_theirs(self.method, options)
        if self.method == "slerp":
            self.base = self._inputs[0]
        elif self._method.base == "required" or with_base:
            if base in self._inputs:
                raise _not("the base is one of the models that are compared with it")
            self.base = base
            self.models = [base, *self._inputs]
        elif any(row is None for row in self._rows.values()) and base not in self._inputs:
            self._inputs = self.models = [base, *self._inputs]
        for name, parameter in self._method.parameters.items():
            if parameter.role != "option":
                continue
            if parameter.option in tables:
                self._write_table(name, parameter, tables[parameter.option])
            elif parameter.option in translated:
                self.shared[name] = _their_word(parameter, translated[parameter.option])

    def _write_table(self, name: str, parameter: Parameter, table: list[list[float]]) -> None:
        if not parameter.each:
            self.shared[name] = {tensor: table[row or 0][0] for tensor, row in self._rows.items()}
            return
        for place, model in enumerate(self._inputs):
            found = {tensor: table[row or 0][min(place, len(table[0]) - 1)] for tensor, row in self._rows.items()}
            self._each.setdefault(model, {})[name] = found

    def _write_coefficients(self, node: Merge) -> None:
        kind = self._method.coefficients
        rows = {tensor: self._coefficients(node, row) for tensor, row in self._rows.items()}
        if kind in ("ones", "one"):
            wrong = [
                row for row in rows.values() if (row[0] != 1.0 and kind == "one") or len(set(row)) > 1 or not row[0]
            ]
            if wrong:
                raise _not(f"mergekit's {self.method} has no coefficients")
            return
        if kind == "t":
            self.shared["t"] = {tensor: row[0] for tensor, row in rows.items()}
            return
        if kind == "share":
            rows = {tensor: (1.0 - row[0], row[0]) for tensor, row in rows.items()}
        name = "scale" if self.method == "passthrough" else "weight"
        for place, model in enumerate(self._inputs):
            self._each.setdefault(model, {})[name] = {tensor: row[place] for tensor, row in rows.items()}

    def _coefficients(self, node: Merge, row: int | None) -> tuple[float, ...]:
        """A row as mergekit's weights; for a parameter in no group those that leave the base's."""
        own = [leaf.model for leaf in _leaves(node.inputs)]
        base = _leaves([node.base])[0].model
        if row is not None:
            found = node.coefficients[row]
            return (0.0, *found) if len(self._inputs) > len(own) else tuple(found)
        if self._method.base == "required" and self._method.coefficients == "weights":
            return (0.0,) * len(own)
        if self.method == "slerp" and own[0] == base:
            return (0.0,)
        if self.method == "linear":
            return tuple(float(name == base) for name in self._inputs)
        raise _not(f"parameters in no group stay the base's, which {self.method} cannot do in mergekit")


def conditions(values: Mapping[str, float]) -> float | list[dict[str, Any]]:
    """Return a setting that gives every parameter its value: a number, or conditions on names, the first one that holds.

    Args:
        values: by the parameters' own names.
    """
    distinct = set(values.values())
    if len(distinct) == 1:
        return distinct.pop()
    tails = {name: _tail(name) for name in values}
    by_tail: dict[str, float] = {}
    for name, value in values.items():
        by_tail.setdefault(tails[name], value)
    attempts = [_trie(by_tail), _trie(values), _names(values)]
    for attempt in attempts:
        parsed = [Condition.model_validate(entry) for entry in attempt]
        if all(evaluate(parsed, name, 0.0) == value for name, value in values.items()):
            return attempt
    raise _not("some parameters' names contain others'")


def _tail(name: str) -> str:
    match = _LAYER.match(name)
    return match["tail"] if match else name


def _trie(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """Conditions on common beginnings of names, up to a dot: each gives what most below it have, after the exceptions."""
    groups: dict[str, Counter[float]] = {}
    for name, value in values.items():
        parts = name.split(".")
        for end in range(len(parts)):
            groups.setdefault(".".join(parts[:end]) + ("." if end else ""), Counter())[value] += 1
    common = {prefix: counter.most_common(1)[0][0] for prefix, counter in groups.items()}
    out: list[tuple[str, float]] = []
    for prefix in sorted(groups, key=len):
        parent = prefix.rstrip(".").rpartition(".")[0]
        if prefix and common[prefix] != common[parent + "." if parent else ""]:
            out.append((prefix, common[prefix]))
    for name, value in values.items():
        parent = name.rpartition(".")[0]
        if value != common[parent + "." if parent else ""]:
            out.append((name, value))
    return _listed(out, common[""])


def _names(values: Mapping[str, float]) -> list[dict[str, Any]]:
    usual = Counter(values.values()).most_common(1)[0][0]
    return _listed(list(values.items()), usual)


def _listed(found: Sequence[tuple[str, float]], usual: float) -> list[dict[str, Any]]:
    ordered = sorted(found, key=lambda entry: (-len(entry[0]), entry[0]))
    return [*({"filter": name, "value": value} for name, value in ordered), {"value": usual}]


def _parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"parameters": dict(settings)} if settings else {}


def _append(slices: list[dict[str, Any]], new: dict[str, Any]) -> None:
    """Add a slice of one layer, to the last one where it goes on with it."""
    if slices:
        last = slices[-1]
        pairs = list(zip(last["sources"], new["sources"], strict=False))
        if _settings_of(last) == _settings_of(new) and all(
            old["layer_range"][1] == following["layer_range"][0] for old, following in pairs
        ):
            for old, following in pairs:
                old["layer_range"][1] = following["layer_range"][1]
            return
    slices.append(new)


def _settings_of(part: Mapping[str, Any]) -> Any:
    return part.get("parameters"), [(source["model"], source.get("parameters")) for source in part["sources"]]


def _chosen(node: Leaf | Merge, layout: Layout, tensors: Sequence[TensorInfo]) -> Leaf | Merge:
    """The input of a linear merge that only chooses between its inputs, where it chooses the same for all parameters."""
    while isinstance(node, Merge) and node.operator == "linear":
        rows = {_row(node, tensor, layout) for tensor in tensors}
        found = [node.coefficients[row] for row in rows if row is not None]
        if (
            None in rows
            or len({tuple(row) for row in found}) != 1
            or sorted(found[0]) != [0.0] * (len(found[0]) - 1) + [1.0]
        ):
            return node
        node = node.inputs[found[0].index(1.0)]
    return node


def _row(node: Merge, tensor: TensorInfo, layout: Layout) -> int | None:
    if node.breaks is None:
        return node.row(tensor)
    begin = layout.offsets()[tensor.name]
    end = begin + prod(tensor.shape)
    bounds = [0, *node.breaks, None]
    for number, (low, high) in enumerate(pairwise(bounds)):
        if low is not None and low <= begin and (high is None or end <= high):
            return number
    raise _not("ranges of coefficients cut through a tensor")


def _method(node: Merge) -> str:
    if node.operator not in _BY_OPERATOR:
        raise _not(f"mergekit has no {node.operator}")
    return _BY_OPERATOR[node.operator]


def _leaves(nodes: Sequence[Leaf | Merge]) -> list[Leaf]:
    out = []
    for node in nodes:
        if not isinstance(node, Leaf):
            raise _not("it is a chain of operators, and mergekit applies one")
        out.append(node)
    return out


def _options(node: Merge, method: Method, info: OperatorInfo) -> tuple[dict[str, Value], dict[str, list[list[float]]]]:
    """All options of a node with their defaults, and the tables; raises where mergekit has no such choice."""
    known = {name: schema.get("default") for name, schema in info.options_schema.get("properties", {}).items()}
    tables = dict(node.tables or {})
    options = {name: node.options.get(name, default) for name, default in known.items() if name not in tables}
    theirs = {parameter.option for parameter in method.parameters.values() if parameter.role == "option"}
    own = {"angle", "origin"}  # see `to_theirs`
    for name, value in options.items():
        if name not in theirs.union(own, method.lax) and value != method.fixed.get(name, known[name]):
            raise _not(f"mergekit's {info.name} has no {name} = {value}")
    for name in tables:
        if name not in theirs:
            raise _not(f"mergekit's {info.name} has no {name} of its own for each group")
    return {name: value for name, value in options.items() if value is not None}, tables


def _their_word(parameter: Parameter, value: Value) -> Value:
    words = {ours: theirs for theirs, ours in parameter.values.items()}
    if words and value not in words:
        raise _not(f"mergekit has no {parameter.option} = {value}")
    return words.get(value, value)


def _not(reason: str) -> InvalidInput:
    return InvalidInput(reason, field="recipe", remedy="use `mergeopt merge` with the recipe")
