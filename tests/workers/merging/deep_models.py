"""Tiny models with four layers, for layer plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification
from transformers import AutoModelForSequenceClassification as AutoModelForText

LAYERS = 4
TOKENS = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**TOKENS, **SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True},
    "qwen2": {**TOKENS, **SIZES, "num_key_value_heads": 1, "max_position_embeddings": 32, "sliding_window": 3}
    | {"use_sliding_window": True, "max_window_layers": 2},
    "gpt2": {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 16, "n_head": 2, "n_layer": LAYERS}
    | {"n_positions": 32},
    "bert": {**TOKENS, **SIZES, "max_position_embeddings": 32, "num_labels": 3},
    "vit": {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3},
    "mixtral": {**TOKENS, **SIZES, "num_key_value_heads": 1, "num_local_experts": 2, "max_position_embeddings": 32},
}
HEADS: dict[str, Any] = {"bert": AutoModelForText, "vit": AutoModelForImageClassification}
IDS = torch.tensor([[3, 8, 9, 10, 5], [4, 20, 21, 22, 7]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)


def auto_class(model_type: str) -> Any:
    """Transformers' class that makes such a model with its head."""
    return HEADS.get(model_type, AutoModelForCausalLM)


def save(model_type: str, path: Path, seed: int, **changes: Any) -> Path:
    """Save a model with random weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | changes)
    model = auto_class(model_type).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def outputs(model: Any) -> list[torch.Tensor]:
    """Logits, and for language models what it writes, with its cache."""
    if hasattr(model.config, "image_size"):
        return [model(PIXELS).logits]
    found = [model(IDS).logits]
    if model.can_generate():
        settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "use_cache": True}
        out = model.generate(IDS, return_dict_in_generate=True, output_logits=True, **settings)
        found += [out.sequences, *out.logits]
    return found
