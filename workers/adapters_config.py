"""What a PEFT adapter's ``adapter_config.json`` says of how its factors are to be read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer.errors import InvalidCheckpoint
from workers.checkpoints import ADAPTER_CONFIG, read_json

MERGE_IT = "merge it into its base with peft (merge_and_unload), save the result, and name that"

_REFUSED = {
    "use_dora": "is a DoRA adapter, which also rescales the base's columns",
    "use_qalora": "is a QA-LoRA adapter, whose factors belong to groups of columns",
    "use_bdlora": "is a block-diagonal LoRA adapter",
    "arrow_config": "routes between several adapters",
    "kasa_config": "is a KaSA adapter, whose factors have a diagonal between them",
    "monteclora_config": "is a MonteCLoRA adapter, whose factors are random",
    "alora_invocation_tokens": "is an activated LoRA, which works from certain tokens on only",
    "layer_replication": "repeats layers of its base",
    "target_parameters": "changes parameters that are no module's weight",
    "trainable_token_indices": "trains single rows of the embeddings",
}
"""Settings under which the weights are not base + scale · B @ A."""

_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Initialisations that take something out of the base's weights, which the adapter's factors then contain."""


@dataclass(frozen=True)
class LoraConfig:
    """The part of the configuration that matters for reading.

    Attributes:
        rank, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: by regular expression that the end of a module's name must match.
        rslora: whether the scale is alpha / √rank instead of alpha / rank.
        tied: whether the output layer's factors are those of the embeddings.
        task: PEFT's task type, e.g. ``"SEQ_CLS"``.
        base_class: name of the class that was wrapped, where there is no task type.
        targets: ``target_modules``, for people.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    tied: bool
    task: str | None
    base_class: str | None
    targets: str

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return int(_matching(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return the factor of B @ A in a module."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def read_config(path: Path, field: str | None = None) -> LoraConfig:
    """Read the configuration of the adapter in the directory ``path``.

    Raises:
        InvalidCheckpoint: it is malformed, or of a kind that is not base + scale · B @ A.
    """
    data = read_json(path / ADAPTER_CONFIG, field)
    _refuse_other_kinds(path, data, field)
    mapping = data.get("auto_mapping")
    task, base_class = data.get("task_type"), mapping.get("base_model_class") if isinstance(mapping, dict) else None
    targets = data.get("target_modules")
    return LoraConfig(
        rank=int(_number(data, "r", 8, field, whole=True)),
        alpha=_number(data, "lora_alpha", 8, field),
        rank_pattern={key: int(value) for key, value in _pattern(data, "rank_pattern", field, whole=True).items()},
        alpha_pattern=_pattern(data, "alpha_pattern", field),
        rslora=bool(data.get("use_rslora")),
        tied=bool(data.get("ensure_weight_tying")),
        task=task if isinstance(task, str) else None,
        base_class=base_class if isinstance(base_class, str) else None,
        targets=", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets),
    )


def _refuse_other_kinds(path: Path, data: Mapping[str, Any], field: str | None) -> None:
    kind = data.get("peft_type")
    if kind != "LORA":
        raise InvalidCheckpoint(
            f"{path.name} is a PEFT adapter of type {kind!r}; only LORA can be merged", field=field, remedy=MERGE_IT
        )
    for setting, reason in _REFUSED.items():
        if data.get(setting):
            raise InvalidCheckpoint(f"{path.name} {reason} ({setting})", field=field, remedy=MERGE_IT)
    start = data.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InvalidCheckpoint(
            f"{path.name} was initialised with {start}, which changes the base's weights",
            field=field,
            remedy="save it with path_initial_model_for_weight_conversion, which makes it relative to the plain base",
        )


def _number(data: Mapping[str, Any], key: str, default: float, field: str | None, *, whole: bool = False) -> float:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value):
        raise _malformed(f"{key} is {value!r}", field)
    if whole and value < 1:
        raise _malformed(f"{key} is {value!r}", field)
    return float(value)


def _pattern(data: Mapping[str, Any], key: str, field: str | None, *, whole: bool = False) -> dict[str, float]:
    found = data.get(key) or {}
    if not isinstance(found, dict):
        raise _malformed(f"{key} is {found!r}", field)
    for pattern in found:
        _check_pattern(pattern, key, field)
    return {pattern: _number(found, pattern, 0, field, whole=whole) for pattern in found}


def _check_pattern(pattern: str, key: str, field: str | None) -> None:
    """Refuse what is no regular expression, or one that could take forever to match."""
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise _malformed(f"{key} has the pattern {pattern[:100]!r}: {error}", field) from error
    if len(pattern) > 500 or len(re.findall(r"[*+{]", pattern)) > 2 or re.search(r"\)[*+{]", pattern):
        raise _malformed(f"the pattern {pattern[:100]!r} of {key} is too complicated", field)


def _matching(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first expression that the end of the name matches, at a dot."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _malformed(what: str, field: str | None) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"{ADAPTER_CONFIG} is malformed: {what}",
        field=field,
        remedy="save the adapter again with peft's save_pretrained",
    )
