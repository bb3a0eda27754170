"""The merge engine: from a recipe to the tensors it describes, without ever holding a whole temporary model."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from optimizer.errors import InfeasibleCandidate, InvalidCheckpoint, InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import UNKNOWN_DIGEST, CalibrationId, Leaf, Recipe
from workers.checkpoints import Checkpoint, Factors
from workers.merging.blocks import blockwise, work_dtype
from workers.merging.cache import Cache, key_of
from workers.merging.facts import NodeFacts, Work
from workers.merging.low_rank import Terms, combine, expand
from workers.merging.nodes import Node, Row, compile_node
from workers.merging.operator import MergeMeasured, Numbers, Parameter, Whole
from workers.merging.plans import moved, placements, planned_layout
from workers.merging.supply import Source, Supply
from workers.naming import canonical_names
from workers.safetensors_header import DTYPES, FLOAT8, size_in_bytes

ROOM = 0.6
"""Share of a GPU's free memory, less one model, that the checkpoints' tensors may take to stay there; the rest is for
what evaluates the merged model."""

COMPILED = 8
"""Recipes whose compiled form is kept, so that asking for one parameter after another costs no more than for all."""


class Measurements(Protocol):
    """What calibration data say of models."""

    def check(self, calibration: Mapping[str, CalibrationId]) -> None:
        """Raise `InvalidInput` if a recipe was made with other data."""
        ...

    def get(self, model: str, tensor: TensorInfo, question: str) -> Numbers:
        """Return the answer to ``question`` (e.g. ``"fisher"``) for a parameter of the model of that name.

        Raises:
            InvalidInput: there are no calibration data for the model, or nothing answers that question.
        """
        ...

    def in_turn(self, models: Sequence[str], question: str, merge: MergeMeasured, key: str) -> Numbers:
        """Return all parameters, under their names, of a model that is merged from its input to its output.

        At each depth the models' own parameters stand in turn behind what is merged already, and are measured there on
        the model's data; then the merged ones take their place.

        Args:
            models: their names.
            question: what is measured.
            merge: merges one parameter.
            key: what ``merge`` does, for the cache; change it when that changes.

        Raises:
            InvalidInput: see `get`.
        """
        ...


@dataclass(frozen=True)
class _Target:
    """A `Placement` with its node compiled, and what is read for it."""

    target: TensorInfo
    source: TensorInfo
    node: Node | Leaf
    scale: float
    shift: float
    twin: str | None
    reads: tuple[Source, ...]


class MergeEngine:
    """Computes the parameters of recipes over a fixed set of checkpoints.

    The same recipe gives bit-identical tensors on the same machine, whatever the number of threads and whoever calls;
    safe to use from several threads. Digests in recipes must be those of the checkpoints: what is prepared is known by
    them.

    Memory on a CPU, besides the tensors that are filled: the checkpoints are mapped files, which all processes share and
    whose pages the system takes back, so their number does not count. A merge takes, at one time and for one parameter
    of n elements,

        blocks + 4 n · (merged nodes below the root, one more if a layer plan scales the result + LoRA experts
                        + the operator's own numbers for a whole tensor) + 2 n · (models stored in 8 bits)

    bytes (twice that in float64), where the blocks of an element-wise operator are a few times 4 MB. Prepared answers
    take at most `workers.merging.cache.MEMORY_BYTES`, and are mapped from the cache's directory where there is one. On a
    GPU the checkpoints' tensors take `ROOM` · (free memory − one model), and what does not fit streams through
    `workers.merging.supply.AHEAD`.

    Args:
        checkpoints: ``base`` and the experts by name.
        layout: what they share, from `workers.compatibility.inspect`.
        keep_on: a GPU on which the checkpoints' tensors stay after their first use, as many as fit.
        cache: where prepared numbers are kept; by default in memory.
        measurements: what calibration data say of the models, for operators that need any.

    Raises:
        InvalidCheckpoint: a checkpoint lacks a tensor of the layout.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        layout: Layout,
        *,
        keep_on: torch.device | None = None,
        cache: Cache | None = None,
        measurements: Measurements | None = None,
    ) -> None:
        self.measurements = measurements
        self.checkpoints = checkpoints
        self.layout = layout
        self._shared = {tensor.name: tensor for tensor in layout.shared}
        self.cache = cache or Cache()
        self.token = uuid.uuid4().hex
        self._raw = {name: _raw_names(checkpoint, layout) for name, checkpoint in checkpoints.items()}
        self.supply = Supply(checkpoints, keep_on, _room(keep_on, layout))
        self._compiled: OrderedDict[int, tuple[Recipe, dict[str, _Target]]] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def layout_key(self) -> str:
        """What the layout of the shared parameters is known by in the cache."""
        return key_of([[tensor.name, list(tensor.shape)] for tensor in self.layout.shared])

    def check(self, recipe: Recipe) -> None:
        """Raise `InvalidInput` if the recipe names unknown models or operators, or bad options or coefficients."""
        self._compile(recipe)

    def verify(self) -> None:
        """Raise `InputsChanged` if a file of the checkpoints was changed; see `Checkpoint.verify`.

        `apply` does this by itself; whoever calls `merged` does it before relying on the results.
        """
        for checkpoint in self.checkpoints.values():
            checkpoint.verify()

    def result_layout(self, recipe: Recipe) -> Layout:
        """Return the layout of the merged model: the engine's own, unless the recipe rearranges layers.

        Raises:
            InvalidInput: the plan cannot be carried out, see `workers.merging.plans.placements`.
        """
        return planned_layout(recipe, self.layout, self.checkpoints["base"].config)

    def merged(
        self,
        recipe: Recipe,
        tensor: TensorInfo,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return one shared parameter of the merged model as a new tensor.

        Args:
            recipe: the merged model.
            tensor: one of the shared parameters of `result_layout`.
            dtype: type of the result; the base's by default.
            device: where it is computed; the CPU by default.
        """
        out = torch.empty(tensor.shape, dtype=dtype or DTYPES[tensor.dtype], device=device or torch.device("cpu"))
        self._write(self._compile(recipe)[tensor.name], out)
        return out

    def apply(self, recipe: Recipe, targets: Mapping[str, Tensor]) -> None:
        """Compute all shared parameters in place.

        Args:
            recipe: the merged model.
            targets: for each shared parameter of `result_layout` the contiguous tensor to fill, of any type and on any
                device, by name. Parameters of repeated layers may be given one tensor in common.

        Raises:
            InvalidInput: see `check`; nothing was written.
            InfeasibleCandidate: an operator is not defined for the coefficients; the targets are in no defined state.
            InputsChanged: a checkpoint's file was changed; the targets are in no defined state.
        """
        compiled = self._compile(recipe)
        self.verify()
        entries = [entry for entry in compiled.values() if not _is_twin(entry, targets)]
        device = next(iter(targets.values())).device if targets else torch.device("cpu")
        with self.supply.following([entry.reads for entry in entries], device) as reached:
            for number, entry in enumerate(entries):
                reached(number)
                self._write(entry, targets[entry.target.name])
        self.verify()

    def source(self, model: str, tensor: TensorInfo, device: torch.device) -> Tensor:
        """Return a checkpoint's shared parameter on ``device``; on the CPU it is mapped from disk. Not to be written to.

        Numbers of 8 bits come as bfloat16, which has all of them: nothing computes with theirs.
        """
        raw = self._raw[model][tensor.name]
        factors = self.checkpoints[model].factors(raw)
        if factors is not None:
            base = self.source("base", tensor, device)
            return expand(base, factors.to(device)) if factors.rank else base
        found = self.supply.get((model, raw), device)
        return found.to(torch.bfloat16) if found.dtype in FLOAT8 else found

    def whole(self, node: Node, tensor: TensorInfo, work: Work, of: Sequence[int]) -> Whole:
        """Return a node's base (None where its operator does not use it) and some of its inputs, one whole parameter."""
        base = self._value(node.base, tensor, work) if node.operator.info.uses_base else None
        return base, tuple(self._input(node, number, base, tensor, work) for number in of)

    def wholes(self, node: Node, work: Work, of: Sequence[int]) -> Iterator[tuple[TensorInfo, Whole]]:
        """Yield all shared parameters of a node's base and some of its inputs, one at a time."""
        for tensor in self.layout.shared:
            yield tensor, self.whole(node, tensor, work.fresh(), of)

    def taken(self, leaf: Leaf, tensor: TensorInfo) -> TensorInfo:
        """Return which parameter of its model a leaf takes where ``tensor`` is merged."""
        return tensor if leaf.layer is None else moved(tensor, leaf.layer, self._shared)

    def factors(self, node: Node, number: int, tensor: TensorInfo, device: torch.device) -> Factors | None:
        """Return the low-rank factors of the difference between an input and a node's base, or None where it has none."""
        child, base = node.inputs[number], node.base
        if isinstance(base, Leaf) and isinstance(child, Leaf) and (base.model, base.layer) == ("base", child.layer):
            return self._factors(child, tensor, device)
        return None

    def _write(self, entry: _Target, out: Tensor) -> None:
        work = Work(out.device, work_dtype(out, torch.empty(0, dtype=DTYPES[entry.source.dtype])))
        try:
            if entry.scale == 1.0 and out.dtype not in FLOAT8:
                self._fill(entry.node, entry.source, out, work)
            else:
                _round(self._value(entry.node, entry.source, work), out, entry, work)
        except InfeasibleCandidate as error:
            message = f"{entry.target.name}: {error.message}"
            raise InfeasibleCandidate(message, field=error.field, remedy=error.remedy) from error

    def _fill(self, node: Node | Leaf, tensor: TensorInfo, out: Tensor, work: Work) -> None:
        if isinstance(node, Leaf):
            out.copy_(self._value(node, tensor, work))
            return
        stretches = node.stretches(tensor)
        if stretches[0][0] is None:
            self._fill(node.base, tensor, out, work)
            return
        facts = NodeFacts(self, node, tensor, work)
        if len(stretches) == 1 and self._fill_linear(node, node.rows[stretches[0][0]], tensor, out, work, facts):
            return
        base, inputs = self.whole(node, tensor, work, range(len(node.inputs)))
        if len(stretches) == 1:
            row = node.rows[stretches[0][0]]
            node.operator.merge(self._parameter(tensor, row, base, inputs, facts), out)
            return
        flat = [part.reshape(-1) if part is not None else None for part in (base, *inputs)]
        for number, begin, end in stretches:
            cut = [part[begin:end] if part is not None else None for part in flat]
            models = tuple(part for part in cut[1:] if part is not None)
            parameter = self._parameter(tensor, node.rows[number or 0], cut[0], models, facts, begin)
            node.operator.merge(parameter, out.view(-1)[begin:end])

    def _fill_linear(self, node: Node, row: Row, tensor: TensorInfo, out: Tensor, work: Work, facts: NodeFacts) -> bool:
        """Merge adapters without writing them out, where the operator allows it; returns whether that was done."""
        if not node.operator.linear:
            return False
        factors = [
            self._factors(child, tensor, work.device) if isinstance(child, Leaf) else None for child in node.inputs
        ]
        if not any(factors):
            return False
        unit = torch.eye(len(node.inputs) + 1, dtype=torch.float64)
        weights = torch.empty(len(unit), dtype=torch.float64)
        base = unit[0] if node.operator.info.uses_base else None
        node.operator.merge(self._parameter(tensor, row, base, tuple(unit[1:]), facts), weights)
        sources = [node.base, *(self._ancestor(*pair) for pair in zip(node.inputs, factors, strict=True))]
        terms = Terms()
        for source, weight in zip(sources, weights.tolist(), strict=True):
            if weight != 0.0:
                terms.add(self._value(source, tensor, work), weight)
        products = [(found, weight) for found, weight in zip(factors, weights[1:].tolist(), strict=True) if found]
        combine(out, terms.tensors, terms.weights, products)
        return True

    def _ancestor(self, child: Node | Leaf, factors: Factors | None) -> Node | Leaf:
        """What an input's factors are added to; the input itself where it has none."""
        return Leaf(model="base", layer=child.layer) if isinstance(child, Leaf) and factors is not None else child

    def _parameter(
        self,
        tensor: TensorInfo,
        row: Row,
        base: Tensor | None,
        models: tuple[Tensor, ...],
        facts: NodeFacts,
        begin: int = 0,
    ) -> Parameter:
        return Parameter(
            tensor, self.layout.layers, base, models, row.coefficients, row.options, facts, row.each, begin
        )

    def _value(self, node: Node | Leaf, tensor: TensorInfo, work: Work) -> Tensor:
        """A child's tensor; one that is itself merged stays in the work type, so that rounding happens once.

        What stands at several places below one parameter is read, expanded or merged once.
        """
        if isinstance(node, Leaf):
            tensor = self.taken(node, tensor)
        key = (node.model if isinstance(node, Leaf) else node.identity, tensor.name)
        if key not in work.values:
            work.values[key] = self._made(node, tensor, work)
        return work.values[key]

    def _made(self, node: Node | Leaf, tensor: TensorInfo, work: Work) -> Tensor:
        if isinstance(node, Leaf):
            return self.source(node.model, tensor, work.device)
        out = torch.empty(tensor.shape, dtype=work.dtype, device=work.device)
        self._fill(node, tensor, out, work)
        return out

    def _input(self, node: Node, number: int, base: Tensor | None, tensor: TensorInfo, work: Work) -> Tensor:
        """An input's tensor; the base's where the operator takes the difference between them from factors."""
        needs = base is not None and node.operator.info.needs == "factors"
        if needs and self.factors(node, number, tensor, work.device) is not None:
            return self._value(node.base, tensor, work)
        return self._value(node.inputs[number], tensor, work)

    def _factors(self, leaf: Leaf, tensor: TensorInfo, device: torch.device) -> Factors | None:
        found = self.checkpoints[leaf.model].factors(self._raw[leaf.model][self.taken(leaf, tensor).name])
        return found.to(device) if found is not None else None

    def _compile(self, recipe: Recipe) -> dict[str, _Target]:
        """The parameters of the merged model by name, in order; the last few recipes are remembered."""
        with self._lock:
            known = self._compiled.get(id(recipe))  # the entry keeps the recipe alive, so its number is its own
            if known is not None:
                return known[1]
        compiled = {entry.target.name: entry for entry in self._targets(recipe)}
        with self._lock:
            self._compiled[id(recipe)] = recipe, compiled
            while len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def _targets(self, recipe: Recipe) -> list[_Target]:
        unknown = sorted(recipe.used - set(self.checkpoints))
        if unknown:
            raise InvalidInput(
                f"the recipe names models that are not loaded: {', '.join(unknown)}",
                field="recipe.models",
                remedy=f"use: {', '.join(self.checkpoints)}",
            )
        if self.measurements is not None:
            self.measurements.check(recipe.calibration or {})
        known = recipe.identities
        digests = {
            name: known[name] if known[name] != UNKNOWN_DIGEST else f"{known[name]}:{name}" for name in recipe.used
        }
        compiled = {id(recipe.root): compile_node(recipe.root, "recipe.root", digests, self.layout)}
        for depth, planned in enumerate(recipe.layers or []):
            if planned.node is not None:
                field = f"recipe.layers.{depth}.node"
                compiled[id(planned.node)] = compile_node(planned.node, field, digests, self.layout)
        return [
            _Target(
                placement.target,
                placement.source,
                compiled[id(placement.node)],
                placement.scale,
                placement.shift,
                placement.twin,
                tuple(dict.fromkeys(self._reads(compiled[id(placement.node)], placement.source))),
            )
            for placement in placements(recipe, self.layout, self.checkpoints["base"].config)
        ]

    def _reads(self, node: Node | Leaf, tensor: TensorInfo) -> Iterator[Source]:
        """What is read for a parameter."""
        if isinstance(node, Leaf):
            name = self.taken(node, tensor).name
            adapted = self.checkpoints[node.model].factors(self._raw[node.model][name]) is not None
            model = "base" if adapted else node.model
            yield model, self._raw[model][name]
            return
        outside = node.stretches(tensor)[0][0] is None
        if outside or node.operator.info.uses_base:
            yield from self._reads(node.base, tensor)
        for child in () if outside else node.inputs:
            yield from self._reads(child, tensor)


def _is_twin(entry: _Target, targets: Mapping[str, Tensor]) -> bool:
    """Whether a parameter is the same tensor as one that is filled anyway."""
    return entry.twin is not None and targets[entry.twin] is targets[entry.target.name]


def _round(value: Tensor, out: Tensor, entry: _Target, work: Work) -> None:
    """Write scale · value + shift, rounded once."""

    def combine(blocks: list[Tensor], result: Tensor) -> None:
        torch.mul(blocks[0].to(result.dtype), entry.scale, out=result)
        if entry.shift:
            result.add_(entry.shift)

    if entry.scale == 1.0:
        out.copy_(value)
    else:
        blockwise(out, [value], combine, work.dtype)


def _room(device: torch.device | None, layout: Layout) -> int:
    """Bytes that the checkpoints' tensors may take on a GPU."""
    if device is None or device.type != "cuda":
        return 0
    model = sum(size_in_bytes(tensor.dtype, tensor.shape) for tensor in layout.tensors)
    return max(0, int(ROOM * (torch.cuda.mem_get_info(device)[0] - model)))


def _raw_names(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    names = canonical_names(checkpoint)
    for tensor in layout.shared:
        if tensor.name not in names or checkpoint.tensors[names[tensor.name]].shape != tensor.shape:
            raise InvalidCheckpoint(
                f"{checkpoint.name} has no tensor {tensor.name!r} of shape {list(tensor.shape)}",
                field="base" if checkpoint.name == "base" else "experts",
            )
    return {tensor.name: names[tensor.name] for tensor in layout.shared}
