"""Templates of requests: JSON or text with placeholders for what a candidate is and what it is measured on.

A placeholder is ``{{name}}``, or ``{{name.part}}`` for a part of it. A text that is one placeholder and nothing else
becomes the value with its type (a number stays a number); within a longer text it is written into it. ``{{secret.NAME}}``
stands for a secret, which is put in only as the request is sent. Data are never searched for placeholders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from optimizer.errors import InfeasibleCandidate, InvalidInput
from workers.services.requests import Secret, Text

_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]*?)\s*\}\}")
_PATH = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w -]+)*")
_SECRET = re.compile(r"secret\.([\w-]{1,64})")


class Anything(Mapping[str, Any]):
    """Stands for a candidate that is not known yet: it has every part, each of them written as a text of usual length."""

    def __getitem__(self, name: str) -> Any:
        return self

    def __str__(self) -> str:
        return "0.123456"

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def check_template(template: Any, names: Sequence[str], field: str, *, secrets: bool = True) -> None:
    """Raise `InvalidInput` unless every placeholder is one of ``names`` (or a part of it) or a secret.

    Args:
        template: plain data, or a text.
        names: what placeholders may begin with.
        field: dotted path of the template, for errors.
        secrets: whether secrets may stand in it.
    """
    for where, path in _placeholders(template, field):
        if secrets and _SECRET.fullmatch(path):
            continue
        if not (_PATH.fullmatch(path) and path.split(".")[0] in names):
            known = [*names, "secret"] if secrets else names
            raise InvalidInput(
                f"there is no placeholder {{{{{path}}}}}",
                field=where,
                remedy=f"placeholders begin with: {', '.join(known)}",
            )


def uses(template: Any, name: str) -> bool:
    """Return whether a template has a placeholder that begins with a name."""
    return any(path.split(".")[0] == name for _, path in _placeholders(template, ""))


def _placeholders(template: Any, field: str) -> Iterator[tuple[str, str]]:
    """Every placeholder, with the dotted path of where it stands."""
    if isinstance(template, str):
        yield from ((field, path) for path in _PLACEHOLDER.findall(template))
    elif isinstance(template, Mapping):
        for key, value in template.items():
            yield from _placeholders(key, f"{field}.{key}")
            yield from _placeholders(value, f"{field}.{key}")
    elif isinstance(template, list):
        for number, value in enumerate(template):
            yield from _placeholders(value, f"{field}.{number}")


def render(template: Any, data: Mapping[str, Any]) -> Any:
    """Return a template as plain data, with `Secret` and `Text` where secrets stand.

    Raises:
        InfeasibleCandidate: the data have no such part.
    """
    if isinstance(template, str):
        return _render_text(template, data)
    if isinstance(template, Mapping):
        return {_written(_render_text(key, data)): render(value, data) for key, value in template.items()}
    if isinstance(template, list):
        return [render(value, data) for value in template]
    return template


def render_text(template: str, data: Mapping[str, Any]) -> str | Text:
    """Return a template as text, also where it is one placeholder for something else."""
    return _joined(
        [part if literal or isinstance(part, Secret) else _written(part) for part, literal in _pieces(template, data)]
    )


def render_url(template: str, data: Mapping[str, Any]) -> str | Text:
    """Return a URL: what placeholders stand for is percent-encoded, so that it cannot change where the URL leads."""
    return _joined([part if literal else _quoted(part) for part, literal in _pieces(template, data)])


def _render_text(template: str, data: Mapping[str, Any]) -> Any:
    pieces = _pieces(template, data)
    if len(pieces) == 1 and not pieces[0][1]:
        return pieces[0][0]
    return render_text(template, data)


def _pieces(template: str, data: Mapping[str, Any]) -> list[tuple[Any, bool]]:
    """The template's parts in turn, each with whether it is literal text."""
    out: list[tuple[Any, bool]] = []
    end = 0
    for match in _PLACEHOLDER.finditer(template):
        if template[end : match.start()]:
            out.append((template[end : match.start()], True))
        out.append((_value(match[1], data), False))
        end = match.end()
    if template[end:] or not out:
        out.append((template[end:], True))
    return out


def _value(path: str, data: Mapping[str, Any]) -> Any:
    if (secret := _SECRET.fullmatch(path)) is not None:
        return Secret(secret[1])
    value: Any = data
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise InfeasibleCandidate(f"there is nothing for the placeholder {{{{{path}}}}}")
    return value


def _quoted(value: Any) -> str | Secret:
    return value if isinstance(value, Secret) else quote(_written(value), safe="")


def _written(value: Any) -> str:
    if isinstance(value, str | Anything):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _joined(parts: Sequence[str | Secret]) -> str | Text:
    if any(isinstance(part, Secret) for part in parts):
        return Text(tuple(parts))
    return "".join(str(part) for part in parts)
