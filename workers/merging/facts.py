"""What operators ask beside the tensors themselves: prepared numbers, seeds, low-rank factors, measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimizer.errors import InvalidInput
from optimizer.geometry import TensorInfo
from optimizer.recipe import Leaf, canonical_json
from optimizer.spec import Scalar
from workers.checkpoints import Factors
from workers.merging.cache import key_of
from workers.merging.nodes import Node, identity, lasting
from workers.merging.operator import MergeMeasured, Numbers, Settings, Whole
from workers.system import give_back

if TYPE_CHECKING:
    from workers.merging.engine import Measurements, MergeEngine

LARGE = 1 << 16
"""Elements of a parameter from which on memory that was needed for an answer about it is given back at once."""


@dataclass(frozen=True)
class Work:
    """The computation of one parameter.

    Attributes:
        device: where it takes place.
        dtype: type of the arithmetic, and of what is merged on the way.
        values: what was read, expanded or merged below the parameter, by model or node and parameter.
    """

    device: torch.device
    dtype: torch.dtype
    values: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def fresh(self) -> Work:
        """Return the same for another parameter."""
        return Work(self.device, self.dtype)


class NodeFacts:
    """Implements `workers.merging.operator.Facts` for one node of a recipe and one parameter.

    Args:
        engine: which computes it.
        node: whose operator asks.
        tensor: the parameter.
        work: where and in which type it is computed; answers are on its device.
    """

    def __init__(self, engine: MergeEngine, node: Node, tensor: TensorInfo, work: Work) -> None:
        self._engine = engine
        self._node = node
        self._tensor = tensor
        self._work = work

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
        return self._ask(key, of, lambda: compute(self._engine.whole(self._node, self._tensor, self._work, of)))

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
        key = [question, self._engine.layout_key, self._identities(of), dict(settings or {})]
        return self._ask(key, of, lambda: compute(_Wholes(self._engine, self._node, self._work, of)))

    def of_tensors(
        self,
        question: str,
        compute: Callable[[TensorInfo, Whole], Numbers],
        *,
        of: Sequence[int] | None = None,
        settings: Settings | None = None,
    ) -> Iterator[tuple[TensorInfo, Numbers]]:
        """See `Facts`."""
        for tensor in self._engine.layout.shared:
            facts = NodeFacts(self._engine, self._node, tensor, self._work.fresh())
            yield tensor, facts.of_tensor(question, partial(compute, tensor), of=of, settings=settings)

    def seed(self, number: int, settings: Mapping[str, Scalar] | None = None) -> int:
        """See `Facts`."""
        own = identity(self._node.inputs[number], self._node.digests)
        text = canonical_json([own, self._tensor.name, dict(settings or {})])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")

    def behind(self, number: int) -> NodeFacts | None:
        """See `Facts`."""
        child = self._node.inputs[number]
        return NodeFacts(self._engine, child, self._tensor, self._work.fresh()) if isinstance(child, Node) else None

    def factors(self, number: int) -> Factors | None:
        """See `Facts`."""
        return self._engine.factors(self._node, number, self._tensor, self._work.device)

    def measured(self, number: int, question: str) -> Numbers:
        """See `Facts`."""
        leaf = self._checkpoint(number)
        found = self._measurements.get(leaf.model, self._engine.taken(leaf, self._tensor), question)
        return {name: tensor.to(self._work.device) for name, tensor in found.items()}

    def merged_in_turn(
        self, question: str, merge: MergeMeasured, settings: Mapping[str, Scalar] | None = None
    ) -> Tensor:
        """See `Facts`."""
        leaves = [self._checkpoint(number) for number in range(len(self._node.inputs))]
        if any(leaf.layer is not None for leaf in leaves):
            raise InvalidInput(
                f"{self._node.merge.operator} merges whole models, so it cannot take one of their layers",
                field="recipe",
                remedy="leave `layer` out of its inputs",
            )
        key = key_of([self._node.merge.operator, dict(settings or {})])
        found = self._measurements.in_turn([leaf.model for leaf in leaves], question, merge, key)
        return found[self._tensor.name].to(self._work.device)

    @property
    def _measurements(self) -> Measurements:
        if self._engine.measurements is None:
            raise InvalidInput(
                f"{self._node.merge.operator} needs data to measure the models on",
                field="merge.calibration",
                remedy="name calibration data for the models that it measures",
            )
        return self._engine.measurements

    def _checkpoint(self, number: int) -> Leaf:
        """An input (-1: the base) that must be a model as it is."""
        child = self._node.base if number < 0 else self._node.inputs[number]
        if not isinstance(child, Leaf):
            raise InvalidInput(
                f"{self._node.merge.operator} measures models on data, so its inputs cannot be merges themselves",
                field="recipe",
                remedy="apply it to the models first, and other operators to its result",
            )
        return child

    def _inputs(self, of: Sequence[int] | None) -> tuple[int, ...]:
        return tuple(range(len(self._node.inputs)) if of is None else of)

    def _identities(self, of: Sequence[int]) -> list[str]:
        children = [
            *([self._node.base] if self._node.operator.info.uses_base else []),
            *(self._node.inputs[n] for n in of),
        ]
        return [identity(child, self._node.digests) for child in children]

    def _ask(self, key: list[Any], of: Sequence[int], compute: Callable[[], Numbers]) -> Numbers:
        node = self._node
        keep = all(lasting(node.inputs[number], node.digests) for number in of) and (
            not node.operator.info.uses_base or lasting(node.base, node.digests)
        )
        # An answer may differ in its last bits between a CPU and a GPU, and with the type of the arithmetic.
        whole = key_of([*key, str(self._work.dtype), self._work.device.type, *([] if keep else [self._engine.token])])
        found = self._engine.cache.get(whole, partial(self._tidily, compute), keep)
        return {name: self._placed((whole, name), tensor) for name, tensor in found.items()}

    def _tidily(self, compute: Callable[[], Numbers]) -> Numbers:
        found = compute()
        if prod(self._tensor.shape) >= LARGE and self._work.device.type == "cpu":
            give_back()
        return found

    def _placed(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        device = self._work.device
        return tensor if tensor.device == device else self._engine.supply.place(key, lambda: tensor, device)


class _Wholes:
    """All shared parameters of a node; may be iterated over several times."""

    def __init__(self, engine: MergeEngine, node: Node, work: Work, of: Sequence[int]) -> None:
        self._arguments = (node, work, of)
        self._engine = engine

    def __iter__(self) -> Iterator[tuple[TensorInfo, Whole]]:
        return self._engine.wholes(*self._arguments)
