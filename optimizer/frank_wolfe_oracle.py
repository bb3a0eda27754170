"""Derivatives by probes: which evaluations they take, and what follows from their outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from optimizer.algorithms.base import Outcome, Proposal
from optimizer.frank_wolfe_domain import Array, Domain, Point, Probe, Table
from optimizer.frank_wolfe_settings import Settings
from optimizer.space import Genome

_PENALTY = 10.0


@dataclass(frozen=True)
class Here:
    """A point that was evaluated.

    Attributes:
        place: its number among those evaluated together.
        index: the candidate's.
        losses: shape (objectives,), violations of constraints added.
        value: their weighted sum.
        towards: derivatives, shape (objectives, parts or 1, vertices); None where not known yet.
        scores: what vertices are compared by, of the same shape.
        probed: whether derivatives were measured by probes.
    """

    point: Point
    place: int
    index: int
    losses: Array
    value: float
    towards: Array | None = None
    scores: Array | None = None
    probed: bool = False


@dataclass(frozen=True)
class Around:
    """What proposals of probes have in common.

    Attributes:
        settings: options.
        h: their distance.
        together: whether all parts move at once.
        generation, parents: of the proposals.
        random: a generator.
    """

    settings: Settings
    h: float
    together: bool
    generation: int
    parents: tuple[int, ...]
    random: np.random.Generator


class Plan:
    """Evaluations that measure derivatives at a point.

    Attributes:
        proposals: what is to be evaluated.
    """

    proposals: list[Proposal]

    def __init__(self, around: Around) -> None:
        self._around = around
        self._items = around.settings.probe_items
        self.proposals = []

    def finish(self, here: Here, outcomes: Sequence[Outcome]) -> Here:
        """Return the point with its derivatives."""
        raise NotImplementedError

    def _propose(self, genome: Genome, label: str) -> None:
        around = self._around
        self.proposals.append(Proposal(genome, around.generation, around.parents, label, items=self._items))


class Differences(Plan):
    """One probe towards each vertex, or two."""

    def __init__(self, around: Around, domain: Domain, point: Point) -> None:
        super().__init__(around)
        self._domain, self._together = domain, around.together
        probes = self._domain.probes(point, around.h, around.settings.central, self._together)
        if self._domain.box:  # so that what a budget cuts off is not always the same
            probes = [probes[number] for number in around.random.permutation(len(probes))]
        self._probes: list[Probe] = probes
        if self._items is not None:  # differences are between the same items
            self._propose(point.genome, "the iterate on the probes' items")
        for probe in probes:
            self._propose(probe.genome, probe.label)

    def finish(self, here: Here, outcomes: Sequence[Outcome]) -> Here:
        reference: Array | None = here.losses
        if self._items is not None:
            reference, outcomes = losses_of(outcomes[0]), outcomes[1:]
        changes: list[Array | None] = []
        for probe, outcome in zip(self._probes, outcomes, strict=True):
            losses = losses_of(outcome)
            known = losses is not None and reference is not None
            changes.append((losses - reference) / probe.step if known else None)  # type: ignore[operator]
        towards = self._domain.measured(here.point, self._probes, changes, self._together)
        if len(towards) != len(here.losses):  # nothing was measured at all
            towards = np.repeat(towards, len(here.losses), axis=0)
        return replace(here, towards=towards, scores=towards, probed=True)


class Perturbations(Plan):
    """Pairs of points on both sides, all coefficients moved at once at random (Spall 1992)."""

    def __init__(self, around: Around, domain: Table, point: Point) -> None:
        super().__init__(around)
        self._domain = domain
        self._between: list[Array] = []
        self._shared = domain.parts if around.together else 1
        shape = (1, domain.shape[1]) if around.together else domain.shape
        for _ in range(around.settings.pairs):
            signs = np.broadcast_to(around.random.choice([-1.0, 1.0], shape), domain.shape)
            up, down, between = domain.perturbed(point, around.h * signs)
            self._between.append(between)
            self._propose(up, "perturbation")
            self._propose(down, "perturbation")

    def finish(self, here: Here, outcomes: Sequence[Outcome]) -> Here:
        found = []
        for between, up, down in zip(self._between, outcomes[::2], outcomes[1::2], strict=True):
            high, low = losses_of(up), losses_of(down)
            if high is not None and low is not None:
                inverse = np.divide(1.0, between, out=np.zeros_like(between), where=between != 0)
                found.append((high - low)[:, None, None] * inverse / self._shared)
        shape = (len(here.losses), *self._domain.shape)
        gradient = np.mean(found, axis=0) if found else np.full(shape, np.nan)
        towards = self._domain.from_gradient(here.point, gradient)
        return replace(here, towards=towards, scores=towards, probed=True)


def losses_of(outcome: Outcome) -> Array | None:
    """The losses, with violations of constraints added to each tenfold; None where there are none."""
    if outcome.losses is None or not np.isfinite(outcome.losses).all():
        return None
    return np.asarray(outcome.losses + _PENALTY * max(0.0, outcome.violation))
