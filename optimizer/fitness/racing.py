"""Racing: a candidate is dropped once it is clear, from the items seen so far, that it loses to candidates known already.

All candidates see an objective's items in one shared order (`optimizer.fitness.subset`), so that differences are paired:
what makes an item hard for all cancels out. After each rung of items the mean difference to each reference is compared
with its confidence bound (as in F-Race, Birattari et al. 2002, and the races of Maron and Moore 1994).

Why the bound holds: the items seen are a simple random sample without replacement of the objective's N items, and what
counts is the mean over just these N. The variance of a mean of n of them is s²/n · (1 − n/N), s² being that of the
differences; the bound takes Student's t with n − 1 degrees of freedom. A candidate is tested after every rung and
against every reference, and dropped wrongly if any of these tests is wrong, so each is made at the level α / (rungs ·
references) (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.known import PlacedScores

Vector = NDArray[np.float64]
Rule = Literal["sum", "each"]


@dataclass(frozen=True)
class Rivals:
    """Whom a candidate must not lose to, as decided when it was proposed.

    Attributes:
        references: indices of candidates that were measured on all items; one that beats it is enough.
        rule: ``sum`` compares the weighted sums of losses; by ``each`` a candidate loses only where it is dominated.
        weights: of the axes of the front in the sum.
    """

    references: tuple[int, ...]
    rule: Rule
    weights: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"references": list(self.references), "rule": self.rule, "weights": list(self.weights)}

    @classmethod
    def of(cls, data: Mapping[str, Any] | None) -> Rivals | None:
        """Return what `to_json` wrote; None for none."""
        return None if data is None else cls(tuple(data["references"]), data["rule"], tuple(data["weights"]))


@dataclass(frozen=True)
class Terms:
    """A race as a worker needs it; plain data.

    Attributes:
        rungs: after how many items of the shared order the candidate is compared, fewest first.
        objectives: names of the axes of the front.
        signs: for each axis 1 where less is better, -1 where more is.
        rivals: for each reference and axis its scores, shape (items,), in the shared order.
        item_weights: for each axis what an item counts, shape (items,), in the shared order; None where all count alike.
        rule: see `Rivals`.
        weights: see `Rivals`.
        error: see `Race`.
        known: by objective, scores that need not be measured.
    """

    rungs: tuple[int, ...]
    objectives: tuple[str, ...]
    signs: tuple[float, ...]
    rivals: tuple[tuple[NDArray[np.float32], ...], ...]
    item_weights: tuple[NDArray[np.float32] | None, ...]
    rule: Rule
    weights: tuple[float, ...]
    error: float
    known: Mapping[str, PlacedScores]

    def race(self) -> Race:
        """Return the race."""
        return Race(
            [
                Rival(tuple(sign * each.astype(np.float64) for sign, each in zip(self.signs, scores, strict=True)))
                for scores in self.rivals
            ],
            np.array(self.weights),
            [None if each is None else each.astype(np.float64) for each in self.item_weights],
            self.rule,
            self.error,
            len(self.rungs),
        )

    def losses(self, scores: Sequence[NDArray[np.float32]]) -> list[Vector]:
        """Return the scores of the axes, each of shape (seen,), as losses."""
        return [sign * each.astype(np.float64) for sign, each in zip(self.signs, scores, strict=True)]


@dataclass(frozen=True)
class Rival:
    """A candidate that was measured on all items, as a race needs it.

    Attributes:
        losses: for each objective that counts, shape (items,): what is to be minimised, in the shared order.
    """

    losses: tuple[Vector, ...]


@dataclass(frozen=True)
class Standing:
    """Where a candidate stands after some items, against the reference that beats it most clearly.

    Attributes:
        lost: whether it is clear that it loses.
        reference: number of that reference.
        ahead: shape (objectives,): by how much its loss lies above the reference's, on average over the items seen.
        errors: shape (objectives,): standard errors of ``ahead``, as an estimate of the difference over all items.
    """

    lost: bool
    reference: int
    ahead: Vector
    errors: Vector


def rungs(items: int, smallest: int, factor: int = 2) -> tuple[int, ...]:
    """Return after how many items a candidate is compared: ``smallest``, then ``factor`` times as many, below ``items``."""
    out = []
    at = smallest
    while at < items:
        out.append(at)
        at *= factor
    return tuple(out)


class Race:
    """Compares candidates with references.

    Args:
        rivals: the references, at least one.
        weights: shape (objectives,): of the objectives in the sum of losses.
        item_weights: for each objective what each item counts in the mean, shape (items,) in the shared order; None where
            all count alike.
        rule: ``sum`` loses by the weighted sum of the losses, ``each`` only by all objectives at once (dominance).
        error: probability that a candidate is dropped which is no worse than the references over all items.
        tests: how many times a candidate may be compared.
    """

    def __init__(
        self,
        rivals: Sequence[Rival],
        weights: Vector,
        item_weights: Sequence[Vector | None],
        rule: Rule,
        error: float,
        tests: int,
    ) -> None:
        self._rivals = rivals
        self._weights = weights
        self._scales = [None if each is None else each / each.mean() for each in item_weights]
        self._rule = rule
        self._level = error / max(1, tests * len(rivals))

    def standing(self, losses: Sequence[Vector]) -> Standing:
        """Return where a candidate stands.

        Args:
            losses: for each objective those of the first items of the shared order, at least two.
        """
        found = [self._against(number, losses) for number in range(len(self._rivals))]
        return next((each for each in found if each.lost), found[0])

    def _against(self, number: int, losses: Sequence[Vector]) -> Standing:
        from scipy.stats import t as student  # here: commands that only show races load no scipy

        parts = [self._difference(number, k, found) for k, found in enumerate(losses)]
        ahead, errors, cautious = (np.array(column) for column in zip(*parts, strict=True))
        sizes = np.array([len(each) for each in losses])
        if self._rule == "sum":
            total, error = (
                float(ahead @ self._weights),
                float(np.sqrt((self._weights * cautious) ** 2 @ np.ones(len(ahead)))),
            )
            lost = total > student.ppf(1 - self._level, int(sizes.min()) - 1) * error and total > 0
        else:
            bounds = student.ppf(1 - self._level, np.maximum(1, sizes - 1)) * cautious
            lost = bool(((ahead > bounds) & (ahead > 0)).all())
        return Standing(bool(lost), number, ahead, errors)

    def _difference(self, number: int, objective: int, losses: Vector) -> tuple[float, float, float]:
        """The mean difference on the items seen, its standard error, and one that does not trust few equal items."""
        seen, rival, scale = len(losses), self._rivals[number].losses[objective], self._scales[objective]
        each = losses - rival[:seen]
        if scale is not None:
            each = each * scale[:seen]
        left = np.sqrt(max(0.0, 1 - seen / len(rival)))
        # Items that all differ alike (0 and 1 often do) would pass for certainty: one more, which does not differ.
        cautious = np.append(each, 0.0).std(ddof=1) / np.sqrt(seen)
        error = each.std(ddof=1) / np.sqrt(seen) if seen > 1 else abs(float(each.mean()))
        return float(each.mean()), float(error * left), float(cautious * left)
