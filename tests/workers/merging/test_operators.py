"""The operators' own formulas, against straightforward numpy in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.spec import ChoiceVariable, RangeVariable, Scalar
from tests.workers.merging import running
from tests.workers.merging.test_conformance import DTYPES, models
from workers.merging.operator import OPERATORS, operator_info, parse_operator_options

Array = NDArray[np.float64]
numbers = st.floats(-2, 2, allow_subnormal=False).map(lambda number: round(number, 3))
tensors = arrays.arrays(np.float64, st.just((3, 6, 4)), elements=st.floats(-3, 3, allow_subnormal=False))
rows = st.lists(numbers, min_size=2, max_size=2)
quick = settings(max_examples=60, deadline=None)


def merge(
    name: str, base: Tensor | Array, inputs: Sequence[Tensor | Array], row: Sequence[float], **options: Scalar
) -> Tensor:
    entry = OPERATORS[name]
    return running.merge(entry, [torch.as_tensor(part) for part in (base, *inputs)], row, options=options)


def close(found: Tensor, wanted: Array) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-9)


@given(tensors, rows)
@quick
def test_task_arithmetic_formula(data: Array, row: list[float]) -> None:
    base, first, second = data
    close(merge("task_arithmetic", *_split(data), row), base + row[0] * (first - base) + row[1] * (second - base))


@given(tensors, rows)
@quick
def test_linear_formula(data: Array, row: list[float]) -> None:
    plain = row[0] * data[1] + row[1] * data[2]
    close(merge("linear", *_split(data), row, normalise=False), plain)
    if abs(sum(row)) > 1e-2:
        close(merge("linear", *_split(data), row), plain / sum(row))


@given(tensors, rows, st.floats(0.1, 5))
@quick
def test_scaling(data: Array, row: list[float], factor: float) -> None:
    """Linear and TIES means ignore a common factor; task arithmetic moves from the base in proportion to it."""
    base = torch.as_tensor(data[0])
    scaled = [number * factor for number in row]
    if abs(sum(row)) > 1e-2:
        close(merge("linear", *_split(data), scaled), merge("linear", *_split(data), row).numpy())
    step = merge("task_arithmetic", *_split(data), row) - base
    close(merge("task_arithmetic", *_split(data), scaled) - base, (step * factor).numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["task_arithmetic", "linear"])
def test_one_expert_alone_is_that_expert_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    base, *inputs = [tensor.to(dtype) for tensor in models(3)]
    for number, expert in enumerate(inputs):
        row = [1.0 if other == number else 0.0 for other in range(3)]
        assert torch.equal(merge(name, base, inputs, row), expert)
    assert torch.equal(merge("linear", base, inputs, [0.0, 0.37, 0.0]), inputs[1])


@pytest.mark.parametrize("row", [[0.0, 0.0], [0.5, -0.5], [1e-9, 0.0]])
def test_an_average_without_weight_is_infeasible(row: list[float]) -> None:
    with pytest.raises(InfeasibleCandidate, match="coefficients sum to"):
        merge("linear", *_split(np.ones((3, 2, 2))), row)


def reference_slerp(first: Array, second: Array, t: float, threshold: float) -> Array:
    norms = np.linalg.norm(first), np.linalg.norm(second)
    cosine = float(np.sum(first / norms[0] * (second / norms[1])))
    if abs(cosine) > threshold:
        return (1 - t) * first + t * second
    angle = np.arccos(cosine)
    out: Array = np.sin((1 - t) * angle) / np.sin(angle) * first + np.sin(t * angle) / np.sin(angle) * second
    return out


@given(tensors, st.floats(0, 1), st.sampled_from([0.9995, 0.5]))
@quick
def test_slerp_formula(data: Array, t: float, threshold: float) -> None:
    base, first, second = data
    norms = np.linalg.norm(first), np.linalg.norm(second)
    if min(norms) < 1e-3 or abs(abs(np.sum(first * second) / np.prod(norms)) - threshold) < 1e-9:
        return
    wanted = reference_slerp(first, second, t, threshold)
    found = merge("slerp", base, [first, second], [t], lerp_threshold=threshold)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_slerp_keeps_the_norm_of_equally_long_tensors() -> None:
    first, second = torch.zeros(50, 100), torch.zeros(50, 100)
    first[0, 0], second[7, 9] = 3.0, 3.0
    for t in (0.1, 0.5, 0.9):
        assert float(merge("slerp", first, [first, second], [t]).norm()) == pytest.approx(3.0, rel=1e-6)


def test_slerp_without_a_direction_is_linear() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    assert torch.equal(merge("slerp", zero, [zero, one], [0.25]), one * 0.25)
    torch.testing.assert_close(merge("slerp", one, [one, -one], [0.25]), one * 0.5)


def reference_ties(
    base: Array, inputs: Sequence[Array], row: Sequence[float], density: float, scale: float, mean: bool
) -> Array:
    """As mergekit computes it, entry by entry, but for ties at the smallest kept magnitude, which are all kept."""
    trimmed = []
    for tensor in inputs:
        delta = tensor - base
        kept = max(1, int(density * delta.size))
        limit = np.sort(np.abs(delta).ravel())[::-1][kept - 1]
        trimmed.append(np.where(np.abs(delta) >= limit, delta, 0.0))
    merged = np.zeros_like(base)
    for place in np.ndindex(base.shape):
        entries = [number * delta[place] for number, delta in zip(row, trimmed, strict=True)]
        positive = sum(entry for entry in entries if entry > 0) + sum(entry for entry in entries if entry < 0) >= 0
        agree = [(entry > 0) if positive else (entry < 0) for entry in entries]
        total = sum(entry for entry, yes in zip(entries, agree, strict=True) if yes)
        weight = sum(abs(number) for number, yes in zip(row, agree, strict=True) if yes)
        merged[place] = total / (weight or 1.0) if mean else total
    return base + scale * merged


@given(
    tensors,
    rows,
    st.sampled_from([0.05, 0.2, 0.5, 0.99, 1.0]),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from(["mean", "sum"]),
)
@quick
def test_ties_formula(data: Array, row: list[float], density: float, scale: float, normalise: str) -> None:
    base, first, second = data
    found = merge("ties", base, [first, second], row, density=density, scale=scale, normalise=normalise)
    close(found, reference_ties(base, [first, second], row, density, scale, normalise == "mean"))


def test_ties_by_hand() -> None:
    base = torch.zeros(4)
    first = torch.tensor([4.0, -1.0, 0.5, 3.0])
    second = torch.tensor([-2.0, -3.0, 0.1, 1.0])
    # Half of each is kept: (4, 0, 0, 3) and (-2, -3, 0, 0).
    out = merge("ties", base, [first, second], [1.0, 1.0], density=0.5)
    assert out.tolist() == [4.0, -3.0, 0.0, 3.0]
    out = merge("ties", base, [first, second], [1.0, 3.0], density=0.5)
    assert out.tolist() == [-2.0, -3.0, 0.0, 3.0]
    out = merge("ties", base, [first, second], [0.5, 0.5], density=1.0, normalise="sum", scale=2.0)
    assert out.tolist() == [4.0, -4.0, pytest.approx(0.6), 4.0]


def test_ties_with_everything_kept_and_one_expert_is_task_arithmetic() -> None:
    base, expert = models(1)
    found = merge("ties", base, [expert], [0.7], density=1.0, normalise="sum")
    torch.testing.assert_close(found, merge("task_arithmetic", base, [expert], [0.7]), rtol=1e-12, atol=1e-12)


def test_ties_keeps_at_least_one_entry_of_every_tensor() -> None:
    out = merge("ties", torch.zeros(3), [torch.tensor([1.0, 5.0, 2.0])], [1.0], density=0.01)
    assert out.tolist() == [0.0, 5.0, 0.0]


def test_ties_notices_changed_tensors_and_options() -> None:
    """What it remembers between candidates must never be out of date."""
    generator = torch.Generator().manual_seed(0)
    base, expert = torch.zeros(100), torch.randn(100, generator=generator)

    def kept(density: float) -> int:
        return int((merge("ties", base, [expert], [1.0], density=density) != base).sum())

    assert [kept(0.2), kept(0.2), kept(0.5), kept(0.2)] == [20, 20, 50, 20]
    expert.mul_(torch.arange(100) < 10)
    assert kept(0.2) == 10 and kept(0.05) == 5
    base += torch.linspace(1.0, 10.0, 100)
    assert kept(0.05) == 5
    other = torch.randn(100, generator=generator)
    assert int((merge("ties", other, [expert], [1.0], density=0.3) != other).sum()) == 30


class TestOptions:
    def test_defaults_fixed_values_and_variables(self) -> None:
        options = parse_operator_options(
            "ties",
            {
                "density": RangeVariable(low=0.1, high=1.0),
                "normalise": ChoiceVariable(choices=["mean", "sum"]),
                "scale": 0.3,
            },
        )
        assert options.model_dump() == {
            "density": 0.1, "scale": 0.3, "normalise": "mean", "consensus": "sum", "scope": "tensor", "rescale": "none"
        }  # fmt: skip
        assert parse_operator_options("task_arithmetic", {}).model_dump() == {}

    @pytest.mark.parametrize(
        ("name", "options", "field"),
        [
            ("ties", {"density": 0.0}, "merge.options.density"),
            ("ties", {"density": 1.5}, "merge.options.density"),
            ("ties", {"density": RangeVariable(low=0.0, high=0.5)}, "merge.options.density"),
            ("ties", {"density": RangeVariable(low=0.5, high=1.01)}, "merge.options.density"),
            ("ties", {"density": ChoiceVariable(choices=[0.1, 2.0])}, "merge.options.density"),
            ("ties", {"density": "much"}, "merge.options.density"),
            ("ties", {"normalise": "median"}, "merge.options.normalise"),
            ("ties", {"normalise": ChoiceVariable(choices=["mean", "median"])}, "merge.options.normalise"),
            ("ties", {"normalise": RangeVariable(low=0, high=1)}, "merge.options.normalise"),
            ("ties", {"k": 3}, "merge.options.k"),
            ("ties", {"k": RangeVariable(low=0, high=1)}, "merge.options.k"),
            ("task_arithmetic", {"density": 0.5}, "merge.options.density"),
            ("linear", {"normalise": 0.5}, "merge.options.normalise"),
            ("nothing", {}, "merge.operator"),
        ],
    )
    def test_bad_options_name_their_field(
        self, name: str, options: dict[str, Scalar | RangeVariable | ChoiceVariable], field: str
    ) -> None:
        with pytest.raises(InvalidInput) as caught:
            parse_operator_options(name, options)
        assert caught.value.field == field

    def test_info(self) -> None:
        info = operator_info("slerp")
        assert (info.columns, info.uses_base, info.max_experts) == ("interpolation", False, 2)
        assert operator_info("ties").options_schema["properties"]["density"]["exclusiveMinimum"] == 0
        with pytest.raises(InvalidInput, match=r"unknown operator 'x'.*linear, .*slerp, .*task_arithmetic, ties"):
            operator_info("x", "merge.operator")


def _split(data: Array) -> tuple[Array, list[Array]]:
    return data[0], [data[1], data[2]]
