"""Real PEFT LoRA adapters on the tiny models, with random factors, for tests only."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from workers.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, open_checkpoint
from workers.quiet import quiet


@contextmanager
def silence() -> Iterator[None]:
    """PEFT warns of tied embeddings, saved embeddings and layers that store (in, out)."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


def make_adapter(model: PreTrainedModel, path: Path, seed: int = 0, **config: Any) -> Path:
    """Wrap a model, fill everything that would be trained at random, and save the adapter."""
    with silence():
        wrapped = get_peft_model(model, LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        wrapped.save_pretrained(path)
    return path


def causal(base: Path, path: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter to a language model; of rank 4 on queries and values by default."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    with silence():
        return make_adapter(AutoModelForCausalLM.from_pretrained(base), path, seed, **settings)


def classifier(base: Path, path: Path, labels: int, seed: int = 0, **config: Any) -> Path:
    """An adapter to a classifier with a head of its own; of rank 4 on queries and values by default."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | config
    with silence():
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels, ignore_mismatched_sizes=True
        )
        return make_adapter(model, path, seed, **settings)


def wrapped(auto: Any, base: Path, adapter: Path, **options: Any) -> PeftModel:
    """PEFT's own view of an adapter."""
    with silence():
        return PeftModel.from_pretrained(auto.from_pretrained(base, **options), adapter).eval()


def merged(auto: Any, base: Path, adapter: Path, **options: Any) -> dict[str, Tensor]:
    """The weights of PEFT's own merge, by transformers' names."""
    with silence():
        out: dict[str, Tensor] = wrapped(auto, base, adapter, **options).merge_and_unload().state_dict()
    return out


def open_all(base: Path, adapters: Sequence[Path]) -> dict[str, Checkpoint]:
    """A base and adapters (or whole models) to it, called after their directories."""
    opened = open_checkpoint(base, "base")
    return {"base": opened} | {path.name: open_checkpoint(path, path.name, None, opened) for path in adapters}


def changed(
    source: Path,
    target: Path,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
    config: Callable[[dict[str, Any]], object] = lambda _: None,
) -> Path:
    """A copy of an adapter with other tensors or another configuration."""
    target.mkdir()
    weights = load_file(source / ADAPTER_WEIGHTS)
    tensors(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, target / ADAPTER_WEIGHTS)
    data = json.loads((source / ADAPTER_CONFIG).read_text())
    config(data)
    (target / ADAPTER_CONFIG).write_text(json.dumps(data))
    return target
