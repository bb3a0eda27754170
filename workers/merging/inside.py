"""An operator applied inside another one's space: to the experts' parts in a basis that they share.

Operators that align experts first (KnOTS, Core Space) merge the aligned parts with any operator that works entry by
entry, such as TIES. The parts are task vectors, so the base of the inner merge is zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Never

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from optimizer.errors import InvalidInput, MergeoptError
from optimizer.geometry import TensorInfo
from optimizer.spec import Scalar
from workers.checkpoints import Factors
from workers.merging.operator import (
    OPERATORS,
    Facts,
    MergeMeasured,
    Numbers,
    Operator,
    Options,
    Parameter,
    Settings,
    Whole,
    make_options,
    varies,
)


class InnerOptions(Options):
    """Options of operators that merge with another one inside."""

    inner: str = Field(
        default="ties",
        description="Operator that merges the aligned parts; one with a coefficient for each expert, without data.",
    )
    density: float = varies(
        0.2, gt=0, le=1, description="Option `density` of the inner operator, where it has one: the share it keeps."
    )
    seed: int = Field(
        default=0, ge=0, description="Option `seed` of the inner operator, where it has one: it drops at random."
    )
    inner_options: str = Field(
        default="{}",
        max_length=1000,
        description='Further options of the inner operator, as a JSON object such as `{"normalise": "sum"}`.',
    )

    @field_validator("inner")
    @classmethod
    def _usable(cls, value: str) -> str:
        try:
            info = OPERATORS.find(value, "inner").info
        except MergeoptError as error:
            raise ValueError(f"{error.message}; {error.remedy}") from error
        if info.columns != "per_expert" or info.needs != "weights" or info.ordered:
            raise ValueError(
                f"{value} cannot merge aligned parts; use one like ties, with a coefficient for each expert"
            )
        return value

    @model_validator(mode="after")
    def _complete(self) -> InnerOptions:
        try:
            self.made()
        except ValueError as error:
            raise ValueError(f"inner_options: {error}") from error
        except MergeoptError as error:
            raise ValueError(f"inner_options: {error.message}") from error
        return self

    def made(self) -> tuple[Operator, Options]:
        """Return the inner operator and its options."""
        entry = OPERATORS[self.inner]
        given = json.loads(self.inner_options)
        if not isinstance(given, dict):
            raise ValueError("a JSON object is needed")
        own: dict[str, Scalar] = {
            name: getattr(self, name) for name in ("density", "seed") if name in entry.options.model_fields
        }
        return entry, make_options(entry, own | given, "inner_options")


def merge_parts(parameter: Parameter, parts: Sequence[Tensor], space: str, settings: Settings) -> Tensor:
    """Merge the experts' parts with the inner operator of ``parameter.options``.

    Args:
        parameter: of the outer operator.
        parts: one for each input, of one shape and type.
        space: name of the space they are in, for the cache.
        settings: what else the parts depend on.

    Returns:
        The merged part, of their type.
    """
    zero = torch.zeros_like(parts[0])
    facts = _InnerFacts(parameter.facts, zero, tuple(parts), space, settings)
    info = replace(parameter.info, shape=tuple(zero.shape))
    out = torch.empty_like(zero)
    _run(replace(parameter, info=info, base=zero, models=tuple(parts), facts=facts), out)
    return out


def merge_plainly(parameter: Parameter, out: Tensor) -> None:
    """Apply the inner operator to the parameter as it is: what has no space of its own, such as a bias."""
    _run(parameter, out)


def _run(parameter: Parameter, out: Tensor) -> None:
    entry, options = parameter.options.made()
    each = {name: values for name, values in parameter.each.items() if name in entry.info.varies}
    base = parameter.base if entry.info.uses_base else None
    entry.merge(replace(parameter, base=base, options=options, each=each), out)


@dataclass(frozen=True)
class _InnerFacts:
    """`Facts` about the parts of one parameter, kept with those of the parameter itself."""

    outer: Facts
    zero: Tensor
    parts: tuple[Tensor, ...]
    space: str
    settings: Settings

    def of_tensor(
        self,
        question: str,
        compute: Callable[[Whole], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Numbers:
        """See `Facts`."""
        of = tuple(range(len(self.parts)) if of is None else of)
        key = {**(settings or {}), **self.settings, "of": [float(number) for number in of]}
        whole = self.zero, tuple(self.parts[number] for number in of)
        return self.outer.of_tensor(f"{self.space}/{question}", lambda _: compute(whole), settings=key)

    def seed(self, number: int, settings: Mapping[str, Scalar] | None = None) -> int:
        """See `Facts`."""
        return self.outer.seed(number, {**(settings or {}), "space": self.space})

    def behind(self, number: int) -> Facts | None:
        """See `Facts`; the parts are the result of no merge."""
        del number
        return None

    def factors(self, number: int) -> Factors | None:
        """See `Facts`; the parts have none."""
        del number
        return None

    def of_model(
        self,
        question: str,
        compute: Callable[[Iterable[tuple[TensorInfo, Whole]]], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Numbers:
        """See `Facts`; parts of different parameters are not comparable."""
        del compute, of, settings
        self._refuse(question)

    def of_tensors(
        self,
        question: str,
        compute: Callable[[TensorInfo, Whole], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Iterable[tuple[TensorInfo, Numbers]]:
        """See `of_model`."""
        del compute, of, settings
        self._refuse(question)

    def measured(self, number: int, question: str) -> Numbers:
        """See `Facts`; nothing was measured of parts."""
        del number
        self._refuse(question)

    def merged_in_turn(
        self, question: str, merge: MergeMeasured, settings: Mapping[str, Scalar] | None = None
    ) -> Tensor:
        """See `measured`."""
        del merge, settings
        self._refuse(question)

    def _refuse(self, question: str) -> Never:
        raise InvalidInput(
            f"the inner operator asks for {question} of whole models, which aligned parts do not have",
            field="merge.options.inner",
            remedy="use an inner operator that works entry by entry, such as ties",
        )
