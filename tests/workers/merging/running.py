"""Running one operator on plain tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optimizer.geometry import TensorInfo
from workers.checkpoints import Factors
from workers.merging.operator import Numbers, Operator, Parameter, Whole, make_options


@dataclass
class PlainFacts:
    """`Facts` about one parameter (or a model of several), computed at once, every time.

    Attributes:
        whole: the parameter.
        model: all parameters of the model by name; the parameter alone by default.
        low_rank: factors of each input's task vector.
        measurements: by input (-1: the base) and question.
    """

    info: TensorInfo
    whole: Whole
    model: Mapping[str, Whole] = field(default_factory=dict)
    low_rank: Sequence[Factors | None] = ()
    measurements: Mapping[tuple[int, str], Numbers] = field(default_factory=dict)

    def of_tensor(
        self,
        question: str,
        compute: Callable[[Whole], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Any = None,
    ) -> Numbers:
        return compute(_chosen(self.whole, of))

    def of_model(
        self,
        question: str,
        compute: Callable[[Iterable[tuple[TensorInfo, Whole]]], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Any = None,
    ) -> Numbers:
        model = self.model or {self.info.name: self.whole}
        return compute([(make_info(name, whole), _chosen(whole, of)) for name, whole in model.items()])

    def seed(self, number: int, settings: Mapping[str, Any] | None = None) -> int:
        tensor = self.whole[1][number]
        content = hashlib.sha256(repr((tensor.double().tolist(), self.info.name, settings)).encode())
        return int.from_bytes(content.digest()[:8], "little")

    def factors(self, number: int) -> Factors | None:
        return self.low_rank[number] if self.low_rank else None

    def measured(self, number: int, question: str) -> Numbers:
        return self.measurements[number, question]


def make_info(name: str, whole: Whole) -> TensorInfo:
    """A description of a parameter in layer 0."""
    return TensorInfo(name, tuple(whole[1][0].shape), "F32", 0, "mlp")


def merge(
    operator: Operator,
    tensors: Sequence[Tensor],
    row: Sequence[float],
    *,
    options: Mapping[str, Any] | None = None,
    each: Mapping[str, tuple[float, ...]] | None = None,
    dtype: torch.dtype | None = None,
    **facts: Any,
) -> Tensor:
    """Merge one parameter: ``tensors`` are the base's and the inputs'; ``facts`` are attributes of `PlainFacts`."""
    base = tensors[0] if operator.info.uses_base else None
    whole = (base, tuple(tensors[1:]))
    info = make_info("layers.0.mlp.weight", whole)
    parameter = Parameter(
        info=info,
        layers=1,
        base=base,
        models=whole[1],
        coefficients=tuple(row),
        options=make_options(operator, options or {}, "options"),
        facts=PlainFacts(info, whole, **facts),
        each=each or {},
    )
    out = torch.full_like(tensors[0], math.nan, dtype=dtype or tensors[0].dtype)
    operator.merge(parameter, out)
    return out


def _chosen(whole: Whole, of: Sequence[int] | None) -> Whole:
    base, models = whole
    return base, models if of is None else tuple(models[number] for number in of)
