"""The worker of a job over somebody else's models: it holds none, and asks their merge-and-score endpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from optimizer.errors import EvaluationTimeout, Gone, InputsChanged, JobError, NotFound, ServiceUnavailable
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import Cost
from optimizer.ports import Failure, Result, Task
from optimizer.problem import Problem
from optimizer.spec import JobSpec
from workers.endpoint.client import FIELD, EndpointClient
from workers.endpoint.protocol import EvaluationRequest, EvaluationView, Part, PartView, RepositoryView, read_scores
from workers.endpoint.questions import Question, questions_of, upload
from workers.evaluators.base import Cancelled
from workers.measuring import attempt, timed
from workers.roots import Roots

RENEWALS = 4
"""Sessions that are opened for one evaluation, if they keep ending, before it counts as failed."""


class EndpointWorker:
    """Evaluates candidates of one job by asking an endpoint; a session that ends is opened anew.

    Args:
        spec: the job.
        problem: its inputs as found when it was prepared.
        roots: where data may be, and which services may be asked.
        name: how the worker is called in results.

    Raises:
        InputsChanged: the owner has other models or items than the job began with.
        JobPaused, ServiceUnavailable: the endpoint cannot be asked now.
    """

    def __init__(self, spec: JobSpec, problem: Problem, roots: Roots, name: str) -> None:
        if spec.endpoint is None:
            raise JobError("the job has no endpoint", field=FIELD)
        self._name = name
        self._client = EndpointClient(spec.endpoint, roots.policy)
        self._fewest = 0
        view = self._client.repository()
        self._fewest = view.scoring.min_items
        self._questions = questions_of(spec, view, roots)
        _check_inputs(problem, view, self._questions)
        self._metrics = [
            [(problem.objectives[number].name, problem.objectives[number].metric) for number in question.numbers]
            for question in self._questions
        ]
        self._whole = [any(problem.objectives[number].whole for number in found.numbers) for found in self._questions]
        self._session: str | None = None
        self._sets: list[str] = []

    def evaluate(self, task: Task, cancelled: Callable[[], bool] = lambda: False) -> Result:
        """Return the scores of a candidate, or why it has none; raises as `attempt` does.

        Slopes are never had: nobody derives a loss through an endpoint.
        """
        return attempt(task, self._name, partial(self._evaluate, task, cancelled), self._client.meter)

    def _evaluate(self, task: Task, cancelled: Callable[[], bool], seconds: dict[str, float]) -> Result:
        with timed(seconds, "evaluate"):
            view = self._asked(task, cancelled)
        cost = Cost(view.cost.items, view.cost.tokens)  # of requests the meter knows
        if view.failure is not None or view.parts is None:
            return Result(
                task.index, failure=self._failure(view, cancelled), seconds=seconds, worker=self._name, cost=cost
            )
        scores: dict[str, ItemScores] = {}
        wanted = zip(self._questions, self._positions(task), view.parts, self._metrics, strict=True)
        for question, expected, part, metrics in wanted:
            _check_part(part, question.count if expected is None else len(expected))
            scores |= {name: _scores_of(part, metric) for name, metric in metrics}
        return Result(task.index, scores, seconds=seconds, worker=self._name, cost=cost)

    def _asked(self, task: Task, cancelled: Callable[[], bool]) -> EvaluationView:
        for _ in range(RENEWALS):
            try:
                session = self._session or self._open()
                candidate = self._client.materialise(session, task.recipe, cancelled)
                parts = [
                    Part(set=name, items=items) for name, items in zip(self._sets, self._positions(task), strict=True)
                ]
                view = self._client.evaluate(session, EvaluationRequest(candidate=candidate, parts=parts), cancelled)
            except (Gone, NotFound):  # it expired, or the server was started anew
                self._session = None
                continue
            if view.candidate != candidate or (view.parts is not None and len(view.parts) != len(parts)):
                raise ServiceUnavailable("the endpoint answers something else than it was asked", field=FIELD)
            return view
        raise ServiceUnavailable("the endpoint's sessions end before an evaluation does", field=FIELD)

    def _positions(self, task: Task) -> list[list[int] | None]:
        """Which items of each question a task is measured on; all where a metric is had of all together only."""
        return [
            None if whole else question.positions(task.items, self._fewest)
            for question, whole in zip(self._questions, self._whole, strict=True)
        ]

    def _open(self) -> str:
        session = self._client.open_session().id
        self._sets = [question.own or upload(self._client, session, question).digest for question in self._questions]
        self._session = session
        return session

    def _failure(self, view: EvaluationView, cancelled: Callable[[], bool]) -> Failure:
        """Why a candidate has no scores; raises where that is not the candidate's fault."""
        code = view.failure.code if view.failure is not None else view.state
        message = view.failure.message if view.failure is not None else f"the endpoint says: {view.state}"
        if code == InputsChanged.code:
            raise InputsChanged(message, field=FIELD)
        if code == EvaluationTimeout.code:
            raise EvaluationTimeout(message, field=FIELD)
        if code == Cancelled.code:
            raise Cancelled(message) if cancelled() else ServiceUnavailable(message, field=FIELD)
        return Failure(code[:100], message[:2000])


def _check_inputs(problem: Problem, view: RepositoryView, questions: list[Question]) -> None:
    """Raise `InputsChanged` if the owner's models, or some items, are not those that the job began with."""
    found = {model.name: model.id for model in view.models}
    for name, model in problem.models.items():
        if found.get(name) != model.digest:
            raise InputsChanged(f"the owner's model {name!r} is not the one the job began with", field=FIELD)
    for question in questions:
        for number in question.numbers:
            if problem.objectives[number].data_digest != question.digest:
                raise InputsChanged(
                    f"the items of objective {problem.objectives[number].name!r} are not those the job began with",
                    remedy="restore them",
                )


def _check_part(part: PartView, items: int) -> None:
    if part.items != items:
        raise ServiceUnavailable(f"the endpoint scored {part.items} items, not {items}", field=FIELD)
    for metric, scores in part.scores.items():
        for numbers in (scores.values, scores.weights):
            if numbers is not None and len(numbers) != items:
                raise ServiceUnavailable(
                    f"the endpoint has {len(numbers)} scores of {metric}, not {items}", field=FIELD
                )


def _scores_of(part: PartView, metric: str) -> ItemScores:
    if metric not in part.scores:
        raise ServiceUnavailable(f"the endpoint gives no {metric}", field=FIELD)
    return read_scores(part.scores[metric])
