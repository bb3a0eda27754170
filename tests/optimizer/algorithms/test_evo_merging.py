"""What Evo-Merging does beyond the contract: its space, its two stages, their penalties and bounds, its ablations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from optimizer.algorithms import AlgorithmContext, Outcome
from optimizer.algorithms.base import parse_options
from optimizer.algorithms.evo_merging import EvoMerging
from optimizer.errors import InvalidInput
from optimizer.evo_space import EvoSpace
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Recipe
from optimizer.space import Genome, make_space
from optimizer.spec import AlgorithmSpec, JobSpec
from tests.factories import make_problem, make_spec
from tests.optimizer.algorithms.driving import Case, clean, drive, make_context, outcomes_of, proposals_of
from tests.workers.adapter_models import causal, open_all
from tests.workers.models import model_ids, tiny_llama
from workers.checkpoints import Factors
from workers.compatibility import inspect, raise_on_errors
from workers.merging.engine import MergeEngine
from workers.merging.operator import operator_info

EVO = Case("evo_merging")
LORA = {"operator": "lora_factors"}


def job(merge: dict[str, Any] = LORA, **options: Any) -> tuple[JobSpec, Problem]:
    spec = make_spec(merge=merge, algorithm={"name": "evo_merging", "options": options})
    problem = make_problem(spec)
    return spec, problem.model_copy(update={"operator": operator_info(spec.merge.operator)})


def space_of(merge: dict[str, Any] = LORA, **options: Any) -> EvoSpace:
    spec, problem = job(merge, **options)
    cls, parsed = parse_options(spec.algorithm)
    space = cls.make_space(spec, problem, parsed)
    assert isinstance(space, EvoSpace)
    return space


class TestSpace:
    def test_a_coefficient_and_a_density_for_each_expert(self) -> None:
        space = space_of()
        assert [variable.name for variable in space.variables] == [
            "language @ all",
            "polarity @ all",
            "density of language",
            "density of polarity",
        ]
        np.testing.assert_array_equal(space.low, [-1.5, -1.5, 0.0, 0.0])
        np.testing.assert_array_equal(space.high, [1.5, 1.5, 1.0, 1.0])
        np.testing.assert_array_equal(space.uniform(), [0.5, 0.5, 1.0, 1.0])
        assert space.kept.tolist() == [2, 3]

    def test_the_users_own_settings_win(self) -> None:
        merge = {
            "operator": "prune",
            "granularity": {"layers": "groups", "group_size": 2},
            "bounds": {"low": -0.5, "high": 1.0},
            "options": {"density": {"low": 0.2, "high": 0.8, "per_expert": True, "per_group": True}},
        }
        space = space_of(merge)
        assert space.table == (2, 2)
        np.testing.assert_array_equal(space.low, [-0.5] * 4 + [0.2] * 4)
        np.testing.assert_array_equal(space.high, [1.0] * 4 + [0.8] * 4)

    def test_operators_that_refuse_a_density_of_zero(self) -> None:
        assert space_of({"operator": "prune"}).low[2] == pytest.approx(1e-3)

    def test_without_denoising_everything_is_kept(self) -> None:
        space = space_of({"operator": "prune"}, denoise=False)
        assert space.dim == 2
        root = space.recipe(space.uniform()).to_json()["root"]
        assert root["options"] == {"density": 1.0}

    def test_a_density_that_the_job_fixes(self) -> None:
        merge = {"operator": "prune", "options": {"density": 0.3}}
        assert space_of(merge, denoise=False).fixed == {"density": 0.3}
        with pytest.raises(InvalidInput, match="density is fixed") as caught:
            space_of(merge)
        assert caught.value.field == "merge.options.density"

    @pytest.mark.parametrize(
        ("merge", "field"),
        [
            ({"operator": "task_arithmetic"}, "merge.operator"),
            ({"operator": "slerp"}, "merge.operator"),
            ({"operator": "model_stock"}, "merge.operator"),
            ({"operator": "lora_factors", "space": "layer_swap"}, "merge.space"),
        ],
    )
    def test_what_it_cannot_search(self, merge: dict[str, Any], field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            space_of(merge)
        assert caught.value.field == field
        assert caught.value.remedy

    @pytest.mark.parametrize("operator", ["lora_factors", "prune"])
    def test_takes_in_the_jobs_warm_starts(self, operator: str) -> None:
        """They are merges over layers, without a table of densities."""
        spec, problem = job({"operator": operator})
        starts = {start.label: start for start in make_space(spec, problem).warm_starts(spec)}
        space = space_of({"operator": operator})
        density = {"lora_factors": 1.0, "prune": 0.5}[operator]
        for label, scales in (("base", [0, 0]), ("language", [1, 0]), ("uniform", [0.5, 0.5])):
            np.testing.assert_array_equal(space.adopt(starts[label].recipe), [*scales, density, density])

    def test_takes_in_single_models_and_its_own_recipes(self) -> None:
        space = space_of()
        for number, name in enumerate(("language", "polarity")):
            alone = space.adopt(Recipe(models=space.problem.models, root=Leaf(model=name)))
            np.testing.assert_array_equal(alone, [number == 0, number == 1, 1.0, 1.0])
        genome = np.array([0.7, -1.2, 0.25, 0.9])
        np.testing.assert_array_equal(space.adopt(space.recipe(genome)), genome)

    def test_leaves_out_merges_that_differ_between_layers_or_leave_something_out(self) -> None:
        space = space_of()
        for merge in ({"granularity": {"layers": "each"}}, {"frozen": ["mlp"]}):
            spec, problem = job(LORA | merge)
            other = make_space(spec, problem)
            genome = other.uniform()
            if "granularity" in merge:
                genome[0] = 0.3
            assert space.adopt(other.recipe(genome)) is None


def quadratic(target: Genome) -> Any:
    return clean(lambda genome: np.array([float(((genome - target) ** 2).sum())]))


def context_of(space: EvoSpace | None = None, **settings: Any) -> AlgorithmContext:
    """A job's context: it starts from the uniform merge."""
    space = space or space_of()
    return replace(make_context(space, **settings), start=space.uniform())


def proposed(case: Case, budget: int | None = 300, count: int = 300, **options: Any) -> NDArray[np.float64]:
    algorithm = Case(case.name, options).make(context_of(budget=budget))
    log = drive(algorithm, quadratic(np.array([-0.4, 1.0, 0.6, 0.9])), count)
    return np.array([proposal.genome for proposal in proposals_of(log)])


class TestStages:
    def test_first_the_densities_then_the_coefficients(self) -> None:
        context = context_of(budget=300)
        start = context.start
        algorithm = EVO.make(context)
        log = drive(algorithm, quadratic(np.array([-0.4, 1.0, 0.6, 0.9])), 300)
        genomes = np.array([proposal.genome for proposal in proposals_of(log)])
        first, second = genomes[:100], genomes[100:]
        np.testing.assert_array_equal(first[:, :2], np.tile(start[:2], (100, 1)))
        assert (np.ptp(first[:, 2:], axis=0) > 0).all()
        losses = [
            float(o.losses[0]) + 0.05 * o.genome[2:].mean() for o in outcomes_of(log)[:100] if o.losses is not None
        ]
        np.testing.assert_array_equal(second[:, 2:], np.tile(first[int(np.argmin(losses)), 2:], (200, 1)))
        assert (np.ptp(second[:, :2], axis=0) > 0).all()

    def test_finds_negative_coefficients_that_the_penalty_shrinks(self) -> None:
        for weight, slack in ((0.0, 0.0), (0.4, 0.1)):
            context = context_of(budget=600)
            algorithm = Case("evo_merging", {"l1_scale": weight}).make(context)
            drive(algorithm, quadratic(np.array([-0.4, 1.0, 0.6, 0.9])), 600)
            assert isinstance(algorithm, EvoMerging)
            np.testing.assert_allclose(algorithm.best[:2], [-0.4 + slack, 1.0 - slack], atol=0.01)

    def test_penalty_of_the_densities(self) -> None:
        """(α − 0.6)² + λ/2·α has its minimum at 0.6 − λ/4."""
        context = context_of(budget=400)
        algorithm = Case("evo_merging", {"l1_denoise": 0.8, "scale": False}).make(context)
        drive(algorithm, quadratic(np.array([0.5, 0.5, 0.6, 0.9])), 400)
        assert isinstance(algorithm, EvoMerging)
        np.testing.assert_allclose(algorithm.best[2:], [0.4, 0.7], atol=0.01)

    @pytest.mark.parametrize(("budget", "first"), [(None, 400), (600, 200), (75, 25)])
    def test_length_of_the_first_stage(self, budget: int | None, first: int) -> None:
        genomes = proposed(EVO, budget, 460)
        moved = np.flatnonzero((genomes[:, :2] != genomes[0, :2]).any(axis=1))[0]
        population = 20 if budget is None or budget >= 300 else budget // 15
        assert first <= moved < first + population

    def test_ablations(self) -> None:
        space = space_of()
        only_scales = proposed(EVO, denoise=False)
        assert (only_scales[:, 2:] == 1.0).all() and np.ptp(only_scales[:, 0]) > 0
        only_densities = proposed(EVO, scale=False)
        assert (only_densities[:, :2] == space.uniform()[:2]).all() and np.ptp(only_densities[:, 2]) > 0
        assert proposed(EVO)[:, 0].min() < -0.3
        assert 0.0 <= proposed(EVO, sign_flip=False)[:, 0].min() < 0.01

    def test_both_stages_off(self) -> None:
        with pytest.raises(InvalidInput, match="both off"):
            parse_options(AlgorithmSpec(name="evo_merging", options={"denoise": False, "scale": False}))

    @pytest.mark.parametrize(
        ("budget", "parallel", "expected"), [(None, 1, 20), (1200, 1, 20), (150, 1, 10), (20, 1, 4), (1200, 8, 24)]
    )
    def test_population(self, budget: int | None, parallel: int, expected: int) -> None:
        assert EVO.make(context_of(budget=budget, parallel=parallel)).batch_size == expected

    @pytest.mark.parametrize("carry_over", [False, True])
    def test_the_released_codes_best(self, carry_over: bool) -> None:
        """Where the second penalty outweighs every gain, the code keeps β at 1/N."""
        options = {"carry_over": carry_over, "l1_scale": 2.0, "l1_denoise": 0.0}
        algorithm = Case("evo_merging", options).make(context_of(budget=300))
        drive(algorithm, quadratic(np.array([0.0, 0.5, 1.0, 1.0])), 300)
        assert isinstance(algorithm, EvoMerging)
        assert (algorithm.best[:2] == 0.5).all() == carry_over

    def test_goes_on_at_the_best_when_it_has_converged(self) -> None:
        target = np.array([-0.4, 1.0, 0.6, 0.9])
        algorithm = Case("evo_merging", {"l1_denoise": 0.0, "l1_scale": 0.0}).make(context_of(budget=None))
        drive(algorithm, quadratic(target), 3000)
        assert isinstance(algorithm, EvoMerging)
        np.testing.assert_allclose(algorithm.best[:2], target[:2], atol=1e-6)
        np.testing.assert_allclose(algorithm.best[2:], target[2:], atol=1e-2)

    def test_warm_starts_compete_for_the_best(self) -> None:
        """A denser or sparser uniform merge in the first stage; with those densities any coefficients in the second."""
        algorithm = EVO.make(context_of(budget=60))
        assert isinstance(algorithm, EvoMerging)
        start = algorithm.best
        sparse = np.array([*start[:2], 0.3, 0.4])
        flipped = np.array([-1.0, 1.0, 0.3, 0.4])
        elsewhere = np.array([0.9, 0.1, 0.8, 0.8])
        algorithm.tell(Outcome(0, sparse, np.array([0.1]), own=False))
        algorithm.tell(Outcome(1, flipped, np.array([0.0]), own=False))
        algorithm.tell(Outcome(2, elsewhere, np.array([-9.0]), own=False))
        for index in range(3, 63):
            (proposal,) = algorithm.ask(1)
            algorithm.tell(Outcome(index, proposal.genome, np.array([1.0])))
            if index == 3:
                np.testing.assert_array_equal(algorithm.best, sparse)
        np.testing.assert_array_equal(algorithm.best, flipped)

    def test_several_objectives_are_brought_to_one_scale(self) -> None:
        def losses(genome: Genome) -> NDArray[np.float64]:
            return np.array([1000 * (genome[0] - 0.2) ** 2, 0.001 * (genome[0] - 0.6) ** 2])

        algorithm = Case("evo_merging", {"l1_scale": 0.0}).make(context_of(objectives=2, budget=400))
        warm = [np.array([x, 0.5, 1.0, 1.0]) for x in (-1.0, 0.0, 0.4, 0.8, 1.5)]
        drive(algorithm, clean(losses), 400, foreign=warm)
        assert isinstance(algorithm, EvoMerging)
        assert 0.25 < algorithm.best[0] < 0.55


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> MergeEngine:
    root = tmp_path_factory.mktemp("evo")
    tiny_llama(root / "base")
    for number, name in enumerate(("one", "two", "three")):
        causal(root / "base", root / name, number, lora_alpha=4 * (number + 1))
    checkpoints = open_all(root / "base", [root / "one", root / "two", root / "three"])
    base, *experts = checkpoints.values()
    layout, findings = inspect(base, experts, ("classifier.*", "score.*"))
    raise_on_errors(findings)
    return MergeEngine(checkpoints, layout)


class TestRealAdapters:
    def test_a_genome_gives_the_weights_of_the_formula(self, engine: MergeEngine) -> None:
        """base + (Σ β_i √s_i B_i)(Σ β_i √s_i S_{α_i}(A_i)): only A is sparsified, and the products have cross terms."""
        space = self._space(engine)
        scales, kept = (0.8, -0.6, 0.3), (0.5, 1.0, 0.1)
        recipe = space.recipe(np.array([*scales, *kept]))
        changed = 0
        for tensor in engine.layout.shared:
            found = engine.merged(recipe, tensor, torch.float64)
            base = _raw(engine, "base", tensor.name)
            factors = [_factors(engine, name, tensor.name) for name in ("one", "two", "three")]
            if factors[0] is None:
                torch.testing.assert_close(found, base, rtol=0, atol=0)
                continue
            changed += 1
            up = sum(w * f.scale**0.5 * f.up.double() for w, f in zip(scales, factors, strict=True) if f)
            down = sum(
                w * f.scale**0.5 * _sparse(f.down.double(), share)
                for w, f, share in zip(scales, factors, kept, strict=True)
                if f
            )
            torch.testing.assert_close(found, base + up @ down, rtol=1e-9, atol=1e-9)
            separate = sum(
                w * f.scale * f.up.double() @ f.down.double() for w, f in zip(scales, factors, strict=True) if f
            )
            assert not torch.allclose(found, base + separate, rtol=1e-2, atol=1e-2)
        assert changed == 4  # queries and values of two layers

    def test_warm_starts_are_the_models(self, engine: MergeEngine) -> None:
        space = self._space(engine)
        for name in ("base", "one", "two"):
            leaf = Recipe(models=space.problem.models, root=Leaf(model=name))
            genome = space.adopt(leaf)
            assert genome is not None
            for tensor in engine.layout.shared:
                wanted = engine.merged(leaf, tensor, torch.float64)
                found = engine.merged(space.recipe(genome), tensor, torch.float64)
                torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)

    def test_pruning_of_the_task_vectors_of_any_models(self, engine: MergeEngine) -> None:
        """`prune` keeps the largest entries of each task vector and adds them up, signs and all."""
        space = self._space(engine, "prune")
        scales, kept = (0.8, -0.6, 0.3), (0.5, 1.0, 0.1)
        recipe = space.recipe(np.array([*scales, *kept]))
        name = next(t for t in engine.layout.shared if _factors(engine, "one", t.name) is not None)
        base = _raw(engine, "base", name.name)
        wanted = base.clone()
        for expert, weight, share in zip(("one", "two", "three"), scales, kept, strict=True):
            factors = _factors(engine, expert, name.name)
            assert factors is not None
            delta = factors.scale * factors.up.double() @ factors.down.double()
            limit = delta.abs().reshape(-1).sort(descending=True).values[int(share * delta.numel()) - 1]
            wanted += weight * torch.where(delta.abs() >= limit, delta, 0.0)
        torch.testing.assert_close(engine.merged(recipe, name, torch.float64), wanted, rtol=1e-5, atol=1e-5)

    def _space(self, engine: MergeEngine, operator: str = "lora_factors") -> EvoSpace:
        names = ("one", "two", "three")
        merge: dict[str, Any] = {"operator": operator}
        spec = make_spec(
            merge=merge,
            experts=[{"name": name, "path": name} for name in names],
            objectives=[{"name": "x", "evaluator": "perplexity", "data": {"path": "x"}}],
            algorithm={"name": "evo_merging"},
        )
        update = {
            "operator": operator_info(operator),
            "layout": engine.layout,
            "models": model_ids(engine.checkpoints),
        }
        problem = make_problem(spec).model_copy(update=update)
        cls, options = parse_options(spec.algorithm)
        space = cls.make_space(spec, problem, options)
        assert isinstance(space, EvoSpace)
        return space


def _raw(engine: MergeEngine, model: str, canonical: str) -> Tensor:
    return engine.merged(
        Recipe(models=model_ids(engine.checkpoints), root=Leaf(model=model)),
        next(tensor for tensor in engine.layout.shared if tensor.name == canonical),
        torch.float64,
    )


def _factors(engine: MergeEngine, model: str, canonical: str) -> Factors | None:
    raw = next(name for name in engine.checkpoints["base"].tensors if name.endswith(canonical))
    found = engine.checkpoints[model].factors(raw)
    return found if found is not None and found.rank else None


def _sparse(down: Tensor, share: float) -> Tensor:
    kept = max(1, round(down.numel() * share))
    limit = down.abs().reshape(-1).sort(descending=True).values[kept - 1]
    return torch.where(down.abs() >= limit, down, 0.0)
