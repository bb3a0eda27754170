"""What a job asks an endpoint: each objective's items, uploaded or the owner's own, each asked for once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InvalidData, InvalidInput, NotOffered
from optimizer.fitness.subset import item_order
from optimizer.spec import JobSpec, Objective
from workers.data import Rows, is_text, load_rows
from workers.endpoint.client import EndpointClient
from workers.endpoint.protocol import RepositoryView, SetUpload, SetView
from workers.evaluators.base import EVALUATORS
from workers.roots import Roots

_OF_ROWS = ("rows", "set.columns")  # what the server calls the items, in errors


@dataclass(frozen=True)
class Question:
    """Items that a candidate is evaluated on, for one or several objectives.

    Attributes:
        numbers: of the objectives in the job.
        own: name of the owner's set, or None.
        upload: what is uploaded, or None.
        digest: SHA-256 over the local items, or the owner's set's.
        count: number of items.
        order: in which evaluations on some of the items take them.
    """

    numbers: tuple[int, ...]
    own: str | None
    upload: SetUpload | None
    digest: str
    count: int
    order: NDArray[np.int64]

    def positions(self, items: int | None, fewest: int) -> list[int] | None:
        """Return which items are asked for where so many are wanted; the owner may want more, and None means all."""
        if items is None or max(items, fewest) >= self.count:
            return None
        return [int(position) for position in self.order[: max(items, fewest)]]


def questions_of(spec: JobSpec, view: RepositoryView, roots: Roots) -> list[Question]:
    """Read the data of all objectives; those that differ in the metric only share a question.

    Raises:
        InvalidInput, InvalidData: the data cannot be read or sent, or the owner has no such set; names the field.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number, objective in enumerate(spec.objectives):
        same = objective.model_dump(mode="json", include={"evaluator", "options", "data", "head", "set"})
        groups[repr(same)].append(number)
    return [_question(spec, numbers, view, roots) for numbers in groups.values()]


def upload(client: EndpointClient, session: str, question: Question) -> SetView:
    """Upload a question's items; raises what the server finds wrong with them, at the objective's fields."""
    assert question.upload is not None  # noqa: S101 - asked for such only
    try:
        return client.upload(session, question.upload)
    except InvalidInput as error:
        where = f"objectives.{question.numbers[0]}"
        field = str(error.field or "").removeprefix("set.")
        data = any(str(error.field or "").startswith(name) for name in _OF_ROWS)
        path = f"{where}.data.{field}" if data and field != "rows" else f"{where}.data" if data else f"{where}.{field}"
        raise type(error)(error.message, field=path.rstrip("."), remedy=error.remedy) from error


def own_set(objective: Objective, number: int, view: RepositoryView) -> SetView:
    """Return the owner's set that an objective names; raises `InvalidInput`."""
    found = {known.name: known for known in view.sets}.get(str(objective.set))
    field = f"objectives.{number}"
    if found is None:
        names = ", ".join(known.name for known in view.sets) or "none"
        raise InvalidInput(
            f"the owner has no set {objective.set!r}", field=f"{field}.set", remedy=f"its sets are: {names}"
        )
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


def _question(spec: JobSpec, numbers: list[int], view: RepositoryView, roots: Roots) -> Question:
    objective, field = spec.objectives[numbers[0]], f"objectives.{numbers[0]}"
    if objective.set is not None:
        found = own_set(objective, numbers[0], view)
        return Question(tuple(numbers), found.name, None, found.digest, found.items, item_order(spec.seed, found.items))
    if objective.data is None:
        raise InvalidInput("there is nothing to measure on", field=f"{field}.data", remedy="name a file, or a `set`")
    _check_uploads(objective, field, view)
    rows = load_rows(objective.data, roots.path(objective.data.path, f"{field}.data.path"), f"{field}.data")
    made = SetUpload(
        evaluator=objective.evaluator,
        options=objective.options,
        columns=dict(rows.columns),
        head=objective.head,
        rows=_sent(objective, rows),
    )
    return Question(tuple(numbers), None, made, rows.digest, len(rows), item_order(spec.seed, len(rows)))


def _check_uploads(objective: Objective, field: str, view: RepositoryView) -> None:
    if view.uploads is None:
        raise NotOffered(
            "the owner takes no query sets", field=f"{field}.data", remedy="name one of the owner's sets with `set`"
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
