"""What a job's phases are, and how what one found is put into the words of the next one's space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms.base import ALGORITHMS, parse_options
from optimizer.errors import InvalidInput
from optimizer.problem import Grams, PlannedPhase, Problem
from optimizer.recipe import Leaf, Merge, Recipe
from optimizer.space import Genome, JobSpace, MergeSpace
from optimizer.spec import JobSpec, Phase
from optimizer.tables import FAMILY, Table, linear_table, near

_SAME = 1e-12


def plan(spec: JobSpec, problem: Problem) -> list[PlannedPhase]:
    """Return the phases of a job with everything settled: shares as evaluations, `auto` as what it chose.

    Raises:
        InvalidInput: an unknown algorithm, a bad option, an algorithm that cannot search what the job merges, or races
            where no algorithm has any; it names the field.
    """
    phases = fields_of(spec)
    left = 1 - sum(phase.share or 0 for _, phase in phases)
    open_ended = sum(phase.share is None for _, phase in phases)
    planned: list[PlannedPhase] = []
    for field, phase in phases:
        share = phase.share if phase.share is not None else left / open_ended
        planned += _settled(spec, problem, phase, max(1, round(share * spec.budget.evaluations)), field)
    if spec.fitness.racing.enabled:
        _check_races(planned)
    return planned


def _check_races(planned: Sequence[PlannedPhase]) -> None:
    names = list(dict.fromkeys(phase.algorithm.name for phase in planned))
    if not any(ALGORITHMS[name].races for name in names):
        racing = ", ".join(name for name, cls in ALGORITHMS.items() if cls.races)
        raise InvalidInput(
            f"{' and '.join(names)} measure{'s' if len(names) == 1 else ''} every candidate on all items: nothing is raced",
            field="fitness.racing.enabled",
            remedy=f"leave it out, or search with auto or one of {racing}",
        )


def fields_of(spec: JobSpec) -> list[tuple[str, Phase]]:
    """Return the phases as the user gave them, each with the dotted path of its algorithm."""
    if not spec.phases:
        return [("algorithm", Phase(algorithm=spec.algorithm))]
    return [(f"phases.{number}.algorithm", phase) for number, phase in enumerate(spec.phases)]


def _settled(spec: JobSpec, problem: Problem, phase: Phase, evaluations: int, field: str) -> list[PlannedPhase]:
    cls, options = parse_options(phase.algorithm, field)
    if phase.keep_experts is not None and spec.merge.space is not None:
        raise InvalidInput(
            f"the space {spec.merge.space.name} names its models itself",
            field=field.replace(".algorithm", ".keep_experts"),
            remedy="leave it out",
        )
    found = cls.phases(spec, problem, options, evaluations)
    if found is None:
        narrowed = phase.keep_experts is not None and phase.keep_experts < len(problem.experts)
        if not narrowed:
            cls.make_space(spec, problem, options)
        return [
            PlannedPhase(
                algorithm=phase.algorithm,
                evaluations=evaluations,
                patience=phase.patience,
                keep_experts=phase.keep_experts,
            )
        ]
    for part in found:
        parse_options(part.algorithm, field)
    return found


def translate(space: JobSpace, recipe: Recipe) -> tuple[Genome | None, bool]:
    """Return the genome whose recipe comes closest to ``recipe``, and whether it gives the same weights.

    The genome is None where the space has nothing alike. A table of break points becomes, in a space of coefficient
    groups, the mean in each group; experts that the space does not have are left out.
    """
    exact = space.adopt(recipe)
    if exact is not None:
        return exact, True
    if not _linear(space):
        return None, False
    layout = space.problem.layout
    table = linear_table(recipe, layout)
    if table is None:
        return None, False
    means = near(table, space.groups, layout)
    names = list(recipe.models)
    genome = space.point({name: means[:, names.index(name)].tolist() for name in space.columns if name in names})
    found = linear_table(space.recipe(genome), layout, names)
    return genome, found is not None and _equal(found, table)


def _linear(space: JobSpace) -> TypeGuard[MergeSpace]:
    """Whether its recipes are tables, a coefficient for each expert."""
    return (
        isinstance(space, MergeSpace)
        and space.problem.operator.name in FAMILY
        and space.columns == tuple(name for name in space.problem.models if name != "base")
        and not space.modifiers
        and not space.varied
    )


def _equal(a: Table, b: Table) -> bool:
    breaks = np.union1d(a.breaks, b.breaks)
    return bool(np.allclose(a.rows(breaks), b.rows(breaks), rtol=0, atol=_SAME))


def influence(recipe: Recipe) -> dict[str, float]:
    """Return how much of each model is in a merge: by name, the mean absolute coefficient down to it."""
    return _influence(recipe.root)


def _influence(node: Leaf | Merge) -> dict[str, float]:
    if isinstance(node, Leaf):
        return {node.model: 1.0}
    means = np.abs(np.array(node.coefficients)).mean(axis=0)
    if len(means) != len(node.inputs):
        # A single coefficient stands for a position between two inputs, or for a factor of all.
        t = float(means[0])
        means = np.array([1 - t, t]) if len(node.inputs) == 2 else np.full(len(node.inputs), t)
    out: dict[str, float] = {}
    for weight, child in [(1.0, node.base), *zip(means.tolist(), node.inputs, strict=True)]:
        for name, value in _influence(child).items():
            out[name] = out.get(name, 0.0) + weight * value
    return out


def most_used(recipes: Iterable[Recipe], experts: Sequence[str], keep: int) -> list[str]:
    """Return the ``keep`` experts that count most in the recipes, each of which counts the same; in the job's order."""
    total = dict.fromkeys(experts, 0.0)
    for recipe in recipes:
        found = {name: value for name, value in influence(recipe).items() if name in total}
        whole = sum(found.values()) or 1.0
        for name, value in found.items():
            total[name] += value / whole
    ranked = sorted(experts, key=lambda name: -total[name])[:keep]
    return [name for name in experts if name in ranked]


def narrow(spec: JobSpec, problem: Problem, experts: Sequence[str]) -> tuple[JobSpec, Problem]:
    """Return the job as it were with these experts only."""
    if list(experts) == problem.experts:
        return spec, problem
    places = [number for number, name in enumerate(problem.experts) if name in experts]
    options = {
        name: [value[place] for place in places] if isinstance(value, list) else value
        for name, value in spec.merge.options.items()
    }
    info = problem.operator
    if len(places) < info.min_experts:
        raise InvalidInput(
            f"{info.name} merges at least {info.min_experts} experts", field="phases", remedy="keep more experts"
        )
    models = {name: model for name, model in problem.models.items() if name == "base" or name in experts}
    return (
        spec.model_copy(
            update={
                "experts": [expert for expert in spec.experts if expert.name in experts],
                "merge": spec.merge.model_copy(update={"options": options}),
            }
        ),
        problem.model_copy(update={"models": models, "grams": _chosen(problem, models)}),
    )


def _chosen(problem: Problem, models: Mapping[str, object]) -> Grams | None:
    if problem.grams is None:
        return None
    places = [number for number, name in enumerate(problem.models) if name in models]
    products: NDArray[np.float64] = problem.grams.products[:, places][:, :, places]
    return Grams.pack(problem.grams.edges, products)
