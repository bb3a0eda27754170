"""What single graders promise beyond the conformance suite."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from optimizer.errors import InvalidCheckpoint, InvalidInput, PathNotAllowed
from tests.marks import quick_or_slow
from tests.workers.graders.cases import WHERE, grade, make
from tests.workers.models import tiny_bert
from workers.evaluators.base import Cancelled
from workers.graders.base import Answers
from workers.graders.number import number_in
from workers.policy import Policy

REFERENCES = ["the cat sat on the mat", "a cat was sitting on the mat"]
TEXTS = ["the cat is on the mat", "a mat", "cats sit", "the cat sat on the mat and slept"]


@pytest.mark.parametrize(
    ("options", "answer", "score"),
    [
        ({"ignore_case": True}, "PARIS", 1),
        ({"ignore_punctuation": True}, "Paris!", 1),
        ({"ignore_articles": True}, "the Paris", 1),
        ({"ignore_spaces": False}, " Paris", 0),
        ({"where": "start"}, "Paris, of course", 1),
        ({"where": "start"}, "It is Paris", 0),
        ({"where": "anywhere"}, "It is Paris!", 1),
        ({"extract": r"answer is (\w+)"}, "The answer is Rome. No: the answer is Paris.", 1),
        ({"extract": r"answer is (\w+)"}, "Paris", 0),
    ],
)
def test_exact_match(options: dict[str, Any], answer: str, score: float, tmp_path: Path) -> None:
    assert grade(make("exact_match", [{"answer": "Paris"}], tmp_path, **options), [answer]) == [score]


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("12", 12),
        ("1,234,567.5 km", 1234567.5),
        ("costs $3.50.", 3.5),
        ("from 3-5", -5),
        ("2, 3", 3),
        ("1e3", 1000),
        (".5", 0.5),
        ("7e", 7),
        ("12,34", 34),
        ("none", None),
        ("1" * 500, None),
    ],
)
def test_numbers_in_texts(text: str, last: float | None) -> None:
    found = number_in(text, "last")
    assert (None if found is None else float(found)) == last


@given(st.floats(-1e9, 1e9), st.floats(-1e-3, 1e-3))
def test_numbers_count_within_the_tolerance(right: float, change: float) -> None:
    found = grade(
        make("number", [{"answer": repr(right)}], Path("/"), relative=0, absolute=5e-4), [repr(right + change)]
    )
    if abs(abs(right + change - right) - 5e-4) > 1e-7:
        assert found == [float(abs(right + change - right) <= 5e-4)]


@pytest.mark.parametrize("pattern", quick_or_slow(["(a+)+$", "(a|aa)+$", "(.*a){25}$"], "(a+)+$"))
def test_patterns_that_backtrack_without_end_score_0_soon(pattern: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    assert grade(make("regex", [{}], tmp_path, pattern=pattern), ["a" * 5000 + "!"]) == [0]
    assert grade(make("exact_match", [{"answer": "a"}], tmp_path, extract=pattern), ["a" * 5000 + "!"]) == [0]
    assert grade(make("json", [{}], tmp_path, schema={"pattern": pattern}), ['"' + "a" * 5000 + '!"']) == [0]
    assert time.monotonic() - begin < 60


def test_patterns_may_be_unwanted_or_have_to_be_all(tmp_path: Path) -> None:
    assert grade(make("regex", [{}] * 2, tmp_path, pattern="[a-z]+", absent=True), ["abc", "12"]) == [0, 1]
    assert grade(make("regex", [{}] * 2, tmp_path, pattern="[a-z]+", whole=True), [" abc\n", "abc 1"]) == [1, 0]


@pytest.mark.parametrize(
    ("schema", "field"),
    [({"patternProperties": {"a": {}}}, "patternProperties"), ({"$ref": "file:///etc/passwd"}, "not looked up")],
)
def test_schemas_that_reach_out_or_may_hang_are_refused(schema: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=field) as caught:
        make("json", [{}], tmp_path, schema=schema)
    assert caught.value.field == f"{WHERE}.options.schema"


def test_json_without_a_schema_is_valid_or_not(tmp_path: Path) -> None:
    texts = ["{}", "[1, 2]", "{'a': 1}", "NaN", "{} {}", "```\n[1]\n```"]
    assert grade(make("json", [{}] * 6, tmp_path), texts) == [1, 1, 0, 0, 0, 1]
    tree = {"$defs": {"n": {"items": {"$ref": "#/$defs/n"}, "type": "array"}}, "$ref": "#/$defs/n"}
    assert grade(make("json", [{}] * 3, tmp_path, schema=tree), ["[[], [[]]]", "[1]", "[" * 900 + "]" * 900])[:2] == [
        1,
        0,
    ]


def test_wordings_score_as_their_packages_do(tmp_path: Path) -> None:
    rows = [{"answer": REFERENCES}] * len(TEXTS)
    bleu = [sacrebleu.sentence_bleu(text, REFERENCES).score / 100 for text in TEXTS]
    chrf = [sacrebleu.sentence_chrf(text, REFERENCES, word_order=2).score / 100 for text in TEXTS]
    rouge = [RougeScorer(["rouge2"]).score_multi(REFERENCES, text)["rouge2"].fmeasure for text in TEXTS]
    assert grade(make("bleu", rows, tmp_path), TEXTS) == pytest.approx(bleu)
    assert grade(make("chrf", rows, tmp_path, word_order=2), TEXTS) == pytest.approx(chrf)
    assert grade(make("rouge", rows, tmp_path, variant="rouge2"), TEXTS) == pytest.approx(rouge)
    assert len(set(bleu)) == len(set(chrf)) == len(TEXTS)


@pytest.mark.parametrize(("name", "module"), [("bleu", "sacrebleu.metrics"), ("rouge", "rouge_score.rouge_scorer")])
def test_an_extra_that_is_missing_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidInput, match=r"mergeopt\[text\]"):
        make(name, [{"answer": "x"}], tmp_path)


def test_refusals_are_told_near_the_beginning(tmp_path: Path) -> None:
    texts = ["As an AI, I can't.", "x" * 300 + " I can't.", "NEIN, das geht nicht"]
    assert grade(make("refusal", [{}] * 3, tmp_path), texts) == [1, 0, 0]
    assert grade(make("refusal", [{}] * 3, tmp_path, phrases=["nein"], within=10), texts) == [0, 0, 1]


@pytest.mark.parametrize("with_prompt", [False, True])
def test_a_classifier_judges_as_it_does_alone(with_prompt: bool, tmp_path: Path) -> None:
    path = tiny_bert(tmp_path / "judge")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompts, texts = ["w9", "w8 w7 w1", "w2"], ["w1 w2 w3", "w4", ""]
    options: dict[str, Any] = {
        "path": "judge",
        "label": "1",
        "threshold": None,
        "with_prompt": with_prompt,
        "batch_size": 2,
    }
    found = grade(make("classifier", [{"prompt": text} for text in prompts], tmp_path, **options), texts)
    for prompt, text, score in zip(prompts, texts, found, strict=True):
        encoded = tokenizer(*([[prompt], [text]] if with_prompt else [[text]]), return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(float(model(**encoded).logits.softmax(dim=-1)[0, 1]), abs=1e-6)
    assert len(set(found)) == 3


def test_a_classifier_must_be_below_the_roots_and_know_the_class(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "roots" / "judge")
    tiny_bert(tmp_path / "elsewhere")
    root = tmp_path / "roots"
    with pytest.raises(PathNotAllowed) as caught:
        make("classifier", [{}], root, path="../elsewhere", label="0")
    assert caught.value.field == f"{WHERE}.options.path"
    with pytest.raises(InvalidInput, match="LABEL_0, LABEL_1, LABEL_2") as other:
        make("classifier", [{}], root, path="judge", label="refusal")
    assert other.value.field == f"{WHERE}.options.label"
    bare = tiny_bert(root / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidCheckpoint):
        make("classifier", [{}], root, path="bare", label="0")


def test_programs_run_only_where_the_server_allows_it(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not run programs") as caught:
        make("code", [{"tests": "pass"}], tmp_path, Policy())
    assert caught.value.field == f"{WHERE}.name"
    assert "MERGEOPT_CODE_EXECUTION" in str(caught.value.remedy)


def test_hostile_programs_score_0_and_the_others_are_graded(tmp_path: Path) -> None:
    programs = [
        "while True: pass",
        "import os\nwhile True: os.fork()",
        "x = bytearray(10**10)",
        "raise SystemExit(0)",
        "a = 1",
    ]
    found = make("code", [{"tests": "assert a == 1"}] * 5, tmp_path, seconds=1)
    assert grade(found, programs) == [0, 0, 0, 0, 1]


def test_grading_programs_can_be_called_off(tmp_path: Path) -> None:
    found = make("code", [{"tests": "pass"}] * 3, tmp_path)
    with pytest.raises(Cancelled):
        found.grade(Answers(["while True: pass"] * 3, lambda: True))
