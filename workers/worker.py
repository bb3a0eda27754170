"""One evaluation worker: resident models, tokenised items, and nothing that outlives it."""

from __future__ import annotations

import logging
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from optimizer.errors import (
    InfeasibleCandidate,
    InputsChanged,
    InvalidInput,
    JobError,
    RetryableError,
    UserError,
    WorkerLost,
)
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.subset import item_order
from optimizer.ports import Failure, Result, Task
from optimizer.problem import Problem
from optimizer.recipe import Recipe
from optimizer.space import make_groups
from optimizer.spec import JobSpec, Workers
from workers.alignment import align, vocabulary_of
from workers.checkpoints import Checkpoint, open_checkpoints
from workers.evaluators.base import Evaluator
from workers.merging.cache import Cache
from workers.merging.calibration import Calibrations, check_items, load_items
from workers.merging.engine import MergeEngine
from workers.merging.resident import ResidentModels
from workers.prepare import make_evaluators
from workers.roots import Roots
from workers.slopes import Slopes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Measure:
    """An evaluator that runs once for all objectives that read the same items through the same head."""

    evaluator: Evaluator
    head: str | None
    objectives: tuple[tuple[str, str], ...]  # (objective, metric)
    order: NDArray[np.int64]  # of the items, where only some are measured
    whole: bool  # whether a metric is asked for that only all items together have
    parts: dict[int, Evaluator] = field(default_factory=dict)

    def on(self, items: int | None) -> Evaluator:
        """The evaluator on the first ``items`` of the fixed order; all of them, as they come, where there are no more."""
        if items is None or self.whole or items >= len(self.evaluator):
            return self.evaluator
        if items not in self.parts:
            self.parts[items] = self.evaluator.subset(self.order[:items].tolist())
        return self.parts[items]


class EvaluationWorker:
    """Evaluates candidates of one job: merges in place into the resident model, then runs every evaluator.

    Args:
        spec: the job.
        problem: its inputs as found when it was prepared.
        roots: where checkpoints and data may be.
        name: how the worker is called in results.
        cache: of what operators prepare, best over a directory that all workers of a machine share.
    """

    def __init__(self, spec: JobSpec, problem: Problem, roots: Roots, name: str, *, cache: Cache | None = None) -> None:
        self._name = name
        device = _device(spec.workers)
        torch.set_num_threads(max(1, int(spec.workers.cpus)))
        checkpoints = align(open_checkpoints(spec, roots), spec.merge.vocabulary)
        evaluators = make_evaluators(spec, roots, checkpoints)
        _check_inputs(problem, checkpoints, evaluators)
        items = load_items(spec.merge.calibration, checkpoints, problem.layout, roots)
        check_items(items, problem.calibration)
        engine = MergeEngine(
            checkpoints,
            problem.layout,
            keep_on=device if device.type == "cuda" else None,
            cache=cache,
            measurements=Calibrations(checkpoints, problem.layout, items, cache=cache, device=device),
        )
        dtype = getattr(torch, spec.workers.dtype)
        self._models = ResidentModels(checkpoints, problem.layout, engine, device, dtype)
        self._measures = _measures(spec, problem, evaluators)
        self._objectives = [objective.name for objective in problem.objectives]
        groups = make_groups(spec.merge.granularity, problem.layout, spec.merge.frozen)
        self._slopes = Slopes(self._models, engine, groups)

    def evaluate(self, task: Task, cancelled: Callable[[], bool] = lambda: False) -> Result:
        """Return the per-item scores of a candidate, or why it has none.

        Errors that concern the whole job or that a retry may mend are raised: `JobError`, `UserError`,
        `RetryableError`. Everything else is this candidate's failure.
        """
        seconds: dict[str, float] = {}
        try:
            with _timed(seconds, "merge"):
                self._models.apply(Recipe.parse(task.recipe))
            scores: dict[str, ItemScores] = {}
            with _timed(seconds, "evaluate"):
                for measure in self._measures:
                    model = self._models.model(measure.head, measure.evaluator.auto_class)
                    found = measure.on(task.items).evaluate(model, cancelled)
                    scores |= {objective: found[metric] for objective, metric in measure.objectives}
            slopes = None
            if task.slopes:
                with _timed(seconds, "slopes"):
                    slopes = self._slopes_of(task, cancelled)
        except (RetryableError, JobError):
            raise
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            return self._failed(task, "out_of_memory", error, seconds)
        except torch.AcceleratorError as error:
            raise WorkerLost(f"the GPU reported: {error}") from error  # nothing works in this process any more
        except (InfeasibleCandidate, UserError) as error:
            return self._failed(task, error.code, error, seconds)
        except Exception as error:  # noqa: BLE001 - an evaluator's defect costs this candidate, not the job
            return self._failed(task, "evaluation_failed", error, seconds)
        return Result(task.index, scores, seconds=seconds, worker=self._name, slopes=slopes)

    def _slopes_of(self, task: Task, cancelled: Callable[[], bool]) -> NDArray[np.float64] | None:
        """The slopes at the model that was just scored; None where they cannot be had, which is no failure."""
        if task.recipe.get("layers") is not None:
            return None  # another number or order of layers than the experts'
        objectives = {name: row for row, name in enumerate(self._objectives)}
        out: NDArray[np.float64] | None = None
        try:
            for measure in self._measures:
                found = self._slopes.measure(measure.on(task.items), measure.head, cancelled)
                if found is None:
                    return None
                if out is None:
                    out = np.empty((2, len(objectives), *found.shape[1:]))
                out[:, [objectives[name] for name, _ in measure.objectives]] = found[:, None]
        except torch.OutOfMemoryError:
            log.warning("no slopes: a backward pass does not fit into the GPU's memory")
            torch.cuda.empty_cache()
            return None
        return out if out is not None and np.isfinite(out).all() else None

    def _failed(self, task: Task, code: str, error: Exception, seconds: Mapping[str, float]) -> Result:
        message = str(error) or type(error).__name__
        return Result(task.index, failure=Failure(code, message[:2000]), seconds=dict(seconds), worker=self._name)


class _timed:  # noqa: N801 - reads as a statement
    """Adds the seconds its block took to a dictionary."""

    def __init__(self, into: dict[str, float], part: str) -> None:
        self._into, self._part = into, part

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._into[self._part] = time.perf_counter() - self._start


def _check_inputs(problem: Problem, checkpoints: Mapping[str, Checkpoint], evaluators: Sequence[Evaluator]) -> None:
    """Raise `InputsChanged` if this node has other checkpoints or data under the job's paths than the job began with."""
    for name, checkpoint in checkpoints.items():
        if checkpoint.digest != problem.models[name].digest:
            raise InputsChanged(
                f"the checkpoint {name!r} at {checkpoint.path} on {socket.gethostname()} is not the one the job began with",
                remedy="give all nodes the same files",
            )
        if vocabulary_of(checkpoint) != problem.models[name].vocabulary:
            raise InputsChanged(
                f"the tokenizer of {name!r} on {socket.gethostname()} is not the one the job began with",
                remedy="give all nodes the same files",
            )
    for objective, evaluator in zip(problem.objectives, evaluators, strict=True):
        if evaluator.digest != objective.data_digest:
            raise InputsChanged(
                f"the data of objective {objective.name!r} on {socket.gethostname()} is not what the job began with",
                remedy="give all nodes the same files",
            )


def _device(workers: Workers) -> torch.device:
    wanted = workers.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(
            "this worker has no GPU", field="workers.device", remedy="use `auto` or `cpu`, or ask for `workers.gpus`"
        )
    if wanted == "cpu" or (wanted == "auto" and not workers.gpus) or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _measures(spec: JobSpec, problem: Problem, evaluators: list[Evaluator]) -> list[_Measure]:
    """Group objectives that differ only in the metric, so that each forward pass is done once."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, objective in enumerate(spec.objectives):
        same: dict[str, Any] = objective.model_dump(mode="json", include={"evaluator", "options", "data", "head"})
        groups[repr(same)].append(number)
    return [
        _Measure(
            evaluator=evaluators[numbers[0]],
            head=spec.objectives[numbers[0]].head,
            objectives=tuple((spec.objectives[n].name, problem.objectives[n].metric) for n in numbers),
            order=item_order(spec.seed, len(evaluators[numbers[0]])),
            whole=any(problem.objectives[n].whole for n in numbers),
        )
        for numbers in groups.values()
    ]
