"""Models that differ in vocabulary, padding, tied output layers and chat templates: what is said, and what is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimizer.errors import InvalidCheckpoint, InvalidInput
from optimizer.ports import Task
from optimizer.problem import Finding
from optimizer.recipe import Leaf, ModelId, Recipe
from optimizer.space import make_space
from optimizer.spec import ModelRef, parse_spec
from tests.workers.models import SPECIAL, VOCABULARY, make_recipe, tiny_llama
from workers.alignment import AlignedCheckpoint, Rule, align, row_count, vocabulary_of
from workers.checkpoints import WEIGHTS, Checkpoint, open_checkpoint
from workers.compatibility import inspect, raise_on_errors
from workers.export import export_checkpoint
from workers.merging.engine import MergeEngine
from workers.merging.resident import ResidentModels
from workers.prepare import prepare
from workers.rebuild import Places, open_recipe, write_model
from workers.roots import Roots
from workers.tokenizers import Tokenizer, chat_template, join, read_tokenizer, relation
from workers.worker import EvaluationWorker

EMBEDDING = "model.embed_tokens.weight"


def rewritten(path: Path, tokens: Sequence[str], added: Sequence[str] = (), *, rows: int | None = None) -> Path:
    """Give a tiny Llama another word-level vocabulary; its rows for the tokens it had before move along with them."""
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    old: dict[str, int] = tokenizer["model"]["vocab"]
    everything = [*tokens, *added]
    tokenizer["model"]["vocab"] = {token: number for number, token in enumerate(tokens)}
    tokenizer["added_tokens"] = [
        {**entry, "id": tokens.index(entry["content"])} for entry in tokenizer["added_tokens"] if entry["content"] in tokens
    ] + [
        {"id": len(tokens) + number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, token in enumerate(added)
    ]  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = load_file(path / WEIGHTS)
    for name in (EMBEDDING, "lm_head.weight"):
        if name in tensors:
            tensors[name] = _moved(tensors[name], old, everything, rows or len(everything))
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"vocab_size": rows or len(everything), "eos_token_id": everything.index("</s>")}
    (path / "config.json").write_text(json.dumps(config))
    return path


def _moved(tensor: Tensor, old: Mapping[str, int], tokens: Sequence[str], rows: int) -> Tensor:
    out = torch.randn(rows, *tensor.shape[1:], generator=torch.Generator().manual_seed(rows)).to(tensor.dtype)
    for number, token in enumerate(tokens):
        if token in old:
            out[number] = tensor[old[token]]
    return out


def opened(base: Path, **experts: Path) -> dict[str, Checkpoint]:
    return {"base": open_checkpoint(base, "base")} | {
        name: open_checkpoint(path, name) for name, path in experts.items()
    }


def report(checkpoints: Mapping[str, Checkpoint]) -> list[Finding]:
    base, *experts = checkpoints.values()
    return inspect(base, experts, ["classifier.*"])[1]


def row(checkpoint: Checkpoint, token: str, name: str = EMBEDDING) -> Tensor:
    tokenizer = read_tokenizer(checkpoint.path)
    assert tokenizer is not None
    return checkpoint.tensor(name)[tokenizer.tokens[token]]


def load(path: Path) -> Any:
    """Load with plain transformers; every tensor of the file must be one of the model's, and the other way round."""
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "base")


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """The base's vocabulary and two chat tokens after it."""
    return rewritten(tiny_llama(tmp_path / "extended", seed=1), VOCABULARY, ["<|im_start|>", "<|im_end|>"])


@pytest.fixture
def shuffled(tmp_path: Path) -> Path:
    """Half of the base's words in another order, and three words of its own."""
    words = [*SPECIAL, *VOCABULARY[: len(SPECIAL) - 1 : -2], "x1", "x2", "x3"]
    return rewritten(tiny_llama(tmp_path / "shuffled", seed=2), words)


class TestRefuse:
    def test_more_tokens_in_more_rows(self, base: Path, extended: Path) -> None:
        findings = report(align(opened(base, one=extended), "refuse"))
        assert [finding.severity for finding in findings] == ["error"]
        assert "66 tokens in 66 rows, the base's 64 in 64" in findings[0].message
        with pytest.raises(InvalidCheckpoint, match=r"merge\.vocabulary"):
            raise_on_errors(findings)

    def test_other_numbers(self, base: Path, shuffled: Path) -> None:
        (finding,) = report(align(opened(base, one=shuffled), "refuse"))
        assert finding.severity == "error" and "other numbers than the base's" in finding.message

    def test_more_tokens_in_padding_are_merged_by_number(self, tmp_path: Path) -> None:
        one, two = tiny_llama(tmp_path / "one"), tiny_llama(tmp_path / "two", seed=1)
        rewritten(one, VOCABULARY, rows=72)
        rewritten(two, VOCABULARY, ["<|im_start|>"], rows=72)
        (finding,) = report(align(opened(one, two=two), "refuse"))
        assert finding.severity == "warning" and "1 more tokens" in finding.message
        (finding,) = report(align(opened(two, one=one), "refuse"))
        assert finding.severity == "warning" and "1 fewer tokens" in finding.message

    def test_other_padding(self, base: Path, tmp_path: Path) -> None:
        padded = rewritten(tiny_llama(tmp_path / "padded", seed=1), VOCABULARY, rows=72)
        (finding,) = report(align(opened(base, one=padded), "refuse"))
        assert finding.severity == "error" and "64 tokens in 72 rows" in finding.message


@pytest.mark.parametrize("rule", ["base", "union"])
def test_equal_vocabularies_are_left_as_they_are(base: Path, tmp_path: Path, rule: Rule) -> None:
    checkpoints = opened(base, one=tiny_llama(tmp_path / "one", seed=1))
    aligned = align(checkpoints, rule)
    assert all(aligned[name] is checkpoints[name] for name in checkpoints)
    assert report(aligned) == [] and vocabulary_of(aligned["one"]) is None


class TestUnion:
    def test_rows_are_found_by_token(self, base: Path, extended: Path, shuffled: Path) -> None:
        checkpoints = opened(base, one=extended, two=shuffled)
        aligned = align(checkpoints, "union")
        layout, findings = inspect(aligned["base"], [aligned["one"], aligned["two"]], [])
        assert {finding.severity for finding in findings} == {"warning"}
        assert "the merged model has 69 tokens in 69 rows" in findings[0].message
        tokens = read_tokenizer(aligned["base"].path)
        assert tokens is not None
        assert [token for token, number in sorted(tokens.tokens.items(), key=lambda item: item[1])] == [
            *VOCABULARY, "<|im_start|>", "<|im_end|>", "x1", "x2", "x3",
        ]  # fmt: skip
        assert {aligned[name].tensors[EMBEDDING].shape for name in aligned} == {(69, 16)}
        assert next(tensor for tensor in layout.shared if "embed" in tensor.name).shape == (69, 16)
        for name, checkpoint in checkpoints.items():
            own = read_tokenizer(checkpoint.path)
            assert own is not None
            for token in own.tokens:
                assert torch.equal(row(aligned[name], token), row(checkpoint, token)), (name, token)

    def test_rows_that_a_model_lacks(self, base: Path, extended: Path, shuffled: Path) -> None:
        checkpoints = opened(base, one=extended, two=shuffled)
        aligned = align(checkpoints, "union")
        assert torch.equal(row(aligned["two"], VOCABULARY[8]), row(checkpoints["base"], VOCABULARY[8]))
        for name in aligned:  # only one model has it: its row stands in all, so that every task vector is zero
            assert torch.equal(row(aligned[name], "<|im_end|>"), row(checkpoints["one"], "<|im_end|>"))
            assert torch.equal(row(aligned[name], "x2"), row(checkpoints["two"], "x2"))

    def test_a_row_of_several_experts_is_their_mean(self, base: Path, tmp_path: Path) -> None:
        paths = [
            rewritten(tiny_llama(tmp_path / f"m{number}", seed=number), VOCABULARY, ["<|new|>"], rows=65 + number)
            for number in (1, 2)
        ]
        checkpoints = opened(base, one=paths[0], two=paths[1], three=tiny_llama(tmp_path / "three", seed=3))
        aligned = align(checkpoints, "union")
        mean = (row(checkpoints["one"], "<|new|>").double() + row(checkpoints["two"], "<|new|>").double()) / 2
        assert torch.equal(row(aligned["base"], "<|new|>"), mean.float())
        assert torch.equal(row(aligned["three"], "<|new|>"), mean.float())
        assert torch.equal(row(aligned["two"], "<|new|>"), row(checkpoints["two"], "<|new|>"))

    def test_new_tokens_stand_in_the_bases_padding(self, extended: Path, tmp_path: Path) -> None:
        padded = rewritten(tiny_llama(tmp_path / "padded"), VOCABULARY, rows=80)
        checkpoints = opened(padded, one=extended)
        aligned = align(checkpoints, "union")
        assert aligned["one"].tensors[EMBEDDING].shape == (80, 16)
        assert torch.equal(row(aligned["base"], "<|im_start|>"), row(checkpoints["one"], "<|im_start|>"))
        padding = checkpoints["base"].tensor(EMBEDDING)[66:]
        assert all(torch.equal(aligned[name].tensor(EMBEDDING)[66:], padding) for name in aligned)

    def test_what_stays_in_place_stays_mapped(self, base: Path, extended: Path) -> None:
        checkpoints = opened(base, one=extended)
        aligned = align(checkpoints, "union")
        assert aligned["one"].tensor(EMBEDDING) is checkpoints["one"].tensor(EMBEDDING)
        assert aligned["base"].tensor("model.norm.weight") is checkpoints["base"].tensor("model.norm.weight")
        assert aligned["base"].digest == checkpoints["base"].digest

    def test_numbers_in_configs_follow(self, base: Path, shuffled: Path) -> None:
        generation = {"eos_token_id": [6, 9], "pad_token_id": 0, "max_length": 20}
        (shuffled / "generation_config.json").write_text(json.dumps(generation))
        aligned = align(opened(base, one=shuffled), "union")["one"]
        assert (aligned.config["vocab_size"], aligned.config["eos_token_id"]) == (67, 6)
        written = json.loads((aligned.path / "generation_config.json").read_text())
        name = {number: token for token, number in _tokens(shuffled).items()}[9]
        assert written == {"eos_token_id": [6, VOCABULARY.index(name)], "pad_token_id": 0, "max_length": 20}

    def test_the_directory_of_a_view_goes_with_it(self, base: Path, extended: Path) -> None:
        aligned = align(opened(base, one=extended), "union")
        path = aligned["one"].path
        assert path.is_dir()
        del aligned
        assert not path.exists()


class TestBase:
    def test_other_tokens_are_dropped(self, base: Path, shuffled: Path) -> None:
        checkpoints = opened(base, one=shuffled)
        aligned = align(checkpoints, "base")
        assert aligned["base"].tensor(EMBEDDING) is checkpoints["base"].tensor(EMBEDDING)
        assert aligned["one"].tensors[EMBEDDING].shape == (64, 16)
        for token in VOCABULARY:
            owner = "one" if token in _tokens(shuffled) else "base"
            assert torch.equal(row(aligned["one"], token), row(checkpoints[owner], token))
        (finding,) = report(aligned)
        assert "3 tokens that the base lacks are dropped" in finding.message
        assert (aligned["one"].path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

    def test_dropped_tokens_leave_the_config(self, base: Path, extended: Path) -> None:
        config = json.loads((extended / "config.json").read_text()) | {"eos_token_id": 65, "bos_token_id": 64}
        (extended / "config.json").write_text(json.dumps(config))
        aligned = align(opened(base, one=extended), "base")["one"]
        assert (aligned.config["eos_token_id"], aligned.config["bos_token_id"]) == (6, 5)

    def test_other_padding(self, base: Path, tmp_path: Path) -> None:
        padded = rewritten(tiny_llama(tmp_path / "padded", seed=1), VOCABULARY, rows=72)
        aligned = align(opened(base, one=padded), "base")
        assert report(aligned) == []
        assert torch.equal(aligned["one"].tensor(EMBEDDING), open_checkpoint(padded, "x").tensor(EMBEDDING)[:64])


def _tokens(path: Path) -> Mapping[str, int]:
    found = read_tokenizer(path)
    assert found is not None
    return found.tokens


@pytest.mark.parametrize("head", [None, "one", "two"])
@pytest.mark.parametrize("rule", ["base", "union"])
def test_plain_transformers_computes_what_the_resident_model_does(
    base: Path, extended: Path, shuffled: Path, tmp_path: Path, rule: Rule, head: str | None
) -> None:
    (extended / "chat_template.jinja").write_text("{{ messages }}")
    checkpoints = align(opened(base, one=extended, two=shuffled), rule)
    layout, findings = inspect(checkpoints["base"], [checkpoints["one"], checkpoints["two"]], [])
    raise_on_errors(findings)
    recipe = make_recipe(checkpoints, "task_arithmetic", [0.5, 0.4])
    out = export_checkpoint(
        recipe,
        checkpoints,
        layout,
        tmp_path / "out",
        head=head,
        title="x",
        scores={},
        spec=None,
        progress=lambda _: None,
    )
    model = load(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("w3 w8 w20 x2", return_tensors="pt")["input_ids"]
    unknown = VOCABULARY.index("[UNK]")
    assert ids.tolist() == [
        [*(VOCABULARY.index(word) for word in ("w3", "w8", "w20")), 67 if rule == "union" else unknown]
    ]
    resident = ResidentModels(checkpoints, layout, MergeEngine(checkpoints, layout), torch.device("cpu"), torch.float32)
    resident.apply(recipe)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, resident.model(head, "AutoModelForCausalLM")(ids).logits)
    assert (out / "chat_template.jinja").exists() == (rule == "union" and head == "one")


def test_the_recipe_knows_the_vocabulary(base: Path, extended: Path, shuffled: Path) -> None:
    plain = opened(base, one=extended, two=shuffled)
    fingerprints = set()
    for rule in ("refuse", "base", "union"):
        aligned = align(plain, rule)
        fingerprints.add(_recipe(aligned).fingerprint)
    fingerprints.add(_recipe(align({name: plain[name] for name in ("base", "two", "one")}, "union")).fingerprint)
    assert len(fingerprints) == 4
    recipe = _recipe(align(plain, "union"))
    assert Recipe.parse(recipe.to_json()) == recipe


def _recipe(checkpoints: Mapping[str, Checkpoint]) -> Recipe:
    models = {
        name: ModelId(ref=ModelRef(path="x"), digest=found.digest, vocabulary=vocabulary_of(found))
        for name, found in checkpoints.items()
    }
    return Recipe(models=models, root=Leaf(model="one"))


def test_no_tokenizer(base: Path, extended: Path, tmp_path: Path) -> None:
    bare = tiny_llama(tmp_path / "bare", seed=3)
    (bare / "tokenizer.json").unlink()
    aligned = align(opened(base, one=extended, two=bare), "union")  # it has the base's rows: the base's is assumed
    assert aligned["two"].tensors[EMBEDDING].shape == (66, 16)
    (finding,) = report(align(opened(base, two=bare), "refuse"))
    assert finding.severity == "info" and "the base's is used" in finding.message
    (extended / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidCheckpoint, match="one has no readable tokenizer"):
        align(opened(base, one=extended), "union")
    (base / "tokenizer.json").unlink()
    with pytest.raises(InvalidCheckpoint, match="base has no readable tokenizer"):
        align(opened(base, two=bare), "base")


def test_a_job_over_different_vocabularies(base: Path, extended: Path, tmp_path: Path) -> None:
    """What is scored is the joined model with the joined tokens, and what is exported scores the same."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "w1 <|im_start|> w2 <|im_end|> w9"}) + "\n")
    spec = parse_spec(
        {
            "base": "base",
            "experts": [{"name": "one", "path": "extended"}],
            "merge": {"operator": "task_arithmetic", "vocabulary": "union"},
            "objectives": [{"name": "x", "evaluator": "causal_lm", "data": {"path": "data.jsonl"}}],
            "budget": {"evaluations": 1},
        }
    )
    roots = Roots([tmp_path])
    problem = prepare(spec, roots)
    assert "the merged model has 66 tokens" in problem.findings[0].message
    recipe = make_space(spec, problem).recipe(np.full(make_space(spec, problem).dim, 0.4))
    worker = EvaluationWorker(spec, problem, roots, "w")
    task = Task(0, recipe.to_json())
    result = worker.evaluate(task)
    assert result.failure is None
    opened_again = open_recipe(recipe, Places(roots, {}))
    write_model(opened_again, tmp_path / "out", title="x", tokenizer_from="base")
    again = parse_spec({**spec.model_dump(mode="json"), "base": "out", "experts": [{"name": "one", "path": "out"}]})
    same = EvaluationWorker(again, prepare(again, roots), roots, "w")
    alone = Recipe(models=prepare(again, roots).models, root=Leaf(model="base"))
    scores = same.evaluate(Task(0, alone.to_json())).scores
    assert np.array_equal(scores["x"].values, result.scores["x"].values)
    assert len(scores["x"].values) == 1 and np.isfinite(scores["x"].values).all()


class TestOutputLayers:
    def test_a_tied_base_and_an_untied_expert(self, base: Path, tmp_path: Path) -> None:
        untied = tiny_llama(tmp_path / "untied", seed=1, tied=False)
        aligned = align(opened(base, one=untied), "refuse")
        layout, findings = inspect(aligned["base"], [aligned["one"]], [])
        assert [finding.severity for finding in findings] == ["warning"]
        assert "the merged model has one of its own" in findings[0].message
        assert torch.equal(aligned["base"].tensor("lm_head.weight"), aligned["base"].tensor(EMBEDDING))
        recipe = make_recipe(aligned, "task_arithmetic", [0.5])
        out = export_checkpoint(
            recipe,
            aligned,
            layout,
            tmp_path / "out",
            head=None,
            title="x",
            scores={},
            spec=None,
            progress=lambda _: None,
        )
        model = load(out)
        wanted = (open_checkpoint(untied, "x").tensor("lm_head.weight") + aligned["base"].tensor(EMBEDDING)) / 2
        torch.testing.assert_close(model.get_parameter("lm_head.weight").data, wanted)
        assert not model.config.tie_word_embeddings

    def test_an_untied_base_and_a_tied_expert_with_more_tokens(self, extended: Path, tmp_path: Path) -> None:
        untied = tiny_llama(tmp_path / "untied", seed=1, tied=False)
        aligned = align(opened(untied, one=extended), "union")
        assert {aligned[name].tensors["lm_head.weight"].shape for name in aligned} == {(66, 16)}
        assert isinstance(aligned["one"], AlignedCheckpoint) and isinstance(aligned["base"], AlignedCheckpoint)
        assert (len(aligned["base"].notes), len(aligned["one"].notes)) == (1, 1)
        assert torch.equal(row(aligned["base"], "<|im_end|>", "lm_head.weight"), row(aligned["one"], "<|im_end|>"))

    def test_one_that_is_stored_differently_is_not_tied(self, base: Path, tmp_path: Path) -> None:
        other = tiny_llama(tmp_path / "other", seed=1)
        tensors = load_file(other / WEIGHTS)
        save_file(tensors | {"lm_head.weight": tensors[EMBEDDING] + 1}, other / WEIGHTS, {"format": "pt"})
        aligned = align(opened(base, one=other), "refuse")
        assert [finding.model for finding in report(aligned)] == ["base"]
        assert row_count(aligned["base"]) == 64


class TestTemplates:
    @pytest.mark.parametrize(
        ("mine", "theirs", "severity"),
        [("a", "a", None), ("a", "b", "warning"), (None, "b", "info"), ("a", None, "info"), (None, None, None)],
    )
    def test_report(
        self, base: Path, tmp_path: Path, mine: str | None, theirs: str | None, severity: str | None
    ) -> None:
        one = tiny_llama(tmp_path / "one", seed=1)
        for path, template in ((base, mine), (one, theirs)):
            if template:
                (path / "chat_template.jinja").write_text(template)
        assert [finding.severity for finding in report(opened(base, one=one))] == ([severity] if severity else [])

    def test_where_it_may_stand(self, tmp_path: Path) -> None:
        assert chat_template(tmp_path) is None
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": " c "}))
        assert chat_template(tmp_path) == "c"
        named = [{"name": "tool", "template": "t"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert chat_template(tmp_path) == json.dumps(named, sort_keys=True)


def bpe(vocabulary: Sequence[str], merges: Sequence[Any], added: Sequence[str] = ()) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(vocabulary)}
    entries = [{"id": len(vocab) + number, "content": token, "special": True} for number, token in enumerate(added)]
    return Tokenizer({"model": {"type": "BPE", "vocab": vocab, "merges": list(merges)}, "added_tokens": entries})


def test_union_of_byte_pairs() -> None:
    base = bpe(["a", "b", "c", "ab"], ["a b"], ["<s>"])
    other = bpe(["c", "b", "a", "bc", "abc"], [["b", "c"], ["a", "bc"]], ["<s>", "<t>"])
    joined = join(base, [other])
    assert joined.tokens == {"a": 0, "b": 1, "c": 2, "ab": 3, "<s>": 4, "bc": 5, "abc": 6, "<t>": 7}
    assert joined.data["model"]["merges"] == ["a b", "b c", "a bc"]
    assert base.tokens == {"a": 0, "b": 1, "c": 2, "ab": 3, "<s>": 4}
    assert relation(base, joined) == "extended" and relation(joined, base) == "reduced"


def test_union_of_unigrams() -> None:
    def unigram(*tokens: str) -> Tokenizer:
        return Tokenizer(
            {"model": {"type": "Unigram", "vocab": [[token, -float(n)] for n, token in enumerate(tokens)]}}
        )

    joined = join(unigram("a", "b"), [unigram("b", "c")])
    assert joined.data["model"]["vocab"] == [["a", 0.0], ["b", -1.0], ["c", -1.0]]
    with pytest.raises(InvalidInput, match="no union"):
        join(unigram("a"), [bpe(["b"], [])])
    later = Tokenizer({**unigram("a").data, "added_tokens": [{"id": 1, "content": "<s>"}]})
    with pytest.raises(InvalidInput, match="after its vocabulary's end"):
        join(later, [unigram("c")])


names = st.lists(st.text("abcd", min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


@settings(max_examples=50, deadline=None)
@given(base=names, others=st.lists(names, min_size=1, max_size=3))
def test_a_union_has_every_token_once_and_the_bases_in_place(base: list[str], others: list[list[str]]) -> None:
    tokenizers = [bpe(words, []) for words in [base, *others]]
    joined = join(tokenizers[0], tokenizers[1:])
    assert relation(tokenizers[0], joined) in ("equal", "extended")
    assert set(joined.tokens) == set().union(base, *others)
    assert sorted(joined.tokens.values()) == list(range(len(joined.tokens)))
    assert join(joined, tokenizers).tokens == joined.tokens


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": 3}', '{"model": {}}', '{"model": {"vocab": {"a": "x"}}}'])
def test_broken_tokenizers(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert read_tokenizer(tmp_path) is None
