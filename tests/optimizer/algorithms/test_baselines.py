"""The baselines: which recipes they stand for, what depends on results, and when they are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer.algorithms import Algorithm, Outcome, Proposal
from optimizer.algorithms.base import parse_options
from optimizer.algorithms.baselines import metric_weights
from optimizer.baseline_space import BaselineSpace
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Merge
from optimizer.space import Genome, make_space
from optimizer.spec import AlgorithmSpec, JobSpec
from tests.factories import make_problem, make_spec
from tests.optimizer.algorithms.driving import Case, clean, drive, make_context, proposals_of, reals
from tests.workers.models import model_ids, open_models, tiny_bert_base
from workers.merging.engine import MergeEngine
from workers.merging.operator import operator_info

ALL = ["models", "uniform", "task_arithmetic", "ties", "metrics_weighted", "greedy_soup"]
EXTRA = ["dare_linear", "model_stock", "slerp"]


def job(experts: int = 2, **merge: Any) -> tuple[JobSpec, Problem]:
    names = ("language", "polarity", "place", "mood")[:experts]
    spec = make_spec(experts=[{"name": name, "path": name} for name in names], merge={"operator": "linear"} | merge)
    problem = make_problem(spec)
    return spec, problem.model_copy(update={"operator": operator_info(spec.merge.operator)})


def space_of(spec: JobSpec, problem: Problem, **options: Any) -> BaselineSpace:
    cls, parsed = parse_options(AlgorithmSpec(name="baselines", options=options))
    space = cls.make_space(spec, problem, parsed)
    assert isinstance(space, BaselineSpace)
    return space


def algorithm_of(space: BaselineSpace, objectives: int = 1, **options: Any) -> Algorithm:
    return Case("baselines", options).make(replace(make_context(space, objectives=objectives), start=space.uniform()))


Losses = Callable[[Genome], float | Sequence[float]]


def run(algorithm: Algorithm, losses: Losses, foreign: Sequence[Genome] = ()) -> list[Proposal]:
    """Evaluate all that it proposes, several at once; returns the proposals."""
    index, out = 0, []
    for genome in foreign:
        algorithm.tell(Outcome(index, genome, np.atleast_1d(losses(genome)).astype(float), own=False))
        index += 1
    while proposals := algorithm.ask(3):
        out += proposals
        for proposal in proposals:
            algorithm.tell(Outcome(index, proposal.genome, np.atleast_1d(losses(proposal.genome)).astype(float)))
            index += 1
    assert algorithm.stop_reason == "all baselines are evaluated"
    assert algorithm.ask(5) == []
    return out


def labels(proposals: Sequence[Proposal]) -> list[str | None]:
    return [proposal.label for proposal in proposals]


def coefficients(space: BaselineSpace, genome: Genome) -> list[float]:
    """Of the experts in a merge that is the same everywhere."""
    root = space.recipe(genome).root
    assert isinstance(root, Merge)
    assert all(row == root.coefficients[0] for row in root.coefficients)
    return root.coefficients[0]


def distance(space: BaselineSpace, target: Sequence[float]) -> Losses:
    """Squared distance of an average's weights to a target; 9 for other merges."""

    def loss(genome: Genome) -> float:
        method = space.variables[0].read(float(genome[0]))
        weights = genome[2:] / max(genome[2:].sum(), 1.0)
        return float(((weights - np.array(target)) ** 2).sum()) if method in ("model", "linear") else 9.0

    return loss


class TestRecipes:
    @pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "lora_factors"])
    def test_models_and_averages_are_the_jobs_own_warm_starts(self, operator: str) -> None:
        spec, problem = job(3, operator=operator, granularity={"layers": "each"})
        space = space_of(spec, problem)
        starts = {start.label: start.recipe for start in make_space(spec, problem).warm_starts(spec)}
        eye = np.eye(3)
        for number, name in enumerate(space.experts):
            genome = space.genome("model", eye[number].tolist())
            assert space.recipe(genome).fingerprint == starts[name].fingerprint
            np.testing.assert_array_equal(space.adopt(starts[name]), genome)
        if operator != "lora_factors":
            assert space.recipe(space.uniform()).fingerprint == starts["uniform"].fingerprint
            np.testing.assert_array_equal(space.adopt(starts["uniform"]), space.uniform())

    def test_models_stand_for_themselves_where_the_jobs_operator_changes_them(self) -> None:
        spec, problem = job(2, operator="ties")
        space = space_of(spec, problem)
        for weights, name in (([0.0, 0.0], "base"), ([1.0, 0.0], "language"), ([0.0, 1.0], "polarity")):
            recipe = space.recipe(space.genome("model", weights))
            assert recipe.root == Leaf(model=name)
            np.testing.assert_array_equal(space.adopt(recipe), space.genome("model", weights))

    def test_frozen_parts_stay_the_bases(self) -> None:
        for operator in ("ties", "linear", "task_arithmetic"):
            spec, problem = job(2, operator=operator, frozen=["mlp"])
            space = space_of(spec, problem)
            for method in ("model", "linear", "ties"):
                root = space.recipe(space.genome(method, [1.0, 0.0])).root
                assert isinstance(root, Merge) and root.groups is not None
                mlp = next(tensor for tensor in problem.layout.shared if tensor.kind == "mlp")
                assert root.row(mlp) is None

    def test_coefficients(self) -> None:
        space = space_of(*job(2, operator="ties"), ties_density=0.3)
        assert coefficients(space, space.genome("linear", [1.0, 3.0])) == [0.25, 0.75]
        assert coefficients(space, space.genome("task_arithmetic", [1.0, 1.0], 0.4)) == [0.4, 0.4]
        ties = space.recipe(space.genome("ties", [1.0, 1.0], 1.25)).root
        assert isinstance(ties, Merge)
        assert (ties.options, ties.coefficients[0]) == ({"density": 0.3, "scale": 1.25}, [1.0, 1.0])

    def test_the_engine_takes_them_all(self, tmp_path: Path) -> None:
        tiny_bert_base(tmp_path / "base")
        names = ("language", "polarity")
        for seed, name in enumerate(names, start=1):
            tiny_bert_base(tmp_path / name, seed)
        checkpoints, layout = open_models(tmp_path / "base", {name: tmp_path / name for name in names})
        engine = MergeEngine(checkpoints, layout)
        for operator in ("linear", "task_arithmetic", "slerp"):
            spec, problem = job(2, operator=operator)
            problem = problem.model_copy(update={"layout": layout, "models": model_ids(checkpoints)})
            space = space_of(spec, problem)
            found = run(algorithm_of(space, include=[*ALL, *EXTRA]), distance(space, [0.3, 0.7]))
            recipes = [space.recipe(proposal.genome) for proposal in found]
            for recipe in recipes:
                engine.check(recipe)
            operators = {recipe.root.operator for recipe in recipes if isinstance(recipe.root, Merge)}
            assert operators >= {"task_arithmetic", "ties", "dare_linear", "model_stock", "slerp"}


class TestSteps:
    def test_what_is_evaluated_by_default(self) -> None:
        space = space_of(*job(3))
        found = labels(run(algorithm_of(space), distance(space, [0.5, 0.5, 0.0])))
        assert found[:5] == ["base", "language", "polarity", "place", "uniform average"]
        assert found[5:15] == [f"task arithmetic λ={0.1 * k:.1g}" for k in range(1, 11)]
        assert found[15:20] == [f"TIES λ={x}" for x in ("0.5", "0.75", "1", "1.25", "1.5")]
        assert "weighted by metrics, power 1" in found and "weighted by metrics, power 4" in found
        assert found[-1] == "greedy soup, 2 of 3"
        # Every merge but averages is equally bad here, so both grids grow.
        assert len(found) <= 2 * 3 + 20 + 2 * 4

    def test_greedy_soup_keeps_what_does_no_harm(self) -> None:
        space = space_of(*job(4))
        found = run(algorithm_of(space, include=["models", "greedy_soup"]), distance(space, [0.4, 0.3, 0.0, 0.3]))
        assert labels(found)[5:] == [
            "soup of language + polarity",
            "soup of language + polarity + mood",
            "soup of 4, with place",
            "greedy soup, 3 of 4",
        ]
        np.testing.assert_allclose(coefficients(space, found[-1].genome), [1 / 3, 1 / 3, 0, 1 / 3])

    def test_greedy_soup_of_one(self) -> None:
        space = space_of(*job(3))
        found = run(algorithm_of(space, include=["models", "greedy_soup"]), distance(space, [0.0, 1.0, 0.0]))
        assert labels(found)[-1] == "greedy soup, 1 of 3"
        np.testing.assert_array_equal(found[-1].genome, found[2].genome)

    def test_the_soup_tries_no_more_than_asked(self) -> None:
        space = space_of(*job(4))
        options: dict[str, Any] = {"include": ["models", "greedy_soup"], "soup_trials": 1}
        assert len(run(algorithm_of(space, **options), distance(space, [0.4, 0.3, 0.0, 0.3]))) == 5 + 1 + 1

    def test_failed_experts_stay_out(self) -> None:
        space = space_of(*job(3))
        loss = distance(space, [0.5, 0.0, 0.5])

        def losses(genome: Genome) -> float:
            alone = space.variables[0].read(float(genome[0])) == "model"
            return float("nan") if alone and genome[2] == 1.0 else float(np.asarray(loss(genome)))

        found = run(algorithm_of(space, include=["models", "metrics_weighted", "greedy_soup"]), losses)
        for proposal in found[4:]:
            assert proposal.genome[2] == 0.0

    def test_grids_grow_where_they_are_best_at_an_end(self) -> None:
        space = space_of(*job(2))

        def losses(genome: Genome) -> float:
            return abs(float(genome[1]) - (0.02 if space.variables[0].read(float(genome[0])) == "ties" else 1.9))

        found = labels(run(algorithm_of(space, include=["task_arithmetic", "ties"]), losses))[15:]
        assert [name for name in found if name and "TIES" in name] == [
            f"TIES λ={x}" for x in ("0.25", "0.125", "0.0625", "0.03125")
        ]
        assert [name for name in found if name and "task" in name] == [
            f"task arithmetic λ={x}" for x in ("1.1", "1.2", "1.3", "1.4")
        ]
        assert not labels(run(algorithm_of(space, include=["ties"], extend=0), losses))[5:]

    def test_dare_takes_the_best_strength(self) -> None:
        space = space_of(*job(2))
        found = run(
            algorithm_of(space, include=["task_arithmetic", "dare_linear"]), lambda genome: abs(float(genome[1]) - 0.4)
        )
        assert labels(found)[-1] == "DARE λ=0.4"

    def test_warm_starts_are_not_repeated_and_count(self) -> None:
        spec, problem = job(3)
        space = space_of(spec, problem)
        recipes = [start.recipe for start in make_space(spec, problem).warm_starts(spec)]
        known = [genome for genome in map(space.adopt, recipes) if genome is not None]
        assert len(known) == 4  # linear merging has no base
        found = labels(run(algorithm_of(space), distance(space, [0.5, 0.5, 0.0]), known))
        assert "language" not in found and "uniform average" not in found
        assert found[-1] == "greedy soup, 2 of 3"

    def test_nothing_left_to_do(self) -> None:
        space = space_of(*job(2))
        known = [space.genome("model", weights) for weights in ([0, 0], [1, 0], [0, 1])]
        assert run(algorithm_of(space, include=["models"]), distance(space, [1, 0]), known) == []

    def test_several_objectives_on_their_own_scales(self) -> None:
        """The second objective is a thousand times as large and cannot drown the first."""
        space = space_of(*job(3))
        first, second = distance(space, [1.0, 0.0, 0.0]), distance(space, [0.0, 1.0, 0.0])
        algorithm = algorithm_of(space, objectives=2, include=["models", "uniform", "greedy_soup"])
        found = run(
            algorithm, lambda genome: [float(np.asarray(first(genome))), 1000 * float(np.asarray(second(genome)))]
        )
        assert labels(found)[-1] == "greedy soup, 2 of 3"
        np.testing.assert_allclose(coefficients(space, found[-1].genome), [0.5, 0.5, 0.0])

    def test_waits_for_the_experts(self) -> None:
        space = space_of(*job(2))
        algorithm = algorithm_of(space, include=["models", "greedy_soup"])
        first = algorithm.ask(10)
        assert len(first) == 3 and algorithm.ask(1) == [] and algorithm.stop_reason is None
        for index, proposal in enumerate(first):
            assert algorithm.ask(1) == []
            algorithm.tell(Outcome(index, proposal.genome, np.array([float(index)])))
        assert labels(algorithm.ask(10)) == ["soup of language + polarity"]

    def test_in_a_plain_box_it_ends_on_the_diagonal(self) -> None:
        space = reals(3, 0.0, 1.0)
        log = drive(Case("baselines").make(make_context(space)), clean(lambda genome: np.array([genome.sum()])), 60)
        genomes = np.array([proposal.genome for proposal in proposals_of(log)])
        np.testing.assert_array_equal(genomes[:4], [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
        assert (np.ptp(genomes[-20:], axis=1) == 0).all()


class TestMetricWeights:
    def test_losses_and_scores(self) -> None:
        losses = np.array([[1.0, -0.8], [2.0, -0.2]])
        np.testing.assert_allclose(metric_weights(losses[:, :1], np.ones(1), 1.0), [2 / 3, 1 / 3])
        np.testing.assert_allclose(metric_weights(losses[:, :1], np.ones(1), 2.0), [0.8, 0.2])
        np.testing.assert_allclose(metric_weights(losses[:, 1:], np.ones(1), 1.0), [0.8, 0.2])
        np.testing.assert_allclose(metric_weights(losses, np.array([3.0, 1.0]), 1.0), [0.7, 0.3])

    def test_results_of_both_signs_count_from_the_worst(self) -> None:
        losses = np.array([[-1.0], [0.5], [1.0]])
        np.testing.assert_allclose(metric_weights(losses, np.ones(1), 1.0), [0.8, 0.2, 0.0])

    @given(
        st.lists(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=2), min_size=1, max_size=9),
        st.floats(0, 50),
    )
    def test_they_are_weights_and_the_best_has_the_most(self, rows: list[list[float]], power: float) -> None:
        losses: NDArray[np.float64] = np.array(rows)
        weights = metric_weights(losses[:, :1], np.ones(1), power)
        assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
        assert weights[losses[:, 0].argmin()] == weights.max()
        assert metric_weights(losses, np.array([1.0, 2.0]), power).sum() == pytest.approx(1.0)
