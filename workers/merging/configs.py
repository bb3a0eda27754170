"""Configs of checkpoints, also with their layers rearranged.

A plan must not change what a layer computes: with its number of layers, everything that the config says of single
layers (``layer_types`` and the like) moves with them. What transformers derives from a layer's depth in code, such as
a mixture of experts in every second layer, shows when both models are built without memory and compared layer by layer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from optimizer.errors import InvalidCheckpoint, InvalidInput
from optimizer.recipe import PlannedLayer
from workers.checkpoints import Checkpoint
from workers.naming import architecture
from workers.quiet import quiet

_LAYERS = "num_hidden_layers"
_NUMBERS = {"mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids"}
"""Fields that list the numbers of some layers."""

_Traits = dict[str, object]
"""Everything about a layer that is no tensor, by name."""


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Read a checkpoint's config with transformers, without running any code that it names.

    Raises:
        InvalidCheckpoint: transformers refuses it.
    """
    try:
        with quiet(logging.CRITICAL):  # what its loading reports say is checked where models are made
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                checkpoint.path, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # whatever a hostile or broken config makes transformers raise
        raise InvalidCheckpoint(f"{checkpoint.name}: transformers refuses its config.json: {error}") from error
    return _plain(config)


class Configs:
    """A checkpoint's config under any layer plan.

    Args:
        checkpoint: whose.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._own: list[_Traits] | None = None
        self._seen: dict[str, list[_Traits]] = {}

    def data(self, layers: Sequence[PlannedLayer] | None) -> dict[str, Any]:
        """Return what ``config.json`` says of the model with these layers; the checkpoint's own without a plan.

        Raises:
            InvalidInput: the model type does not allow it, or a layer would compute something else at its new depth.
        """
        data = dict(self._checkpoint.config)
        if layers is None:
            return data
        config = self._config
        sources = [planned.layer for planned in layers]
        count = getattr(config, _LAYERS, None)
        if sources == list(range(count if isinstance(count, int) else -1)):
            return data
        if not isinstance(count, int) or max(sources) >= count:
            raise InvalidInput(
                f"the config of {self._checkpoint.name} has {_LAYERS} = {count!r}, which the plan does not fit",
                field="recipe.layers",
                remedy="leave out the layer plan",
            )
        data = {name: value for name, value in data.items() if name not in _dropped(data, count)}
        data[type(config).attribute_map.get(_LAYERS, _LAYERS)] = len(sources)
        data |= _listed(config.to_dict(), sources, count)
        self._check(data, sources, count)
        return data

    def load(self, layers: Sequence[PlannedLayer] | None) -> PreTrainedConfig:
        """Return the config of the model with these layers; errors are those of `data` and `load_config`."""
        if layers is None:
            return load_config(self._checkpoint)
        return _from_data(type(self._config), self.data(layers))

    @cached_property
    def _config(self) -> PreTrainedConfig:
        return load_config(self._checkpoint)

    def _check(self, data: Mapping[str, Any], sources: Sequence[int], count: int) -> None:
        if self._own is None:
            self._own = self._traits(self._checkpoint.config, count)
        key = json.dumps(data, sort_keys=True, default=str)
        if key not in self._seen:
            self._seen[key] = self._traits(data, len(sources))
        for depth, source in enumerate(sources):
            changed = _changed(self._own[source], self._seen[key][depth], source, depth)
            if changed is not None:
                raise InvalidInput(
                    f"layer {source} of {self._checkpoint.name} would compute something else at depth {depth}: {changed}",
                    field=f"recipe.layers.{depth}.layer",
                    remedy="place it at a depth of its own kind",
                )

    def _traits(self, data: Mapping[str, Any], count: int) -> list[_Traits]:
        """What tells the layers of a model apart, layer by layer, found out without memory for its weights."""
        model_class = architecture(self._checkpoint)
        try:
            with quiet(logging.CRITICAL), torch.device("meta"):
                config = _from_data(type(self._config), data)
                model: PreTrainedModel = model_class._from_config(config)  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever transformers raises on a number of layers that it does not like
            raise InvalidInput(
                f"transformers makes no {model_class.__name__} with {count} layers: {error}", field="recipe.layers"
            ) from error
        found = list(stacks(model, count))
        if not found:
            raise InvalidInput(
                f"{model_class.__name__} does not have its {count} layers in one list, so they cannot be rearranged",
                field="recipe.layers",
                remedy="leave out the layer plan",
            )
        return [_layer_traits([stack[number] for stack in found]) for number in range(count)]


def _plain(config: PreTrainedConfig) -> PreTrainedConfig:
    # A config may name an attention kernel that would be downloaded and run; transformers' own choice is used instead.
    config._attn_implementation = None
    return config


def _from_data(config_class: type[PreTrainedConfig], data: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = config_class.from_dict(dict(data))
    except Exception as error:  # lists of another length than a field of this model type allows
        raise InvalidInput(
            f"transformers refuses the config of the rearranged model: {error}",
            field="recipe.layers",
            remedy="leave out the layer plan",
        ) from error
    return _plain(config)


def _listed(fields: Mapping[str, Any], sources: Sequence[int], count: int) -> dict[str, Any]:
    """The fields that say something of single layers, rearranged."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        if not isinstance(value, list):
            continue
        if name in _NUMBERS:
            out[name] = [depth for depth, source in enumerate(sources) if source in value]
        elif len(value) == count and "layer" in name:
            out[name] = [value[source] for source in sources]
    return out


def _dropped(data: Mapping[str, Any], count: int) -> set[str]:
    """Fields that follow from the number of layers, and are left for transformers to work out again."""
    last = data.get("out_indices", [count]) == [count]  # a vision model that gives out its last layer, as usual
    return {_LAYERS} | ({"stage_names", "out_features", "out_indices"} if last else set())


def stacks(module: nn.Module, count: int) -> Iterator[nn.ModuleList]:
    """Yield the outermost lists of that many modules: where a model keeps its layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            yield child
        else:
            yield from stacks(child, count)


def _layer_traits(blocks: Sequence[nn.Module]) -> _Traits:
    out: _Traits = {}
    for number, block in enumerate(blocks):
        for path, module in block.named_modules():
            where = f"{number}.{path}"
            out[where] = type(module).__name__
            for name, tensor in module.named_parameters(recurse=False):
                out[f"{where}.{name}"] = tuple(tensor.shape)
            for name, value in vars(module).items():
                if not name.startswith("_") and isinstance(value, bool | int | float | str | tuple | None):
                    out[f"{where}.{name}"] = value
    return out


def _changed(old: _Traits, new: _Traits, source: int, depth: int) -> str | None:
    """What differs between a layer where it comes from and where it goes to, beside its own number."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after or (type(before) is type(after) is int and (before, after) == (source, depth)):
            continue
        label = name.partition(".")[2] or "its class"
        return f"{label} would be {after!r} instead of {before!r}"
    return None
