"""Frank-Wolfe merging in a world of tiny models, where every derivative is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from optimizer.algorithms import AlgorithmContext, Outcome
from optimizer.algorithms.frank_wolfe import FrankWolfe
from optimizer.errors import InvalidInput
from optimizer.frank_wolfe_domain import Array, Chains, Table, starts
from optimizer.frank_wolfe_settings import REACH
from optimizer.frank_wolfe_space import ChainSpace, make_chain_space
from optimizer.ports import Candidate, Evaluation, Failure
from optimizer.problem import OperatorInfo, Problem
from optimizer.recipe import Leaf, Merge, Recipe
from optimizer.search import Search
from optimizer.space import Genome, MergeSpace, make_space
from optimizer.spec import JobSpec
from tests.factories import make_spec
from tests.optimizer.algorithms.driving import (
    Case,
    best_loss,
    clean,
    drive,
    make_context,
    proposals_of,
    reals,
    replay,
    smooth,
    troubled,
)
from tests.optimizer.toys import World

NAMES = ["language", "polarity", "x0", "x1", "x2", "x3"]

VARIANTS = [
    Case("frank_wolfe", options)
    for options in (
        {"away": "away"},
        {"away": "pairwise", "step": "harmonic"},
        {"oracle": "spsa", "pairs": 2},
        {"central": True, "h": 0.05},
        {"variant": "soft", "inner": 8},
        {"probe_items": 3, "step": "harmonic", "step_size": 0.5},
    )
]


class Quadratic(World):
    """A world without failures."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        recipe = Recipe.parse(dict(candidate.recipe))
        values = tuple(float(loss) for loss in self.losses(recipe))
        return Evaluation(candidate.index, values, slopes=self.slopes(recipe) if candidate.slopes else None)


class Flaky(Quadratic):
    """Every fifth merge cannot be evaluated."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        if int(candidate.fingerprint[:4], 16) % 5 == 0:
            return Evaluation(candidate.index, None, failure=Failure("infeasible", "NaN loss"))
        return super().evaluate(candidate)


class Blind(Quadratic):
    """Nobody has slopes, although they are asked for."""

    def slopes(self, recipe: Recipe) -> Array:
        return None  # type: ignore[return-value]


def job(
    options: dict[str, Any] | None = None, *, evaluations: int = 80, names: Sequence[str] = NAMES, **changes: Any
) -> JobSpec:
    objectives = [
        {"name": name, "evaluator": "text_classification", "data": {"path": name}, "metric": "loss"}
        for name in NAMES[:2]
    ]
    return make_spec(
        experts=[{"name": name, "path": f"models/{name}"} for name in names],
        objectives=objectives,
        algorithm={"name": "frank_wolfe", "options": options or {}},
        budget={"evaluations": evaluations},
        **changes,
    )


def run(world: World) -> Search:
    """Run the whole job."""
    search = Search(world.spec, world.problem)
    new = search.first()
    while new:
        search.add(new)
        for candidate in list(search.waiting):
            search.record(world.evaluate(candidate))
        new = search.next()
    return search


def own(search: Search) -> list[Candidate]:
    return [candidate for candidate in search.candidates if candidate.origin == "algorithm"]


def total(search: Search, index: int) -> float:
    original = search.candidates[index].duplicate_of
    values = search.evaluations[index if original is None else original].values
    assert values is not None
    return sum(values)


def best(search: Search) -> float:
    return min(sum(evaluation.values) for evaluation in search.evaluations.values() if evaluation.values is not None)


def minimum(world: World) -> float:
    """The least loss over the convex hull of base and experts, each group by itself."""
    space = make_space(world.spec, world.problem)
    assert isinstance(space, MergeSpace)
    rows, cols = space.table

    def loss(flat: Array) -> float:
        return float(world.losses(space.recipe(flat)).sum())

    rules = [
        {"type": "ineq", "fun": lambda flat, row=row: 1 - flat.reshape(rows, cols)[row].sum()} for row in range(rows)
    ]
    found = minimize(
        loss, np.full(space.dim, 1 / (cols + 1)), bounds=[(0, 1)] * space.dim, constraints=rules, method="SLSQP"
    )
    assert found.success
    return float(found.fun)


def gap_in(label: str | None) -> float | None:
    found = re.search(r"gap ([-\d.e+]+)", label or "")
    return float(found[1].rstrip(",")) if found else None


# --- convergence and certificates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"away": "away"},
        {"away": "pairwise"},
        {"step": "harmonic", "start": "merge", "scale": 1.0},
        {"variant": "soft"},
    ],
    ids=str,
)
def test_it_converges_and_the_gap_bounds_what_is_left(options: dict[str, Any]) -> None:
    world = Quadratic(job({"reach": 1} | options, evaluations=150, names=NAMES[:4]), layers=1)
    lowest = minimum(world)
    search = run(world)
    start = sum(world.losses(Recipe(models=world.problem.models, root=Leaf(model="base"))))
    assert best(search) - lowest < 0.03 * (start - lowest)
    certified = 0
    for candidate in own(search):
        gap = gap_in(candidate.label)
        if gap is not None and candidate.parents:
            assert total(search, candidate.parents[0]) - lowest <= gap * 1.01 + 1e-9
            certified += 1
    assert certified > 10


def test_away_steps_shed_what_plain_steps_keep() -> None:
    """At the optimum on a face of the hull plain steps zigzag; pairwise ones get there."""
    budget = 200
    plain = run(Quadratic(job({"reach": 1}, evaluations=budget), layers=1))
    pairwise = run(Quadratic(job({"reach": 1, "away": "pairwise"}, evaluations=budget), layers=1))
    lowest = minimum(Quadratic(job({}, evaluations=budget), layers=1))
    assert best(pairwise) - lowest < 0.5 * (best(plain) - lowest)


def test_the_gap_stops_it() -> None:
    search = run(
        Quadratic(job({"reach": 1, "away": "pairwise", "tolerance": 0.003}, evaluations=500, names=NAMES[:4]), layers=1)
    )
    assert search.stop_reason is not None and "Frank-Wolfe gap is" in search.stop_reason
    assert len(search.evaluations) < 300


def test_iterations_stop_it() -> None:
    search = run(Quadratic(job({"step": "harmonic", "iterations": 4, "check": False}, evaluations=500)))
    assert search.stop_reason == "all 4 iterations are done"
    assert next(c.label for c in own(search)) == "start"
    assert len(own(search)) == 5


class Sum(Quadratic):
    """What both objectives want is the sum of the first two task vectors: beyond the hull of the models."""

    @cached_property
    def targets(self) -> Array:
        base, first, second, *_ = self.models.values()
        return np.array([first + second - base] * 2)


@pytest.mark.parametrize("oracle", ["exact", "differences"])
def test_merges_beyond_the_hull_of_the_models(oracle: str) -> None:
    found = {
        reach: best(run(Sum(job({"oracle": oracle, "reach": reach}, names=NAMES[:4]), layers=1)))
        for reach in (None, 1.0, 2.0)
    }
    hull = minimum(Sum(job(names=NAMES[:4]), layers=1))
    assert found[1.0] >= hull - 1e-9
    assert max(found[None], found[2.0]) < 0.3 * hull


def test_how_far_vertices_lie() -> None:
    settings = FrankWolfe.Options
    assert settings().distance == REACH and settings(reach=2).distance == 2
    assert settings(step="harmonic").distance == 1
    world = Quadratic(job())
    _, space = table_domain(world)
    far = Table(space, with_base=True, reach=2)
    start = far.begin(np.zeros(space.dim))
    point = far.mix(start, np.zeros((1, far.parts), np.int64), np.full((1, far.parts), 0.4))
    np.testing.assert_allclose(point.genome.reshape(space.table)[:, 0], 0.8)
    assert (far.mix(start, np.zeros((1, far.parts), np.int64), np.ones((1, far.parts))).genome <= space.high).all()


# --- as published -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layers", "model"])
@pytest.mark.parametrize("form", ["formula", "cosine"])
def test_hard_steps_are_those_of_the_authors_code(granularity: str, form: str) -> None:
    """θ ← θ + λγ(s − θ) with γ = 2/(t + 2), the merge of all as start and candidate, written with whole vectors."""
    options = {
        "step": "harmonic",
        "start": "merge",
        "base_vertex": False,
        "granularity": granularity,
        "form": form,
        "iterations": 6,
        "step_size": 0.5,
        "check": False,
    }
    world = Quadratic(job(options, evaluations=100, merge={"granularity": {"layers": "tensors"}}), layers=2)
    search = run(world)
    base, *others = world.models.values()
    here = base + 0.3 * (np.array(others) - base).sum(axis=0)
    candidates = [*others, here.copy()]
    ranges = list(world._ranges.values())
    walked = [here]
    for step in range(6):
        gradient = sum((here - target) / len(here) for target in world.targets)
        scores = np.array([[_score(gradient[w], v[w], base[w], form) for w in ranges] for v in candidates])
        if form == "cosine":
            # The start is no model that workers know: its cosine is taken from those of the models it is made of.
            weights = np.array([1 - 0.3 * len(others), *[0.3] * len(others)])
            cosines = np.array(
                [[sum(_cosine((here - t)[w], m[w]) for t in world.targets) for w in ranges] for m in [base, *others]]
            )
            scores = np.array([*cosines[1:], weights @ cosines])
        chosen = scores.argmin(axis=0) if granularity == "layers" else np.full(len(ranges), scores.sum(axis=1).argmin())
        gamma = 0.3 * 0.5 * 2 / (step + 2)
        here = here.copy()
        for where, number in zip(ranges, chosen, strict=True):
            here[where] += gamma * (candidates[number][where] - here[where])
        walked.append(here)
    for candidate, expected in zip(own(search), walked, strict=True):
        assert candidate.genome is not None
        found = world.weights(search._home(candidate).recipe(candidate.genome))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def _score(gradient: Array, vertex: Array, base: Array, form: str) -> float:
    return float(gradient @ (vertex - base)) if form == "formula" else _cosine(gradient, vertex)


def _cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


class Cliff(Quadratic):
    """The last expert lies steeply downhill, and a tenth of the way there the hill begins."""

    def losses(self, recipe: Recipe) -> Array:
        base, *_, last = self.models.values()
        way = last - base
        along = (self.weights(recipe) - base) @ way / (way @ way)
        return np.asarray(super().losses(recipe) + 20 * (along**2 if along > 0 else 0) - 0.5 * along)


@pytest.mark.parametrize("variant", ["hard", "soft"])
def test_vertices_that_a_slope_recommends_are_checked_first(variant: str) -> None:
    class Steep(Cliff):
        def slopes(self, recipe: Recipe) -> Array:
            out = super().slopes(recipe)
            out[0, :, :, len(NAMES)] -= 1.0
            return out

    def searched(check: bool) -> Search:
        return run(Steep(job({"variant": variant, "check": check, "start": "base"}, evaluations=50)))

    checked, blind = searched(True), searched(False)
    assert best(checked) < best(blind)
    labels = [candidate.label or "" for candidate in own(checked)]
    assert labels[1:3] == [f"check of {NAMES[-1]}", f"check of {NAMES[0]}"] or variant == "soft"
    assert not any((candidate.label or "").startswith("check") for candidate in own(blind))


def test_soft_lets_each_objective_pick_a_vertex_of_its_own() -> None:
    search = run(Quadratic(job({"variant": "soft", "start": "base", "granularity": "model"}, evaluations=30)))
    learned = next(c for c in own(search) if c.label and "learning" in c.label)
    assert learned.genome is not None
    table = learned.genome.reshape(-1, len(NAMES))
    assert np.allclose(table[:, :2], 0.3) and not table[:, 2:].any(), "the targets lie towards the first two experts"


# --- derivatives ------------------------------------------------------------------------------------------------------


def table_domain(world: World) -> tuple[Table, MergeSpace]:
    space = make_space(world.spec, world.problem)
    assert isinstance(space, MergeSpace)
    return Table(space, with_base=True), space


def probed(world: World, domain: Table | Chains, genome: Genome, space: Any, together: bool, **options: Any) -> Array:
    point = domain.begin(genome)
    probes = domain.probes(point, options.get("h", 0.05), options.get("central", False), together)
    here = world.losses(space.recipe(genome))
    changes = [(world.losses(space.recipe(probe.genome)) - here) / probe.step for probe in probes]
    return domain.measured(point, probes, changes, together)


@pytest.mark.parametrize("together", [False, True])
def test_central_differences_are_the_exact_derivatives(together: bool) -> None:
    world = Quadratic(job())
    domain, space = table_domain(world)
    genome = np.random.default_rng(0).dirichlet(np.ones(len(NAMES) + 1), space.table[0])[:, :-1].ravel()
    exact = domain.derivatives(domain.begin(genome), world.slopes(space.recipe(genome)))
    assert exact is not None
    wide = Quadratic(job(merge={"bounds": {"low": -1, "high": 2}}))
    # Within wider bounds both sides are open; the vertices are the same.
    wide_domain, wide_space = table_domain(wide)
    found = probed(wide, wide_domain, genome, wide_space, together, central=True)
    np.testing.assert_allclose(found, exact.sum(axis=1, keepdims=True) if together else exact, rtol=0, atol=1e-10)


def test_one_sided_differences_choose_the_same_vertex() -> None:
    world = Quadratic(job())
    domain, space = table_domain(world)
    agree = 0
    for seed in range(20):
        row = np.random.default_rng(seed).dirichlet(np.ones(len(NAMES) + 1))[:-1]
        genome = np.broadcast_to(row, space.table).ravel()
        exact = domain.derivatives(domain.begin(genome), world.slopes(space.recipe(genome)))
        assert exact is not None
        found = probed(world, domain, genome, space, True).sum(axis=0)
        agree += int(found.argmin() == exact.sum(axis=(0, 1)).argmin())
    assert agree >= 18


@pytest.mark.slow
def test_random_perturbations_are_right_on_average() -> None:
    world = Quadratic(
        job({"oracle": "spsa", "pairs": 1000, "h": 0.01, "start": "base", "reach": 1}, names=NAMES[:3]), layers=1
    )
    domain, space = table_domain(world)
    context = AlgorithmContext(space, np.ones(2), 0, space.uniform(), differentiable=True)
    algorithm = FrankWolfe(context, FrankWolfe.Options.model_validate(dict(world.spec.algorithm.options)))
    proposals = algorithm.ask(5000)
    assert len(proposals) == 2001 and not any(proposal.slopes for proposal in proposals)
    start = proposals[0].genome
    outcomes = [Outcome(i, p.genome, world.losses(space.recipe(p.genome))) for i, p in enumerate(proposals)]
    for outcome in outcomes:
        algorithm.tell(outcome)
    following = algorithm.ask(1)[0]
    exact = domain.derivatives(domain.begin(start), world.slopes(space.recipe(start)))
    assert exact is not None
    gap = float(-np.minimum(exact.sum(axis=0).min(axis=1), 0).sum())
    assert gap_in(following.label) == pytest.approx(gap, rel=0.2)


def test_probes_of_a_chain_are_small_steps_of_its_operator() -> None:
    world = Quadratic(job(merge={"operator": "star"}))
    space = make_chain_space(world.spec, world.problem)
    domain = Chains(space, with_base=True)
    genome = space.uniform()
    exact = domain.derivatives(domain.begin(genome), world.slopes(space.recipe(genome)))
    assert exact is not None
    found = probed(world, domain, genome, space, False, h=1e-5)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["task_arithmetic", "linear", "star"])
@pytest.mark.parametrize("oracle", ["exact", "differences"])
@pytest.mark.parametrize("variant", ["hard", "soft"])
def test_every_operator_and_oracle_beats_what_the_job_begins_with(operator: str, oracle: str, variant: str) -> None:
    spec = job({"oracle": oracle, "variant": variant}, evaluations=90, merge={"operator": operator})
    world = Quadratic(spec)
    if operator == "linear":
        world = _without_base(world)
    search = run(world)
    first = min(total(search, c.index) for c in search.candidates if c.origin == "warm_start")
    assert best(search) < 0.9 * first
    assert any(candidate.slopes for candidate in own(search)) == (oracle == "exact")


def _without_base(world: Quadratic) -> Quadratic:
    info = world.problem.operator.model_copy(update={"uses_base": False})
    found = Quadratic(world.spec, world.layers)
    found.__dict__["problem"] = world.problem.model_copy(update={"operator": info})
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "soft"}, {"oracle": "differences"}, {"oracle": "spsa"}, {"step": "harmonic"}],
    ids=str,
)
@pytest.mark.parametrize("operator", ["task_arithmetic", "star"])
def test_failures_cost_only_themselves_and_the_log_replays(options: dict[str, Any], operator: str) -> None:
    if operator == "star" and options.get("oracle") == "spsa":
        return
    world = Flaky(job(options, evaluations=60, merge={"operator": operator}, parallel_evaluations=3))
    search = run(world)
    assert any(evaluation.failure for evaluation in search.evaluations.values())
    first = min(sum(e.values) for i, e in search.evaluations.items() if e.values and i < 8)
    assert best(search) < first
    again = Search(world.spec, world.problem)
    again.replay(search.candidates, search.evaluations)
    assert again.next() == []
    assert (again.stop_reason, again.told) == (search.stop_reason, search.told)


def test_half_a_log_goes_on_as_the_whole_one_did() -> None:
    world = Quadratic(job({"variant": "soft"}, evaluations=40))
    whole = run(world)
    half = Search(world.spec, world.problem)
    kept = whole.candidates[:20]
    half.replay(kept, {i: e for i, e in whole.evaluations.items() if i < 20})
    new = half.next()
    assert [c.fingerprint for c in new] == [c.fingerprint for c in whole.candidates[20 : 20 + len(new)]]


def test_slopes_that_do_not_come_are_replaced_by_probes() -> None:
    search = run(Blind(job(evaluations=60)))
    labels = [candidate.label or "" for candidate in own(search)]
    assert sum("probe towards" in label for label in labels) > len(NAMES)
    assert best(search) < min(total(search, c.index) for c in search.candidates if c.origin == "warm_start")


def test_fewer_experts_than_slopes_know_of_is_no_trouble() -> None:
    spec = job(evaluations=60)
    world = Quadratic(spec)
    space = make_space(job(names=NAMES[:3]), world.problem.model_copy(update={"models": _first(world, 4)}))
    context = AlgorithmContext(space, np.ones(2), 0, space.uniform(), differentiable=True)
    algorithm = FrankWolfe(context, FrankWolfe.Options())
    index = 0
    for _ in range(30):
        for proposal in algorithm.ask(10):
            recipe = space.recipe(proposal.genome)
            algorithm.tell(Outcome(index, proposal.genome, world.losses(recipe), slopes=world.slopes(recipe)))
            index += 1
    assert index > 20


def _first(world: World, count: int) -> dict[str, Any]:
    return dict(list(world.problem.models.items())[:count])


def test_probes_on_a_part_of_the_items_are_compared_on_that_part() -> None:
    search = run(Quadratic(job({"oracle": "differences", "probe_items": 5}, evaluations=60)))
    part = [candidate for candidate in own(search) if candidate.items is not None]
    assert {candidate.items for candidate in part} == {5}
    assert all("probe" in (candidate.label or "") for candidate in part)
    iterates = [c for c in own(search) if (c.label or "").startswith("iterate")]
    assert iterates and all(candidate.items is None for candidate in iterates)


def test_a_budget_of_one() -> None:
    search = run(Quadratic(job(evaluations=1)))
    assert len(search.evaluations) == 1


def test_nothing_that_can_be_evaluated_ends_it_with_a_reason() -> None:
    class Broken(Quadratic):
        def evaluate(self, candidate: Candidate) -> Evaluation:
            return Evaluation(candidate.index, None, failure=Failure("infeasible", "NaN loss"))

    search = run(Broken(job()))
    assert search.stop_reason == "no model could be evaluated to begin with"


def test_violated_constraints_count_as_loss() -> None:
    world = Quadratic(job())
    space = make_space(world.spec, world.problem)
    context = AlgorithmContext(space, np.ones(2), 0, space.uniform())
    algorithm = FrankWolfe(context, FrankWolfe.Options(start="best"))
    good, bad = space.uniform(), np.zeros(space.dim)
    algorithm.tell(Outcome(0, bad, np.array([0.1, 0.1]), violation=1.0, own=False))
    algorithm.tell(Outcome(1, good, np.array([0.2, 0.2]), own=False))
    np.testing.assert_array_equal(algorithm.ask(1)[0].genome, good)


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants_on_a_box_survive_every_kind_of_outcome_and_replay(case: Case) -> None:
    for dim, parallel in ((1, 1), (5, 7)):
        space = reals(dim)
        context = make_context(space, parallel=parallel, objectives=2)
        log = drive(case.make(context), troubled(smooth(space, 2)), 90, foreign=[space.low, space.high], every=11)
        genomes = np.array([proposal.genome for proposal in proposals_of(log)])
        assert (genomes >= space.low).all() and (genomes <= space.high).all()
        replay(case.make(context), log)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_variants_find_the_minimum_of_a_box(case: Case) -> None:
    space = reals(4)
    log = drive(case.make(make_context(space)), clean(smooth(space)), 300)
    assert best_loss(log) < 0.02


# --- what cannot be done ----------------------------------------------------------------------------------------------


def refused(spec: JobSpec, problem: Problem) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        FrankWolfe.make_space(spec, problem, FrankWolfe.Options.model_validate(dict(spec.algorithm.options)))
    return caught.value


def with_operator(**changes: Any) -> Problem:
    world = World(job(merge={"operator": "star"}))
    info = OperatorInfo(name="star", summary="x", reference="y").model_copy(update=changes)
    return world.problem.model_copy(update={"operator": info})


def test_it_says_what_it_cannot_do() -> None:
    star = job(merge={"operator": "star"})
    assert refused(star, with_operator(needs="gradients")).field == "merge.operator"
    assert refused(star, with_operator(min_experts=2)).field == "merge.operator"
    pruned = job(merge={"operator": "star", "modifiers": [{"operator": "prune", "target": "experts"}]})
    assert refused(pruned, with_operator()).field == "merge.modifiers"
    assert (
        refused(job({"oracle": "spsa"}, merge={"operator": "star"}), with_operator()).field
        == "algorithm.options.oracle"
    )
    problem = World(job()).problem
    blind = [objective.model_copy(update={"differentiable": False}) for objective in problem.objectives]
    error = refused(job({"oracle": "exact"}), problem.model_copy(update={"objectives": blind}))
    assert error.field == "algorithm.options.oracle" and error.remedy


def test_modified_experts_have_no_slopes() -> None:
    spec = job(merge={"modifiers": [{"operator": "prune", "target": "experts"}]})
    problem = World(job()).problem
    space = FrankWolfe.make_space(spec, problem, FrankWolfe.Options())
    context = AlgorithmContext(space, np.ones(2), 0, space.uniform(), differentiable=True)
    assert not FrankWolfe(context, FrankWolfe.Options()).ask(1)[0].slopes


def test_it_begins_where_it_is_told_to() -> None:
    world = World(job())
    space = make_space(world.spec, world.problem)
    merge, base = (starts(space, space.uniform(), kind)[0] for kind in ("merge", "base"))
    assert (merge == 0.3).all() and not base.any()
    chains = make_chain_space(job(merge={"operator": "star"}), with_operator())
    assert isinstance(chains, ChainSpace)
    root = chains.recipe(starts(chains, chains.uniform(), "merge")[0]).root
    assert isinstance(root, Merge) and len(root.inputs) == len(NAMES)
    assert chains.recipe(starts(chains, chains.uniform(), "base")[0]).root == Leaf(model="base")


def test_the_algorithm_says_what_its_options_are() -> None:
    schema = FrankWolfe.Options.model_json_schema()["properties"]
    assert {"variant", "oracle", "granularity", "form", "step", "away", "start", "h", "tolerance"} <= set(schema)
