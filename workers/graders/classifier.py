"""A classifier as a judge: whether another checkpoint puts an answer into a class, such as refusals or toxic texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from optimizer.errors import InvalidCheckpoint, InvalidInput
from optimizer.spec import ModelRef
from workers.checkpoints import open_checkpoint
from workers.evaluators.base import Cancelled, by_length
from workers.evaluators.loading import load_tokenizer
from workers.graders.base import Answers, Grader, GraderInputs, grader
from workers.quiet import quiet

_MAX_LENGTH = 1024


@grader("classifier")
class Classifier(Grader):
    """1 if a sequence classifier gives the class at least ``threshold``, else 0; its probability without a threshold."""

    summary: ClassVar[str] = (
        "Whether a classifier, a checkpoint of yours, puts the answer into a class, such as refusals."
    )
    columns: ClassVar[dict[str, str]] = {}

    class Options(Grader.Options):
        """Options of a classifier as a judge."""

        path: str = Field(
            max_length=4096, description="Directory of the classifier's checkpoint, below the server's roots."
        )
        label: str = Field(description="The class that counts: its name in the classifier's config, or its number.")
        threshold: float | None = Field(
            default=0.5,
            ge=0,
            le=1,
            description="Least probability of the class for a score of 1; none: the probability.",
        )
        with_prompt: bool = Field(
            default=False, description="Show the classifier the prompt and the answer as a pair, not the answer alone."
        )
        batch_size: int = Field(default=16, ge=1, le=4096, description="Most texts in one forward pass.")

    options: Options

    def __init__(self, options: Options, inputs: GraderInputs) -> None:
        super().__init__(options, inputs)
        self._prompts = inputs.rows.texts("prompt") if options.with_prompt else None
        path = inputs.roots.resolve(ModelRef(path=options.path), f"{inputs.field}.options")
        self.digest = open_checkpoint(path, f"{inputs.field}.options.path").digest
        self._tokenizer, self._model = _load(path, self.digest, inputs.field)
        self._label = _label(self._model, options.label, f"{inputs.field}.options.label")

    def grade(self, answers: Answers) -> Sequence[float]:
        """See `Grader.grade`."""
        encoded = self._encode(answers.texts)
        out = [0.0] * len(answers.texts)
        cast("nn.Module", self._model).to(answers.device)
        padded = self._model.config.get_text_config().pad_token_id is not None
        with torch.inference_mode():
            for items in by_length(
                [len(ids) for ids in encoded["input_ids"]], self.options.batch_size if padded else 1
            ):
                if answers.cancelled():
                    raise Cancelled("the evaluation was called off")
                for item, probability in zip(items.tolist(), self._probabilities(encoded, items.tolist()), strict=True):
                    threshold = self.options.threshold
                    out[item] = probability if threshold is None else float(probability >= threshold)
        return out

    def _encode(self, texts: Sequence[str]) -> Any:
        limit = min(self._tokenizer.model_max_length, self._positions(), _MAX_LENGTH)
        first, second = (list(texts), None) if self._prompts is None else (self._prompts, list(texts))
        encoded = self._tokenizer(first, second, truncation=True, max_length=limit, verbose=False)
        filler = self._tokenizer.unk_token_id or 0
        for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True):
            if not ids:  # an empty text of a tokenizer without special tokens
                ids.append(filler)
                mask.append(1)
        return encoded

    def _positions(self) -> int:
        return int(getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or _MAX_LENGTH)

    def _probabilities(self, encoded: Any, items: list[int]) -> list[float]:
        names = [name for name in encoded if name in ("input_ids", "attention_mask", "token_type_ids")]
        batch = self._tokenizer.pad(
            {name: [encoded[name][item] for item in items] for name in names}, return_tensors="pt"
        )
        logits = self._model(**batch.to(self._model.device)).logits
        found: list[float] = logits.float().softmax(dim=-1)[:, self._label].cpu().tolist()
        return found


@lru_cache(maxsize=2)
def _load(path: Path, digest: str, field: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Open a classifier; the digest keeps an older one at the same path from being taken for it."""
    del digest
    tokenizer = load_tokenizer(path, field)
    try:
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except Exception as error:  # on malformed files the libraries raise anything, plain Exception included
        first = str(error).strip().split("\n", 1)[0]
        raise InvalidCheckpoint(
            f"{path.name!r} is no usable classifier: {first}",
            field=f"{field}.options.path",
            remedy="save a sequence classifier with its tokenizer there by `save_pretrained`",
        ) from error
    model.requires_grad_(False)
    model.eval()
    return tokenizer, model


def _label(model: PreTrainedModel, name: str, field: str) -> int:
    names = {str(label): number for number, label in (model.config.id2label or {}).items()}
    if name in names:
        return int(names[name])
    if name.isdecimal() and int(name) < int(model.config.num_labels or 0):
        return int(name)
    raise InvalidInput(
        f"the classifier has no class {name!r}", field=field, remedy=f"its classes: {', '.join(list(names)[:20])}"
    )
