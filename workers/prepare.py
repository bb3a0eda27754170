"""Looking at a job's inputs before anything runs: checkpoints, operator, objectives, data, algorithm."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimizer.algorithms.base import parse_options
from optimizer.errors import InvalidInput, below
from optimizer.fitness.cost import Cost
from optimizer.geometry import Cuts, Layout
from optimizer.parameter_space import parameter_problem
from optimizer.phases import fields_of, plan
from optimizer.problem import OperatorInfo, PlannedPhase, Problem, ResolvedObjective, TestItems
from optimizer.recipe import UNKNOWN_DIGEST, ModelId
from optimizer.space import make_space, named_operators
from optimizer.spec import DataSpec, JobSpec, MergeSpec, Objective, RangeVariable
from workers.alignment import align, vocabulary_of
from workers.checkpoints import Checkpoint, open_checkpoints
from workers.compatibility import inspect, raise_on_errors
from workers.data import Rows, load_rows, no_rows
from workers.endpoint.prepare import prepare_endpoint
from workers.evaluators.base import EVALUATORS, Evaluator, Inputs, parse_evaluator, resolve_metric
from workers.evaluators.reference import ReferenceEvaluator
from workers.grams import measure_grams
from workers.identities import digest_of_files, measure_of
from workers.measuring import measures_of
from workers.merging.calibration import Calibrations, load_items, missing
from workers.merging.engine import MergeEngine
from workers.merging.operator import operator_info, parse_operator_options
from workers.references import check_experts, experts_of
from workers.roots import Roots
from workers.services.sharing import Services
from workers.splits import Splits, check_disjoint


def prepare(spec: JobSpec, roots: Roots, digest: Callable[[Checkpoint], str] = lambda found: found.digest) -> Problem:
    """Look at everything a job names and return what was found.

    Args:
        spec: the job.
        roots: where checkpoints and data may be.
        digest: how a checkpoint's content digest is found. Validation passes `quick_digest`, which reads no weights.

    Raises:
        InvalidInput: naming the field, if anything is missing, malformed or does not fit.
    """
    for field, phase in fields_of(spec):
        parse_options(phase.algorithm, field)
    if spec.parameters:
        return _prepare_parameters(spec, roots)
    if spec.base is None:
        return prepare_endpoint(spec, roots)
    operator = _operator(spec)
    checkpoints = align(open_checkpoints(spec, roots), spec.merge.vocabulary)
    base, *experts = checkpoints.values()
    _check_factors(operator, experts)
    layout, findings = inspect(base, experts, spec.merge.heads)
    raise_on_errors(findings)
    _check_heads(spec, layout)
    _check_calibration(spec)
    items = load_items(spec.merge.calibration, checkpoints, layout, roots)
    evaluators = make_evaluators(spec, roots, checkpoints)
    tests = make_test_evaluators(spec, roots, checkpoints)
    _check_splits(spec, evaluators, tests)
    refs = {"base": spec.base} | {expert.name: expert for expert in spec.experts}
    problem = Problem(
        models={
            name: ModelId(ref=refs[name].plain(), digest=digest(found), vocabulary=vocabulary_of(found))
            for name, found in checkpoints.items()
        },
        layout=layout,
        operator=operator,
        operators=_named_operators(spec),
        objectives=_resolved(spec, evaluators, tests),
        calibration={name: found.id for name, found in items.items()},
        findings=findings,
    )
    problem = problem.model_copy(update={"estimate": _estimate(spec, problem, evaluators)})
    space = make_space(spec, problem)
    engine = MergeEngine(checkpoints, layout, measurements=Calibrations(checkpoints, layout, items))
    if spec.merge.space is not None:
        for genome in (space.uniform(), space.low, space.high):  # what cannot be built, is better known at once
            engine.check(space.recipe(genome))
    for number, candidate in enumerate(spec.warm_starts.candidates):
        with below(f"warm_starts.candidates.{number}"):
            engine.check(space.encode(candidate)[1])
    phases = plan(spec, problem)
    cuts = None if digest is quick_digest else _finest(phases)
    grams = None if cuts is None else measure_grams(checkpoints, layout, cuts)
    identified = problem.objectives
    if digest is not quick_digest and spec.fitness.cache:
        identified = _identified(spec, problem, evaluators, tests, checkpoints)
    return problem.model_copy(update={"phases": phases, "grams": grams, "objectives": identified})


def quick_digest(_: Checkpoint) -> str:
    """A placeholder for validation, which must answer at once and stores nothing."""
    return UNKNOWN_DIGEST


def _identified(
    spec: JobSpec,
    problem: Problem,
    evaluators: Sequence[Evaluator],
    tests: Mapping[int, Evaluator],
    checkpoints: Mapping[str, Checkpoint],
) -> list[ResolvedObjective]:
    """The objectives, with what scores of their items are remembered under."""
    heads = {objective.head or "base" for objective in spec.objectives}
    files = {name: digest_of_files(checkpoints[name].path) for name in heads}
    out = []
    for number, (given, found, evaluator) in enumerate(
        zip(spec.objectives, problem.objectives, evaluators, strict=True)
    ):
        head = given.head or "base"
        others = _compared(spec, problem, evaluator, given.head)
        measure = measure_of(spec, given, found.metric, evaluator, [problem.models[head].digest, files[head], others])
        update: dict[str, Any] = {"measure": measure, "digests": _packed(evaluator)}
        if found.test is not None:
            update["test"] = found.test.model_copy(update={"digests": _packed(tests[number])})
        out.append(found.model_copy(update=update))
    return out


def _packed(evaluator: Evaluator) -> str:
    return base64.b64encode(b"".join(evaluator.item_digests)).decode()


def _check_splits(spec: JobSpec, evaluators: Sequence[Evaluator], tests: Mapping[int, Evaluator]) -> None:
    """Raise `InvalidData` where a test item is one of the search's."""
    check_disjoint(
        [
            Splits(
                objective.name,
                evaluators[number].rows,
                tests[number].rows if number in tests else None,
                tuple(evaluators[number].columns),
            )
            for number, objective in enumerate(spec.objectives)
        ]
    )


def make_evaluators(
    spec: JobSpec, roots: Roots, checkpoints: Mapping[str, Checkpoint], services: Services | None = None
) -> list[Evaluator]:
    """Make the evaluator of each objective, its items loaded, checked and tokenised for its head's model.

    Args:
        spec: the job.
        roots: where data may be, and what else is allowed.
        checkpoints: by name; empty in jobs without them.
        services: by which they ask services; new ones by default.
    """
    services = services or Services(workers=spec.workers.count)
    return [
        _make_evaluator(spec, number, objective.data, "data", roots, checkpoints, services)
        for number, objective in enumerate(spec.objectives)
    ]


def make_test_evaluators(
    spec: JobSpec, roots: Roots, checkpoints: Mapping[str, Checkpoint], services: Services | None = None
) -> dict[int, Evaluator]:
    """Make, for each objective that has test items, by its number, the evaluator on them; see `make_evaluators`."""
    services = services or Services(workers=spec.workers.count)
    return {
        number: _make_evaluator(spec, number, objective.test, "test", roots, checkpoints, services)
        for number, objective in enumerate(spec.objectives)
        if objective.test is not None
    }


def _make_evaluator(
    spec: JobSpec,
    number: int,
    data: DataSpec | None,
    which: str,
    roots: Roots,
    checkpoints: Mapping[str, Checkpoint],
    services: Services,
) -> Evaluator:
    field, objective = f"objectives.{number}", spec.objectives[number]
    cls, options = parse_evaluator(objective, number)
    rows = read_rows(data, cls, roots, field, which)
    path = checkpoints[objective.head or "base"].path if checkpoints else Path()
    found = cls(options, Inputs(rows, path, field, roots.policy, roots, services))
    check_experts(found, [expert.name for expert in spec.experts], field)
    return found


def _compared(spec: JobSpec, problem: Problem, evaluator: Evaluator, head: str | None) -> dict[str, str]:
    """The digests of the experts that an objective compares with."""
    if not isinstance(evaluator, ReferenceEvaluator):
        return {}
    names = experts_of(evaluator, head, [expert.name for expert in spec.experts])
    return {name: problem.models[name].digest for name in names}


def _prepare_parameters(spec: JobSpec, roots: Roots) -> Problem:
    """Look at a job without checkpoints: its objectives must all ask services."""
    if spec.merge != MergeSpec():
        raise InvalidInput("without checkpoints there is nothing to merge", field="merge", remedy="leave it out")
    for number, objective in enumerate(spec.objectives):
        cls, _ = parse_evaluator(objective, number)
        if cls.auto_class:
            raise InvalidInput(
                f"{cls.name} looks at a model, and this job has no checkpoints",
                field=f"objectives.{number}.evaluator",
                remedy="use one that asks a service, or give `base` and `experts`",
            )
    problem = parameter_problem()
    evaluators, tests = make_evaluators(spec, roots, {}), make_test_evaluators(spec, roots, {})
    _check_splits(spec, evaluators, tests)
    problem = problem.model_copy(update={"objectives": _resolved(spec, evaluators, tests)})
    problem = problem.model_copy(update={"estimate": _estimate(spec, problem, evaluators)})
    space = make_space(spec, problem)
    for number, candidate in enumerate(spec.warm_starts.candidates):
        with below(f"warm_starts.candidates.{number}"):
            space.encode(candidate)
    return problem.model_copy(update={"phases": plan(spec, problem)})


def _estimate(spec: JobSpec, problem: Problem, evaluators: Sequence[Evaluator]) -> dict[str, float]:
    """The most that one evaluation of all measures is thought to cost."""
    measures = measures_of(spec, problem, dict(enumerate(evaluators)))
    return Cost.total(measure.evaluator.estimate() for measure in measures).to_json()


def _resolved(
    spec: JobSpec, evaluators: Sequence[Evaluator], tests: Mapping[int, Evaluator]
) -> list[ResolvedObjective]:
    return [
        _resolve(number, objective, evaluator, tests.get(number))
        for number, (objective, evaluator) in enumerate(zip(spec.objectives, evaluators, strict=True))
    ]


def read_rows(data: DataSpec | None, cls: type[Evaluator], roots: Roots, field: str, part: str = "data") -> Rows:
    """Read the rows that an evaluator measures on; none where it brings its own.

    Args:
        data: where they are.
        cls: the evaluator.
        roots: where data may be.
        field: dotted path of what names them: ``objectives.0``.
        part: under which name.

    Raises:
        InvalidInput, InvalidData: there must be data and are none, or the other way round; see `load_rows`.
    """
    where = f"{field}.{part}"
    if cls.own_items and data is not None:
        raise InvalidInput(f"{cls.name} brings its own items", field=where, remedy="leave it out; see its options")
    if cls.own_items or (cls.data_optional and data is None):
        return no_rows(where)
    if data is None:
        raise InvalidInput(f"{cls.name} needs data to measure on", field=where, remedy="name a file or a directory")
    return load_rows(data, roots.path(data.path, f"{where}.path"), where)


def _operator(spec: JobSpec) -> OperatorInfo:
    info = operator_info(spec.merge.operator, "merge.operator")
    parse_operator_options(spec.merge.operator, spec.merge.options)
    _check_modifiers(spec)
    count = len(spec.experts)
    if count < info.min_experts or (info.max_experts is not None and count > info.max_experts):
        allowed = f"{info.min_experts} to {info.max_experts}" if info.max_experts else f"at least {info.min_experts}"
        raise InvalidInput(
            f"{info.name} merges {allowed} experts, not {count}",
            field="experts",
            remedy="choose another operator, for example task_arithmetic",
        )
    return info


def _finest(phases: Sequence[PlannedPhase]) -> Cuts | None:
    """Where the Gram matrices of the models must be cut for all the phases' algorithms; None if none needs any."""
    wanted: set[Cuts | None] = set()
    for phase in phases:
        cls, options = parse_options(phase.algorithm)
        wanted.add(cls.cuts(options))
    order: tuple[Cuts, ...] = ("parameters", "tensors", "layers")
    return next((cuts for cuts in order if cuts in wanted), None)


def _named_operators(spec: JobSpec) -> dict[str, OperatorInfo]:
    """The operators that the search space names besides; none may need more than weights."""
    found = {}
    for name, options in named_operators(spec):
        info = operator_info(name, "merge.space.options")
        parse_operator_options(name, options, "merge.space.options")
        if info.needs != "weights":
            raise InvalidInput(
                f"{name} needs more than the models' weights, which search spaces cannot give it",
                field="merge.space.options",
                remedy="name operators that need weights only",
            )
        found[name] = info
    return found


def _check_modifiers(spec: JobSpec) -> None:
    for number, modifier in enumerate(spec.merge.modifiers):
        field = f"merge.modifiers.{number}"
        info = operator_info(modifier.operator, f"{field}.operator")
        if not info.modifier:
            raise InvalidInput(
                f"{info.name} is no modifier: it does not work on a single model",
                field=f"{field}.operator",
                remedy="GET /api/v1/operators says which ones are",
            )
        for name, value in modifier.options.items():
            if isinstance(value, RangeVariable) and (value.per_group or value.per_expert):
                raise InvalidInput(
                    "a modifier has one value of each option",
                    field=f"{field}.options.{name}",
                    remedy="leave out `per_group` and `per_expert`",
                )
        parse_operator_options(modifier.operator, modifier.options, f"{field}.options")


def _check_calibration(spec: JobSpec) -> None:
    """Every operator that measures models needs data for them, and models to measure: not changed ones."""
    used = [spec.merge.operator, *(modifier.operator for modifier in spec.merge.modifiers)]
    for info in map(operator_info, used):
        if info.needs not in ("items", "gradients"):
            continue
        for name in ["base"] if info.measures == "base" else [expert.name for expert in spec.experts]:
            if name not in spec.merge.calibration:
                raise missing(name, info.name)
        for number, modifier in enumerate(spec.merge.modifiers):
            if modifier.target == "experts" and info.measures == "experts":
                raise InvalidInput(
                    f"{info.name} measures the experts as they are, so they cannot be modified before",
                    field=f"merge.modifiers.{number}.target",
                    remedy="modify the merged model, or use an operator that needs no calibration data",
                )


def _check_factors(operator: OperatorInfo, experts: Sequence[Checkpoint]) -> None:
    """An operator on the factors of adapters needs at least one."""
    if operator.needs != "factors":
        return
    if not any(expert.factors(name) is not None for expert in experts for name in expert.tensors):
        raise InvalidInput(
            f"{operator.name} merges LoRA adapters, and none of the experts is one",
            field="merge.operator",
            remedy="name adapters' directories among the experts, or choose another operator such as task_arithmetic",
        )


def _check_heads(spec: JobSpec, layout: Layout) -> None:
    """Where experts have heads of their own, an objective that uses one must say whose."""
    if len(layout.shared) == len(layout.tensors):
        return
    names = ", ".join(expert.name for expert in spec.experts)
    for number, objective in enumerate(spec.objectives):
        uses_head = EVALUATORS.find(objective.evaluator, f"objectives.{number}.evaluator").uses_head
        if uses_head and objective.head is None:
            raise InvalidInput(
                "the experts have heads of their own, so this objective must name whose head it uses",
                field=f"objectives.{number}.head",
                remedy=f"use one of: {names}",
            )


def _resolve(number: int, objective: Objective, evaluator: Evaluator, test: Evaluator | None) -> ResolvedObjective:
    metric, direction = resolve_metric(objective, evaluator, number)
    constraint = objective.constraint
    return ResolvedObjective(
        name=objective.name,
        metric=metric,
        direction=direction,
        use=objective.use,
        weight=objective.weight,
        at_least=constraint.at_least if constraint else None,
        at_most=constraint.at_most if constraint else None,
        items=len(evaluator),
        data_digest=evaluator.digest,
        whole=metric in evaluator.whole_only,
        differentiable=evaluator.differentiable,
        test=None if test is None else TestItems(items=len(test), data_digest=test.digest),
    )
