"""Calibration: running items through models to learn what their parameters do, once for each model and data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.errors import InputsChanged, InvalidInput
from optimizer.geometry import Layout, Position, TensorInfo
from optimizer.recipe import CalibrationId, Recipe
from optimizer.spec import Calibration
from workers.alignment import content_of
from workers.checkpoints import Checkpoint
from workers.data import load_rows
from workers.evaluators.base import Evaluator, Inputs, find_evaluator
from workers.merging.cache import Cache, key_of
from workers.merging.calibration_statistics import measure, norm
from workers.merging.engine import MergeEngine
from workers.merging.operator import MergeMeasured, Numbers
from workers.merging.resident import ResidentModels
from workers.roots import Roots

FIELD = "merge.calibration"
ITEMS = 256
"""Items that are used where the data spec has no limit."""
ROOM = 4 << 30
"""Bytes of sums that are kept at once; models that need more are run through their items several times."""
_VERSION = 1  # of the answers' definitions, which outlive a release

KINDS = ("fisher", "gram", "activation", "axis")
Part = dict[str, TensorInfo]


@dataclass(frozen=True)
class Items:
    """The items that one model is measured on.

    Attributes:
        spec: where they come from.
        evaluator: which reads them, one at a time.
        head: expert whose head the model gets; None for the base's.
    """

    spec: Calibration
    evaluator: Evaluator
    head: str | None

    @property
    def id(self) -> CalibrationId:
        """What recipes say of them."""
        return CalibrationId(spec=self.spec, digest=self.evaluator.digest)


def load_items(
    calibration: Mapping[str, Calibration], checkpoints: Mapping[str, Checkpoint], layout: Layout, roots: Roots
) -> dict[str, Items]:
    """Load, check and tokenise calibration data.

    Args:
        calibration: by model, as a spec's ``merge.calibration`` or a recipe has it.
        checkpoints: ``base`` and the experts by name.
        layout: what they share.
        roots: where data may be.

    Raises:
        InvalidInput: unknown model, evaluator, option or data, each under ``merge.calibration``; or it is not said whose
            head to use.
    """
    return {name: _load(name, spec, checkpoints, layout, roots) for name, spec in calibration.items()}


def load_measurements(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    layout: Layout,
    roots: Roots,
    *,
    cache: Cache | None = None,
    device: torch.device | None = None,
) -> Calibrations:
    """Return what calibration data say of a recipe's models, to rebuild it.

    Args:
        recipe: names its data and their digests.
        checkpoints, layout, cache, device: see `Calibrations`.
        roots: where the data may be.

    Raises:
        InvalidInput: see `load_items`.
        InputsChanged: the data are not those that the recipe was made with.
    """
    known = recipe.calibration or {}
    items = load_items({name: found.spec for name, found in known.items()}, checkpoints, layout, roots)
    check_items(items, known)
    return Calibrations(checkpoints, layout, items, cache=cache, device=device)


def check_items(items: Mapping[str, Items], expected: Mapping[str, CalibrationId]) -> None:
    """Raise `InputsChanged` unless the items are those that a job or a recipe was made with."""
    for name, known in expected.items():
        if name not in items or items[name].evaluator.digest != known.digest:
            raise InputsChanged(
                f"the calibration data of {name!r} are not those that it began with",
                field=f"{FIELD}.{name}.data",
                remedy="restore the data; other items give other weights",
            )


def _load(name: str, spec: Calibration, checkpoints: Mapping[str, Checkpoint], layout: Layout, roots: Roots) -> Items:
    field = f"{FIELD}.{name}"
    _check_name(name, list(checkpoints), field)
    experts = [known for known in checkpoints if known != "base"]
    if spec.head is not None:
        _check_name(spec.head, experts, f"{field}.head")
    cls, options = find_evaluator(spec.evaluator, spec.options, field)
    if name == "base" and spec.head is None and cls.uses_head and len(layout.shared) < len(layout.tensors):
        raise InvalidInput(
            "the base has no head of its own, so its calibration must name whose it uses",
            field=f"{field}.head",
            remedy=f"use one of: {', '.join(experts)}",
        )
    data = spec.data if spec.data.limit is not None else spec.data.model_copy(update={"limit": ITEMS})
    rows = load_rows(data, roots.path(spec.data.path, f"{field}.data.path"), f"{field}.data")
    # One at a time: in a batch the shorter items are padded, and what stands in the padding would be measured too.
    one = options.model_copy(update={"batch_size": 1})
    head = spec.head or (name if name != "base" else None)
    inputs = Inputs(rows, checkpoints[head or "base"].path, field, roots.policy)
    return Items(spec, cls(one, inputs), head)


def _check_name(name: str, known: Sequence[str], field: str) -> None:
    if name not in known:
        raise InvalidInput(f"the job has no model {name!r}", field=field, remedy=f"use one of: {', '.join(known)}")


class Calibrations:
    """What calibration data say of a job's models; implements `workers.merging.engine.Measurements`.

    Models are run in float32 (float64 where they are stored so), whatever the job's type, so that the same recipe gives
    the same weights everywhere, to the rounding of the hardware. Answers are kept by the content of model, head and
    items. While they are computed they take at most `ROOM` at once, besides the one model; kept they take, for each
    model that is measured:

    - Fisher information: as much as the model in float32;
    - Gram matrices: (in × in) numbers for each linear layer; 28 GB for a Llama of 7 B parameters.

    Safe to use from several threads.

    Args:
        checkpoints: ``base`` and the experts by name.
        layout: what they share.
        items: by model, from `load_items`.
        cache: of the answers; by default they stay in memory, all of them.
        device: where the models are run.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        layout: Layout,
        items: Mapping[str, Items],
        *,
        cache: Cache | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._layout = layout
        self._items = items
        self._device = device or torch.device("cpu")
        # In memory an answer that is dropped would be computed again for the next parameter.
        self._cache = cache or Cache(memory_bytes=sys.maxsize)
        self._engine = MergeEngine(checkpoints, layout)
        self._identities: dict[str, str] = {}
        self._parts = {True: _portions(layout.shared, _fisher_size), False: _portions(layout.shared, _gram_size)}

    def check(self, calibration: Mapping[str, CalibrationId]) -> None:
        """See `workers.merging.engine.Measurements.check`."""
        for name, known in calibration.items():
            if name not in self._items or _meaning(self._items[name].id) != _meaning(known):
                raise InvalidInput(
                    f"the recipe measured {name!r} on other data",
                    field=f"recipe.calibration.{name}",
                    remedy="use the data it was made with, or leave `calibration` out to use the job's",
                )

    def get(self, model: str, tensor: TensorInfo, question: str) -> Numbers:
        """See `workers.merging.engine.Measurements.get`.

        Answers are described at `workers.merging.calibration_statistics.Question`. That of a ``fisher…`` also has
        ``norm``, the Euclidean norm of the whole model's.
        """
        fisher = question.startswith("fisher")
        part = next(part for part in self._parts[fisher] if tensor.name in part)
        found = self._part(model, question, part)
        answer = {kind: found[f"{kind}:{tensor.name}"] for kind in KINDS if f"{kind}:{tensor.name}" in found}
        return {**answer, **self._norm(model, question)} if fisher else answer

    def identity(self, model: str) -> str:
        """Return what answers about a model depend on: its weights, its head, the items, and how they are read."""
        if model not in self._identities:
            if model not in self._items:
                raise missing(model)
            items = self._items[model]
            head = items.head or "base"
            data = {
                "version": _VERSION,
                "model": content_of(model, self._checkpoints),
                "head": content_of(head, self._checkpoints),
                "items": items.evaluator.digest,
                "evaluator": items.evaluator.name,
                "options": items.evaluator.options.model_dump(mode="json", exclude={"batch_size"}),
                "columns": items.spec.data.columns,
                "layout": [[tensor.name, list(tensor.shape)] for tensor in self._layout.shared],
                "device": self._device.type,
            }
            self._identities[model] = key_of(data)
        return self._identities[model]

    def in_turn(self, models: Sequence[str], question: str, merge: MergeMeasured, key: str) -> Numbers:
        """See `workers.merging.engine.Measurements.in_turn`.

        Each position costs a pass of every model's items through the whole model. Takes two models in float32, and the
        answers of one position for every model.
        """
        whole = key_of([[self.identity(model) for model in models], question, key])
        return self._cache.get(whole, lambda: self._in_turn(models, question, merge), True)

    def _in_turn(self, models: Sequence[str], question: str, merge: MergeMeasured) -> Numbers:
        bench = self._bench()
        merged: dict[str, Tensor] = {}
        positions: list[Position] = ["input", *range(self._layout.layers), "output"]
        for position in positions:
            tensors = [tensor for tensor in self._layout.shared if tensor.position == position]
            answers = []
            for model in models:
                bench.put(model, tensors)
                answers.append(bench.measure(question, self._items[model], tensors, self._seed(model, question)))
            for tensor in tensors:
                sources = tuple(self._engine.source(model, tensor, self._device) for model in models)
                found = tuple(answer.get(tensor.name, {}) for answer in answers)
                merged[tensor.name] = merge(sources, found).to(_dtype(self._layout)).contiguous()
            bench.replace(merged, tensors)
        return {name: tensor.cpu() for name, tensor in merged.items()}

    def _part(self, model: str, question: str, part: Part) -> Numbers:
        key = key_of([self.identity(model), question, list(part)])
        return self._cache.get(key, lambda: self._measure(model, question, part), True)

    def _measure(self, model: str, question: str, part: Part) -> Numbers:
        bench = self._bench()
        bench.put(model, self._layout.shared)
        found = bench.measure(question, self._items[model], list(part.values()), self._seed(model, question))
        return {f"{kind}:{name}": tensor.cpu() for name, numbers in found.items() for kind, tensor in numbers.items()}

    def _norm(self, model: str, question: str) -> Numbers:
        key = key_of([self.identity(model), question, "norm"])

        def compute() -> Numbers:
            parts = (self._part(model, question, part) for part in self._parts[True])
            return {
                "norm": torch.tensor(norm(tensor for part in parts for tensor in part.values()), dtype=torch.float64)
            }

        return self._cache.get(key, compute, True)

    def _seed(self, model: str, question: str) -> int:
        return int(key_of([self.identity(model), question])[:16], 16)

    def _bench(self) -> _Bench:
        return _Bench(self._checkpoints, self._layout, self._engine, self._device)


def missing(model: str, operator: str = "the operator") -> InvalidInput:
    """Return the error about a model without calibration data."""
    return InvalidInput(
        f"{operator} measures {model!r} on data, but none are named",
        field=f"{FIELD}.{model}",
        remedy=f"name them: merge.calibration.{model} = {{evaluator, data}}",
    )


def _dtype(layout: Layout) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == "F64" for tensor in layout.shared) else torch.float32


def _meaning(calibration: CalibrationId) -> list[Any]:
    spec = calibration.spec
    return [calibration.digest, spec.evaluator, spec.options, spec.data.columns, spec.head]


class _Bench:
    """One model whose tensors are exchanged and that is run on items."""

    def __init__(
        self, checkpoints: Mapping[str, Checkpoint], layout: Layout, engine: MergeEngine, device: torch.device
    ) -> None:
        self._engine = engine
        self._device = device
        with torch.inference_mode(False):
            self._models = ResidentModels(checkpoints, layout, engine, device, _dtype(layout))

    def put(self, model: str, tensors: Sequence[TensorInfo]) -> None:
        """Take some parameters from a checkpoint."""
        self.replace({tensor.name: self._engine.source(model, tensor, self._device) for tensor in tensors}, tensors)

    def replace(self, values: Mapping[str, Tensor], tensors: Sequence[TensorInfo]) -> None:
        """Take some parameters from ``values``."""
        with torch.inference_mode(False):
            for tensor in tensors:
                self._models.shared[tensor.name].copy_(values[tensor.name])
            self._models.refresh()

    def measure(self, question: str, items: Items, tensors: Sequence[TensorInfo], seed: int) -> dict[str, Numbers]:
        """Answer a question about some parameters, see `measure`."""
        with torch.inference_mode(False):
            model = self._models.model(items.head, items.evaluator.auto_class)
            places = {
                self._models.shared[tensor.name].data_ptr(): tensor.name for tensor in tensors if prod(tensor.shape)
            }
            found: dict[str, nn.Parameter] = {}
            for parameter in model.parameters():
                if parameter.data_ptr() in places:
                    found[places[parameter.data_ptr()]] = parameter
            return measure(question, model, items.evaluator, found, seed)


def _portions(tensors: Sequence[TensorInfo], size: Callable[[TensorInfo], int]) -> list[Part]:
    """Cut parameters into those that are measured together: at most `ROOM` bytes, a single larger one by itself."""
    out: list[Part] = [{}]
    total = 0
    for tensor in tensors:
        if out[-1] and total + size(tensor) > ROOM:
            out.append({})
            total = 0
        out[-1][tensor.name] = tensor
        total += size(tensor)
    return out


def _fisher_size(tensor: TensorInfo) -> int:
    return 8 * prod(tensor.shape)  # the sum, and an item's gradient


def _gram_size(tensor: TensorInfo) -> int:
    return 4 * tensor.shape[1] ** 2 if len(tensor.shape) == 2 and tensor.kind != "embeddings" else 0
