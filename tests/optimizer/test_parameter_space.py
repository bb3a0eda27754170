"""Jobs without checkpoints: the space of the parameters that a user declared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.parameter_space import make_parameter_space, parameter_problem
from optimizer.problem import Problem, ResolvedObjective
from optimizer.recipe import Recipe
from optimizer.search import Search
from optimizer.space import JobSpace, make_space
from optimizer.spec import CandidateInput, JobSpec, parse_spec

PARAMETERS: dict[str, Any] = {
    "weight": {"low": -1.0, "high": 2.0},
    "tokens": {"low": 1, "high": 9, "integer": True},
    "model": {"choices": ["small", "large", True, 1]},
}


def spec(**changes: Any) -> JobSpec:
    return parse_spec(
        {
            "parameters": PARAMETERS,
            "objectives": [{"name": "score", "evaluator": "http"}],
            "budget": {"evaluations": 12},
            "algorithm": "random",
        }
        | changes
    )


def space() -> JobSpace:
    return make_space(spec(), parameter_problem())


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_genomes_and_values_are_two_forms_of_one_thing(unit: list[float]) -> None:
    found = space()
    genome = found.low + np.array(unit) * (found.high - found.low)
    recipe = found.recipe(genome)
    assert list(recipe.values) == list(PARAMETERS)
    again = Recipe.parse(recipe.to_json())
    assert again.fingerprint == recipe.fingerprint
    adopted = found.adopt(again)
    assert adopted is not None
    assert found.recipe(adopted).fingerprint == recipe.fingerprint
    encoded, same = found.encode(CandidateInput(values=recipe.values))
    assert encoded is not None
    assert same.fingerprint == recipe.fingerprint


def test_choices_that_python_holds_equal_are_told_apart() -> None:
    found = space()
    values: dict[str, Any] = {"weight": 0.0, "tokens": 2}
    prints = {found.recipe(found.values(values | {"model": model})).fingerprint for model in (True, 1)}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"weight": 0.1, "tokens": 2}, "values.model"),
        ({"weight": 0.1, "tokens": 2, "model": "small", "x": 1}, "values.x"),
        ({"weight": 0.1, "tokens": 2.5, "model": "small"}, "values.tokens"),
        ({"weight": "much", "tokens": 2, "model": "small"}, "values.weight"),
        ({"weight": 0.1, "tokens": 2, "model": "medium"}, "values.model"),
        ({"weight": 3.0, "tokens": 2, "model": "small"}, "genome"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        space().encode(CandidateInput(values=values))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"base": "models/base"}, "base"),
        ({"parameters": {}}, "base"),
        ({"parameters": {}, "base": "models/base"}, "experts"),
        ({"endpoint": {"url": "https://models.example.org"}}, "base"),
    ],
)
def test_a_job_has_one_source_of_models(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec(**changes)
    assert caught.value.field == field


def test_variables_per_group_make_no_sense() -> None:
    job = spec(parameters={"weight": {"low": 0, "high": 1, "per_group": True}})
    with pytest.raises(InvalidInput, match="no coefficient groups") as caught:
        make_parameter_space(job, parameter_problem())
    assert caught.value.field == "parameters.weight"


M2N2 = {"name": "m2n2", "options": {"representation": "coefficients"}}


@pytest.mark.parametrize("algorithm", ["random", "cma_es", "nsga2", "bayesian", "nevergrad", "auto", M2N2])
def test_searches_run_over_parameters(algorithm: Any) -> None:
    job = spec(algorithm=algorithm)
    objective = ResolvedObjective(
        name="score", metric="score", direction="maximise", weight=1.0, items=1, data_digest="0" * 64
    )
    problem: Problem = parameter_problem().model_copy(update={"objectives": [objective]})
    search = Search(job, problem)
    first = search.first()
    assert [candidate.label for candidate in first] == ["middle"]
    search.add(first)
    search.add(search.next())
    assert all(Recipe.parse(dict(candidate.recipe)).values for candidate in search.candidates)
