"""Reading JSON and YAML that somebody else wrote: job files and request bodies."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import yaml

from optimizer.errors import InvalidInput

Format = Literal["json", "yaml"]

MAX_DEPTH = 64
MAX_NODES = 500_000
"""Values in a document, each alias counted as all that it stands for."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain data only; a date stays the text it is, as in JSON."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_document(text: bytes | str, form: Format, field: str = "body") -> Any:
    """Return the plain data of a JSON or YAML document, everything in it fit for JSON and for a database.

    Args:
        text: the document; bytes are UTF-8.
        form: how it is written.
        field: what errors call it.

    Raises:
        InvalidInput: not well-formed, nested deeper than `MAX_DEPTH`, larger than `MAX_NODES` once aliases are written
            out, or with values that JSON does not have (NaN, infinities, bytes, NUL characters, …).
    """
    try:
        data = _parse_yaml(text) if form == "yaml" else json.loads(text)
        _check_values(data, MAX_DEPTH)
    except RecursionError:
        raise InvalidInput("nested too deeply", field=field, remedy=f"at most {MAX_DEPTH} levels") from None
    except yaml.YAMLError as error:
        raise InvalidInput(f"not valid YAML: {_one_line(error)}", field=field) from error
    except ValueError as error:
        raise InvalidInput(f"not a valid {form.upper()} document: {error}", field=field) from error
    return data


def _parse_yaml(text: bytes | str) -> Any:
    _check_depth(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Counted before anything is built: building expands merge keys, so aliases of aliases grow exponentially.
        if _expanded_size(node, {}, MAX_DEPTH) > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values once aliases are written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_depth(text: bytes | str) -> None:
    """Refuse deep nesting by the parser's events, which need no stack: composing the nodes would overflow the C stack."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise RecursionError
    except yaml.scanner.ScannerError as error:
        # Some builds of libyaml read far ahead of the events that they give, and stop at a limit of their own.
        if "maximum nesting depth" in str(error):
            raise RecursionError from error
        raise


def _expanded_size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many nodes ``node`` stands for, each alias counted in full; cycles run out of depth."""
    if id(node) in known:
        return known[id(node)]
    if depth < 0:
        raise RecursionError
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_expanded_size(child, known, depth - 1) for child in children)
    return known[id(node)]


def _check_values(data: Any, depth: int) -> None:
    if depth < 0:
        raise RecursionError
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r} is no text: put it in quotes")
            _check_text(key)
            _check_values(value, depth - 1)
    elif isinstance(data, list):
        for value in data:
            _check_values(value, depth - 1)
    else:
        _check_scalar(data)


def _check_scalar(value: object) -> None:
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no number that JSON has")
    elif value is not None and not isinstance(value, int):
        raise ValueError(f"a value of type {type(value).__name__}")


def _check_text(text: str) -> None:
    # Half a surrogate pair has no UTF-8, and PostgreSQL's text has no NUL.
    if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("a text with a NUL character or half a surrogate pair")


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())
