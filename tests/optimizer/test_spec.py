"""The job spec: what it refuses, which field it names, and a schema that is complete enough to make a form of."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from optimizer.errors import InvalidInput, InvalidProblems
from optimizer.spec import JobSpec, ModelRef, parse_spec
from tests.factories import make_spec

FULL: dict[str, Any] = {
    "name": "everything said",
    "base": {"hub": "org/base", "revision": "main"},
    "experts": [{"name": "one", "path": "models/one"}, {"name": "two", "hub": "org/two", "revision": "v1.0"}],
    "merge": {
        "operator": "ties",
        "options": {
            "normalise": True,
            "density": {"low": 0.1, "high": 1.0},
            "rounds": {"low": 1, "high": 3, "integer": True},
            "sign": {"choices": ["sum", "majority"]},
        },
        "granularity": {"layers": "groups", "group_size": 2, "modules": [["attention"], ["mlp", "norm"]]},
        "bounds": {"low": -0.2, "high": 1.2},
        "frozen": ["embeddings"],
        "heads": ["classifier.*"],
    },
    "objectives": [
        {
            "name": "task",
            "evaluator": "text_classification",
            "options": {"batch_size": 8},
            "data": {"path": "data/task", "split": "search", "columns": {"text": "word"}, "limit": 10},
            "metric": "loss",
            "direction": "minimise",
            "weight": 2.0,
            "constraint": {"at_most": 1.5},
            "head": "one",
        }
    ],
    "algorithm": {"name": "cma_es", "options": {"sigma0": 0.2}},
    "budget": {"evaluations": 10, "wall_time_s": 60, "patience": 5},
    "seed": 7,
    "workers": {"count": 2, "cpus": 1, "gpus": 0.5, "memory_gb": 2, "device": "cpu", "dtype": "bfloat16"},
    "parallel_evaluations": 4,
    "warm_starts": {
        "base": False,
        "experts": True,
        "uniform": True,
        "candidates": [{"label": "mine", "coefficients": {"one": 0.5, "two": [0.1, 0.2]}}, {"genome": [0.0]}],
    },
}
# Free-form by design: evaluators and algorithms have schemas of their own; coefficients go by the experts' names.
OPEN = {"options", "columns", "coefficients"}


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(FULL)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


def problem(data: Any) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parse_spec(data)
    return caught.value


def objects(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all objects whose keys the spec names."""
    if isinstance(data, dict):
        if not path or path[-1] not in OPEN:
            yield path
        for key, value in data.items():
            yield from objects(value, (*path, key))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from objects(value, (*path, number))


@pytest.mark.parametrize("path", list(objects(FULL)), ids=lambda path: ".".join(map(str, path)) or "top")
def test_unknown_keys_are_refused_everywhere(path: tuple[Any, ...]) -> None:
    error = problem(changed((*path, "surprise"), 1))
    assert isinstance(error, InvalidProblems)
    assert any(field is not None and field.endswith("surprise") for field, _ in error.problems), error.problems


def test_round_trip() -> None:
    spec = parse_spec(FULL)
    assert parse_spec(json.loads(spec.model_dump_json())) == spec
    assert spec.in_flight == 4


def test_as_little_as_possible() -> None:
    needed = {"base", "experts", "objectives", "budget"}
    spec = parse_spec({key: FULL[key] for key in needed})
    assert spec.algorithm.name == "auto"
    assert spec.in_flight == spec.workers.count == 1
    for key in needed:
        error = problem({name: FULL[name] for name in needed - {key}})
        assert error.field == key


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("budget", "evaluations"), 0, "budget.evaluations"),
        (("budget", "evaluations"), 1.5, "budget.evaluations"),
        (("budget", "evaluations"), math.inf, "budget.evaluations"),
        (("budget", "wall_time_s"), 0, "budget.wall_time_s"),
        (("budget", "patience"), 0, "budget.patience"),
        (("merge", "bounds"), {"low": 1.0, "high": 0.0}, "merge.bounds"),
        (("merge", "bounds"), {"low": 1.0, "high": 1.0}, "merge.bounds"),
        (("merge", "bounds", "low"), math.nan, "merge.bounds.low"),
        (("merge", "bounds", "high"), 11, "merge.bounds.high"),
        (("merge", "options", "density"), {"low": 1.0, "high": 0.1}, "merge.options.density"),
        (("merge", "options", "rounds"), {"low": 0.5, "high": 3, "integer": True}, "merge.options.rounds"),
        (("merge", "options", "sign"), {"choices": ["sum"]}, "merge.options.sign"),
        (("merge", "granularity", "layers"), "some", "merge.granularity.layers"),
        (("merge", "granularity", "group_size"), 0, "merge.granularity.group_size"),
        (("merge", "granularity", "modules"), [["mlp"], ["mlp"]], "merge.granularity.modules"),
        (("merge", "granularity", "modules"), [[]], "merge.granularity.modules"),
        (("merge", "frozen"), ["attention", "wings"], "merge.frozen.1"),
        (("base",), {}, "base"),
        (("base",), {"path": "a", "hub": "org/b", "revision": "main"}, "base"),
        (("base",), {"hub": "org/b"}, "base"),
        (("base", "hub"), "no-slash", "base.hub"),
        (("experts",), [], "experts"),
        (("experts", 0, "name"), "../up", "experts.0.name"),
        (("objectives",), [], "objectives"),
        (("objectives", 0, "weight"), 0, "objectives.0.weight"),
        (("objectives", 0, "weight"), math.nan, "objectives.0.weight"),
        (("objectives", 0, "constraint"), {}, "objectives.0.constraint"),
        (("objectives", 0, "direction"), "sideways", "objectives.0.direction"),
        (("objectives", 0, "data", "limit"), 0, "objectives.0.data.limit"),
        (("seed",), -1, "seed"),
        (("seed",), 2**32, "seed"),
        (("workers", "count"), 0, "workers.count"),
        (("workers", "cpus"), 0, "workers.cpus"),
        (("workers", "device"), "abacus", "workers.device"),
        (("parallel_evaluations",), 0, "parallel_evaluations"),
        (("warm_starts", "candidates", 0), {"label": "nothing"}, "warm_starts.candidates.0"),
        (("warm_starts", "candidates", 1, "genome"), [math.nan], "warm_starts.candidates.1.genome.0"),
    ],
)
def test_errors_name_the_field(path: tuple[Any, ...], value: Any, field: str) -> None:
    error = problem(changed(path, value))
    assert error.field is not None
    assert error.field == field or error.field.startswith(f"{field}."), error
    assert error.remedy


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("experts", 1, "name"), "one", "experts: the names must be unique.*one"),
        (("experts", 1, "name"), "base", "'base' is taken"),
        (("objectives",), [FULL["objectives"][0]] * 2, "objectives: the names must be unique"),
        (("objectives", 0, "head"), "three", "objectives.0.head: 'three' is no expert; use one of: one, two"),
        (("merge", "bounds"), {"low": 2, "high": 1}, "swap them"),
    ],
)
def test_errors_across_fields_say_what_to_do(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        parse_spec(changed(path, value))
    assert caught.value.field is not None
    assert caught.value.field.startswith(str(path[0]))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(FULL)), inner, max_size=5),
        max_leaves=8,
    )
)
def test_nonsense_is_refused_with_our_error(data: Any) -> None:
    assert problem(data).message


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_spec(FULL).seed = 8  # type: ignore[misc]


def test_a_bare_string_is_a_path() -> None:
    assert parse_spec(changed(("base",), "models/base")).base == ModelRef(path="models/base")


def schema_objects() -> Iterator[tuple[str, dict[str, Any]]]:
    schema = JobSpec.model_json_schema()
    yield "JobSpec", schema
    yield from schema["$defs"].items()


def test_schema_describes_every_property() -> None:
    definitions = dict(schema_objects())
    for name, part in schema_objects():
        for key, value in part.get("properties", {}).items():
            # Pydantic leaves out a description that says the same as the part it refers to.
            known = value.get("description") or definitions[value["$ref"].rpartition("/")[2]].get("description")
            assert known, f"{name}.{key} has no description"
        if part.get("type") == "object":
            assert part["additionalProperties"] is False, name
            assert part.get("description"), name


def test_schema_bounds_every_number() -> None:
    """A form cannot help with a number that may be anything; only metrics of any scale are free."""
    free = {"Constraint.at_least", "Constraint.at_most", "RangeVariable.low", "RangeVariable.high"}
    for name, part in schema_objects():
        for key, value in part.get("properties", {}).items():
            for kind in [value, *value.get("anyOf", [])]:
                if kind.get("type") in ("number", "integer") and f"{name}.{key}" not in free:
                    assert kind.keys() & {"minimum", "exclusiveMinimum"}, f"{name}.{key} has no lower bound"


def test_examples_in_the_schema_are_valid() -> None:
    models = {type(part) for part in parts(parse_spec(FULL))}
    assert len(models) > 10
    for model in models:
        for name, info in model.model_fields.items():
            for example in info.examples or []:
                annotation: Any = Annotated[info.annotation, info]
                assert TypeAdapter[Any](annotation).validate_python(example) is not None, name


def parts(value: Any) -> Iterator[BaseModel]:
    """All models inside a spec, itself included."""
    if isinstance(value, BaseModel):
        yield value
        value = dict(value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from parts(inner)


def test_phases_stand_in_place_of_an_algorithm_and_survive_storage() -> None:
    data = make_spec().model_dump(mode="json", exclude={"algorithm"})
    phases = [{"algorithm": "random", "share": 0.5}, {"algorithm": {"name": "cma_es"}, "keep_experts": 1}]
    spec = parse_spec(data | {"phases": phases})
    assert [phase.algorithm.name for phase in spec.phases] == ["random", "cma_es"]
    assert parse_spec(spec.model_dump(mode="json")) == spec
    with pytest.raises(InvalidInput, match="in place of `algorithm`"):
        parse_spec(data | {"phases": phases, "algorithm": "random"})
    with pytest.raises(InvalidInput, match="more than 1"):
        parse_spec(data | {"phases": [phases[0], phases[0] | {"share": 0.6}]})
