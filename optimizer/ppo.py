"""Proximal policy optimisation with two small networks in numpy (Schulman et al. 2017, arXiv 1707.06347).

The loss is that of Reinforced Model Merging's code: clipped ratios of probabilities, half the squared error of the
value, and a small bonus for entropy, over whole episodes with one reward at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Actions = NDArray[np.intp]

_FORBIDDEN = -1e9
ENTROPY = 1e-4


class Network:
    """A multi-layer perceptron with tanh between its layers.

    Weights begin uniform in ±1/√inputs.

    Args:
        sizes: of input, hidden layers and output.
        random: draws the first weights.
    """

    def __init__(self, sizes: Sequence[int], random: np.random.Generator) -> None:
        self.weights: list[Array] = []
        for inside, outside in pairwise(sizes):
            bound = 1.0 / np.sqrt(inside)
            self.weights += [random.uniform(-bound, bound, (inside, outside)), random.uniform(-bound, bound, outside)]

    def forward(self, inputs: Array) -> list[Array]:
        """Return the activations of all layers, inputs first, for inputs of shape (rows, size)."""
        out = [inputs]
        for number in range(0, len(self.weights), 2):
            raw = out[-1] @ self.weights[number] + self.weights[number + 1]
            out.append(raw if number == len(self.weights) - 2 else np.tanh(raw))
        return out

    def backward(self, activations: Sequence[Array], slope: Array) -> list[Array]:
        """Return the loss's gradient with respect to the weights.

        Args:
            activations: of `forward`.
            slope: the loss's gradient with respect to the output, shape (rows, outputs).
        """
        gradients: list[Array] = []
        for number in range(len(self.weights) - 2, -1, -2):
            below = activations[number // 2]
            gradients = [below.T @ slope, slope.sum(axis=0), *gradients]
            slope = (slope @ self.weights[number].T) * (1.0 - below**2)
        return gradients


class Adam:
    """Adam (Kingma and Ba 2015) with its usual constants, changing a network in place."""

    def __init__(self, network: Network, rate: float) -> None:
        self._network, self._rate, self._step = network, rate, 0
        self._means = [np.zeros_like(weight) for weight in network.weights]
        self._squares = [np.zeros_like(weight) for weight in network.weights]

    def step(self, gradients: Sequence[Array]) -> None:
        """Take a step against the gradient."""
        self._step += 1
        parts = zip(self._network.weights, gradients, self._means, self._squares, strict=True)
        for weight, gradient, mean, square in parts:
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            size = np.sqrt(square / (1.0 - 0.999**self._step)) + 1e-8
            weight -= self._rate * mean / (1.0 - 0.9**self._step) / size


@dataclass(frozen=True)
class Steps:
    """The steps of some episodes.

    Attributes:
        states: shape (steps, size).
        allowed: the actions that could be taken, shape (steps, actions).
        actions: those that were, shape (steps,).
        returns: the discounted reward at the end of each step's episode, shape (steps,).
    """

    states: Array
    allowed: Mask
    actions: Actions
    returns: Array


def log_probabilities(logits: Array, allowed: Mask) -> Array:
    """Return the logarithms of the probabilities of all actions; forbidden ones have all but none."""
    logits = np.where(allowed, logits, _FORBIDDEN)
    logits = logits - logits.max(axis=1, keepdims=True)
    out: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return out


def policy_loss(logits: Array, steps: Steps, advantages: Array, before: Array, clip: float) -> tuple[float, Array]:
    """Return the clipped loss less the bonus for entropy, and its gradient with respect to the logits.

    Args:
        logits: shape (steps, actions).
        steps: what was done.
        advantages: shape (steps,).
        before: logarithms of the probabilities with which it was done, shape (steps,).
        clip: how far a ratio of probabilities may move before it teaches no more.
    """
    rows = np.arange(len(logits))
    logs = log_probabilities(logits, steps.allowed)
    chances = np.exp(logs)
    ratios = np.exp(logs[rows, steps.actions] - before)
    plain, clipped = ratios * advantages, np.clip(ratios, 1.0 - clip, 1.0 + clip) * advantages
    entropies = -(chances * np.where(steps.allowed, logs, 0.0)).sum(axis=1)
    loss = float(np.mean(-np.minimum(plain, clipped) - ENTROPY * entropies))
    taken = np.zeros_like(chances)
    taken[rows, steps.actions] = 1.0
    pull = np.where(plain <= clipped, -plain, 0.0)[:, None] * (taken - chances)
    spread = ENTROPY * chances * (np.where(steps.allowed, logs, 0.0) + entropies[:, None])
    slope: Array = np.where(steps.allowed, pull + spread, 0.0) / len(logits)
    return loss, slope


@dataclass(frozen=True)
class Settings:
    """Settings of an agent; `optimizer.algorithms.rmm` describes them."""

    hidden: int = 64
    clip: float = 0.2
    epochs: int = 40
    policy_rate: float = 3e-4
    value_rate: float = 1e-3


class Agent:
    """A policy and a value, each a network with two hidden layers.

    Args:
        size: of a state.
        actions: number of actions.
        settings: see there.
        random: draws the first weights.
    """

    def __init__(self, size: int, actions: int, settings: Settings, random: np.random.Generator) -> None:
        hidden = [size, settings.hidden, settings.hidden]
        self.settings = settings
        self.policy = Network([*hidden, actions], random)
        self.value = Network([*hidden, 1], random)
        self._policy_adam = Adam(self.policy, settings.policy_rate)
        self._value_adam = Adam(self.value, settings.value_rate)

    def probabilities(self, state: Array, allowed: Mask) -> Array:
        """Return the probability of each action in one state, shape (actions,)."""
        logits = self.policy.forward(state[None])[-1]
        out: Array = np.exp(log_probabilities(logits, allowed[None]))[0]
        return out

    def learn(self, steps: Steps) -> None:
        """Learn from some episodes, which count as done by the present policy."""
        rows = np.arange(len(steps.actions))
        before = log_probabilities(self.policy.forward(steps.states)[-1], steps.allowed)[rows, steps.actions]
        advantages = steps.returns - self.value.forward(steps.states)[-1][:, 0]
        for _ in range(self.settings.epochs):
            activations = self.policy.forward(steps.states)
            _, slope = policy_loss(activations[-1], steps, advantages, before, self.settings.clip)
            self._policy_adam.step(self.policy.backward(activations, slope))
            activations = self.value.forward(steps.states)
            errors = activations[-1][:, 0] - steps.returns
            self._value_adam.step(self.value.backward(activations, (errors / len(rows))[:, None]))
