"""The digits' vision transformers scored directly: what a worker computes, at a fraction of its time.

On a model of 36,000 parameters a worker spends four fifths of its time on calling things: 72 parameters are merged one by
one, 60 modules run one after the other. Here a merge is a product of its table of coefficients with all models' flat
vectors, and the forward pass a few functions a layer. `Evaluator` compares the two before it relies on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from optimizer.fitness.aggregate import ItemScores
from optimizer.geometry import Layout
from optimizer.problem import Problem
from optimizer.recipe import Recipe
from optimizer.tables import linear_table

if TYPE_CHECKING:
    from tests.benchmarks.search.digits import Images

_HEADS = 4
_EPSILON = 1e-12


class DirectViT:
    """Scores weighted sums of the digits' models.

    Args:
        problem: the job's inputs.
        models: directory of each model, by name.
        data: by objective, its images in the order of the items.
    """

    def __init__(self, problem: Problem, models: Mapping[str, Path], data: Mapping[str, Images]) -> None:
        self._layout = problem.layout
        self._names = list(problem.models)
        self._stack = torch.stack([_flat(models[name], problem.layout) for name in self._names])
        tensors = problem.layout.flat
        sizes = np.cumsum([0, *(prod(tensor.shape) for tensor in tensors)]).tolist()
        self._views = {
            tensor.name: (begin, end, tensor.shape)
            for tensor, begin, end in zip(tensors, sizes, sizes[1:], strict=False)
        }
        self._ends = np.cumsum([0, *(len(images.digits) for images in data.values())]).tolist()
        self._objectives = list(data)
        pixels = torch.cat([images.pixels for images in data.values()])
        self._patches = F.unfold((pixels.float() / 255 - 0.5) / 0.5, kernel_size=2, stride=2).transpose(1, 2)
        self._labels = torch.cat([images.digits for images in data.values()])

    @torch.inference_mode()
    def scores(self, recipe: Recipe) -> dict[str, ItemScores] | None:
        """Return the losses item by item, by objective; None for what is no weighted sum, or has no finite losses."""
        table = linear_table(recipe, self._layout, self._names)
        if table is None:
            return None
        merged = torch.empty(self._stack.shape[1])
        ends = [0, *table.breaks.tolist(), len(merged)]
        rows = torch.from_numpy(table.coefficients.astype(np.float32))
        for row, begin, end in zip(rows, ends, ends[1:], strict=False):
            torch.mv(self._stack[:, begin:end].T, row, out=merged[begin:end])
        losses = F.cross_entropy(self._logits(merged), self._labels, reduction="none").numpy()
        if not np.isfinite(losses).all():
            return None
        return {
            name: ItemScores(losses[begin:end])
            for name, begin, end in zip(self._objectives, self._ends, self._ends[1:], strict=False)
        }

    def _logits(self, merged: Tensor) -> Tensor:
        def of(name: str) -> Tensor:
            begin, end, shape = self._views[name]
            return merged[begin:end].view(shape)

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, of(f"{name}.weight"), of(f"{name}.bias"))

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], of(f"{name}.weight"), of(f"{name}.bias"), _EPSILON)

        first = "embeddings.patch_embeddings.projection"
        hidden = F.linear(self._patches, of(f"{first}.weight").flatten(1), of(f"{first}.bias"))
        start = of("embeddings.cls_token").expand(len(hidden), -1, -1)
        hidden = torch.cat([start, hidden], dim=1) + of("embeddings.position_embeddings")
        for number in range(self._layout.layers):
            name = f"encoder.layer.{number}"
            inputs = norm(hidden, f"{name}.layernorm_before")
            if number == self._layout.layers - 1:
                hidden = hidden[:, :1]  # the classifier sees the first token only
            query, key, value = (
                linear(tokens, f"{name}.attention.attention.{part}")
                for part, tokens in (("query", inputs[:, : hidden.shape[1]]), ("key", inputs), ("value", inputs))
            )
            hidden = hidden + linear(_attended(query, key, value), f"{name}.attention.output.dense")
            found = F.gelu(linear(norm(hidden, f"{name}.layernorm_after"), f"{name}.intermediate.dense"))
            hidden = hidden + linear(found, f"{name}.output.dense")
        return linear(norm(hidden[:, 0], "layernorm"), "classifier")


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention with several heads; the sum of each softmax is one more column of the values.

    On so few tokens it takes half the time of torch's own. Scores beyond 88 are no numbers here, and left to the worker.
    """
    images, tokens, width = query.shape
    q, k, v = (
        x.reshape(images, -1, _HEADS, width // _HEADS).transpose(1, 2).flatten(0, 1) for x in (query, key, value)
    )
    shares = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).exp_()
    sums = torch.bmm(shares, F.pad(v, (0, 1), value=1.0))
    mixed = sums[..., :-1] / sums[..., -1:]
    return mixed.reshape(images, _HEADS, tokens, -1).transpose(1, 2).flatten(2)


def _flat(path: Path, layout: Layout) -> Tensor:
    """A model's parameters as one vector, in the layout's order."""
    stored = load_file(path / "model.safetensors")
    names = {tensor.name: next(name for name in stored if name.endswith(tensor.name)) for tensor in layout.flat}
    return torch.cat([stored[names[tensor.name]].flatten() for tensor in layout.flat])
