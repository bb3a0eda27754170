"""Measures without labels against plain transformers, for language models and classifiers of texts and images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from optimizer.errors import InfeasibleCandidate, InvalidCheckpoint, InvalidInput
from tests.workers.evaluators.cases import FIELD, TEXTS, Row, as_rows, build, expert, open_model, png, words
from tests.workers.evaluators.test_text_classification import rename
from tests.workers.models import tiny_bert, tiny_bert_base, tiny_llama, tiny_vit
from workers.evaluators.base import EVALUATORS, Inputs
from workers.evaluators.reference import Ragged, ReferenceEvaluator, ReferenceOptions
from workers.evaluators.unlabelled import _even

KINDS: dict[str, tuple[Callable[[Path], Path], str, list[Row]]] = {
    "causal_lm": (tiny_llama, "AutoModelForCausalLM", TEXTS),
    "text_classification": (tiny_bert, "AutoModelForSequenceClassification", TEXTS),
    "image_classification": (tiny_vit, "AutoModelForImageClassification", [{"image": png(n)} for n in range(5)]),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
AGAINST = ("divergence", "alignment")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp(kind)) for kind, (write, _, _) in KINDS.items()}


def load(kind: str, path: Path, change: float = 0.0) -> PreTrainedModel:
    """Open a checkpoint, changed at random."""
    import transformers

    model: PreTrainedModel = getattr(transformers, KINDS[kind][1]).from_pretrained(path)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=change)
    return model


def against(name: str, kind: str, path: Path, experts: list[PreTrainedModel], **options: Any) -> ReferenceEvaluator:
    """An evaluator that has asked these experts."""
    cls = EVALUATORS[name]
    evaluator = cls(cls.Options(**options), Inputs(as_rows(KINDS[kind][2]), path, FIELD))
    assert isinstance(evaluator, ReferenceEvaluator)
    evaluator.refer({str(number): evaluator.observe(model) for number, model in enumerate(experts)})
    return evaluator


def logits_of(model: PreTrainedModel, path: Path, text: str) -> torch.Tensor:
    """The logits at each token of a text, in one unpadded pass."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0].double()
    return found if found.dim() == 2 else found[None]


# --- entropy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal_lm", "text_classification"])
def test_entropy_equals_a_hand_computation(kind: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[kind]
    model = load(kind, path)
    scores = build("entropy", path, TEXTS, batch_size=3).evaluate(model)
    for n, row in enumerate(TEXTS):
        likelihoods = logits_of(model, path, row["text"]).log_softmax(dim=-1)
        entropy = -(likelihoods.exp() * likelihoods).sum(dim=-1).mean()
        assert scores["entropy"].values[n] == pytest.approx(float(entropy), rel=1e-4)
        sure = likelihoods.exp().max(dim=-1).values.mean()
        assert scores["confidence"].values[n] == pytest.approx(float(sure), rel=1e-4)


def test_entropy_of_texts_is_weighed_by_tokens(checkpoints: dict[str, Path]) -> None:
    scores = build("entropy", checkpoints["causal_lm"], TEXTS).evaluate(load("causal_lm", checkpoints["causal_lm"]))
    lengths = [min(64, len(row["text"].split())) for row in TEXTS]
    assert scores["entropy"].weights is not None
    assert scores["entropy"].weights.tolist() == lengths


@every_kind
def test_a_uniform_model_knows_nothing(kind: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[kind]
    model = load(kind, path)
    head: Any = model.lm_head if kind == "causal_lm" else model.classifier
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    classes = 64 if kind == "causal_lm" else 3
    scores = build("entropy", path, KINDS[kind][2]).evaluate(model)
    np.testing.assert_allclose(scores["entropy"].values, math.log(classes), rtol=1e-5)
    np.testing.assert_allclose(scores["confidence"].values, 1 / classes, rtol=1e-5)


def test_classes_that_are_ruled_out_add_nothing(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["text_classification"]
    model = load("text_classification", path)
    with torch.no_grad():
        model.get_parameter("classifier.bias").copy_(torch.tensor([0.0, -math.inf, -math.inf]))
    scores = build("entropy", path, TEXTS).evaluate(model)
    assert scores["entropy"].values.tolist() == [0.0] * len(TEXTS)


# --- against experts ----------------------------------------------------------------------------------------------------


@every_kind
def test_an_expert_is_like_itself(kind: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[kind]
    model = load(kind, path, 0.1)
    near, far = load(kind, path, 0.11), load(kind, path, 0.2)
    for name in AGAINST:
        evaluator = against(name, kind, path, [model])
        metric = next(iter(evaluator.metrics))
        own, little, much = (evaluator.evaluate(other)[metric].mean() for other in (model, near, far))
        assert own == pytest.approx(0.0, abs=1e-6)
        assert own < little < much
    divergence = against("divergence", kind, path, [model]).evaluate(model)
    assert divergence["agreement"].values.tolist() == [1.0] * len(divergence["agreement"].values)


def test_divergence_equals_a_hand_computation(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["causal_lm"]
    model, experts = load("causal_lm", path), [load("causal_lm", path, change) for change in (0.1, 0.3)]
    scores = against("divergence", "causal_lm", path, experts, top=None).evaluate(model)
    for n, row in enumerate(TEXTS):
        q = logits_of(model, path, row["text"]).softmax(dim=-1)
        js, kl, same = [], [], []
        for other in experts:
            p = logits_of(other, path, row["text"]).softmax(dim=-1)
            m = (p + q) / 2
            js.append(float(((p * (p / m).log()).sum(-1) / 2 + (q * (q / m).log()).sum(-1) / 2).mean()))
            kl.append(float((p * (p / q).log()).sum(-1).mean()))
            same.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        assert scores["js_divergence"].values[n] == pytest.approx(np.mean(js), rel=1e-3, abs=1e-6)
        assert scores["kl_divergence"].values[n] == pytest.approx(np.mean(kl), rel=1e-3, abs=1e-6)
        assert scores["agreement"].values[n] == pytest.approx(np.mean(same), abs=1e-6)
    assert (scores["js_divergence"].values <= math.log(2)).all()


def test_fewer_tokens_bound_the_divergence_from_below(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["causal_lm"]
    model, other = load("causal_lm", path), load("causal_lm", path, 0.2)
    found = [
        against("divergence", "causal_lm", path, [other], top=top).evaluate(model) for top in (1, 4, 16, 63, 64, None)
    ]
    for metric in ("js_divergence", "kl_divergence"):
        values = np.array([scores[metric].values for scores in found])
        assert (np.diff(values, axis=0) >= -1e-6).all()
        np.testing.assert_array_equal(values[-1], values[-2])
        assert values[0].mean() < values[-1].mean()


def test_alignment_equals_a_hand_computation(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["causal_lm"]
    model, other = load("causal_lm", path), load("causal_lm", path, 0.2)
    evaluator = against("alignment", "causal_lm", path, [other], positions=None, layers=[1, -1], temperature=2.0)
    scores = evaluator.evaluate(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for n, row in enumerate(TEXTS):
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True)
        with torch.no_grad():
            own, theirs = (one(**inputs, output_hidden_states=True) for one in (model, other))
        p, q = ((found.logits[0].double() / 2).log_softmax(dim=-1) for found in (theirs, own))
        logits = 4 * float((p.exp() * (p - q)).sum(dim=-1).mean())
        states = [(own.hidden_states[layer], theirs.hidden_states[layer]) for layer in (1, 2)]
        hidden = float(np.mean([float((a - b).square().mean()) for a, b in states]))
        assert scores["logits"].values[n] == pytest.approx(logits, rel=1e-3)
        assert scores["hidden"].values[n] == pytest.approx(hidden, rel=1e-3)
        assert scores["alignment"].values[n] == pytest.approx(logits + 0.1 * hidden, rel=1e-3)


def test_layers_that_are_not_there_are_refused(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["causal_lm"]
    with pytest.raises(InvalidInput, match="hidden states 0 to 2, not 3") as caught:
        against("alignment", "causal_lm", path, [], layers=[3])
    assert caught.value.field == f"{FIELD}.options.layers"


def test_a_model_of_another_depth_has_no_alignment(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["text_classification"]
    evaluator = against("alignment", "text_classification", path, [load("text_classification", path)])
    model = load("text_classification", path)
    layers: Any = model.get_submodule("bert.encoder.layer")
    del layers[1]
    with pytest.raises(InfeasibleCandidate, match="other layers than the expert"):
        evaluator.evaluate(model)


def test_consistency_is_that_of_what_models_really_write(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["causal_lm"]
    rows = [{"text": words(1 + n, n)} for n in range(12)]
    model = load("causal_lm", path, 0.02)
    evaluator = build("consistency", path, rows, max_new_tokens=6, batch_size=4)
    scores = evaluator.evaluate(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    exact, prefix = np.zeros(len(rows)), np.zeros(len(rows))
    for seed in (1, 2):
        for n, row in enumerate(rows):
            ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
            written = []
            for one in (model, expert("consistency", path, seed)):
                found = one.generate(ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
                written.append(found[0, ids.shape[1] :].tolist())
            same = [a == b for a, b in zip(*written, strict=False)]
            shared = same.index(False) if False in same else len(same)
            exact[n] += (written[0] == written[1]) / 2
            prefix[n] += shared / len(written[1]) / 2
    np.testing.assert_allclose(scores["consistency"].values, exact, atol=1e-6)
    np.testing.assert_allclose(scores["prefix"].values, prefix, atol=1e-6)
    assert 0 < exact.mean() < 1


def test_consistency_needs_a_language_model_and_room_to_write(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(InvalidInput, match="needs a language model") as caught:
        build("consistency", checkpoints["text_classification"], TEXTS)
    assert caught.value.field == f"{FIELD}.evaluator"
    with pytest.raises(InvalidInput, match="leave no room for a text") as caught:
        build("consistency", checkpoints["causal_lm"], TEXTS, max_length=32, max_new_tokens=32)
    assert caught.value.field == f"{FIELD}.options.max_length"


@pytest.mark.parametrize("name", [*AGAINST, "consistency"])
def test_without_experts_there_is_nothing_to_compare_with(name: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints["causal_lm"]
    evaluator = build(name, path, TEXTS)
    assert isinstance(evaluator, ReferenceEvaluator)
    evaluator.refer({})
    with pytest.raises(InvalidInput, match="compares with experts"):
        evaluator.evaluate(load("causal_lm", path))


@pytest.mark.parametrize("name", [*AGAINST, "consistency"])
def test_parts_use_what_was_said_of_the_whole(name: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints["causal_lm"]
    whole = build(name, path, TEXTS)
    expected = whole.evaluate(open_model(name, path))
    found = whole.subset([4, 0, 6]).evaluate(open_model(name, path))
    for metric, items in found.items():
        np.testing.assert_allclose(items.values, expected[metric].values[[4, 0, 6]], rtol=1e-4, atol=1e-5)


# --- what a model does --------------------------------------------------------------------------------------------------


@every_kind
def test_the_checkpoint_says_what_the_model_does(kind: str, checkpoints: dict[str, Path]) -> None:
    evaluator = build("entropy", checkpoints[kind], KINDS[kind][2])
    assert evaluator.auto_class == KINDS[kind][1]


def test_a_headless_checkpoint_must_be_told(tmp_path: Path) -> None:
    path = tiny_bert_base(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="BertModel, does not say what it predicts") as caught:
        build("entropy", path, TEXTS)
    assert caught.value.field == f"{FIELD}.options.model"
    assert build("entropy", path, TEXTS, model="text_classification").auto_class.endswith("SequenceClassification")


def test_the_content_is_what_the_model_reads(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def content(path: Path, rows: list[Row], **options: Any) -> str:
        cls = EVALUATORS["divergence"]
        evaluator = cls(cls.Options(**options), Inputs(as_rows(rows), path, FIELD))
        assert isinstance(evaluator, ReferenceEvaluator)
        return evaluator.content

    path = checkpoints["causal_lm"]
    one = content(path, TEXTS)
    assert content(path, TEXTS, batch_size=2) == one
    assert content(path, TEXTS[::-1]) != one
    assert content(path, TEXTS, max_length=8) != one
    other = rename(tmp_path / "other", path)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w1"', '"w99"'))
    assert content(other, TEXTS) != one


@pytest.mark.parametrize(("length", "most"), [(1, 1), (5, None), (5, 5), (5, 9), (7, 3), (64, 16), (17, 16)])
def test_places_are_spread_evenly_and_include_the_last(length: int, most: int | None) -> None:
    places = _even(length, most).tolist()
    assert len(places) == min(length, most or length)
    assert places == sorted(set(places))
    assert places[-1] == length - 1
    steps = np.diff([-1, *places])
    assert steps.max() - steps.min() <= 1


def test_ragged_rows_come_back_in_the_items_order() -> None:
    parts = [
        (np.array([2, 0]), torch.tensor([20, 21, 0]), torch.tensor([2, 1])),
        (np.array([1]), torch.tensor([10, 11, 12]), torch.tensor([3])),
    ]
    found = Ragged.gather(parts)
    assert [rows.tolist() for rows in found.split()] == [[0], [10, 11, 12], [20, 21]]
    assert [rows.tolist() for rows in found.take([2, 0]).split()] == [[20, 21], [0]]
    assert Ragged.read(found.written("x"), "x").counts.tolist() == [1, 3, 2]


def test_experts_are_named_once_each() -> None:
    assert ReferenceOptions(experts=["a"]).experts == ["a"]
    with pytest.raises(ValueError, match="at least 1 item"):
        ReferenceOptions(experts=[])
