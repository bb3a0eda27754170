"""Documents of others: what is read is plain, finite data; what is hostile is refused at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from api.documents import MAX_DEPTH, Format, parse_document
from optimizer.errors import InvalidInput

TEXT = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
DATA = st.recursive(
    SCALARS | TEXT, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=20
)


@given(DATA)
def test_json_comes_back_as_it_was(data: Any) -> None:
    assert parse_document(json.dumps(data).encode(), "json") == data


@given(DATA)
def test_yaml_comes_back_as_it_was(data: Any) -> None:
    assert parse_document(yaml.safe_dump(data).encode(), "yaml") == data


def test_yaml_aliases_and_merge_keys_work() -> None:
    text = """
    defaults: &defaults {evaluator: text_classification, metric: loss}
    objectives:
      - {<<: *defaults, name: a}
      - {<<: *defaults, name: b}
    """
    objectives = parse_document(text, "yaml")["objectives"]
    assert objectives[1] == {"evaluator": "text_classification", "metric": "loss", "name": "b"}


def test_yaml_dates_stay_text() -> None:
    assert parse_document("revision: 2024-05-01", "yaml") == {"revision": "2024-05-01"}


def _bomb(merge: bool) -> str:
    value = "{<<: [%s]}" if merge else "[%s]"
    first = "a0: &a0 {x: 1}" if merge else "a0: &a0 [1, 2]"
    lines = [f"a{n}: &a{n} " + value % ", ".join([f"*a{n - 1}"] * 9) for n in range(1, 30)]
    return "\n".join([first, *lines])


HOSTILE: list[tuple[str, Format, str]] = [
    (_bomb(merge=False), "yaml", "aliases"),
    (_bomb(merge=True), "yaml", "aliases"),
    ("&a [*a]", "yaml", "nested too deeply"),
    ("&a {b: *a, c: *a}", "yaml", "nested too deeply"),
    ("[" * 100_000, "yaml", ""),
    ("[" * 2_000 + "]" * 2_000, "yaml", "nested too deeply"),
    ("- " * 5_000 + "1", "yaml", ""),
    ("[" * 100_000, "json", "nested too deeply"),
    ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "json", "nested too deeply"),
    ('{"a": ' * (MAX_DEPTH + 2) + "1" + "}" * (MAX_DEPTH + 2), "json", "nested too deeply"),
    ("!!python/object/apply:os.system [id]", "yaml", "python/object"),
    ("!!binary aGVsbG8=", "yaml", "bytes"),
    ("!!set {a, b}", "yaml", "set"),
    ("1: one", "yaml", "quotes"),
    ("[1, 2]: pair", "yaml", ""),
    ("a: .nan", "yaml", "nan"),
    ("a: -.inf", "yaml", "inf"),
    ("[NaN]", "json", "nan"),
    ("[1e999]", "json", "inf"),
    ("[" + "9" * 10_000 + "]", "json", ""),
    ('["\\u0000"]', "json", "NUL"),
    ('{"\\ud800": 1}', "json", "surrogate"),
    ("a: b: c", "yaml", "line 1"),
    ("--- 1\n--- 2", "yaml", "single document"),
    ("a: 'unfinished", "yaml", "line 1"),
    ("*unknown", "yaml", "alias"),
    ("<<: 3", "yaml", ""),
    ("{", "json", "line 1"),
]


@pytest.mark.parametrize(("text", "form", "says"), HOSTILE, ids=[f"{form}-{text[:20]!r}" for text, form, _ in HOSTILE])
def test_hostile_documents_are_refused(text: str, form: Format, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_document(text.encode(), form, field="job.yaml")
    assert caught.value.field == "job.yaml"
    assert says in caught.value.message


@pytest.mark.parametrize("form", ["json", "yaml"])
@given(raw=st.binary(max_size=200))
def test_no_bytes_raise_anything_else(form: Format, raw: bytes) -> None:
    try:
        data = parse_document(raw, form)
    except InvalidInput:
        return
    assert json.loads(json.dumps(data, allow_nan=False)) == data
