"""Multiple choice against log-likelihoods computed by hand, and the boundary between question and choice."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoTokenizer

from optimizer.errors import InvalidData
from optimizer.spec import DataSpec
from tests.workers.evaluators.cases import FIELD, Row, build, open_model
from tests.workers.evaluators.test_causal_lm import nats
from workers.data import load_rows
from workers.evaluators.base import EVALUATORS

NAME = "multiple_choice"
ROWS: list[Row] = [
    {"question": "the cat sat on", "choices": ["the mat", "yes", "a 猫 🎉"], "answer": 0},
    {"question": "the answer is", "choices": ["no", "maybe: the hat"], "answer": "B"},
    {"question": "the answer is ", "choices": ["no", "maybe: the hat", "yes", "the the the"], "answer": "c"},
    {"question": "", "choices": ["yes", "no"], "answer": "1"},
    {"question": "the hat " * 40, "choices": ["yes", "no"], "answer": 0},
]


def test_equals_a_hand_computation(bpe: Path) -> None:
    model = open_model(NAME, bpe)
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    scores = build(NAME, bpe, ROWS, max_length=48).evaluate(model)
    for n, (row, answer) in enumerate(zip(ROWS, (0, 1, 2, 1, 0), strict=True)):
        logp, normed = [], []
        for choice in row["choices"]:
            whole = tokenizer.encode(row["question"] + " " + choice, add_special_tokens=False, verbose=False)
            context = tokenizer.encode(row["question"].rstrip(), add_special_tokens=False, verbose=False)
            scored = whole[len(context) :]
            before = whole[: len(context)] or [tokenizer.bos_token_id]
            logp.append(-nats(model, before[-(49 - len(scored)) :], scored))
            normed.append(logp[-1] / len(choice.encode("utf-8")))
        assert scores["accuracy"].values[n] == float(np.argmax(logp) == answer)
        assert scores["accuracy_norm"].values[n] == float(np.argmax(normed) == answer)
        assert scores["loss"].values[n] == pytest.approx(np.log(np.exp(logp).sum()) - logp[answer], rel=1e-3, abs=1e-5)


def test_spaces_belong_to_the_choice(bpe: Path) -> None:
    """A tokenizer that puts spaces into the following word must see the same tokens wherever the space is written."""
    model = open_model(NAME, bpe)
    choices = ["the mat", "yes"]
    losses = [
        build(NAME, bpe, [{"question": question, "choices": texts, "answer": 0}], separator=separator).evaluate(model)
        for question, separator, texts in (
            ("the cat", " ", choices),
            ("the cat ", "", choices),
            ("the cat", "", [" the mat", " yes"]),
        )
    ]
    assert losses[0]["loss"].values == losses[1]["loss"].values == losses[2]["loss"].values


def test_tokens_that_join_question_and_choice(bpe: Path) -> None:
    model = open_model(NAME, bpe)
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    whole = tokenizer.encode("the", add_special_tokens=False)
    assert len(whole) < len(tokenizer.encode("th", add_special_tokens=False)) + 1, "the boundary must fall in a token"
    with pytest.raises(InvalidData, match="line 1: a choice adds no tokens") as caught:
        build(NAME, bpe, [{"question": "th", "choices": ["e", "is"], "answer": 0}], separator="")
    assert caught.value.field == f"{FIELD}.data.columns.choices"
    scores = build(NAME, bpe, [{"question": "th", "choices": ["x", "qq"], "answer": 0}], separator="").evaluate(model)
    assert np.isfinite(scores["loss"].values).all()


def test_template(bpe: Path) -> None:
    model = open_model(NAME, bpe)
    template = "the {question}: the answer is\n{question}"
    templated = build(NAME, bpe, [{"question": "cat{x}", "choices": ["yes", "no"], "answer": 0}], template=template)
    written = [{"question": "the cat{x}: the answer is\ncat{x}", "choices": ["yes", "no"], "answer": 0}]
    assert templated.evaluate(model)["loss"].values == build(NAME, bpe, written).evaluate(model)["loss"].values
    with pytest.raises(ValidationError, match="template"):
        EVALUATORS[NAME].Options.model_validate({"template": "no place for it"})


def test_bos(bpe: Path) -> None:
    model = open_model(NAME, bpe)
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    row: Row = {"question": "the cat", "choices": ["yes", "no"], "answer": 0}
    scores = build(NAME, bpe, [row], add_bos=True).evaluate(model)
    context = [tokenizer.bos_token_id, *tokenizer.encode("the cat", add_special_tokens=False)]
    logp = [-nats(model, context, tokenizer.encode(f" {c}", add_special_tokens=False)) for c in row["choices"]]
    assert scores["loss"].values[0] == pytest.approx(np.log(np.exp(logp).sum()) - logp[0], rel=1e-4)
    assert scores["loss"].values != build(NAME, bpe, [row]).evaluate(model)["loss"].values


def test_likely_choices_have_low_loss(bpe: Path) -> None:
    """Whichever choice is called right, accuracy 1 goes to exactly one of them: the one with the lowest loss."""
    model = open_model(NAME, bpe)
    for row in ROWS:
        rows = [{**row, "answer": answer} for answer in range(len(row["choices"]))]
        scores = build(NAME, bpe, rows).evaluate(model)
        assert scores["accuracy"].values.sum() == scores["accuracy_norm"].values.sum() == 1
        assert scores["accuracy"].values.argmax() == scores["loss"].values.argmin()
        assert np.exp(-scores["loss"].values.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("supported", [True, False])
def test_logits_only_where_choices_are_scored(supported: bool, bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(NAME, bpe)
    rows: list[Row] = [{"question": "the cat " * n, "choices": ["yes", "no it is"], "answer": 1} for n in (4, 6, 8)]
    expected = [build(NAME, bpe, [row]).evaluate(model)["loss"].values[0] for row in rows]
    forward = model.forward
    shapes: list[tuple[int, int]] = []

    def recorded(input_ids: Tensor, logits_to_keep: int = 0, **inputs: Any) -> Any:
        out = forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **inputs)
        shapes.append((input_ids.shape[1], out.logits.shape[1]))
        return out

    def older(input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return recorded(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", recorded if supported else older)
    np.testing.assert_allclose(build(NAME, bpe, rows).evaluate(model)["loss"].values, expected, rtol=1e-4)
    assert all((logits < tokens) == supported for tokens, logits in shapes)


def test_csv_with_choices_as_json(bpe: Path, tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "choices", "answer"])
        for row in ROWS:
            writer.writerow([row["question"], json.dumps(row["choices"]), row["answer"]])
    rows = load_rows(DataSpec(path="-"), tmp_path / "a.csv", f"{FIELD}.data")
    model = open_model(NAME, bpe)
    one, two = build(NAME, bpe, rows).evaluate(model), build(NAME, bpe, ROWS).evaluate(model)
    np.testing.assert_array_equal(one["loss"].values, two["loss"].values)
