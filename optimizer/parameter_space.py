"""The space of a job without checkpoints: the parameters that the user declared, whose values go to services."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from optimizer.errors import InvalidInput
from optimizer.geometry import make_layout
from optimizer.problem import OperatorInfo, Problem
from optimizer.recipe import Leaf, ModelId, Recipe
from optimizer.space import Genome, JobSpace, Variable, WarmStart, make_variable
from optimizer.spec import JobSpec, ModelRef, RangeVariable, Scalar

MODEL = "base"
"""Name of the model behind the services in recipes."""


def parameter_problem() -> Problem:
    """Return what a job without checkpoints merges: nothing. The model is the same in all such jobs.

    So equal values have equal fingerprints everywhere; what they come to depends on the services that are asked.
    """
    digest = hashlib.sha256(b"a model behind services").hexdigest()
    return Problem(
        models={MODEL: ModelId(ref=ModelRef(path="(behind services)"), digest=digest)},
        layout=make_layout([]),
        operator=OperatorInfo(
            name="parameters",
            summary="Sets the job's parameters; services make of them what they will.",
            reference="mergeopt 2026",
        ),
        objectives=[],
    )


@dataclass(frozen=True)
class ParameterSpace(JobSpace):
    """One variable for each parameter, in the spec's order."""

    def recipe(self, genome: Genome) -> Recipe:
        """See `JobSpace.recipe`."""
        if genome.shape != (self.dim,):
            raise InvalidInput(f"the genome has {genome.size} numbers, the job has {self.dim}", field="genome")
        pairs = zip(self.variables, genome.tolist(), strict=True)
        values = {variable.name: variable.read(number) for variable, number in pairs}
        return Recipe(models=self.problem.models, root=Leaf(model=MODEL, values=values))

    def adopt(self, recipe: Recipe) -> Genome | None:
        """See `JobSpace.adopt`."""
        values = recipe.values
        if set(values) != {variable.name for variable in self.variables}:
            return None
        numbers = [_number(variable, values[variable.name]) for variable in self.variables]
        return None if None in numbers else np.array(numbers, dtype=np.float64)

    def uniform(self) -> Genome:
        """Return the middle of every range and the first of all choices, where searches start."""
        middle = (self.low + self.high) / 2
        choices = np.array([variable.kind == "choice" for variable in self.variables])
        return np.where(choices, 0.5, middle)

    def values(self, given: dict[str, Scalar]) -> Genome:
        """See `JobSpace.values`."""
        known = {variable.name for variable in self.variables}
        for name in [*sorted(set(given) - known), *sorted(known - set(given))]:
            raise InvalidInput(
                f"the job has no parameter {name!r}" if name in given else f"the parameter {name!r} has no value",
                field=f"values.{name}",
                remedy=f"give each of these a value: {', '.join(sorted(known))}",
            )
        numbers = []
        for variable in self.variables:
            number = _number(variable, given[variable.name])
            if number is None:
                wanted = ", ".join(map(str, variable.choices)) if variable.choices else "a number"
                raise InvalidInput(
                    f"{given[variable.name]!r} is no value of it",
                    field=f"values.{variable.name}",
                    remedy=f"give {wanted}",
                )
            numbers.append(number)
        return np.array(numbers)

    def warm_starts(self, spec: JobSpec) -> list[WarmStart]:
        """Return the middle of the space, if the uniform merge is asked for: there are no models to begin with."""
        if not spec.warm_starts.uniform:
            return []
        genome = self.uniform()
        return [WarmStart("middle", genome, self.recipe(genome))]


def make_parameter_space(spec: JobSpec, problem: Problem) -> ParameterSpace:
    """Make the space of a job's parameters; raises `InvalidInput` for variables that there are several of."""
    for name, value in spec.parameters.items():
        if isinstance(value, RangeVariable) and (value.per_group or value.per_expert):
            raise InvalidInput(
                "a job without checkpoints has no coefficient groups and no experts",
                field=f"parameters.{name}",
                remedy="leave out `per_group` and `per_expert`",
            )
    return ParameterSpace(tuple(make_variable(name, value) for name, value in spec.parameters.items()), problem)


def _number(variable: Variable, value: Scalar) -> float | None:
    """What stands in the genome for a value; None if it has none."""
    if variable.kind == "choice":
        # True == 1 in Python, but not in JSON.
        found = [
            number for number, choice in enumerate(variable.choices) if (choice, type(choice)) == (value, type(value))
        ]
        return found[0] + 0.5 if found else None
    if isinstance(value, bool | str):
        return None
    return float(value) if variable.kind == "real" or float(value).is_integer() else None
