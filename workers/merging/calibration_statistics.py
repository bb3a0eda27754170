"""What a model's parameters do on a few items: diagonal Fisher information, Gram matrices, activation magnitudes.

All are means over the items' examples or tokens, in the model's own type. Items must not be padded: an evaluator with a
batch size of 1 gives them one at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimizer.errors import InvalidInput, JobError
from workers.evaluators.base import Evaluator, Prediction
from workers.merging.operator import Numbers

Question = Literal["fisher", "fisher_sampled", "fisher_expected", "gram", "activation"]
"""What can be asked of a parameter:

- ``fisher``, ``fisher_sampled``, ``fisher_expected``: the mean over the items of the squared gradient of an item's
  log-likelihood, for the labels in the data, for one draw from the model's own distribution, or in expectation over it
  (where an item has one label). Answer ``fisher``: of the parameter's shape.
- ``gram``: the mean over the tokens of xᵀx, where x is what the parameter's linear layer reads. Answer ``gram``: shape
  (in, in); ``axis``: the parameter's dimension that stands for x, 1 for a linear layer, 0 for GPT-2's transposed ones.
- ``activation``: the mean over the tokens of |x|, of what a linear layer or a norm reads. Answers ``activation``: shape
  (in,), and ``axis``.

A parameter that no linear layer (norm) alone has for its weight, such as embeddings, biases, convolutions, weights tied
to the embeddings and experts that are fused into one tensor, has no answer to the last two.
"""

QUESTIONS: tuple[str, ...] = get_args(Question)

_CHANNELS_FIRST = (nn.modules.batchnorm._NormBase, nn.GroupNorm)

MAX_CLASSES = 256
"""An expectation takes one backward pass for each class."""


def measure(
    question: str, model: PreTrainedModel, evaluator: Evaluator, parameters: Mapping[str, nn.Parameter], seed: int
) -> dict[str, Numbers]:
    """Answer a question about some of a model's parameters.

    Args:
        question: one of `QUESTIONS`.
        model: in evaluation mode; left as it was.
        evaluator: whose items are run through it, one at a time.
        parameters: of the model, by the name they have in the answer.
        seed: of the draws of ``fisher_sampled``.

    Returns:
        For each parameter that has an answer the numbers described at `Question`. Takes as much memory as they do, and
        for the Fisher information as much again for one item's gradients.

    Raises:
        InvalidInput: unknown question, or the evaluator cannot answer it.
        JobError: the numbers are not finite.
    """
    if question not in QUESTIONS:
        raise InvalidInput(
            f"{question!r} cannot be measured", field="merge.operator", remedy=f"use one of: {', '.join(QUESTIONS)}"
        )
    with torch.inference_mode(False):
        if question == "gram":
            found = _on_inputs(model, evaluator, parameters, norms=False, accumulate=_add_gram)
        elif question == "activation":
            found = _on_inputs(model, evaluator, parameters, norms=True, accumulate=_add_magnitude)
        else:
            found = _fisher(question, model, evaluator, parameters, seed)
    for name, numbers in found.items():
        if not all(bool(tensor.isfinite().all()) for tensor in numbers.values()):
            raise JobError(
                f"the model's {question} of {name!r} is not finite on its calibration data",
                field="merge.calibration",
                remedy="check the checkpoint: its outputs overflow",
            )
    return found


# --- Fisher information -----------------------------------------------------------------------------------------------


def _fisher(
    question: str, model: PreTrainedModel, evaluator: Evaluator, parameters: Mapping[str, nn.Parameter], seed: int
) -> dict[str, Numbers]:
    outcomes = _outcomes(question, torch.Generator().manual_seed(seed % 2**63))
    weights = list(parameters.values())
    sums = [torch.zeros_like(weight) for weight in weights]
    count = 0
    with _differentiable(weights), _sparse_embeddings(model), torch.enable_grad():
        for prediction in evaluator.predictions(model):
            for likelihood, share, last in outcomes(prediction):
                gradients = torch.autograd.grad(likelihood, weights, retain_graph=not last, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    _add_square(total, gradient, share)
            count += 1
    return {name: {"fisher": total.div_(count)} for name, total in zip(parameters, sums, strict=True)}


def _add_square(total: Tensor, gradient: Tensor | None, share: float) -> None:
    if gradient is None:
        return
    if gradient.is_sparse:
        rows = gradient.coalesce()
        total.index_add_(0, rows.indices()[0], rows.values().square(), alpha=share)
    else:
        total.addcmul_(gradient, gradient, value=share)


Outcomes = Callable[[Prediction], Iterator[tuple[Tensor, float, bool]]]
"""Yields an item's outcomes to differentiate: log-likelihood, probability, and whether it is the last one."""


def _outcomes(question: str, generator: torch.Generator) -> Outcomes:
    if question == "fisher_expected":
        return _all_classes

    def one(prediction: Prediction) -> Iterator[tuple[Tensor, float, bool]]:
        chosen = prediction.observed
        if question == "fisher_sampled":  # on the CPU, so that all devices draw alike
            shares = prediction.log_likelihoods.detach().exp().cpu()
            chosen = torch.multinomial(shares, 1, generator=generator)[:, 0].to(chosen.device)
        yield prediction.log_likelihoods.gather(1, chosen[:, None]).sum(), 1.0, True

    return one


def _all_classes(prediction: Prediction) -> Iterator[tuple[Tensor, float, bool]]:
    draws, classes = prediction.log_likelihoods.shape
    if draws != 1 or classes > MAX_CLASSES:
        raise InvalidInput(
            f"an item has {classes} possible outcomes{'' if draws == 1 else ' for each token'}, too many to go through",
            field="merge.options.labels",
            remedy="use `sampled` or `data`",
        )
    shares = prediction.log_likelihoods[0].detach().exp().tolist()
    for number, share in enumerate(shares):
        yield prediction.log_likelihoods[0, number], share, number == classes - 1


@contextmanager
def _differentiable(weights: list[nn.Parameter]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, needed in zip(weights, before, strict=True):
            weight.requires_grad_(needed)


@contextmanager
def _sparse_embeddings(model: nn.Module) -> Iterator[None]:
    """An item has few tokens: most of the time would go into the zeros of all the others."""
    owners = _owners(model)
    changed = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not module.sparse and owners[id(module.weight)] == 1
    ]
    try:
        for module in changed:
            module.sparse = True
        yield
    finally:
        for module in changed:
            module.sparse = False


# --- what layers read -------------------------------------------------------------------------------------------------


def _on_inputs(
    model: PreTrainedModel,
    evaluator: Evaluator,
    parameters: Mapping[str, nn.Parameter],
    *,
    norms: bool,
    accumulate: Callable[[Tensor | None, Tensor], Tensor],
) -> dict[str, Numbers]:
    layers = dict(_layers(model, parameters, norms))
    sums: dict[str, Tensor] = {}
    rows: Counter[str] = Counter()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = args[0] if args else next(iter(kwargs.values()))
            flat = tensor.reshape(-1, tensor.shape[-1])
            sums[name] = accumulate(sums.get(name), flat)
            rows[name] += len(flat)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, (module, _) in layers.items():
            handle = module.register_forward_pre_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        if layers:
            for _ in evaluator.predictions(model):
                pass
    key = "activation" if norms else "gram"
    return {
        name: {key: total / rows[name], "axis": torch.tensor(float(layers[name][1]), dtype=torch.float64)}
        for name, total in sums.items()
    }


def _add_gram(total: Tensor | None, rows: Tensor) -> Tensor:
    return rows.T @ rows if total is None else total.addmm_(rows.T, rows)


def _add_magnitude(total: Tensor | None, rows: Tensor) -> Tensor:
    found = rows.abs().sum(dim=0)
    return found if total is None else total.add_(found)


def _layers(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], norms: bool
) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    """Yield the module that has a parameter for its weight, if it is the only one, and the dimension of its input."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners = _owners(model)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or id(weight) not in names or owners[id(weight)] > 1:
            continue
        if isinstance(module, nn.Linear):
            yield names[id(weight)], (module, 1)
        elif isinstance(module, Conv1D) or (norms and weight.dim() == 1 and not isinstance(module, _CHANNELS_FIRST)):
            yield names[id(weight)], (module, 0)


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules have each parameter, by its id."""
    return Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())


def norm(answers: Iterator[Tensor]) -> float:
    """Return the Euclidean norm of all tensors together."""
    return math.sqrt(math.fsum(float(tensor.double().square().sum()) for tensor in answers))
