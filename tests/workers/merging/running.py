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
from workers.merging.operator import MergeMeasured, Numbers, Operator, Parameter, Whole, make_options


@dataclass
class PlainFacts:
    """`Facts` about one parameter (or a model of several), computed at once, every time.

    Attributes:
        whole: the parameter.
        model: all parameters of the model by name; the parameter alone by default.
        low_rank: factors of each input's task vector.
        measurements: by input (-1: the base) and question.
        inner: what is known of the merge that the inputs are the result of.
    """

    info: TensorInfo
    whole: Whole
    model: Mapping[str, Whole] = field(default_factory=dict)
    low_rank: Sequence[Factors | None] = ()
    measurements: Mapping[tuple[int, str], Numbers] = field(default_factory=dict)
    inner: PlainFacts | None = None

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

    def of_tensors(
        self,
        question: str,
        compute: Callable[[TensorInfo, Whole], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Any = None,
    ) -> Iterable[tuple[TensorInfo, Numbers]]:
        for name, whole in (self.model or {self.info.name: self.whole}).items():
            info = make_info(name, whole)
            yield info, compute(info, _chosen(whole, of))

    def seed(self, number: int, settings: Mapping[str, Any] | None = None) -> int:
        tensor = self.whole[1][number]
        content = hashlib.sha256(repr((tensor.double().tolist(), self.info.name, settings)).encode())
        return int.from_bytes(content.digest()[:8], "little")

    def behind(self, number: int) -> PlainFacts | None:
        return self.inner

    def factors(self, number: int) -> Factors | None:
        return self.low_rank[number] if self.low_rank else None

    def measured(self, number: int, question: str) -> Numbers:
        known = self.measurements.get((number, question))
        tensor = self.whole[1][number] if number >= 0 else self.whole[0]
        assert tensor is not None
        return known if known is not None else made_up(question, tensor)

    def merged_in_turn(self, question: str, merge: MergeMeasured, settings: Mapping[str, Any] | None = None) -> Tensor:
        models = self.whole[1]
        return merge(models, tuple(self.measured(number, question) for number in range(len(models))))


def made_up(question: str, tensor: Tensor) -> Numbers:
    """Measurements that depend on nothing but the tensor's content, of the shapes that calibration gives."""
    exact = tensor.double()
    if question.startswith("fisher"):
        information = exact.square() + 0.01
        return {"fisher": information, "norm": information.square().sum().sqrt()}
    if exact.dim() not in ((2,) if question == "gram" else (1, 2)):
        return {}
    if question == "gram":
        eye = torch.eye(exact.shape[1], dtype=torch.float64)
        return {"gram": exact.T @ exact / max(1, len(exact)) + 0.1 * eye, "axis": torch.tensor(1.0)}
    magnitude = exact.abs().reshape(-1, exact.shape[-1]).sum(dim=0)
    return {"activation": magnitude, "axis": torch.tensor(float(exact.dim() - 1))}


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
