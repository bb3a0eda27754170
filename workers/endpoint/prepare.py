"""Looking at a job over somebody else's models: what their owner offers, and whether the job fits it."""

from __future__ import annotations

from optimizer.algorithms.base import parse_options
from optimizer.errors import InvalidInput, NotOffered, below
from optimizer.geometry import Cuts
from optimizer.phases import plan
from optimizer.problem import Finding, Grams, OperatorInfo, PlannedPhase, Problem, ResolvedObjective
from optimizer.recipe import ModelId
from optimizer.space import make_space, named_operators
from optimizer.spec import JobSpec, MergeSpec, ModelRef
from workers.endpoint.client import FIELD, EndpointClient
from workers.endpoint.protocol import RepositoryView, SetView
from workers.endpoint.questions import Question, own_set, questions_of, upload
from workers.merging.nodes import check_nodes
from workers.roots import Roots


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
    if spec.fitness.racing.enabled:
        raise InvalidInput(
            "an endpoint is asked for all items at once, so no evaluation can be stopped in between",
            field="fitness.racing.enabled",
            remedy="leave it out",
        )
    if spec.fitness.estimation.method != "none":
        raise InvalidInput(
            "what an endpoint tells is not estimated from: it may round, or tell no item's score",
            field="fitness.estimation.method",
            remedy="leave it out, or give objectives a `limit`",
        )
    operators = {info.name: info for info in view.operators}
    questions = questions_of(spec, view, roots)
    problem = Problem(
        models={model.name: ModelId(ref=ModelRef(path=model.name), digest=model.id) for model in view.models},
        layout=view.layout,
        operator=_offered(spec.merge.operator, operators, "merge.operator"),
        operators={name: _offered(name, operators, "merge.space.options") for name, _ in named_operators(spec)},
        objectives=_resolved(spec, client, view, questions),
        findings=_findings(view),
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
    spec: JobSpec, client: EndpointClient, view: RepositoryView, questions: list[Question]
) -> list[ResolvedObjective]:
    found = _sets(spec, client, view, questions)
    out = []
    for number, objective in enumerate(spec.objectives):
        question = next(part for part in questions if number in part.numbers)
        measured = found[questions.index(question)]
        metrics = measured.metrics
        metric = objective.metric if objective.metric is not None else next(iter(metrics))
        if metric not in metrics:
            raise InvalidInput(
                f"{objective.evaluator} has no metric {metric!r}",
                field=f"objectives.{number}.metric",
                remedy=f"use one of: {', '.join(metrics)}",
            )
        bounds = objective.constraint
        out.append(
            ResolvedObjective(
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
            )
        )
    return out


def _sets(spec: JobSpec, client: EndpointClient, view: RepositoryView, questions: list[Question]) -> list[SetView]:
    """What the server makes of each question's items."""
    if all(question.upload is None for question in questions):
        return [own_set(spec.objectives[part.numbers[0]], part.numbers[0], view) for part in questions]
    session = client.open_session().id
    try:
        return [
            upload(client, session, part)
            if part.upload is not None
            else own_set(spec.objectives[part.numbers[0]], part.numbers[0], view)
            for part in questions
        ]
    finally:
        client.close_session(session)


def _findings(view: RepositoryView) -> list[Finding]:
    out = []
    if view.rules.max_share < 1:
        out.append(
            f"candidates in which one expert has more than {view.rules.max_share:.0%} of the coefficients are not evaluated"
        )
    if view.scoring.decimals is not None:
        out.append(f"scores are rounded to {view.scoring.decimals} decimals")
    if view.scoring.scores == "aggregate":
        out.append("scores are means over the items; there is none for a single item")
    return [Finding(severity="info", model="base", message=f"the owner says: {text}") for text in out]


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
