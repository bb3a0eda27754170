"""Gradient descent on a single tensor, for operators that optimise the merged task vector without any data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.optim import SGD, Adam

Method = Literal["adam", "sgd"]
MOMENTUM = 0.9


def descend(
    start: Tensor, gradient: Callable[[Tensor], Tensor], *, rate: float, steps: int, method: Method = "adam"
) -> Tensor:
    """Return where the optimiser arrives.

    Args:
        start: not written to.
        gradient: of the loss at a point; a new tensor each time.
        rate: learning rate.
        steps: number of steps.
        method: Adam as PyTorch has it by default, or gradient descent with `MOMENTUM`.
    """
    point = start.clone()
    optimiser = Adam([point], lr=rate) if method == "adam" else SGD([point], lr=rate, momentum=MOMENTUM)
    for _ in range(steps):
        point.grad = gradient(point)
        optimiser.step()
    point.grad = None
    return point
