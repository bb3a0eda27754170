"""Whatever stands in a file: a typed error that names it, or tensors that the safetensors package reads the same."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from optimizer.errors import InputsChanged, InvalidCheckpoint
from workers.checkpoints import INDEX, WEIGHTS, open_checkpoint, tensor_bytes
from workers.safetensors_header import DTYPES, MAX_HEADER, read_header

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

VALID = save(
    {
        "layers.0.weight": torch.arange(6.0).reshape(2, 3),
        "layers.0.bias": torch.zeros(0),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "low": torch.ones(5, dtype=torch.float8_e4m3fn),
    },
    {"format": "pt"},
)


def assemble(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def refused_or_as_safetensors_reads_it(path: Path, content: bytes) -> str | None:
    """Write and read a file; returns why it was refused, or None if both readers have the same."""
    path.write_bytes(content)
    try:
        entries = read_header(path, "experts.0.path")
    except InvalidCheckpoint as error:
        assert error.field == "experts.0.path" and path.name in error.message and error.remedy
        return error.message
    data = content[8 + struct.unpack("<Q", content[:8])[0] :]
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(entries)
        for name, found in entries.items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == found.shape and tensor.dtype == DTYPES[found.dtype]
            if tensor.numel():
                assert tensor_bytes(tensor).tobytes() == data[found.begin : found.end]
    return None


def test_a_file_as_it_should_be(tmp_path: Path) -> None:
    assert refused_or_as_safetensors_reads_it(tmp_path / "valid.safetensors", VALID) is None
    empty = assemble(b"{}")
    assert refused_or_as_safetensors_reads_it(tmp_path / "empty.safetensors", empty) is None


@fuzz
@given(content=st.binary(max_size=200))
def test_noise(tmp_path: Path, content: bytes) -> None:
    refused_or_as_safetensors_reads_it(tmp_path / "noise", content)


@fuzz
@given(cut=st.integers(0, len(VALID) - 1))
def test_truncated(tmp_path: Path, cut: int) -> None:
    assert refused_or_as_safetensors_reads_it(tmp_path / "short", VALID[:cut])


@fuzz
@given(place=st.integers(0, len(VALID) - 1), byte=st.integers(0, 255))
def test_a_flipped_byte(tmp_path: Path, place: int, byte: int) -> None:
    refused_or_as_safetensors_reads_it(tmp_path / "flipped", VALID[:place] + bytes([byte]) + VALID[place + 1 :])


@fuzz
@given(place=st.integers(0, len(VALID)), noise=st.binary(max_size=9), without=st.integers(0, 9))
def test_bytes_inserted_and_left_out(tmp_path: Path, place: int, noise: bytes, without: int) -> None:
    refused_or_as_safetensors_reads_it(tmp_path / "edited", VALID[:place] + noise + VALID[place + without :])


@fuzz
@given(length=st.integers(0, 2**64 - 1))
@example(length=MAX_HEADER + 1)
def test_any_length_of_the_header(tmp_path: Path, length: int) -> None:
    refused_or_as_safetensors_reads_it(tmp_path / "length", assemble(b'{"a":1}', b"x" * 64, length))


numbers = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([-(2**63), 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]),
    st.sampled_from([True, False, None, 1.0, 1e3, "1", [1]]),
)
shapes = st.one_of(st.lists(numbers, max_size=4), st.lists(st.integers(0, 4), max_size=3), numbers)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
entries = st.one_of(
    st.builds(
        entry,
        st.sampled_from([*DTYPES, "F4", "f32", "", None, 3]),
        shapes,
        st.one_of(st.lists(numbers, min_size=2, max_size=2), st.lists(numbers, max_size=3), numbers),
    ),
    plain,
)


@fuzz
@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries, max_size=4),
    data=st.binary(max_size=70),
)
def test_any_entries(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    refused_or_as_safetensors_reads_it(tmp_path / "entries", assemble(json.dumps(header).encode(), data))


@st.composite
def laid_out(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header whose tensors follow each other, but for a shift of some of them."""
    header, position = {}, 0
    for number in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = DTYPES[dtype].itemsize
        for dimension in shape:
            size *= dimension
        begin = position + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 8]))
        header[f"t{number}"] = entry(dtype, shape, [begin, begin + size])
        position = begin + size
    return header, max(0, position + draw(st.sampled_from([0, 0, 0, 1, -1])))


@fuzz
@given(made=laid_out())
def test_overlaps_and_holes(tmp_path: Path, made: tuple[dict[str, Any], int]) -> None:
    header, size = made
    message = refused_or_as_safetensors_reads_it(
        tmp_path / "laid-out", assemble(json.dumps(header).encode(), bytes(size))
    )
    taken = [value["data_offsets"] for value in header.values()]
    covered = sorted(number for begin, end in taken for number in range(begin, end))
    if message is None:
        assert covered == list(range(size))
    else:
        empty = any(begin == end for begin, end in taken)  # of which one may lie where nothing else notices
        assert covered != list(range(size)) or empty


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (assemble(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"x"), "a name stands twice: 'a'"),
        (assemble(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "twice: 'dtype'"),
        (assemble(b"[" * 100_000), "no valid JSON"),
        (assemble(b'{"a":' * 50_000), "no valid JSON"),
        (assemble(json.dumps({"a": entry(extra=[[[[]]]])}).encode(), b"x"), "tensor 'a' is malformed"),
        (assemble(json.dumps({"a": entry(shape=[1] * 65)}).encode(), b"x"), "'a' has the impossible shape"),
        (assemble(json.dumps({"a": entry(shape=[0, 2**62, 4], offsets=[0, 0])}).encode()), "impossible shape"),
        (assemble(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "'a' has the impossible shape"),
        (assemble(b'{"a":{"dtype":"U8","shape":[1%s],"data_offsets":[0,0]}}' % (b"0" * 5000)), "impossible shape"),
        (assemble(b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', b"x"), "'a' has the impossible shape"),
        (assemble(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), b"x"), "no valid Unicode"),
        (assemble('{"ä":{}}'.encode("latin-1")), "no valid JSON"),
        (assemble("{}".encode("utf-16")), "no valid JSON"),
        (assemble(b"\xef\xbb\xbf{}"), "no valid JSON"),
        (assemble(b'{"__metadata__":{"a":1}}'), "__metadata__ is no table"),
        (assemble(b'{"__metadata__":"x"}'), "__metadata__ is no table"),
        (assemble(b'{"__metadata__":false}'), "__metadata__ is no table"),
        (assemble(b'{"__metadata__":{"a":"\\udfff"}}'), "__metadata__ is no table"),
        (assemble(b""), "no valid JSON"),
    ],
)  # fmt: skip
def test_what_others_might_let_through(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in (refused_or_as_safetensors_reads_it(tmp_path / "bad", content) or "")


def test_names_in_any_script(tmp_path: Path) -> None:
    for name in ("", "θ.weight", "\x00", "😀", "../../x", "a" * 10_000):
        content = assemble(json.dumps({name: entry()}).encode(), b"x")
        assert refused_or_as_safetensors_reads_it(tmp_path / "names", content) is None
        raw = assemble(json.dumps({name: entry()}, ensure_ascii=False).encode(), b"x")
        refused_or_as_safetensors_reads_it(tmp_path / "names", raw)


def test_a_header_longer_than_allowed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)  # a hole: takes no room
    with pytest.raises(InvalidCheckpoint, match=rf"header has {MAX_HEADER + 1} bytes"):
        read_header(path)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(InvalidCheckpoint, match="no regular file"):
        read_header(tmp_path / WEIGHTS)


def shard(path: Path, *names: str) -> None:
    path.write_bytes(save({name: torch.ones(2) for name in names}))


def sharded(path: Path, index: str) -> Path:
    (path / "config.json").write_text('{"model_type": "bert"}')
    shard(path / "one.safetensors", "a", "b")
    shard(path / "two.safetensors", "c")
    (path / INDEX).write_text(index)
    return path


def index(**weight_map: Any) -> str:
    return json.dumps({"weight_map": weight_map})


ONE, TWO = "one.safetensors", "two.safetensors"


class TestIndex:
    def test_what_the_index_leaves_out_counts_as_well(self, tmp_path: Path) -> None:
        found = open_checkpoint(sharded(tmp_path, index(a=ONE, c=TWO)), "base")
        assert {name: meta.file for name, meta in found.tensors.items()} == {"a": ONE, "b": ONE, "c": TWO}

    @pytest.mark.parametrize(
        ("change", "content", "message"),
        [
            (None, '{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}', "a name stands twice: 'a'"),
            (lambda path: shard(path / TWO, "c", "a"), index(a=ONE, c=TWO), f"'a' is in {ONE} and in {TWO}"),
            (None, index(a=ONE, c=ONE), f"{ONE} lacks tensor 'c'"),
            (None, index(a=ONE, c="three.safetensors"), "three.safetensors is missing; it holds tensor 'c'"),
            (None, index(a="../one.safetensors"), "places tensor 'a' in '../one.safetensors'"),
            (None, index(a="/etc/x.safetensors"), "places tensor 'a' in '/etc/x.safetensors'"),
            (None, index(a="sub/../one.safetensors"), "places tensor 'a' in"),
            (None, index(a="..\\one.safetensors"), "is missing"),
            (None, index(a="one.safetensors\x00"), "places tensor 'a' in"),
            (None, index(a="o\x00ne.safetensors"), "places tensor 'a' in"),
            (None, index(a=["one.safetensors"]), "places tensor 'a' in"),
            (None, index(a="x" * 5000 + ".safetensors"), "tensor 'a'"),
            (None, "[" * 100_000, "cannot be read"),
            (lambda path: (path / TWO).write_bytes(VALID[:-1]), index(a=ONE, c=TWO), f"{TWO} cannot be used"),
        ],
    )  # fmt: skip
    def test_inconsistent(
        self, tmp_path: Path, change: Callable[[Path], object] | None, content: str, message: str
    ) -> None:
        sharded(tmp_path, content)
        if change:
            change(tmp_path)
        with pytest.raises(InvalidCheckpoint) as caught:
            open_checkpoint(tmp_path, "base", "base")
        assert message in str(caught.value) and caught.value.field == "base"

    @settings(fuzz, max_examples=50)
    @given(data=plain)
    def test_any_index(self, tmp_path: Path, data: Any) -> None:
        if not (tmp_path / INDEX).exists():
            sharded(tmp_path, "")
        for content in (data, {"weight_map": data}, {"weight_map": {"a": data, "b": ONE}}):
            (tmp_path / INDEX).write_text(json.dumps(content))
            try:
                assert open_checkpoint(tmp_path, "base", "base").tensors
            except InvalidCheckpoint as error:
                assert error.field == "base"


class TestFilesThatChange:
    @pytest.mark.parametrize("mapped", [False, True], ids=["before it is mapped", "while it is mapped"])
    @pytest.mark.parametrize("change", ["cut short", "written to", "replaced", "removed", "made longer"])
    def test_is_noticed(self, tmp_path: Path, change: str, mapped: bool) -> None:
        checkpoint = open_checkpoint(sharded(tmp_path, index(a=ONE, c=TWO)), "math")
        checkpoint.verify()
        if mapped:
            checkpoint.tensor("c")
            checkpoint.verify()
        path = tmp_path / TWO
        content = path.read_bytes()
        if change == "replaced":
            (tmp_path / "new").write_bytes(content)
            (tmp_path / "new").rename(path)
        elif change == "removed":
            path.unlink()
        else:
            new = {"cut short": content[:-1], "written to": content[:-1] + b"!", "made longer": content + b"!"}[change]
            path.write_bytes(new)
        with pytest.raises(InputsChanged, match=r"two\.safetensors of the checkpoint 'math'") as caught:
            checkpoint.verify()
        assert caught.value.remedy
        if not mapped:
            with pytest.raises(InputsChanged, match=r"two\.safetensors"):
                checkpoint.tensor("c")
