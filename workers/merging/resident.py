"""One resident merged model: candidates are merged into it in place, and every head's model shares its memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from optimizer.errors import InvalidCheckpoint, InvalidInput
from optimizer.geometry import Layout
from optimizer.recipe import Recipe
from workers.checkpoints import Checkpoint
from workers.compatibility import head_tensors
from workers.merging.engine import MergeEngine
from workers.naming import canonical_names
from workers.quiet import quiet

UNUSED_POOLER = ("AutoModel", "pooler.")
"""Only the pooler of a headless model may be missing: nobody who asks for hidden states reads it. It is filled with NaN,
so that whoever does read it notices."""


@dataclass
class _Built:
    """A model and those of its parameters that are not the resident tensors themselves.

    Attributes:
        derived: parameters that transformers computes on loading (fused experts, kept in float32); reloaded after
            every merge.
    """

    model: PreTrainedModel
    head: str | None
    derived: list[str] = field(default_factory=list)


class ResidentModels:
    """The merged model in memory.

    Not safe to use from several threads: `apply` changes the weights of every model that `model` returned.

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
        self.shared: dict[str, Tensor] = {
            tensor.name: engine.source("base", tensor, device).to(dtype, copy=True) for tensor in layout.shared
        }

    def apply(self, recipe: Recipe) -> None:
        """Merge a recipe into the resident model, in place.

        Raises:
            InvalidInput, InfeasibleCandidate: see `MergeEngine.apply`.
        """
        self._engine.apply(recipe, self.shared)
        for built in self._models.values():
            self._refresh(built)

    def model(self, head: str | None, auto_class: str) -> PreTrainedModel:
        """Return the merged model with an expert's head, in evaluation mode; the same object on every call.

        Args:
            head: name of the expert whose head and config it has; None for the base's.
            auto_class: class of transformers, e.g. ``"AutoModelForSequenceClassification"``.

        Raises:
            InvalidInput: no such expert or class, or the class needs a head that the model does not have.
            InvalidCheckpoint: the head's tensors do not fit the expert's config.
        """
        if (head, auto_class) not in self._models:
            self._models[head, auto_class] = self._build(head, auto_class)
        return self._models[head, auto_class].model

    def _build(self, head: str | None, auto_class: str) -> _Built:
        checkpoint = self._checkpoint(head)
        config = load_config(checkpoint)
        model_class = _model_class(auto_class, config)
        tensors = self._tensors(checkpoint)
        # A probe has a tensor's shape but one element of memory, a NaN. Where a probe turns up in the loaded model,
        # with all of transformers' renaming done, the tensor it stands for belongs; what is NaN besides was computed
        # from probes; all the rest did not come from the checkpoint.
        probes = {name: _probe(tensor) for name, tensor in tensors.items()}
        model, missing = _load(model_class, config, probes, self.dtype, checkpoint)
        origin = {probe.untyped_storage().data_ptr(): tensors[name] for name, probe in probes.items()}
        built = _Built(model, head)
        for name, old in list(_weights(model)):
            tensor = origin.get(old.untyped_storage().data_ptr())
            if tensor is not None and tensor.shape == old.shape:
                _assign(model, name, tensor)
            elif old.is_floating_point() and bool(old.isnan().all()):
                built.derived.append(name)
            elif isinstance(old, nn.Parameter):
                missing.add(name)
        _check_missing(model, missing, auto_class, head)
        model.tie_weights(recompute_mapping=False)
        cast("nn.Module", model).to(self.device)  # what transformers computes; the other weights are there already
        self._refresh(built)
        return built

    def _tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """All tensors of a checkpoint by its own names: the shared ones merged, the others its own."""
        names = canonical_names(checkpoint)
        out = {raw: self.shared[name] for name, raw in names.items() if name in self.shared}
        for raw in head_tensors(checkpoint, self.layout).values():
            own = checkpoint.tensor(raw)
            out[raw] = own.to(self.device, self.dtype if own.is_floating_point() else own.dtype, copy=True)
        return out

    def _refresh(self, built: _Built) -> None:
        if not built.derived:
            return
        checkpoint = self._checkpoint(built.head)
        tensors = {name: tensor.cpu() for name, tensor in self._tensors(checkpoint).items()}
        loaded, _ = _load(type(built.model), load_config(checkpoint), tensors, self.dtype, checkpoint)
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


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Read a checkpoint's config with transformers, without running any code that it names.

    Raises:
        InvalidCheckpoint: transformers refuses it.
    """
    try:
        with quiet(logging.CRITICAL):  # what its loading reports say is checked here
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                checkpoint.path, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # whatever a hostile or broken config makes transformers raise
        raise InvalidCheckpoint(f"{checkpoint.name}: transformers refuses its config.json: {error}") from error
    # A config may name an attention kernel that would be downloaded and run; transformers' own choice is used instead.
    config._attn_implementation = None
    return config


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
