"""Chains of merges: what Frank-Wolfe merging walks through where its merge function is no weighted sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InvalidInput
from optimizer.problem import OperatorInfo, Problem
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.space import Genome, JobSpace, MergeSpace, SearchSpace, make_merge_space
from optimizer.spec import JobSpec
from optimizer.tables import FAMILY, linear_table, near

Matrix = NDArray[np.float64]
Node = Leaf | Merge

_TABLE = -1
_SAME = 1e-12


@dataclass(frozen=True)
class Step:
    """One merge of a chain.

    Attributes:
        models: what is merged into the model so far, K numbers: 0 the base, 1 … the experts, one more the merge of all.
        weights: shape (groups, K): by how much.
    """

    models: tuple[int, ...]
    weights: Matrix


@dataclass(frozen=True)
class Chain:
    """A start and the merges after it.

    Attributes:
        start: a model as in `Step.models`, or the coefficients of the experts' task vectors, shape (groups, experts).
        steps: in order.
    """

    start: int | Matrix
    steps: tuple[Step, ...] = ()

    def encode(self) -> Genome:
        """Return it as one vector: the start's number (-1 and the coefficients for a table), then for each step K, the
        models and the weights."""
        start = [float(self.start)] if isinstance(self.start, int) else [float(_TABLE), *self.start.ravel().tolist()]
        parts = [[float(len(step.models)), *step.models, *step.weights.ravel().tolist()] for step in self.steps]
        return np.array([number for part in [start, *parts] for number in part])

    @classmethod
    def decode(cls, genome: Genome, groups: int, experts: int) -> Chain:
        """Read a genome; raises `InvalidInput` where it is none of `encode`."""
        numbers = _Numbers(genome)
        first = numbers.whole(_TABLE, experts + 1)
        start: int | Matrix = first
        if first == _TABLE:
            start = numbers.take(groups * experts).reshape(groups, experts)
        steps = []
        while not numbers.done:
            count = numbers.whole(1, experts + 2)
            models = tuple(numbers.whole(0, experts + 1) for _ in range(count))
            steps.append(Step(models, numbers.take(groups * count).reshape(groups, count)))
        return cls(start, tuple(steps))


class _Numbers:
    """Reads a genome from its beginning."""

    def __init__(self, genome: Genome) -> None:
        self._genome = genome
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at >= self._genome.size

    def take(self, count: int) -> Matrix:
        found = self._genome[self._at : self._at + count]
        if found.size < count or not np.isfinite(found).all():
            raise _no_chain(f"it lacks {count} numbers at place {self._at}")
        self._at += count
        return found

    def whole(self, low: int, high: int) -> int:
        value = float(self.take(1)[0])
        if value != round(value) or not low <= value <= high:
            raise _no_chain(f"{value:g} at place {self._at - 1} is no whole number from {low} to {high}")
        return int(value)


def _no_chain(why: str) -> InvalidInput:
    return InvalidInput(f"the genome is no chain of merges: {why}", field="genome", remedy="give a recipe instead")


@dataclass(frozen=True)
class ChainSpace(JobSpace):
    """Chains θ ← Merge(θ, chosen models) by the job's operator, of any length.

    How the operator is applied to the model so far, θ, and what is merged into it with weights w in each group, in sum a:

    - with coefficients for each expert: θ is its base, the models its inputs, the coefficients w; where it has an option
      ``scale``, w/a with the scale a, for some of these operators divide by the sum of their coefficients.
    - averages, which have no base: θ is one more input, with the coefficient 1 − a.
    - with one scale: θ is its base, the models' average with weights w/a its input, and a the scale.
    - interpolations: from θ towards that average by a.

    Attributes:
        merge: the job's space of coefficients, whose uniform merge is the merge of all experts.
    """

    merge: MergeSpace

    @property
    def groups(self) -> tuple[Selector, ...]:
        """The coefficient groups."""
        return self.merge.groups

    @cached_property
    def experts(self) -> list[str]:
        """Names of the experts."""
        return [name for name in self.problem.models if name != "base"]

    def clip(self, genome: Genome) -> Genome:
        """Return it as it is: chains have no bounds."""
        return genome

    def recipe(self, genome: Genome) -> Recipe:
        """See `JobSpace.recipe`."""
        chain = Chain.decode(genome, len(self.groups), len(self.experts))
        node = self._model(chain.start) if isinstance(chain.start, int) else self._sum(chain.start)
        for step in chain.steps:
            node = self._merged(node, step)
        return Recipe(models=self.problem.models, root=node, calibration=self.problem.calibration or None)

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: models alone, the merge of all, and weighted sums with one coefficient a group."""
        if recipe.layers is not None:
            return None
        if isinstance(recipe.root, Leaf) and recipe.root.layer is None and recipe.root.model in self.problem.models:
            return Chain(list(self.problem.models).index(recipe.root.model)).encode()
        if recipe.root == self._whole:
            return self.uniform()
        genome = self.near(recipe)
        return genome if genome is not None and self._same(recipe, self.recipe(genome)) else None

    def near(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.near`: the nearest weighted sum with one coefficient a group; None for chains."""
        layout = self.problem.layout
        table = linear_table(recipe, layout, list(self.problem.models))
        return None if table is None else Chain(near(table, self.groups, layout)[:, 1:]).encode()

    def uniform(self) -> Genome:
        """Return the merge of all experts by the job's operator."""
        return Chain(len(self.experts) + 1).encode()

    def _same(self, a: Recipe, b: Recipe) -> bool:
        tables = [linear_table(recipe, self.problem.layout, list(self.problem.models)) for recipe in (a, b)]
        one, two = tables
        if one is None or two is None or not np.array_equal(one.breaks, two.breaks):
            return False
        return bool(np.allclose(one.coefficients, two.coefficients, rtol=0, atol=_SAME))

    @cached_property
    def _whole(self) -> Merge:
        root = self.merge.recipe(self.merge.uniform()).root
        assert isinstance(root, Merge)  # noqa: S101 - there are no modifiers
        return root

    def _model(self, number: int) -> Node:
        names = ["base", *self.experts]
        return Leaf(model=names[number]) if number < len(names) else self._whole

    def _sum(self, table: Matrix) -> Node:
        """The base and a weighted sum of task vectors."""
        return Merge(
            operator="task_arithmetic",
            base=Leaf(model="base"),
            inputs=[Leaf(model=name) for name in self.experts],
            groups=list(self.groups),
            coefficients=table.tolist(),
        )

    def _merged(self, node: Node, step: Step) -> Merge:
        info = self.problem.operator
        amounts = step.weights.sum(axis=1)
        shares = np.divide(step.weights, amounts[:, None], where=amounts[:, None] != 0, out=np.zeros_like(step.weights))
        shares[amounts == 0, 0] = 1.0
        models = [self._model(number) for number in step.models]
        options, tables = dict(self._whole.options), self._tables(step.models)
        base: Node = node
        if averages(info):
            base, models = Leaf(model="base"), [node, *models]
            table = np.column_stack([1 - amounts, step.weights])
            tables = {name: [[*rows[:1], *rows] if len(rows) > 1 else rows for rows in t] for name, t in tables.items()}
        elif info.columns == "per_expert":
            table = step.weights
            if "scale" in info.options_schema.get("properties", {}):
                own = tables.pop("scale", [[float(options.pop("scale", 1.0))]] * len(amounts))
                tables["scale"] = [[float(row[0] * amount)] for row, amount in zip(own, amounts, strict=True)]
                table = shares
        else:
            table = amounts[:, None]
            average = models[0] if len(models) == 1 else self._average(models, shares)
            interpolates = info.columns == "interpolation"
            base, models = (Leaf(model="base"), [node, average]) if interpolates else (node, [average])
        return Merge(
            operator=info.name,
            options=options,
            base=base,
            inputs=models,
            groups=list(self.groups),
            coefficients=table.tolist(),
            tables=tables or None,
        )

    def _average(self, models: list[Node], shares: Matrix) -> Merge:
        return Merge(
            operator="linear",
            base=Leaf(model="base"),
            inputs=models,
            groups=list(self.groups),
            coefficients=shares.tolist(),
        )

    def _tables(self, models: Sequence[int]) -> dict[str, list[list[float]]]:
        """The operator's options that differ, for these inputs; what is no expert has the experts' mean."""
        single = self.problem.operator.columns != "per_expert"

        def chosen(row: list[float]) -> list[float]:
            if len(row) == 1:
                return row
            mean = float(np.mean(row))
            values = [row[number - 1] if 1 <= number <= len(row) else mean for number in models]
            return [float(np.mean(values))] if single else values

        return {name: [chosen(row) for row in table] for name, table in (self._whole.tables or {}).items()}


def averages(info: OperatorInfo) -> bool:
    """Whether an operator's coefficients say which part of the result each input is."""
    normalise = info.options_schema.get("properties", {}).get("normalise", {})
    whole = normalise.get("type") == "boolean" and bool(normalise.get("default"))
    return info.columns == "per_expert" and (not info.uses_base or whole)


def collapses(space: SearchSpace) -> bool:
    """Whether Frank-Wolfe iterates over a job's space are points of it: weighted sums of experts."""
    return isinstance(space, MergeSpace) and space.problem.operator.name in FAMILY and not isinstance(space, ChainSpace)


def make_chain_space(spec: JobSpec, problem: Problem) -> ChainSpace:
    """Make the space of chains by a job's operator.

    Raises:
        InvalidInput: the operator cannot merge one model into a merged one, or the job modifies models.
    """
    obstacle = next(_obstacles(spec, problem.operator), None)
    if obstacle is not None:
        raise obstacle
    return ChainSpace((), problem, make_merge_space(spec, problem))


def _obstacles(spec: JobSpec, info: OperatorInfo) -> Iterator[InvalidInput]:
    remedy = "use another operator, such as task_arithmetic or ties, or another algorithm"
    if info.needs != "weights":
        yield InvalidInput(
            f"{info.name} needs {info.needs} of every model, and a Frank-Wolfe iterate has none",
            field="merge.operator",
            remedy=remedy,
        )
    if info.min_experts > 1:
        yield InvalidInput(
            f"{info.name} cannot merge a single model into another one, as Frank-Wolfe steps do",
            field="merge.operator",
            remedy=remedy,
        )
    if spec.merge.modifiers:
        yield InvalidInput(
            f"Frank-Wolfe steps of {info.name} have no place for modifiers",
            field="merge.modifiers",
            remedy="leave them out, or use task_arithmetic",
        )
