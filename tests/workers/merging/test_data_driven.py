"""Operators that measure models: against fusion_bench and the authors' code, and what each keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from tests.workers.merging.running import merge
from workers.merging.operator import OPERATORS, Numbers

DATA = Path(__file__).parent / "reference" / "data" / "data_driven.safetensors"
PARAMETERS = ("layer.weight", "layer.bias", "norm.weight")
Measured = Mapping[tuple[int, str], Numbers]


@cache
def reference() -> dict[str, Tensor]:
    return load_file(DATA)


def thetas(method: str, parameter: str) -> list[Tensor]:
    """Three models behind a base, which none of these operators looks at."""
    found = [reference()[f"{method}/theta/{number}/{parameter}"] for number in range(3)]
    return [torch.full_like(found[0], torch.nan), *found]


def information(parameter: str, question: str = "fisher") -> Measured:
    known = reference()
    return {
        (number, question): {
            "fisher": known[f"fisher/F/{number}/{parameter}"],
            "norm": known[f"fisher/norm/{number}"],
        }
        for number in range(3)
    }


def grams(axis: int = 1) -> Measured:
    return {
        (number, "gram"): {"gram": reference()[f"regmean/G/{number}"], "axis": torch.tensor(float(axis))}
        for number in range(3)
    }


NO_GRAMS: Measured = {(number, "gram"): {} for number in range(3)}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize(
    ("case", "row", "options"),
    [
        ("equal", [1 / 3] * 3, {}),
        ("plain", [1 / 3] * 3, {"normalise": False}),
        ("weights", [0.5, 0.2, 0.9], {"floor": 1e-3}),
    ],
)
def test_fisher_is_fusion_benchs(parameter: str, case: str, row: list[float], options: dict[str, float]) -> None:
    found = merge(
        OPERATORS["fisher"],
        thetas("fisher", parameter),
        row,
        options=options,
        measurements=information(parameter),
    )
    close(found, reference()[f"fisher/{case}/{parameter}"])


@pytest.mark.parametrize("labels", ["data", "sampled", "expected"])
def test_fisher_asks_for_the_labels_that_its_option_names(labels: str) -> None:
    question = {"data": "fisher", "sampled": "fisher_sampled", "expected": "fisher_expected"}[labels]
    found = merge(
        OPERATORS["fisher"],
        thetas("fisher", "layer.bias"),
        [1 / 3] * 3,
        options={"labels": labels},
        measurements=information("layer.bias", question),
    )
    close(found, reference()["fisher/equal/layer.bias"])


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("factor", [1.0, 0.95, 0.1])
def test_regmean_is_fusion_benchs(parameter: str, factor: float) -> None:
    found = merge(
        OPERATORS["regmean"],
        thetas("regmean", parameter),
        [1.0, 1.0, 1.0],
        options={"off_diagonal": factor},
        measurements=grams() if parameter == "layer.weight" else NO_GRAMS,
    )
    close(found, reference()[f"regmean/{factor}/{parameter}"])


def test_regmean_of_transposed_weights_is_fusion_benchs() -> None:
    turned = [tensor.T.contiguous() for tensor in thetas("regmean", "layer.weight")]
    found = merge(OPERATORS["regmean"], turned, [1.0, 1.0, 1.0], measurements=grams(axis=0))
    close(found, reference()["regmean/transposed/layer.weight"])


@pytest.mark.parametrize("factor", [0.95, 0.1])
def test_a_whole_step_of_regmean_plusplus_is_regmean(factor: float) -> None:
    models = thetas("regmean", "layer.weight")
    models[0] = models[1] * 0.5
    found = merge(OPERATORS["regmean_plusplus"], models, [1.0], options={"off_diagonal": factor}, measurements=grams())
    expected = reference()[f"regmean/{factor}/layer.weight"]
    close(found, expected)
    half = merge(OPERATORS["regmean_plusplus"], models, [0.5], options={"off_diagonal": factor}, measurements=grams())
    close(half, (models[0] + expected) / 2)


@pytest.mark.parametrize("layer", ["layer", "norm"])
@pytest.mark.parametrize("omega", [0.2, 0.4])
def test_aim_is_the_authors(layer: str, omega: float) -> None:
    known = reference()
    base, merged, activation = known[f"aim/base/{layer}"], known[f"aim/merged/{layer}"], known[f"aim/a/{layer}"]
    answer = {"activation": activation, "axis": torch.tensor(float(base.dim() - 1))}
    found = merge(
        OPERATORS["aim"], [base, merged], [1.0], options={"omega": omega}, measurements={(-1, "activation"): answer}
    )
    close(found, known[f"aim/{omega}/{layer}"])


def test_aim_follows_the_inputs_of_transposed_weights() -> None:
    known = reference()
    answer = {"activation": known["aim/a/layer"], "axis": torch.tensor(0.0)}
    turned = [known[f"aim/{what}/layer"].T.contiguous() for what in ("base", "merged")]
    found = merge(OPERATORS["aim"], turned, [1.0], measurements={(-1, "activation"): answer})
    close(found.T, known["aim/0.4/layer"])


@pytest.mark.parametrize("answer", [{}, {"activation": torch.zeros(5), "axis": torch.tensor(1.0)}])
def test_aim_leaves_changes_whose_inputs_it_does_not_know_or_that_are_never_active(answer: Numbers) -> None:
    base, merged = reference()["aim/base/layer"], reference()["aim/merged/layer"]
    found = merge(OPERATORS["aim"], [base, merged], [1.0], measurements={(-1, "activation"): answer})
    close(found, merged)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [0.5, -0.1, 0.5]], ids=str)
def test_weights_of_an_average_are_not_negative_and_not_all_zero(name: str, row: list[float]) -> None:
    with pytest.raises(InfeasibleCandidate, match="weights"):
        merge(OPERATORS[name], thetas("regmean", "layer.weight"), row)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_a_single_expert_is_itself_bit_for_bit_without_any_measurement(name: str) -> None:
    models = [tensor.bfloat16() for tensor in thetas("regmean", "layer.weight")]
    never: Measured = {(number, question): {} for number in range(3) for question in ("fisher", "gram")}
    assert torch.equal(merge(OPERATORS[name], models, [0.0, 0.3, 0.0], measurements=never), models[2])


def test_regmean_leaves_what_no_input_determines_at_the_mean() -> None:
    """Two inputs that are always 0, and fewer tokens than inputs: the Gram matrices have no inverse."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    for tensor in rows:
        tensor[:, 4:] = 0.0
    models = [torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    measured = {(n, "gram"): {"gram": x.T @ x / 2, "axis": torch.tensor(1.0)} for n, x in enumerate(rows)}
    found = merge(OPERATORS["regmean"], models, [1.0, 1.0], options={"off_diagonal": 1.0}, measurements=measured)
    close(found[:, 4:], (models[1] + models[2])[:, 4:] / 2)
    for model, tensor in zip(models[1:], rows, strict=True):  # four tokens fit into four inputs: both are met exactly
        close(tensor @ found.T, tensor @ model.T)


def outputs_error(weights: Tensor, models: Sequence[Tensor], inputs: Sequence[Tensor]) -> float:
    return sum(float((x @ weights.T - x @ model.T).square().mean()) for model, x in zip(models, inputs, strict=True))


def test_regmean_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(50, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    models = [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    measured = {(n, "gram"): {"gram": x.T @ x / 50, "axis": torch.tensor(1.0)} for n, x in enumerate(inputs)}
    found = merge(
        OPERATORS["regmean"],
        [models[0], *models],
        [1.0, 1.0, 1.0],
        options={"off_diagonal": 1.0},
        measurements=measured,
    )
    best = outputs_error(found, models, inputs)
    for _ in range(20):
        step = torch.randn(found.shape, generator=generator, dtype=torch.float64) * 1e-3
        assert outputs_error(found + step, models, inputs) > best
