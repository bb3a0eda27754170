"""One resident merged model: candidates are merged into it in place, and every head's model shares its memory.

Layer plans re-assemble it without reading anything again: the tensors of each depth stay and are reused by the next
candidate that is as deep, a layer that is repeated is in memory once, and modules are made once for each number and
order of kinds of layers, by transformers, from the same config that an export writes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimizer.errors import InvalidCheckpoint, InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import PlannedLayer, Recipe
from workers.checkpoints import Checkpoint
from workers.merging.configs import Configs
from workers.merging.engine import MergeEngine
from workers.merging.plans import arranged, placements
from workers.naming import canonical_names
from workers.quiet import ALONE, quiet

KEPT = 16
"""Models of other depths whose modules are kept; their weights are the resident ones."""

UNUSED_POOLER = ("AutoModel", "pooler.")
"""Only the pooler of a headless model may be missing: nobody who asks for hidden states reads it. It is filled with NaN,
so that whoever does read it notices."""


@dataclass
class _Built:
    """A model and where its weights come from.

    Attributes:
        head: whose head and config it has.
        data: its config.
        shared: by parameter the canonical name of the resident tensor that it is.
        derived: parameters that transformers computes on loading (fused experts, kept in float32); reloaded after
            every merge.
    """

    model: PreTrainedModel
    head: str | None
    data: Mapping[str, Any]
    shared: dict[str, str] = field(default_factory=dict)
    derived: list[str] = field(default_factory=list)


class ResidentModels:
    """The merged model in memory.

    Not safe to use from several threads: `apply` changes the weights of every model that `model` returned.

    Attributes:
        shared: the merged parameters by canonical name; those of a repeated layer are one tensor.
        recipe: that was applied last; None before the first.

    Args:
        checkpoints: ``base`` and the experts by name.
        layout: what they share.
        engine: merges them.
        device: where the model lives.
        dtype: of its weights.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        layout: Layout,
        engine: MergeEngine,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoints = checkpoints
        self.layout = layout
        self.device = device
        self.dtype = dtype
        self._engine = engine
        self._models: dict[tuple[str | None, str], _Built] = {}
        self._put_aside: list[tuple[tuple[str | None, str], _Built]] = []
        self.recipe: Recipe | None = None
        self._layers: Sequence[PlannedLayer] | None = None
        self._configs = {name: Configs(checkpoint) for name, checkpoint in checkpoints.items()}
        self._names: dict[str, dict[str, str]] = {}
        self._own: dict[tuple[str, str], Tensor] = {}
        self.shared: dict[str, Tensor] = {
            tensor.name: engine.source("base", tensor, device).to(dtype, copy=True) for tensor in layout.shared
        }
        self._pool = {(name, tensor.shape): tensor for name, tensor in self.shared.items()}

    def apply(self, recipe: Recipe) -> None:
        """Merge a recipe into the resident model, in place.

        Models that `model` returned before follow, unless the recipe has another number or other kinds of layers than
        the one before: ask for them again then.

        Raises:
            InvalidInput: see `MergeEngine.apply` and `Configs.data`; nothing was changed.
            InfeasibleCandidate: see `MergeEngine.apply`; the model is in no defined state until the next recipe.
        """
        targets = self._targets(recipe)
        heads = {head for head, _ in self._models} | {None}
        data = {head: self._configs[head or "base"].data(recipe.layers) for head in heads}
        self._engine.apply(recipe, targets)
        self.recipe = recipe
        self.shared, self._layers = targets, recipe.layers
        for key, built in list(self._models.items()):
            if built.data != data[built.head]:
                self._put_away(key, self._models.pop(key))
        self.refresh()

    def refresh(self) -> None:
        """Compute anew what the models derive from `shared`, after writing to it."""
        for built in self._models.values():
            self._refresh(built)

    def model(self, head: str | None, auto_class: str) -> PreTrainedModel:
        """Return the merged model with an expert's head, in evaluation mode; the same object while its layers stay.

        Args:
            head: name of the expert whose head and config it has; None for the base's.
            auto_class: class of transformers, e.g. ``"AutoModelForSequenceClassification"``.

        Raises:
            InvalidInput: no such expert or class, or the class needs a head that the model does not have.
            InvalidCheckpoint: the head's tensors do not fit the expert's config.
        """
        key = (head, auto_class)
        if key not in self._models:
            data = self._configs[self._checkpoint(head).name].data(self._layers)
            known = next((built for place, built in self._put_aside if place == key and built.data == data), None)
            if known is not None:
                self._put_aside.remove((key, known))
                self._refresh(known)
            self._models[key] = known or self._build(head, auto_class, data)
        return self._models[key].model

    def parameters(self, head: str | None, auto_class: str) -> dict[str, nn.Parameter] | None:
        """Return the parameters of `model` (same arguments) that are merged ones, by canonical name, tied ones once.

        None where the model computes some of its parameters from merged ones on loading, which nothing is derived through.
        """
        model = self.model(head, auto_class)
        built = self._models[head, auto_class]
        found: dict[str, nn.Parameter] = {}
        for name, shared in built.shared.items():
            tensor = model.get_parameter_or_buffer(name)
            # Of two names that were tied on loading one stands for a tensor that the model does not use.
            if isinstance(tensor, nn.Parameter) and tensor.data_ptr() == self.shared[shared].data_ptr():
                found[shared] = tensor
        return None if built.derived else found

    def _put_away(self, key: tuple[str | None, str], built: _Built) -> None:
        """Keep a model's modules for the next recipe with such layers, unless they hold weights of their own."""
        if not built.derived:
            self._put_aside = [*self._put_aside, (key, built)][-KEPT:]

    def _targets(self, recipe: Recipe) -> dict[str, Tensor]:
        """The tensors to merge into: the same for the same depth every time, and one for a layer that is repeated."""
        found = placements(recipe, self.layout, self.checkpoints["base"].config)
        out = {placement.target.name: self._pooled(placement.target) for placement in found if placement.twin is None}
        return out | {placement.target.name: out[placement.twin] for placement in found if placement.twin is not None}

    def _pooled(self, tensor: TensorInfo) -> Tensor:
        key = (tensor.name, torch.Size(tensor.shape))
        if key not in self._pool:
            self._pool[key] = torch.empty(tensor.shape, dtype=self.dtype, device=self.device)
        return self._pool[key]

    def _build(self, head: str | None, auto_class: str, data: Mapping[str, Any]) -> _Built:
        with ALONE:  # weights are tied as long as no other thread loads
            return self._loaded(head, auto_class, data)

    def _loaded(self, head: str | None, auto_class: str, data: Mapping[str, Any]) -> _Built:
        checkpoint = self._checkpoint(head)
        config = self._configs[checkpoint.name].load(self._layers)
        model_class = _model_class(auto_class, config)
        tensors, shared = self._tensors(checkpoint)
        # A probe has a tensor's shape but one element of memory, a NaN. Where a probe turns up in the loaded model,
        # with all of transformers' renaming done, the tensor it stands for belongs; what is NaN besides was computed
        # from probes; all the rest did not come from the checkpoint.
        probes = {name: _probe(tensor) for name, tensor in tensors.items()}
        model, missing = _load(model_class, config, probes, self.dtype, checkpoint)
        origin = {probe.untyped_storage().data_ptr(): name for name, probe in probes.items()}
        built = _Built(model, head, data)
        for name, old in list(_weights(model)):
            raw = origin.get(old.untyped_storage().data_ptr())
            if raw is not None and tensors[raw].shape == old.shape:
                _assign(model, name, tensors[raw])
                if raw in shared:
                    built.shared[name] = shared[raw]
            elif old.is_floating_point() and bool(old.isnan().all()):
                built.derived.append(name)
            elif isinstance(old, nn.Parameter):
                missing.add(name)
        _check_missing(model, missing, auto_class, head)
        model.tie_weights(recompute_mapping=False)
        cast("nn.Module", model).to(self.device)  # what transformers computes; the other weights are there already
        self._refresh(built)
        return built

    def _tensors(self, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All tensors of a checkpoint by its own names, the shared ones merged, the others its own.

        Returns them and the canonical names of the shared ones.
        """
        if checkpoint.name not in self._names:
            self._names[checkpoint.name] = canonical_names(checkpoint)
        out, shared = {}, {}
        for name, origin in arranged(self._names[checkpoint.name], self._layers, self.layout).items():
            if name in self.shared:
                out[origin.target] = self.shared[name]
                shared[origin.target] = name
            else:
                out[origin.target] = self._owned(checkpoint, origin.raw)
        return out, shared

    def _owned(self, checkpoint: Checkpoint, raw: str) -> Tensor:
        if (checkpoint.name, raw) not in self._own:
            own = checkpoint.tensor(raw)
            dtype = self.dtype if own.is_floating_point() else own.dtype
            self._own[checkpoint.name, raw] = own.to(self.device, dtype, copy=True)
        return self._own[checkpoint.name, raw]

    def _refresh(self, built: _Built) -> None:
        """Point a model at the resident tensors of its layers, and compute again what is computed from them."""
        for name, shared in built.shared.items():
            tensor = self.shared[shared]
            if built.model.get_parameter_or_buffer(name).data_ptr() != tensor.data_ptr():
                _assign(built.model, name, tensor)
        if not built.derived:
            return
        checkpoint = self._checkpoint(built.head)
        tensors = {name: tensor.cpu() for name, tensor in self._tensors(checkpoint)[0].items()}
        config = self._configs[checkpoint.name].load(self._layers)
        loaded, _ = _load(type(built.model), config, tensors, self.dtype, checkpoint)
        source, target = dict(_weights(loaded)), dict(_weights(built.model))
        for name in built.derived:
            target[name].copy_(source[name])

    def _checkpoint(self, head: str | None) -> Checkpoint:
        name = head or "base"
        if name not in self.checkpoints:
            raise InvalidInput(f"{name!r} is no expert of the job", field="head", remedy="name an expert")
        return self.checkpoints[name]


def _check_missing(model: PreTrainedModel, missing: set[str], auto_class: str, head: str | None) -> None:
    unused = {name for name in missing if auto_class == UNUSED_POOLER[0] and name.startswith(UNUSED_POOLER[1])}
    for name in unused:
        model.get_parameter(name).fill_(float("nan"))
    if missing - unused:
        owner = f"expert {head!r}" if head else "the base"
        raise InvalidInput(
            f"{type(model).__name__} needs {', '.join(sorted(missing - unused)[:3])}, which {owner} does not have",
            field="head",
            remedy="name the expert whose head the objective uses, or use another evaluator",
        )


def _model_class(auto_class: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    found: Any = getattr(transformers, auto_class, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    if not (auto_class.startswith("AutoModel") and hasattr(found, "from_config")):
        raise InvalidInput(f"transformers has no model class {auto_class!r}", field="auto_class")
    try:
        with torch.device("meta"):
            return type(found.from_config(config, trust_remote_code=False))
    except ValueError as error:
        raise InvalidInput(
            f"{auto_class} does not know models of type {config.model_type!r}", field="auto_class"
        ) from error


def _load(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    checkpoint: Checkpoint,
) -> tuple[PreTrainedModel, set[str]]:
    """Load tensors on the CPU into a new model; returns it and the parameters that none of them filled."""
    try:
        with quiet(logging.CRITICAL):  # what its loading reports say is checked here
            loaded: Any = model_class.from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
            )
    except (RuntimeError, ValueError) as error:
        raise InvalidCheckpoint(
            f"{checkpoint.name}: its tensors do not fit its config.json: {str(error).strip().splitlines()[-1]}"
        ) from error
    model: PreTrainedModel = loaded[0]
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    return model, set(loaded[1]["missing_keys"])


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, tied ones once."""
    yield from model.named_parameters()
    persistent = set(model.state_dict())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _probe(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.cpu()
    return torch.full([1] * tensor.dim(), float("nan"), dtype=tensor.dtype).expand(tensor.shape)
