"""Canonical names of parameters: the same for a headless base and for experts that wrap it with a head.

A base saved as ``BertModel`` calls a tensor ``embeddings.…``, an expert saved as ``BertForSequenceClassification``
calls it ``bert.embeddings.…``; the canonical name is without the architecture's prefix. Old checkpoints call the
weight and bias of a layer norm gamma and beta. What is stored twice although the architecture ties it (the output
layer of many language models) counts once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel

from optimizer.errors import InvalidCheckpoint
from workers.checkpoints import Checkpoint

OUTPUT_LAYER = re.compile(r"(^|\.)(lm_head|embed_out|predictions\.decoder)\.weight$")
"""Names of the layer that gives each token its score."""

_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def canonical_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checkpoint's own name of every tensor by its canonical name; tied duplicates are left out.

    Raises:
        InvalidCheckpoint: transformers does not know the architecture, or two tensors get the same name.
    """
    model_class = architecture(checkpoint)
    prefix = f"{model_class.base_model_prefix}." if model_class.base_model_prefix else ""
    duplicates = _tied_duplicates(checkpoint, model_class)
    out: dict[str, str] = {}
    for raw in checkpoint.tensors:
        if raw in duplicates:
            continue
        name = raw.removeprefix(prefix)
        for old, new in _LEGACY.items():
            name = name.replace(old, new)
        if name in out:
            raise InvalidCheckpoint(
                f"{checkpoint.name} has both {out[name]!r} and {raw!r}, which are the same parameter",
                field=_field(checkpoint),
            )
        out[name] = raw
    return out


def architecture(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """Return the model class that the checkpoint's config names, or the headless one of its model type.

    Raises:
        InvalidCheckpoint: transformers knows neither.
    """
    for name in checkpoint.config.get("architectures") or []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InvalidCheckpoint(
            f"{checkpoint.name} has the model type {model_type!r}, which transformers does not know",
            field=_field(checkpoint),
            remedy="code that comes with a checkpoint is never run; use an architecture that is part of transformers",
        )
    headless: Any = MODEL_MAPPING.get(CONFIG_MAPPING[model_type], PreTrainedModel)
    return cast("type[PreTrainedModel]", headless[0] if isinstance(headless, tuple) else headless)


def tied_output(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Return the checkpoint's names of an output layer that is tied to its embeddings, and of these.

    None where the architecture has no such layer, where the config does not tie it, or where the checkpoint stores a
    different one: transformers then does not tie it either.
    """
    model_class = architecture(checkpoint)
    if not _ties_embeddings(checkpoint.config, model_class):
        return None
    tied = model_class._tied_weights_keys or {}
    for output, source in tied.items() if isinstance(tied, Mapping) else ():
        if not OUTPUT_LAYER.search(output) or source not in checkpoint.tensors:
            continue
        if output not in checkpoint.tensors or _equal(checkpoint, output, source):
            return output, source
    return None


def _field(checkpoint: Checkpoint) -> str:
    return "base" if checkpoint.name == "base" else "experts"


def _tied_duplicates(checkpoint: Checkpoint, model_class: type[PreTrainedModel]) -> set[str]:
    if not _ties_embeddings(checkpoint.config, model_class):
        return set()
    out = set()
    tied = model_class._tied_weights_keys or {}
    for pattern, target in tied.items() if isinstance(tied, Mapping) else ():
        for name in checkpoint.tensors:
            if re.fullmatch(pattern, name) and target in checkpoint.tensors and _equal(checkpoint, name, target):
                out.add(name)
    return out


def _ties_embeddings(config: Mapping[str, Any], model_class: type[PreTrainedModel]) -> bool:
    default = getattr(model_class.config_class, "tie_word_embeddings", True)
    return bool(config.get("tie_word_embeddings", default))


def _equal(checkpoint: Checkpoint, left: str, right: str) -> bool:
    return torch.equal(checkpoint.tensor(left), checkpoint.tensor(right))
