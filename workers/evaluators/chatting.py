"""What measures have in common that ask chat APIs: options, prompts by templates, one request an item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, JsonValue

from optimizer.errors import InfeasibleCandidate
from optimizer.recipe import Recipe
from optimizer.spec import Name
from workers.evaluators.asking import AskingEvaluator
from workers.services.templates import Anything, check_template, render, render_text

NAMES = ("values", "recipe", "fingerprint", "row")
"""What placeholders of prompts may begin with."""

UNKNOWN: Mapping[str, Any] = dict.fromkeys(NAMES[:3], Anything())
"""A candidate that is not known yet, for estimates."""


class ChatOptions(AskingEvaluator.Options):
    """Options of whatever asks a chat API."""

    url: str = Field(
        max_length=4000,
        description="Where the API is, as far as `/chat/completions` is appended.",
        examples=["https://api.example.org/v1"],
    )
    token: Name | None = Field(default=None, description="Name of the secret that is sent as bearer token.")
    system: str | None = Field(
        default=None,
        max_length=100_000,
        description="System prompt, with placeholders.",
        examples=["Answer in {{values.words}} words."],
    )
    prompt: str = Field(
        default="{{row.prompt}}",
        min_length=1,
        max_length=100_000,
        description="What the user says, with placeholders.",
        examples=["Question: {{row.question}}\nAnswer:"],
    )
    sampling: dict[str, JsonValue] = Field(
        default={"temperature": 0, "max_tokens": 256},
        max_length=64,
        description="Further fields of the request, with placeholders: temperature, top_p, max_tokens, seed, …",
        examples=[{"temperature": "{{values.temperature}}", "max_tokens": 64, "seed": 0}],
    )


def candidate_data(recipe: Recipe) -> dict[str, Any]:
    """Return what placeholders stand for of a candidate."""
    return {"values": recipe.values, "recipe": recipe.to_json(), "fingerprint": recipe.fingerprint}


def body_of(
    model: str, system: str | None, prompt: str, sampling: Mapping[str, Any], data: Mapping[str, Any], field: str
) -> dict[str, Any]:
    """Return a request for a completion, its templates filled in.

    Raises:
        InfeasibleCandidate: the candidate or the row has no such part; names ``field``.
    """
    try:
        said = [] if system is None else [{"role": "system", "content": text_of(system, data)}]
        messages = [*said, {"role": "user", "content": text_of(prompt, data)}]
        return {"model": text_of(model, data), "messages": messages, **render(sampling, data)}
    except InfeasibleCandidate as error:
        raise InfeasibleCandidate(error.message, field=field) from None


def text_of(template: str, data: Mapping[str, Any]) -> str:
    """Return a template as text, also where it is one placeholder for something else."""
    return str(render_text(template, data))


def check_chat(options: ChatOptions, field: str) -> None:
    """Raise `InvalidInput` where a template of chat options has a placeholder that does not exist."""
    for name in ("system", "prompt", "sampling"):
        check_template(getattr(options, name), NAMES, f"{field}.{name}", secrets=False)
