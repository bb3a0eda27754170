"""What an operator is, and the registry of all of them.

An operator is one file in `workers.merging.operators`: a class of options and a function behind `operator`. It passes
the conformance suite (tests/workers/merging/test_conformance.py) without any other change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError
from torch import Tensor

from optimizer.errors import InvalidInput, from_validation
from optimizer.problem import Columns, OperatorInfo
from optimizer.registry import Registry
from optimizer.spec import ChoiceVariable, RangeVariable, Scalar, Strict


class Options(Strict):
    """Base of the operators' options; the fields' bounds are also the widest that a search may vary them in."""


class MergeFunction(Protocol):
    """Combines one tensor of several models.

    Args:
        base: the base's tensor, or None for operators that do not use it.
        inputs: the models' tensors, of the base's shape, on its device, of any floating type. Never written to.
        coefficients: one for each input, or the one position of an interpolation.
        options: the operator's.
        out: where the result goes, contiguous; rounded to its type once, at the end.

    The result depends on nothing else, neither on threads nor on block sizes.

    Raises:
        InfeasibleCandidate: the operator is not defined for these coefficients.
    """

    def __call__(
        self, base: Tensor | None, inputs: Sequence[Tensor], coefficients: Sequence[float], options: Any, out: Tensor
    ) -> None: ...


F = TypeVar("F", bound=MergeFunction)


@dataclass(frozen=True)
class Operator:
    """An entry of the registry.

    Attributes:
        info: what the optimizer and the API know of it.
        options: the class of its options.
        merge: the arithmetic.
    """

    info: OperatorInfo
    options: type[Options]
    merge: MergeFunction


OPERATORS: Registry[Operator] = Registry("operator", "workers.merging.operators")
"""All operators by name."""


def operator(
    name: str,
    *,
    summary: str,
    reference: str,
    options: type[Options] = Options,
    columns: Columns = "per_expert",
    low: float = 0.0,
    high: float = 1.0,
    uses_base: bool = True,
    min_experts: int = 1,
    max_experts: int | None = None,
) -> Callable[[F], F]:
    """Register the decorated function as an operator; the arguments are those of `OperatorInfo`."""
    info = OperatorInfo(
        name=name,
        summary=summary,
        reference=reference,
        columns=columns,
        uses_base=uses_base,
        min_experts=min_experts,
        max_experts=max_experts,
        low=low,
        high=high,
        options_schema=options.model_json_schema(),
    )

    def decorate(function: F) -> F:
        OPERATORS.register(name)(Operator(info, options, function))
        return function

    return decorate


def operator_info(name: str, field: str = "merge.operator") -> OperatorInfo:
    """Return an operator's description; raises `InvalidInput` that names ``field`` when there is none."""
    return OPERATORS.find(name, field).info


def parse_operator_options(
    name: str, options: Mapping[str, Scalar | RangeVariable | ChoiceVariable], field: str = "merge.options"
) -> Options:
    """Check an operator's options as a job spec gives them: fixed values, ranges and choices.

    Args:
        name: the operator's.
        options: the spec's ``merge.options``.
        field: dotted path for errors.

    Returns:
        The options with every variable at its first value (lower bound or first choice).

    Raises:
        InvalidInput: unknown option, or a value, bound or choice that the operator does not allow.
    """
    entry = OPERATORS.find(name, "merge.operator")
    fixed = {key: value for key, value in options.items() if not isinstance(value, RangeVariable | ChoiceVariable)}
    first: dict[str, Scalar] = dict(fixed)
    for key, value in options.items():
        if isinstance(value, RangeVariable | ChoiceVariable):
            first[key] = _values(entry, key, value, field)[0]
    for key, value in options.items():
        if isinstance(value, RangeVariable | ChoiceVariable):
            for tried in _values(entry, key, value, field):
                make_options(entry, first | {key: tried}, field)
    return make_options(entry, first, field)


def make_options(entry: Operator, values: Mapping[str, Scalar], field: str) -> Options:
    """Validate the fixed options of an operator; raises `InvalidInput` that names ``field`` and the option."""
    unknown = sorted(set(values) - set(entry.options.model_fields))
    if unknown:
        known = ", ".join(entry.options.model_fields) or "none"
        raise InvalidInput(
            f"{entry.info.name} has no option {unknown[0]!r}",
            field=f"{field}.{unknown[0]}",
            remedy=f"its options: {known}",
        )
    try:
        return entry.options.model_validate(dict(values))
    except ValidationError as error:
        raise from_validation(error, field) from error


def _values(entry: Operator, key: str, variable: RangeVariable | ChoiceVariable, field: str) -> list[Scalar]:
    """The extreme values of a variable."""
    if isinstance(variable, ChoiceVariable):
        return variable.choices
    known = entry.options.model_fields.get(key)
    whole = known is not None and known.annotation is int
    if known is not None and known.annotation not in (int, float):
        raise InvalidInput(
            f"{key} is no number that could vary between two bounds",
            field=f"{field}.{key}",
            remedy="give `choices` instead of `low` and `high`",
        )
    if whole and not variable.integer:
        raise InvalidInput(f"{key} is a whole number", field=f"{field}.{key}", remedy="add `integer: true`")
    bounds = [variable.low, variable.high]
    return [int(bound) if variable.integer else bound for bound in bounds]
