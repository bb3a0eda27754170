"""How individuals have offspring: spherical or linear mixing on either side of a split point, and mutation.

An individual is a point of a box (a full vector of weights, or coefficients and options), or a table of coefficients
over the models. Both are mixed in the same way (M2N2, arXiv 2508.16204): one angle between the two whole vectors; what
lies before the split point gets the weight of the second parent t, the rest 1 − t.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import AlgorithmContext
from optimizer.errors import InvalidInput, JobError
from optimizer.geometry import Cuts
from optimizer.problem import Problem
from optimizer.space import Genome, JobSpace, SearchSpace, make_space
from optimizer.spec import JobSpec, Strict
from optimizer.tables import GramSums, Table, TableSpace, cut_edges, make_table_space, shared_breaks

Mixing = Literal["slerp", "linear"]
Split = Literal["parameters", "tensors", "layers", "none"]

SMALLEST_SINE = 1e-6
"""Sine of the angle up to which SLERP is linear interpolation, as in the released code of M2N2."""

DEFAULT_MUTATION = 0.05
"""Of 0.02 to 0.2 it was safe and good on quadratics in 10 dimensions: 0.0013 after 300 evaluations, random search 0.039."""

_GRAMS: dict[Split, Cuts] = {"none": "layers", "layers": "layers", "tensors": "tensors", "parameters": "parameters"}


class BreedingOptions(Strict):
    """Options of every search whose individuals have offspring."""

    representation: Literal["table", "coefficients"] = Field(
        default="table",
        description=(
            "What an individual is. `table`: any linear merge, with coefficients that change at split points of its own "
            "(for the operators linear and task_arithmetic; the job's granularity and bounds mean nothing to it). "
            "`coefficients`: the job's own search space."
        ),
    )
    mixing: Mixing = Field(
        default="slerp",
        description="How parents are mixed: on the sphere, with the angle between the whole models, or linearly.",
    )
    cuts: Split = Field(
        default="parameters",
        description=(
            "Where the split point of a crossover may lie in the flat vector of all parameters: anywhere, between tensors "
            "or layers, or nowhere. In a space of coefficients it lies between any two of them unless `none`."
        ),
    )
    mutation: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description=(
            "Standard deviation of the noise on every number of a child, as a share of its range. By default "
            f"{DEFAULT_MUTATION} in a space of coefficients, and none in tables, whose mixtures need none."
        ),
    )


def breeding_space(spec: JobSpec, problem: Problem, options: Any, *, mutates_tables: bool = False) -> JobSpace:
    """Make the space for a search with `BreedingOptions`.

    Raises:
        InvalidInput: the job merges what no table can express, or asks for what tables lack, with the remedy.
    """
    if options.representation == "coefficients":
        return make_space(spec, problem)
    if options.mutation and not mutates_tables:
        raise InvalidInput(
            "noise on every weight cannot be written as a table of coefficients",
            field="algorithm.options.mutation",
            remedy="leave `mutation` out, or set `representation` to `coefficients`",
        )
    return make_table_space(spec, problem)


def gram_cuts(options: Any) -> Cuts | None:
    """Where the angles of a search with `BreedingOptions` need inner products; None if it needs no angle."""
    if options.representation == "coefficients" or options.mixing == "linear":
        return None
    return _GRAMS[options.cuts]


def same(a: Genome, b: Genome) -> bool:
    """Whether two genomes are the same; long ones that differ in their ends cost nothing."""
    return a.shape == b.shape and bool(a[0] == b[0] and a[-1] == b[-1] and (a == b).all())


def slerp_weights(angle: float, t: float) -> tuple[float, float]:
    """Return the weights of the first and the second vector at ``t`` of the arc between them (Shoemake 1985)."""
    sine = np.sin(angle)
    if sine <= SMALLEST_SINE:
        return 1 - t, t
    return float(np.sin((1 - t) * angle) / sine), float(np.sin(t * angle) / sine)


class Breeding(ABC):
    """Makes offspring.

    Args:
        random: the algorithm's generator.
        mixing: of two parents.
    """

    def __init__(self, random: np.random.Generator, mixing: Mixing) -> None:
        self.random = random
        self.mixing = mixing

    @abstractmethod
    def begin(self) -> list[Genome]:
        """Return what a search begins with that was told of nothing yet."""

    @abstractmethod
    def fresh(self) -> Genome:
        """Return a random individual."""

    @abstractmethod
    def cross(self, a: Genome, b: Genome) -> Genome:
        """Return a child of two parents."""

    @abstractmethod
    def blend(self, a: Genome, b: Genome, weight: float) -> Genome:
        """Return (1 − weight) · a + weight · b."""

    @abstractmethod
    def mutate(self, genome: Genome) -> Genome:
        """Return it with noise on every number."""

    def weights(self, angle: float, t: float) -> tuple[float, float]:
        """Return what the first and the second parent count at ``t`` between them."""
        return slerp_weights(angle, t) if self.mixing == "slerp" else (1 - t, t)


class BoxBreeding(Breeding):
    """Breeds points of a box. A child has an integer or a choice from one of its parents, and mutants others.

    Args:
        space: the box.
        start: the best guess.
        random: the algorithm's generator.
        mixing: of two parents.
        split: whether crossover splits.
        sigma: noise, as a share of each variable's range.
    """

    def __init__(
        self,
        space: SearchSpace,
        start: Genome,
        random: np.random.Generator,
        *,
        mixing: Mixing = "slerp",
        split: bool = True,
        sigma: float = DEFAULT_MUTATION,
    ) -> None:
        super().__init__(random, mixing)
        self._space, self._start, self._split = space, start, split
        self._low, self._high = space.low, space.high
        self._noise = sigma * (self._high - self._low)
        self._mutates = sigma > 0
        kinds = [variable.kind for variable in space.variables]
        self._integers = np.array([number for number, kind in enumerate(kinds) if kind == "integer"], np.intp)
        self._choices = np.array([number for number, kind in enumerate(kinds) if kind == "choice"], np.intp)
        self._discrete = np.sort(np.concatenate([self._integers, self._choices]))

    def begin(self) -> list[Genome]:
        """See `Breeding`: the start."""
        return [self._start]

    def fresh(self) -> Genome:
        """See `Breeding`: anywhere in the box."""
        return self._low + self.random.random(len(self._low)) * (self._high - self._low)

    def cross(self, a: Genome, b: Genome) -> Genome:
        """See `Breeding`."""
        size = len(a)
        split = int(self.random.integers(size)) if self._split else size
        t = float(self.random.random())
        angle = self._angle(a, b) if self.mixing == "slerp" else 0.0
        (a1, b1), (a2, b2) = self.weights(angle, t), self.weights(angle, 1 - t)
        child = np.empty(size)
        np.add(a1 * a[:split], b1 * b[:split], out=child[:split])
        np.add(a2 * a[split:], b2 * b[split:], out=child[split:])
        if self._discrete.size:
            second = (self._discrete < split) == (t >= 0.5)
            child[self._discrete] = np.where(second, b[self._discrete], a[self._discrete])
        return self._inside(child)

    def blend(self, a: Genome, b: Genome, weight: float) -> Genome:
        """See `Breeding`."""
        child = a + weight * (b - a)
        if self._discrete.size:
            second = self.random.random(self._discrete.size) < weight
            child[self._discrete] = np.where(second, b[self._discrete], a[self._discrete])
        return self._inside(child)

    def mutate(self, genome: Genome) -> Genome:
        """See `Breeding`. An integer or a choice changes with a probability of 1 / variables, and then certainly."""
        if not self._mutates:
            return genome
        moved = self.random.standard_normal(len(genome))
        moved *= self._noise
        moved += genome
        if self._discrete.size:
            changes = self.random.random(len(genome)) < 1 / len(genome)
            moved[self._integers] = self._stepped(genome, moved)
            moved[self._choices] = self._turned(genome)
            kept = self._discrete[~changes[self._discrete]]
            moved[kept] = genome[kept]
        return self._inside(moved)

    def _stepped(self, genome: Genome, moved: Genome) -> Genome:
        """Integers at least one further, back from a bound that they stand at."""
        old, step = np.round(genome[self._integers]), moved[self._integers] - genome[self._integers]
        step = np.sign(step) * np.maximum(1.0, np.round(np.abs(step)))
        outside = (old + step > self._high[self._integers]) | (old + step < self._low[self._integers])
        return np.asarray(old + np.where(outside, -step, step))

    def _turned(self, genome: Genome) -> Genome:
        """Other choices: one to all but one cells further, around the corner, in the middle of the cell."""
        number = self._high[self._choices]
        turn = 1 + np.floor(self.random.random(self._choices.size) * (number - 1))
        return np.asarray((np.minimum(np.floor(genome[self._choices]), number - 1) + turn) % number + 0.5)

    def _angle(self, a: Genome, b: Genome) -> float:
        if self._discrete.size:
            a, b = np.delete(a, self._discrete), np.delete(b, self._discrete)
        length = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        if not min(length) > 0:
            return 0.0
        u, v = a / length[0], b / length[1]
        return float(2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))

    def _inside(self, genome: Genome) -> Genome:
        return np.clip(genome, self._low, self._high, out=genome)


class TableBreeding(Breeding):
    """Breeds tables: a child has the break points of both parents and the split.

    Args:
        space: of tables.
        random: the algorithm's generator.
        mixing: of two parents.
        cuts: where splits may lie.
        sigma: noise of mutation, see `mutate`.
    """

    def __init__(
        self,
        space: TableSpace,
        random: np.random.Generator,
        *,
        mixing: Mixing = "slerp",
        cuts: Split = "parameters",
        sigma: float = 0.0,
    ) -> None:
        super().__init__(random, mixing)
        self._space, self._cuts, self._sigma = space, cuts, sigma

    @cached_property
    def grams(self) -> GramSums:
        """The models' inner products."""
        found = self._space.problem.grams
        if found is None:
            raise JobError("the job's inputs were stored without the inner products that this algorithm needs")
        return GramSums(found)

    @cached_property
    def _places(self) -> NDArray[np.int64] | None:
        """Where a split may lie, from 0 on; None for anywhere."""
        if self._cuts == "parameters":
            return self.grams.edges[:-1] if self.mixing == "slerp" else None
        return np.array(cut_edges(self._space.problem.layout, "layers" if self._cuts == "layers" else "tensors")[:-1])

    @cached_property
    def _ranges(self) -> NDArray[np.int64]:
        """Where what mutates in common ends."""
        return np.array(cut_edges(self._space.problem.layout, "layers" if self._cuts == "layers" else "tensors")[1:-1])

    def begin(self) -> list[Genome]:
        """See `Breeding`: the mean of the experts, and the models as they are."""
        return [self._space.uniform(), *(self._space.alone(name) for name in self._models)]

    def fresh(self) -> Genome:
        """See `Breeding`: a child of two models."""
        names = self._models
        first, second = self.random.permutation(len(names))[:2] if len(names) > 1 else (0, 0)
        return self.cross(self._space.alone(names[first]), self._space.alone(names[second]))

    def cross(self, a: Genome, b: Genome) -> Genome:
        """See `Breeding`."""
        first, second = self._space.table(a), self._space.table(b)
        split, t = self._split(), float(self.random.random())
        return self._space.clip(self.child(first, second, split, t).encode())

    def child(self, a: Table, b: Table, split: int, t: float) -> Table:
        """Return the child of two tables with weight ``t`` of ``b`` before ``split`` and 1 − t from there on."""
        angle = self.grams.angle(a, b) if self.mixing == "slerp" else 0.0
        before, after = self.weights(angle, t), self.weights(angle, 1 - t)
        inside = 0 < split < self._space.size
        breaks = shared_breaks(a, b, *([split] if inside else []))
        number = int(np.searchsorted(breaks, split)) + 1 if inside else (0 if split <= 0 else len(breaks) + 1)
        first, second = a.rows(breaks), b.rows(breaks)
        upper = before[0] * first[:number] + before[1] * second[:number]
        lower = after[0] * first[number:] + after[1] * second[number:]
        return Table(breaks, np.concatenate([upper, lower])).simplified()

    def blend(self, a: Genome, b: Genome, weight: float) -> Genome:
        """See `Breeding`."""
        first, second = self._space.table(a), self._space.table(b)
        breaks = shared_breaks(first, second)
        rows = (1 - weight) * first.rows(breaks) + weight * second.rows(breaks)
        return self._space.clip(Table(breaks, rows).simplified().encode())

    def mutate(self, genome: Genome) -> Genome:
        """See `Breeding`: noise on every expert's coefficient in each tensor or layer.

        The base's takes what the others gain, so that task vectors are scaled, and the sum stays.
        """
        if not self._sigma:
            return genome
        table = self._space.table(genome)
        noise = self.random.normal(scale=self._sigma, size=(len(self._ranges) + 1, len(self._space.models)))
        base = self._space.models.index("base")
        noise[:, base] = 0.0
        noise[:, base] = -noise.sum(axis=1)
        step = Table(self._ranges, noise)
        breaks = shared_breaks(table, step)
        return self._space.clip(Table(breaks, table.rows(breaks) + step.rows(breaks)).simplified().encode())

    @property
    def _models(self) -> list[str]:
        uses_base = self._space.problem.operator.uses_base
        return [name for name in self._space.models if name != "base" or uses_base]

    def _split(self) -> int:
        if self._cuts == "none":
            return self._space.size
        if self._places is None:
            return int(self.random.integers(self._space.size))
        return int(self._places[self.random.integers(len(self._places))])


def make_breeding(context: AlgorithmContext, options: Any, random: np.random.Generator) -> Breeding:
    """Make what breeds in the job's space, from `BreedingOptions`."""
    space = context.space
    if isinstance(space, TableSpace):
        return TableBreeding(
            space, random, mixing=options.mixing, cuts=options.cuts, sigma=float(options.mutation or 0.0)
        )
    sigma = DEFAULT_MUTATION if options.mutation is None else float(options.mutation)
    return BoxBreeding(space, context.start, random, mixing=options.mixing, split=options.cuts != "none", sigma=sigma)
