"""Tables: merged models as coefficients of the job's models that are constant between break points.

Every linear merge is one, whatever the chain of operators that made it, and so is every SLERP of two of them along one
angle: its weights are two numbers. The angle comes from the models' inner products over ranges (`GramSums`), so no
weight is ever read, and a model of any size is a few KB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InvalidInput
from optimizer.geometry import Cuts, Layout, ModuleKind
from optimizer.problem import Grams, Problem
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.space import Genome, JobSpace
from optimizer.spec import ChoiceVariable, JobSpec, RangeVariable

Positions = NDArray[np.int64]
Matrix = NDArray[np.float64]

FAMILY = ("linear", "task_arithmetic")
"""Operators whose merges are tables."""

_SMALLEST_SUM = 1e-8  # as in the operator `linear`


@dataclass(frozen=True)
class Table:
    """A linear combination of models, constant between break points of the flat vector (`Layout.flat`).

    Attributes:
        breaks: shape (rows - 1,), ascending, inside the vector: row k holds from ``breaks[k-1]`` up to ``breaks[k]``.
        coefficients: shape (rows, models), factors of the models' weights; a row need not sum to 1.
    """

    breaks: Positions
    coefficients: Matrix

    @classmethod
    def constant(cls, row: Sequence[float]) -> Table:
        """The same coefficients everywhere."""
        return cls(np.empty(0, np.int64), np.array([row], dtype=np.float64))

    @classmethod
    def decode(cls, genome: Genome, models: int, size: int) -> Table:
        """Read a genome of `encode`; raises `InvalidInput` for one that is no table of ``models`` over ``size`` elements."""
        rows = genome[0] if genome.ndim == 1 and genome.size else 0.0
        if not (rows >= 1 and rows == int(rows) and genome.size == int(rows) * (1 + models)):
            raise _no_table(f"its length {genome.size} is not rows · (1 + {models}), with the number of rows in front")
        count = int(rows)
        if not np.isfinite(genome).all():
            raise _no_table("it has numbers that are not finite")
        places = genome[1:count]
        breaks = places.astype(np.int64)
        ascending = (np.diff(breaks) > 0).all() and (count == 1 or (breaks[0] > 0 and breaks[-1] < size))
        if not ascending or (breaks != places).any():
            raise _no_table(f"its break points do not ascend from 1 to at most {size - 1}")
        return cls(breaks, genome[count:].reshape(count, models))

    def encode(self) -> Genome:
        """Return it as one vector: the number of rows, the break points, then the coefficients row by row."""
        return np.concatenate([[len(self.coefficients)], self.breaks, self.coefficients.ravel()])

    def rows(self, breaks: Positions) -> Matrix:
        """Return the coefficients between finer break points (its own among them), shape (len(breaks) + 1, models)."""
        if len(breaks) == len(self.breaks):
            return self.coefficients
        begins = np.concatenate([[0], breaks])
        return self.coefficients[np.searchsorted(self.breaks, begins, side="right")]

    def simplified(self) -> Table:
        """Return it with equal neighbouring rows as one."""
        differ = (self.coefficients[1:] != self.coefficients[:-1]).any(axis=1)
        if differ.all():
            return self
        return Table(self.breaks[differ], self.coefficients[np.concatenate([[True], differ])])

    def replaced(self, ranges: Sequence[tuple[int, int]], row: Sequence[float], size: int) -> Table:
        """Return it with the coefficients ``row`` on the ranges (begin, end) of a vector of ``size`` elements."""
        ends = [place for pair in ranges for place in pair if 0 < place < size]
        breaks = np.union1d(self.breaks, np.array(ends, dtype=np.int64))
        rows = self.rows(breaks).copy()
        begins = np.concatenate([[0], breaks])
        for begin, end in ranges:
            rows[(begins >= begin) & (begins < end)] = row
        return Table(breaks, rows).simplified()


def _no_table(why: str) -> InvalidInput:
    return InvalidInput(f"the genome is no table: {why}", field="genome", remedy="give a recipe instead")


def shared_breaks(a: Table, b: Table, *more: int) -> Positions:
    """Return all break points of two tables, and some ``more``, in order."""
    return np.unique(np.concatenate([a.breaks, b.breaks, np.array(more, dtype=np.int64)]))


# --- recipes ------------------------------------------------------------------------------------------------------------


def linear_table(recipe: Recipe, layout: Layout, models: Sequence[str] | None = None) -> Table | None:
    """Return the table that gives the same weights as ``recipe``; None where there is none.

    Models as they are, merges of the operators `linear` and `task_arithmetic`, and chains of these have one.

    Args:
        recipe: any.
        layout: of its models.
        models: the columns, by default the recipe's models in order; None is returned if it is made from others.
    """
    columns = tuple(recipe.models if models is None else models)
    if recipe.layers is not None or not recipe.used <= set(columns):
        return None
    found = _table(recipe.root, layout, columns)
    return None if found is None else found.simplified()


def _table(node: Leaf | Merge, layout: Layout, columns: tuple[str, ...]) -> Table | None:
    if isinstance(node, Leaf):
        return None if node.layer is not None else Table.constant([float(name == node.model) for name in columns])
    weights = _weights(node)
    stretches = _stretches(node, layout)
    children = [_table(child, layout, columns) for child in (node.base, *node.inputs)]
    tables = [child for child in children if child is not None]
    if weights is None or stretches is None or len(tables) < len(children):
        return None
    places, rows = stretches
    own = Table(places, weights[rows])
    breaks = np.unique(np.concatenate([own.breaks, *(table.breaks for table in tables)]))
    parts = zip(own.rows(breaks).T, tables, strict=True)
    total = sum((weight[:, None] * table.rows(breaks) for weight, table in parts), np.zeros(1))
    return Table(breaks, np.asarray(total))


def _weights(node: Merge) -> Matrix | None:
    """What base and inputs count in each row, and last in no group, shape (rows + 1, inputs + 1); None if not linear."""
    given = np.array(node.coefficients, dtype=np.float64)
    if node.operator not in FAMILY or node.tables or not set(node.options) <= {"normalise"}:
        return None
    if given.shape[1] != len(node.inputs):
        return None
    sums = given.sum(axis=1, keepdims=True)
    if node.operator == "task_arithmetic":
        rows = np.hstack([1 - sums, given])
    else:
        if node.options.get("normalise", True):
            if (np.abs(sums) < _SMALLEST_SUM).any():
                return None
            given = given / sums
        rows = np.hstack([np.zeros_like(sums), given])
    return np.vstack([rows, np.eye(1, rows.shape[1])])


def _stretches(node: Merge, layout: Layout) -> tuple[Positions, NDArray[np.intp]] | None:
    """Break points of a node, and the row that holds between them (-1 in no group)."""
    if node.breaks is not None:
        inside = not node.breaks or node.breaks[-1] < layout.size
        return (np.array(node.breaks, np.int64), np.arange(len(node.breaks) + 1)) if inside else None
    places, rows = group_rows(node.groups or [], layout)
    new = np.concatenate([[True], rows[1:] != rows[:-1]])
    return places[new][1:], rows[new]


def group_rows(groups: Sequence[Selector], layout: Layout) -> tuple[Positions, NDArray[np.intp]]:
    """Return where each parameter that is not empty begins in the flat vector, and its first group (-1: in none)."""
    offsets = layout.offsets()
    tensors = [tensor for tensor in layout.flat if 0 not in tensor.shape]
    rows = [next((number for number, group in enumerate(groups) if group.matches(tensor)), -1) for tensor in tensors]
    return np.array([offsets[tensor.name] for tensor in tensors], np.int64), np.array(rows, np.intp)


def near(table: Table, groups: Sequence[Selector], layout: Layout) -> Matrix:
    """Return the mean coefficients in each group, weighted by the number of parameters, shape (groups, models).

    The merge with these is the nearest one that is constant in each group, were all parameters of one size. A
    parameter counts in the first group that contains it.
    """
    places, rows = group_rows(groups, layout)
    begins = np.concatenate([[0], table.breaks])
    widths = np.diff([*begins, layout.size])
    before = np.vstack([np.zeros(table.coefficients.shape[1]), np.cumsum(widths[:, None] * table.coefficients, axis=0)])

    def up_to(at: Positions) -> Matrix:
        row = np.searchsorted(table.breaks, at, side="right")
        return np.asarray(before[row] + (at - begins[row])[:, None] * table.coefficients[row])

    ends = np.append(places[1:], layout.size)
    sums = up_to(ends) - up_to(places)
    out = np.zeros((len(groups), table.coefficients.shape[1]))
    sizes = np.zeros(len(groups))
    chosen = rows >= 0
    np.add.at(out, rows[chosen], sums[chosen])
    np.add.at(sizes, rows[chosen], (ends - places)[chosen])
    return np.asarray(out / np.maximum(sizes, 1)[:, None])


# --- geometry -----------------------------------------------------------------------------------------------------------


def cut_edges(layout: Layout, cuts: Cuts) -> list[int]:
    """Return where ranges of the flat vector begin and end: 0, …, its size; for "parameters" those of the tensors."""
    edges, position = [0], None
    offsets = layout.offsets()
    for tensor in layout.flat:
        if cuts != "layers" or tensor.position != position:
            edges.append(offsets[tensor.name])
        position = tensor.position
    return sorted({*edges, layout.size})


class GramSums:
    """Inner products of tables, from those of the models over ranges.

    Exact where the tables' break points are edges of the ranges; a break within a range counts as if the inner products
    grew evenly over it.
    """

    def __init__(self, grams: Grams) -> None:
        self.edges: Positions = np.array(grams.edges, np.int64)
        products = grams.products
        sums = np.cumsum(products.astype(np.longdouble), axis=0)
        self._before: Matrix = np.concatenate([np.zeros_like(products[:1]), sums.astype(np.float64)])

    def angle(self, a: Table, b: Table) -> float:
        """Return the angle between two tables as whole flat vectors, 0 to π; 0 if one of them is zero.

        Kahan's form, 2 atan2(‖u − v‖, ‖u + v‖) of the unit vectors, keeps its digits near 0, where arccos loses half.
        """
        breaks = shared_breaks(a, b)
        products = self._between(breaks)
        first, second = a.rows(breaks), b.rows(breaks)
        norms = _length(first, products), _length(second, products)
        if not (min(norms) > 0 and np.isfinite(max(norms))):
            return 0.0
        u, v = first / norms[0], second / norms[1]
        return float(2 * np.arctan2(_length(u - v, products), _length(u + v, products)))

    def _between(self, breaks: Positions) -> Matrix:
        """The models' inner products between break points, shape (len(breaks) + 1, models, models)."""
        place = np.searchsorted(self.edges, breaks, side="right") - 1
        inside = self._before[place]
        beyond = breaks - self.edges[place]
        if beyond.any():
            share = beyond / (self.edges[place + 1] - self.edges[place])
            inside = inside + share[:, None, None] * (self._before[place + 1] - inside)
        return np.diff(np.concatenate([self._before[:1], inside, self._before[-1:]]), axis=0)


def _length(rows: Matrix, products: Matrix) -> float:
    squares = np.matmul(rows[:, None, :], products)[:, 0, :] * rows
    return float(np.sqrt(max(squares.sum(), 0.0)))


# --- the search space ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableSpace(JobSpace):
    """All tables over a job's models. Genomes have no fixed length, see `Table.encode`; there are no variables.

    Attributes:
        frozen: kinds of modules that stay as the base has them.
    """

    frozen: tuple[ModuleKind, ...] = ()

    @cached_property
    def models(self) -> tuple[str, ...]:
        """The columns of the tables: the base and the experts."""
        return tuple(self.problem.models)

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return self.problem.layout.size

    @cached_property
    def _kept(self) -> list[tuple[int, int]]:
        """Ranges of the flat vector that stay the base's."""
        offsets = self.problem.layout.offsets()
        ends = dict(zip(offsets, [*list(offsets.values())[1:], self.size], strict=True))
        kept = [tensor.name for tensor in self.problem.layout.flat if tensor.kind in self.frozen]
        return [(offsets[name], ends[name]) for name in kept]

    def table(self, genome: Genome) -> Table:
        """Read a genome; raises `InvalidInput`."""
        return Table.decode(genome, len(self.models), self.size)

    def clip(self, genome: Genome) -> Genome:
        """Return the genome with what is frozen as the base has it; coefficients have no bounds."""
        return self._frozen(self.table(genome)).encode() if self._kept else genome

    def recipe(self, genome: Genome) -> Recipe:
        """Decode a genome: one linear merge, without the models that it does not use."""
        table = self._frozen(self.table(genome)).simplified()
        used = [number for number, column in enumerate(table.coefficients.T) if column.any()] or [0]
        root = Merge(
            operator="linear",
            options={"normalise": False},
            base=Leaf(model="base"),
            inputs=[Leaf(model=self.models[number]) for number in used],
            breaks=table.breaks.tolist(),
            coefficients=table.coefficients[:, used].tolist(),
        )
        return Recipe(models=self.problem.models, root=root, calibration=self.problem.calibration or None)

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: models alone, and every merge that `linear_table` can read."""
        table = linear_table(recipe, self.problem.layout, self.models)
        return None if table is None else self._frozen(table).encode()

    def alone(self, model: str) -> Genome:
        """Return the table that is a model as it is (the base where it is frozen)."""
        return self._frozen(Table.constant([float(name == model) for name in self.models])).encode()

    def uniform(self) -> Genome:
        """Return the mean of the experts."""
        share = 1.0 / max(1, len(self.models) - 1)
        return self._frozen(Table.constant([0.0 if name == "base" else share for name in self.models])).encode()

    def _frozen(self, table: Table) -> Table:
        if not self._kept:
            return table
        return table.replaced(self._kept, [float(name == "base") for name in self.models], self.size)


def make_table_space(spec: JobSpec, problem: Problem) -> TableSpace:
    """Make the space of tables for a job that merges linearly; granularity and bounds mean nothing to it.

    Raises:
        InvalidInput: the job merges in another way.
    """
    merge = spec.merge
    if merge.space is not None:
        raise _no_tables("the job has a search space of another form", "merge.space")
    if problem.operator.name not in FAMILY:
        raise _no_tables(f"{problem.operator.name} is no linear merge", "merge.operator")
    if merge.modifiers:
        raise _no_tables("modified experts are no linear merge", "merge.modifiers")
    for name, value in merge.options.items():
        if isinstance(value, RangeVariable | ChoiceVariable):
            raise _no_tables(f"{name} is a variable of the search", f"merge.options.{name}")
    if all(tensor.kind in merge.frozen for tensor in problem.layout.shared):
        raise InvalidInput("every module kind is frozen", field="merge.frozen", remedy="leave something to merge")
    return TableSpace(variables=(), problem=problem, frozen=tuple(merge.frozen))


def _no_tables(why: str, field: str) -> InvalidInput:
    return InvalidInput(
        f"{why}, so its candidates are no tables of coefficients",
        field=field,
        remedy=f"merge with {' or '.join(FAMILY)} alone, or set the algorithm's option `representation` to `coefficients`",
    )
