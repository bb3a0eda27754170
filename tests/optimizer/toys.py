"""A world of tiny models in which every recipe has weights, losses, per-item scores and slopes, all in numpy.

Operators are played by their simplest relatives: an interpolation is linear, everything else is task arithmetic. That is
enough for searches, which only need losses that follow from the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.aggregate import ItemScores
from optimizer.ports import Candidate, Evaluation, Failure
from optimizer.problem import Grams, OperatorInfo, Problem
from optimizer.recipe import Leaf, Merge, PlannedLayer, Recipe
from optimizer.space import make_groups, named_operators
from optimizer.spec import JobSpec
from tests.factories import make_problem

Vector = NDArray[np.float64]
ITEMS = 20


@dataclass(frozen=True)
class World:
    """The models of a job, with a target for each objective between the first experts and the base.

    Args:
        spec: the job; its objectives' names are used as they are.
        layers: of the models.
    """

    spec: JobSpec
    layers: int = 4

    @cached_property
    def problem(self) -> Problem:
        """The problem, with exact Gram matrices over every single parameter, and with slopes."""
        bare = make_problem(self.spec, self.layers)
        products = np.einsum("ap,bp->pab", self._matrix(bare), self._matrix(bare))
        return bare.model_copy(
            update={
                "grams": Grams.pack(list(range(len(products) + 1)), products),
                "operators": {
                    name: OperatorInfo(name=name, summary="An operator.", reference="2026")
                    for name, _ in named_operators(self.spec)
                },
                "objectives": [o.model_copy(update={"differentiable": True}) for o in bare.objectives],
            }
        )

    @cached_property
    def models(self) -> dict[str, Vector]:
        """The flat weights of each model, in the layout's flat order."""
        rows = self._matrix(self.problem)
        return dict(zip(self.problem.models, rows, strict=True))

    def _matrix(self, problem: Problem) -> Vector:
        random = np.random.Generator(np.random.PCG64(7))
        size = sum(int(np.prod(tensor.shape)) for tensor in problem.layout.shared)
        base = random.normal(size=size)
        moves: Vector = 0.3 * random.normal(size=(len(problem.models) - 1, size))
        return np.vstack([base, base + moves])

    @cached_property
    def _ranges(self) -> dict[str, slice]:
        edges = np.cumsum([0, *(int(np.prod(tensor.shape)) for tensor in self.problem.layout.flat)])
        return {
            tensor.name: slice(int(low), int(high))
            for tensor, low, high in zip(self.problem.layout.flat, edges[:-1], edges[1:], strict=True)
        }

    @cached_property
    def targets(self) -> Vector:
        """The best weights for each objective, shape (objectives, parameters)."""
        base, *experts = self.models.values()
        count = len(self.problem.objectives)
        return np.array([base + 0.7 * (experts[k % len(experts)] - base) for k in range(count)])

    @cached_property
    def _probes(self) -> Vector:
        return np.random.Generator(np.random.PCG64(11)).normal(size=(ITEMS, self.targets.shape[1]))

    # --- weights ----------------------------------------------------------------------------------------------------

    def weights(self, recipe: Recipe) -> Vector:
        """The flat weights of a recipe; where its layers are another number, those that lack are zero."""
        if recipe.layers is None:
            return self._merge(recipe.root)
        out: Vector = np.zeros(self.targets.shape[1])
        root = self._merge(recipe.root)
        for tensor in self.problem.layout.shared:
            if not isinstance(tensor.position, int):
                out[self._ranges[tensor.name]] = root[self._ranges[tensor.name]]
        for depth, planned in enumerate(recipe.layers[: self.layers]):
            self._place(out, depth, planned, recipe)
        return out

    def _place(self, out: Vector, depth: int, planned: PlannedLayer, recipe: Recipe) -> None:
        values = planned.scale * self._merge(planned.node or recipe.root)
        for tensor in self.problem.layout.shared:
            if tensor.position == planned.layer:
                there = tensor.name.replace(f".{planned.layer}.", f".{depth}.", 1)
                out[self._ranges[there]] = values[self._ranges[tensor.name]]

    def _merge(self, node: Leaf | Merge) -> Vector:
        if isinstance(node, Leaf):
            return self.models[node.model] if node.layer is None else self._moved(node)
        base, inputs = self._merge(node.base), np.array([self._merge(child) for child in node.inputs])
        out = base.copy()
        for where, row in self._rows(node):
            c = np.array(row)
            if len(c) != len(inputs):
                out[where] += c[0] * (inputs[-1] - inputs[0] if len(inputs) == 2 else inputs.mean(0) - base)[where]
                out[where] += (inputs[0] - base)[where] if len(inputs) == 2 else 0.0
            elif node.operator == "linear":
                total = c.sum() if node.options.get("normalise", True) and c.sum() else 1.0
                out[where] = (c / total) @ inputs[:, where]
            else:
                out[where] += c @ (inputs - base)[:, where]
        return out

    def _moved(self, leaf: Leaf) -> Vector:
        """A model of which one layer stands at all depths."""
        out = self.models[leaf.model].copy()
        for tensor in self.problem.layout.shared:
            if isinstance(tensor.position, int):
                source = tensor.name.replace(f".{tensor.position}.", f".{leaf.layer}.", 1)
                out[self._ranges[tensor.name]] = self.models[leaf.model][self._ranges[source]]
        return out

    def _rows(self, node: Merge) -> list[tuple[Any, list[float]]]:
        if node.breaks is not None:
            edges = [0, *node.breaks, self.targets.shape[1]]
            return [(slice(edges[k], edges[k + 1]), row) for k, row in enumerate(node.coefficients)]
        found = [(tensor, node.row(tensor)) for tensor in self.problem.layout.shared]
        return [(self._ranges[tensor.name], node.coefficients[row]) for tensor, row in found if row is not None]

    # --- scores -----------------------------------------------------------------------------------------------------

    def losses(self, recipe: Recipe) -> Vector:
        """Half the mean squared distance to each target, shape (objectives,)."""
        return np.asarray(0.5 * ((self.weights(recipe) - self.targets) ** 2).mean(axis=1))

    def items(self, recipe: Recipe) -> dict[str, ItemScores]:
        """Per-item losses of each objective: squared projections of the distance to the target."""
        away = (self.weights(recipe) - self.targets) @ self._probes.T
        return {
            objective.name: ItemScores((-(row**2) if objective.direction == "maximise" else row**2).astype(np.float32))
            for objective, row in zip(self.problem.objectives, away, strict=True)
        }

    def slopes(self, recipe: Recipe) -> Vector:
        """See `optimizer.algorithms.Outcome.slopes`."""
        here, base = self.weights(recipe), self.models["base"]
        groups = make_groups(self.spec.merge.granularity, self.problem.layout, self.spec.merge.frozen)
        away = np.array([*(model - base for model in self.models.values()), here - base])
        out = np.zeros((2, len(self.targets), len(groups), len(away)))
        for k, target in enumerate(self.targets):
            gradient = (here - target) / len(here)
            for tensor in self.problem.layout.shared:
                group = next(number for number, found in enumerate(groups) if found.matches(tensor))
                where = self._ranges[tensor.name]
                out[0, k, group] += away[:, where] @ gradient[where]
                out[1, k, group] += self._cosines(gradient, here, where)
        return out

    def _cosines(self, gradient: Vector, here: Vector, where: slice) -> Vector:
        weights = np.array([model[where] for model in (*self.models.values(), here)])
        norms = np.linalg.norm(weights, axis=1) * np.linalg.norm(gradient[where])
        return np.asarray((weights @ gradient[where]) / np.where(norms > 0, norms, 1.0))

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """The outcome of a candidate, per-item scores and slopes included; now and then it fails."""
        recipe = Recipe.parse(dict(candidate.recipe))
        if int(candidate.fingerprint[:4], 16) % 17 == 0:
            return Evaluation(candidate.index, None, failure=Failure("infeasible", "NaN loss"))
        items = {
            name: replace(scores, values=scores.values[: candidate.items])
            for name, scores in self.items(recipe).items()
        }
        values = tuple(
            float(-loss if objective.direction == "maximise" else loss)
            for objective, loss in zip(self.problem.objectives, self.losses(recipe), strict=True)
        )
        return Evaluation(
            candidate.index, values, items=items, slopes=self.slopes(recipe) if candidate.slopes else None
        )
