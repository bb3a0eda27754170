"""Writes data/yaml.safetensors: what mergekit makes of the configurations in `yaml_cases`.

Made with mergekit 0.1.5 in an environment of its own, from the root of the repository:

    python -m tests.workers.merging.reference.make_yaml

The models are tiny Llamas in float64, and so is every computation. A model is kept as one vector: its tensors, flat, in
the order of their names. The inputs stand under ``in.<model>``, the results under ``out.<case>``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.workers.merging.reference.yaml_cases import CASES

DATA = Path(__file__).parent / "data" / "yaml.safetensors"
LAYERS = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "torch_dtype": "float64",
}


def shapes(layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model with so many layers, in order of the names."""
    inside = {
        "input_layernorm.weight": (4,),
        "mlp.down_proj.weight": (4, 6),
        "mlp.gate_proj.weight": (6, 4),
        "mlp.up_proj.weight": (6, 4),
        "post_attention_layernorm.weight": (4,),
        "self_attn.k_proj.weight": (2, 4),
        "self_attn.o_proj.weight": (4, 4),
        "self_attn.q_proj.weight": (4, 4),
        "self_attn.v_proj.weight": (2, 4),
    }
    out: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (8, 4),
        "model.embed_tokens.weight": (8, 4),
        "model.norm.weight": (4,),
    }
    out |= {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in inside.items()}
    return dict(sorted(out.items()))


def write_model(path: Path, vector: torch.Tensor) -> None:
    """Write a checkpoint from the vector of its tensors."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    parts = torch.split(vector, [torch.Size(shape).numel() for shape in shapes().values()])
    tensors = {name: part.view(shape).clone() for (name, shape), part in zip(shapes().items(), parts, strict=True)}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def read_vector(path: Path) -> torch.Tensor:
    """Return a checkpoint's tensors as one vector, in order of their names."""
    tensors: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def inputs() -> dict[str, torch.Tensor]:
    """Return the models: a base, and experts that differ from it by as much as its weights are large."""
    generator = torch.Generator().manual_seed(0)
    size = sum(torch.Size(shape).numel() for shape in shapes().values())
    base = torch.randn(size, generator=generator, dtype=torch.float64) * 0.3
    deltas = {name: torch.randn(size, generator=generator, dtype=torch.float64) * 0.2 for name in "abc"}
    return {"base": base} | {name: base + delta for name, delta in deltas.items()}


def main() -> None:
    """Run mergekit on every case."""
    from mergekit.config import MergeConfiguration  # type: ignore[import-not-found, unused-ignore]
    from mergekit.merge import run_merge  # type: ignore[import-not-found, unused-ignore]
    from mergekit.options import MergeOptions  # type: ignore[import-not-found, unused-ignore]

    vectors = inputs()
    out = {f"in.{name}": vector for name, vector in vectors.items()}
    with tempfile.TemporaryDirectory() as root:
        for name, vector in vectors.items():
            write_model(Path(root, name), vector)
        for case, text in CASES.items():
            data = yaml.safe_load(text)
            for name in vectors:  # references become paths
                text = text.replace(f"model: {name}", f"model: {root}/{name}")
            data = {**yaml.safe_load(text), "dtype": "float64"}
            target = Path(root, "out", case)
            options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
            run_merge(MergeConfiguration.model_validate(data), str(target), options)
            out[f"out.{case}"] = read_vector(target)
    DATA.parent.mkdir(exist_ok=True)
    save_file(out, DATA)


if __name__ == "__main__":
    main()
