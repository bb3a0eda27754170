"""Nodes of a recipe with everything looked up: operator, options of each row, and what identifies their content."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import UNKNOWN_DIGEST, Leaf, Merge, Recipe, Selector, canonical
from workers.merging.cache import key_of
from workers.merging.operator import OPERATORS, Operator, Options, make_options

LARGEST = 1e30
"""Magnitude of a coefficient from which on float32 would overflow on the way."""

Stretch = tuple[int | None, int, int | None]
"""Row of the table (None: no group contains the parameter), first element, end (None: to the end)."""


@dataclass(frozen=True)
class Row:
    """One row of the tables, checked."""

    coefficients: tuple[float, ...]
    options: Options
    each: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Node:
    """A `Merge` whose operator and options were looked up.

    Attributes:
        base, inputs: its children.
        rows: the tables, row by row.
        digests: the models' by name.
        groups: the row of each shared parameter that is in a group; empty with ``breaks``.
        offsets: where each shared parameter begins in the flat vector of all; empty without ``breaks``.
    """

    merge: Merge
    operator: Operator
    base: Node | Leaf
    inputs: tuple[Node | Leaf, ...]
    rows: tuple[Row, ...]
    digests: Mapping[str, str]
    groups: Mapping[str, int]
    offsets: Mapping[str, int]

    def stretches(self, tensor: TensorInfo) -> list[Stretch]:
        """Return the stretches of a parameter that have a row of their own, in order; at least one."""
        breaks = self.merge.breaks
        if breaks is None:
            return [(self.groups.get(tensor.name), 0, None)]
        begin = self.offsets[tensor.name]
        end = begin + prod(tensor.shape)
        first, last = bisect_right(breaks, begin), bisect_left(breaks, end)
        if first >= last:
            return [(first, 0, None)]
        cuts = [begin, *breaks[first:last], end]
        return [
            (number, left - begin, right - begin) for number, (left, right) in enumerate(pairwise(cuts), start=first)
        ]

    @cached_property
    def identity(self) -> str:
        """What its content is known by: the same text, the same tensors."""
        return key_of(canonical(self.merge, self.digests))


def identity(child: Node | Leaf, digests: Mapping[str, str]) -> str:
    """Return what identifies a child's content; a model's digest for a model as it is."""
    if isinstance(child, Node):
        return child.identity
    return digests[child.model] if child.layer is None else f"{digests[child.model]}@{child.layer}"


def lasting(child: Node | Leaf, digests: Mapping[str, str]) -> bool:
    """Whether answers about a child are worth keeping on disk: it is a checkpoint, and its digest is known."""
    return isinstance(child, Leaf) and not digests[child.model].startswith(UNKNOWN_DIGEST)


def compile_node(node: Leaf | Merge, where: str, digests: Mapping[str, str], layout: Layout) -> Node | Leaf:
    """Look up and check a node and all below it.

    Args:
        node: of a recipe.
        where: dotted path, for errors.
        digests: the models' by name.
        layout: of the models.

    Raises:
        InvalidInput: unknown operator, bad options, tables of the wrong shape, ranges that the operator cannot cut.
    """
    if isinstance(node, Leaf):
        return node
    entry = OPERATORS.find(node.operator, f"{where}.operator")
    _check_columns(node, entry, where)
    _check_coefficients(node, where)
    offsets = _offsets(node, entry, layout, where) if node.breaks is not None else {}
    return Node(
        merge=node,
        operator=entry,
        base=compile_node(node.base, f"{where}.base", digests, layout),
        inputs=tuple(
            compile_node(child, f"{where}.inputs.{number}", digests, layout) for number, child in enumerate(node.inputs)
        ),
        rows=_rows(node, entry, where),
        digests=digests,
        groups=assign(node.groups or [], layout, f"{where}.groups"),
        offsets=offsets,
    )


def check_nodes(recipe: Recipe, layout: Layout) -> None:
    """Raise `InvalidInput` if an operator, an option or a table of a recipe is wrong; reads no checkpoint."""
    compile_node(recipe.root, "recipe.root", recipe.identities, layout)
    for depth, planned in enumerate(recipe.layers or []):
        if planned.node is not None:
            compile_node(planned.node, f"recipe.layers.{depth}.node", recipe.identities, layout)


def assign(groups: Sequence[Selector], layout: Layout, where: str) -> dict[str, int]:
    """Return the number of the first group that contains each shared parameter, by name; the same as `Merge.row`.

    Groups that list names are looked up, so that as many groups as parameters cost no more than a few.

    Raises:
        InvalidInput: a group contains no parameter at all (one whose parameters are all in earlier groups may be).
    """
    shared = {tensor.name: tensor for tensor in layout.shared}
    rows: dict[str, int] = {}
    for number, group in enumerate(groups):
        names = group.tensors
        listed = names is not None and not any(character in name for name in names for character in "*?[")
        among = [shared[name] for name in names or () if name in shared] if listed else shared.values()
        members = [tensor.name for tensor in among if group.matches(tensor)]
        if not members:
            raise InvalidInput(
                f"no merged parameter is in the group ({group.label})",
                field=f"{where}.{number}",
                remedy=f"leave it out, or use positions 0 to {layout.layers - 1}, `input` or `output`, kinds and names "
                "that the models have",
            )
        for name in members:
            rows.setdefault(name, number)
    return rows


def _check_columns(node: Merge, entry: Operator, where: str) -> None:
    info = entry.info
    wanted = len(node.inputs) if info.columns == "per_expert" else 1
    if len(node.coefficients[0]) != wanted:
        raise InvalidInput(
            f"{node.operator} takes {wanted} coefficients in each row, not {len(node.coefficients[0])}",
            field=f"{where}.coefficients",
        )
    count = len(node.inputs)
    if info.columns == "interpolation" and count != 2:
        raise InvalidInput(f"{node.operator} runs between two models, not {count}", field=f"{where}.inputs")
    if info.columns != "interpolation" and not info.min_experts <= count <= (info.max_experts or count):
        allowed = f"{info.min_experts} to {info.max_experts}" if info.max_experts else f"at least {info.min_experts}"
        raise InvalidInput(f"{node.operator} takes {allowed} models, not {count}", field=f"{where}.inputs")


def _check_coefficients(node: Merge, where: str) -> None:
    for number, row in enumerate(node.coefficients):
        if not all(abs(value) <= LARGEST for value in row):  # not a number is not either
            raise InvalidInput(
                f"{max(row, key=abs):g} is no coefficient that could be computed with",
                field=f"{where}.coefficients.{number}",
                remedy=f"use numbers between -{LARGEST:g} and {LARGEST:g}; usual ones are near 1",
            )


def _rows(node: Merge, entry: Operator, where: str) -> tuple[Row, ...]:
    tables = node.tables or {}
    for name, table in tables.items():
        if len(table[0]) > 1 and name not in entry.info.varies:
            raise InvalidInput(
                f"{node.operator} cannot have a {name} for each of its inputs",
                field=f"{where}.tables.{name}",
                remedy=f"options that may: {', '.join(entry.info.varies) or 'none'}",
            )
    fixed = make_options(entry, node.options, f"{where}.options")
    return tuple(
        _row(node, entry, number, fixed, {name: table[number] for name, table in tables.items()}, where)
        for number in range(len(node.coefficients))
    )


def _row(
    node: Merge, entry: Operator, number: int, fixed: Options, given: Mapping[str, list[float]], where: str
) -> Row:
    each: dict[str, tuple[float, ...]] = {}
    single: dict[str, Any] = {}
    for name, values in given.items():
        for value in values:  # every value on its own, so that bounds are checked for each input
            checked = make_options(entry, {**node.options, name: value}, f"{where}.tables")
            each[name] = (*each.get(name, ()), getattr(checked, name))
        if len(values) == 1 and len(node.inputs) > 1:
            single[name] = each.pop(name)[0]
        elif len(values) == 1:
            single[name] = values[0]
    options = make_options(entry, {**node.options, **single}, f"{where}.tables") if single else fixed
    return Row(tuple(node.coefficients[number]), options, each)


def _offsets(node: Merge, entry: Operator, layout: Layout, where: str) -> dict[str, int]:
    offsets, total = layout.offsets(), layout.size
    breaks = node.breaks or []
    if breaks and breaks[-1] >= total:
        raise InvalidInput(f"position {breaks[-1]} is behind the last of {total} parameters", field=f"{where}.breaks")
    if not entry.info.elementwise and not set(breaks) <= set(offsets.values()):
        raise InvalidInput(
            f"{node.operator} works on whole tensors, so ranges cannot cut through one",
            field=f"{where}.breaks",
            remedy="place the breaks between tensors, or use an element-wise operator such as linear",
        )
    return offsets
