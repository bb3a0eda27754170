"""What all workers have in common: the measures of a job, each taken once for all objectives that share it."""

from __future__ import annotations

import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from optimizer.errors import (
    InfeasibleCandidate,
    InputsChanged,
    JobError,
    JobPaused,
    RetryableError,
    UserError,
    WorkerLost,
)
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import FREE, Cost
from optimizer.fitness.known import PlacedScores, Places, pick
from optimizer.fitness.subset import item_order
from optimizer.ports import Failure, Result, Task
from optimizer.problem import Problem, ResolvedObjective
from optimizer.spec import JobSpec
from workers.evaluators.base import Scores
from workers.services.meter import Meter

_MOST_PARTS = 64
_NONE: Places = np.empty(0, dtype=np.int64)


class Items(Protocol):
    """Items that candidates can be measured on: an evaluator's, or those of somebody who is asked."""

    @property
    def digest(self) -> str:
        """SHA-256 over them."""
        ...

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def subset(self, items: Sequence[int]) -> Self:
        """Return some of them, in this order."""
        ...


E = TypeVar("E", bound=Items)


@dataclass(frozen=True)
class Measure(Generic[E]):
    """An evaluator that runs once for all objectives that read the same items through the same head.

    Attributes:
        objectives: (objective, metric) of each.
        axis: whether one of them is an axis of the front.
        order: of the items, where only some are measured.
        whole: whether a metric is asked for that only all items together have.
    """

    evaluator: E
    head: str | None
    objectives: tuple[tuple[str, str], ...]
    axis: bool
    order: NDArray[np.int64]
    whole: bool
    parts: dict[bytes, E] = field(default_factory=dict)

    def on(self, items: int | None) -> E:
        """The evaluator on the first ``items`` of the fixed order; all of them, as they come, where there are no more."""
        return self.at(self.first(items))

    def first(self, items: int | None) -> Places | None:
        """The first ``items`` of the fixed order; None for all as they come."""
        return None if items is None or self.whole or items >= len(self.evaluator) else self.order[:items]

    def together(self, wanted: Sequence[Places]) -> Places | None:
        """All items that some objective wants: in its order, where all want the same; None for all as they come."""
        same = all(np.array_equal(each, wanted[0]) for each in wanted)
        found = wanted[0] if same else np.unique(np.concatenate(wanted))
        return None if self.whole and len(found) else found

    def at(self, places: Places | None) -> E:
        """The evaluator on some of its items; on all, as they come, with None."""
        if places is None or np.array_equal(places, np.arange(len(self.evaluator))):
            return self.evaluator
        key = places.tobytes()
        if key not in self.parts:
            if len(self.parts) >= _MOST_PARTS:
                del self.parts[next(iter(self.parts))]
            self.parts[key] = self.evaluator.subset(places.tolist())
        return self.parts[key]


Score = Callable[[Sequence[tuple[Measure[E], E]]], Sequence[Scores]]
"""Scores the candidate by several measures at once, each on its items or some of them."""


def one_by_one(score: Callable[[Measure[E], E], Scores]) -> Score[E]:
    """Return what scores the candidate by one measure after the other."""
    return lambda wanted: [score(measure, items) for measure, items in wanted]


def items_fields(data: Literal["data", "test"]) -> set[str]:
    """The fields of an objective that say what is measured on which items, whatever the metric."""
    return {"evaluator", "options", "head", data, "set" if data == "data" else "test_set"}


def measures_of(
    spec: JobSpec, problem: Problem, evaluators: Mapping[int, E], data: Literal["data", "test"] = "data"
) -> list[Measure[E]]:
    """Group objectives that differ only in metric and use, so that each forward pass is done once.

    Args:
        spec: the job.
        problem: its inputs as found.
        evaluators: by number of the objective.
        data: which items they are over.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for number in evaluators:
        objective = spec.objectives[number]
        same: dict[str, Any] = objective.model_dump(mode="json", include=items_fields(data))
        groups[repr(same)].append(number)
    return [
        Measure(
            evaluator=evaluators[numbers[0]],
            head=spec.objectives[numbers[0]].head,
            objectives=tuple((spec.objectives[n].name, problem.objectives[n].metric) for n in numbers),
            axis=any(problem.objectives[n].use == "objective" for n in numbers),
            order=item_order(spec.seed, len(evaluators[numbers[0]])),
            whole=any(problem.objectives[n].whole for n in numbers),
        )
        for numbers in groups.values()
    ]


def take(
    measures: Sequence[Measure[E]], items: int | None, score: Score[E], places: Mapping[str, Places] | None = None
) -> tuple[dict[str, ItemScores], Cost]:
    """Take all measures of a candidate.

    Args:
        measures: of the job.
        items: how many items; None for all.
        score: scores it by the measures that are needed.
        places: by objective which items, in this order, whatever ``items`` says; what is left out is not measured.

    Returns:
        The per-item scores by objective, and what they cost together.
    """
    asked = []
    for measure in measures:
        wanted = {name: places.get(name, _NONE) for name, _ in measure.objectives} if places is not None else None
        at = measure.first(items) if wanted is None else measure.together(list(wanted.values()))
        if at is None or len(at):
            asked.append((measure, at, wanted))
    scores: dict[str, ItemScores] = {}
    cost = FREE
    answers = score([(measure, measure.at(at)) for measure, at, _ in asked]) if asked else []
    for (measure, at, wanted), found in zip(asked, answers, strict=True):
        cost += found.cost
        places_of = np.arange(len(measure.evaluator)) if at is None else at
        for name, metric in measure.objectives:
            scores[name] = found[metric] if wanted is None else _of(found[metric], places_of, wanted[name])
    return {name: each for name, each in scores.items() if len(each.values)}, cost


def _of(scores: ItemScores, places: Places, wanted: Places) -> ItemScores:
    """Those of the scores, which stand for items at ``places``, that are wanted."""
    if np.array_equal(places, wanted):
        return scores
    found = pick(PlacedScores(places, scores), wanted)
    assert found is not None  # noqa: S101  what was measured is what all objectives want together
    return found


def check_data(objectives: Sequence[ResolvedObjective], evaluators: Iterable[Items]) -> None:
    """Raise `InputsChanged` if this node has other data under the job's paths than the job began with."""
    for objective, evaluator in zip(objectives, evaluators, strict=True):
        if evaluator.digest != objective.data_digest:
            raise InputsChanged(
                f"the data of objective {objective.name!r} on {socket.gethostname()} is not what the job began with",
                remedy="give all nodes the same files",
            )


def attempt(task: Task, worker: str, work: Callable[[dict[str, float]], Result], meter: Meter | None = None) -> Result:
    """Return the result of ``work``, or why the candidate has none, or none yet.

    Errors that concern the whole job or that a retry may mend are raised: `JobError`, `RetryableError`. `JobPaused` becomes
    a result, so that what was spent until then is known. Everything else is this candidate's failure.

    Args:
        task: the candidate, with what it may spend.
        worker: how the worker is called in results.
        work: gets a dictionary to which it adds the seconds that its parts take.
        meter: counts what services cost; None where none are asked, or ``work`` counts itself.
    """
    if meter is None:
        return _attempt(task, worker, work)
    meter.allow(task.allowance)
    found = _attempt(task, worker, work)
    return replace(found, cost=found.cost + meter.take())  # of what was interrupted: scores have told theirs


def _attempt(task: Task, worker: str, work: Callable[[dict[str, float]], Result]) -> Result:
    seconds: dict[str, float] = {}
    try:
        return work(seconds)
    except (RetryableError, JobError):
        raise
    except JobPaused as error:
        return Result(task.index, pause=str(error), seconds=dict(seconds), worker=worker)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return _failed(task, worker, "out_of_memory", error, seconds)
    except torch.AcceleratorError as error:
        raise WorkerLost(f"the GPU reported: {error}") from error  # nothing works in this process any more
    except (InfeasibleCandidate, UserError) as error:
        return _failed(task, worker, error.code, error, seconds)
    except Exception as error:  # noqa: BLE001 - an evaluator's defect costs this candidate, not the job
        return _failed(task, worker, "evaluation_failed", error, seconds)


def _failed(task: Task, worker: str, code: str, error: Exception, seconds: Mapping[str, float]) -> Result:
    message = str(error) or type(error).__name__
    return Result(task.index, failure=Failure(code, message[:2000]), seconds=dict(seconds), worker=worker)


class timed:  # noqa: N801 - reads as a statement
    """Adds the seconds its block took to a dictionary."""

    def __init__(self, into: dict[str, float], part: str) -> None:
        self._into, self._part = into, part

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._into[self._part] = time.perf_counter() - self._start
