"""Reinforced Model Merging's agent: exact gradients, the walk over layers, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from optimizer.algorithms import Outcome
from optimizer.decisions import LayerDecisions, VariableDecisions, decisions_of
from optimizer.errors import InvalidInput
from optimizer.ppo import ENTROPY, Agent, Network, Settings, Steps, log_probabilities, policy_loss
from optimizer.problem import OperatorInfo
from optimizer.space import Genome, SearchSpace, Variable, make_space
from optimizer.spaces.actions import ActionSpace
from tests.factories import make_problem, make_spec
from tests.optimizer.algorithms.driving import (
    Case,
    best_loss,
    clean,
    drive,
    make_context,
    mixed,
    outcomes_of,
    proposals_of,
    reals,
    replay,
    smooth,
    troubled,
)

Array = NDArray[np.float64]
RMM = Case("rmm")


def action_space(layers: int = 6, **options: object) -> ActionSpace:
    spec = make_spec(merge={"space": {"name": "actions", "options": options}})
    info = OperatorInfo(name="ties", summary="Ties.", reference="2023")
    space = make_space(spec, make_problem(spec, layers).model_copy(update={"operators": {"ties": info}}))
    assert isinstance(space, ActionSpace)
    return space


def episodes(count: int = 7, size: int = 5, actions: int = 4) -> tuple[Steps, Array, Array]:
    """Random steps with forbidden actions, advantages, and probabilities far enough off to be clipped."""
    random = np.random.Generator(np.random.PCG64(2))
    allowed = random.random((count, actions)) < 0.7
    taken = random.integers(0, actions, count)
    allowed[np.arange(count), taken] = True
    steps = Steps(random.normal(size=(count, size)), allowed, taken, random.normal(size=count))
    return steps, random.normal(size=count), np.log(random.uniform(0.1, 0.9, count))


def numeric(network: Network, loss: object, position: int) -> Array:
    """The gradient with respect to one of the network's arrays by central differences."""
    assert callable(loss)
    weight = network.weights[position]
    out = np.zeros_like(weight)
    for index in np.ndindex(weight.shape):
        kept = weight[index]
        values = []
        for step in (1e-6, -1e-6):
            weight[index] = kept + step
            values.append(loss())
        weight[index] = kept
        out[index] = (values[0] - values[1]) / 2e-6
    return out


class TestGradients:
    def test_of_the_policy(self) -> None:
        steps, advantages, before = episodes()
        network = Network([5, 6, 6, 4], np.random.Generator(np.random.PCG64(1)))

        def loss() -> float:
            return policy_loss(network.forward(steps.states)[-1], steps, advantages, before, 0.2)[0]

        activations = network.forward(steps.states)
        value, slope = policy_loss(activations[-1], steps, advantages, before, 0.2)
        assert value == loss()
        for position, found in enumerate(network.backward(activations, slope)):
            np.testing.assert_allclose(found, numeric(network, loss, position), rtol=1e-5, atol=1e-8)

    def test_some_of_those_steps_are_clipped(self) -> None:
        """Otherwise the test above would not see the clipping."""
        steps, advantages, before = episodes()
        network = Network([5, 6, 6, 4], np.random.Generator(np.random.PCG64(1)))
        rows = np.arange(len(before))
        logs = log_probabilities(network.forward(steps.states)[-1], steps.allowed)[rows, steps.actions]
        ratios = np.exp(logs - before)
        idle = np.where(advantages > 0, ratios > 1.2, ratios < 0.8)
        assert 0 < idle.sum() < len(before)

    def test_of_the_value(self) -> None:
        steps, _, _ = episodes()
        network = Network([5, 6, 6, 1], np.random.Generator(np.random.PCG64(1)))

        def loss() -> float:
            return float(0.5 * np.mean((network.forward(steps.states)[-1][:, 0] - steps.returns) ** 2))

        activations = network.forward(steps.states)
        slope = ((activations[-1][:, 0] - steps.returns) / len(steps.returns))[:, None]
        for position, found in enumerate(network.backward(activations, slope)):
            np.testing.assert_allclose(found, numeric(network, loss, position), rtol=1e-5, atol=1e-8)

    def test_forbidden_actions_have_no_probability(self) -> None:
        steps, _, _ = episodes()
        chances = np.exp(log_probabilities(np.full(steps.allowed.shape, 3.0), steps.allowed))
        assert (chances[~steps.allowed] == 0).all()
        np.testing.assert_allclose(chances.sum(axis=1), 1.0)
        assert ENTROPY > 0


def test_an_agent_learns_which_action_pays() -> None:
    random = np.random.Generator(np.random.PCG64(0))
    agent = Agent(2, 3, Settings(), random)
    states = np.tile(np.eye(2), (8, 1))
    allowed = np.ones((16, 3), dtype=bool)
    best = np.array([1, 2])
    for _ in range(40):
        actions = np.array([random.choice(3, p=agent.probabilities(state, allowed[0])) for state in states])
        returns = np.where(actions == np.tile(best, 8), 1.0, -0.5)
        agent.learn(Steps(states, allowed, actions, returns))
    for number in (0, 1):
        assert agent.probabilities(np.eye(2)[number], allowed[0])[best[number]] > 0.8


class TestTheWalk:
    def test_the_state_counts_what_was_taken(self) -> None:
        walk = decisions_of(action_space(3), bins=8)
        assert isinstance(walk, LayerDecisions)
        assert (walk.size, walk.actions) == (3 * 4, 5)
        state = walk.state([1, 2, 4, 0])  # take, take, back, take
        assert state[:9].reshape(3, 3).tolist() == [[0, 1, 0], [1, 0, 1], [0, 0, 0]]
        assert state[9:].tolist() == [0, 0, 1]
        assert not walk.allowed([])[4] and walk.allowed([1])[4] and walk.allowed([])[:4].all()

    def test_it_ends_behind_the_last_layer_or_with_the_sequence(self) -> None:
        walk = LayerDecisions(action_space(3, steps=5))
        assert not walk.done([0, 3]) and walk.done([0, 3, 1])
        assert walk.done([0, 4, 0, 4, 0])

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_genomes_and_decisions(self, seed: int) -> None:
        random = np.random.Generator(np.random.PCG64(seed))
        for space in (action_space(3), mixed(), reals(3)):
            decisions = decisions_of(space, bins=5)
            taken: list[int] = []
            while not decisions.done(taken):
                assert decisions.state(taken).shape == (decisions.size,)
                taken.append(int(random.choice(np.flatnonzero(decisions.allowed(taken)))))
            genome = decisions.genome(taken, random)
            assert np.array_equal(space.clip(genome), genome)
            assert decisions.taken(genome) == taken
            assert decisions.taken(np.nextafter(genome, np.inf)) == taken

    def test_parts_of_ranges(self) -> None:
        decisions = decisions_of(mixed(), bins=5)
        assert isinstance(decisions, VariableDecisions)
        assert [int(decisions.allowed([0] * n).sum()) for n in range(6)] == [5, 5, 3, 5, 2, 5]


def hidden_sequence(space: ActionSpace) -> tuple[list[int], object]:
    """A sequence of blocks, and losses by how many layers hold another one."""
    wanted = [layer % 2 for layer in range(space.layers)]

    def losses(genome: Genome) -> Array:
        path = space.path([int(number) for number in genome])
        hits = sum(layer < space.layers and number == wanted[layer] for layer, number in path)
        return np.array([(space.layers - hits + abs(len(path) - space.layers)) / space.layers])

    return wanted, losses


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.slow
def test_it_learns_a_sequence_of_blocks(seed: int) -> None:
    """Later episodes are better than the first ones, and far better than chance."""
    space = action_space(6)
    _, losses = hidden_sequence(space)
    assert callable(losses)
    log = drive(RMM.make(make_context(space, seed=seed)), clean(losses), 400)
    found = [float(outcome.losses[0]) for outcome in outcomes_of(log) if outcome.losses is not None]
    assert np.mean(found[-50:]) < 0.5 * np.mean(found[:50])


@pytest.mark.parametrize("parallel", [1, 7])
def test_the_action_space_under_trouble_and_replayed(parallel: int) -> None:
    space = action_space(4)
    context = make_context(space, parallel=parallel, objectives=2)
    log = drive(RMM.make(context), troubled(smooth(space, 2)), 80, foreign=[space.low, space.uniform()], every=9)
    for proposal in proposals_of(log):
        assert np.array_equal(space.clip(proposal.genome), proposal.genome)
    replay(RMM.make(context), log)


def test_what_it_did_is_read_from_the_recorded_genomes() -> None:
    """Two agents that are told the same genomes agree, whatever they proposed."""
    space = reals(4)
    losses = smooth(space)
    one, two = (RMM.make(make_context(space, seed=5)) for _ in range(2))
    for index in range(12):
        (proposal,), (same,) = one.ask(1), two.ask(1)
        assert proposal.genome.tobytes() == same.genome.tobytes()
        recorded = space.clip(space.high - proposal.genome)
        for each in (one, two):
            each.tell(Outcome(index, recorded, losses(recorded)))


def test_nothing_is_learned_while_everything_fails() -> None:
    space = reals(3)
    algorithm, fresh = RMM.make(make_context(space)), RMM.make(make_context(space))
    for index in range(20):
        algorithm.tell(Outcome(index, space.low, None))
        algorithm.tell(Outcome(index, space.low, np.array([0.1]), own=False))
    assert algorithm.ask(3)[2].genome.tobytes() == fresh.ask(3)[2].genome.tobytes()


def test_it_finds_the_better_part_of_a_box() -> None:
    space = SearchSpace(tuple(Variable(f"x{number}", 0.0, 1.0) for number in range(6)))
    log = drive(RMM.make(make_context(space)), clean(lambda g: np.array([float(((g - 0.8) ** 2).mean())])), 400)
    assert best_loss(log) < 0.01


def test_the_space_needs_an_operator_that_is_known() -> None:
    spec = make_spec(merge={"space": "actions"})
    with pytest.raises(InvalidInput, match="nothing is known of the operator 'ties'"):
        make_space(spec, make_problem(spec, 4))
