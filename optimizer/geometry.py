"""Where a parameter stands in a model: its depth and the kind of module it belongs to, read off its name.

Layouts are plain data: they are stored with the job and travel between processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

ModuleKind = Literal["attention", "mlp", "embeddings", "norm", "head", "other"]
"""Kinds of modules that coefficients can be split by."""

Position = int | Literal["input", "output"]
"""Depth of a parameter: its layer's number from 0, or before the first or after the last layer."""

Cuts = Literal["layers", "tensors", "parameters"]
"""Where ranges of the flat vector of all shared parameters may end: between layers, between tensors, or anywhere."""

Role = Literal["shared", "head"]
"""`shared` parameters are merged; a `head` stays the expert's own."""

MODULE_KINDS: tuple[ModuleKind, ...] = get_args(ModuleKind)

_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<number>\d+)\.")
# What a model applies before its first layer.
_INPUT = re.compile(r"embed|(^|\.)(pre_laye?rnorm|conv\d)(\.|$)", re.IGNORECASE)
# Order matters: a norm inside an attention block is a norm, a position embedding is no attention.
_KINDS: tuple[tuple[ModuleKind, re.Pattern[str]], ...] = (
    ("norm", re.compile(r"norm|(^|[._])ln(_|\d|\.|$)", re.IGNORECASE)),
    ("head", re.compile(r"(^|\.)(lm_head|classifier|score|qa_outputs|cls|pooler)(\.|$)")),
    (
        "embeddings",
        re.compile(r"embed|(^|\.)(wte|wpe|cls_token|patch_embeddings|shared)(\.|$)", re.IGNORECASE),
    ),
    (
        "attention",
        re.compile(r"att(n|ention)|(^|[._])(q|k|v|o|qkv)_proj|(^|\.)(query|key|value)(\.|$)", re.IGNORECASE),
    ),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_forward|intermediate|DenseReluDense|(^|[._])(fc\d?|gate_proj|up_proj|down_proj|wi|wo)(\.|$|_)"
            r"|layers?\.\d+\.output\.|block_sparse_moe|experts",
        ),
    ),
)


@dataclass(frozen=True)
class TensorInfo:
    """One parameter of the merged model.

    Attributes:
        name: canonical name (the base's, without the architecture's prefix).
        shape: its dimensions.
        dtype: safetensors' name of its type, e.g. ``"F32"``.
        position: depth, see `Position`.
        kind: module kind.
        role: merged, or the expert's own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    position: Position
    kind: ModuleKind
    role: Role = "shared"


@dataclass(frozen=True)
class Layout:
    """All parameters of the merged model, in order of their names.

    Attributes:
        tensors: one entry per parameter.
        layers: number of layers (the positions 0 … layers-1).
    """

    tensors: tuple[TensorInfo, ...]
    layers: int

    @property
    def shared(self) -> tuple[TensorInfo, ...]:
        """The parameters that are merged."""
        return tuple(tensor for tensor in self.tensors if tensor.role == "shared")

    @property
    def flat(self) -> tuple[TensorInfo, ...]:
        """The merged parameters in the order of the flat vector: by depth (layer 2 before layer 10), then by name.

        A stretch of the flat vector is then a stretch of the model, from its input to its output.
        """
        return tuple(sorted(self.shared, key=lambda tensor: (_depth(tensor.position), tensor.name)))

    def offsets(self) -> dict[str, int]:
        """Return where each merged parameter begins in the flat vector, by name, in its order."""
        out, total = {}, 0
        for tensor in self.flat:
            out[tensor.name] = total
            total += prod(tensor.shape)
        return out

    @property
    def size(self) -> int:
        """Number of elements of the flat vector of all merged parameters."""
        return sum(prod(tensor.shape) for tensor in self.shared)


def _depth(position: Position) -> float:
    if isinstance(position, int):
        return position
    return -math.inf if position == "input" else math.inf


def module_kind(name: str) -> ModuleKind:
    """Return the kind of module the parameter ``name`` belongs to."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def positions(names: Iterable[str]) -> tuple[dict[str, Position], int]:
    """Return the depth of every name and the number of layers.

    The first number in a name is its layer. A model with two stacks (encoder and decoder) gets one run of numbers:
    the decoder's layers follow the encoder's.
    """
    names = list(names)
    matches = {name: match for name in names if (match := _LAYER.match(name))}
    depth: dict[str, int] = {}
    for match in matches.values():
        stack = match["stack"]
        depth[stack] = max(depth.get(stack, 0), int(match["number"]) + 1)
    offsets, total = {}, 0
    for stack in sorted(depth, key=lambda stack: ("decoder" in stack, stack)):
        offsets[stack] = total
        total += depth[stack]
    out: dict[str, Position] = {}
    for name in names:
        if name in matches:
            out[name] = offsets[matches[name]["stack"]] + int(matches[name]["number"])
        else:
            out[name] = "input" if module_kind(name) == "embeddings" or _INPUT.search(name) else "output"
    return out, total


def make_layout(tensors: Iterable[tuple[str, tuple[int, ...], str]], heads: frozenset[str] = frozenset()) -> Layout:
    """Make a layout from (name, shape, dtype) triples; names in ``heads`` get the role `head`."""
    ordered = sorted(tensors)
    where, layers = positions(name for name, _, _ in ordered if name not in heads)
    return Layout(
        tensors=tuple(
            TensorInfo(
                name,
                shape,
                dtype,
                where.get(name, "output"),
                "head" if name in heads else module_kind(name),
                "head" if name in heads else "shared",
            )
            for name, shape, dtype in ordered
        ),
        layers=layers,
    )
