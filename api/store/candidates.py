"""Candidates, the front and the progression as the API sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from sqlalchemy import ColumnElement, ColumnExpressionArgument, Select, and_, func, or_, select, tuple_
from sqlalchemy.orm import Session

from api.store import cursors, events, lifecycle, outcomes, rendering, verifications
from api.store.columns import utc_now
from api.store.engine import Database
from api.store.models import (
    CandidateRow,
    EnqueuedRow,
    ImprovementRow,
    ItemScoresRow,
    JobRow,
    ObjectiveValueRow,
    RecipeRow,
)
from api.store.ports import BestCandidates, CandidateSort
from api.views import CandidateState, CandidateSummary, CandidateView, FrontView, Page, Point, Progression
from optimizer.errors import Conflict, InvalidInput, NotFound
from optimizer.problem import Problem
from optimizer.space import make_space
from optimizer.spec import CandidateInput, JobSpec

_POINT = (
    CandidateRow.index,
    CandidateRow.values,
    CandidateRow.errors,
    CandidateRow.on_front,
    CandidateRow.label,
    CandidateRow.origin,
    CandidateRow.phase,
    CandidateRow.items,
    CandidateRow.violation,
)
_MOST_BASELINES = 1000


class Candidates(Database):
    """Pages through candidates, draws the front, takes up candidates of users."""

    def list_candidates(
        self,
        job_id: str,
        *,
        sort: CandidateSort = "index",
        objective: str | None = None,
        on_front: bool | None = None,
        partial: bool | None = None,
        state: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
    ) -> Page[CandidateSummary]:
        """Return candidates; ``-`` sorts downwards.

        The sorts by value leave out candidates without scores and those that were measured on some items only.

        Raises:
            NotFound: no such job.
            InvalidInput: an unknown sort, state or objective, a malformed cursor, or a limit out of range.
        """
        cursors.check_limit(limit)
        _check_choice("sort", sort, CandidateSort)
        with self.read() as session:
            job = lifecycle.find_job(session, job_id)
            chosen = [CandidateRow.job_id == job_id, *_filters(on_front, partial, state)]
            if sort in ("index", "-index"):
                return _by_index(session, chosen, sort, cursor, limit)
            return _by_value(session, chosen, sort, _objective(job, objective), cursor, limit)

    def get_candidate(self, job_id: str, index: int) -> CandidateView:
        """Return one candidate with its recipe and per-item scores; raises `NotFound`."""
        with self.read() as session:
            job = lifecycle.find_job(session, job_id)
            row = find_candidate(session, job_id, index)
            recipe = session.get_one(RecipeRow, (job_id, index))
            scored = index if row.duplicate_of is None else row.duplicate_of
            items = session.scalars(
                select(ItemScoresRow)
                .where(ItemScoresRow.job_id == job_id, ItemScoresRow.index == scored)
                .order_by(ItemScoresRow.objective)
            )
            return CandidateView(
                **rendering.candidate_fields(row),
                verification=verifications.views(session, job_id, [scored]).get(scored),
                test_items=verifications.test_items(session, job, scored),
                genome=None if row.genome is None else row.genome.tolist(),
                recipe=recipe.recipe,
                parents=row.parents,
                worker=row.worker,
                items={job.objectives[item.objective]["name"]: item.values.tolist() for item in items},
            )

    def front(self, job_id: str, limit: int = 2000) -> FrontView:
        """Return the front, the baselines and at most ``limit`` other points, evenly spread over the search.

        A baseline on the front stands in both lists; a duplicate is shown only where it is a baseline. Those that were
        measured on some items only are a list of their own, ``limit`` at most.

        Raises:
            NotFound: no such job.
            InvalidInput: a limit out of range.
        """
        cursors.check_limit(limit, lowest=0, highest=100_000)
        scored = and_(CandidateRow.job_id == job_id, CandidateRow.state == "completed")
        whole = and_(scored, CandidateRow.items.is_(None))
        baselines = select(*_POINT).where(
            whole, or_(CandidateRow.origin != "algorithm", CandidateRow.label.is_not(None))
        )
        with self.read() as session:
            job = lifecycle.find_job(session, job_id)
            return FrontView(
                objectives=rendering.objectives(job),
                front=_verified(
                    session, job_id, _points(session, select(*_POINT).where(scored, CandidateRow.on_front))
                ),
                baselines=_verified(session, job_id, _points(session, baselines.limit(_MOST_BASELINES))),
                dominated=_sample(session, _is_dominated(whole), limit),
                partial=_sample(session, _is_partial(scored), limit),
                total=job.completed,
            )

    def progression(self, job_id: str) -> Progression:
        """Return the best-so-far curve of each objective, in the order of evaluation; raises `NotFound`."""
        with self.read() as session:
            job = lifecycle.find_job(session, job_id)
            rows = session.scalars(
                select(ImprovementRow).where(ImprovementRow.job_id == job_id).order_by(ImprovementRow.completed)
            ).all()
            return Progression(
                objectives=rendering.objectives(job),
                index=[row.index for row in rows],
                best=[row.best for row in rows],
                loss=[row.loss for row in rows],
            )

    def best(self, job_id: str, count: int) -> BestCandidates:
        """Return a job's models, and of the candidates on its front the ``count`` best by weighted mean of the losses.

        Raises:
            NotFound: no such job.
        """
        with self.read() as session:
            job = lifecycle.find_job(session, job_id)
            front = session.execute(
                select(CandidateRow.index, CandidateRow.label, CandidateRow.values)
                .where(CandidateRow.job_id == job_id, CandidateRow.on_front)
                .order_by(CandidateRow.index)
            ).all()
            ranked = sorted(front, key=lambda row: outcomes.mean_loss(job, row[2] or ()))[:count]
            chosen = [index for index, _, _ in ranked]
            recipes = session.execute(
                select(RecipeRow.index, RecipeRow.recipe).where(RecipeRow.job_id == job_id, RecipeRow.index.in_(chosen))
            )
            found = {index: recipe for index, recipe in recipes}  # noqa: C416 - rows, which dict() does not take
            problem = None if job.problem is None else Problem.model_validate(job.problem)
            return BestCandidates(
                models={} if problem is None else problem.models,
                recipes={index: found[index] for index in chosen},
                labels={index: label for index, label, _ in ranked if label is not None},
            )

    def enqueue(self, job_id: str, candidate: CandidateInput) -> int:
        """Queue a candidate for a job that has not ended; return its number in the job's queue, from 1.

        Raises:
            NotFound: no such job.
            Conflict: the job is over.
            InvalidInput: the job has been prepared and its search space does not have this candidate.
        """
        with self.write() as session:
            job = lifecycle.lock_job(session, job_id)
            if job is None:
                raise lifecycle.no_job(job_id)
            if job.state in lifecycle.ENDED:
                raise Conflict(f"the job is {job.state}", remedy="clone it, with the candidate in warm_starts")
            if job.problem is not None:
                check_candidate(candidate, JobSpec.model_validate(job.spec), Problem.model_validate(job.problem))
            last = session.scalar(select(func.max(EnqueuedRow.number)).where(EnqueuedRow.job_id == job_id))
            number = (last or 0) + 1
            session.add(
                EnqueuedRow(
                    job_id=job_id,
                    number=number,
                    candidate=candidate.model_dump(mode="json", exclude_none=True),
                    created_at=utc_now(),
                )
            )
            events.append(session, job_id, ("candidate.enqueued", {"queued": number}))
            return number


def check_candidate(candidate: CandidateInput, spec: JobSpec, problem: Problem) -> None:
    """Raise `InvalidInput` unless the job's search space, or its models where it is a recipe, can express it."""
    _, recipe = make_space(spec, problem).encode(candidate)
    if candidate.recipe is not None:
        # torch is imported only where there is a recipe to check: an API process stays small.
        from workers.merging.nodes import check_nodes

        check_nodes(recipe, problem.layout)


def find_candidate(session: Session, job_id: str, index: int) -> CandidateRow:
    """Return the candidate, or raise `NotFound`."""
    row = session.get(CandidateRow, (job_id, index))
    if row is None:
        raise NotFound(f"the job has no candidate {index}", field="candidate")
    return row


def _filters(on_front: bool | None, partial: bool | None, state: str | None) -> list[ColumnExpressionArgument[bool]]:
    filters: list[ColumnExpressionArgument[bool]] = []
    if on_front is not None:
        # Written so that the planners recognise the condition of the partial index.
        filters.append(CandidateRow.on_front if on_front else ~CandidateRow.on_front)
    if partial is not None:
        filters.append(CandidateRow.items.is_not(None) if partial else CandidateRow.items.is_(None))
    if state is not None:
        _check_choice("state", state, CandidateState)
        filters.append(CandidateRow.state == state)
    return filters


def _check_choice(field: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise InvalidInput(f"unknown {field} {value!r}", field=field, remedy=f"use: {', '.join(get_args(choices))}")


def _objective(job: JobRow, name: str | None) -> int:
    names = [objective["name"] for objective in job.objectives]
    if name not in names:
        message = "sorting by value needs an objective" if name is None else f"the job has no objective {name!r}"
        raise InvalidInput(message, field="objective", remedy=f"use one of: {', '.join(names)}")
    return names.index(name)


def _by_index(
    session: Session, chosen: Sequence[ColumnExpressionArgument[bool]], sort: str, cursor: str | None, limit: int
) -> Page[CandidateSummary]:
    down, column = sort.startswith("-"), CandidateRow.index
    query = select(CandidateRow).where(*chosen).order_by(column.desc() if down else column).limit(limit + 1)
    if cursor is not None:
        (last,) = cursors.decode(cursor, sort, int)
        query = query.where(column < last if down else column > last)
    rows, more = cursors.split(session.scalars(query).all(), limit)
    return Page[CandidateSummary](
        items=_summaries(session, rows),
        next_cursor=cursors.encode(sort, rows[-1].index) if more else None,
    )


def _by_value(
    session: Session,
    chosen: Sequence[ColumnExpressionArgument[bool]],
    sort: str,
    objective: int,
    cursor: str | None,
    limit: int,
) -> Page[CandidateSummary]:
    down, row = sort.startswith("-"), ObjectiveValueRow
    order = f"{sort}:{objective}"
    query = (
        select(CandidateRow, row.value)
        .join(row, and_(row.job_id == CandidateRow.job_id, row.index == CandidateRow.index))
        .where(*chosen, row.objective == objective)
        .order_by(*(key.desc() if down else key.asc() for key in (row.value, row.index)))
        .limit(limit + 1)
    )
    if cursor is not None:
        last = tuple_(*cursors.decode(cursor, order, float, int))
        position = tuple_(row.value, row.index)
        query = query.where(position < last if down else position > last)
    rows, more = cursors.split(session.execute(query).all(), limit)
    return Page[CandidateSummary](
        items=_summaries(session, [candidate for candidate, _ in rows]),
        next_cursor=cursors.encode(order, rows[-1][1], rows[-1][0].index) if more else None,
    )


def _summaries(session: Session, rows: Sequence[CandidateRow]) -> list[CandidateSummary]:
    verified = verifications.views(session, rows[0].job_id, [row.index for row in rows]) if rows else {}
    return [rendering.candidate_summary(row, verified.get(row.index)) for row in rows]


def _verified(session: Session, job_id: str, points: list[Point]) -> list[Point]:
    """The points with their verifications."""
    found = verifications.views(session, job_id, [point.index for point in points])
    return [point.model_copy(update={"verification": found.get(point.index)}) for point in points]


def _points(session: Session, query: Select[*tuple[Any, ...]]) -> list[Point]:
    rows = session.execute(query.order_by(CandidateRow.index))
    return [
        Point(
            index=index,
            values=values,
            errors=errors,
            on_front=on_front,
            label=label,
            origin=origin,
            phase=phase,
            partial=items,
            violation=violation,
        )
        for index, values, errors, on_front, label, origin, phase, items, violation in rows
    ]


def _is_dominated(whole: ColumnElement[bool]) -> ColumnElement[bool]:
    """The algorithm's own points that are not on the front and have no label."""
    return and_(
        whole,
        ~CandidateRow.on_front,
        CandidateRow.origin == "algorithm",
        CandidateRow.label.is_(None),
        CandidateRow.duplicate_of.is_(None),
    )


def _is_partial(scored: ColumnElement[bool]) -> ColumnElement[bool]:
    return and_(scored, CandidateRow.items.is_not(None), CandidateRow.duplicate_of.is_(None))


def _sample(session: Session, others: ColumnElement[bool], limit: int) -> list[Point]:
    """Every n-th of these points, n so that at most ``limit`` are left."""
    count = session.scalar(select(func.count()).select_from(CandidateRow).where(others)) or 0
    if not count or not limit:
        return []
    step = -(-count // limit)
    place = func.row_number().over(order_by=CandidateRow.index).label("place")
    numbered = select(CandidateRow.index, place).where(others).subquery()
    every = select(numbered.c.index).where((numbered.c.place - 1) % step == 0)
    return _points(session, select(*_POINT).where(others, CandidateRow.index.in_(every)))
