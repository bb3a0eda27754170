"""mergekit's configuration files as data: their schema, and how their settings are evaluated.

The rules are those of mergekit 0.1.5 (arXiv 2403.13257). Numbers may stand as one value, as a list (a gradient that is
interpolated over the layers of a slice) or as a list of conditions on a parameter's name; on top of that, mergeopt
reads ``{low: …, high: …}``: a range for a search.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from optimizer.errors import InvalidInput, InvalidProblems, from_validation
from optimizer.mergekit.methods import METHODS, Value
from optimizer.spec import Strict


class Range(Strict):
    """A number that a search varies; mergeopt's own addition."""

    low: float
    high: float


class Condition(Strict):
    """A value for the parameters whose name contains ``filter``."""

    value: Value | list[Value] | Range
    filter: str | None = None


Setting = Condition | list[Condition] | Value | list[Value] | Range


def _one_message(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Say what a setting may be, not how it fails to be each of them."""
    try:
        return check(value)
    except ValidationError as error:
        raise ValueError(
            "give a number, a list of numbers, {low, high}, or conditions: a list of {filter, value}"
        ) from error


Settings = dict[str, Annotated[Setting, WrapValidator(_one_message)]]


class Reference(Strict):
    """A model: a path or hub id, perhaps with a LoRA adapter on it: ``model``, ``model@revision``, ``model+adapter``."""

    model: str
    lora: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return _unfolded(value)
        parts = value.split("+")
        if len(parts) > 2 or not all(parts):
            raise ValueError(f"{value!r} is no model; write `model`, `model@revision` or `model+adapter`")
        return dict(zip(("model", "lora"), parts, strict=False))

    def __str__(self) -> str:
        return self.model if self.lora is None else f"{self.model}+{self.lora}"


class Input(Strict):
    """A model to merge, with its own settings."""

    model: Reference
    parameters: Settings = Field(default_factory=dict)


class Source(Input):
    """Some layers of a model, with their own settings."""

    layer_range: tuple[int, int]

    @model_validator(mode="after")
    def _ascending(self) -> Source:
        if not 0 <= self.layer_range[0] < self.layer_range[1]:
            raise ValueError("layer_range: give the first layer, and the one after the last")
        return self


class Slice(Strict):
    """Consecutive layers of the result: sources of equal length, merged layer by layer."""

    sources: list[Source] = Field(min_length=1)
    base_model: Reference | None = None
    parameters: Settings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _equally_long(self) -> Slice:
        if len({source.layer_range[1] - source.layer_range[0] for source in self.sources}) > 1:
            raise ValueError("sources: all layer ranges of a slice must be equally long")
        return self


class Module(Strict):
    """What one module of the architecture is made of."""

    slices: list[Slice] | None = None
    models: list[Input] | None = None
    parameters: Settings = Field(default_factory=dict)


class TokenizerSettings(Strict):
    """Which tokens the result has."""

    source: Reference | Literal["union", "base"] = "union"
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class Configuration(Strict):
    """A whole file."""

    merge_method: str
    models: list[Input] | None = None
    slices: list[Slice] | None = None
    modules: dict[str, Module] | None = None
    base_model: Reference | None = None
    parameters: Settings = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Reference | Literal["union", "base"] | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    name: str | None = Field(default=None, description="Of one merge among several; has no meaning here.")

    @model_validator(mode="after")
    def _one_form(self) -> Configuration:
        if sum(bool(form) for form in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("give exactly one of `models`, `slices` and `modules`")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise ValueError("tokenizer: `tokenizer_source` says the same; give one of them")
        return self

    @property
    def module(self) -> Module:
        """The one module, or the file's own models or slices as one."""
        if self.modules is None:
            return Module(slices=self.slices, models=self.models)
        return next(iter(self.modules.values()))

    @property
    def references(self) -> list[Reference]:
        """All models, each once: the base first, the others in the order of the file."""
        module = self.module
        found = [self.base_model] if self.base_model else []
        found += [entry.model for entry in module.models or []]
        for part in module.slices or []:
            found += [*([part.base_model] if part.base_model else []), *(source.model for source in part.sources)]
        return list(dict.fromkeys(found))


def read_configuration(data: object, field: str = "mergekit") -> Configuration:
    """Check a configuration; raises `InvalidInput` that names the YAML path at fault, below ``field``."""
    try:
        found = Configuration.model_validate(data)
    except ValidationError as error:
        problem = from_validation(error, field)
        raise InvalidProblems(problem.message, field=problem.field, remedy="see mergekit's documentation") from error
    if found.modules is not None and len(found.modules) > 1:
        raise InvalidInput(
            "several modules are not supported", field=f"{field}.modules", remedy="merge one module at a time"
        )
    if bool(found.module.models) == bool(found.module.slices):
        raise InvalidInput("give `models` or `slices`", field=f"{field}.modules")
    if found.merge_method not in METHODS:
        raise InvalidInput(
            f"there is no operator for the method {found.merge_method!r}",
            field=f"{field}.merge_method",
            remedy=f"use one of: {', '.join(METHODS)}",
        )
    return found


def evaluate(setting: Setting, name: str, t: float) -> Value | Range | None:
    """Return a setting's value for one parameter; None where no condition holds.

    Args:
        setting: of the file.
        name: the parameter's name in the checkpoint.
        t: how deep it stands in its slice, from 0 to 1; 0 before the first layer and after the last.
    """
    if isinstance(setting, Condition):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    for entry in setting:
        if not isinstance(entry, Condition):
            return _along([value for value in setting if not isinstance(value, Condition)], t)
        if entry.filter in (None, "*") or (entry.filter is not None and entry.filter in name):
            value = entry.value
            return _along(value, t) if isinstance(value, list) else value
    return None


def values_of(setting: Setting) -> Iterator[Value | Range]:
    """Yield every number that stands in a setting."""
    for entry in setting if isinstance(setting, list) else [setting]:
        if isinstance(entry, Condition):
            yield from entry.value if isinstance(entry.value, list) else [entry.value]
        else:
            yield entry


def number(value: Value | Range | None) -> float | None:
    """Return a value as a number: YAML 1.1 reads 1e-5 as text, mergekit reads it as a number all the same."""
    if value is None or isinstance(value, bool | Range):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _unfolded(value: Any) -> Any:
    """A reference's long form, ``{model: {path: …, revision: …}, lora: …}``, with its parts as text."""
    if not isinstance(value, dict):
        return value
    out = {key: part for key, part in value.items() if part is not None}
    for key, part in out.items():
        if isinstance(part, dict) and isinstance(part.get("path"), str):
            out[key] = f"{part['path']}@{part['revision']}" if part.get("revision") else part["path"]
    return out


def _along(values: list[Value], t: float) -> Value | None:
    if not values:
        return None
    numbers = [number(value) for value in values]
    if None in numbers:
        return values[int(t * (len(values) - 1))]
    place = t * (len(values) - 1)
    first = int(place)
    share = place - first
    left, right = numbers[first], numbers[min(first + 1, len(values) - 1)]
    assert left is not None and right is not None  # noqa: S101 - just checked
    return (1 - share) * left + share * right
