"""Templates, JSON pointers, and rows as JSON."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InfeasibleCandidate, InvalidData, InvalidInput
from tests.workers.evaluators.cases import as_rows
from workers.services.pointers import NothingThere, follow, parse_pointer
from workers.services.requests import Secret, Text, mask
from workers.services.rows import sendable
from workers.services.templates import Anything, check_template, render, render_url, uses

DATA: dict[str, Any] = {
    "values": {"t": 0.25, "model": "a b/ü", "n": 3},
    "row": {"q": 'say "hi" {{values.t}}', "tags": ["x", "y"]},
}


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{{values.t}}", 0.25),
        ("t={{values.t}}, n={{ values.n }}", "t=0.25, n=3"),
        ("{{values}}", DATA["values"]),
        ("{{row.tags.1}}", "y"),
        ("tags: {{row.tags}}", 'tags: ["x", "y"]'),
        ("{{row.q}}", DATA["row"]["q"]),
        ("<{{row.q}}>", f"<{DATA['row']['q']}>"),
        ({"{{values.model}}": ["{{values.n}}", 1, None, True]}, {"a b/ü": [3, 1, None, True]}),
        ("no {placeholder} {}", "no {placeholder} {}"),
        ("", ""),
        (7, 7),
    ],
)
def test_templates(template: Any, rendered: Any) -> None:
    """Types stay where a placeholder stands alone; data are not searched for placeholders."""
    assert render(template, DATA) == rendered


def test_secrets_stay_names() -> None:
    found = render({"a": "{{secret.key}}", "b": "Bearer {{secret.key}}"}, DATA)
    assert found == {"a": Secret("key"), "b": Text(("Bearer ", Secret("key")))}
    data = {"row": {"q": "{{secret.key}}"}}
    assert render("{{row.q}}", data) == "{{secret.key}}", "data cannot name secrets"
    assert mask(render("-{{row.q}}-", data)) == "-{{secret.key}}-"


def test_what_is_put_into_a_url_cannot_change_where_it_leads() -> None:
    assert render_url("https://h/{{values.model}}?t={{values.t}}", DATA) == "https://h/a%20b%2F%C3%BC?t=0.25"
    evil = {"values": {"x": "../@evil.example/?a=1#b\r\n"}}
    assert render_url("https://h/{{values.x}}", evil) == "https://h/..%2F%40evil.example%2F%3Fa%3D1%23b%0D%0A"
    assert render_url("https://h/?k={{secret.k}}", {}) == Text(("https://h/?k=", Secret("k")))


@pytest.mark.parametrize("template", ["{{values.other}}", "{{row.tags.2}}", "{{row.q.x}}", "{{row.tags.x}}"])
def test_a_part_that_is_not_there_fails_the_candidate(template: str) -> None:
    with pytest.raises(InfeasibleCandidate, match="nothing for the placeholder"):
        render(template, DATA)


def test_unknown_placeholders_are_refused() -> None:
    check_template(
        {"a": ["{{values.x}} {{row.Some column}}", "{{secret.A-b_1}}", "{{ values }}"]}, ["values", "row"], "o.body"
    )
    for bad in ("{{value.x}}", "{{}}", "{{values.}}", "{{secret}}", "{{secret.a.b}}", "{{values|x}}", "{{__class__}}"):
        with pytest.raises(InvalidInput, match="no placeholder") as caught:
            check_template({"a": [1, {"b": bad}]}, ["values"], "o.body")
        assert caught.value.field == "o.body.a.1.b"
        assert "values, secret" in str(caught.value.remedy)
    with pytest.raises(InvalidInput):
        check_template("{{secret.a}}", ["values"], "o.prompt", secrets=False)
    assert uses({"a": ["{{row.x}}"]}, "row")
    assert not uses({"a": ["{{rows}}"]}, "row")
    assert render("<{{values.anything.at.all}}>", {"values": Anything()}) == "<0.123456>"


@given(st.dictionaries(st.text(), st.text(), max_size=4))
def test_any_data_may_be_rendered(values: dict[str, str]) -> None:
    assert render({"a": "{{values}}"}, {"values": values}) == {"a": values}
    assert json.loads(render("{{values}} ", {"values": values})) == values


# --- pointers ---------------------------------------------------------------------------------------------------------

RFC = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4, "i\\j": 5, 'k"l': 6, " ": 7, "m~n": 8}
"""The example of RFC 6901, section 5."""


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("", RFC),
        ("/foo", ["bar", "baz"]),
        ("/foo/0", "bar"),
        ("/", 0),
        ("/a~1b", 1),
        ("/c%d", 2),
        ("/e^f", 3),
        ("/g|h", 4),
        ("/i\\j", 5),
        ('/k"l', 6),
        ("/ ", 7),
        ("/m~0n", 8),
    ],
)
def test_pointers_of_the_standard(pointer: str, value: Any) -> None:
    assert follow(RFC, pointer) == value


@pytest.mark.parametrize(
    "pointer", ["/foo/2", "/foo/-", "/foo/01", "/foo/-1", "/foo/x", "/bar", "/foo/0/x", f"/foo/{'9' * 5000}"]
)
def test_pointers_that_lead_nowhere(pointer: str) -> None:
    with pytest.raises(NothingThere, match="nothing at"):
        follow(RFC, pointer)


@pytest.mark.parametrize("pointer", ["foo", "~", "/~", "/~2", "/a~"])
def test_what_is_no_pointer(pointer: str) -> None:
    with pytest.raises(ValueError, match="JSON pointer"):
        parse_pointer(pointer)


def test_a_star_spreads_over_lists() -> None:
    data = {"r": [{"s": 1}, {"s": 2}], "*": 3, "n": [[{"s": 1}], [{"s": 2}, {"s": 3}]]}
    assert follow(data, "/r/*/s", spread=True) == [1, 2]
    assert follow(data, "/n/*/*/s", spread=True) == [[1], [2, 3]]
    assert follow(data, "/*", spread=True) == 3
    with pytest.raises(NothingThere):
        follow(data, "/r/*/s")
    with pytest.raises(NothingThere, match=r"/r/\*/x"):
        follow(data, "/r/*/x", spread=True)


@given(
    st.recursive(
        st.integers(), lambda inner: st.dictionaries(st.text(), inner, max_size=3) | st.lists(inner, max_size=3)
    )
)
def test_every_part_can_be_pointed_at(document: Any) -> None:
    def walk(value: Any, path: str) -> None:
        assert follow(document, path) == value
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            walk(inner, f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}")

    walk(document, "")


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_as_json() -> None:
    rows = as_rows(
        [{"q": "a", "d": datetime.date(2026, 1, 2), "b": b"\x00\xff", "l": [1.5, None, {"k": True}]}], {"prompt": "q"}
    )
    found = sendable(rows)
    assert found == [{"prompt": "a", "q": "a", "d": "2026-01-02", "b": "AP8=", "l": [1.5, None, {"k": True}]}]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": "\ud800"}, "\udfff"])
def test_rows_that_cannot_be_sent(value: Any) -> None:
    with pytest.raises(InvalidData, match="line 2: 'q' cannot be sent"):
        sendable(as_rows([{"q": 1}, {"q": value}]))
