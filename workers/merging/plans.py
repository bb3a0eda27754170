"""Layer plans: which parameter of the models each parameter of the merged model is made from."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import Leaf, Merge, Recipe

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Placement:
    """Where a parameter of the merged model comes from.

    Attributes:
        target: the parameter in the merged model.
        source: the parameter of the models' layout that it is made from.
        node: what it is made of.
        scale: factor of the result.
    """

    target: TensorInfo
    source: TensorInfo
    node: Leaf | Merge
    scale: float = 1.0


def placements(recipe: Recipe, layout: Layout) -> list[Placement]:
    """Return the shared parameters of the merged model, in the order of its layout.

    Raises:
        InvalidInput: the plan names a layer that the models do not have.
    """
    if recipe.layers is None:
        return [Placement(tensor, tensor, recipe.root) for tensor in layout.shared]
    out = [Placement(tensor, tensor, recipe.root) for tensor in layout.shared if not isinstance(tensor.position, int)]
    for depth, planned in enumerate(recipe.layers):
        if planned.layer >= layout.layers:
            raise InvalidInput(
                f"there is no layer {planned.layer}: the models have {layout.layers}",
                field=f"recipe.layers.{depth}.layer",
                remedy=f"use 0 to {layout.layers - 1}",
            )
        for tensor in layout.shared:
            if tensor.position == planned.layer:
                target = replace(tensor, name=renumbered(tensor.name, depth), position=depth)
                out.append(Placement(target, tensor, planned.node or recipe.root))
    return sorted(out, key=lambda placement: placement.target.name)


def moved(tensor: TensorInfo, layer: int, layout: Layout) -> TensorInfo:
    """Return the same parameter in another layer.

    Raises:
        InvalidInput: there is none.
    """
    if tensor.position == layer or not isinstance(tensor.position, int):
        return tensor
    name = renumbered(tensor.name, layer)
    for other in layout.shared:
        if other.name == name:
            return other
    raise InvalidInput(f"layer {layer} has no parameter {name!r}", field="recipe.layers", remedy="use another layer")


def renumbered(name: str, layer: int) -> str:
    """Return the name of the same parameter in another layer: the first number in it is the layer's."""
    return _NUMBER.sub(f".{layer}.", name, count=1)
