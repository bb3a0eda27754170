"""The merge engine: from a recipe to the tensors it describes, without ever holding a whole temporary model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from optimizer.errors import InvalidCheckpoint, InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import Leaf, Merge, Recipe, leaves
from workers.checkpoints import Checkpoint
from workers.merging.blocks import work_dtype
from workers.merging.operator import OPERATORS, Operator, Options, make_options
from workers.naming import canonical_names
from workers.safetensors_header import DTYPES

ROOM = 0.6
"""Share of a GPU's free memory that the experts may take to stay there; the rest is for the merged model and its work."""


@dataclass(frozen=True)
class _Node:
    """A `Merge` whose operator and options were looked up."""

    merge: Merge
    operator: Operator
    options: Options
    base: _Node | str
    inputs: tuple[_Node | str, ...]


class MergeEngine:
    """Computes the parameters of recipes over a fixed set of checkpoints.

    The same recipe gives bit-identical tensors on the same machine, whatever the number of threads and whoever calls;
    safe to use from several threads.

    Args:
        checkpoints: ``base`` and the experts by name.
        layout: what they share, from `workers.compatibility.inspect`.
        keep_on: a GPU on which the checkpoints' tensors stay after their first use, if they fit into `ROOM` of its
            free memory together; else, and by default, every use copies one tensor at a time to where it is needed.

    Raises:
        InvalidCheckpoint: a checkpoint lacks a tensor of the layout.
    """

    def __init__(
        self, checkpoints: Mapping[str, Checkpoint], layout: Layout, *, keep_on: torch.device | None = None
    ) -> None:
        self.checkpoints = checkpoints
        self.layout = layout
        self._raw = {name: _raw_names(checkpoint, layout) for name, checkpoint in checkpoints.items()}
        self._keep_on = keep_on if keep_on is not None and self._fits(keep_on) else None
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._lock = Lock()

    def check(self, recipe: Recipe) -> None:
        """Raise `InvalidInput` if the recipe names unknown models or operators, or bad options or coefficients."""
        self._compile(recipe)

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
            tensor: one of the layout's shared parameters.
            dtype: type of the result; the base's by default.
            device: where it is computed; the CPU by default.
        """
        out = torch.empty(tensor.shape, dtype=dtype or DTYPES[tensor.dtype], device=device or torch.device("cpu"))
        self._fill(self._compile(recipe), tensor, out)
        return out

    def apply(self, recipe: Recipe, targets: Mapping[str, Tensor]) -> None:
        """Compute all shared parameters in place.

        Args:
            recipe: the merged model.
            targets: for each shared parameter's name the contiguous tensor to fill, of any type and on any device.

        Raises:
            InvalidInput: see `check`; nothing was written.
            InfeasibleCandidate: an operator is not defined for the coefficients; the targets are in no defined state.
        """
        root = self._compile(recipe)
        for tensor in self.layout.shared:
            self._fill(root, tensor, targets[tensor.name])

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

    def _fill(self, node: _Node | str, tensor: TensorInfo, out: Tensor) -> None:
        if isinstance(node, str):
            out.copy_(self.source(node, tensor, out.device))
            return
        row = node.merge.row(tensor)
        if row is None:
            self._fill(node.base, tensor, out)
            return
        base = self._value(node.base, tensor, out.device) if node.operator.info.uses_base else None
        inputs = [self._value(child, tensor, out.device) for child in node.inputs]
        node.operator.merge(base, inputs, row, node.options, out)

    def _value(self, node: _Node | str, tensor: TensorInfo, device: torch.device) -> Tensor:
        """A child's tensor; one that is itself merged stays in the work type, so that rounding happens once."""
        if isinstance(node, str):
            return self.source(node, tensor, device)
        like = torch.empty(0, dtype=DTYPES[tensor.dtype])
        out = torch.empty(tensor.shape, dtype=work_dtype(like), device=device)
        self._fill(node, tensor, out)
        return out

    def _compile(self, recipe: Recipe) -> _Node | str:
        unknown = sorted(leaves(recipe.root) - set(self.checkpoints))
        if unknown:
            raise InvalidInput(
                f"the recipe names models that are not loaded: {', '.join(unknown)}", field="recipe.models"
            )
        return _compile(recipe.root, "recipe.root")

    def _fits(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return False
        shared = sum(
            checkpoint.tensor(raw).nbytes
            for name, checkpoint in self.checkpoints.items()
            for raw in self._raw[name].values()
        )
        return shared <= ROOM * torch.cuda.mem_get_info(device)[0]


def _compile(node: Leaf | Merge, field: str) -> _Node | str:
    if isinstance(node, Leaf):
        return node.model
    entry = OPERATORS.find(node.operator, f"{field}.operator")
    wanted = 1 if entry.info.columns == "interpolation" else len(node.inputs)
    if len(node.coefficients[0]) != wanted:
        raise InvalidInput(
            f"{node.operator} takes {wanted} coefficients in each row, not {len(node.coefficients[0])}",
            field=f"{field}.coefficients",
        )
    if entry.info.columns == "interpolation" and len(node.inputs) != 2:
        raise InvalidInput(f"{node.operator} runs between two models, not {len(node.inputs)}", field=f"{field}.inputs")
    return _Node(
        node,
        entry,
        make_options(entry, node.options, f"{field}.options"),
        _compile(node.base, f"{field}.base"),
        tuple(_compile(child, f"{field}.inputs.{number}") for number, child in enumerate(node.inputs)),
    )


def _raw_names(checkpoint: Checkpoint, layout: Layout) -> dict[str, str]:
    names = canonical_names(checkpoint)
    for tensor in layout.shared:
        if tensor.name not in names or checkpoint.tensors[names[tensor.name]].shape != tensor.shape:
            raise InvalidCheckpoint(
                f"{checkpoint.name} has no tensor {tensor.name!r} of shape {list(tensor.shape)}",
                field="base" if checkpoint.name == "base" else "experts",
            )
    return {tensor.name: names[tensor.name] for tensor in layout.shared}
