"""What an operator is, and the registry of all of them.

An operator is one file in `workers.merging.operators`: a class of options and a function behind `operator`. It passes
the conformance suite (tests/workers/merging/test_conformance.py) without any other change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from pydantic import Field, ValidationError
from torch import Tensor

from optimizer.errors import InvalidInput, from_validation
from optimizer.geometry import TensorInfo
from optimizer.problem import Columns, Needs, OperatorInfo
from optimizer.registry import Registry
from optimizer.spec import ChoiceVariable, RangeVariable, Scalar, Strict
from workers.checkpoints import Factors

Settings = Mapping[str, Scalar | Sequence[float]]
"""What an answer depends on besides the parameter: values of options."""


class Options(Strict):
    """Base of the operators' options; the fields' bounds are also the widest that a search may vary them in."""


def varies(default: float, **settings: Any) -> Any:
    """Declare an option that may differ from expert to expert; the arguments are those of pydantic's ``Field``."""
    return Field(default=default, json_schema_extra={"varies": True}, **settings)


@dataclass(frozen=True)
class Parameter:
    """One parameter of everything that an operator combines, or a stretch of it.

    Attributes:
        info: name, place and kind of the whole tensor.
        layers: number of layers of the model.
        base: the base's tensor, or None for operators that do not use it.
        models: the inputs' tensors, of the base's shape, on its device, of any floating type. Like the base never
            written to. Flat where they are a stretch of the tensor.
        coefficients: one for each input, the position of an interpolation, or the scale.
        options: the operator's.
        each: for each option that differs between the inputs, its value for each of them.
        begin: number of the tensor's element (in flat order) that the stretch begins with; 0 for the whole.
        facts: what was computed before, or elsewhere.
    """

    info: TensorInfo
    layers: int
    base: Tensor | None
    models: tuple[Tensor, ...]
    coefficients: tuple[float, ...]
    options: Any
    facts: Facts
    each: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    begin: int = 0

    def values(self, option: str) -> tuple[Any, ...]:
        """Return an option's value for each input, whether it differs between them or not."""
        return self.each.get(option) or (getattr(self.options, option),) * len(self.models)

    @property
    def ancestor(self) -> Tensor:
        """The base's tensor, for operators that say they use it."""
        assert self.base is not None  # noqa: S101 - the engine gives it to those operators
        return self.base


Whole = tuple["Tensor | None", tuple[Tensor, ...]]
"""Base (None for operators that do not use it) and inputs of one parameter, complete, in the inputs' types."""

Numbers = Mapping[str, Tensor]
"""What `Facts` keeps: tensors by name; a plain number as a float64 tensor without dimensions."""


MergeMeasured = Callable[[tuple[Tensor, ...], tuple[Numbers, ...]], Tensor]
"""Merges one parameter: the inputs' tensors, complete, and what was measured of each, to the merged tensor."""


class Facts(Protocol):
    """Answers to questions that cost more than a candidate should pay.

    An answer is kept by the content of the models it is about, the parameter, the question and its settings: in memory,
    and on disk for all workers of a machine where all the models concerned are checkpoints (an input that is itself
    merged is new in every candidate).
    """

    def of_tensor(
        self,
        question: str,
        compute: Callable[[Whole], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Numbers:
        """Return ``compute`` of the whole parameter, even where the operator sees a stretch of it.

        Args:
            question: unique among all operators that mean something else by it, e.g. ``"magnitude_limit"``. Change it
                when the answer's definition changes: answers outlive a release.
            compute: gets the base and the inputs in ``of``; what it returns is kept as it is, on the CPU or the GPU.
            of: numbers of the inputs that the answer depends on, in this order; all by default.
            settings: what else it depends on.
        """
        ...

    def of_model(
        self,
        question: str,
        compute: Callable[[Iterable[tuple[TensorInfo, Whole]]], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Numbers:
        """Return ``compute`` of all shared parameters together; it may iterate over them several times.

        The answer may hold one tensor per parameter, under the parameter's name.
        """
        ...

    def of_tensors(
        self,
        question: str,
        compute: Callable[[TensorInfo, Whole], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Iterable[tuple[TensorInfo, Numbers]]:
        """Yield `of_tensor`'s answer, known or new, for every shared parameter in turn.

        For what `of_model` has to know of all parameters, and each parameter needs by itself later.
        """
        ...

    def seed(self, number: int, settings: Mapping[str, Scalar] | None = None) -> int:
        """Return 64 bits that depend on the content of an input, the parameter and ``settings``, on nothing else."""
        ...

    def behind(self, number: int) -> Facts | None:
        """Return the facts about the merge that an input is the result of, or None where it is a model as it is."""
        ...

    def factors(self, number: int) -> Factors | None:
        """Return the low-rank factors of an input's task vector here, or None where it is no LoRA adapter's.

        To operators that need factors, such an input is not written out: its tensor among the models is the base's.
        """
        ...

    def measured(self, number: int, question: str) -> Numbers:
        """Return what calibration data say of an input and this parameter (`workers.merging.calibration`).

        Args:
            number: of the input; -1 for the base.
            question: name of a measurement, e.g. ``"fisher"``.

        Raises:
            InvalidInput: the recipe has no calibration data for that model.
        """
        ...

    def merged_in_turn(
        self, question: str, merge: MergeMeasured, settings: Mapping[str, Scalar] | None = None
    ) -> Tensor:
        """Return this parameter of a model that is merged layer by layer, each on what the merged ones before it pass on.

        Args:
            question: what is measured of each input at each depth, e.g. ``"gram"``.
            merge: merges one parameter of all inputs.
            settings: what ``merge`` depends on.

        Raises:
            InvalidInput: the recipe has no calibration data for one of the inputs.
        """
        ...


class MergeFunction(Protocol):
    """Combines one parameter of several models into ``out``.

    ``out`` is contiguous, of the stretch's shape; it is rounded to its type once, at the end. The result depends on
    nothing but the parameter, neither on threads nor on block sizes.

    Raises:
        InfeasibleCandidate: the operator is not defined for these coefficients.
    """

    def __call__(self, parameter: Parameter, out: Tensor) -> None: ...


F = TypeVar("F", bound=MergeFunction)


@dataclass(frozen=True)
class Operator:
    """An entry of the registry.

    Attributes:
        info: what the optimizer and the API know of it.
        options: the class of its options.
        merge: the arithmetic.
        linear: the result is a sum of the base and the inputs with weights that depend on the coefficients, the options
            and the parameter's place only; so the engine may add up adapters as products of their factors.
    """

    info: OperatorInfo
    options: type[Options]
    merge: MergeFunction
    linear: bool = False


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
    needs: Needs = "weights",
    measures: Literal["experts", "base"] = "experts",
    elementwise: bool = False,
    ordered: bool = False,
    idempotent: bool = True,
    modifier: bool = False,
    linear: bool = False,
) -> Callable[[F], F]:
    """Register the decorated function as an operator; the arguments are those of `OperatorInfo` and `Operator`."""
    schema = options.model_json_schema()
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
        needs=needs,
        measures=measures,
        elementwise=elementwise,
        ordered=ordered,
        idempotent=idempotent,
        modifier=modifier,
        varies=[name for name, schema in schema.get("properties", {}).items() if schema.pop("varies", False)],
        options_schema=schema,
    )

    def decorate(function: F) -> F:
        OPERATORS.register(name)(Operator(info, options, function, linear))
        return function

    return decorate


def operator_info(name: str, field: str = "merge.operator") -> OperatorInfo:
    """Return an operator's description; raises `InvalidInput` that names ``field`` when there is none."""
    return OPERATORS.find(name, field).info


def parse_operator_options(
    name: str,
    options: Mapping[str, Scalar | list[float] | RangeVariable | ChoiceVariable],
    field: str = "merge.options",
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
    tried = {key: _values(entry, key, value, field) for key, value in options.items()}
    first = {key: values[0] for key, values in tried.items()}
    for key, values in tried.items():
        for value in values:
            make_options(entry, first | {key: value}, field)
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


def _values(
    entry: Operator, key: str, given: Scalar | list[float] | RangeVariable | ChoiceVariable, field: str
) -> Sequence[Scalar]:
    """The values of an option to check: its only one, those of the experts, or the extreme ones of a variable."""
    if isinstance(given, list) or (isinstance(given, RangeVariable) and given.per_expert):
        _check_varies(entry, key, field)
    if isinstance(given, list):
        return given
    if isinstance(given, RangeVariable):
        return _bounds(entry, key, given, field)
    return given.choices if isinstance(given, ChoiceVariable) else [given]


def _check_varies(entry: Operator, key: str, field: str) -> None:
    if key in entry.options.model_fields and key not in entry.info.varies:
        raise InvalidInput(
            f"{entry.info.name} has one {key} for all experts",
            field=f"{field}.{key}",
            remedy=f"options that may differ between experts: {', '.join(entry.info.varies) or 'none'}",
        )


def _bounds(entry: Operator, key: str, variable: RangeVariable, field: str) -> list[Scalar]:
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
