"""Whether checkpoints can be merged: the layout they share, and a report that names the tensors where they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING

from optimizer.errors import InvalidCheckpoint
from optimizer.geometry import Layout, make_layout
from optimizer.problem import Finding
from workers.alignment import notes_of, row_count, rows_by_token, vocabulary_of
from workers.checkpoints import Checkpoint, TensorMeta
from workers.naming import canonical_names
from workers.safetensors_header import DTYPES, FLOAT8, MERGEABLE
from workers.tokenizers import LEGACY_FILES, Tokenizer, chat_template, conflicts, read_tokenizer, relation

SHOWN = 20
"""Names of tensors that a finding lists."""

FUNCTION_FIELDS = (
    "*_act", "*activation*", "*_eps", "*epsilon*", "rope*", "*_heads", "num_attention_heads", "n_head", "head_dim",
    "*window*", "position_embedding_type", "*scal*", "patch_size", "image_size", "*norm_type*", "is_decoder",
)  # fmt: skip
"""Fields of a config that change what a model computes without changing any tensor's shape."""


@dataclass(frozen=True)
class _Named:
    """A checkpoint with its tensors by canonical name, split by role."""

    checkpoint: Checkpoint
    floats: Mapping[str, TensorMeta]
    heads: Mapping[str, TensorMeta]
    others: Mapping[str, TensorMeta]

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return read_tokenizer(self.checkpoint.path)


def inspect(base: Checkpoint, experts: Sequence[Checkpoint], heads: Sequence[str]) -> tuple[Layout, list[Finding]]:
    """Compare the experts with the base; what no finding mentions is equal.

    Args:
        base: the common ancestor.
        experts: the models to merge; all from `workers.alignment.align`, where that can make them fit.
        heads: patterns (``*`` matches anything) of parameters that stay each model's own; they are matched against
            the tensor's name in its checkpoint and its canonical name.

    Returns:
        The layout of the merged model (tensors of whole numbers, such as position ids, are not part of it: they are
        the base's), and the findings. With any error among the findings the layout must not be used.

    Raises:
        InvalidCheckpoint: transformers does not know an architecture.
    """
    names = [(checkpoint, canonical_names(checkpoint)) for checkpoint in (base, *experts)]
    own = frozenset(
        name
        for _, raw_names in names
        for name, raw in raw_names.items()
        if any(fnmatchcase(text, pattern) for text in (raw, name) for pattern in heads)
    )
    named = [_split(checkpoint, raw_names, own) for checkpoint, raw_names in names]
    findings = _base_findings(named[0])
    for expert in named[1:]:
        findings += _expert_findings(named[0], expert)
    return _layout(named), findings


def raise_on_errors(findings: Iterable[Finding]) -> None:
    """Raise `InvalidCheckpoint` with the first errors of the report, if it has any."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    lines = []
    for finding in errors[:3]:
        tensors = f": {', '.join(finding.tensors[:3])}" if finding.tensors else ""
        more = len(finding.tensors) - 3
        lines.append(f"{finding.model}: {finding.message}{tensors}{f' and {more} more' if more > 0 else ''}")
    rest = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    raise InvalidCheckpoint(
        "the checkpoints do not fit together. " + "; ".join(lines) + rest,
        field="base" if errors[0].model == "base" else "experts",
        remedy="merge fine-tuned versions of one base model",
    )


def head_tensors(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    """Return the tensors of a checkpoint that are not merged (heads, buffers): its own names by canonical name."""
    shared = {tensor.name for tensor in layout.shared}
    return {name: raw for name, raw in canonical_names(checkpoint).items() if name not in shared}


def _split(checkpoint: Checkpoint, raw_names: Mapping[str, str], own: frozenset[str]) -> _Named:
    parts: dict[str, dict[str, TensorMeta]] = {"floats": {}, "heads": {}, "others": {}}
    for name, raw in raw_names.items():
        meta = checkpoint.tensors[raw]
        part = "heads" if name in own else "floats" if DTYPES[meta.dtype].is_floating_point else "others"
        parts[part][name] = meta
    return _Named(checkpoint, **parts)


def _layout(named: Sequence[_Named]) -> Layout:
    heads: dict[str, TensorMeta] = {}
    for model in named:
        heads = dict(model.heads) | heads  # the first model that has one gives its shape
    tensors = [(name, meta.shape, meta.dtype) for name, meta in (heads | dict(named[0].floats)).items()]
    return make_layout(tensors, frozenset(heads))


def _base_findings(base: _Named) -> list[Finding]:
    findings = [*_quantised(base), *notes_of(base.checkpoint)]
    if not base.floats:
        findings.append(
            _finding("error", base, "every tensor matches a head pattern: nothing is left to merge (merge.heads)")
        )
    return findings


def _quantised(model: _Named) -> list[Finding]:
    strange = [name for name, meta in model.floats.items() if meta.dtype not in MERGEABLE] or _scales(model)
    if strange or model.checkpoint.config.get("quantization_config"):
        return [_finding("error", model, "its weights are quantised, which cannot be merged", strange)]
    return []


def _scales(model: _Named) -> list[str]:
    """Tensors beside numbers of 8 bits that these are to be multiplied with: what is stored is no weight then."""
    low = {name.rpartition(".")[0] for name, meta in model.floats.items() if DTYPES[meta.dtype] in FLOAT8}
    parts = {name: name.rpartition(".") for name in model.floats} if low else {}
    return [name for name, (module, _, own) in parts.items() if module in low and "scale" in own]


def _expert_findings(base: _Named, expert: _Named) -> list[Finding]:
    ours, theirs = base.checkpoint.config.get("model_type"), expert.checkpoint.config.get("model_type")
    if ours != theirs:
        return [_finding("error", expert, f"its architecture is {theirs!r}, the base's is {ours!r}")]
    return [
        *_quantised(expert),
        *_name_findings(base, expert),
        *_tensor_findings(base, expert),
        *notes_of(expert.checkpoint),
        *_integer_findings(base, expert),
        *_config_findings(base.checkpoint, expert.checkpoint),
        *_tokenizer_findings(base, expert),
        *_template_findings(base.checkpoint, expert.checkpoint),
    ]


def _name_findings(base: _Named, expert: _Named) -> list[Finding]:
    known = base.floats.keys() | base.others.keys()
    missing = [name for name in base.floats if name not in expert.floats]
    unknown = [name for name in expert.floats if name not in known]
    findings = []
    if missing:
        text = "lacks tensors that the base has (where they belong to a head, list them under merge.heads)"
        findings.append(_finding("error", expert, text, missing))
    if unknown:
        text = "has tensors that the base lacks (where they belong to a head, list them under merge.heads)"
        findings.append(_finding("error", expert, text, unknown))
    return findings


def _tensor_findings(base: _Named, expert: _Named) -> list[Finding]:
    both = [name for name in base.floats if name in expert.floats]
    findings = []
    vocabulary = rows_by_token(base.checkpoint) if _vocabulary_refused(base, expert) else {}
    wrong = [name for name in both if base.floats[name].shape != expert.floats[name].shape and name not in vocabulary]
    if wrong:
        first = f"{list(expert.floats[wrong[0]].shape)} instead of {list(base.floats[wrong[0]].shape)}"
        findings.append(_finding("error", expert, f"has tensors of another shape than the base ({first})", wrong))
    other = [name for name in both if base.floats[name].dtype != expert.floats[name].dtype]
    if other:
        text = f"is stored as {expert.floats[other[0]].dtype}, the base as {base.floats[other[0]].dtype}"
        findings.append(_finding("warning", expert, f"{text}; the export has the base's type", other))
    return findings


def _integer_findings(base: _Named, expert: _Named) -> list[Finding]:
    def differs(name: str) -> bool:
        mine, other = base.others[name].name, expert.others[name].name
        return not torch.equal(base.checkpoint.tensor(mine), expert.checkpoint.tensor(other))

    changed = [name for name in base.others if name in expert.others and differs(name)]
    if not changed:
        return []
    text = "has tensors of whole numbers that differ from the base's; the merged model has the base's"
    return [_finding("warning", expert, text, changed)]


def _config_findings(base: Checkpoint, expert: Checkpoint) -> list[Finding]:
    findings = []
    defaults = _config_defaults(base)
    for field in sorted(base.config.keys() | expert.config.keys()):
        mine, other = (config.get(field, defaults.get(field)) for config in (base.config, expert.config))
        if mine != other and any(fnmatchcase(field, pattern) for pattern in FUNCTION_FIELDS):
            text = f"its config has {field} = {other!r}, the base's has {mine!r}"
            findings.append(Finding(severity="warning", model=expert.name, message=text))
    return findings


def _config_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the fields that a config.json leaves out stand at; which ones it writes depends on the version that saved it."""
    try:
        return CONFIG_MAPPING[str(checkpoint.config.get("model_type"))]().to_dict()
    except (KeyError, TypeError, ValueError):
        return {}


def _tokenizer_findings(base: _Named, expert: _Named) -> list[Finding]:
    """What is to be said of two vocabularies beside what was done about them."""
    if vocabulary_of(expert.checkpoint) is not None:
        return []
    mine, other = base.tokenizer, expert.tokenizer
    if mine is None or other is None:
        return _unreadable_findings(base, expert)
    if refused := _refused(base.checkpoint, expert.checkpoint, mine, other):
        return [Finding(severity="error", model=expert.name, message=refused)]
    kind = relation(mine, other)
    if kind != "equal":
        more = abs(len(other.tokens) - len(mine.tokens))
        text = (
            f"its vocabulary has {more} {'more' if kind == 'extended' else 'fewer'} tokens than the base's; all others "
            "have the same numbers, so rows are merged number by number (merge.vocabulary says what else could be done)"
        )
        return [Finding(severity="warning", model=expert.name, message=text)]
    if mine.splitting != other.splitting:
        text = (
            "its tokenizer.json splits texts into other tokens than the base's, with the same numbers; the export has "
            "the tokenizer of the model it is asked for (its head's, else the base's)"
        )
        return [Finding(severity="warning", model=expert.name, message=text)]
    return []


def _vocabulary_refused(base: _Named, expert: _Named) -> str | None:
    """Why two vocabularies cannot be merged number by number; None where they can, or nothing is known of them."""
    if vocabulary_of(expert.checkpoint) is not None or base.tokenizer is None or expert.tokenizer is None:
        return None
    return _refused(base.checkpoint, expert.checkpoint, base.tokenizer, expert.tokenizer)


def _refused(base: Checkpoint, expert: Checkpoint, mine: Tokenizer, other: Tokenizer) -> str | None:
    remedy = "set merge.vocabulary to `base` or `union` to merge rows by token (tokenizer.json)"
    wrong = conflicts(mine, other)
    if wrong:
        return f"its tokenizer gives {len(wrong)} tokens other numbers than the base's, e.g. {wrong[0]!r}: {remedy}"
    rows, others = row_count(base) or 0, row_count(expert) or 0
    if rows == others or (relation(mine, other) == "equal" and min(rows, others) < len(mine.tokens)):
        return None
    counts = f"{len(other.tokens)} tokens in {others} rows, the base's {len(mine.tokens)} in {rows}"
    return f"its vocabulary has {counts}: {remedy}"


def _unreadable_findings(base: _Named, expert: _Named) -> list[Finding]:
    """What can be said of tokenizers without a `tokenizer.json`: whether their files are the same."""
    mine, others = base.checkpoint.path, expert.checkpoint.path
    both = [file for file in LEGACY_FILES if (mine / file).is_file() and (others / file).is_file()]
    differing = [file for file in both if (mine / file).read_bytes() != (others / file).read_bytes()]
    if differing:
        text = f"its tokenizer differs from the base's ({', '.join(differing)}): the same token may mean another word"
        return [Finding(severity="warning", model=expert.name, message=f"{text}; rows are merged number by number")]
    alone = expert.tokenizer is None and not both
    if alone and row_count(base.checkpoint) is not None and base.tokenizer is not None:
        text = "has no tokenizer of its own; the base's is used"
        return [Finding(severity="info", model=expert.name, message=text)]
    return []


def _template_findings(base: Checkpoint, expert: Checkpoint) -> list[Finding]:
    mine, other = chat_template(base.path), chat_template(expert.path)
    if mine == other:
        return []
    if mine is not None and other is not None:
        text = "its chat template differs from the base's"
    else:
        text = "has a chat template, the base has none" if mine is None else "has no chat template, the base has one"
    text += "; the export has that of the model whose tokenizer it gets (its head's, else the base's)"
    return [Finding(severity="info" if mine is None or other is None else "warning", model=expert.name, message=text)]


def _finding(
    severity: Literal["error", "warning"], model: _Named, message: str, tensors: Sequence[str] = ()
) -> Finding:
    return Finding(severity=severity, model=model.name, message=message, tensors=list(tensors[:SHOWN]))
