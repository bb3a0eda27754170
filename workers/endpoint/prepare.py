"""Looking at a job over somebody else's models: what their owner offers, and whether the job fits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimizer.algorithms.base import parse_options
from optimizer.errors import InvalidData, InvalidInput, NotOffered, below
from optimizer.geometry import Cuts
from optimizer.phases import plan
from optimizer.problem import Finding, Grams, OperatorInfo, PlannedPhase, Problem, ResolvedObjective, TestItems
from optimizer.recipe import ModelId
from optimizer.space import make_space, named_operators
from optimizer.spec import JobSpec, MergeSpec, ModelRef, Objective
from workers.data import Rows
from workers.endpoint.client import FIELD, EndpointClient
from workers.endpoint.protocol import RepositoryView, SetView
from workers.endpoint.questions import SPLITS, Key, Question, own_set, questions_of, upload
from workers.evaluators.base import EVALUATORS
from workers.merging.nodes import check_nodes
from workers.roots import Roots
from workers.splits import Splits, check_disjoint


def prepare_endpoint(spec: JobSpec, roots: Roots) -> Problem:
    """Ask the endpoint what it offers, upload the job's items once to have them checked, and return what was found.

    Raises:
        InvalidInput: naming the field, if anything does not fit.
        JobPaused, ServiceUnavailable: the endpoint cannot be asked now.
    """
    if spec.endpoint is None:
        raise InvalidInput("the job has no endpoint", field=FIELD)
    client = EndpointClient(spec.endpoint, roots.policy)
    try:
        return _prepared(spec, client, client.repository(), roots)
    finally:
        client.close()


def _prepared(spec: JobSpec, client: EndpointClient, view: RepositoryView, roots: Roots) -> Problem:
    _check_merge(spec.merge, view)
    _check_workers(spec, view)
    if view.scoring.scores == "aggregate":
        _check_fitness(spec)
    operators = {info.name: info for info in view.operators}
    questions, tests = (questions_of(spec, view, roots, split) for split in SPLITS)
    _check_splits(spec, questions, tests)
    problem = Problem(
        models={model.name: ModelId(ref=ModelRef(path=model.name), digest=model.id) for model in view.models},
        layout=view.layout,
        operator=_offered(spec.merge.operator, operators, "merge.operator"),
        operators={name: _offered(name, operators, "merge.space.options") for name, _ in named_operators(spec)},
        objectives=_resolved(spec, client, view, questions, tests),
        findings=_findings(view, tests),
        alone=view.rules.max_share >= 1,
    )
    space = make_space(spec, problem)
    check_nodes(space.recipe(space.uniform()), problem.layout)
    for number, candidate in enumerate(spec.warm_starts.candidates):
        with below(f"warm_starts.candidates.{number}"):
            check_nodes(space.encode(candidate)[1], problem.layout)
    phases = plan(spec, problem)
    _check_phases(phases, view)
    return problem.model_copy(update={"phases": phases, "grams": _grams(phases, client, view)})


def _check_merge(merge: MergeSpec, view: RepositoryView) -> None:
    """What is the owner's affair, and what the owner does not offer."""
    plain = MergeSpec()
    for name in ("calibration", "vocabulary", "heads"):
        if getattr(merge, name) != getattr(plain, name):
            raise InvalidInput(
                "that is for the owner of the models to say", field=f"merge.{name}", remedy="leave it out"
            )
    for number, modifier in enumerate(merge.modifiers):
        info = _offered(
            modifier.operator, {info.name: info for info in view.operators}, f"merge.modifiers.{number}.operator"
        )
        if not info.modifier:
            raise InvalidInput(f"{info.name} is no modifier", field=f"merge.modifiers.{number}.operator")
    if view.detail == "layers" and merge.granularity.layers == "tensors":
        raise NotOffered(
            "the owner names no single tensors",
            field="merge.granularity.layers",
            remedy="use `each`, `groups` or `whole`",
        )


def _check_fitness(spec: JobSpec) -> None:
    """Refuse what needs the score of every item."""
    wanted = {
        "racing.enabled": spec.fitness.racing.enabled,
        "estimation.method": spec.fitness.estimation.method != "none",
    }
    for field, given in wanted.items():
        if given:
            raise InvalidInput(
                "it compares candidates item by item, and the owner gives out means only",
                field=f"fitness.{field}",
                remedy="leave it out, or give objectives a `limit`",
            )


def _check_splits(spec: JobSpec, questions: Mapping[int, Question], tests: Mapping[int, Question]) -> None:
    """Raise `InvalidData` where test items are the search's, as far as the client can see."""
    for number, test in tests.items():
        for other, question in questions.items():
            if test.digest == question.digest:
                raise InvalidData(
                    f"these are the search items of objective {spec.objectives[other].name!r}",
                    field=f"objectives.{number}.{'test_set' if test.own else 'test'}",
                    remedy="name other items",
                )
    check_disjoint(
        [
            _split(number, objective, rows, tests.get(number))
            for number, objective in enumerate(spec.objectives)
            if (rows := questions[number].rows) is not None
        ]
    )


def _split(number: int, objective: Objective, rows: Rows, test: Question | None) -> Splits:
    columns = EVALUATORS.find(objective.evaluator, f"objectives.{number}.evaluator").columns
    return Splits(objective.name, rows, None if test is None else test.rows, tuple(columns))


def _check_workers(spec: JobSpec, view: RepositoryView) -> None:
    most = min(view.limits.in_flight, view.limits.sessions)
    if spec.workers.count > most:
        raise InvalidInput(
            f"the owner lets a token evaluate {most} candidates at once", field="workers.count", remedy="ask for fewer"
        )


def _offered(name: str, operators: dict[str, OperatorInfo], field: str) -> OperatorInfo:
    if name not in operators:
        raise NotOffered(
            f"the owner does not offer the operator {name!r}",
            field=field,
            remedy=f"use one of: {', '.join(operators)}",
        )
    return operators[name]


def _resolved(
    spec: JobSpec,
    client: EndpointClient,
    view: RepositoryView,
    questions: Mapping[int, Question],
    tests: Mapping[int, Question],
) -> list[ResolvedObjective]:
    found = _sets(spec, client, view, [*questions.values(), *tests.values()])
    return [
        _objective(number, objective, found[questions[number].key], questions[number], tests.get(number), view)
        for number, objective in enumerate(spec.objectives)
    ]


def _objective(
    number: int,
    objective: Objective,
    measured: SetView,
    question: Question,
    test: Question | None,
    view: RepositoryView,
) -> ResolvedObjective:
    metrics = measured.metrics
    metric = objective.metric if objective.metric is not None else next(iter(metrics))
    if metric not in metrics:
        raise InvalidInput(
            f"{objective.evaluator} has no metric {metric!r}",
            field=f"objectives.{number}.metric",
            remedy=f"use one of: {', '.join(metrics)}",
        )
    bounds = objective.constraint
    return ResolvedObjective(
        name=objective.name,
        metric=metric,
        direction=objective.direction or metrics[metric],
        use=objective.use,
        weight=objective.weight,
        at_least=bounds.at_least if bounds else None,
        at_most=bounds.at_most if bounds else None,
        items=question.count,
        data_digest=question.digest,
        whole=metric in measured.whole_only,
        means_only=view.scoring.scores == "aggregate",
        test=None if test is None else TestItems(items=test.count, data_digest=test.digest),
    )


def _sets(
    spec: JobSpec, client: EndpointClient, view: RepositoryView, questions: Sequence[Question]
) -> dict[Key, SetView]:
    """What the server makes of each question's items."""
    session: str | None = None
    out: dict[Key, SetView] = {}
    try:
        for question in questions:
            if question.own is not None:
                objective = spec.objectives[int(question.field.rpartition(".")[2])]
                out[question.key] = own_set(objective, question.field, view, question.split)
            elif question.key not in out:
                session = session or client.open_session().id
                out[question.key] = upload(client, session, question)
    finally:
        if session is not None:
            client.close_session(session)
    return out


def _findings(view: RepositoryView, tests: Mapping[int, Question]) -> list[Finding]:
    out = []
    if view.rules.max_share < 1:
        out.append(
            f"candidates in which one expert has more than {view.rules.max_share:.0%} of the coefficients are not evaluated"
        )
    if view.scoring.decimals is not None:
        out.append(f"scores are rounded to {view.scoring.decimals} decimals")
    if view.scoring.scores == "aggregate":
        out.append("scores are means over the items; there is none for a single item")
    found = [Finding(severity="info", model="base", message=f"the owner says: {text}") for text in out]
    if any(question.own is not None for question in tests.values()):
        text = "whether items of the owner's sets are in the search and in the test, only the owner can tell"
        found.append(Finding(severity="info", model="base", message=text))
    return found


def _check_phases(phases: list[PlannedPhase], view: RepositoryView) -> None:
    for phase in phases:
        cls, _ = parse_options(phase.algorithm)
        if cls.needs_items and view.scoring.scores == "aggregate":
            raise InvalidInput(
                f"{phase.algorithm.name} learns from the score of each item, and the owner gives out means only",
                field="algorithm",
                remedy="use another algorithm, for example evo_merging or cma_es",
            )


def _grams(phases: list[PlannedPhase], client: EndpointClient, view: RepositoryView) -> Grams | None:
    wanted: set[Cuts | None] = set()
    for phase in phases:
        cls, options = parse_options(phase.algorithm)
        wanted.add(cls.cuts(options))
    order: tuple[Cuts, ...] = ("parameters", "tensors", "layers")
    cuts = next((cuts for cuts in order if cuts in wanted), None)
    if cuts is None:
        return None
    if not view.rules.grams:
        raise InvalidInput(
            "the algorithm takes angles between the models, and the owner gives none out",
            field="algorithm",
            remedy="use another one, for example evo_merging or cma_es",
        )
    return client.grams(cuts)
