"""Text classification against plain transformers, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from optimizer.errors import InvalidCheckpoint, InvalidData, InvalidInput, JobError
from optimizer.spec import DataSpec
from tests.workers.evaluators.cases import FIELD, Row, as_rows, build, load_jsonl, open_model, words
from tests.workers.models import VOCABULARY, tiny_bert, tokenizer
from workers.data import load_rows

NAME = "text_classification"
ROWS: list[Row] = [{"text": words(count, count), "label": count % 3} for count in (4, 1, 30, 9, 12)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def log_softmax(model: PreTrainedModel, inputs: dict[str, list[int]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the log-probabilities of one unpadded sequence, computed in float64."""
    with torch.no_grad():
        logits = model(**{name: torch.tensor([ids]) for name, ids in inputs.items()}).logits[0].double().numpy()
    out: np.ndarray[Any, np.dtype[np.float64]] = logits - np.log(np.exp(logits).sum())
    return out


def rename(path: Path, source: Path, **changes: Any) -> Path:
    """Copy a checkpoint's config and tokenizer with changes of the config."""
    path.mkdir(exist_ok=True)
    for file in source.glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def test_equals_a_hand_computation(bert: Path) -> None:
    scores = build(NAME, bert, ROWS).evaluate(open_model(NAME, bert))
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    plain = tokenizer(bert=True)
    for row, accuracy, loss in zip(ROWS, scores["accuracy"].values, scores["loss"].values, strict=True):
        logp = log_softmax(model, dict(plain(row["text"])))
        assert loss == pytest.approx(-logp[row["label"]], abs=1e-5)
        assert accuracy == float(logp.argmax() == row["label"])
    assert scores["accuracy"].weights is None
    assert 0 < scores["accuracy"].mean() < 1


def test_long_texts_are_cut(bert: Path) -> None:
    model = open_model(NAME, bert)
    long = words(500)
    scores = build(NAME, bert, [{"text": long, "label": 0}]).evaluate(model)
    assert scores["loss"].values[0] == pytest.approx(
        -log_softmax(model, dict(tokenizer(bert=True)(long, truncation=True)))[0], abs=1e-5
    )
    short = build(NAME, bert, [{"text": long, "label": 0}], max_length=8).evaluate(model)
    assert short["loss"].values[0] == pytest.approx(
        -log_softmax(model, dict(tokenizer(bert=True)(" ".join(long.split()[:6]))))[0], abs=1e-5
    )
    with pytest.raises(InvalidInput, match="64 tokens at most, not 65") as caught:
        build(NAME, bert, ROWS, max_length=65)
    assert caught.value.field == f"{FIELD}.options.max_length"


def test_pairs_with_token_types(bert: Path, tmp_path: Path) -> None:
    path = rename(tmp_path / "pairs", bert)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    wordpiece = BertTokenizer(vocab={word: index for index, word in enumerate(VOCABULARY)})
    wordpiece.save_pretrained(path)
    rows = [{**row, "text_pair": words(3 + n)} for n, row in enumerate(ROWS)]
    model = open_model(NAME, bert)
    losses = build(NAME, path, rows).evaluate(model)["loss"].values
    for row, loss in zip(rows, losses, strict=True):
        inputs = dict(wordpiece(row["text"], row["text_pair"]))
        assert 1 in inputs["token_type_ids"]
        assert loss == pytest.approx(-log_softmax(model, inputs)[row["label"]], abs=1e-5)


def test_labels_by_name_index_and_digits(bert: Path, tmp_path: Path) -> None:
    names = {"id2label": {"0": "low", "1": "mid", "2": "2"}, "label2id": {"low": 0, "mid": 1, "2": 2}}
    path = rename(tmp_path / "named", bert, **names)
    model = open_model(NAME, bert)
    by_index = build(NAME, path, ROWS).evaluate(model)["loss"].values
    for label in ({0: "low", 1: "mid", 2: "2"}, {0: "0", 1: " 1 ", 2: 2}):
        rows = [{**row, "label": label[row["label"]]} for row in ROWS]
        np.testing.assert_array_equal(build(NAME, path, rows).evaluate(model)["loss"].values, by_index)
    with pytest.raises(InvalidData, match="index from 0 to 2, or a name: low, mid, 2"):
        build(NAME, path, [{"text": "w1", "label": "high"}])


@pytest.mark.parametrize(
    ("classes", "order"),
    [
        (["mid", "top", "low"], [1, 2, 0]),  # names that the config knows
        (["2", "0", "1"], [2, 0, 1]),  # indices in digits
        (["a", "b", "c"], [0, 1, 2]),  # names of another language: the data's own order
    ],
)
def test_classes_of_the_data_are_matched_by_name(
    classes: list[str], order: list[int], bert: Path, tmp_path: Path
) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    path = rename(tmp_path / "named", bert, id2label={"0": "low", "1": "mid", "2": "top"})
    features = Features({"text": Value("string"), "label": ClassLabel(names=classes)})
    Dataset.from_list(ROWS, features=features).to_parquet(tmp_path / "a.parquet")
    rows = load_rows(DataSpec(path="-"), tmp_path / "a.parquet", f"{FIELD}.data")
    model = open_model(NAME, bert)
    losses = build(NAME, path, rows).evaluate(model)["loss"].values
    expected = build(NAME, path, [{**row, "label": order[row["label"]]} for row in ROWS]).evaluate(model)["loss"].values
    np.testing.assert_array_equal(losses, expected)


@pytest.mark.parametrize("classes", [["low", "mid", "typo"], ["a", "b"], ["0", "1", "3"], ["a", "b", "c", "d"]])
def test_classes_that_fit_only_in_part_are_refused(classes: list[str], bert: Path, tmp_path: Path) -> None:
    path = rename(tmp_path / "named", bert, id2label={"0": "low", "1": "mid", "2": "top"})
    rows = as_rows([{"text": "w1", "label": 0}])
    object.__setattr__(rows, "classes", {"label": classes})
    with pytest.raises(InvalidData, match="its classes are: low, mid, top") as caught:
        build(NAME, path, rows)
    assert caught.value.field == f"{FIELD}.data.columns.label"


@pytest.mark.parametrize(
    "changes",
    [{"id2label": {"0": "score"}}, {"problem_type": "multi_label_classification"}, {"problem_type": "regression"}],
)
def test_models_that_do_not_choose_one_class_are_refused(changes: dict[str, Any], bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="must choose one of several classes") as caught:
        build(NAME, rename(tmp_path / "other", bert, **changes), ROWS)
    assert caught.value.field == f"{FIELD}.evaluator"


def test_a_head_of_another_size_fails_the_job(bert: Path, tmp_path: Path) -> None:
    other = tiny_bert(tmp_path / "other", labels=5)
    with pytest.raises(JobError, match="scores 5 classes, but its head's config names 3"):
        build(NAME, bert, ROWS).evaluate(open_model(NAME, other))


def test_tokens_beyond_the_embeddings_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="gives token 63, but the model has only 50"):
        build(NAME, rename(tmp_path / "small", bert, vocab_size=50), [{"text": "w56", "label": 0}])


@pytest.mark.parametrize("broken", ["{", '{"version": "1.0"}'])
def test_a_malformed_tokenizer_is_refused(broken: str, bert: Path, tmp_path: Path) -> None:
    path = rename(tmp_path / "broken", bert)
    (path / "tokenizer.json").write_text(broken)
    with pytest.raises(InvalidCheckpoint, match="no usable tokenizer"):
        build(NAME, path, ROWS)


def test_a_tokenizer_without_vocabulary_is_refused(
    bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = rename(tmp_path / "bare", bert)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidCheckpoint, match="no tokenizer files"):
        build(NAME, path, ROWS)
    assert capfd.readouterr().err == ""


def test_code_in_a_checkpoint_is_not_run(bert: Path, tmp_path: Path) -> None:
    path = rename(tmp_path / "code", bert, model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    (path / "mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(InvalidCheckpoint, match="no usable config"):
        build(NAME, path, ROWS)


@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_decoders(pad_token_id: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label={0: "a", 1: "b", 2: "c"},
        pad_token_id=pad_token_id,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    plain = tokenizer(bert=False)
    plain.save_pretrained(tmp_path)
    model = open_model(NAME, tmp_path)
    losses = build(NAME, tmp_path, ROWS).evaluate(model)["loss"].values
    for row, loss in zip(ROWS, losses, strict=True):
        assert loss == pytest.approx(-log_softmax(model, dict(plain(row["text"])))[row["label"]], abs=1e-5)


def test_only_decoders_refuse_empty_texts(bert: Path) -> None:
    scores = build(NAME, bert, [{"text": "", "label": 0}, *ROWS]).evaluate(open_model(NAME, bert))
    assert np.isfinite(scores["loss"].values).all()


def test_rows_from_a_file_with_other_column_names(bert: Path, tmp_path: Path) -> None:
    items = [{"word": row["text"], "language": f"LABEL_{row['label']}"} for row in ROWS]
    rows = load_jsonl(tmp_path / "a.jsonl", items, columns={"text": "word", "label": "language"}, limit=4)
    model = open_model(NAME, bert)
    few = build(NAME, bert, rows).evaluate(model)["loss"].values
    np.testing.assert_allclose(few, build(NAME, bert, ROWS).evaluate(model)["loss"].values[:4], atol=1e-5)
