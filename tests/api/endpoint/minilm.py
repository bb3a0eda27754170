"""A repository of LoRA adapters of a real model: MiniLM, classifying the language of a word.

A few adapters are trained, most on the task and some on shuffled labels; the others are made from them by noise, a third of
them with their sign flipped, as in repositories where many adapters are of no use. Seeded, so that every machine with the
same libraries has the same.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, BertForSequenceClassification

from tests.workers.adapter_models import changed, silence
from workers.demo.experts import copy_base
from workers.demo.tasks import Row, Task, make_tasks
from workers.quiet import quiet

ADAPTERS = 36
TRAINED = 6
SHUFFLED = 2  # of the trained ones
STEPS = 16
BATCH = 32
HEAD_WORDS = 1024
SEARCH_ITEMS = 64
NOISE = 0.15


def write_minilm(root: Path) -> None:
    """Write ``base``, ``adapters`` and ``query.jsonl`` below ``root``, unless they are there."""
    stamp = {
        "adapters": ADAPTERS,
        "trained": TRAINED,
        "steps": STEPS,
        "items": SEARCH_ITEMS,
        "noise": NOISE,
        "version": 1,
    }
    if (root / "stamp.json").is_file() and json.loads((root / "stamp.json").read_text()) == stamp:
        return
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    copy_base(root / "encoder")
    task = next(task for task in make_tasks(SEARCH_ITEMS, 100) if task.name == "language")
    _write_base(root, task)
    for number in range(TRAINED):
        _train(
            root / "base", task, root / "adapters" / f"a{number:02}", seed=number, shuffled=number >= TRAINED - SHUFFLED
        )
    for number in range(TRAINED, ADAPTERS):
        source = root / "adapters" / f"a{number % TRAINED:02}"
        changed(source, root / "adapters" / f"a{number:02}", tensors=_Around(number, flipped=number % 3 == 0))
    rows = [{"text": text, "label": label} for text, label in task.search]
    (root / "query.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (root / "stamp.json").write_text(json.dumps(stamp))


class _Around:
    """Changes an adapter's tensors by noise, relative to each number, and flips the sign of B if asked."""

    def __init__(self, seed: int, *, flipped: bool) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._sign = -1.0 if flipped else 1.0

    def __call__(self, weights: dict[str, Tensor]) -> None:
        for name in sorted(weights):
            noise = 1 + NOISE * torch.randn(weights[name].shape, generator=self._generator)
            weights[name] = weights[name] * noise * (self._sign if "lora_B" in name else 1.0)


def _write_base(root: Path, task: Task) -> None:
    """The encoder as it is, with a head trained on its outputs."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(root / "encoder")
    names = dict(enumerate(task.labels))
    with quiet():
        model = BertForSequenceClassification.from_pretrained(
            root / "encoder", num_labels=len(names), id2label=names, label2id={name: n for n, name in names.items()}
        )
    inputs, labels = _batch(random.Random(0).sample(list(task.train), HEAD_WORDS), task, tokenizer)
    model.eval()  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        hidden = torch.cat(
            [
                model.bert(**{name: part[start : start + 128] for name, part in inputs.items()}).last_hidden_state[
                    :, :1
                ]
                for start in range(0, HEAD_WORDS, 128)
            ]
        )
    hidden = hidden.clone()
    pooler = model.bert.pooler
    assert pooler is not None
    head = [*pooler.parameters(), *model.classifier.parameters()]
    adam = torch.optim.Adam(head, lr=1e-3)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model.classifier(pooler(hidden)), labels)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    with quiet():
        model.save_pretrained(root / "base")
        tokenizer.save_pretrained(root / "base")


def _train(base: Path, task: Task, out: Path, *, seed: int, shuffled: bool) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = list(task.train)
    if shuffled:
        labels = [label for _, label in rows]
        rng.shuffle(labels)
        rows = [(text, label) for (text, _), label in zip(rows, labels, strict=True)]
    with silence():
        model = get_peft_model(
            BertForSequenceClassification.from_pretrained(base),
            LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]),
        )
    adam = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], lr=4e-3)
    for _ in range(STEPS):
        inputs, labels_of_batch = _batch(rng.sample(rows, BATCH), task, tokenizer)
        loss = model(**inputs, labels=labels_of_batch).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    with silence():
        model.save_pretrained(out)


def _batch(rows: Sequence[Row], task: Task, tokenizer: Any) -> tuple[dict[str, Tensor], Tensor]:
    inputs = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=16, return_tensors="pt")
    return dict(inputs), torch.tensor([task.labels.index(label) for _, label in rows])
