"""The operators on whole weights and task vectors, against mergekit, fusion_bench and the authors' own code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from optimizer.geometry import make_layout
from tests.workers.merging.running import PlainFacts
from workers.merging.operator import OPERATORS, Numbers, Parameter, Whole, make_options

DATA = Path(__file__).parent / "reference" / "data"


def cases(part: str) -> Iterator[Any]:
    with safe_open(DATA / f"averages_{part}.safetensors", framework="pt") as file:
        found = json.loads(file.metadata()["cases"])
    for name, case in found.items():
        yield pytest.param(part, name, case, id=name)


@dataclass
class OnceFacts(PlainFacts):
    """`PlainFacts` that asks what concerns the whole model only once."""

    known: dict[str, Numbers] = field(default_factory=dict)

    def of_model(self, question: str, compute: Any, *, of: Any = None, settings: Any = None) -> Numbers:
        key = f"{question} {of} {settings}"
        if key not in self.known:
            self.known[key] = super().of_model(question, compute, of=of, settings=settings)
        return self.known[key]


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(DATA / "averages_inputs.safetensors")


@pytest.mark.parametrize(("part", "name", "case"), [*cases("mergekit"), *cases("fusion_bench"), *cases("authors")])
def test_agrees_with_the_reference(inputs: dict[str, Tensor], part: str, name: str, case: dict[str, Any]) -> None:
    with safe_open(DATA / f"averages_{part}.safetensors", framework="pt") as file:
        wanted = {which: file.get_tensor(f"{name}/{which}") for which in case["names"]}
    for which, parameters in case["names"].items():
        found = torch.cat([merged.reshape(-1) for merged in _merged(inputs, which, parameters, case)])
        torch.testing.assert_close(found, wanted[which], rtol=1e-10, atol=1e-10)


def _merged(inputs: dict[str, Tensor], which: str, parameters: list[str], case: dict[str, Any]) -> list[Tensor]:
    """Merge the parameters of one set of inputs, which are the whole model."""
    operator = OPERATORS[case["operator"]]
    model: dict[str, Whole] = {}
    for name in parameters:
        experts = tuple(inputs[f"{which}/expert{number}/{name}"] for number in range(case["count"]))
        model[name] = (inputs[f"{which}/base/{name}"] if operator.info.uses_base else None, experts)
    layout = make_layout((name, tuple(experts[0].shape), "F64") for name, (_, experts) in model.items())
    infos = {info.name: info for info in layout.tensors}
    plain = {key: value for key, value in case["options"].items() if not isinstance(value, list)}
    each = {key: tuple(value) for key, value in case["options"].items() if isinstance(value, list)}
    options = make_options(operator, plain, "options")
    known: dict[str, Numbers] = {}
    out = []
    for name in parameters:
        base, experts = model[name]
        facts = OnceFacts(infos[name], model[name], model=model, known=known)
        target = torch.full_like(experts[0], torch.nan)
        row = tuple(case["row"])
        operator.merge(Parameter(infos[name], layout.layers, base, experts, row, options, facts, each), target)
        out.append(target)
    return out
