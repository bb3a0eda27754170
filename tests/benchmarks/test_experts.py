"""The experts of the benchmarks at a small size: the same code on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.benchmarks.experts import Training, split_of, texts, train, write_data
from tests.workers.models import tiny_bert_base, tiny_llama
from workers.checkpoints import open_checkpoint
from workers.compatibility import inspect, raise_on_errors
from workers.naming import canonical_names


def test_texts_are_real_and_split_without_overlap(tmp_path: Path) -> None:
    rows = texts("docstrings")
    seen = {split: {row["text"] for row in found} for split, found in rows.items()}
    assert len(rows["train"]) > 1000 and min(len(found) for found in seen.values()) > 100
    assert len({row["label"] for row in rows["train"]}) >= 5
    write_data(tmp_path, rows)
    written = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(written) == 40 and {row["text"] for row in written} <= seen["test"]
    assert {split_of(str(number)) for number in range(50)} == {"train", "search", "test"}
    assert len(texts("reference")["train"]) > 100


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's affair
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("labels", [[], ["a", "b"]])
def test_experts_are_what_a_job_takes(tmp_path: Path, rank: int | None, labels: list[str]) -> None:
    base = tiny_bert_base(tmp_path / "base") if labels else tiny_llama(tmp_path / "base")
    rows = [{"text": f"w{number} w{number + 1}", "label": "ab"[number % 2]} for number in range(8)]
    loss = train(base, tmp_path / "expert", rows, labels, Training(3, batch=4, length=8, rank=rank))
    assert 0 < loss < 20
    assert math.isnan(train(base, tmp_path / "expert", rows, labels, Training(3, rank=rank)))
    opened = open_checkpoint(base, "base")
    expert = open_checkpoint(tmp_path / "expert", "expert", base=opened)
    layout, findings = inspect(opened, [expert], ["classifier.*", "*pooler.*"])
    raise_on_errors(findings)
    mine, theirs = canonical_names(opened), canonical_names(expert)
    shared = [tensor.name for tensor in layout.shared]
    changed = [name for name in shared if not opened.tensor(mine[name]).equal(expert.tensor(theirs[name]))]
    assert changed and (all("self" in name for name in changed) if rank else len(changed) > 10)
    assert len(layout.shared) > 10
