"""The space of the usual merges that need no search: which operator, how strong, and with which weight each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from optimizer.errors import InvalidInput
from optimizer.problem import Problem
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from optimizer.space import Genome, JobSpace, MergeSpace, Variable, make_space
from optimizer.spec import JobSpec, Scalar

METHODS = ("model", "linear", "task_arithmetic", "ties", "dare_linear", "model_stock", "slerp")
"""`model` is the expert with the largest weight, or the base where all weights are 0; the others are operators."""

_STRONGEST = 10.0
_LINEAR = ("linear", "task_arithmetic")


@dataclass(frozen=True)
class BaselineSpace(JobSpace):
    """Genomes are (number of the method, strength, a weight for each expert).

    The strength is λ of `task_arithmetic`, `ties` and `dare_linear`, and the position of `slerp`; `linear` normalises its
    weights. Where the job's own space has the same weights as one of its merges, its recipe is that one's, so that
    warm starts and baselines are not evaluated twice.

    Attributes:
        job: the job's own space.
        densities: of `ties` and `dare_linear`.
    """

    job: JobSpace
    densities: tuple[tuple[str, float], ...]

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the job's order."""
        return tuple(name for name in self.problem.models if name != "base")

    def genome(self, method: str, weights: Sequence[float], strength: float = 1.0) -> Genome:
        """Return the genome of a merge; the weights are those of the experts, in order."""
        return np.array([METHODS.index(method) + 0.5, strength, *weights])

    def recipe(self, genome: Genome) -> Recipe:
        """See `JobSpace.recipe`."""
        if genome.shape != (self.dim,):
            raise InvalidInput(f"the genome has {genome.size} numbers, the job's space has {self.dim}", field="genome")
        method = str(self.variables[0].read(float(genome[0])))
        strength, weights = float(genome[1]), genome[2:]
        if method == "model":
            return self._model(self.experts[int(weights.argmax())] if weights.any() else "base")
        if method == "linear":
            weights = weights / weights.sum() if weights.any() else np.full(len(weights), 1.0 / len(weights))
            return self._weighted("linear", weights)
        if method == "task_arithmetic":
            return self._weighted(method, strength * weights)
        return self._merged(method, strength, weights)

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`: models alone, and the uniform average."""
        return self._known.get(recipe.fingerprint)

    def uniform(self) -> Genome:
        """See `JobSpace.uniform`."""
        return self.genome("linear", [1.0] * len(self.experts))

    @cached_property
    def _known(self) -> dict[str, Genome]:
        alone = np.eye(len(self.experts))
        genomes = [self.genome("model", weights) for weights in [np.zeros(len(self.experts)), *alone]]
        known = {
            Recipe(models=self.problem.models, root=Leaf(model=name)).fingerprint: genome
            for name, genome in zip(("base", *self.experts), genomes, strict=True)
        }
        return known | {self.recipe(genome).fingerprint: genome for genome in [self.uniform(), *genomes]}

    @cached_property
    def _groups(self) -> list[Selector]:
        return list(self.job.groups) if isinstance(self.job, MergeSpace) else [Selector()]

    @property
    def _operator(self) -> str | None:
        """The job's operator where the job's space is a plain table of its coefficients."""
        plain = isinstance(self.job, MergeSpace) and not self.job.modifiers and not self.job.varied
        return self.problem.operator.name if plain else None

    def _model(self, name: str) -> Recipe:
        leaf = Recipe(models=self.problem.models, root=Leaf(model=name))
        factors = self._operator == "lora_factors" and isinstance(self.job, MergeSpace) and not self.job.fixed
        genome = self.job.adopt(leaf) if self._operator in _LINEAR or factors else None
        if genome is not None:
            return self.job.recipe(genome)
        if name == "base" or self._covers_all:
            return leaf
        return self._node("linear", {}, [float(name == expert) for expert in self.experts])

    @cached_property
    def _covers_all(self) -> bool:
        """Whether nothing is frozen."""
        return all(any(group.matches(tensor) for group in self._groups) for tensor in self.problem.layout.shared)

    def _weighted(self, method: str, weights: Genome) -> Recipe:
        if self._operator == "task_arithmetic" or self._operator == method == "linear":
            return self.job.recipe(self.job.point(dict(zip(self.experts, weights.tolist(), strict=True))))
        return self._node(method, {}, weights.tolist())

    def _merged(self, method: str, strength: float, weights: Genome) -> Recipe:
        if method in ("model_stock", "slerp"):
            return self._node(method, {}, [strength])
        return self._node(method, {"density": dict(self.densities)[method], "scale": strength}, weights.tolist())

    def _node(self, operator: str, options: dict[str, Scalar], row: list[float]) -> Recipe:
        root = Merge(
            operator=operator,
            options=options,
            base=Leaf(model="base"),
            inputs=[Leaf(model=name) for name in self.experts],
            groups=self._groups,
            coefficients=[row] * len(self._groups),
        )
        return Recipe(models=self.problem.models, root=root)


def make_baseline_space(spec: JobSpec, problem: Problem, densities: dict[str, float]) -> BaselineSpace:
    """Make the space of a job's baselines; ``densities`` are those of `ties` and `dare_linear`.

    Raises:
        InvalidInput: the job's own space cannot be made.
    """
    names = [name for name in problem.models if name != "base"]
    variables = (
        Variable("method", 0.0, float(len(METHODS)), "choice", METHODS),
        Variable("strength", 0.0, _STRONGEST),
        *(Variable(f"weight of {name}", 0.0, 1.0) for name in names),
    )
    return BaselineSpace(variables, problem, make_space(spec, problem), tuple(sorted(densities.items())))
