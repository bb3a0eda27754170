"""Which tensors of a layer write into the residual stream, by model type.

Scaling exactly these scales what each sub-layer adds: h ← h + s · f(norm(h)), and in models that normalise after the
addition (BERT) h ← norm(h + s · f(h)). There a scale of 0 leaves the layer's norms in place, elsewhere it makes the
layer the identity. Scaling any other tensor would change what is computed in between.

Where a norm stands between the last projection and the addition (OLMo 2, Gemma 2), it would undo a scaled projection,
so its weight is scaled instead; Gemma's norms multiply by 1 + weight, which becomes scale · weight + (scale - 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from optimizer.errors import InvalidInput


@dataclass(frozen=True)
class Writers:
    """The modules of a layer that write into the residual stream.

    Attributes:
        sublayers: for each sub-layer patterns (``*`` matches anything) of its modules' names within the layer, of
            which at least one must be there.
        unit_offset: whether the modules are norms that multiply by 1 + weight.
    """

    sublayers: tuple[tuple[str, ...], ...]
    unit_offset: bool = False

    def contain(self, inner: str) -> bool:
        """Whether the parameter of that name within the layer writes into the residual stream."""
        module = inner.rpartition(".")[0] or inner
        return any(
            fnmatchcase(module, pattern) or fnmatchcase(inner, pattern)
            for patterns in self.sublayers
            for pattern in patterns
        )

    def missing(self, inner: Sequence[str]) -> list[str]:
        """Return the sub-layers none of whose modules is among a layer's parameters."""
        return [
            " or ".join(patterns)
            for patterns in self.sublayers
            if not any(Writers((patterns,)).contain(name) for name in inner)
        ]


def _simple(*modules: str) -> Writers:
    return Writers(tuple((module,) for module in modules))


_LLAMA = _simple("self_attn.o_proj", "mlp.down_proj")
_MIXTURE = Writers(
    (
        ("self_attn.o_proj",),
        ("mlp.down_proj", "mlp.experts*.down_proj", "mlp.shared_expert*.down_proj", "block_sparse_moe.experts*.w2"),
    )
)
_NORMED = _simple("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA_NORMED = Writers(_NORMED.sublayers, unit_offset=True)
_GPT2 = _simple("attn.c_proj", "mlp.c_proj")
_NEOX = _simple("attention.dense", "mlp.dense_4h_to_h")
_BLOOM = _simple("self_attention.dense", "mlp.dense_4h_to_h")
_BERT = _simple("attention.output.dense", "output.dense")
_CLIP = _simple("self_attn.out_proj", "mlp.fc2")

FAMILIES: dict[str, Writers] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "granite", "smollm3", "cohere", "cohere2",
         "olmo", "stablelm", "glm", "helium", "seed_oss", "nemotron"),
        _LLAMA,
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), _MIXTURE),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _NORMED),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_NORMED),
    "glm4": _simple("post_self_attn_layernorm", "post_mlp_layernorm"),
    "starcoder2": _simple("self_attn.o_proj", "mlp.c_proj"),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "gpt_neo": _simple("attn.attention.out_proj", "mlp.c_proj"),
    **dict.fromkeys(("gptj", "codegen"), _simple("attn.out_proj", "mlp.fc_out")),
    "gpt_neox": _NEOX,
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    "phi": _simple("self_attn.dense", "mlp.fc2"),
    "opt": _simple("self_attn.out_proj", "fc2"),
    "mpt": _simple("attn.out_proj", "ffn.down_proj"),
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "vit", "deit"), _BERT
    ),
    "distilbert": _simple("attention.out_lin", "ffn.lin2"),
    "modernbert": _simple("attn.Wo", "mlp.Wo"),
    "dinov2": _simple("attention.output.dense", "mlp.fc2"),
    **dict.fromkeys(("clip_vision_model", "clip_text_model", "siglip_vision_model"), _CLIP),
}  # fmt: skip
"""By model type; tests check each one by scaling a layer of such a model."""


def writers(config: Mapping[str, Any], inner: Sequence[str], field: str) -> Writers:
    """Return which parameters of a layer write into the residual stream.

    Args:
        config: the model's ``config.json``.
        inner: names of a layer's parameters, without what stands before and including the layer's number.
        field: dotted path of the scale, for errors.

    Raises:
        InvalidInput: the model type is not known, or its layers have other parameters than they should.
    """
    model_type = config.get("model_type")
    remedy = "leave the scale at 1, or give the layer a node of its own that scales the parameters you mean"
    if model_type not in FAMILIES:
        raise InvalidInput(
            f"which parameters of a {model_type!r} model write into the residual stream is not known, so its layers "
            "cannot be scaled",
            field=field,
            remedy=remedy,
        )
    found = FAMILIES[str(model_type)]
    missing = found.missing(inner)
    if missing:
        raise InvalidInput(
            f"the layer has no parameter of {missing[0]}, which writes into the residual stream of {model_type!r} models",
            field=field,
            remedy=remedy,
        )
    return found
