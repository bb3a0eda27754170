"""The merge engine: from a recipe to the tensors it describes, without ever holding a whole temporary model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor

from optimizer.errors import InvalidCheckpoint, InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import UNKNOWN_DIGEST, Leaf, Recipe
from workers.checkpoints import Checkpoint, Factors
from workers.merging.blocks import work_dtype
from workers.merging.cache import Cache
from workers.merging.facts import NodeFacts
from workers.merging.nodes import Node, Row, compile_node
from workers.merging.operator import Numbers, Parameter, Whole
from workers.merging.plans import moved, placements
from workers.naming import canonical_names
from workers.safetensors_header import DTYPES

ROOM = 0.6
"""Share of a GPU's free memory that the experts may take to stay there; the rest is for the merged model and its work."""


class Measurements(Protocol):
    """What calibration data say of models."""

    def get(self, model: str, tensor: TensorInfo, question: str) -> Numbers:
        """Return the answer to ``question`` (e.g. ``"fisher"``) for a parameter of the model of that name.

        Raises:
            InvalidInput: there are no calibration data for the model, or nothing answers that question.
        """
        ...


@dataclass(frozen=True)
class _Target:
    """A `Placement` with its node compiled."""

    target: TensorInfo
    source: TensorInfo
    node: Node | Leaf
    scale: float


class MergeEngine:
    """Computes the parameters of recipes over a fixed set of checkpoints.

    The same recipe gives bit-identical tensors on the same machine, whatever the number of threads and whoever calls;
    safe to use from several threads.

    Args:
        checkpoints: ``base`` and the experts by name.
        layout: what they share, from `workers.compatibility.inspect`.
        keep_on: a GPU on which the checkpoints' tensors stay after their first use, if they fit into `ROOM` of its
            free memory together; else, and by default, every use copies one tensor at a time to where it is needed.
        cache: directory for prepared numbers that all workers of a machine share; by default they stay in memory.
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
        cache: Path | None = None,
        measurements: Measurements | None = None,
    ) -> None:
        self.measurements = measurements
        self.checkpoints = checkpoints
        self.layout = layout
        self.cache = Cache(cache)
        self._raw = {name: _raw_names(checkpoint, layout) for name, checkpoint in checkpoints.items()}
        self._keep_on = keep_on if keep_on is not None and self._fits(keep_on) else None
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._lock = Lock()

    def check(self, recipe: Recipe) -> None:
        """Raise `InvalidInput` if the recipe names unknown models or operators, or bad options or coefficients."""
        self._compile(recipe)

    def result_layout(self, recipe: Recipe) -> Layout:
        """Return the layout of the merged model: the engine's own, unless the recipe rearranges layers.

        Raises:
            InvalidInput: the plan names a layer that the models do not have.
        """
        if recipe.layers is None:
            return self.layout
        own = tuple(tensor for tensor in self.layout.tensors if tensor.role == "head")
        shared = tuple(placement.target for placement in placements(recipe, self.layout))
        return Layout(tuple(sorted((*own, *shared), key=lambda tensor: tensor.name)), len(recipe.layers))

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
        self._write(next(entry for entry in self._compile(recipe) if entry.target.name == tensor.name), out)
        return out

    def apply(self, recipe: Recipe, targets: Mapping[str, Tensor]) -> None:
        """Compute all shared parameters in place.

        Args:
            recipe: the merged model.
            targets: for each shared parameter of `result_layout` the contiguous tensor to fill, of any type and on any
                device, by name.

        Raises:
            InvalidInput: see `check`; nothing was written.
            InfeasibleCandidate: an operator is not defined for the coefficients; the targets are in no defined state.
        """
        for entry in self._compile(recipe):
            self._write(entry, targets[entry.target.name])

    def source(self, model: str, tensor: TensorInfo, device: torch.device) -> Tensor:
        """Return a checkpoint's shared parameter on ``device``; on the CPU it is mapped from disk. Not to be written to."""
        mapped = self.checkpoints[model].tensor(self._raw[model][tensor.name])
        if device.type == "cpu":
            return mapped
        if device != self._keep_on:
            return mapped.to(device)
        with self._lock:
            key = (model, tensor.name)
            if key not in self._kept:
                self._kept[key] = mapped.to(device)
            return self._kept[key]

    def whole(self, node: Node, tensor: TensorInfo, device: torch.device, of: Sequence[int]) -> Whole:
        """Return a node's base (None where its operator does not use it) and some of its inputs, one whole parameter."""
        base = self._value(node.base, tensor, device) if node.operator.info.uses_base else None
        return base, tuple(self._value(node.inputs[number], tensor, device) for number in of)

    def wholes(self, node: Node, device: torch.device, of: Sequence[int]) -> Iterator[tuple[TensorInfo, Whole]]:
        """Yield all shared parameters of a node's base and some of its inputs, one at a time."""
        for tensor in self.layout.shared:
            yield tensor, self.whole(node, tensor, device, of)

    def factors(self, leaf: Leaf, tensor: TensorInfo, device: torch.device) -> Factors | None:
        """Return the low-rank factors of a model's task vector, or None where it is no adapter's."""
        if leaf.layer is not None:
            tensor = moved(tensor, leaf.layer, self.layout)
        found = self.checkpoints[leaf.model].factors(self._raw[leaf.model][tensor.name])
        return Factors(found.up.to(device), found.down.to(device), found.scale) if found is not None else None

    def _write(self, entry: _Target, out: Tensor) -> None:
        if entry.scale == 1.0:
            self._fill(entry.node, entry.source, out)
        else:
            out.copy_(self._value(entry.node, entry.source, out.device).to(work_dtype(out)) * entry.scale)

    def _fill(self, node: Node | Leaf, tensor: TensorInfo, out: Tensor) -> None:
        if isinstance(node, Leaf):
            out.copy_(self._leaf(node, tensor, out.device))
            return
        stretches = list(node.stretches(tensor))
        if stretches == [(None, 0, None)]:
            self._fill(node.base, tensor, out)
            return
        base, inputs = self.whole(node, tensor, out.device, range(len(node.inputs)))
        facts = NodeFacts(self, node, tensor, out.device)
        if len(stretches) == 1:
            row = node.rows[stretches[0][0] or 0]
            node.operator.merge(self._parameter(tensor, row, base, inputs, facts), out)
            return
        flat = [part.reshape(-1) if part is not None else None for part in (base, *inputs)]
        for number, begin, end in stretches:
            cut = [part[begin:end] if part is not None else None for part in flat]
            models = tuple(part for part in cut[1:] if part is not None)
            parameter = self._parameter(tensor, node.rows[number or 0], cut[0], models, facts, begin)
            node.operator.merge(parameter, out.view(-1)[begin:end])

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

    def _value(self, node: Node | Leaf, tensor: TensorInfo, device: torch.device) -> Tensor:
        """A child's tensor; one that is itself merged stays in the work type, so that rounding happens once."""
        if isinstance(node, Leaf):
            return self._leaf(node, tensor, device)
        like = torch.empty(0, dtype=DTYPES[tensor.dtype])
        out = torch.empty(tensor.shape, dtype=work_dtype(like), device=device)
        self._fill(node, tensor, out)
        return out

    def _leaf(self, leaf: Leaf, tensor: TensorInfo, device: torch.device) -> Tensor:
        if leaf.layer is not None:
            tensor = moved(tensor, leaf.layer, self.layout)
        return self.source(leaf.model, tensor, device)

    def _compile(self, recipe: Recipe) -> list[_Target]:
        unknown = sorted(recipe.used - set(self.checkpoints))
        if unknown:
            raise InvalidInput(
                f"the recipe names models that are not loaded: {', '.join(unknown)}",
                field="recipe.models",
                remedy=f"use: {', '.join(self.checkpoints)}",
            )
        digests = {name: self._digest(recipe, name) for name in recipe.used}
        root = compile_node(recipe.root, "recipe.root", digests, self.layout)
        compiled: dict[int, Node | Leaf] = {id(recipe.root): root}
        for depth, planned in enumerate(recipe.layers or []):
            if planned.node is not None:
                field = f"recipe.layers.{depth}.node"
                compiled[id(planned.node)] = compile_node(planned.node, field, digests, self.layout)
        return [
            _Target(placement.target, placement.source, compiled[id(placement.node)], placement.scale)
            for placement in placements(recipe, self.layout)
        ]

    def _digest(self, recipe: Recipe, name: str) -> str:
        known = recipe.identities[name]
        return known if known != UNKNOWN_DIGEST else f"{UNKNOWN_DIGEST}:{name}"

    def _fits(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        shared = sum(
            checkpoint.tensor(raw).nbytes
            for name, checkpoint in self.checkpoints.items()
            for raw in self._raw[name].values()
        )
        return shared <= ROOM * torch.cuda.mem_get_info(device)[0]


def _raw_names(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    names = canonical_names(checkpoint)
    for tensor in layout.shared:
        if tensor.name not in names or checkpoint.tensors[names[tensor.name]].shape != tensor.shape:
            raise InvalidCheckpoint(
                f"{checkpoint.name} has no tensor {tensor.name!r} of shape {list(tensor.shape)}",
                field="base" if checkpoint.name == "base" else "experts",
            )
    return {tensor.name: names[tensor.name] for tensor in layout.shared}
