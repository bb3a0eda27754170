"""What operators ask beside the tensors themselves: prepared numbers, seeds, low-rank factors, measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from optimizer.errors import InvalidInput
from optimizer.geometry import TensorInfo
from optimizer.recipe import Leaf, canonical_json
from optimizer.spec import Scalar
from workers.checkpoints import Factors
from workers.merging.cache import key_of
from workers.merging.nodes import Node, identity, lasting
from workers.merging.operator import Numbers, Whole

if TYPE_CHECKING:
    from workers.merging.engine import MergeEngine

Settings = Mapping[str, Scalar | Sequence[float]]


class NodeFacts:
    """Implements `workers.merging.operator.Facts` for one node of a recipe and one parameter.

    Args:
        engine: which computes it.
        node: whose operator asks.
        tensor: the parameter.
        device: where the arithmetic is done, and answers are returned.
    """

    def __init__(self, engine: MergeEngine, node: Node, tensor: TensorInfo, device: torch.device) -> None:
        self._engine = engine
        self._node = node
        self._tensor = tensor
        self._device = device

    def of_tensor(
        self,
        question: str,
        compute: Callable[[Whole], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Numbers:
        """See `Facts`."""
        of = self._inputs(of)
        key = [question, self._tensor.name, self._identities(of), dict(settings or {})]
        return self._ask(key, of, lambda: compute(self._engine.whole(self._node, self._tensor, self._device, of)))

    def of_model(
        self,
        question: str,
        compute: Callable[[Iterable[tuple[TensorInfo, Whole]]], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Numbers:
        """See `Facts`."""
        of = self._inputs(of)
        key = [question, self._shared_names(), self._identities(of), dict(settings or {})]
        return self._ask(key, of, lambda: compute(_Wholes(self._engine, self._node, self._device, of)))

    def seed(self, number: int, settings: Mapping[str, Scalar] | None = None) -> int:
        """See `Facts`."""
        own = identity(self._node.inputs[number], self._node.digests)
        text = canonical_json([own, self._tensor.name, dict(settings or {})])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def factors(self, number: int) -> Factors | None:
        """See `Facts`."""
        child = self._node.inputs[number]
        return self._engine.factors(child, self._tensor, self._device) if isinstance(child, Leaf) else None

    def measured(self, number: int, question: str) -> Numbers:
        """See `Facts`."""
        child = self._node.base if number < 0 else self._node.inputs[number]
        if not isinstance(child, Leaf):
            raise InvalidInput(
                f"{self._node.merge.operator} measures models on data, so its inputs cannot be merges themselves",
                field="recipe",
                remedy="apply it to the models first, and other operators to its result",
            )
        if self._engine.measurements is None:
            raise InvalidInput(
                f"{self._node.merge.operator} needs data to measure the models on",
                field="merge.calibration",
                remedy="name calibration data for the base and every expert",
            )
        return self._engine.measurements.get(child.model, self._tensor, question)

    def _inputs(self, of: Sequence[int] | None) -> tuple[int, ...]:
        return tuple(range(len(self._node.inputs)) if of is None else of)

    def _identities(self, of: Sequence[int]) -> list[str]:
        children = [
            *([self._node.base] if self._node.operator.info.uses_base else []),
            *(self._node.inputs[n] for n in of),
        ]
        return [identity(child, self._node.digests) for child in children]

    def _shared_names(self) -> str:
        return key_of([[tensor.name, list(tensor.shape)] for tensor in self._engine.layout.shared])

    def _ask(self, key: list[Any], of: Sequence[int], compute: Callable[[], Numbers]) -> Numbers:
        node = self._node
        keep = all(lasting(node.inputs[number], node.digests) for number in of) and (
            not node.operator.info.uses_base or lasting(node.base, node.digests)
        )
        found = self._engine.cache.get(key_of([*key, self._device.type]), compute, keep)
        return {name: tensor.to(self._device) for name, tensor in found.items()}


class _Wholes:
    """All shared parameters of a node; may be iterated over several times."""

    def __init__(self, engine: MergeEngine, node: Node, device: torch.device, of: Sequence[int]) -> None:
        self._arguments = (node, device, of)
        self._engine = engine

    def __iter__(self) -> Any:
        return self._engine.wholes(*self._arguments)
