"""A measure written in Python: a function of an installed package, which the server's policy must name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, packages_distributions
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.errors import InfeasibleCandidate, InvalidInput, MergeoptError, from_validation
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction, Strict
from workers.data import Rows
from workers.evaluators.base import Cancelled, Evaluator, Inputs, Scores, evaluator, inference, never
from workers.evaluators.loading import load_image_processor, load_tokenizer
from workers.functions import ATTRIBUTE
from workers.policy import Policy


class Declaration(Strict):
    """What a function says about itself; see `workers.functions.measure`."""

    metrics: dict[str, Direction] = Field(min_length=1, max_length=100)
    aggregate: bool = False
    auto_class: str = Field(default="AutoModelForCausalLM", pattern=r"^AutoModel\w*$")


@evaluator("python")
class PythonFunction(Evaluator):
    """Each row is an item, scored by a function of the user's; `workers.functions` says what it gets and returns.

    Bad results (other metrics than declared, other lengths, no numbers) and exceptions are this candidate's failure, and
    name the objective and the function. ``digest`` holds, beside the rows, the version of the function's package and the
    content of its module, so that no score of an older function is taken for one of a newer one.
    """

    summary: ClassVar[str] = "What a Python function of yours says: one of an installed package that the server allows."
    metrics: Mapping[str, Direction] = {}  # the function's
    columns: ClassVar[dict[str, str]] = {}
    auto_class: str = "AutoModelForCausalLM"  # type: ignore[misc]  # the function's
    uses_head: ClassVar[bool] = False

    class Options(Evaluator.Options):
        """Options of a Python function."""

        function: str = Field(
            default="",
            max_length=500,
            description="The function, as `package.module:function`; one of the server's `entry_points`.",
            examples=["my_package.measures:politeness"],
        )
        arguments: dict[str, Any] = Field(
            default={}, max_length=64, description="More arguments of the function, by name."
        )

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, dataclasses.replace(inputs, rows=_renamed(inputs.rows)))
        self._where = f"{inputs.field}.options.function"
        self._function = _find(options.function, inputs.policy, self._where)
        declared = _declaration(self._function, options.function, self._where)
        self.metrics = declared.metrics
        self.auto_class = declared.auto_class
        self._aggregate = declared.aggregate
        self._items = 1 if declared.aggregate else len(inputs.rows)
        self.digest = sha256(f"{self._inputs.rows.digest} {_identity(self._function)}".encode()).hexdigest()
        self._parameters = self._bind(inputs)

    def subset(self, items: Sequence[int]) -> Self:
        """See `Evaluator.subset`; a function without scores of single rows has one item, which is all rows."""
        return self if self._aggregate else super().subset(items)

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a model of the class that the function declares."""
        _check(cancelled)
        # The function may change the rows that it gets, and nobody else's.
        given = {"model": model, "rows": [dict(row) for row in self._inputs.rows.items], "cancelled": cancelled}
        arguments = {name: given.get(name, value) for name, value in self._parameters.items()}
        name = self.options.function
        with inference(model), _counted(model) as tokens:
            try:
                found = self._function(**arguments)
            except (MergeoptError, torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except Exception as error:  # the user's own code raises anything
                raise InfeasibleCandidate(
                    f"{name} raised {type(error).__name__}: {str(error)[:1000]}", field=self._where
                ) from error
        _check(cancelled)  # what a function returns when it is called off is nothing
        return self.scored(self._scores(found), tokens.count)

    def _scores(self, found: Any) -> dict[str, ItemScores]:
        if not isinstance(found, Mapping):
            raise self._bad(f"it returned {type(found).__name__}, not a dictionary of scores by metric")
        if set(found) != set(self.metrics):
            raise self._bad(f"it returned the metrics {_names(found)}, but declares {_names(self.metrics)}")
        return {metric: self._item_scores(metric, found[metric]) for metric in self.metrics}

    def _item_scores(self, metric: str, found: Any) -> ItemScores:
        pair = isinstance(found, tuple) and len(found) == 2
        values = self._array(f"{metric!r}", found[0] if pair else found)
        weights = self._array(f"the weights of {metric!r}", found[1]) if pair else None
        if weights is not None and not (np.isfinite(weights) & (weights > 0)).all():
            raise self._bad(f"the weights of {metric!r} must be positive numbers")
        return ItemScores(values, weights)

    def _array(self, what: str, found: Any) -> NDArray[np.float32]:
        if isinstance(found, Tensor):
            found = found.detach().double().cpu().numpy()
        try:
            values = np.asarray(found)
            values = np.stack([np.asarray(part) for part in found]) if values.dtype == object else values
        except Exception as error:  # ragged lists, objects of the user's
            raise self._bad(f"{what} is no array of numbers") from error
        if values.dtype.kind not in "biuf":
            raise self._bad(f"{what} is no array of numbers")
        values = values.reshape(1) if self._aggregate and values.ndim == 0 else values
        if values.shape != (len(self),):
            wanted = "one number" if self._aggregate else f"shape ({len(self)},), one number for each row"
            hint = " (declare it with aggregate=True to return one number)" if values.ndim == 0 else ""
            raise self._bad(f"{what} has shape {values.shape}, but must be {wanted}{hint}")
        with np.errstate(over="ignore"):
            return values.astype(np.float32)

    def _bad(self, message: str) -> InfeasibleCandidate:
        return InfeasibleCandidate(f"{self.options.function}: {message}", field=self._where)

    def _bind(self, inputs: Inputs) -> dict[str, Any]:
        """The function's arguments, those apart that change with each call."""
        lent = _Lent(inputs, self.options.batch_size)
        own: dict[str, Any] = dict(self.options.arguments)
        field = f"{inputs.field}.options.arguments"
        out: dict[str, Any] = {}
        for name, parameter in inspect.signature(self._function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                out |= {key: own.pop(key) for key in list(own) if key not in _Lent.NAMES}
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise InvalidInput(
                    f"{self.options.function} has the parameter {parameter}, which cannot be given by name",
                    field=self._where,
                    remedy="give all its parameters names",
                )
            elif name in _Lent.NAMES:
                out[name] = lent.get(name)
            elif name in own:
                out[name] = own.pop(name)
            elif parameter.default is parameter.empty:
                raise InvalidInput(
                    f"{self.options.function} needs the argument {name!r}",
                    field=f"{field}.{name}",
                    remedy="give a value",
                )
        if own:
            raise InvalidInput(
                f"{self.options.function} takes no argument {next(iter(own))!r}",
                field=f"{field}.{next(iter(own))}",
                remedy=f"it takes: {', '.join(inspect.signature(self._function).parameters)}",
            )
        return out


class _Lent:
    """What a function may ask for by name."""

    NAMES = ("model", "rows", "tokenizer", "processor", "batch_size", "cancelled")

    def __init__(self, inputs: Inputs, batch_size: int) -> None:
        self._inputs = inputs
        self._batch_size = batch_size

    def get(self, name: str) -> Any:
        """Return what it is; None where every call has its own."""
        if name == "tokenizer":
            return self.tokenizer
        if name == "processor":
            return load_image_processor(self._inputs.model_dir, self._inputs.field)
        return self._batch_size if name == "batch_size" else None

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return load_tokenizer(self._inputs.model_dir, self._inputs.field)


class _Tokens:
    """Counts the tokens that a model reads."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Look at the inputs of a forward pass; a pass over images or embeddings reads none."""
        ids = named.get("input_ids", positional[0] if positional else None)
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            return
        mask = named.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.shape == ids.shape
        self.count += int(mask.sum()) if isinstance(mask, Tensor) and padded else ids.numel()


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[_Tokens]:
    tokens = _Tokens()
    handle = model.register_forward_pre_hook(tokens, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise Cancelled("the evaluation was called off")


def _renamed(rows: Rows) -> Rows:
    """Rows with each mapped column under its role's name as well."""
    if not rows.columns:
        return rows
    items = [{**row, **{role: row.get(name) for role, name in rows.columns.items()}} for row in rows.items]
    return dataclasses.replace(
        rows,
        items=items,
        columns={},
        digest=sha256(f"{rows.digest} {sorted(rows.columns.items())}".encode()).hexdigest(),
    )


def _find(name: str, policy: Policy, field: str) -> Callable[..., Any]:
    """Import the function, if the server allows it; nothing is imported before."""
    if name not in policy.entry_points or not name:
        raise InvalidInput(
            f"the server does not allow the function {name!r}" if name else "no function is named",
            field=field,
            remedy=f"use one of: {', '.join(policy.entry_points) or 'none'}; the server's `entry_points` setting names them",
        )
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module's own code raises
        raise InvalidInput(
            f"{name!r} cannot be imported: {type(error).__name__}: {error}",
            field=field,
            remedy="install its package with the server and all workers",
        ) from error
    if not callable(found):
        raise InvalidInput(f"{name!r} is no function", field=field, remedy="name a function")
    return found


def _declaration(function: Callable[..., Any], name: str, field: str) -> Declaration:
    try:
        declared = Declaration.model_validate(getattr(function, ATTRIBUTE, {}))
    except ValidationError as error:
        problem = from_validation(error)
        raise InvalidInput(
            f"{name!r} does not declare its metrics: {problem}",
            field=field,
            remedy="decorate it: @measure({'accuracy': 'maximise'})",
        ) from error
    if not hasattr(transformers, declared.auto_class):
        raise InvalidInput(
            f"{name!r} declares the class {declared.auto_class!r}, which transformers does not have",
            field=field,
            remedy="use one such as AutoModelForCausalLM",
        )
    return declared


def _identity(function: Callable[..., Any]) -> str:
    """The version of the function's package, and a hash of the module that it is in."""
    module = sys.modules[function.__module__]
    package = function.__module__.partition(".")[0]
    path = getattr(module, "__file__", None)
    source = Path(path).read_bytes() if path else b""
    return f"{function.__module__}:{function.__qualname__} {_version(package)} {sha256(source).hexdigest()}"


@lru_cache(maxsize=64)
def _version(package: str) -> str:
    """The versions of what installed a top-level package; nothing where that is not known."""
    try:
        return version_of(package)  # most packages are called as what they bring, and looking at all of them takes long
    except PackageNotFoundError:
        found = packages_distributions().get(package, ())
        return " ".join(f"{name}=={version_of(name)}" for name in sorted(set(found)))


def _names(metrics: Mapping[Any, Any]) -> str:
    return ", ".join(sorted(map(str, metrics))) or "none"
