"""Slopes: how an objective's likelihood changes when the resident merged model moves towards each expert.

One forward and one backward pass over the items give the gradient of the mean negative log-likelihood; then the experts'
tensors are read one at a time. In memory are, beside the resident model, one gradient as large as it in float32, one
more tensor, and blocks: nothing grows with the number of experts or objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from optimizer.geometry import TensorInfo
from optimizer.recipe import Selector
from workers.evaluators.base import Cancelled, Evaluator, Prediction
from workers.merging.blocks import BLOCK
from workers.merging.engine import MergeEngine
from workers.merging.resident import ResidentModels

Gradients = Mapping[str, Tensor]

NOISE = 1e-5
"""A parameter whose gradient is shorter than this part of the longest has none but rounding errors, as the biases of keys
in attention; its cosines would be arbitrary and count as much as any other's, so they count as 0."""


class Slopes:
    """Measures slopes at the resident merged model.

    Args:
        models: the resident model, with a recipe applied whose layers are those of the base.
        engine: of its checkpoints.
        groups: the job's coefficient groups.
    """

    def __init__(self, models: ResidentModels, engine: MergeEngine, groups: Sequence[Selector]) -> None:
        self._models = models
        self._engine = engine
        self._count = len(groups)
        self._tensors: list[tuple[TensorInfo, int]] = []
        for tensor in engine.layout.shared:
            group = next((number for number, group in enumerate(groups) if group.matches(tensor)), None)
            if group is not None:
                self._tensors.append((tensor, group))

    def measure(
        self, evaluator: Evaluator, head: str | None, cancelled: Callable[[], bool]
    ) -> NDArray[np.float64] | None:
        """Return the slopes of one evaluator's mean negative log-likelihood (over draws, so that of its ``loss``).

        Args:
            evaluator: whose items are used.
            head: name of the expert whose head the model has.
            cancelled: asked after every forward pass.

        Returns:
            Shape (2, groups, models + 1), as `optimizer.algorithms.Outcome.slopes` says; None where the evaluator gives
            no likelihoods, or the model computes parameters from the merged ones in a way that nothing is derived
            through.

        Raises:
            Cancelled: ``cancelled`` returned True.
        """
        parameters = self._models.parameters(head, evaluator.auto_class) if evaluator.differentiable else None
        if parameters is None:
            return None
        chosen = {tensor.name for tensor, _ in self._tensors}
        weights = {name: weight for name, weight in parameters.items() if name in chosen}
        with torch.inference_mode(False), torch.enable_grad():
            model = self._models.model(head, evaluator.auto_class)
            gradients = _gradients(model, evaluator, weights, cancelled)
        with torch.no_grad():
            return self._products(gradients)

    def _products(self, gradients: Gradients) -> NDArray[np.float64]:
        names = list(self._models.checkpoints)
        limit = NOISE * max((float(gradient.norm()) for gradient in gradients.values()), default=0.0)
        out = np.zeros((2, self._count, len(names) + 1))
        for tensor, group in self._tensors:
            gradient = gradients.get(tensor.name)
            if gradient is None:
                continue
            device = gradient.device
            base = self._engine.source("base", tensor, device)
            together = max(1, BLOCK // max(1, gradient.numel()))
            for first in range(0, len(names) + 1, together):
                chosen = [*names, None][first : first + together]
                models = [
                    self._models.shared[tensor.name] if name is None else self._engine.source(name, tensor, device)
                    for name in chosen
                ]
                out[:, group, first : first + len(models)] += _compare(gradient, models, base, limit)
        return out


def _gradients(
    model: nn.Module, evaluator: Evaluator, weights: Mapping[str, nn.Parameter], cancelled: Callable[[], bool]
) -> Gradients:
    """The gradient of the mean negative log-likelihood in float32, by parameter; without those that have none."""
    sums: dict[str, Tensor] = {}
    draws = 0
    with _collecting(weights, sums):
        batch: list[Prediction] = []
        for prediction in evaluator.predictions(model):  # type: ignore[arg-type]
            if cancelled():
                raise Cancelled("the evaluation was called off")
            batch.append(prediction)
            if prediction.last:
                likelihoods = torch.cat([one.log_likelihoods for one in batch])
                observed = torch.cat([one.observed for one in batch])
                nll_loss(likelihoods, observed, reduction="sum").backward()  # type: ignore[no-untyped-call]
                draws += len(observed)
                batch = []
    return {name: total.div_(max(draws, 1)) for name, total in sums.items()}


@contextmanager
def _collecting(weights: Mapping[str, nn.Parameter], sums: dict[str, Tensor]) -> Iterator[None]:
    """Add what backward passes find into ``sums``, tensor by tensor, so that no second gradient is ever complete."""

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            found, weight.grad = weight.grad, None
            if found is None:
                return
            if name in sums:
                sums[name].add_(found)
            else:
                sums[name] = found.to(torch.promote_types(found.dtype, torch.float32))

        return hook

    handles = []
    before = {name: weight.requires_grad for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(collect(name)))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
            weight.grad = None


def _compare(gradient: Tensor, models: Sequence[Tensor], base: Tensor, limit: float) -> NDArray[np.float64]:
    """Return ⟨g, θ − base⟩ and the cosine of g and θ of each model, over one whole parameter, shape (2, models).

    Differences are taken element by element in float32, for task vectors are small beside the weights, and sums in
    float64. Where |g| ≤ ``limit`` or θ = 0 the cosine is 0.
    """
    sums = torch.zeros(4, len(models), dtype=torch.float64, device=gradient.device)
    flat = [tensor.reshape(-1) for tensor in (gradient, base, *models)]
    for begin in range(0, flat[0].numel(), BLOCK):
        g, other, *rows = (tensor[begin : begin + BLOCK].to(gradient.dtype) for tensor in flat)
        own = torch.stack(rows)
        parts = (g * (own - other), g * own, (g * g).expand_as(own), own * own)
        sums += torch.stack([part.sum(dim=1, dtype=torch.float64) for part in parts])
    along, products, squares, own_squares = sums.cpu().numpy()
    norms = np.sqrt(squares * own_squares)
    directed = (np.sqrt(squares) > limit) & (own_squares > 0)
    return np.array([along, np.divide(products, norms, out=np.zeros_like(norms), where=directed)])
