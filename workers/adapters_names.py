"""Which of a base's tensors an adapter's names mean.

PEFT names a module as the wrapped class calls it in memory, behind ``base_model.model.``. That class may have a head
that the base was saved without, and transformers may call modules otherwise than the base's files do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimizer.errors import InvalidCheckpoint
from workers.checkpoints import Checkpoint
from workers.merging.configs import load_config
from workers.naming import architecture, canonical_names, tied_output
from workers.quiet import quiet

PREFIX = "base_model.model."
"""What PEFT puts before every name."""


class BaseNames:
    """Finds tensors of a base by the names that its parameters have in memory.

    Attributes:
        prefix: what classes with a head put before the names of the model inside, e.g. ``"bert."``.
        raw: the base's own name of every tensor by canonical name; tied duplicates are left out.
        tied: the base's names of an output layer that it ties to its embeddings, and of these; or None.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self.prefix = base_prefix(base)
        self.raw = canonical_names(base)
        self.tied = tied_output(base)

    def find(self, name: str) -> str | None:
        """Return the base's own name of the parameter that a wrapped model calls ``name``; None where it has none."""
        inside = name.removeprefix(self.prefix)
        return self.raw.get(inside) or self._in_memory.get(inside)

    def is_tied_output(self, name: str) -> bool:
        """Whether ``name`` is that of an output layer's weight that the base ties to its embeddings."""
        return self.tied is not None and name.removeprefix(self.prefix) == self.tied[0].removeprefix(self.prefix)

    def stored_transposed(self, name: str) -> bool:
        """Whether the module whose weight a wrapped model calls ``name`` stores it as (in, out)."""
        return name.removeprefix(self.prefix).removesuffix(".weight") in self._conv1d

    @cached_property
    def _in_memory(self) -> dict[str, str]:
        return {name.removeprefix(self.prefix): raw for raw, name in names_in_memory(self._base).items()}

    @cached_property
    def _conv1d(self) -> set[str]:
        with quiet(logging.CRITICAL), torch.device("meta"):
            model: PreTrainedModel = architecture(self._base)._from_config(load_config(self._base))  # type: ignore[no-untyped-call]
        return {name.removeprefix(self.prefix) for name, module in model.named_modules() if isinstance(module, Conv1D)}


def base_prefix(checkpoint: Checkpoint) -> str:
    """Return what the checkpoint's architecture puts before the names of the model inside a head; may be empty."""
    prefix = architecture(checkpoint).base_model_prefix
    return f"{prefix}." if prefix else ""


def names_in_memory(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what a checkpoint's architecture calls its parameters in memory, by the checkpoint's own names.

    Parameters that transformers fuses from several tensors on loading have no entry. Found out by loading a stand-in
    of one element for every tensor.

    Raises:
        InvalidCheckpoint: transformers cannot load a model of these tensors.
    """
    stand_ins = {raw: torch.zeros([1] * len(meta.shape)).expand(meta.shape) for raw, meta in checkpoint.tensors.items()}
    try:
        with quiet(logging.CRITICAL):
            model = architecture(checkpoint).from_pretrained(
                None, config=load_config(checkpoint), state_dict=dict(stand_ins), dtype=torch.float32
            )
    except (RuntimeError, ValueError) as error:
        raise InvalidCheckpoint(
            f"{checkpoint.name}: its tensors do not fit its config.json: {str(error).strip().splitlines()[-1]}"
        ) from error
    origin = {tensor.untyped_storage().data_ptr(): raw for raw, tensor in stand_ins.items()}
    out: dict[str, str] = {}
    for name, tensor in _weights(model):
        raw = origin.get(tensor.untyped_storage().data_ptr())
        if raw is not None and tensor.shape == stand_ins[raw].shape:
            out.setdefault(raw, name)
    return out


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
