from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optimizer.errors import InvalidCheckpoint, InvalidInput, PathNotAllowed
from optimizer.problem import Finding
from optimizer.spec import JobSpec, ModelRef
from tests.workers.models import tiny_bert, tiny_bert_base, tiny_llama, tiny_vit
from workers.checkpoints import INDEX, WEIGHTS, Checkpoint, open_checkpoint, open_checkpoints
from workers.compatibility import head_tensors, inspect, raise_on_errors
from workers.naming import canonical_names
from workers.roots import Roots
from workers.safetensors_header import layout_file, read_header


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("one") / "bert")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert_base(tmp_path_factory.mktemp("base") / "base")


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


class TestRoots:
    @pytest.fixture
    def roots(self, tmp_path: Path) -> Roots:
        for name in ("first", "second", "outside"):
            (tmp_path / name).mkdir()
        (tmp_path / "second" / "model").mkdir()
        (tmp_path / "second" / "model" / "config.json").write_text("{}")
        (tmp_path / "outside" / "model").mkdir()
        (tmp_path / "first-and-more").mkdir()
        return Roots([tmp_path / "first", tmp_path / "second"])

    def test_relative_paths_are_tried_under_each_root(self, roots: Roots, tmp_path: Path) -> None:
        assert roots.path("model", "base") == tmp_path / "second" / "model"
        assert roots.path("../second/model", "base") == tmp_path / "second" / "model"
        assert roots.path(str(tmp_path / "second" / "model"), "base") == tmp_path / "second" / "model"
        assert roots.resolve(ModelRef(path="model"), "base") == tmp_path / "second" / "model"

    @pytest.mark.parametrize(
        "text", ["../outside", "../outside/model", "/etc/passwd", "../nowhere", "/", "../first-and-more"]
    )
    def test_outside(self, roots: Roots, text: str) -> None:
        with pytest.raises(PathNotAllowed) as caught:
            roots.path(text, "experts.0.path")
        assert caught.value.field == "experts.0.path" and caught.value.remedy

    def test_outside_through_a_link(self, roots: Roots, tmp_path: Path) -> None:
        (tmp_path / "first" / "link").symlink_to(tmp_path / "outside")
        with pytest.raises(PathNotAllowed):
            roots.path("link", "base")
        with pytest.raises(PathNotAllowed):
            roots.resolve(ModelRef(path="link/model"), "base")

    def test_a_file_in_the_checkpoint_that_links_outside(self, roots: Roots, tmp_path: Path) -> None:
        (tmp_path / "outside" / "secret").write_text("x")
        (tmp_path / "second" / "model" / "vocab.txt").symlink_to(tmp_path / "outside" / "secret")
        with pytest.raises(PathNotAllowed, match=r"vocab.txt in 'model' is a link"):
            roots.resolve(ModelRef(path="model"), "base")

    def test_links_between_roots_are_fine(self, roots: Roots, tmp_path: Path) -> None:
        (tmp_path / "first" / "alias").symlink_to(tmp_path / "second" / "model")
        assert roots.resolve(ModelRef(path="alias"), "base") == tmp_path / "second" / "model"

    @pytest.mark.parametrize("text", ["nothing", "x" * 4000, "a\0b", "model/config.json/x"])
    def test_missing(self, roots: Roots, text: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            roots.path(text, "objectives.0.data.path")
        assert caught.value.field == "objectives.0.data.path"

    def test_missing_and_wrong_checkpoints(self, roots: Roots) -> None:
        with pytest.raises(InvalidCheckpoint, match=r"experts\.1\.path: 'nothing' does not exist"):
            roots.resolve(ModelRef(path="nothing"), "experts.1")
        with pytest.raises(InvalidCheckpoint, match="is no directory"):
            roots.resolve(ModelRef(path="model/config.json"), "base")

    def test_a_link_in_a_circle(self, roots: Roots, tmp_path: Path) -> None:
        (tmp_path / "first" / "circle").symlink_to(tmp_path / "first" / "circle")
        with pytest.raises(InvalidInput):
            roots.path("circle", "base")

    def test_hub(self, roots: Roots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = tmp_path / "cache"
        snapshot = cache / "models--org--model" / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (cache / "models--org--model" / "refs").mkdir()
        (cache / "models--org--model" / "refs" / "main").write_text("a" * 40)
        (snapshot / "config.json").write_text("{}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        assert roots.resolve(ModelRef(hub="org/model", revision="main"), "base") == snapshot
        with pytest.raises(InvalidCheckpoint, match="org/other@main cannot be downloaded") as caught:
            roots.resolve(ModelRef(hub="org/other", revision="main"), "experts.0")
        assert caught.value.field == "experts.0.hub"


def header(entries: dict[str, Any], data: bytes) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


class TestHeader:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "truncated"),
            (b"\x08", "truncated"),
            (struct.pack("<Q", 1 << 60), "truncated"),
            (struct.pack("<Q", 100) + b"{}", "truncated"),
            (struct.pack("<Q", 4) + b"{{{{", "no valid JSON"),
            (struct.pack("<Q", 2) + b"[]", "no JSON object"),
            (struct.pack("<Q", 200_000) + b"[" * 200_000, "no valid JSON"),
            (header({"a": 3}, b""), "'a' is malformed"),
            (header({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "'a' is malformed"),
            (header({"a": entry(0, 4, dtype="Q7")}, b"1234"), "'a' has the unknown type 'Q7'"),
            (header({"a": entry(0, 4, [-1])}, b"1234"), "'a' has the impossible shape"),
            (header({"a": entry(0, 4, [True])}, b"1234"), "'a' has the impossible shape"),
            (header({"a": entry(0, 4, [2])}, b"1234"), "offsets of tensor 'a' do not fit"),
            (header({"a": entry(4, 0, [1])}, b"1234"), "offsets of tensor 'a' do not fit"),
            (header({"a": entry(0, 8)}, b"1234"), "truncated: tensor 'a' ends at byte 8 of 4"),
            (header({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), "'b' overlaps"),
            (header({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12), "'b' is preceded by a hole"),
            (header({"a": entry(0, 4)}, b"x" * 12), "8 bytes belong to no tensor"),
            (b'{"a": 1}' * 30, "truncated"),
        ],
    )
    def test_broken_files_name_the_file_and_the_tensor(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "broken.safetensors"
        path.write_bytes(content)
        with pytest.raises(InvalidCheckpoint, match=message) as caught:
            read_header(path, "base")
        assert "broken.safetensors" in caught.value.message and caught.value.field == "base"

    def test_a_name_that_stands_twice(self, tmp_path: Path) -> None:
        raw = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(raw)) + raw + b"1234")
        with pytest.raises(InvalidCheckpoint, match="a name stands twice"):
            read_header(tmp_path / "x")

    @given(cut=st.integers(0, 400), value=st.integers(0, 255), place=st.integers(0, 400))
    @settings(max_examples=150, deadline=None)
    def test_damaged_files_never_crash(
        self, tmp_path_factory: pytest.TempPathFactory, cut: int, value: int, place: int
    ) -> None:
        whole = bytearray(header({"a": entry(0, 64), "b": entry(64, 128, [4, 4])}, bytes(128)))
        whole[place % len(whole)] = value
        path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
        path.write_bytes(bytes(whole[: len(whole) - cut % len(whole)]))
        try:
            found = read_header(path)
        except InvalidCheckpoint:
            return
        size = path.stat().st_size
        assert all(0 <= item.begin <= item.end <= size for item in found.values())

    def test_what_it_lays_out_safetensors_reads(self, tmp_path: Path) -> None:
        values = {"b": torch.arange(6, dtype=torch.float64).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
        head = layout_file([("b", "F64", (2, 3)), ("a", "BF16", (3,))], {"format": "pt"})
        assert len(head) % 64 == 0
        path = tmp_path / "x.safetensors"
        path.write_bytes(head + values["b"].numpy().tobytes() + values["a"].view(torch.uint8).numpy().tobytes())
        loaded = load_file(path)
        assert loaded.keys() == values.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in values.items())
        assert read_header(path)["a"].begin == 48


class TestReading:
    def test_tensors_are_mapped_and_not_copied(self, bert: Path) -> None:
        checkpoint = open_checkpoint(bert, "one")
        plain = load_file(bert / WEIGHTS)
        assert list(checkpoint.tensors) == sorted(plain)
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in plain.items())
        name = "bert.embeddings.word_embeddings.weight"
        maps = Path("/proc/self/maps").read_text()
        place = checkpoint.tensor(name).data_ptr()
        inside = [
            line.rstrip().endswith(str(bert / WEIGHTS))
            for line in maps.splitlines()
            if (span := [int(part, 16) for part in line.split()[0].split("-")])[0] <= place < span[1]
        ]
        assert inside == [True]
        assert checkpoint.config["model_type"] == "bert"

    def test_shards_give_the_same_tensors_and_digest(self, bert: Path, tmp_path: Path) -> None:
        sharded = tiny_bert(tmp_path / "sharded", shard_size="10KB")
        assert not (sharded / WEIGHTS).exists() and len(list(sharded.glob("*.safetensors"))) > 2
        one, two = open_checkpoint(bert, "one"), open_checkpoint(sharded, "two")
        assert one.digest == two.digest
        assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.tensors)
        assert {meta.file for meta in two.tensors.values()} == {path.name for path in sharded.glob("*.safetensors")}

    def test_the_digest_is_of_the_content(self, bert: Path, tmp_path: Path) -> None:
        tensors = load_file(bert / WEIGHTS)
        original = open_checkpoint(bert, "one").digest
        changes: list[Callable[[dict[str, torch.Tensor]], None]] = [
            lambda new: new.update({"classifier.bias": new["classifier.bias"] + 1e-7}),
            lambda new: new.update({"classifier.bias": new["classifier.bias"].view(3, 1)}),
            lambda new: new.update({"classifier.bias": new["classifier.bias"].to(torch.float16)}),
            lambda new: new.update({"classifier.other": new.pop("classifier.bias")}),
            lambda new: new.update({"classifier.bias": new["classifier.bias"].view(torch.int32)}),
        ]
        digests = {original}
        for number, change in enumerate(changes):
            new = dict(tensors)
            change(new)
            path = copied(bert, tmp_path / str(number))
            save_file(new, path / WEIGHTS)
            digests.add(open_checkpoint(path, "x").digest)
        assert len(digests) == 1 + len(changes)
        assert len(original) == 64

    def test_data_that_do_not_start_aligned(self, tmp_path: Path, bert: Path) -> None:
        path = copied(bert, tmp_path / "odd")
        data = torch.arange(12, dtype=torch.float32)
        (path / WEIGHTS).write_bytes(
            header({"a": entry(0, 48, [3, 4])} | {"__metadata__": {"k": "v"}}, data.numpy().tobytes())
        )
        odd = (path / WEIGHTS).stat().st_size - 48
        checkpoint = open_checkpoint(path, "odd")
        assert odd % 4 != 0 or odd % 8 != 0 or odd % 64 != 0
        assert torch.equal(checkpoint.tensor("a"), data.view(3, 4))
        assert len(checkpoint.digest) == 64


def broken(change: Callable[[Path], object], message: str) -> Any:
    return pytest.param(change, message, id=message[:40])


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_text(content)


def without(*names: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        for name in names or [file.name for file in path.iterdir()]:
            (path / name).unlink()

    return change


def pickle_instead(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def adapter(path: Path) -> None:
    without(WEIGHTS, "config.json")(path)
    write("adapter_config.json", "{}")(path)


def index(weight_map: object) -> Callable[[Path], object]:
    return write(INDEX, json.dumps({"weight_map": weight_map}))


class TestBadDirectories:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            broken(without(), "is an empty directory"),
            broken(without(WEIGHTS), "is no checkpoint: it has neither"),
            broken(without("config.json"), "has no config.json"),
            broken(pickle_instead, r"as a pickle \(pytorch_model.bin\)"),
            broken(adapter, "is a PEFT adapter"),
            broken(write("config.json", "{"), "config.json cannot be read"),
            broken(write("config.json", "[]"), "config.json is no JSON object"),
            broken(write("config.json", "[" * 100_000), "config.json cannot be read"),
            broken(
                lambda path: os.truncate(path / WEIGHTS, 20_000), "model.safetensors cannot be used: it is truncated"
            ),
            broken(lambda path: (path / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"{}"), "has no tensors"),
            broken(write(INDEX, "{}"), "has no weight_map"),
            broken(index({"a": "../other/model.safetensors"}), "places tensor 'a' in '../other/model.safetensors'"),
            broken(index({"a": "model.bin"}), "places tensor 'a' in 'model.bin'"),
            broken(index({"a": "model-1.safetensors"}), "shard model-1.safetensors is missing"),
            broken(index({"a": WEIGHTS}), "model.safetensors lacks tensor 'a'"),
        ],
    )
    def test_clear_errors(self, bert: Path, tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
        path = copied(bert, tmp_path / "bad")
        change(path)
        with pytest.raises(InvalidCheckpoint, match=message) as caught:
            open_checkpoint(path, "bad", "experts.2")
        assert caught.value.field == "experts.2" and caught.value.remedy

    def test_the_job_spec_names_the_field(self, bert: Path, tmp_path: Path) -> None:
        copied(bert, tmp_path / "good")
        pickle_instead(copied(bert, tmp_path / "bad"))
        spec = JobSpec.model_validate(
            {
                "base": "good",
                "experts": [{"name": "a", "path": "good"}, {"name": "b", "path": "bad"}],
                "objectives": [{"name": "x", "evaluator": "text_classification", "data": {"path": "data"}}],
                "budget": {"evaluations": 1},
            }
        )
        with pytest.raises(InvalidCheckpoint) as caught:
            open_checkpoints(spec, Roots([tmp_path]))
        assert caught.value.field == "experts.1"
        good = spec.model_copy(update={"experts": spec.experts[:1]})
        assert list(open_checkpoints(good, Roots([tmp_path]))) == ["base", "a"]


def edited(source: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = copied(source, target)
    tensors = load_file(path / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS, {"format": "pt"})
    return path


def configured(source: Path, target: Path, **changes: object) -> Path:
    path = copied(source, target)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def report(base: Path, *experts: Path, heads: tuple[str, ...] = ("classifier.*",)) -> list[Finding]:
    opened = [open_checkpoint(path, f"expert{number}") for number, path in enumerate(experts)]
    return inspect(open_checkpoint(base, "base"), opened, heads)[1]


class TestCompatibility:
    def test_a_headless_base_and_experts_with_heads(self, base: Path, bert: Path, tmp_path: Path) -> None:
        five = tiny_bert(tmp_path / "five", labels=5)
        opened = [open_checkpoint(bert, "three"), open_checkpoint(five, "five")]
        layout, findings = inspect(open_checkpoint(base, "base"), opened, ["classifier.*"])
        assert findings == []
        assert layout.layers == 2 and len(layout.shared) == 39
        heads = {tensor.name: tensor.shape for tensor in layout.tensors if tensor.role == "head"}
        assert heads == {"classifier.bias": (3,), "classifier.weight": (3, 16)}
        names = canonical_names(opened[0])
        assert names["embeddings.word_embeddings.weight"] == "bert.embeddings.word_embeddings.weight"
        assert head_tensors(opened[0], layout) == {name: name for name in heads}

    def test_a_base_with_a_head_of_its_own(self, bert: Path, tmp_path: Path) -> None:
        five = tiny_bert(tmp_path / "five", labels=5)
        opened = [open_checkpoint(bert, "base"), open_checkpoint(five, "five")]
        layout, findings = inspect(opened[0], opened[1:], ["classifier.*", "bert.pooler.*"])
        assert findings == [] and len(layout.shared) == 37
        assert set(head_tensors(opened[1], layout)) == {
            "classifier.bias",
            "classifier.weight",
            "pooler.dense.bias",
            "pooler.dense.weight",
        }

    def test_another_architecture(self, base: Path, tmp_path: Path) -> None:
        (finding,) = report(base, tiny_llama(tmp_path / "llama"))
        assert finding.severity == "error" and "'llama', the base's is 'bert'" in finding.message

    def test_an_unknown_architecture(self, base: Path, tmp_path: Path) -> None:
        strange = configured(base, tmp_path / "x", model_type="mystery", architectures=["MysteryModel"])
        with pytest.raises(InvalidCheckpoint, match="model type 'mystery', which transformers does not know"):
            report(base, strange)

    def test_an_unknown_tensor_in_one_expert(self, base: Path, bert: Path, tmp_path: Path) -> None:
        odd = edited(bert, tmp_path / "odd", lambda new: new.update({"bert.extra.weight": torch.ones(2)}))
        (finding,) = report(base, bert, odd)
        assert (finding.severity, finding.model, finding.tensors) == ("error", "expert1", ["extra.weight"])
        assert "merge.heads" in finding.message
        assert report(base, bert, odd, heads=("classifier.*", "bert.extra.*")) == []
        assert report(base, bert, odd, heads=("classifier.*", "extra.*")) == []

    def test_a_missing_tensor(self, base: Path, bert: Path, tmp_path: Path) -> None:
        name = "bert.encoder.layer.1.output.dense.bias"
        (finding,) = report(base, edited(bert, tmp_path / "odd", lambda new: new.pop(name)))
        assert finding.severity == "error" and finding.tensors == [name.removeprefix("bert.")]

    def test_another_shape(self, base: Path, bert: Path, tmp_path: Path) -> None:
        name = "bert.embeddings.word_embeddings.weight"
        odd = edited(bert, tmp_path / "odd", lambda new: new.update({name: new[name][:60]}))
        (finding,) = report(base, odd)
        assert finding.severity == "error" and "[60, 16] instead of [64, 16]" in finding.message
        with pytest.raises(
            InvalidCheckpoint, match=r"experts: .*expert0: .*another shape.*embeddings.word_embeddings.weight"
        ):
            raise_on_errors([finding])

    def test_another_type_is_a_warning(self, base: Path, tmp_path: Path) -> None:
        (finding,) = report(base, tiny_bert(tmp_path / "low", dtype=torch.bfloat16))
        assert finding.severity == "warning" and "stored as BF16, the base as F32" in finding.message
        assert len(finding.tensors) == 20
        raise_on_errors([finding])

    def test_quantised_weights(self, base: Path, bert: Path, tmp_path: Path) -> None:
        odd = configured(bert, tmp_path / "odd", quantization_config={"quant_method": "gptq"})
        assert ["quantised" in finding.message for finding in report(base, odd)] == [True]

    def test_a_function_that_differs(self, base: Path, bert: Path, tmp_path: Path) -> None:
        odd = configured(bert, tmp_path / "odd", hidden_act="relu", num_attention_heads=4, hidden_dropout_prob=0.5)
        findings = report(base, odd)
        assert [finding.severity for finding in findings] == ["warning", "warning"]
        assert [finding.message.split()[3] for finding in findings] == ["hidden_act", "num_attention_heads"]

    def test_what_a_config_leaves_out_is_its_default(self, base: Path, bert: Path, tmp_path: Path) -> None:
        same = configured(bert, tmp_path / "same", is_decoder=False, hidden_act="gelu", layer_norm_eps=1e-12)
        assert report(base, same) == []

    def test_another_tokenizer(self, base: Path, bert: Path, tmp_path: Path) -> None:
        odd = copied(bert, tmp_path / "odd")
        text = (odd / "tokenizer.json").read_text()
        (odd / "tokenizer.json").write_text(text.replace('"w1"', '"other"'))
        (finding,) = report(base, odd)
        assert finding.severity == "error" and "tokenizer.json" in finding.message
        (odd / "tokenizer.json").write_text(text.replace('"truncation": null', '"truncation": {"max_length": 9}'))
        assert report(base, odd) == []

    def test_whole_numbers_are_the_bases(self, base: Path, bert: Path, tmp_path: Path) -> None:
        ids, other = torch.arange(64).view(1, 64), torch.arange(64).view(1, 64) + 1
        with_ids = edited(base, tmp_path / "base", lambda new: new.update({"embeddings.position_ids": ids}))
        same = edited(bert, tmp_path / "same", lambda new: new.update({"bert.embeddings.position_ids": ids}))
        odd = edited(bert, tmp_path / "odd", lambda new: new.update({"bert.embeddings.position_ids": other}))
        assert report(with_ids, bert, same) == [] and report(base, same) == []
        (finding,) = report(with_ids, odd)
        assert (finding.severity, finding.tensors) == ("warning", ["embeddings.position_ids"])

    def test_old_names_of_layer_norms(self, base: Path, bert: Path, tmp_path: Path) -> None:
        def age(new: dict[str, torch.Tensor]) -> None:
            for name in list(new):
                old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                new[old] = new.pop(name)

        assert report(edited(base, tmp_path / "old", age), bert) == []

    def test_an_output_layer_stored_twice(self, tmp_path: Path) -> None:
        base, expert = tiny_llama(tmp_path / "base"), tiny_llama(tmp_path / "expert", seed=1)
        name = "model.embed_tokens.weight"
        twice = edited(expert, tmp_path / "twice", lambda new: new.update({"lm_head.weight": new[name].clone()}))
        assert report(base, twice) == []
        untied = edited(expert, tmp_path / "own", lambda new: new.update({"lm_head.weight": new[name] + 1}))
        (finding,) = report(base, untied)
        assert finding.severity == "error" and finding.tensors == ["lm_head.weight"]

    def test_everything_a_head(self, base: Path, bert: Path) -> None:
        findings = report(base, bert, heads=("*",))
        with pytest.raises(InvalidCheckpoint, match="nothing is left to merge") as caught:
            raise_on_errors(findings)
        assert caught.value.field == "base"

    def test_images(self, tmp_path: Path) -> None:
        base, expert = tiny_vit(tmp_path / "base"), tiny_vit(tmp_path / "expert", labels=7, seed=1)
        opened: list[Checkpoint] = [open_checkpoint(base, "base"), open_checkpoint(expert, "expert")]
        layout, findings = inspect(opened[0], opened[1:], ["classifier.*"])
        assert findings == [] and layout.layers == 2
        assert {tensor.kind for tensor in layout.shared} >= {"attention", "mlp", "norm", "embeddings"}
