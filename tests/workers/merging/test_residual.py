"""Scaling a layer of every family: whatever the names say, a layer that adds nothing must be the identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from optimizer.errors import InvalidInput
from optimizer.recipe import Leaf, PlannedLayer, Recipe
from tests.workers.models import model_ids, open_models
from workers.merging.configs import stacks
from workers.merging.engine import MergeEngine
from workers.merging.resident import ResidentModels
from workers.merging.residual import FAMILIES, writers

IDS = torch.tensor([[3, 8, 9, 10, 2], [4, 20, 21, 22, 2]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
TOKENS = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**TOKENS, **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32}
VISION: dict[str, Any] = {**SIZES, "image_size": 8, "patch_size": 4}
ENCODER: dict[str, Any] = {**TOKENS, **SIZES, "max_position_embeddings": 40}
GPT: dict[str, Any] = {"vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 16, "n_head": 2, "n_layer": 2}
POST_NORM = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "distilbert")
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen3", "glm", "glm4"), TEXT | {"head_dim": 8}),
    **dict.fromkeys(("helium", "nemotron"), TEXT | {"head_dim": 8}),
    **dict.fromkeys(("vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model"), VISION),
    **dict.fromkeys(POST_NORM, ENCODER),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), GPT | {"n_positions": 32}),
    **dict.fromkeys(("gptj", "codegen"), GPT | {"n_head": 4, "rotary_dim": 4, "n_positions": 32}),
    "distilbert": {"vocab_size": 24, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "gpt_neo": {**TOKENS, "hidden_size": 16, "num_heads": 2, "num_layers": 2, "max_position_embeddings": 32}
    | {"attention_types": [[["global", "local"], 1]]},
    "bloom": {**TOKENS, "hidden_size": 16, "n_head": 2, "n_layer": 2},
    "falcon": {**TOKENS, **SIZES, "num_kv_heads": 2},
    "mpt": {"vocab_size": 24, "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 32},
    "opt": TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "modernbert": TEXT | {"cls_token_id": 1, "sep_token_id": 2},
    "mixtral": TEXT | {"num_local_experts": 2},
    "olmoe": TEXT | {"num_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": TEXT
    | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8},
    "qwen3_moe": TEXT | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8},
}  # fmt: skip


def resident(model_type: str, path: Path) -> ResidentModels:
    torch.manual_seed(0)
    model = AutoModel.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(model_type, **SPECIAL.get(model_type, TEXT))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(path)
    checkpoints, layout = open_models(path, {"one": path})
    return ResidentModels(checkpoints, layout, MergeEngine(checkpoints, layout), torch.device("cpu"), torch.float32)


def layer_ends(models: ResidentModels, scale: float) -> tuple[Tensor, Tensor, nn.Module]:
    """What goes into the first layer and what comes out, where it is scaled; and the layer."""
    plan = [PlannedLayer(layer=0, scale=scale), PlannedLayer(layer=1)]
    models.apply(Recipe(models=model_ids(models.checkpoints), root=Leaf(model="one"), layers=plan))
    model = models.model(None, "AutoModel")
    layer = next(stacks(model, 2))[0]
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        seen.extend([arguments[0] if arguments else named["hidden_states"], out[0] if isinstance(out, tuple) else out])

    handle = layer.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(PIXELS if hasattr(model.config, "image_size") else IDS)
    handle.remove()
    return seen[0], seen[1], layer


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_layer_scaled_by_nothing_adds_nothing(model_type: str, tmp_path: Path) -> None:
    models = resident(model_type, tmp_path)
    before, after, layer = layer_ends(models, 0.0)
    wanted = before
    if model_type in POST_NORM:  # what is left are the norms after the two additions
        for name, module in layer.named_modules():
            if "norm" in name.lower():
                wanted = module(wanted)
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-5)
    full, half = (layer_ends(models, scale)[1] for scale in (1.0, 0.5))
    assert not torch.allclose(full, after, atol=1e-3) and not torch.allclose(half, full, atol=1e-3)
    assert not torch.allclose(half, after, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "bert"])
def test_every_sublayer_adds_that_share(model_type: str, tmp_path: Path) -> None:
    """With a small scale the second sub-layer sees almost what it sees at 0, so additions are linear in it."""
    models = resident(model_type, tmp_path)
    outs = [layer_ends(models, scale)[1].double() for scale in (0.0, 0.001, 0.002)]
    error = (outs[2] - outs[0]) - 2 * (outs[1] - outs[0])
    assert float(error.norm()) < 0.05 * float((outs[2] - outs[0]).norm())


def test_model_types_that_are_not_known() -> None:
    with pytest.raises(InvalidInput, match="'t5' model write into the residual stream is not known") as caught:
        writers({"model_type": "t5"}, ["layer.0.SelfAttention.o.weight"], "recipe.layers.0.scale")
    assert caught.value.field == "recipe.layers.0.scale" and "scale at 1" in str(caught.value.remedy)
    with pytest.raises(InvalidInput, match=r"no parameter of mlp\.down_proj"):
        writers({"model_type": "llama"}, ["self_attn.o_proj.weight", "mlp.fc2.weight"], "x")
