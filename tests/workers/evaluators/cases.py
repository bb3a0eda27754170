"""One case for each evaluator: a tiny real checkpoint, good rows, and rows that must be refused."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from optimizer.spec import DataSpec
from tests.workers.models import tiny_bert, tiny_bert_base, tiny_llama, tiny_segformer, tiny_vit
from workers.data import Rows, load_rows, no_rows
from workers.evaluators.base import EVALUATORS, Evaluator, Inputs
from workers.evaluators.reference import ReferenceEvaluator
from workers.policy import Policy
from workers.quiet import quiet
from workers.roots import NOTHING, Roots

FIELD = "objectives.0"

_AUTO_CLASSES: dict[Any, str] = {tiny_llama: "AutoModelForCausalLM"}  # of evaluators for more than one kind of model

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What the conformance suite needs to know of an evaluator.

    Attributes:
        checkpoint: writes a checkpoint into a directory.
        rows: good rows of different lengths, at least five.
        bad: for each role, values that must be refused; none where the evaluator has no roles of its own.
        options: of the evaluator.
        smooth: a metric that changes a little when a model's weights do; None where all change in steps.
        loose: how much it may change with bfloat16, as a share.
        own: of an evaluator with items of its own: writes rows into a directory, as its items, and returns the options that
            name them.
        policy: what the server must allow.
    """

    checkpoint: Callable[[Path], Path]
    rows: Sequence[Row]
    bad: Mapping[str, Sequence[Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    smooth: str | None = "loss"
    loose: float = 0.1
    own: Callable[[Path, Sequence[Row]], dict[str, Any]] | None = None
    policy: Policy = NOTHING


def words(count: int, seed: int = 0) -> str:
    """Return a text of so many words that the tiny tokenizers know."""
    return " ".join(f"w{number}" for number in np.random.default_rng(seed).integers(0, 57, count))


def png(seed: int, size: tuple[int, int] = (11, 9), mode: str = "RGB") -> bytes:
    """Return an image of noise as the bytes of a PNG file."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return as_png(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def as_png(pixels: NDArray[Any], kind: str = "PNG") -> bytes:
    """Return pixels as the bytes of a file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def mask(seed: int, size: tuple[int, int] = (11, 9), classes: int = 3) -> bytes:
    """Return a mask of noise as the bytes of a PNG file; the value 255 stands in a tenth of it."""
    random = np.random.default_rng(seed)
    values = random.integers(0, classes, (size[1], size[0]), dtype=np.uint8)
    return as_png(np.where(random.random(values.shape) < 0.1, 255, values).astype(np.uint8))


def rolling_task(directory: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Write a task file of the harness, which predicts texts, with its data."""
    return harness_task(directory, "texts", rows, output_type="loglikelihood_rolling", doc_to_target="{{text}}")


def harness_task(directory: Path, name: str, rows: Sequence[Row], **config: Any) -> dict[str, Any]:
    """Write a task file of the harness with its data; returns the options that name them, if ``directory`` is a root."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test"}
    common = {"task": name, **data, "doc_to_text": "", "metadata": {"version": 1.0}}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump({**common, **config}))
    return {"include_path": str(directory), "tasks": [name]}


FUNCTIONS = "tests.workers.evaluators.functions"
TEXTS: list[Row] = [{"text": words(count, count)} for count in (3, 40, 1, 17, 90, 8, 25)]

CASES: dict[str, Case] = {
    "text_classification": Case(
        checkpoint=tiny_bert,
        rows=[{"text": words(1 + 5 * n % 13, n), "label": n % 3} for n in range(11)],
        bad={"text": [7, ["a"], "\ud800"], "label": [3, -1, "nonsense", 1.0, True, "99999999999999999999"]},
        options={"k": 2},
    ),
    "image_classification": Case(
        checkpoint=tiny_vit,
        rows=[{"image": {"bytes": png(n), "path": None}, "label": n % 3} for n in range(7)],
        bad={
            "image": [b"no image", png(0)[:60], {"bytes": None, "path": "elsewhere.png"}, "elsewhere.png"],
            "label": [3, -1, "nonsense"],
        },
    ),
    "segmentation": Case(
        checkpoint=tiny_segformer,
        rows=[{"image": png(n, (9 + n, 17 - n)), "mask": mask(n, (9 + n, 17 - n))} for n in range(7)],
        bad={
            "image": [b"no image", png(0)[:60], "elsewhere.png"],
            "mask": [
                b"no image",
                7,
                mask(0, (5, 5)),
                png(0, (9, 17)),
                as_png(np.full((17, 9), 3, dtype=np.uint8)),
                as_png(np.full((17, 9), 255, dtype=np.uint8)),
                as_png(np.zeros((17, 9), dtype=np.uint8), "JPEG"),
            ],
        },
    ),
    "text_regression": Case(
        checkpoint=partial(tiny_bert, labels=1),
        rows=[{"text": words(1 + 5 * n % 13, n), "label": (n - 4) / 3} for n in range(11)],
        bad={"text": [7, "\ud800"], "label": ["much", True, [1.0], "nan", float("inf"), "1e300", ""]},
        smooth="squared_error",
    ),
    "image_regression": Case(
        checkpoint=partial(tiny_vit, labels=1),
        rows=[{"image": {"bytes": png(n), "path": None}, "label": n / 3} for n in range(7)],
        bad={"image": [b"no image", "elsewhere.png"], "label": ["much", True, None]},
        smooth="squared_error",
    ),
    "retrieval": Case(
        checkpoint=tiny_bert_base,
        rows=[
            {
                "query": words(2 + n, n),
                "positive": words(3 + n, 50 + n) if n % 2 else [words(4, 20 + n), words(9, 30 + n)],
                "negative": [words(5, 40 + n)] if n % 3 else [],
            }
            for n in range(7)
        ],
        bad={
            "query": [7, "\ud800", ["w1"]],
            "positive": [7, [], [3], ["w1", "\ud800"], {"text": "w1"}],
        },
        loose=0.3,
    ),
    "sentence_similarity": Case(
        checkpoint=tiny_bert_base,
        rows=[{"text": words(3 + n, n), "text_pair": words(9 - n, 30 + n), "score": n * 0.7} for n in range(7)],
        bad={"text": [7, "\ud800"], "text_pair": [7], "score": [5.1, -0.1, "much", True]},
    ),
    "entropy": Case(
        checkpoint=tiny_llama,
        rows=TEXTS,
        bad={"text": ["", "  ", 7, "\ud800"]},
        options={"max_length": 32},
        smooth="entropy",
    ),
    "divergence": Case(
        checkpoint=tiny_llama,
        rows=TEXTS,
        bad={"text": ["", "  ", 7, "\ud800"]},
        options={"max_length": 32, "top": 5},
        smooth="js_divergence",
    ),
    "alignment": Case(
        checkpoint=tiny_llama,
        rows=TEXTS,
        bad={"text": ["", "  ", 7, "\ud800"]},
        options={"max_length": 32, "positions": 5},
        smooth="alignment",
    ),
    "consistency": Case(
        checkpoint=tiny_llama,
        rows=TEXTS,
        bad={"text": ["", "  ", 7, "\ud800"]},
        options={"max_new_tokens": 5},
    ),
    "causal_lm": Case(
        checkpoint=tiny_llama,
        rows=TEXTS,
        bad={"text": ["", "  ", 7, "\ud800"]},
        options={"max_length": 32},
    ),
    "generation": Case(
        checkpoint=tiny_llama,
        rows=[{"prompt": words(1 + 3 * n, n), "answer": [words(4, 50 + n), words(2, n)]} for n in range(7)],
        bad={
            "prompt": ["", "  ", 7, ["w1"], "\ud800", words(60)],
            "answer": [[], {}, True, ["\ud800"]],
        },
        options={"max_new_tokens": 12, "graders": {"score": "chrf"}},
        smooth=None,
    ),
    "multiple_choice": Case(
        checkpoint=tiny_llama,
        rows=[
            {"question": words(3 * n, n), "choices": [words(1 + c, c) for c in range(2 + n % 3)], "answer": n % 2}
            for n in range(8)
        ],
        bad={
            "question": [3],
            "choices": [["w1"], "w1, w2", "[1, 2]", [], ["w1", ""], ["w1", words(65)], {"text": ["w1", "w2"]}],
            "answer": [5, -1, "Z", "", True, 1.0],
        },
    ),
    "lm_eval": Case(
        checkpoint=tiny_llama,
        rows=[{"text": words(count, count)} for count in (3, 40, 2, 17, 90, 8, 25)],
        bad={},
        smooth="bits_per_byte",
        own=rolling_task,
    ),
    "python": Case(
        checkpoint=tiny_llama,
        rows=[{"text": words(count, count)} for count in (3, 40, 2, 17, 50, 8, 25)],
        bad={},
        options={"function": f"{FUNCTIONS}:likelihood"},
        policy=Policy(entry_points=(f"{FUNCTIONS}:likelihood",)),
    ),
}


def as_rows(items: Sequence[Row], columns: Mapping[str, str] | None = None) -> Rows:
    """Return rows as if they had been loaded from a file."""
    places = [f"line {number}" for number in range(1, len(items) + 1)]
    return Rows(list(items), places, columns or {}, f"{FIELD}.data", "0" * 64)


def build(name: str, checkpoint: Path, rows: Rows | Sequence[Row], **options: Any) -> Evaluator:
    """Return an evaluator over rows, with options given by name; one that compares with experts has asked two."""
    cls = EVALUATORS[name]
    rows = rows if isinstance(rows, Rows) else as_rows(rows)
    case = CASES[name]
    inputs = Inputs(rows, checkpoint, FIELD, case.policy)
    if case.own is not None:
        directory = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        options = case.own(directory, rows.items) | options
        inputs = Inputs(no_rows(f"{FIELD}.data"), checkpoint, FIELD, case.policy, Roots([directory]))
    evaluator = cls(cls.Options(**options), inputs)
    if isinstance(evaluator, ReferenceEvaluator):
        evaluator.refer({str(seed): evaluator.observe(expert(name, checkpoint, seed)) for seed in (1, 2)})
    return evaluator


def open_model(name: str, checkpoint: Path) -> PreTrainedModel:
    """Open a checkpoint with the class that an evaluator of it names."""
    auto_class = _AUTO_CLASSES.get(CASES[name].checkpoint, EVALUATORS[name].auto_class)
    with quiet():
        model: PreTrainedModel = getattr(transformers, auto_class).from_pretrained(checkpoint)
    return model


@cache
def expert(name: str, checkpoint: Path, seed: int) -> PreTrainedModel:
    """Return a model that was changed a little from a checkpoint's, as by fine-tuning."""
    model = open_model(name, checkpoint)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def load_jsonl(path: Path, items: Sequence[Row], **spec: Any) -> Rows:
    """Write rows as a JSONL file and load them."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return load_rows(DataSpec(path="-", **spec), path, f"{FIELD}.data")


def bpe_llama(path: Path, **special: str) -> Path:
    """Save a tiny Llama with a byte-level BPE tokenizer, whose tokens hold leading spaces as GPT-2's do.

    Args:
        path: the directory.
        special: special tokens by role; by default BOS and EOS.
    """
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["the cat sat on the mat and the hat", "yes no maybe: the answer is yes"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **special)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(path)
    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=core.get_vocab_size(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path
