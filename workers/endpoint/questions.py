"""What a job asks an endpoint: each objective's items, uploaded or the owner's own, each asked for once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InvalidData, InvalidInput, NotOffered
from optimizer.spec import JobSpec, Objective
from workers.data import Rows, is_text, load_rows
from workers.endpoint.client import EndpointClient
from workers.endpoint.protocol import RepositoryView, SetUpload, SetView
from workers.evaluators.base import EVALUATORS
from workers.measuring import items_fields
from workers.roots import Roots

_OF_ROWS = ("rows", "set.columns")  # what the server calls the items, in errors


Split = Literal["data", "test"]
SPLITS: tuple[Split, Split] = ("data", "test")
Key = tuple[str, Split]


@dataclass(frozen=True)
class Question:
    """Items that a candidate is evaluated on, for one or several objectives.

    Attributes:
        field: dotted path of the first objective that asks: ``objectives.0``.
        split: whether they are the search's or test items.
        own: name of the owner's set, or None.
        rows: what is uploaded, or None.
        upload: these as they are sent, or None.
        digest: SHA-256 over the local items, or the owner's set's.
        count: number of items of the set.
        positions: which of them are asked for; None for all.
    """

    field: str
    split: Split
    own: str | None
    rows: Rows | None
    upload: SetUpload | None
    digest: str
    count: int
    positions: tuple[int, ...] | None = None

    @property
    def key(self) -> Key:
        """The same for all parts of a question."""
        return self.field, self.split

    def __len__(self) -> int:
        return self.count if self.positions is None else len(self.positions)

    def subset(self, items: Sequence[int]) -> Question:
        """Return the question about some of the items."""
        known = range(self.count) if self.positions is None else self.positions
        return replace(self, positions=tuple(known[item] for item in items))

    def asked(self, order: NDArray[np.int64], fewest: int) -> list[int] | None:
        """Return which items to ask for: as many as the owner wants at least, further ones by ``order``; None for all."""
        if self.positions is None or max(len(self.positions), fewest) >= self.count:
            return None
        known = set(self.positions)
        more = (int(item) for item in order if item not in known)
        return [*self.positions, *islice(more, max(0, fewest - len(self.positions)))]


def questions_of(spec: JobSpec, view: RepositoryView, roots: Roots, split: Split = "data") -> dict[int, Question]:
    """Read the items of all objectives that have any, by number; those that differ in the metric only share a question.

    Raises:
        InvalidInput, InvalidData: the data cannot be read or sent, or the owner has no such set; names the field.
    """
    found: dict[str, Question] = {}
    out = {}
    for number, objective in enumerate(spec.objectives):
        if split == "test" and objective.test is None and objective.test_set is None:
            continue
        key = repr(objective.model_dump(mode="json", include=items_fields(split)))
        if key not in found:
            found[key] = _question(objective, number, view, roots, split)
        out[number] = found[key]
    return out


def upload(client: EndpointClient, session: str, question: Question) -> SetView:
    """Upload a question's items; raises what the server finds wrong with them, at the objective's fields."""
    assert question.upload is not None  # noqa: S101 - asked for such only
    try:
        return client.upload(session, question.upload)
    except InvalidInput as error:
        where, split = question.field, question.split
        field = str(error.field or "").removeprefix("set.")
        data = any(str(error.field or "").startswith(name) for name in _OF_ROWS)
        path = (
            f"{where}.{split}.{field}"
            if data and field != "rows"
            else f"{where}.{split}"
            if data
            else f"{where}.{field}"
        )
        raise type(error)(error.message, field=path.rstrip("."), remedy=error.remedy) from error


def own_set(objective: Objective, field: str, view: RepositoryView, split: Split = "data") -> SetView:
    """Return the owner's set that an objective names; raises `InvalidInput`."""
    which = "set" if split == "data" else "test_set"
    name = getattr(objective, which)
    found = {known.name: known for known in view.sets}.get(str(name))
    if found is None:
        names = ", ".join(known.name for known in view.sets) or "none"
        raise InvalidInput(f"the owner has no set {name!r}", field=f"{field}.{which}", remedy=f"its sets are: {names}")
    if found.evaluator != objective.evaluator:
        raise InvalidInput(
            f"the owner measures {found.name!r} by {found.evaluator}",
            field=f"{field}.evaluator",
            remedy=f"write {found.evaluator}",
        )
    for name in ("options", "head"):
        if getattr(objective, name):
            raise InvalidInput(
                f"the owner has set the {name} of its sets", field=f"{field}.{name}", remedy="leave it out"
            )
    return found


def _question(objective: Objective, number: int, view: RepositoryView, roots: Roots, split: Split) -> Question:
    field = f"objectives.{number}"
    if (objective.set if split == "data" else objective.test_set) is not None:
        found = own_set(objective, field, view, split)
        return Question(field, split, found.name, None, None, found.digest, found.items)
    data = objective.data if split == "data" else objective.test
    if data is None:
        raise InvalidInput("there is nothing to measure on", field=f"{field}.data", remedy="name a file, or a `set`")
    _check_uploads(objective, field, view, split)
    rows = load_rows(data, roots.path(data.path, f"{field}.{split}.path"), f"{field}.{split}")
    made = SetUpload(
        evaluator=objective.evaluator,
        options=objective.options,
        columns=dict(rows.columns),
        head=objective.head,
        rows=_sent(objective, rows),
    )
    return Question(field, split, None, rows, made, rows.digest, len(rows))


def _check_uploads(objective: Objective, field: str, view: RepositoryView, split: Split) -> None:
    if view.uploads is None:
        raise NotOffered(
            "the owner takes no query sets",
            field=f"{field}.{split}",
            remedy=f"name one of the owner's sets with `{'set' if split == 'data' else 'test_set'}`",
        )
    names = [found.name for found in view.uploads.evaluators]
    if objective.evaluator not in names:
        raise NotOffered(
            f"the owner takes no query sets for {objective.evaluator}",
            field=f"{field}.evaluator",
            remedy=f"use one of: {', '.join(names)}",
        )
    if objective.evaluator in view.uploads.heads_needed and objective.head is None:
        raise InvalidInput(
            "the models have heads of their own, so this objective must name whose head it uses",
            field=f"{field}.head",
            remedy=f"use one of: {', '.join(view.uploads.heads[:20])}",
        )


def _sent(objective: Objective, rows: Rows) -> list[dict[str, Any]]:
    """The rows' columns that the evaluator reads, and no others, as JSON; classes by their names."""
    roles = EVALUATORS.find(objective.evaluator, "evaluator").columns
    columns = [name for name in dict.fromkeys(rows.columns.get(role, role) for role in roles) if name in rows.names]
    out = []
    for place, row in zip(rows.places, rows.items, strict=True):
        sent = {}
        for name in columns:
            value = row.get(name)
            if name in rows.classes and isinstance(value, int) and 0 <= value < len(rows.classes[name]):
                value = rows.classes[name][value]
            if not _is_plain(value):
                raise InvalidData(
                    f"{place}: {name!r} is {type(value).__name__}, which cannot be uploaded",
                    field=rows.field,
                    remedy="only texts, numbers and lists of them can",
                )
            sent[name] = value
        out.append(sent)
    return out


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(is_text(key) and _is_plain(inner) for key, inner in value.items())
    return value is None or is_text(value) or isinstance(value, bool | int | float)
