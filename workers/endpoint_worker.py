"""The worker of a job over somebody else's models: it holds none, and asks their merge-and-score endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from optimizer.errors import EvaluationTimeout, Gone, InputsChanged, JobError, NotFound, ServiceUnavailable
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import FREE, Cost
from optimizer.ports import Failure, Result, Task
from optimizer.problem import Problem
from optimizer.spec import JobSpec
from workers.endpoint.client import FIELD, EndpointClient
from workers.endpoint.protocol import EvaluationRequest, EvaluationView, Part, PartView, RepositoryView, read_scores
from workers.endpoint.questions import Key, Question, Split, questions_of, upload
from workers.evaluation import Later, measure, result_of
from workers.evaluators.base import Cancelled, Scores
from workers.measuring import Measure, attempt, measures_of, timed
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
        view = self._client.repository()
        self._fewest = view.scoring.min_items
        _check_models(problem, view)
        self._measures = _measures(spec, problem, view, roots, "data")
        self._tests = Later(partial(_measures, spec, problem, view, roots, "test"))
        self._session: str | None = None
        self._sets: dict[Key, str] = {}

    def evaluate(self, task: Task, cancelled: Callable[[], bool] = lambda: False) -> Result:
        """Return the scores of a candidate, or why it has none; raises as `attempt` does.

        Slopes are never had: nobody derives a loss through an endpoint.
        """
        return attempt(task, self._name, partial(self._evaluate, task, cancelled), self._client.meter)

    def _evaluate(self, task: Task, cancelled: Callable[[], bool], seconds: dict[str, float]) -> Result:
        spent: list[Cost] = []  # of requests the meter knows
        try:
            with timed(seconds, "evaluate"):
                found = measure(task, self._measures, self._tests, partial(self._score, task, cancelled, spent))
        except _Failed as failed:
            result = Result(task.index, failure=failed.failure, seconds=seconds, worker=self._name)
        else:
            result = result_of(task, found, self._name, seconds)
        return replace(result, cost=Cost.total(spent))

    def _score(
        self,
        task: Task,
        cancelled: Callable[[], bool],
        spent: list[Cost],
        wanted: Sequence[tuple[Measure[Question], Question]],
    ) -> list[Scores]:
        """The scores by several measures, with one merge; the cost goes to ``spent``."""
        asked = [question.asked(taken.order, self._fewest) for taken, question in wanted]
        view = self._asked(
            task, cancelled, [(question, items) for (_, question), items in zip(wanted, asked, strict=True)]
        )
        spent.append(Cost(view.cost.items, view.cost.tokens))
        if view.failure is not None or view.parts is None:
            raise _Failed(self._failure(view, cancelled))
        return [
            Scores({metric: _scores_of(part, metric, question, items) for _, metric in taken.objectives}, FREE)
            for (taken, question), items, part in zip(wanted, asked, view.parts, strict=True)
        ]

    def _asked(
        self, task: Task, cancelled: Callable[[], bool], wanted: Sequence[tuple[Question, list[int] | None]]
    ) -> EvaluationView:
        for _ in range(RENEWALS):
            try:
                session = self._session or self._open()
                candidate = self._client.materialise(session, task.recipe, cancelled)
                parts = [Part(set=self._set(session, question), items=items) for question, items in wanted]
                view = self._client.evaluate(session, EvaluationRequest(candidate=candidate, parts=parts), cancelled)
            except (Gone, NotFound):  # it expired, or the server was started anew
                self._session = None
                continue
            if view.candidate != candidate or (view.parts is not None and len(view.parts) != len(parts)):
                raise ServiceUnavailable("the endpoint answers something else than it was asked", field=FIELD)
            return view
        raise ServiceUnavailable("the endpoint's sessions end before an evaluation does", field=FIELD)

    def _open(self) -> str:
        self._session, self._sets = self._client.open_session().id, {}
        return self._session

    def _set(self, session: str, question: Question) -> str:
        """What the endpoint calls a question's items, which are uploaded when they are first asked for."""
        if question.key not in self._sets:
            self._sets[question.key] = question.own or upload(self._client, session, question).digest
        return self._sets[question.key]

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


class _Failed(Exception):
    """The endpoint says that a candidate has no scores, and why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _measures(
    spec: JobSpec, problem: Problem, view: RepositoryView, roots: Roots, split: Split
) -> list[Measure[Question]]:
    """The measures over some items; raises `InputsChanged` if these are not those that the job began with."""
    questions = questions_of(spec, view, roots, split)
    for number, question in questions.items():
        objective = problem.objectives[number]
        if (objective if split == "data" else objective.test_items).data_digest != question.digest:
            raise InputsChanged(
                f"the items of objective {objective.name!r} are not those the job began with", remedy="restore them"
            )
    return measures_of(spec, problem, questions, split)


def _check_models(problem: Problem, view: RepositoryView) -> None:
    """Raise `InputsChanged` if the owner's models are not those that the job began with."""
    found = {model.name: model.id for model in view.models}
    for name, model in problem.models.items():
        if found.get(name) != model.digest:
            raise InputsChanged(f"the owner's model {name!r} is not the one the job began with", field=FIELD)


def _scores_of(part: PartView, metric: str, question: Question, asked: Sequence[int] | None) -> ItemScores:
    """The scores of the items that a question is about, of those that were asked for; of all where that is their mean."""
    places = range(question.count) if asked is None else asked
    _check_part(part, len(places))
    if metric not in part.scores:
        raise ServiceUnavailable(f"the endpoint gives no {metric}", field=FIELD)
    scores = read_scores(part.scores[metric])
    if part.scores[metric].values is None or question.positions is None:
        return scores
    rows = list(question.positions) if asked is None else slice(len(question))  # those come first among the asked
    return ItemScores(scores.values[rows], None if scores.weights is None else scores.weights[rows])


def _check_part(part: PartView, items: int) -> None:
    if part.items != items:
        raise ServiceUnavailable(f"the endpoint scored {part.items} items, not {items}", field=FIELD)
    for metric, scores in part.scores.items():
        for numbers in (scores.values, scores.weights):
            if numbers is not None and len(numbers) != items:
                raise ServiceUnavailable(
                    f"the endpoint has {len(numbers)} scores of {metric}, not {items}", field=FIELD
                )
