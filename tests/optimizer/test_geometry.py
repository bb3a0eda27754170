"""Depths and kinds of parameters, read off the names of real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from optimizer.geometry import Layout, Position, make_layout, module_kind, positions

SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=2, **SMALL))


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=2, **SMALL))


def clip() -> Any:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(num_hidden_layers=2, **SMALL))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=12, num_key_value_heads=2, **SMALL))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(num_hidden_layers=2, num_key_value_heads=2, num_local_experts=2, **SMALL)
    )


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(num_layers=2, num_decoder_layers=3, d_model=16, d_ff=32, d_kv=8, num_heads=2)
    )


def layout(make: Callable[[], Any], heads: frozenset[str] = frozenset()) -> Layout:
    with torch.device("meta"):
        model = make()
    return make_layout(((name, tuple(value.shape), "F32") for name, value in model.state_dict().items()), heads)


def found(layout: Layout, *parts: str) -> set[tuple[Position, str]]:
    """Where the parameters stand whose names contain all of ``parts``, and of what kind they are."""
    matching = [tensor for tensor in layout.tensors if all(part in tensor.name for part in parts)]
    assert matching, f"no parameter has {parts} in its name"
    return {(tensor.position, tensor.kind) for tensor in matching}


@pytest.mark.parametrize(
    ("make", "layers", "others"),
    [(bert, 2, 0), (vit, 2, 0), (clip, 2, 0), (llama, 12, 0), (gpt2, 2, 0), (mixtral, 2, 0), (t5, 5, 0)],
)
def test_every_parameter_has_a_depth_and_a_kind(make: Callable[[], Any], layers: int, others: int) -> None:
    out = layout(make)
    assert out.layers == layers
    assert sum(tensor.kind == "other" for tensor in out.tensors) == others
    assert {tensor.position for tensor in out.tensors} == {"input", *range(layers), "output"}
    for layer in range(layers):
        assert {tensor.kind for tensor in out.tensors if tensor.position == layer} == {"attention", "mlp", "norm"}
    assert [tensor.name for tensor in out.tensors] == sorted(tensor.name for tensor in out.tensors)


def test_bert() -> None:
    out = layout(bert)
    assert found(out, "word_embeddings") == found(out, "position_embeddings") == {("input", "embeddings")}
    assert found(out, "embeddings.LayerNorm") == {("input", "norm")}
    assert found(out, "layer.1.attention", "dense") == found(out, "layer.1", "query") == {(1, "attention")}
    assert found(out, "layer.0.attention.output.LayerNorm") == {(0, "norm")}
    assert found(out, "layer.1.intermediate") == found(out, "layer.1.output.dense") == {(1, "mlp")}
    assert found(out, "pooler") == found(out, "classifier") == {("output", "head")}


def test_vit() -> None:
    out = layout(vit)
    assert found(out, "cls_token") == found(out, "patch_embeddings") == {("input", "embeddings")}
    assert found(out, "layers.1.attention") == {(1, "attention")}
    assert found(out, "layers.0.layernorm_before") == {(0, "norm")}
    assert found(out, "layers.1.mlp") == {(1, "mlp")}
    assert found(out, "vit.layernorm") == {("output", "norm")}
    assert found(out, "classifier") == {("output", "head")}


def test_vit_as_saved_by_earlier_versions() -> None:
    kinds = {
        "vit.encoder.layer.3.attention.attention.query.weight": "attention",
        "vit.encoder.layer.3.attention.output.dense.weight": "attention",
        "vit.encoder.layer.3.intermediate.dense.weight": "mlp",
        "vit.encoder.layer.3.output.dense.weight": "mlp",
        "vit.encoder.layer.3.layernorm_after.weight": "norm",
    }
    assert {name: module_kind(name) for name in kinds} == kinds
    assert positions(kinds) == (dict.fromkeys(kinds, 3), 4)


def test_clip() -> None:
    out = layout(clip)
    assert found(out, "class_embedding") == {("input", "embeddings")}
    assert found(out, "pre_layrnorm") == {("input", "norm")}
    assert found(out, "post_layernorm") == {("output", "norm")}


def test_llama() -> None:
    out = layout(llama)
    assert found(out, "embed_tokens") == {("input", "embeddings")}
    assert found(out, "layers.11.self_attn") == {(11, "attention")}
    assert found(out, "layers.2.mlp") == {(2, "mlp")}
    assert found(out, "layers.2.post_attention_layernorm") == {(2, "norm")}
    assert found(out, "model.norm") == {("output", "norm")}
    assert found(out, "lm_head") == {("output", "head")}


def test_gpt2() -> None:
    out = layout(gpt2)
    assert found(out, "wte") == found(out, "wpe") == {("input", "embeddings")}
    assert found(out, "h.1.attn") == {(1, "attention")}
    assert found(out, "h.1.mlp") == {(1, "mlp")}
    assert found(out, "ln_f") == {("output", "norm")}


def test_mixtral() -> None:
    assert found(layout(mixtral), "layers.1.mlp.experts") == {(1, "mlp")}


def test_t5_numbers_the_decoder_after_the_encoder() -> None:
    out = layout(t5)
    assert found(out, "shared") == found(out, "encoder.embed_tokens") == {("input", "embeddings")}
    assert found(out, "encoder.block.1", "SelfAttention") == {(1, "attention")}
    assert found(out, "encoder.block.1", "DenseReluDense") == {(1, "mlp")}
    assert found(out, "decoder.block.0", "EncDecAttention") == {(2, "attention")}
    assert found(out, "decoder.block.2", "layer_norm") == {(4, "norm")}
    assert found(out, "decoder.final_layer_norm") == found(out, "encoder.final_layer_norm") == {("output", "norm")}


def test_heads_are_the_experts_own() -> None:
    heads = frozenset({"classifier.weight", "classifier.bias"})
    out = layout(bert, heads)
    assert {tensor.name for tensor in out.tensors if tensor.role == "head"} == heads
    assert found(out, "classifier") == {("output", "head")}
    assert len(out.shared) == len(out.tensors) - 2


def test_a_head_with_numbered_layers_does_not_count_as_depth() -> None:
    names = [("score.5.weight", (1,), "F32"), ("layers.0.mlp.weight", (1,), "F32")]
    assert make_layout(names).layers == 7
    out = make_layout(names, frozenset({"score.5.weight"}))
    assert out.layers == 1
    assert [(tensor.name, tensor.position) for tensor in out.tensors] == [
        ("layers.0.mlp.weight", 0),
        ("score.5.weight", "output"),
    ]
