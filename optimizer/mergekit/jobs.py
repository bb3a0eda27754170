"""From a configuration to a part of a job spec: what it fixes stays, what is a list or a range is searched.

A job has one table of coefficients with one pair of bounds, so the search space is a little wider than the file:

- A weight (or slerp's ``t``) that is a list or a range is searched between its lowest and its highest number; the
  bounds hold for all weights, and include those that are plain numbers, which the search starts from. A list asks for
  as many groups of layers as it is long, conditions for coefficients of their own for the modules that they name.
- An option (density, gamma, …) that is a list varies per group, one that is a range varies as a whole, one that is a
  number stays fixed.
- The file's own numbers (the middle of what is searched) are the first candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean
from typing import Any

from optimizer.errors import InvalidInput
from optimizer.geometry import ModuleKind, module_kind
from optimizer.mergekit.evaluation import typed
from optimizer.mergekit.format import Condition, Configuration, Range, Reference, Setting, Settings, number, values_of
from optimizer.mergekit.methods import METHODS, Method, Parameter, to_ours
from optimizer.mergekit.references import base_reference, model_names, model_ref, notes_on, vocabulary_rule


def asks_for_search(configuration: Configuration) -> bool:
    """Whether a setting that has an effect is a list of numbers or a range."""
    method = METHODS[configuration.merge_method]
    scopes = [configuration.parameters, configuration.module.parameters]
    scopes += [entry.parameters for entry in configuration.module.models or []]
    for part in configuration.module.slices or []:
        scopes += [part.parameters, *(source.parameters for source in part.sources)]
    return any(
        name in method.parameters and method.parameters[name].role != "ignored" and _varies(setting)
        for scope in scopes
        for name, setting in scope.items()
    )


def to_job(
    configuration: Configuration, exists: Callable[[str], bool], layers: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return the base, the experts, the merge and the first candidate of a job spec, and notes on what differs.

    Objectives and a budget are for the user to add.

    Args:
        configuration: from `read_configuration`.
        exists: whether a path leads to something; what leads nowhere and looks like a hub id is one.
        layers: how many the models have, where that is known: it decides how many of them share a coefficient.

    Raises:
        InvalidInput: naming the YAML path of what a search cannot vary.
    """
    reader = _Reader(configuration)
    names = model_names(configuration)
    base = base_reference(configuration)
    inputs = reader.inputs()
    experts = [_expert(reference, base, names, exists) for reference in inputs if reference in reader.experts]
    merge: dict[str, Any] = {"operator": reader.method.operator, "vocabulary": vocabulary_rule(configuration)}
    options = reader.options()
    if options:
        merge["options"] = options
    merge |= reader.granularity(layers)
    bounds = reader.bounds()
    if bounds is not None:
        merge["bounds"] = {"low": bounds[0], "high": bounds[1]}
    out: dict[str, Any] = {
        "base": _plain(model_ref(base, exists)),
        "experts": experts,
        "merge": merge,
    }
    start = reader.start({reference: expert["name"] for reference, expert in zip(reader.experts, experts, strict=True)})
    if start:
        out["warm_starts"] = {"candidates": [{"label": "mergekit", "coefficients": start}]}
    return out, [*notes_on(configuration), *reader.notes]


class _Reader:
    """Collects what a configuration says of each model, over all scopes."""

    def __init__(self, configuration: Configuration) -> None:
        self.method: Method = METHODS[configuration.merge_method]
        self.notes: list[str] = []
        self._configuration = configuration
        module = configuration.module
        self._common = [module.parameters, configuration.parameters]
        self._own: dict[Reference, list[Settings]] = {}
        for entry in module.models or []:
            self._own.setdefault(entry.model, []).append(entry.parameters)
        for place, part in enumerate(module.slices or []):
            self._check_slice(place)
            self._common.insert(0, part.parameters)
            for source in part.sources:
                self._own.setdefault(source.model, []).append(source.parameters)
        if configuration.base_model is not None:
            self._own.setdefault(configuration.base_model, [])
        if configuration.merge_method == "passthrough":
            raise InvalidInput(
                "passthrough leaves nothing to search",
                field="mergekit.merge_method",
                remedy="import the file as a recipe, or search layer plans (merge.layers)",
            )

    @property
    def experts(self) -> list[Reference]:
        """The models that get a coefficient."""
        if self.method.base == "input":
            return list(self._own)
        return [reference for reference in self._own if reference != self._configuration.base_model]

    def inputs(self) -> list[Reference]:
        """All models whose coefficient the file gives."""
        found = self.experts
        if self.method.others not in (None, len(found)):
            name = self._configuration.merge_method
            raise InvalidInput(
                f"{name} merges {self.method.others} beside the base, not {len(found)}", field="mergekit"
            )
        return found

    def options(self) -> dict[str, Any]:
        """``merge.options``."""
        out: dict[str, Any] = {}
        for name, parameter in self.method.parameters.items():
            if parameter.role != "option" or (self.method.folds and parameter.option in ("scale", "normalise")):
                continue
            found = [self._option(name, parameter, self._scopes(reference, parameter)) for reference in self.experts]
            same = all(value == found[0] for value in found)
            if same:
                out[parameter.option] = found[0]
            elif all(isinstance(value, float) for value in found):
                out[parameter.option] = found
            else:
                out[parameter.option] = _spanning(found)
        ours = to_ours(self._configuration.merge_method, out, self._configuration.base_model is not None)
        return dict(sorted({**ours, **self.method.fixed}.items()))

    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest coefficient; None where the file has none, or only one number."""
        numbers = [value for reference in self.experts for value in self._numbers(reference)]
        low, high = min(numbers, default=0.0), max(numbers, default=0.0)
        return (low, high) if low < high else None

    def start(self, names: Mapping[Reference, str]) -> dict[str, float]:
        """The file's own coefficients: the middle of a range, the mean of a list."""
        if self.method.coefficients == "t":
            found = list(self._numbers(self.experts[0]))
            return {"t": fmean(found)} if found else {}
        if self.method.coefficients == "share":
            first, second = (fmean(self._numbers(reference)) for reference in self.experts)
            return {"t": second / (first + second) if first + second else 0.5}
        if self.method.coefficients != "weights":
            return {}
        return {names[reference]: fmean(self._numbers(reference)) for reference in self.experts}

    def granularity(self, layers: int | None) -> dict[str, Any]:
        """As many groups as the longest list has numbers, and sets of modules for the conditions."""
        lengths = [len(values) for setting in self._coefficient_settings() for values in _lists(setting)]
        out: dict[str, Any] = {"layers": "whole"}
        longest = max(lengths, default=1)
        if longest > 1:
            out = {"layers": "each"}
            if layers is not None and layers > longest:
                out = {"layers": "groups", "group_size": math.ceil(layers / longest)}
        kinds: list[ModuleKind] = []
        for setting in self._coefficient_settings():
            for text in _filters(setting):
                kind = module_kind(text)
                if kind == "other":
                    self.notes.append(
                        f"the condition on {text!r} names no kind of module and is left out of the search"
                    )
                elif kind not in kinds:
                    kinds.append(kind)
        return {"granularity": out | ({"modules": [[kind] for kind in kinds]} if kinds else {})}

    def _check_slice(self, place: int) -> None:
        parts = self._configuration.module.slices or []
        part = parts[place]
        begin = parts[place - 1].sources[0].layer_range[1] if place else 0
        same = [source.model for source in part.sources] == [source.model for source in parts[0].sources]
        if not same or any(source.layer_range[0] != begin for source in part.sources):
            raise InvalidInput(
                "layers that are rearranged are no coefficients that a search could vary",
                field=f"mergekit.slices.{place}",
                remedy="import the file as a recipe, or search layer plans (merge.layers)",
            )

    def _scopes(self, reference: Reference, parameter: Parameter) -> list[Settings]:
        return [*(self._own[reference] if parameter.each else []), *self._common]

    def _option(self, name: str, parameter: Parameter, scopes: list[Settings]) -> Any:
        path = f"mergekit.parameters.{name}"
        setting = next((scope[name] for scope in scopes if name in scope), parameter.default)
        if setting is None:
            raise InvalidInput(f"no {name} is given", field=path)
        if not _varies(setting) and not isinstance(setting, list | Condition | Range):
            return typed(setting, parameter, path)
        found = _numbers(setting)
        if not found:
            raise InvalidInput(f"{name} is nothing a search could vary", field=path)
        if min(found) == max(found):
            return found[0]
        per_group = not isinstance(setting, Range)
        return {"low": min(found), "high": max(found), **({"per_group": True} if per_group else {})}

    def _coefficient_settings(self) -> Iterator[Setting]:
        for reference in self.experts:
            yield from self._settings(reference)

    def _settings(self, reference: Reference) -> Iterator[Setting]:
        for name, parameter in self.method.parameters.items():
            if parameter.role in ("weight", "t"):
                found = [scope[name] for scope in self._scopes(reference, parameter) if name in scope]
                if not found:
                    raise InvalidInput(f"no {name} of {reference} is given", field=f"mergekit.parameters.{name}")
                yield from found[:1] if not _conditional(found[0]) else found

    def _numbers(self, reference: Reference) -> list[float]:
        factor = 1.0
        if self.method.folds:
            scale = next((scope["lambda"] for scope in self._common if "lambda" in scope), 1.0)
            found = _numbers(scale)
            if len(found) != 1:
                raise InvalidInput("lambda must be one number", field="mergekit.parameters.lambda")
            factor = found[0]
        return [value * factor for setting in self._settings(reference) for value in _numbers(setting)]


def _expert(
    reference: Reference, base: Reference, names: Mapping[Reference, str], exists: Callable[[str], bool]
) -> dict[str, Any]:
    place = _plain(model_ref(reference, exists))
    name = names[reference] if reference != base else "base-model"
    return {"name": name, **(place if isinstance(place, dict) else {"path": place})}


def _plain(ref: Any) -> Any:
    return ref.path if ref.path is not None else ref.model_dump(exclude_none=True)


def _spanning(found: list[Any]) -> dict[str, Any]:
    """A variable that holds the values of all experts."""
    parts = [value if isinstance(value, dict) else {"low": value, "high": value} for value in found]
    out = {"low": min(part["low"] for part in parts), "high": max(part["high"] for part in parts), "per_expert": True}
    return out | ({"per_group": True} if any(part.get("per_group") for part in parts) else {})


def _varies(setting: Setting) -> bool:
    return bool(
        isinstance(setting, Range) or list(_lists(setting)) or any(isinstance(v, Range) for v in values_of(setting))
    )


def _conditional(setting: Setting) -> bool:
    """Whether a setting may leave some parameters to the next scope."""
    entries = setting if isinstance(setting, list) else [setting]
    found = [entry for entry in entries if isinstance(entry, Condition)]
    return bool(found) and all(entry.filter not in (None, "*") for entry in found)


def _lists(setting: Setting) -> Iterator[list[Any]]:
    """The gradients in a setting."""
    if isinstance(setting, list) and not any(isinstance(entry, Condition) for entry in setting):
        yield setting
    for entry in setting if isinstance(setting, list) else [setting]:
        if isinstance(entry, Condition) and isinstance(entry.value, list):
            yield entry.value


def _filters(setting: Setting) -> Iterator[str]:
    for entry in setting if isinstance(setting, list) else [setting]:
        if isinstance(entry, Condition) and entry.filter not in (None, "*"):
            yield str(entry.filter)


def _numbers(setting: Setting) -> list[float]:
    out: list[float] = []
    for value in values_of(setting):
        if isinstance(value, Range):
            out += [value.low, value.high]
        elif (found := number(value)) is not None:
            out.append(found)
    return out
