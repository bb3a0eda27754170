"""Search and test items must not overlap: a score on what the search has seen says nothing about new items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from optimizer.errors import InvalidData
from workers.data import Rows

_SHOWN = 5


@dataclass(frozen=True)
class Splits:
    """The items of one objective.

    Attributes:
        name: the objective's.
        search: what candidates are measured on.
        test: what the front is measured on at the end; None where there is nothing.
        roles: of the columns that make up an item.
    """

    name: str
    search: Rows
    test: Rows | None
    roles: tuple[str, ...]


def check_disjoint(objectives: Sequence[Splits]) -> None:
    """Raise `InvalidData` if a test item of any objective is a search item of any, compared by the content of its roles.

    The error names the test data's field, and which rows are the same.
    """
    for objective in objectives:
        if objective.test is not None:
            tested = objective.test.contents(objective.roles)
            for other in objectives:
                _check(objective.test, tested, other, other.search.contents(objective.roles))


def _check(test: Rows, tested: Sequence[bytes], other: Splits, searched: Iterable[bytes]) -> None:
    known = dict(zip(searched, other.search.places, strict=True))
    shared = [(place, known[found]) for place, found in zip(test.places, tested, strict=True) if found in known]
    if shared:
        pairs = "; ".join(f"{here} is {there} of the search data" for here, there in shared[:_SHOWN])
        more = f"; and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        raise InvalidData(
            f"{len(shared)} of {len(test)} test items are search items of objective {other.name!r}: {pairs}{more}",
            field=test.field,
            remedy="remove them from one of the two",
        )
