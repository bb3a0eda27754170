"""Prompts: from rows and a template, with or without the model's chat template, to tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import regex
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from optimizer.errors import InvalidInput
from workers.data import Rows, is_text

_PLACE = regex.compile(r"\{(\w+)\}")

Messages = list[dict[str, str]]


def texts(rows: Rows, template: str) -> list[str]:
    """Return the template of each row with its columns filled in: ``{prompt}`` stands for the role or column of that name.

    Raises:
        InvalidData: a row has no text in one of them.
    """
    columns = {name: rows.texts(name) for name in dict.fromkeys(_PLACE.findall(template))}
    return [
        _PLACE.sub(lambda place, row=row: columns[place[1]][row], template)  # type: ignore[misc]
        for row in range(len(rows))
    ]


def conversations(rows: Rows, template: str, system: str | None) -> list[Messages]:
    """Return each row as messages: those of the column ``messages`` where there is one, else the filled-in template."""
    before = [] if system is None else [{"role": "system", "content": system}]
    if rows.has("messages"):
        return [before + _messages(value, row, rows) for row, value in enumerate(rows.values("messages"))]
    return [[*before, {"role": "user", "content": text}] for text in texts(rows, template)]


def _messages(value: Any, row: int, rows: Rows) -> Messages:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise rows.error(
            "messages", row, "a list of messages is needed", remedy='such as [{"role": "user", "content": "Hello"}]'
        )
    return [{"role": one["role"], "content": one["content"]} for one in value]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and is_text(value.get("role")) and is_text(value.get("content"))


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Messages], variables: Mapping[str, Any], field: str
) -> list[list[int]]:
    """Return conversations as the model's chat template writes them, up to where its answer begins.

    Raises:
        InvalidInput: there is no such template, or it refuses a conversation; names the option ``chat``.
    """
    out = []
    for number, chat in enumerate(chats, 1):
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **variables)
        except Exception as error:  # templates raise what they like
            first = str(error).strip().split("\n", 1)[0]
            raise InvalidInput(
                f"the model's chat template cannot write conversation {number}: {first}",
                field=f"{field}.options.chat",
                remedy="save a chat template with the tokenizer, leave the system prompt out, or set `chat: false`",
            ) from error
        out.append(plain_tokens(tokenizer, [str(text)], special=False)[0])
    return out


def plain_tokens(tokenizer: PreTrainedTokenizerBase, lines: list[str], *, special: bool) -> list[list[int]]:
    """Return texts as tokens, with the special ones that the tokenizer adds where ``special`` asks for them."""
    encoded = tokenizer(
        lines, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    found: list[list[int]] = encoded["input_ids"]
    return found


def end_tokens(model_dir: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return every token that ends an answer: of the generation config, the tokenizer and the model's config."""
    known: list[Any] = [tokenizer.eos_token_id, getattr(config.get_text_config(), "eos_token_id", None)]
    if (model_dir / "generation_config.json").is_file():
        known.append(GenerationConfig.from_pretrained(str(model_dir), local_files_only=True).eos_token_id)
    flat = [one for ids in known for one in (ids if isinstance(ids, list | tuple) else [ids])]
    return tuple(sorted({int(one) for one in flat if one is not None}))
