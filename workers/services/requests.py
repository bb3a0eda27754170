"""What is asked of a service: plain data in which secrets stand by their names until the moment of sending."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, quote_plus

Lookup = Callable[[str], str]


@dataclass(frozen=True)
class Secret:
    """A secret by its name."""

    name: str


@dataclass(frozen=True)
class Text:
    """A text with secrets in it; never one text, so that nothing can print it by mistake."""

    parts: tuple[str | Secret, ...]


@dataclass(frozen=True)
class Request:
    """A request; secrets stand in it by their names only.

    Attributes:
        method: ``GET`` or ``POST``.
        url: absolute.
        headers: beside those that every request has.
        body: plain data, sent as JSON; None for no body. `Secret` and `Text` may stand wherever a text may.
        key: what the answer depends on beside method, URL and body, for the cache: a header that chooses something.
    """

    method: str
    url: str | Text
    headers: Mapping[str, str | Text | Secret] = field(default_factory=dict)
    body: Any = None
    key: str = ""

    def identity(self) -> dict[str, Any]:
        """Return what the answer depends on, as plain data without secrets."""
        return {
            "method": self.method,
            "url": mask(self.url),
            "body": mask(self.body),
            "key": self.key,
        }


def reveal(value: Any, lookup: Lookup) -> Any:
    """Return plain data with each secret replaced by what ``lookup`` says of its name."""
    match value:
        case Secret(name):
            return lookup(name)
        case Text(parts):
            return "".join(reveal(part, lookup) for part in parts)
        case Mapping():
            return {key: reveal(inner, lookup) for key, inner in value.items()}
        case list() | tuple():
            return [reveal(inner, lookup) for inner in value]
    return value


def mask(value: Any) -> Any:
    """Return plain data with each secret's name in its place."""
    return reveal(value, lambda name: f"{{{{secret.{name}}}}}")


class Redaction:
    """Removes secrets from texts, in every form in which a service may repeat them.

    Args:
        secrets: what must not be seen.
        shortest: characters of the shortest one that is removed.
    """

    def __init__(self, secrets: Iterable[str], shortest: int = 1) -> None:
        forms = {form for secret in secrets if len(secret) >= shortest for form in _forms(secret)}
        self._forms = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return the text without secrets."""
        for form in self._forms:
            text = text.replace(form, "***")
        return text


def _forms(secret: str) -> set[str]:
    data = secret.encode()
    forms = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), json.dumps(secret)[1:-1]}
    forms |= {base64.b64encode(data).decode().rstrip("="), base64.urlsafe_b64encode(data).decode().rstrip("=")}
    return {form for form in forms if form}
