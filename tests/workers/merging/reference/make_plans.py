"""What mergekit 0.1.5 makes of stacks and swaps of layers of two tiny Llama models.

Run in an environment of its own with mergekit 0.1.5 (pip install mergekit==0.1.5), from the repository's root:
    python tests/workers/merging/reference/make_plans.py
It writes data/plans.safetensors (the two models) and data/plans.json (the slices, and by tensor of mergekit's result
the SHA-256 of its bytes).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).parent / "data"
CONFIG: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALED: list[dict[str, Any]] = [
    {"filter": "o_proj", "value": 0.7},
    {"filter": "down_proj", "value": 0.7},
    {"value": 1.0},
]
CASES: dict[str, list[list[Any]]] = {
    "stack": [["a", 0, 3], ["b", 1, 4]],
    "repeat": [["a", 0, 2], ["a", 1, 3], ["a", 1, 4]],
    "swap": [["a", 0, 1], ["b", 1, 2], ["a", 2, 4]],
    "remove": [["b", 0, 1], ["b", 3, 4]],
    "scale": [["a", 0, 2], ["b", 2, 3, 0.7], ["a", 3, 4]],
}


def main() -> None:
    """Write both files."""
    DATA.mkdir(exist_ok=True)
    models: dict[str, torch.Tensor] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for seed, name in enumerate("ab"):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**CONFIG))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
            model.save_pretrained(root / name)
            models |= {f"{name}/{key}": value for key, value in load_file(root / name / "model.safetensors").items()}
        for case, slices in CASES.items():
            results[case] = {"slices": slices, **merged(root, slices, root / case)}
    save_file(models, DATA / "plans.safetensors")
    (DATA / "plans.json").write_text(json.dumps({"config": CONFIG, "cases": results}, indent=1) + "\n")


def merged(root: Path, slices: list[list[Any]], out: Path) -> dict[str, Any]:
    """Let mergekit stack the slices; returns the number of layers and the digests."""
    sources = []
    for model, first, end, *scale in slices:
        source: dict[str, Any] = {"model": str(root / model), "layer_range": [first, end]}
        if scale:
            assert scale == [SCALED[0]["value"]]
            source["parameters"] = {"scale": SCALED}
        sources.append({"sources": [source]})
    data = {"merge_method": "passthrough", "dtype": "float32", "slices": sources}
    options = import_module("mergekit.options").MergeOptions(copy_tokenizer=False, write_model_card=False)
    config = import_module("mergekit.config").MergeConfiguration.model_validate(data)
    import_module("mergekit.merge").run_merge(config, str(out), options)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    digests = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in sorted(tensors.items())}
    layers = json.loads((out / "config.json").read_text())["num_hidden_layers"]
    return {"layers": layers, "tensors": digests}


if __name__ == "__main__":
    main()
