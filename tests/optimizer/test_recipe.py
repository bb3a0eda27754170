"""Canonical JSON, fingerprints and the shape of recipes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.recipe import Leaf, Merge, Recipe, Selector, canonical_json, leaves
from tests.factories import make_small_layout

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def data() -> dict[str, Any]:
    """A chained merge in plain data: the outer one starts from the inner one."""
    inner = {
        "operator": "ties",
        "options": {"density": 0.2, "normalise": True},
        "base": {"model": "base"},
        "inputs": [{"model": "one"}, {"model": "two"}],
        "groups": [{"positions": ["input", 0], "modules": ["attention"]}, {}],
        "coefficients": [[0.0, 0.5], [1.0, -0.25]],
    }
    outer = {
        "operator": "linear",
        "base": inner,
        "inputs": [{"model": "one"}],
        "groups": [{}],
        "coefficients": [[0.5]],
    }
    models = {"base": A, "one": B, "two": C}
    return {
        "models": {name: {"ref": {"path": f"models/{name}"}, "digest": digest} for name, digest in models.items()},
        "root": outer,
    }


def fingerprint(changed: dict[str, Any]) -> str:
    return Recipe.parse(changed).fingerprint


REFERENCE = fingerprint(data())


@given(plain)
def test_canonical_json_reads_back_as_the_same(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(), plain))
def test_canonical_json_does_not_know_the_order_of_keys(value: dict[str, Any]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


def test_canonical_json_form() -> None:
    assert (
        canonical_json({"b": [1, -0.0, 0.1], "a": (None, True, "é")}) == '{"a":[null,true,"\\u00e9"],"b":[1,0.0,0.1]}'
    )
    assert canonical_json({"n": {"m": [-0.0]}}) == canonical_json({"n": {"m": [0.0]}})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json([value])


def test_a_recipe_survives_the_round_trip() -> None:
    recipe = Recipe.parse(data())
    again = Recipe.parse(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint == REFERENCE
    assert leaves(recipe.root) == {"base", "one", "two"}


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_coefficients_survive_to_the_last_bit(row: list[float]) -> None:
    changed = data()
    changed["root"]["base"]["coefficients"][0] = row
    recipe = Recipe.parse(changed)
    again = Recipe.parse(json.loads(json.dumps(recipe.to_json())))
    assert isinstance(again.root, Merge)
    assert isinstance(again.root.base, Merge)
    assert again.root.base.coefficients[0] == row
    assert again.fingerprint == recipe.fingerprint


def test_fingerprint_ignores_where_models_are_and_what_they_are_called() -> None:
    moved = data()
    for name in moved["models"]:
        moved["models"][name]["ref"] = {"hub": f"org/{name}", "revision": "main"}
    assert fingerprint(moved) == REFERENCE
    renamed = json.loads(json.dumps(data()).replace('"one"', '"first"'))
    assert fingerprint(renamed) == REFERENCE
    more = data()
    more["models"]["unused"] = {"ref": {"path": "elsewhere"}, "digest": "d" * 64}
    assert fingerprint(more) == REFERENCE


def test_fingerprint_ignores_order_of_keys_sign_of_zero_and_spelt_out_defaults() -> None:
    reordered = data()
    reordered["root"] = dict(reversed(reordered["root"].items()))
    reordered["root"]["base"]["options"] = {"normalise": True, "density": 0.2}
    assert fingerprint(reordered) == REFERENCE
    negative = data()
    negative["root"]["base"]["coefficients"][0][0] = -0.0
    assert fingerprint(negative) == REFERENCE
    spelt = data()
    spelt["root"]["options"] = {}
    spelt["root"]["groups"] = [{"positions": None, "modules": None}]
    assert fingerprint(spelt) == REFERENCE
    whole = data()
    whole["root"]["base"]["coefficients"][1][0] = 1
    assert fingerprint(whole) == REFERENCE


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("models", "one", "digest"), "e" * 64),
        (("root", "operator"), "slerp"),
        (("root", "base", "options", "density"), 0.3),
        (("root", "base", "options", "normalise"), False),
        (("root", "base", "coefficients", 1, 1), math.nextafter(-0.25, 0)),
        (("root", "base", "groups", 0, "modules"), ["mlp"]),
        (("root", "base", "groups", 0, "positions"), ["input", 1]),
        (("root", "base", "inputs"), [{"model": "two"}, {"model": "one"}]),
        (("root", "base", "base"), {"model": "one"}),
        (("root", "inputs", 0, "model"), "two"),
    ],
)
def test_fingerprint_tells_different_weights_apart(path: tuple[Any, ...], value: Any) -> None:
    changed = data()
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert fingerprint(changed) != REFERENCE


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("root", "base", "coefficients"), [[1.0, 2.0]], "recipe.root"),
        (("root", "base", "coefficients"), [[1.0, 2.0], [1.0]], "recipe.root"),
        (("root", "inputs", 0, "model"), "stranger", "recipe"),
        (("root", "inputs"), [], "recipe.root"),
        (("root", "base", "coefficients", 0, 0), math.nan, "recipe.root"),
        (("root", "surprise"), 1, "recipe.root"),
        (("models", "one", "digest"), "short", "recipe.models.one.digest"),
        (("format",), 2, "recipe.format"),
    ],
)
def test_malformed_recipes_are_refused(path: tuple[Any, ...], value: Any, field: str) -> None:
    changed = data()
    at = changed
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(InvalidInput) as caught:
        Recipe.parse(changed)
    assert caught.value.field is not None
    assert caught.value.field.startswith(field)


def test_the_first_group_that_selects_a_parameter_decides() -> None:
    layout = make_small_layout(2)
    node = Merge(
        operator="linear",
        base=Leaf(model="base"),
        inputs=[Leaf(model="one")],
        groups=[Selector(positions=[0]), Selector(modules=["attention"])],
        coefficients=[[1.0], [2.0]],
    )
    rows = {tensor.name: node.row(tensor) for tensor in layout.shared}
    assert rows == {
        "layers.0.attention.query.weight": 0,
        "layers.0.mlp.up_proj.weight": 0,
        "layers.1.attention.query.weight": 1,
        "layers.1.mlp.up_proj.weight": None,
    }
    assert [tensor.name for tensor in layout.shared if node.row(tensor) is None] == ["layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("selector", "label"),
    [
        (Selector(), "all"),
        (Selector(positions=[3]), "layer 3"),
        (Selector(positions=[3, 4, 5], modules=["mlp", "norm"]), "layers 3-5 · mlp + norm"),
        (Selector(positions=["input"]), "input"),
        (Selector(modules=["head"]), "head"),
    ],
)
def test_labels(selector: Selector, label: str) -> None:
    assert selector.label == label
