"""Scores an exported checkpoint with nothing but transformers: what a user does with what they take home."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from workers.quiet import quiet

BATCH = 100


@torch.inference_mode()
def plain_accuracy(checkpoint: Path, data: Path) -> float:
    """Return the accuracy of a text classifier on a JSONL file of `text` and `label`."""
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    right = 0
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        inputs = tokenizer(
            [row["text"] for row in batch], padding=True, truncation=True, max_length=16, return_tensors="pt"
        )
        predicted = model(**inputs).logits.argmax(dim=-1).tolist()
        labels = [model.config.id2label[number] for number in predicted]
        right += sum(label == row["label"] for label, row in zip(labels, batch, strict=True))
    return right / len(rows)
