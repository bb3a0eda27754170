"""One evaluation worker: resident models, tokenised items, and nothing that outlives it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from optimizer.errors import InputsChanged, InvalidInput
from optimizer.ports import Result, Task
from optimizer.problem import Problem
from optimizer.recipe import Recipe
from optimizer.space import make_groups
from optimizer.spec import JobSpec, Workers
from workers.alignment import align, vocabulary_of
from workers.checkpoints import Checkpoint, open_checkpoints
from workers.evaluation import Later, measure, result_of, unseen_measures
from workers.evaluators.base import Evaluator, Scores
from workers.evaluators.service import ServiceEvaluator
from workers.measuring import Measure, attempt, check_data, measures_of, one_by_one, timed
from workers.merging.cache import Cache
from workers.merging.calibration import Calibrations, check_items, load_items
from workers.merging.engine import MergeEngine
from workers.merging.resident import ResidentModels
from workers.prepare import make_evaluators
from workers.references import References
from workers.roots import Roots
from workers.services.sharing import Services
from workers.slopes import Slopes

log = logging.getLogger(__name__)


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
        services = self._services = Services.of(spec.workers.count, cache)
        device = device_of(spec.workers)
        torch.set_num_threads(max(1, int(spec.workers.cpus)))
        checkpoints = align(open_checkpoints(spec, roots), spec.merge.vocabulary)
        evaluators = make_evaluators(spec, roots, checkpoints, self._services)
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
        self._measures = measures_of(spec, problem, dict(enumerate(evaluators)))
        references = References(self._models, problem.models, cache)
        _provide(references, self._measures)
        # Without `self`: nothing in a cycle holds models, as they would stay until a collection of garbage, which counts
        # objects and not their gigabytes.
        self._tests = Later(lambda: _provide(references, unseen_measures(spec, problem, roots, checkpoints, services)))
        self._objectives = [objective.name for objective in problem.axes]
        groups = make_groups(spec.merge.granularity, problem.layout, spec.merge.frozen)
        self._slopes = Slopes(self._models, engine, groups)

    def evaluate(self, task: Task, cancelled: Callable[[], bool] = lambda: False) -> Result:
        """Return the per-item scores of a candidate, or why it has none; raises as `attempt` does."""
        return attempt(task, self._name, partial(self._evaluate, task, cancelled), self._services.meter)

    def _evaluate(self, task: Task, cancelled: Callable[[], bool], seconds: dict[str, float]) -> Result:
        recipe = Recipe.parse(task.recipe)
        if task.test:
            self._tests()  # before the merge: experts may have to be asked about the test items, in the same model
        with timed(seconds, "merge"):
            self._models.apply(recipe)

        def score(taken: Measure[Evaluator], evaluator: Evaluator) -> Scores:
            if isinstance(evaluator, ServiceEvaluator):
                return evaluator.score(recipe, cancelled)
            return evaluator.evaluate(self._models.model(taken.head, evaluator.auto_class), cancelled)

        with timed(seconds, "evaluate"):
            found = measure(task, self._measures, self._tests, one_by_one(score))
        slopes = None
        if task.slopes:
            with timed(seconds, "slopes"):
                slopes = self._slopes_of(task, cancelled)
        return result_of(task, found, self._name, seconds, slopes)

    def _slopes_of(self, task: Task, cancelled: Callable[[], bool]) -> NDArray[np.float64] | None:
        """The slopes at the model that was just scored; None where they cannot be had, which is no failure."""
        if task.recipe.get("layers") is not None:
            return None  # another number or order of layers than the experts'
        objectives = {name: row for row, name in enumerate(self._objectives)}
        out: NDArray[np.float64] | None = None
        try:
            for taken in filter(lambda taken: taken.axis, self._measures):
                found = self._slopes.measure(taken.on(task.items), taken.head, cancelled)
                if found is None:
                    return None
                if out is None:
                    out = np.empty((2, len(objectives), *found.shape[1:]))
                rows = [objectives[name] for name, _ in taken.objectives if name in objectives]
                out[:, rows] = found[:, None]
        except torch.OutOfMemoryError:
            log.warning("no slopes: a backward pass does not fit into the GPU's memory")
            torch.cuda.empty_cache()
            return None
        return out if out is not None and np.isfinite(out).all() else None


def _provide(references: References, measures: list[Measure[Evaluator]]) -> list[Measure[Evaluator]]:
    """The measures, those against experts with what these say."""
    for taken in measures:
        references.provide(taken.evaluator, taken.head)
    return measures


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
    check_data(problem.objectives, evaluators)


def device_of(workers: Workers) -> torch.device:
    """Return where a worker's models live; raises `InvalidInput` where a GPU is asked for and there is none."""
    wanted = workers.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(
            "this worker has no GPU", field="workers.device", remedy="use `auto` or `cpu`, or ask for `workers.gpus`"
        )
    if wanted == "cpu" or (wanted == "auto" and not workers.gpus) or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
