"""Reinforced Model Merging's agent: proximal policy optimisation whose episodes are candidates."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.algorithms.scalarise import Scalarisation, Scalariser
from optimizer.decisions import decisions_of
from optimizer.ppo import Agent, Settings, Steps
from optimizer.spec import Strict

_REMEMBERED = 64


@algorithm("rmm")
class ReinforcedModelMerging(Algorithm):
    """An agent that builds genomes decision by decision.

    In the space `actions` it acts as in the paper: the state counts which blocks were taken, actions take a block, skip
    a layer or go back, and the reward comes at the end. In any other space it sets one variable after the other, real
    ones within one of a few parts of their range.

    It never waits. What it did is read from the recorded genomes, so foreign candidates are ignored, and episodes that
    were proposed before the last update count as the present policy's. Rewards are the negative losses, standardised by
    the last 64 of its own candidates, where the paper's code standardises each batch by itself: with batches of four that
    rewards the best of four bad ones as much as of four good ones. Candidates that failed or violate constraints are
    rewarded like the worst. Unlike in the paper, rewards come from all items.
    """

    summary = "An agent that learns which block to take next (PPO); made for the space `actions`."
    reference = "Han et al. 2025, Reinforced Model Merging, arXiv 2503.21272"

    class Options(Strict):
        """Options of `ReinforcedModelMerging`."""

        episodes: int = Field(default=4, ge=2, le=1000, description="Candidates between two updates of the agent.")
        epochs: int = Field(default=40, ge=1, le=1000, description="Steps of each update.")
        clip: float = Field(
            default=0.2, gt=0, lt=1, description="How far an update may move the probability of an action, as a ratio."
        )
        discount: float = Field(
            default=0.99, gt=0, le=1, description="Factor of the reward for each step before the last."
        )
        policy_rate: float = Field(default=3e-4, gt=0, le=1, description="Learning rate of the policy.")
        value_rate: float = Field(default=1e-3, gt=0, le=1, description="Learning rate of the value.")
        hidden: int = Field(default=64, ge=2, le=4096, description="Units of each of the two hidden layers.")
        bins: int = Field(
            default=8, ge=2, le=256, description="Parts of the range of a number that is no choice, in other spaces."
        )
        scalarisation: Scalarisation = Field(
            default="weighted_sum",
            description="How several objectives become one: their weighted sum, or the worst weighted one (Tchebycheff).",
        )
        normalise: bool = Field(
            default=True,
            description="Divide each objective by its spread among the first candidates before weighing.",
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()
        self._decisions = decisions_of(context.space, options.bins)
        settings = Settings(options.hidden, options.clip, options.epochs, options.policy_rate, options.value_rate)
        self._agent = Agent(self._decisions.size, self._decisions.actions, settings, self._random)
        self._scalariser = Scalariser(context.weights, options.scalarisation, options.normalise)
        self._batch: list[tuple[list[int], float]] = []
        self._recent: deque[float] = deque(maxlen=_REMEMBERED)
        self._updates = 0

    @property
    def batch_size(self) -> int:
        """Candidates between two updates, or as many as run in parallel."""
        return max(int(self.options.episodes), self.context.parallel)

    def ask(self, count: int) -> list[Proposal]:
        """Return so many episodes of the present policy."""
        return [Proposal(self._episode(), self._updates) for _ in range(max(count, 0))]

    def tell(self, outcome: Outcome) -> None:
        """Take in the reward of an episode; the last one of a batch teaches the agent."""
        if not outcome.own or outcome.items is not None:
            return
        self._scalariser.observe(outcome)
        score = float(self._scalariser.rank([outcome])[0]) if outcome.feasible else np.nan
        self._batch.append((self._decisions.taken(outcome.genome), -score))
        if outcome.feasible:
            self._recent.append(-score)
        if len(self._batch) == self.options.episodes:
            self._learn()
            self._batch = []

    def _episode(self) -> NDArray[np.float64]:
        taken: list[int] = []
        while not self._decisions.done(taken):
            chances = self._agent.probabilities(self._decisions.state(taken), self._decisions.allowed(taken))
            # The last action that is possible takes what rounding leaves over.
            drawn = int(np.searchsorted(np.cumsum(chances), self._random.random(), side="right"))
            taken.append(min(drawn, int(np.flatnonzero(chances > 0)[-1])))
        return self._decisions.genome(taken, self._random)

    def _learn(self) -> None:
        """Update the agent, unless nothing that it did so far had a score."""
        if not self._recent:
            return
        recent = np.array(self._recent)
        spread = float(recent.std())
        rewards = np.array([reward for _, reward in self._batch])
        rewards = np.where(np.isnan(rewards), recent.min(), rewards)
        rewards = (rewards - recent.mean()) / spread if spread > 0 else np.zeros_like(rewards)
        self._agent.learn(self._steps(rewards))
        self._updates += 1

    def _steps(self, rewards: NDArray[np.float64]) -> Steps:
        states, allowed, actions, returns = [], [], [], []
        for (taken, _), reward in zip(self._batch, rewards.tolist(), strict=True):
            for number, action in enumerate(taken):
                states.append(self._decisions.state(taken[:number]))
                allowed.append(self._decisions.allowed(taken[:number]))
                actions.append(action)
                returns.append(reward * self.options.discount ** (len(taken) - 1 - number))
        return Steps(np.array(states), np.array(allowed), np.array(actions, dtype=np.intp), np.array(returns))
