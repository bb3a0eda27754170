"""What Frank-Wolfe walks through: weights in groups, vertices to move towards, and what it measures along the way.

Axes of arrays: parts (groups of parameters, or coordinates of a box, each of which may choose a vertex of its own),
vertices, and columns (of coefficients). A *derivative* towards a vertex v at θ is ⟨∇, v − θ⟩, part by part; those that
could not be measured are infinite, so that nothing moves there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.frank_wolfe_space import Chain, ChainSpace, Step, collapses
from optimizer.space import Genome, JobSpace, MergeSpace, SearchSpace

Array = NDArray[np.float64]
Choice = NDArray[np.int64]

_INSIDE = 1e-12


@dataclass(frozen=True)
class Point:
    """Where the walk is.

    Attributes:
        genome: shape (dim,).
        active: shape (parts, vertices): the convex combination of vertices that it is, where the domain knows it.
    """

    genome: Genome
    active: Array | None = None


@dataclass(frozen=True)
class Probe:
    """A point near another one.

    Attributes:
        genome: shape (dim,).
        label: for the user.
        place: (part, vertex or column) whose derivative it measures; the part is -1 where all move together.
        step: how far it lies in that direction, which may be negative.
    """

    genome: Genome
    label: str
    place: tuple[int, int]
    step: float


class Domain(ABC):
    """Parts and vertices, and how to move towards the latter.

    Attributes:
        parts: number of parts.
        labels: names of the vertices, after `begin`.
        box: whether it is only a box, which stands for nothing: then a walk that is over begins elsewhere.
    """

    parts: int
    labels: tuple[str, ...] = ()
    box: bool = False

    @abstractmethod
    def begin(self, genome: Genome) -> Point:
        """Begin at a genome, which becomes a vertex itself where the method has it so."""

    @abstractmethod
    def recorded(self, point: Point, genome: Genome) -> Point:
        """Return the point as it was recorded, which counts."""

    @abstractmethod
    def mix(self, point: Point, choice: Choice, weights: Array) -> Point:
        """Return θ + Σ_k w_k (v_k − θ), part by part, by the merge function where that is another one.

        Args:
            choice: shape (K, parts): the vertices.
            weights: of the same shape.
        """

    @abstractmethod
    def probes(self, point: Point, h: float, central: bool, together: bool) -> list[Probe]:
        """Return points at the distance ``h`` towards each vertex.

        Args:
            central: also those away from it, where they lie inside the bounds.
            together: all parts move at once.
        """

    @abstractmethod
    def measured(self, point: Point, probes: Sequence[Probe], changes: Sequence[Array | None], together: bool) -> Array:
        """Return the derivatives, shape (objectives, parts or 1, vertices).

        Args:
            point: where they are taken.
            probes: from `probes`.
            changes: for each the change of the losses divided by its step, shape (objectives,); None where it failed.
            together: as in `probes`.
        """

    def derivatives(self, point: Point, slopes: Array) -> Array | None:
        """Return the derivatives that follow from `Outcome.slopes`, shape (objectives, parts, vertices), or None."""
        del point, slopes
        return None

    def cosines(self, slopes: Array) -> Array:
        """Return what the cosine form compares, from `Outcome.slopes`: shape (objectives, parts, vertices)."""
        raise NotImplementedError


class Table(Domain):
    """Coefficients: one row a part, one column an expert; or the unit cube of a box, one column.

    Args:
        space: a job's space in which `collapses`, or any box.
        with_base: whether the base is a vertex.
        reach: how many of its task vectors each expert's vertex is away from the base; what a point has in sum may then
            be as much. Points stay inside the bounds, vertices need not.
    """

    def __init__(self, space: SearchSpace, *, with_base: bool, reach: float = 1.0) -> None:
        self.box = not collapses(space)
        rows, cols = (space.dim, 1) if self.box or not isinstance(space, MergeSpace) else space.table
        self.parts, self._cols = rows, cols
        self._low: Array = space.low if self.box else np.zeros(1)
        self._range: Array = space.high - space.low if self.box else np.ones(1)
        low, high = space.low[: rows * cols], space.high[: rows * cols]
        shape = (rows, cols)
        self._bounds = (np.zeros(shape), np.ones(shape)) if self.box else (low.reshape(shape), high.reshape(shape))
        # A merge whose weights must sum to 1 has no base to move to.
        self._experts = cols
        self._fixed: list[tuple[str, Array]] = []
        if self.box:
            self._fixed = [("low", np.zeros(shape)), ("high", np.ones(shape))]
        elif isinstance(space, MergeSpace):
            reach = reach if space.problem.operator.uses_base else 1.0
            for column, name in enumerate(space.columns):
                vertex = reach * self._clip(np.broadcast_to(np.eye(cols)[column], shape))
                self._fixed.append((name, vertex))
            if with_base and space.problem.operator.uses_base:
                self._fixed.append(("base", self._clip(np.zeros(shape))))
        self._modified = isinstance(space, MergeSpace) and bool(space.modifiers)
        self._set([])

    def begin(self, genome: Genome) -> Point:
        """See `Domain.begin`: a start that is no vertex becomes one, so that every point is a combination of vertices."""
        if self.box:
            return self.recorded(Point(genome), genome)
        table = self._clip(self._table(genome))
        same = [number for number, (_, vertex) in enumerate(self._fixed) if np.allclose(vertex, table, atol=_INSIDE)]
        self._set([] if same else [("start", table)])
        active = np.zeros((self.parts, len(self.labels)))
        active[:, same[0] if same else -1] = 1.0
        return Point(self._genome(genome, table), active)

    def recorded(self, point: Point, genome: Genome) -> Point:
        """See `Domain.recorded`."""
        if not self.box:
            return Point(genome, point.active)
        unit = self._table(genome)
        return Point(genome, np.hstack([1 - unit, unit]))

    def mix(self, point: Point, choice: Choice, weights: Array) -> Point:
        """See `Domain.mix`."""
        rows = np.arange(self.parts)
        table, active = self._table(point.genome), point.active
        assert active is not None  # noqa: S101 - every point of a table has one
        rest = 1 - weights.sum(axis=0)[:, None]
        mixed, combined = rest * table, rest * active
        for vertices, amounts in zip(choice, weights, strict=True):
            mixed = mixed + amounts[:, None] * self._vertices[vertices, rows]
            combined[rows, vertices] += amounts
        return Point(self._genome(point.genome, self._clip(mixed)), np.clip(combined, 0.0, 1.0))

    def probes(self, point: Point, h: float, central: bool, together: bool) -> list[Probe]:
        """See `Domain.probes`; in a box one coordinate after the other, towards its farther end."""
        table = self._table(point.genome)
        out: list[Probe] = []
        for part, vertex in self._places(together):
            rows = slice(None) if part < 0 else slice(part, part + 1)
            direction = np.zeros_like(table)
            if self.box:
                direction[rows] = np.where(table[rows] <= 0.5, 1.0, -1.0)
            else:
                direction[rows] = self._vertices[vertex, rows] - table[rows]
            if not direction.any():
                continue
            name = f"{self.labels[vertex]}" + (f", part {part + 1}" if part >= 0 and not self.box else "")
            label = f"probe of variable {part + 1}" if self.box else f"probe towards {name}"
            for sign in (1.0, -1.0) if central else (1.0,):
                moved = table + sign * h * direction
                if sign > 0 or self._holds(moved):
                    step = sign * h * (float(direction[part, 0]) if self.box else 1.0)
                    out.append(Probe(self._genome(point.genome, self._clip(moved)), label, (part, vertex), step))
        return out

    def measured(self, point: Point, probes: Sequence[Probe], changes: Sequence[Array | None], together: bool) -> Array:
        """See `Domain.measured`."""
        found = _means(probes, changes)
        objectives = next((len(change) for change in changes if change is not None), 1)
        if self.box:
            gradient = np.full((objectives, self.parts, 1), np.nan)
            for (part, _), change in found.items():
                gradient[:, part, 0] = change
            return self.from_gradient(point, gradient)
        out = np.zeros((objectives, 1 if together else self.parts, len(self.labels)))
        for part, vertex in {probe.place for probe in probes}:
            out[:, max(part, 0), vertex] = found.get((part, vertex), np.inf)
        return out

    def from_gradient(self, point: Point, gradient: Array) -> Array:
        """Return derivatives from those by each coefficient, shape (objectives, parts, columns)."""
        away = self._vertices - self._table(point.genome)
        found = np.einsum("ogm,vgm->ogv", gradient, away)
        return np.where(np.isfinite(found), found, np.inf)

    def derivatives(self, point: Point, slopes: Array) -> Array | None:
        """See `Domain.derivatives`."""
        if self.box or self._modified or slopes.shape[2:] != (self.parts, self._experts + 2):
            return None
        return self.from_gradient(point, slopes[0, :, :, 1:-1])

    def cosines(self, slopes: Array) -> Array:
        """See `Domain.cosines`; a vertex between models has the mean of theirs, for their norms hardly differ."""
        cosines = slopes[1, :, :, :-1]
        weights = np.concatenate([1 - self._vertices.sum(axis=2, keepdims=True), self._vertices], axis=2)
        return np.asarray(np.einsum("ogm,vgm->ogv", cosines, weights))

    def perturbed(self, point: Point, by: Array) -> tuple[Genome, Genome, Array]:
        """Return the points ± ``by`` (shape (parts, columns)) inside the bounds, and the difference between them."""
        table = self._table(point.genome)
        up, down = self._clip(table + by), self._clip(table - by)
        return self._genome(point.genome, up), self._genome(point.genome, down), up - down

    @property
    def shape(self) -> tuple[int, int]:
        """Parts and columns."""
        return self.parts, self._cols

    def _places(self, together: bool) -> list[tuple[int, int]]:
        if self.box:
            return [(part, 0) for part in range(self.parts)]
        vertices = range(len(self.labels))
        return [(part, vertex) for part in ([-1] if together else range(self.parts)) for vertex in vertices]

    def _set(self, more: list[tuple[str, Array]]) -> None:
        pairs = [*self._fixed, *more]
        self.labels = tuple(name for name, _ in pairs)
        self._vertices = np.array([vertex for _, vertex in pairs])

    def _table(self, genome: Genome) -> Array:
        size = self.parts * self._cols
        return np.asarray(((genome - self._low) / self._range)[:size].reshape(self.parts, self._cols))

    def _genome(self, like: Genome, table: Array) -> Genome:
        """The genome with this table, and with the rest of another one."""
        if self.box:
            return np.asarray(self._low + table.ravel() * self._range)
        return np.concatenate([table.ravel(), like[table.size :]])

    def _clip(self, table: Array) -> Array:
        return np.clip(table, *self._bounds)

    def _holds(self, table: Array) -> bool:
        return bool(((table >= self._bounds[0]) & (table <= self._bounds[1])).all())


class Chains(Domain):
    """Chains of merges, whose vertices are models; see `ChainSpace`.

    Args:
        space: of the job.
        with_base: whether the base is a vertex.
    """

    def __init__(self, space: ChainSpace, *, with_base: bool) -> None:
        self._space = space
        self.parts = len(space.groups)
        first = 0 if with_base else 1
        self._models = list(range(first, len(space.experts) + 1))
        self.labels = tuple(["base", *space.experts][first:])

    def begin(self, genome: Genome) -> Point:
        """See `Domain.begin`; only models are vertices, for no slopes lead to a merge."""
        return Point(genome)

    def recorded(self, point: Point, genome: Genome) -> Point:
        """See `Domain.recorded`."""
        del point
        return Point(genome)

    def mix(self, point: Point, choice: Choice, weights: Array) -> Point:
        """See `Domain.mix`: one more merge."""
        chain = Chain.decode(point.genome, self.parts, len(self._space.experts))
        used = sorted({int(number) for number in choice[weights != 0]})
        if not used:
            return point
        table = np.zeros((self.parts, len(used)))
        for vertices, amounts in zip(choice, weights, strict=True):
            for part in np.flatnonzero(amounts):
                table[part, used.index(int(vertices[part]))] += amounts[part]
        step = Step(tuple(self._models[number] for number in used), table)
        return Point(Chain(chain.start, (*chain.steps, step)).encode())

    def probes(self, point: Point, h: float, central: bool, together: bool) -> list[Probe]:
        """See `Domain.probes`: small steps by the merge function itself, forwards only."""
        del central
        out = []
        for part in [-1] if together else range(self.parts):
            weights = np.zeros((1, self.parts))
            weights[0, slice(None) if part < 0 else part] = h
            for vertex, name in enumerate(self.labels):
                moved = self.mix(point, np.full((1, self.parts), vertex), weights)
                label = f"probe towards {name}" + (f", part {part + 1}" if part >= 0 else "")
                out.append(Probe(moved.genome, label, (part, vertex), h))
        return out

    def measured(self, point: Point, probes: Sequence[Probe], changes: Sequence[Array | None], together: bool) -> Array:
        """See `Domain.measured`."""
        del point
        found = _means(probes, changes)
        objectives = next((len(change) for change in changes if change is not None), 1)
        out = np.full((objectives, 1 if together else self.parts, len(self.labels)), np.inf)
        for (part, vertex), change in found.items():
            out[:, max(part, 0), vertex] = change
        return out

    def derivatives(self, point: Point, slopes: Array) -> Array | None:
        """See `Domain.derivatives`."""
        del point
        if slopes.shape[2:] != (self.parts, len(self._space.experts) + 2):
            return None
        return np.asarray(slopes[0][:, :, self._models] - slopes[0][:, :, -1:])

    def cosines(self, slopes: Array) -> Array:
        """See `Domain.cosines`."""
        return np.asarray(slopes[1][:, :, self._models])


def make_domain(space: SearchSpace, *, with_base: bool, reach: float = 1.0) -> Domain:
    """Return the domain of a job's space, or of any box; see `Table` and `Chains`."""
    if isinstance(space, ChainSpace):
        return Chains(space, with_base=with_base)
    return Table(space, with_base=with_base, reach=reach)


def starts(space: SearchSpace, given: Genome, kind: str) -> list[Genome]:
    """Return genomes to begin at, the first that can be evaluated: the merge of all models, the base, the experts."""
    if not isinstance(space, JobSpace) or not (collapses(space) or isinstance(space, ChainSpace)):
        return [given]
    if isinstance(space, ChainSpace):
        models = [Chain(number).encode() for number in range(len(space.experts) + 1)]
        merge = space.uniform()
    else:
        assert isinstance(space, MergeSpace)  # noqa: S101 - `collapses` says so
        size, cols = space.table[0] * space.table[1], space.table[1]
        rest = space.uniform()[size:]
        tables = [np.zeros(space.table), *(np.broadcast_to(row, space.table) for row in np.eye(cols))]
        models = [np.concatenate([table.ravel(), rest]) for table in tables]
        merge = np.concatenate([np.full(size, 0.3), rest]) if space.problem.operator.uses_base else space.uniform()
    if not space.problem.operator.uses_base:
        return [merge, *models[1:]]
    return [models[0], merge, *models[1:]] if kind == "base" else [merge, *models]


def _means(probes: Sequence[Probe], changes: Sequence[Array | None]) -> dict[tuple[int, int], Array]:
    """The mean change of the probes in each place, of those that were measured."""
    found: dict[tuple[int, int], list[Array]] = {}
    for probe, change in zip(probes, changes, strict=True):
        if change is not None:
            found.setdefault(probe.place, []).append(change)
    return {place: np.mean(values, axis=0) for place, values in found.items()}
