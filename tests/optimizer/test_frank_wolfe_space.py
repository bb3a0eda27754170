"""Chains of merges: their genomes, their recipes, and the weights that real operators make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.frank_wolfe_space import Chain, ChainSpace, Step, make_chain_space
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Merge, Recipe
from optimizer.spec import JobSpec, parse_spec
from tests.jobs import write_job
from workers.checkpoints import open_checkpoints
from workers.merging.engine import MergeEngine
from workers.merging.operator import operator_info
from workers.prepare import prepare
from workers.roots import Roots

GROUPS, EXPERTS = 3, 4


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    numbers = st.floats(-2, 2)

    def table(cols: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.array(draw(st.lists(numbers, min_size=GROUPS * cols, max_size=GROUPS * cols))).reshape(GROUPS, cols)

    start = draw(st.integers(-1, EXPERTS + 1))
    models = st.lists(st.integers(0, EXPERTS + 1), min_size=1, max_size=3, unique=True)
    steps = [Step(tuple(found), table(len(found))) for found in draw(st.lists(models, max_size=3))]
    return Chain(table(EXPERTS) if start < 0 else start, tuple(steps))


@given(chains())
@settings(max_examples=50, deadline=None)
def test_genomes_round_trip(chain: Chain) -> None:
    genome = chain.encode()
    again = Chain.decode(genome, GROUPS, EXPERTS)
    np.testing.assert_array_equal(again.encode(), genome)
    assert [step.models for step in again.steps] == [step.models for step in chain.steps]


@pytest.mark.parametrize(
    "genome",
    [[], [0.5], [9.0], [-1.0, 0.1], [0.0, 1.0], [0.0, 1.0, 7.0, 0, 0, 0], [0.0, 1.0, 1.0, 0.1, np.nan, 0.1]],
    ids=str,
)
def test_what_is_no_chain_is_refused(genome: list[float]) -> None:
    with pytest.raises(InvalidInput) as caught:
        Chain.decode(np.array(genome), GROUPS, EXPERTS)
    assert caught.value.field == "genome"


# --- real models --------------------------------------------------------------------------------------------------------


class Real:
    """A job of tiny real checkpoints with some operator, and the weights of its chains."""

    def __init__(self, root: Path, job: dict[str, object], operator: str, **options: object) -> None:
        merge = {**job["merge"], "operator": operator, "options": options}  # type: ignore[dict-item]
        self.spec: JobSpec = parse_spec({**job, "merge": merge})
        self.problem: Problem = prepare(self.spec, Roots([root]))
        self.checkpoints = open_checkpoints(self.spec, Roots([root]))
        self.engine = MergeEngine(self.checkpoints, self.problem.layout)
        self.space: ChainSpace = make_chain_space(self.spec, self.problem)

    def weights(self, recipe: Recipe) -> torch.Tensor:
        parts = [self.engine.merged(recipe, t, torch.float64).ravel() for t in self.problem.layout.shared]
        return torch.cat(parts)

    def of(self, chain: Chain) -> torch.Tensor:
        return self.weights(self.space.recipe(chain.encode()))

    def model(self, name: str) -> torch.Tensor:
        return self.weights(Recipe(models=self.problem.models, root=Leaf(model=name)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chains")


@pytest.fixture(scope="module")
def job(root: Path) -> dict[str, object]:
    return write_job(root)


def step(amount: float, *models: int, groups: int = 3) -> Step:
    return Step(models, np.full((groups, len(models)), amount / len(models)))


@pytest.mark.parametrize("operator", ["multislerp", "karcher", "slerp", "nuslerp", "ties", "dare_ties", "della"])
def test_no_step_changes_nothing_and_a_whole_one_of_an_average_is_the_vertex(
    root: Path, job: dict[str, object], operator: str
) -> None:
    real = Real(root, job, operator)
    here = real.of(Chain(1))
    torch.testing.assert_close(real.of(Chain(1, (step(0.0, 2),))), here, rtol=1e-5, atol=1e-6)
    if operator in ("multislerp", "karcher", "slerp", "nuslerp"):
        torch.testing.assert_close(real.of(Chain(1, (step(1.0, 2),))), real.model("shape"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operator", ["slerp", "multislerp", "ties", "star", "iso_c", "widen", "sce", "breadcrumbs"])
def test_steps_move_by_their_length(root: Path, job: dict[str, object], operator: str) -> None:
    real = Real(root, job, operator)
    here = real.of(Chain(1))
    moves = [float((real.of(Chain(1, (step(amount, 2),))) - here).norm()) for amount in (0.05, 0.1, 0.4)]
    assert 0 < moves[0] < moves[1] < moves[2]
    assert moves[1] / moves[0] == pytest.approx(2.0, rel=0.3)


def test_a_ties_step_is_theta_plus_scaled_trimmed_difference(root: Path, job: dict[str, object]) -> None:
    """θ + λγ·trim(s − θ), whether the operator sums or averages; the job's own scale counts."""
    for normalise in ("mean", "sum"):
        real = Real(root, job, "ties", density=0.3, normalise=normalise, scale=0.9)
        start = real.of(Chain(1))
        target = real.model("shape")
        found = real.of(Chain(1, (step(0.5, 2),)))
        expected, offset = start.clone(), 0
        for tensor in real.problem.layout.shared:
            size = int(np.prod(tensor.shape))
            part = slice(offset, offset + size)
            delta = (target - start)[part]
            kept = max(1, int(0.3 * size))
            limit = delta.abs().sort(descending=True).values[kept - 1]
            expected[part] += 0.9 * 0.5 * torch.where(delta.abs() >= limit, delta, torch.zeros_like(delta))
            offset += size
        different = (found - expected).abs() > 1e-5
        assert different.double().mean() < 0.01  # an entry at the limit may fall on either side


def test_a_chain_of_linear_merges_is_a_weighted_sum(root: Path, job: dict[str, object]) -> None:
    real = Real(root, job, "dare_linear", density=1.0)
    steps = (step(0.3, 2), Step((1, 2), np.array([[0.1, 0.2]] * 3)), step(0.5, 3))
    found = real.of(Chain(0, steps))
    base, one, two = (real.model(name) for name in ("base", "colour", "shape"))
    whole = real.weights(real.space.recipe(real.space.uniform()))
    expected = base + 0.3 * (two - base)
    expected = expected + 0.1 * (one - expected) + 0.2 * (two - expected)
    expected = expected + 0.5 * (whole - expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_each_group_moves_by_itself(root: Path, job: dict[str, object]) -> None:
    for operator in ("ties", "slerp", "iso_c", "multislerp"):
        real = Real(root, job, operator)
        weights = np.zeros((3, 2))
        weights[0, 0], weights[1, 1] = 0.5, 0.5
        recipe = real.space.recipe(Chain(0, (Step((1, 2), weights),)).encode())
        real.engine.check(recipe)
        for tensor in real.problem.layout.shared:
            group = next(number for number, group in enumerate(real.space.groups) if group.matches(tensor))
            base = real.engine.source("base", tensor, torch.device("cpu"))
            same = torch.allclose(real.engine.merged(recipe, tensor), base, atol=1e-6)
            assert same == (group == 2) or not tensor.shape


def test_it_adopts_what_it_can_say(root: Path, job: dict[str, object]) -> None:
    real = Real(root, job, "ties")
    for name in real.problem.models:
        recipe = Recipe(models=real.problem.models, root=Leaf(model=name))
        genome = real.space.adopt(recipe)
        assert genome is not None and real.space.recipe(genome).root == recipe.root
    whole = real.space.recipe(real.space.uniform())
    adopted = real.space.adopt(whole)
    assert adopted is not None and real.space.recipe(adopted) == whole
    table = Merge(
        operator="task_arithmetic",
        base=Leaf(model="base"),
        inputs=[Leaf(model="shape"), Leaf(model="colour")],
        groups=list(real.space.groups),
        coefficients=[[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]],
    )
    summed = Recipe(models=real.problem.models, root=table)
    genome = real.space.adopt(summed)
    assert genome is not None
    torch.testing.assert_close(real.weights(real.space.recipe(genome)), real.weights(summed), rtol=1e-5, atol=1e-6)
    uneven = table.model_copy(update={"groups": None, "breaks": [7, 100]})
    assert real.space.adopt(Recipe(models=real.problem.models, root=uneven)) is None
    assert real.space.near(Recipe(models=real.problem.models, root=uneven)) is not None
    other = whole.root.model_copy(update={"options": {"density": 0.9}})
    assert real.space.adopt(Recipe(models=real.problem.models, root=other)) is None


def test_single_experts_options_follow_them(root: Path, job: dict[str, object]) -> None:
    info = operator_info("dare_ties")
    assert "density" in info.varies
    real = Real(root, job, "dare_ties", density=[0.2, 0.7])
    root_node = real.space.recipe(Chain(0, (step(0.4, 2), Step((2, 1), np.full((3, 2), 0.1)))).encode()).root
    assert isinstance(root_node, Merge) and isinstance(root_node.base, Merge)
    assert root_node.tables is not None and root_node.base.tables is not None
    assert root_node.tables["density"][0] == [0.7, 0.2]
    assert root_node.base.tables["density"][0] == [0.7]
    assert root_node.base.tables["scale"][0] == [pytest.approx(0.4)]
