"""Loading rows: every format, the splits, and every way in which data can be wrong."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from optimizer.errors import InvalidData, InvalidInput, PathNotAllowed
from optimizer.spec import DataSpec
from workers.data import Rows, digest_of, load_rows

disable_progress_bars()

FIELD = "objectives.0.data"
ITEMS = [{"text": f"word {n}", "label": n % 3} for n in range(7)]


def load(path: Path, **spec: Any) -> Rows:
    return load_rows(DataSpec(path="-", **spec), path, FIELD)


def refused(path: Path, field: str, kind: type[InvalidInput] = InvalidData, **spec: Any) -> str:
    """Assert that loading fails with an error on a field; return its text."""
    with pytest.raises(kind) as caught:
        load(path, **spec)
    assert caught.value.field == f"{FIELD}.{field}"
    assert str(path) not in str(caught.value), "errors name files, not where the server keeps them"
    return str(caught.value)


def write_jsonl(path: Path, items: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def write_csv(path: Path, items: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(items[0]))
        writer.writeheader()
        writer.writerows(items)
    return path


def write_parquet(path: Path, items: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(items), path)
    return path


def write_saved(path: Path, items: list[dict[str, Any]]) -> Path:
    Dataset.from_list(items).save_to_disk(path)
    return path


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "data.jsonl": write_jsonl,
    "data.parquet": write_parquet,
    "data.PARQUET": write_parquet,
    "saved": write_saved,
}


# Formats


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = load(WRITERS[name](tmp_path / name, ITEMS))
    assert rows.items == ITEMS
    assert rows.digest == digest_of(ITEMS)
    assert rows.values("label") == [0, 1, 2, 0, 1, 2, 0]
    assert rows.names == ["text", "label"]
    limited = load(tmp_path / name, limit=3)
    assert limited.items == ITEMS[:3]
    assert limited.digest == digest_of(ITEMS[:3]) != rows.digest


def test_csv_gives_texts(tmp_path: Path) -> None:
    items = [{"text": 'a, "quoted"\nline', "label": "007"}, {"text": "", "label": "é"}]
    rows = load(write_csv(tmp_path / "data.csv", items))
    assert rows.items == items
    assert rows.places == ["line 3", "line 4"]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\r\nhi\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}\r\n\r\n')
    assert load(tmp_path / "a.csv").items == load(tmp_path / "b.jsonl").items == [{"text": "hi"}]


def test_blank_lines_do_not_shift_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n{"text": 5}\n')
    rows = load(tmp_path / "a.jsonl")
    with pytest.raises(InvalidData, match=r"line 4: 'text' must be a text, not int"):
        rows.texts("text")


def test_limit_reads_no_further(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert len(load(tmp_path / "a.jsonl", limit=2)) == 2
    assert "line 3" in refused(tmp_path / "a.jsonl", "path", limit=3)


def test_parquet_in_many_row_groups(tmp_path: Path) -> None:
    items = [{"n": n} for n in range(5000)]
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "a.parquet", row_group_size=700)
    rows = load(tmp_path / "a.parquet")
    assert rows.values("n") == list(range(5000))
    assert (rows.places[0], rows.places[-1]) == ("row 1", "row 5000")


def test_saved_dataset_in_several_files(tmp_path: Path) -> None:
    Dataset.from_list([{"n": n} for n in range(10)]).save_to_disk(tmp_path / "a", num_shards=3)
    rows = load(tmp_path / "a")
    assert rows.values("n") == list(range(10))
    assert rows.places[-1] == "row 10"


def test_class_names_come_with_the_data(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    dataset.select([2, 1]).save_to_disk(tmp_path / "saved")
    dataset.select([2, 1]).to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        rows = load(path)
        assert rows.items == [{"text": "c", "label": 1}, {"text": "b", "label": 0}]
        assert rows.class_names("label") == ["no", "yes"]
        assert rows.class_names("text") is None
        assert load(path, columns={"class": "label"}).class_names("class") == ["no", "yes"]


def test_images_of_datasets_stay_bytes_until_asked_for(tmp_path: Path) -> None:
    picture = Image.new("RGB", (5, 4), (10, 20, 30))
    Dataset.from_dict({"image": [picture]}, features=Features({"image": ImageFeature()})).save_to_disk(tmp_path / "a")
    rows = load(tmp_path / "a")
    (decoded,) = rows.images("image", "RGB")
    assert decoded.size == (5, 4)
    assert decoded.getpixel((0, 0)) == (10, 20, 30)


def test_saved_datasets_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_saved(tmp_path / "a", ITEMS)

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert len(load(tmp_path / "a")) == len(ITEMS)


# Splits


def test_one_file_for_each_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "search.jsonl", ITEMS)
    write_parquet(tmp_path / "test.parquet", ITEMS[:2])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.csv").write_text("not data")
    assert load(tmp_path, split="search").items == ITEMS
    assert load(tmp_path, split="test").items == ITEMS[:2]
    assert "use one of: search, test" in refused(tmp_path, "split")
    assert "the splits are: search, test" in refused(tmp_path, "split", split="train")
    assert "'../search'" in refused(tmp_path / ".." / tmp_path.name, "split", split="../search")


def test_a_single_file_in_a_directory_needs_no_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "search.jsonl", ITEMS)
    assert load(tmp_path).items == ITEMS


def test_two_files_for_one_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", ITEMS)
    write_csv(tmp_path / "test.csv", ITEMS)
    assert "test.csv and test.jsonl" in refused(tmp_path, "path", split="test")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_split_column(name: str, tmp_path: Path) -> None:
    items = [{**item, "split": "test" if n % 2 else "search"} for n, item in enumerate(ITEMS)]
    path = WRITERS[name](tmp_path / name, items)
    rows = load(path, split="test", limit=2)
    assert rows.items == [items[1], items[3]]
    assert rows.places[0].endswith(" 2")
    assert len(load(path)) == 7
    assert "the splits are: search, test" in refused(path, "split", split="train")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_split_without_a_column_for_it(name: str, tmp_path: Path) -> None:
    assert "no column `split`" in refused(WRITERS[name](tmp_path / name, ITEMS), "split", split="test")


def test_dataset_dict(tmp_path: Path) -> None:
    parts = {"search": Dataset.from_list(ITEMS), "test": Dataset.from_list(ITEMS[:2])}
    DatasetDict(parts).save_to_disk(tmp_path / "a")
    assert load(tmp_path / "a", split="test").items == ITEMS[:2]
    assert "use one of: search, test" in refused(tmp_path / "a", "split")
    assert "the splits are: search, test" in refused(tmp_path / "a", "split", split="train")


# Image folders


def test_image_folder_takes_classes_in_turn(tmp_path: Path) -> None:
    for name in ("search/cat/2.png", "search/cat/1.png", "search/cat/3.PNG", "search/ant/9.png", "test/cat/1.png"):
        write_image(tmp_path / name)
    (tmp_path / "search/cat/notes.txt").write_text("not an image")
    (tmp_path / "search/cat/.hidden.png").write_text("not an image")
    (tmp_path / "search/.cache").mkdir()
    rows = load(tmp_path, split="search")
    assert rows.places == ["ant/9.png", "cat/1.png", "cat/2.png", "cat/3.PNG"]
    assert rows.values("label") == [0, 1, 1, 1]
    assert rows.class_names("label") == ["ant", "cat"]
    assert load(tmp_path, split="search", limit=2).values("label") == [0, 1]
    assert load(tmp_path / "search").digest == rows.digest
    assert "name the split" in refused(tmp_path, "path")
    assert "the splits are: search, test" in refused(tmp_path, "split", split="train")


def test_image_digest_is_of_the_bytes_and_the_class(tmp_path: Path) -> None:
    write_image(tmp_path / "a/cat/1.png", 5)
    write_image(tmp_path / "a/dog/1.png", 6)
    before = load(tmp_path / "a").digest
    (tmp_path / "a/dog/1.png").rename(tmp_path / "a/dog/other.png")
    assert load(tmp_path / "a").digest == before
    write_image(tmp_path / "a/dog/other.png", 7)
    changed = load(tmp_path / "a").digest
    assert changed != before
    swap = tmp_path / "a/swap.png"
    (tmp_path / "a/cat/1.png").rename(swap)
    (tmp_path / "a/dog/other.png").rename(tmp_path / "a/cat/1.png")
    swap.rename(tmp_path / "a/dog/other.png")
    assert load(tmp_path / "a").digest not in (before, changed)


def test_links_inside_an_image_folder_stay_inside(tmp_path: Path) -> None:
    secret = write_image(tmp_path / "secret/1.png")
    write_image(tmp_path / "data/cat/1.png")
    (tmp_path / "data/cat/2.png").symlink_to("1.png")
    assert len(load(tmp_path / "data")) == 2
    for link, target in (("cat/3.png", secret), ("dog", secret.parent), ("cat/4.png", "../../secret/1.png")):
        (tmp_path / "data" / link).symlink_to(target)
        assert "outside" in refused(tmp_path / "data", "path", PathNotAllowed)
        (tmp_path / "data" / link).unlink()
    (tmp_path / "data/cat/5.png").symlink_to("5.png")
    refused(tmp_path / "data", "path", InvalidInput)
    (tmp_path / "data/cat/5.png").unlink()
    (tmp_path / "data/cat/6.png").symlink_to("gone.png")
    assert "no regular file" in refused(tmp_path / "data", "path")
    (tmp_path / "data/cat/6.png").unlink()
    os.mkfifo(tmp_path / "data/cat/7.png")
    assert "no regular file" in refused(tmp_path / "data", "path")


def test_a_link_to_the_data_itself_is_for_the_roots_to_judge(tmp_path: Path) -> None:
    write_image(tmp_path / "data/cat/1.png")
    (tmp_path / "link").symlink_to("data")
    assert len(load(tmp_path / "link")) == 1


def huge_png(width: int, height: int) -> bytes:
    """Return a few bytes that claim to be an image of that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GIF89a nonsense", "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
        (huge_png(12_000, 10_000), "too many pixels"),
        (huge_png(60_000, 60_000), "too many pixels"),
        (huge_png(40, 40), "cannot be read"),
    ],
)
def test_bad_images(content: bytes, message: str, tmp_path: Path) -> None:
    write_image(tmp_path / "cat/1.png")
    (tmp_path / "cat/2.png").write_bytes(content)
    images = load(tmp_path).images("image", "RGB")
    assert next(images).size == (4, 4)
    with pytest.raises(InvalidData, match=rf"cat/2\.png: .*{message}") as caught:
        next(images)
    assert caught.value.field == f"{FIELD}.columns.image"


def test_every_truncation_of_an_image_is_refused_or_read(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(out, "JPEG")
    whole = out.getvalue()
    write_image(tmp_path / "cat/1.png")
    failures = 0
    for length in range(0, len(whole), 7):
        (tmp_path / "cat/1.png").write_bytes(whole[:length])
        try:
            next(load(tmp_path).images("image", "RGB"))
        except InvalidData:
            failures += 1
    assert failures > 0.9 * len(whole) / 7


def test_images_are_decoded_upright_and_in_one_mode(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (8, 4)).save(tmp_path / "cat/1.jpg", exif=exif)
    Image.new("P", (8, 4)).save(tmp_path / "cat/2.gif")
    Image.new("LA", (8, 4)).save(tmp_path / "cat/3.png")
    one, two, three = load(tmp_path).images("image", "RGB")
    assert (one.size, two.size, three.size) == ((4, 8), (8, 4), (8, 4))
    assert {image.mode for image in (one, two, three)} == {"RGB"}
    assert {image.mode for image in load(tmp_path).images("image", "L")} == {"L"}


# What can be wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: a JSON object is needed, not list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not JSON"),
        ("a.jsonl", b'{"score": NaN}\n', "line 1: not JSON: NaN is no JSON value"),
        ("a.jsonl", b"[" * 200_000 + b"\n", "line 1: not JSON"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
        ("a.csv", b"text,label\na,1\nb,2,3\n", "a.csv, line 3: 3 cells where the header has 2"),
        ("a.csv", b"text,label\na\n", "line 2: 1 cells where the header has 2"),
        ("a.csv", b"text,text\na,b\n", "two columns of the header have the same name"),
        ("a.csv", b'text\n"open\n', "not CSV in UTF-8"),
        ("a.csv", b"text\n\xff\n", "not CSV in UTF-8"),
        ("a.csv", b"text\n" + b"x" * 200_000 + b"\n", "field larger than field limit"),
        ("a.parquet", b"", "not a sound Parquet file"),
        ("a.parquet", b"PAR1 nonsense PAR1", "not a sound Parquet file"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"\n \n", "has no rows"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.pkl", b"\x80\x04.", "use one of: .jsonl, .csv, .parquet"),
        ("a.json", b"[]", "a suffix that is not known"),
        ("noname", b"text", "a suffix that is not known"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name, "path")


def test_no_rows_in_binary_formats(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert "has no rows" in refused(path, "path")


def test_nothing_there(tmp_path: Path) -> None:
    assert "no file or directory 'gone'" in refused(tmp_path / "gone", "path")
    assert "neither data files nor class directories" in refused(tmp_path, "path")
    os.mkfifo(tmp_path / "a.jsonl")
    assert "no file or directory" in refused(tmp_path / "a.jsonl", "path")
    assert "no regular file" in refused(tmp_path, "path", split="a")


@pytest.mark.parametrize("name", ["data.parquet", "saved"])
def test_every_truncation_of_a_binary_file_is_refused_or_whole(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, ITEMS)
    file = path if path.is_file() else path / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        try:
            assert load(path).items == ITEMS
        except InvalidData as error:
            assert error.field == f"{FIELD}.path"
    file.write_bytes(whole[: len(whole) // 2])
    assert "sound" in refused(path, "path")


@pytest.mark.parametrize("name", ["data.parquet", "saved"])
def test_flipped_bytes_of_a_binary_file_never_crash(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path / name, ITEMS)
    file = path if path.is_file() else path / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    refusals = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] ^= int(generator.integers(1, 256))
        file.write_bytes(bytes(damaged))
        try:
            load(path)
        except InvalidData:
            refusals += 1
    assert refusals > 20


@pytest.mark.parametrize("state", ["{", "[]", "{}", '{"_data_files": [{}]}', '{"_data_files": [3]}'])
def test_a_saved_dataset_with_a_bad_list_of_files(state: str, tmp_path: Path) -> None:
    write_saved(tmp_path / "a", ITEMS)
    (tmp_path / "a/state.json").write_text(state)
    assert "state.json" in refused(tmp_path / "a", "path")


def test_a_saved_dataset_cannot_lead_outside(tmp_path: Path) -> None:
    write_saved(tmp_path / "secret", ITEMS)
    secret = tmp_path / "secret/data-00000-of-00001.arrow"
    write_saved(tmp_path / "a", ITEMS)
    for name in ("../secret/data-00000-of-00001.arrow", str(secret)):
        (tmp_path / "a/state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        refused(tmp_path / "a", "path", PathNotAllowed)
    shutil.copy(tmp_path / "secret/state.json", tmp_path / "a/state.json")
    (tmp_path / "a" / secret.name).unlink()
    assert "no regular file" in refused(tmp_path / "a", "path")
    (tmp_path / "a" / secret.name).symlink_to(secret)
    refused(tmp_path / "a", "path", PathNotAllowed)


def test_links_of_splits_cannot_lead_outside(tmp_path: Path) -> None:
    secret = write_jsonl(tmp_path / "secret/test.jsonl", ITEMS)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/test.jsonl").symlink_to(secret)
    refused(tmp_path / "a", "path", PathNotAllowed, split="test")
    write_saved(tmp_path / "secret/saved", ITEMS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/test").symlink_to(tmp_path / "secret/saved")
    refused(tmp_path / "b", "path", PathNotAllowed, split="test")


def test_mapped_columns_must_exist(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ITEMS)
    assert load(path, columns={"word": "text"}).texts("word")[0] == "word 0"
    assert "the columns are: text, label" in refused(path, "columns.word", columns={"word": "txt"})


def test_missing_columns_and_values(tmp_path: Path) -> None:
    rows = load(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"label": 1}, {"text": None, "label": 2}]))
    assert rows.has("label")
    assert not rows.has("question")
    with pytest.raises(InvalidData, match=r"no column 'question' .*map 'question' to one of: text, label") as caught:
        rows.texts("question")
    assert caught.value.field == f"{FIELD}.columns.question"
    with pytest.raises(InvalidData, match="line 2: 'text' is missing"):
        rows.texts("text")
    with pytest.raises(InvalidData, match="line 1: 'label' is missing"):
        rows.values("label")


def test_long_lists_of_names_are_cut(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{f"column {n}": n for n in range(500)}])
    message = refused(path, "columns.text", columns={"text": "words"})
    assert "column 19 and 480 more" in message


def test_lone_surrogates_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d"}\n')
    rows = load(tmp_path / "a.jsonl")
    assert len(rows.digest) == 64
    with pytest.raises(InvalidData, match="lone surrogates"):
        rows.texts("text")


# The digest

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(items=st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=4), max_size=4))
def test_digest_is_of_the_content(items: list[dict[str, Any]]) -> None:
    reordered = [dict(reversed(item.items())) for item in items]
    assert digest_of(items) == digest_of(reordered)
    assert digest_of([*items, {}]) != digest_of(items)
    assert digest_of([*items, {"new": 1}]) != digest_of([*items, {"new": "1"}])


def test_digest_is_the_same_on_every_machine() -> None:
    assert digest_of([{"b": "é", "a": [1, 2.5]}]) == hashlib.sha256(b'{"a":[1,2.5],"b":"\\u00e9"}\n').hexdigest()


def test_digest_of_values_that_json_lacks(tmp_path: Path) -> None:
    import datetime
    import decimal

    items = [{"when": datetime.datetime(2026, 1, 2), "much": decimal.Decimal("1.50"), "raw": b"\0\1", "on": None}]
    rows = load(write_parquet(tmp_path / "a.parquet", items))
    again = load(write_parquet(tmp_path / "b.parquet", items))
    assert rows.digest == again.digest
    other = load(write_parquet(tmp_path / "c.parquet", [{**items[0], "raw": b"\0\2"}]))
    assert other.digest != rows.digest


@given(items=st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=4), min_size=1, max_size=4))
def test_digests_of_rows_are_of_their_content(items: list[dict[str, Any]]) -> None:
    rows = Rows(items, ["?"] * len(items), {}, "data", digest_of(items))
    assert all(len(each) == 16 for each in rows.digests)
    for one, digest in zip(items, rows.digests, strict=True):
        assert digest.hex() == digest_of([one])[:32]


def test_contents_are_what_the_roles_say(tmp_path: Path) -> None:
    search = load(write_jsonl(tmp_path / "a.jsonl", [{"text": "one", "label": 1, "id": 1}]))
    test = load(write_jsonl(tmp_path / "b.jsonl", [{"word": "one", "label": 1, "id": 2}]), columns={"text": "word"})
    assert search.digests != test.digests
    assert search.contents(["text", "label"]) == test.contents(["label", "text", "image"])
    assert search.contents(["text", "id"]) != test.contents(["text", "id"])


def test_contents_without_any_role_are_the_whole_row_but_its_split(tmp_path: Path) -> None:
    rows = load(write_jsonl(tmp_path / "a.jsonl", [{"q": "one", "split": "search"}, {"q": "one", "split": "test"}]))
    assert len(set(rows.contents(["text"]))) == 1
    assert len(set(rows.digests)) == 2
