"""Items without labels, and what a model says of them: what all label-free measures share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from optimizer.errors import InvalidCheckpoint, InvalidInput
from workers.evaluators import pixels
from workers.evaluators.base import Batch, Evaluator, Inputs
from workers.evaluators.likelihood import MAX_LOGITS
from workers.evaluators.loading import load_image_processor
from workers.evaluators.texts import MAX_LENGTH, load_texts, unpadded_batch

Kind = Literal["text_classification", "image_classification", "causal_lm"]

_AUTO_CLASSES: dict[Kind, str] = {
    "text_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "causal_lm": "AutoModelForCausalLM",
}
_ENDINGS: dict[str, Kind] = {
    "ForSequenceClassification": "text_classification",
    "ForImageClassification": "image_classification",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}


@dataclass(frozen=True)
class Outputs:
    """What a model says of a batch, at the positions of each item one after the other.

    Attributes:
        logits: shape (positions, classes), float32. A classifier has one position an item; a language model one a token,
            at which it predicts the next.
        counts: shape (batch,): positions of each item.
        hidden: for each layer, embeddings first, hidden states of shape (places, dimensions), and how many places each
            item has, shape (batch,); empty unless asked for.
    """

    logits: Tensor
    counts: Tensor
    hidden: list[tuple[Tensor, Tensor]]


class UnlabelledOptions(Evaluator.Options):
    """Options of measures without labels."""

    model: Kind | None = Field(
        default=None,
        description="What the model does, by the name of the evaluator; told from the checkpoint's architecture by default.",
        examples=["causal_lm"],
    )
    max_length: int | None = Field(default=None, ge=2, le=1_000_000, description=MAX_LENGTH, examples=[256])


class Unlabelled(Evaluator):
    """An evaluator of items without labels: texts for a classifier or a language model, or images for a classifier.

    Attributes:
        kind: what the model does.
        content: SHA-256 over what the model reads, as hexadecimal digits.
    """

    columns: ClassVar[dict[str, str]] = {
        "text": "The text, where the model reads texts.",
        "text_pair": "A second text, for classifiers of pairs (optional).",
        "image": "The image, where the model reads images.",
    }
    auto_class: ClassVar[str] = _AUTO_CLASSES["text_classification"]
    uses_head: ClassVar[bool] = True

    def __init__(self, options: UnlabelledOptions, inputs: Inputs, room: int = 0) -> None:
        """Prepare the rows; see `Evaluator`.

        Args:
            options: of the evaluator.
            inputs: the rows and what they are to be read with.
            room: tokens by which texts must stay below the longest, for what is to be written after them. With any, texts
                that are too long lose their beginning.
        """
        super().__init__(options, inputs)
        self.kind = options.model or _kind_of(self.config, inputs.field)
        self.auto_class = _AUTO_CLASSES[self.kind]  # type: ignore[misc]  # of an instance it depends on the checkpoint
        self._pixels: pixels.Pixels | None = None
        everything = torch.arange(len(self))
        if self.kind == "image_classification":
            processor = load_image_processor(inputs.model_dir, inputs.field)
            self._pixels = pixels.prepare(processor, inputs.rows, pixels.mode_of(self.config))
            self._batches = self._pixels.batches(options.batch_size, everything)
            self._lengths = np.ones(len(self), dtype=np.int64)
            return
        texts = load_texts(inputs, self.config, options.max_length, room)
        self.tokens = texts.tokens
        self._lengths = np.array(texts.lengths)
        if self.kind == "causal_lm":
            vocabulary = getattr(self.config.get_text_config(), "vocab_size", None) or 1
            self._batches = texts.batches(options.batch_size, everything, MAX_LOGITS // vocabulary)
        else:
            self._batches = texts.batches(unpadded_batch(self.config, options.batch_size), everything)

    @property
    def content(self) -> str:
        """SHA-256 over what the model reads of the items, as hexadecimal digits; another tokenizer gives another."""
        parts = [b""] * len(self)
        for batch in self._batches:
            for name, tensor in sorted(batch.inputs.items()):
                for item, row in zip(batch.items, tensor, strict=True):
                    own = row if self._pixels is not None else row[: self._lengths[item]]
                    parts[item] += f"{name}{tuple(own.shape)}".encode() + own.numpy().tobytes()
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def weights(self, most: int | None = None) -> NDArray[np.float32] | None:
        """Return how many predictions a model makes about each item, shape (items,); None where it is always one.

        Args:
            most: see `outputs`.
        """
        if self.kind != "causal_lm":
            return None
        return np.minimum(self._lengths, most or self._lengths.max()).astype(np.float32)

    def outputs(self, model: PreTrainedModel, batch: Batch, most: int | None = None, hidden: bool = False) -> Outputs:
        """Run a model on a batch.

        Args:
            model: of the class that ``auto_class`` names.
            batch: one of the evaluator's.
            most: most positions and places of an item, spread evenly over it, the last included; all by default.
            hidden: whether hidden states are wanted.
        """
        if self._pixels is not None:
            inputs = self._pixels.inputs(model, batch)
        else:
            inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
        options: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
        if self.kind == "causal_lm":
            options["use_cache"] = False
        found = model(**inputs, **options)
        lengths = torch.from_numpy(self._lengths[batch.items])
        states = [_places(layer) for layer in _hidden_states(found)] if hidden else []
        layers = [_spread(layer, lengths if self._pixels is None else None, most) for layer in states]
        if self.kind == "causal_lm":
            logits, counts = _spread(found.logits, lengths, most)
        else:
            logits, counts = found.logits, torch.ones(len(batch.items), dtype=torch.int64)
        return Outputs(logits.float(), counts, layers)


def _kind_of(config: PreTrainedConfig, field: str) -> Kind:
    for architecture in config.architectures or ():
        for ending, kind in _ENDINGS.items():
            if architecture.endswith(ending):
                return kind
    raise InvalidCheckpoint(
        f"the checkpoint's architecture, {', '.join(config.architectures or ('none',))}, does not say what it predicts",
        field=f"{field}.options.model",
        remedy=f"say it by the option `model`: {', '.join(_AUTO_CLASSES)}; or name the expert whose head is used",
    )


def _hidden_states(found: Any) -> tuple[Tensor, ...]:
    states = getattr(found, "hidden_states", None)
    if not states:
        raise InvalidInput(
            "the model does not give its hidden states", field="evaluator", remedy="use `divergence`, which needs none"
        )
    return tuple(states)


def _places(layer: Tensor) -> Tensor:
    """Return hidden states as (batch, places, dimensions), also of a convolution."""
    return layer.flatten(2).transpose(1, 2) if layer.dim() == 4 else layer


def _spread(values: Tensor, lengths: Tensor | None, most: int | None) -> tuple[Tensor, Tensor]:
    """Return values at places spread evenly over each item, one item after the other, and how many each has.

    Args:
        values: shape (batch, places, dimensions), padded on the right.
        lengths: shape (batch,): places of each; all by default.
        most: see `Unlabelled.outputs`.
    """
    if lengths is None:
        lengths = torch.full((len(values),), values.shape[1])
    chosen = [_even(int(length), most) for length in lengths]
    rows = torch.cat([torch.full((len(places),), row) for row, places in enumerate(chosen)])
    picked = values[rows.to(values.device), torch.cat(chosen).to(values.device)]
    return picked, torch.tensor([len(places) for places in chosen])


def _even(length: int, most: int | None) -> Tensor:
    """Return at most so many places of so many, spread evenly, the last included."""
    if most is None or length <= most:
        return torch.arange(length)
    return (torch.arange(1, most + 1) * length) // most - 1
