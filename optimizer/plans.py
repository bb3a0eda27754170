"""Layer plans from plain numbers: stacks, swaps, pruning, and the data-flow space of evolutionary model merging.

Every function returns what stands at each depth (`Recipe.layers`). What is in no layer (embeddings, final norm, output
layer) is made of the recipe's root; `ends` gives the one that mergekit takes for a stack.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.recipe import Leaf, Merge, PlannedLayer, Selector


class Slice(NamedTuple):
    """Consecutive layers of one model: ``first`` to ``end`` - 1, as in mergekit's ``layer_range``."""

    model: str
    first: int
    end: int


def stack(slices: Sequence[Slice]) -> list[PlannedLayer]:
    """Stack layers of models on each other, as mergekit's passthrough does with its slices.

    Raises:
        InvalidInput: a slice is empty or begins before layer 0.
    """
    out = []
    for number, part in enumerate(slices):
        if not 0 <= part.first < part.end:
            raise InvalidInput(
                f"a slice runs from a layer to a later one, not from {part.first} to {part.end}",
                field=f"slices.{number}",
            )
        out += [PlannedLayer(layer=layer, node=Leaf(model=part.model)) for layer in range(part.first, part.end)]
    return out


def ends(first: str, last: str) -> Leaf | Merge:
    """Return the root of a stack: what comes before the layers is model ``first``'s, what comes after is ``last``'s.

    mergekit takes them from the first and the last slice. An output layer that is tied to the embeddings is theirs.
    """
    if first == last:
        return Leaf(model=first)
    return Merge(
        operator="linear",
        base=Leaf(model=first),
        inputs=[Leaf(model=first), Leaf(model=last)],
        groups=[Selector(positions=["output"]), Selector()],
        coefficients=[[0.0, 1.0], [1.0, 0.0]],
    )


def swap(layers: int, nodes: Mapping[int, Leaf | Merge | str]) -> list[PlannedLayer]:
    """Replace single layers: by a model's (given by its name), or by anything merged.

    Args:
        layers: number of layers of the models.
        nodes: what the layers of these numbers are made of; the others are made of the recipe's root.

    Raises:
        InvalidInput: there is no such layer.
    """
    _check_numbers(nodes, layers, "nodes")
    out = []
    for layer in range(layers):
        node = nodes.get(layer)
        out.append(PlannedLayer(layer=layer, node=Leaf(model=node) if isinstance(node, str) else node))
    return out


def prune(
    layers: int,
    removed: Collection[int],
    candidates: Sequence[Collection[str]] | None = None,
    factors: Sequence[float] | None = None,
    base: str = "base",
) -> list[PlannedLayer]:
    """Remove layers, and select or merge each of the others (GPTailor, arXiv 2506.20480).

    A layer with no candidate is the base's, with one that model's, and with several base + factor · Σ task vectors.
    GPTailor's output scale of each layer (declared there, but not used) is `scaled` with `additions`.

    Args:
        layers: number of layers of the models.
        removed: numbers of the layers to leave out.
        candidates: for each layer of the models, removed or not, the models to select or merge; by default every layer
            that stays is made of the recipe's root.
        factors: for each layer the factor of its merged task vectors; 1 by default.
        base: name of the base.

    Raises:
        InvalidInput: there is no such layer, or not one entry for each layer.
        InfeasibleCandidate: no layer is left.
    """
    _check_numbers(removed, layers, "removed")
    _check_length(candidates, layers, "candidates")
    _check_length(factors, layers, "factors")
    out = []
    for layer in range(layers):
        if layer in removed:
            continue
        factor = factors[layer] if factors is not None else 1.0
        node = _selected(candidates[layer], factor, base) if candidates is not None else None
        out.append(PlannedLayer(layer=layer, node=node))
    return _some(out)


def data_flow(
    models: Sequence[str],
    layers: int,
    indicator: Sequence[float],
    inputs: Sequence[Sequence[float]] | None = None,
) -> list[PlannedLayer]:
    """Return a path through the layers of several models (data-flow space, arXiv 2403.13187).

    All layers of the first model, then of the second and so on, are laid in a row of M layers, and the row is repeated.
    Those whose indicator is positive make up the path.

    A layer's input in the path is scaled by W[i][j], j being its number in the row and i that of the one before it in
    the path. Plain weights cannot scale the hidden state, but see `additions`: the same outputs come about when
    every layer adds less. The first layer's input is not scaled, as it would scale everything.

    Args:
        models: names, in the order of the row.
        layers: number of layers of each model.
        indicator: one number for each place; its length is a multiple of M = models · layers.
        inputs: W, M × M; 1 throughout by default.

    Raises:
        InvalidInput: lengths that do not fit.
        InfeasibleCandidate: no indicator is positive, or the scales are not positive.
    """
    row = [(model, layer) for model in models for layer in range(layers)]
    size = len(row)
    if not size or not indicator or len(indicator) % size:
        raise InvalidInput(
            f"the indicator has {len(indicator)} entries, which is no multiple of the {size} layers of all models",
            field="indicator",
        )
    if inputs is not None and (len(inputs) != size or {len(line) for line in inputs} != {size}):
        raise InvalidInput(f"the input scales are a table of {size} × {size}", field="inputs")
    path = [place % size for place, value in enumerate(indicator) if value > 0]
    plan = _some([PlannedLayer(layer=row[j][1], node=Leaf(model=row[j][0])) for j in path])
    if inputs is None:
        return plan
    return scaled(plan, additions([1.0, *(inputs[i][j] for i, j in pairwise(path))], "input"))


def additions(scales: Sequence[float], at: Literal["input", "output"], limit: float = math.inf) -> list[float]:
    """Turn factors of the hidden state into factors of what each layer adds to it.

    With pre-norm layers h ← s·h + f(norm(s·h)), and a norm that ignores its input's scale (RMSNorm, LayerNorm), put
    h = S·g with S the product of all factors so far: then g ← g + f(norm(g)) / S, and the final norm removes the last S.
    So a layer adds 1/S times what it does, S being the product of the factors up to and including its own for
    factors of layers' inputs (arXiv 2403.13187), up to but without its own for factors of their outputs (the decoder
    layers of auto-merge-llm, arXiv 2502.04030). A factor of the last output changes nothing.

    This is exact up to the norm's ε, which stands in for ε / S². It does not hold for models that normalise after the
    addition (BERT), nor where the hidden state is used without a norm.

    Args:
        scales: one positive factor for each layer.
        at: whether they scale what a layer takes in or what it gives out.
        limit: factors beyond it, or below 1 / limit, are brought back to it, so that no search proposes weights that
            overflow.

    Raises:
        InfeasibleCandidate: a factor is not positive: nothing a layer adds could undo that.
    """
    for depth, scale in enumerate(scales):
        if not (math.isfinite(scale) and scale > 0):
            raise InfeasibleCandidate(
                f"the hidden state is scaled by {scale} at depth {depth}; only positive factors can be put into weights",
                field=f"scales.{depth}",
            )
    inner = list(scales) if at == "input" else [1.0, *scales[:-1]]
    products = list(accumulate(inner, lambda left, right: left * right))
    out = [1.0 / product if product > 0 else math.inf for product in products]
    if math.isfinite(limit):
        out = [min(max(value, 1.0 / limit), limit) for value in out]
    if not all(math.isfinite(value) and value > 0 for value in out):
        raise InfeasibleCandidate("the factors' product leaves the range of numbers", field="scales")
    return out[: len(scales)]


def scaled(layers: Sequence[PlannedLayer], factors: Sequence[float]) -> list[PlannedLayer]:
    """Multiply what each planned layer adds to the residual stream by a factor.

    Raises:
        InvalidInput: not one factor for each layer.
        InfeasibleCandidate: a product is not finite.
    """
    _check_length(factors, len(layers), "factors")
    out = []
    for depth, (layer, factor) in enumerate(zip(layers, factors, strict=True)):
        scale = layer.scale * float(factor)
        if not math.isfinite(scale):
            raise InfeasibleCandidate(f"what the layer at depth {depth} adds is scaled by {scale}", field="factors")
        out.append(layer.model_copy(update={"scale": scale}))
    return out


def _selected(models: Collection[str], factor: float, base: str) -> Leaf | Merge:
    names = list(models)
    if len(names) < 2:
        return Leaf(model=names[0] if names else base)
    return Merge(
        operator="task_arithmetic",
        base=Leaf(model=base),
        inputs=[Leaf(model=name) for name in names],
        groups=[Selector()],
        coefficients=[[factor] * len(names)],
    )


def _some(layers: list[PlannedLayer]) -> list[PlannedLayer]:
    if not layers:
        raise InfeasibleCandidate("no layer is left")
    return layers


def _check_numbers(numbers: Collection[int], layers: int, field: str) -> None:
    strange = sorted(number for number in numbers if not 0 <= number < layers)
    if strange:
        raise InvalidInput(
            f"there is no layer {strange[0]}: the models have {layers}",
            field=field,
            remedy=f"use 0 to {layers - 1}",
        )


def _check_length(values: Sequence[object] | None, wanted: int, field: str) -> None:
    if values is not None and len(values) != wanted:
        raise InvalidInput(f"{wanted} entries are needed, one for each layer, not {len(values)}", field=field)
