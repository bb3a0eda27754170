"""Chat completions as OpenAI's API has them, and as many others speak it: one request a prompt, and its answer read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimizer.recipe import canonical_json
from workers.services.client import BadAnswer, Question, Reading
from workers.services.requests import Request, Secret, Text

MESSAGE_TOKENS = 8
"""What a message takes besides its text, about."""

_USUAL_ANSWER = 256.0  # tokens, where no bound is known
_BYTES_A_TOKEN = 3.0  # few languages and tokenizers need more tokens than that


@dataclass(frozen=True)
class Completion:
    """A model's answer.

    Attributes:
        text: what it wrote; empty where it wrote nothing or called a tool.
        tokens: how many tokens it wrote, by its own account, or NaN.
        truncated: whether it was cut off for its length.
        first: its most likely first tokens with their log-probabilities (nats), where asked for; else empty.
    """

    text: str
    tokens: float
    truncated: bool
    first: Sequence[tuple[str, float]] = ()


def completion_question(
    url: str, token: str | None, body: Mapping[str, Any], headers: Mapping[str, str | Text | Secret] | None = None
) -> Question[Completion]:
    """Return the question for one completion.

    Args:
        url: of the API, without ``/chat/completions``: ``https://api.example.org/v1``.
        token: name of the secret that is sent as bearer token, or None.
        body: of the request.
        headers: sent besides.
    """
    auth: dict[str, str | Text | Secret] = {}
    if token is not None:
        auth["Authorization"] = Text(("Bearer ", Secret(token)))
    request = Request("POST", f"{url.rstrip('/')}/chat/completions", {**auth, **(headers or {})}, dict(body))
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    return Question(
        request,
        read_completion,
        tokens_in=prompt_tokens(body.get("messages", ())),
        tokens_out=float(most) if isinstance(most, int | float) else _USUAL_ANSWER,
    )


def prompt_tokens(messages: Sequence[Mapping[str, Any]]) -> float:
    """Return about how many tokens messages have, rather too many than too few."""
    texts = [message.get("content") or "" for message in messages]
    written = [text if isinstance(text, str) else canonical_json(text) for text in texts]
    return float(sum(MESSAGE_TOKENS + math.ceil(len(text.encode()) / _BYTES_A_TOKEN) for text in written))


def read_completion(document: Any) -> Reading[Completion]:
    """Read the first choice of an answer; raises `BadAnswer` where there is none."""
    try:
        choice = document["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        usage = document.get("usage") or {}
        reason = choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        raise BadAnswer("it is no chat completion") from None
    if not isinstance(text, str):
        raise BadAnswer("the message's content is no text")
    tokens_in, tokens_out = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
    told = 0.0 if math.isnan(tokens_in) else tokens_in, 0.0 if math.isnan(tokens_out) else tokens_out
    return Reading(Completion(text, tokens_out, reason == "length", _first(choice)), *told)


def _count(usage: Any, name: str) -> float:
    found = usage.get(name) if isinstance(usage, Mapping) else None
    known = isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found < 1e12
    return float(found) if known and found is not None else math.nan


def _first(choice: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The most likely first tokens; none where the service tells none."""
    try:
        found = choice["logprobs"]["content"][0]["top_logprobs"]
        pairs = [(entry["token"], float(entry["logprob"])) for entry in found]
    except (LookupError, TypeError, ValueError):
        return ()
    if not all(isinstance(token, str) and not math.isnan(logprob) for token, logprob in pairs):
        raise BadAnswer("its log-probabilities are no numbers")
    return tuple(pairs)
