"""From a configuration to the recipe that gives what mergekit gives for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.mergekit.evaluation import Part, Reader
from optimizer.mergekit.format import Configuration
from optimizer.mergekit.references import notes_on
from optimizer.recipe import ModelId, PlannedLayer, Recipe


@dataclass(frozen=True)
class Imported:
    """A recipe, and what could not be taken over from the file, one sentence each."""

    recipe: Recipe
    notes: list[str]


def to_recipe(
    configuration: Configuration, models: Mapping[str, ModelId], layout: Layout, names: Mapping[str, str]
) -> Imported:
    """Return the recipe that gives what mergekit gives for a configuration.

    Args:
        configuration: from `read_configuration`.
        models: by the names that `model_names` gives, ``base`` first.
        layout: of the models.
        names: the checkpoints' own names of the layout's parameters by canonical name: what conditions look at.

    Raises:
        InvalidInput: naming the YAML path of what is missing, contradictory, or has no counterpart here.
    """
    reader = Reader(configuration, layout, names)
    parts = reader.parts()
    arranged = [(part, offset) for part in parts for offset in range(part.length)]
    outside = [tensor for tensor in layout.shared if not isinstance(tensor.position, int)]
    ends: dict[TensorInfo, Part] = {tensor: parts[0] if tensor.position == "input" else parts[-1] for tensor in outside}
    in_place = all(part.in_place for part in parts)
    if in_place and len(arranged) == max(1, layout.layers) and len({part.inputs_key for part in parts}) == 1:
        where = {
            tensor: arranged[tensor.position] if isinstance(tensor.position, int) else (ends[tensor], 0)
            for tensor in layout.shared
        }
        return Imported(Recipe(models=dict(models), root=reader.node(where)), notes_on(configuration))
    root = reader.outside(ends)
    layers = []
    for part, offset in arranged:
        first = part.sources[0].layer_range[0] + offset
        where = {tensor: (part, offset) for tensor in layout.shared if tensor.position == first}
        if not where:
            raise InvalidInput(
                f"there is no layer {first}: the models have {layout.layers}",
                field=f"{part.path}.sources.0.layer_range",
            )
        node = reader.node(where)
        layers.append(PlannedLayer(layer=first, node=None if node == root else node))
    return Imported(Recipe(models=dict(models), root=root, layers=layers), notes_on(configuration))
