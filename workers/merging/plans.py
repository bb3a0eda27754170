"""Layer plans: which parameter of the models each parameter of the merged model is made from.

A planned layer is computed where it comes from: its node sees the parameters of layer `PlannedLayer.layer`, so groups
of coefficients, operators that look at the depth (LiNeS) and ranges of the flat vector mean the models' layers, not
the depth at which the result stands. What is prepared for a layer of the models serves it at every depth.

A ``Leaf`` with a ``layer`` of its own takes that layer's parameter of its model in place of the planned one's; for
parameters outside the layers it is the model's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe
from workers.merging.residual import Writers, writers

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)\.(?P<inner>.+)$")


@dataclass(frozen=True)
class Placement:
    """Where a parameter of the merged model comes from: scale · node(source) + shift.

    Attributes:
        target: the parameter in the merged model.
        source: the parameter of the models' layout that it is made from.
        node: what it is made of.
        scale: factor of the result.
        shift: what is added to the scaled result.
        twin: name of an earlier parameter with the same content: a layer that is repeated.
    """

    target: TensorInfo
    source: TensorInfo
    node: Leaf | Merge
    scale: float = 1.0
    shift: float = 0.0
    twin: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a tensor of a rearranged checkpoint comes from.

    Attributes:
        target: the checkpoint's own name of it, renumbered.
        name: canonical name of what it comes from.
        raw: the checkpoint's own name of that.
    """

    target: str
    name: str
    raw: str


def placements(recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> list[Placement]:
    """Return the shared parameters of the merged model, in the order of its layout.

    Args:
        recipe: the merged model.
        layout: what its models share.
        config: the base's ``config.json``.

    Raises:
        InvalidInput: the plan, or a leaf, names a layer that the models do not have or that is of another shape; the
            models have several stacks of layers; a layer is scaled in a model whose residual stream is not known.
    """
    by_name = {tensor.name: tensor for tensor in layout.shared}
    if recipe.layers is None:
        out = [Placement(tensor, tensor, recipe.root) for tensor in layout.shared]
        _check_leaves(out, by_name)
        return out
    stack_of(layout)
    by_layer: dict[int, list[TensorInfo]] = defaultdict(list)
    out = []
    for tensor in layout.shared:
        if isinstance(tensor.position, int):
            by_layer[tensor.position].append(tensor)
        else:
            out.append(Placement(tensor, tensor, recipe.root))
    twins = _twins(recipe.layers)
    for depth, planned in enumerate(recipe.layers):
        field = f"recipe.layers.{depth}"
        if planned.layer not in by_layer:
            raise _no_layer(planned.layer, layout, f"{field}.layer")
        out += _layer(planned, depth, twins[depth], by_layer[planned.layer], recipe.root, config, field)
    _check_leaves(out, by_name)
    return sorted(out, key=lambda placement: placement.target.name)


def planned_layout(recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> Layout:
    """Return the layout of the merged model: that of its models, unless the recipe rearranges layers.

    Args and errors are those of `placements`.
    """
    if recipe.layers is None:
        return layout
    heads = {tensor.name: tensor for tensor in layout.tensors if tensor.role == "head"}
    own = [
        replace(heads[origin.name], name=name)
        for name, origin in arranged({name: name for name in heads}, recipe.layers, layout).items()
    ]
    shared = [placement.target for placement in placements(recipe, layout, config)]
    return Layout(tuple(sorted((*own, *shared), key=lambda tensor: tensor.name)), len(recipe.layers))


def arranged(names: Mapping[str, str], layers: Sequence[PlannedLayer] | None, layout: Layout) -> dict[str, Origin]:
    """Return where each tensor of a checkpoint comes from when its layers are rearranged, by canonical name.

    Args:
        names: the checkpoint's own names by canonical name; what is in no layer stays, whatever it is.
        layers: the plan, if any.
        layout: what the recipe's models share.
    """
    if layers is None:
        return {name: Origin(raw, name, raw) for name, raw in names.items()}
    stack = stack_of(layout)
    depths: dict[int, list[int]] = defaultdict(list)
    for depth, planned in enumerate(layers):
        depths[planned.layer].append(depth)
    out = {}
    for name, raw in names.items():
        match = _LAYER.match(name)
        if match is None or match["stack"] != stack:
            out[name] = Origin(raw, name, raw)
            continue
        for depth in depths[int(match["number"])]:
            out[renumbered(name, depth)] = Origin(renumbered(raw, depth), name, raw)
    return out


def moved(tensor: TensorInfo, layer: int, by_name: Mapping[str, TensorInfo]) -> TensorInfo:
    """Return the same parameter in another layer; one that is in no layer itself.

    Args:
        tensor: a shared parameter.
        layer: position of the other layer.
        by_name: all shared parameters.

    Raises:
        InvalidInput: there is none, or it is of another shape.
    """
    match = _LAYER.match(tensor.name)
    if not isinstance(tensor.position, int) or tensor.position == layer or match is None:
        return tensor
    name = renumbered(tensor.name, int(match["number"]) + layer - tensor.position)
    found = by_name.get(name)
    if found is None or found.position != layer or found.shape != tensor.shape:
        what = f"has no parameter {name!r}" if found is None else f"has {name!r} in another shape or stack"
        raise InvalidInput(
            f"layer {layer} cannot stand for layer {tensor.position}: it {what}",
            field="recipe",
            remedy="take a layer of the same kind and shape",
        )
    return found


def renumbered(name: str, layer: int) -> str:
    """Return the name of the same parameter in another layer: the first number in it is the layer's."""
    match = _LAYER.match(name)
    return name if match is None else f"{match['stack']}.{layer}.{match['inner']}"


def stack_of(layout: Layout) -> str:
    """Return what the names of all layers begin with, e.g. ``"encoder.layer"``.

    Raises:
        InvalidInput: the models have no layers, or several stacks of them (encoder and decoder, vision and text).
    """
    stacks = {
        match["stack"]
        for tensor in layout.shared
        if isinstance(tensor.position, int) and (match := _LAYER.match(tensor.name))
    }
    if len(stacks) != 1:
        what = f"the models have several stacks of layers ({', '.join(sorted(stacks))})" if stacks else "no layers"
        raise InvalidInput(
            f"{what}, which cannot be rearranged" if stacks else "the models have no layers that could be rearranged",
            field="recipe.layers",
            remedy="leave out the layer plan; groups of coefficients can still name layers",
        )
    return stacks.pop()


def _layer(
    planned: PlannedLayer,
    depth: int,
    twin: int | None,
    tensors: Sequence[TensorInfo],
    root: Leaf | Merge,
    config: Mapping[str, Any],
    field: str,
) -> list[Placement]:
    scaled = None
    if planned.scale != 1.0:
        scaled = writers(config, [_inner(tensor.name) for tensor in tensors], f"{field}.scale")
    out = []
    for tensor in tensors:
        target = replace(tensor, name=renumbered(tensor.name, depth), position=depth)
        scale, shift = _factors(scaled, tensor, planned.scale)
        earlier = renumbered(tensor.name, twin) if twin is not None else None
        out.append(Placement(target, tensor, planned.node or root, scale, shift, earlier))
    return out


def _factors(scaled: Writers | None, tensor: TensorInfo, scale: float) -> tuple[float, float]:
    if scaled is None or not scaled.contain(_inner(tensor.name)):
        return 1.0, 0.0
    return scale, scale - 1.0 if scaled.unit_offset else 0.0


def _inner(name: str) -> str:
    match = _LAYER.match(name)
    return match["inner"] if match is not None else name


def _twins(layers: Sequence[PlannedLayer]) -> list[int | None]:
    """For each depth the first one above with the same layer."""
    first: dict[str, int] = {}
    out: list[int | None] = []
    for depth, planned in enumerate(layers):
        seen = first.setdefault(planned.model_dump_json(), depth)
        out.append(seen if seen != depth else None)
    return out


def _check_leaves(found: Sequence[Placement], by_name: Mapping[str, TensorInfo]) -> None:
    """Every layer that a leaf names must fit wherever it is used."""
    layers: dict[int, set[int]] = {}
    for placement in found:
        if id(placement.node) not in layers:
            layers[id(placement.node)] = _leaf_layers(placement.node)
        for layer in layers[id(placement.node)]:
            moved(placement.source, layer, by_name)


def _leaf_layers(node: Leaf | Merge) -> set[int]:
    if isinstance(node, Leaf):
        return set() if node.layer is None else {node.layer}
    return _leaf_layers(node.base).union(*(_leaf_layers(child) for child in node.inputs))


def _no_layer(layer: int, layout: Layout, field: str) -> InvalidInput:
    return InvalidInput(
        f"there is no layer {layer}: the models have {layout.layers}",
        field=field,
        remedy=f"use 0 to {layout.layers - 1}",
    )
