"""What every registered operator keeps; a new operator runs through this without a change here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.problem import OperatorInfo
from tests.workers.merging.running import merge
from workers.merging import blocks
from workers.merging.operator import OPERATORS, Operator

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EPSILON = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}


def each(operators: list[Operator]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("operator", operators, ids=lambda operator: operator.info.name)


every_operator = each(list(OPERATORS.values()))
unordered = each([entry for entry in OPERATORS.values() if not entry.info.ordered])
idempotent = each([entry for entry in OPERATORS.values() if entry.info.idempotent])
interpolations = each([entry for entry in OPERATORS.values() if entry.info.columns == "interpolation"])
from_the_base = each(
    [entry for entry in OPERATORS.values() if entry.info.columns != "interpolation" and entry.info.uses_base]
)


def models(count: int, shape: Sequence[int] = (7, 5), seed: int = 0) -> list[Tensor]:
    """A base and ``count`` models near it, in float64."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    near = [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * 0.1 for _ in range(count)]
    return [base, *(base + delta for delta in near)]


def number_of_inputs(info: OperatorInfo) -> int:
    return 2 if info.columns == "interpolation" else max(info.min_experts, min(3, info.max_experts or 3))


def coefficients(info: OperatorInfo) -> list[float]:
    if info.columns != "per_expert":
        return [0.3]
    return [0.5, 0.3, 0.4, 0.2][: number_of_inputs(info)]


def run(
    operator: Operator, tensors: Sequence[Tensor], row: Sequence[float], dtype: torch.dtype | None = None
) -> Tensor:
    return merge(operator, tensors, row, dtype=dtype)


@every_operator
def test_describes_itself_completely(operator: Operator) -> None:
    info = operator.info
    assert info.summary.endswith(".") and len(info.reference) > 10
    assert info.low < info.high and 1 <= info.min_experts <= (info.max_experts or math.inf)
    for name, schema in info.options_schema["properties"].items() if operator.options.model_fields else ():
        assert schema.get("description"), f"option {name} needs a description"
        assert "default" in schema, f"option {name} needs a default"
    operator.options()


@every_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (2, 3, 4), (0, 3)], ids=str)
def test_fills_the_output_of_every_type_and_shape_and_leaves_the_inputs(
    operator: Operator, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    exact = models(number_of_inputs(operator.info), shape)
    tensors = [tensor.to(dtype) for tensor in exact]
    before = [tensor.clone() for tensor in tensors]
    out = run(operator, tensors, coefficients(operator.info))
    assert out.dtype == dtype and out.shape == shape and bool(out.isfinite().all())
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


@every_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_once_at_the_end(operator: Operator, dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in models(number_of_inputs(operator.info), (33, 9))]
    row = coefficients(operator.info)
    precise = run(operator, tensors, row, torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(run(operator, tensors, row), precise.to(dtype))


@every_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lower_precision_stays_close_to_float64(operator: Operator, dtype: torch.dtype) -> None:
    exact = [tensor.to(dtype).double() for tensor in models(number_of_inputs(operator.info), (33, 9))]
    row = coefficients(operator.info)
    found = run(operator, [tensor.to(dtype) for tensor in exact], row)
    # An entry at the edge of a selection may fall on either side of it.
    off = (found.double() - run(operator, exact, row)).abs() > EPSILON[dtype] * (1 + exact[0].abs())
    assert float(off.double().mean()) <= 0.02


# Those cost a kernel that takes seconds to compile; their siblings without a vote select in the same way, and
# test_kernels.py cuts votes.
VOTING = ("della", "dare_ties", "breadcrumbs_ties")
# Those iterate: on matrices of a size that torch already works at with several threads.
ITERATING = ("doge", "wudi")


@pytest.mark.parametrize(
    "operator",
    [pytest.param(entry, id=name, marks=[pytest.mark.slow] * (name in VOTING)) for name, entry in OPERATORS.items()],
)
def test_neither_threads_nor_blocks_nor_repetition_change_a_bit(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (129, 257) if operator.info.name in ITERATING else (300, 501)
    tensors = [tensor.float() for tensor in models(number_of_inputs(operator.info), shape)]
    row = coefficients(operator.info)
    first = run(operator, tensors, row)
    threads = torch.get_num_threads()
    for block, count in {(1 << 20, 1), (1 << 20, threads), (1 << 20, 4), (1 << 14, threads), (12288, 3)}:
        monkeypatch.setattr(blocks, "BLOCK", block)
        torch.set_num_threads(count)
        try:
            assert torch.equal(run(operator, tensors, row), first)
        finally:
            torch.set_num_threads(threads)


@idempotent
@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_equal_models_stay_as_they_are(operator: Operator, seed: int) -> None:
    tensor = models(1, seed=seed)[1]
    count = number_of_inputs(operator.info)
    row = {"per_expert": [1 / count] * count, "interpolation": [0.37], "scale": [1.0]}[operator.info.columns]
    out = run(operator, [tensor] * (count + 1), row)
    torch.testing.assert_close(out, tensor, rtol=1e-12, atol=1e-12)


def permuted(operator: Operator, seed: int, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    base, *inputs = models(len(order), seed=seed)
    swapped = [inputs[number] for number in order]
    row = [0.5, 0.3, 0.4][: len(order)] if operator.info.columns == "per_expert" else [0.5]
    turned = [row[number] for number in order] if operator.info.columns == "per_expert" else row
    return run(operator, [base, *inputs], row), run(operator, [base, *swapped], turned)


@unordered
@given(seed=st.integers(0, 10_000), order=st.permutations(range(3)))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_experts_does_not_matter(operator: Operator, seed: int, order: list[int]) -> None:
    if operator.info.columns == "interpolation":
        base, first, second = models(2, seed=seed)
        left, right = run(operator, [base, first, second], [0.3]), run(operator, [base, second, first], [0.7])
    else:
        left, right = permuted(operator, seed, [place for place in order if place < number_of_inputs(operator.info)])
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@interpolations
def test_end_points_of_an_interpolation_are_exact(operator: Operator) -> None:
    tensors = [tensor.float() for tensor in models(2)]
    assert torch.equal(run(operator, tensors, [0.0]), tensors[1])
    assert torch.equal(run(operator, tensors, [1.0]), tensors[2])


@from_the_base
def test_no_coefficient_leaves_the_base(operator: Operator) -> None:
    count = number_of_inputs(operator.info)
    tensors = [tensor.to(torch.bfloat16) for tensor in models(count)]
    row = [0.0] * (count if operator.info.columns == "per_expert" else 1)
    assert torch.equal(run(operator, tensors, row), tensors[0])
