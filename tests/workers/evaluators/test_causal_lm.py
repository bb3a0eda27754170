"""Language modelling against sums of log-probabilities computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel

from optimizer.errors import InvalidCheckpoint
from tests.workers.evaluators.cases import FIELD, Row, bpe_llama, build, open_model
from workers.evaluators import likelihood
from workers.evaluators.causal_lm import _windows

NAME = "causal_lm"
TEXTS = ["the cat", "Zürich 猫 🎉 – naïve", "the cat sat on the mat and the hat " * 20, "a", " yes no"]


def nats(model: PreTrainedModel, context: list[int], scored: list[int]) -> float:
    """Return minus the log-probability of tokens after a context, in one unpadded pass, summed in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([context + scored])).logits[0].double()
    logp = logits.log_softmax(dim=-1)
    return -sum(float(logp[len(context) + n - 1, token]) for n, token in enumerate(scored))


def test_equals_a_hand_computation(bpe: Path) -> None:
    model = open_model(NAME, bpe)
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    scores = build(NAME, bpe, [{"text": text} for text in TEXTS], max_length=16).evaluate(model)
    all_nats = all_tokens = all_bytes = 0.0
    for n, text in enumerate(TEXTS):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        total = 0.0
        for first in range(0, len(ids), 16):
            context = [ids[first - 1]] if first else [tokenizer.bos_token_id]
            total += nats(model, context, ids[first : first + 16])
        size = len(text.encode("utf-8"))
        assert scores["bits_per_byte"].values[n] == pytest.approx(total / math.log(2) / size, rel=1e-5)
        assert scores["loss"].values[n] == pytest.approx(total / len(ids), rel=1e-5)
        assert scores["perplexity"].values[n] == pytest.approx(math.exp(total / len(ids)), rel=1e-4)
        all_nats, all_tokens, all_bytes = all_nats + total, all_tokens + len(ids), all_bytes + size
    assert scores["bits_per_byte"].mean() == pytest.approx(all_nats / math.log(2) / all_bytes, rel=1e-5)
    assert scores["loss"].mean() == pytest.approx(all_nats / all_tokens, rel=1e-5)
    assert scores["perplexity"].weights is None


def test_a_uniform_model_needs_log_of_the_vocabulary(bpe: Path) -> None:
    model = open_model(NAME, bpe)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = build(NAME, bpe, [{"text": text} for text in TEXTS]).evaluate(model)
    np.testing.assert_allclose(scores["loss"].values, math.log(model.config.vocab_size), rtol=1e-6)
    np.testing.assert_allclose(scores["perplexity"].values, model.config.vocab_size, rtol=1e-5)


def test_eos_stands_in_for_a_missing_bos(tmp_path: Path) -> None:
    path = bpe_llama(tmp_path, eos_token="</s>")
    model = open_model(NAME, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.bos_token_id is None
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    loss = build(NAME, path, [{"text": "the cat"}]).evaluate(model)["loss"].values[0]
    assert loss * len(ids) == pytest.approx(nats(model, [tokenizer.eos_token_id], ids), rel=1e-5)


def test_a_tokenizer_without_either_is_refused(tmp_path: Path) -> None:
    path = bpe_llama(tmp_path, pad_token="<s>")
    with pytest.raises(InvalidCheckpoint, match="neither a BOS nor an EOS") as caught:
        build(NAME, path, [{"text": "the cat"}])
    assert caught.value.field == f"{FIELD}.evaluator"


@given(count=st.integers(1, 60), size=st.integers(2, 20))
def test_windows_predict_every_token_once_from_what_precedes_it(count: int, size: int) -> None:
    ids = list(range(count + 1))  # 0 is the BOS
    windows = _windows(ids, size)
    assert [token for window in windows for token in window.ids[window.start :]] == ids[1:]
    for window in windows:
        assert window.ids == list(range(window.ids[0], window.ids[-1] + 1))
        assert 1 <= len(window.ids) - 1 <= size


def test_large_vocabularies_make_small_batches(bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [{"text": text} for text in TEXTS]
    model = open_model(NAME, bpe)
    expected = build(NAME, bpe, rows).evaluate(model)["loss"].values
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", model.config.vocab_size * 70)
    losses = build(NAME, bpe, rows).evaluate(model)["loss"].values
    assert len(shapes) > 2
    assert all(shape[0] == 1 or shape.numel() <= 70 for shape in shapes)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
