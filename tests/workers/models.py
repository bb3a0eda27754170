"""Tiny real Hugging Face checkpoints, written by transformers itself: a few KB each, seeded, for tests only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from optimizer.geometry import Layout
from optimizer.recipe import Leaf, Merge, ModelId, Recipe, Selector
from optimizer.spec import ModelRef, Scalar
from workers.checkpoints import Checkpoint, open_checkpoint
from workers.compatibility import inspect, raise_on_errors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>")
WORDS = tuple(f"w{number}" for number in range(57))
VOCABULARY = SPECIAL + WORDS
"""64 words; the tokenizer splits at white space, so a text is e.g. ``"w1 w2 w3"``."""


def tiny_bert(
    path: Path,
    labels: int = 3,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    spread: float = 0.3,
    layers: int = 2,
) -> Path:
    """Save a Bert sequence classifier with ``labels`` classes; ``shard_size`` like ``"20KB"`` makes several shards."""
    config = _bert_config(layers)
    config.num_labels = labels
    return _save(BertForSequenceClassification(config), path, seed, dtype, shard_size, spread)


def tiny_bert_base(
    path: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    spread: float = 0.3,
    layers: int = 2,
) -> Path:
    """Save a headless BertModel with the same encoder as `tiny_bert`; its names lack the prefix ``bert.``."""
    return _save(BertModel(_bert_config(layers)), path, seed, dtype, shard_size, spread)


def tiny_vit(
    path: Path,
    labels: int = 3,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    spread: float = 0.3,
) -> Path:
    """Save a ViT image classifier for 8×8 RGB images, with its image processor."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=3,
    )
    config.num_labels = labels
    _save(ViTForImageClassification(config), path, seed, dtype, shard_size, spread, text=False)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(path)
    return path


def tiny_segformer(
    path: Path,
    labels: int = 3,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    spread: float = 0.3,
) -> Path:
    """Save a Segformer that finds ``labels`` classes of pixels in 16×16 RGB images, with its image processor."""
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    config.num_labels = labels
    _save(SegformerForSemanticSegmentation(config), path, seed, dtype, shard_size, spread, text=False)
    SegformerImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def tiny_llama(
    path: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    spread: float = 0.3,
    tied: bool = True,
) -> Path:
    """Save a Llama causal language model; its output layer is tied to the embeddings unless ``tied`` is False."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=VOCABULARY.index("<s>"),
        eos_token_id=VOCABULARY.index("</s>"),
    )
    return _save(LlamaForCausalLM(config), path, seed, dtype, shard_size, spread, bert=False)


def tokenizer(*, bert: bool = True) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over `VOCABULARY`; with ``bert`` it adds [CLS] and [SEP]."""
    words = {word: number for number, word in enumerate(VOCABULARY)}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    if bert:
        core.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )


def open_models(
    base: Path, experts: Mapping[str, Path], heads: Sequence[str] = ("classifier.*",)
) -> tuple[dict[str, Checkpoint], Layout]:
    """Open a base and experts that fit together; returns the checkpoints by name, and their layout."""
    checkpoints = {"base": open_checkpoint(base, "base")}
    checkpoints |= {name: open_checkpoint(path, name) for name, path in experts.items()}
    layout, findings = inspect(checkpoints["base"], [checkpoints[name] for name in experts], heads)
    raise_on_errors(findings)
    return checkpoints, layout


def make_recipe(
    checkpoints: Mapping[str, Checkpoint],
    operator: str,
    coefficients: Sequence[float],
    groups: Sequence[Selector] = (Selector(),),
    **options: Scalar,
) -> Recipe:
    """Return a recipe over all experts with the same coefficients in every group."""
    return Recipe(
        models=model_ids(checkpoints),
        root=Merge(
            operator=operator,
            options=options,
            base=Leaf(model="base"),
            inputs=[Leaf(model=name) for name in checkpoints if name != "base"],
            groups=list(groups),
            coefficients=[list(coefficients) for _ in groups],
        ),
    )


def model_ids(checkpoints: Mapping[str, Checkpoint]) -> dict[str, ModelId]:
    """Return the models of a recipe over these checkpoints."""
    return {
        name: ModelId(ref=ModelRef(path=str(checkpoint.path)), digest=checkpoint.digest)
        for name, checkpoint in checkpoints.items()
    }


def _bert_config(layers: int) -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )


def _save(
    model: PreTrainedModel,
    path: Path,
    seed: int,
    dtype: torch.dtype,
    shard_size: str,
    spread: float,
    *,
    text: bool = True,
    bert: bool = True,
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise + 1.0 if "norm.weight" in name.lower() else noise)
    cast("nn.Module", model).to(dtype)
    model.save_pretrained(path, max_shard_size=shard_size)
    if text:
        tokenizer(bert=bert).save_pretrained(path)
    return path
