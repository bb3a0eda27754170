"""The fused kernels: compiled and portable code agree to the bit, whatever is cut, split or converted how."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.marks import quick_or_slow
from workers.merging import kernels
from workers.merging.kernels import fused_sum, merge_sparse, portable, threads
from workers.merging.kernels.terms import Chance, Combine, Limits, RankedChance, Term, Vote

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZE = 3001
WEIGHTS = [0.3, -0.2, 0.5, 1.0, 0.25, 0.7]
RULES = ["limits", "chance", "ranked", "inverse"]
FORMS: list[tuple[Vote | None, Combine]] = [
    (None, "sum"),
    ("sum", "sum"),
    ("sum", "mean"),
    ("sum", "max"),
    ("count", "mean"),
]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile for small tensors as well."""
    monkeypatch.setattr(kernels, "WORTH", 0)
    yield


def models(count: int, dtype: torch.dtype = torch.float32, size: int = SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def terms(rule: str, tensors: Sequence[Tensor], begin: int = 0) -> list[Term]:
    """What is kept of the tensors, which are a stretch from ``begin`` on of what `models` returns."""
    ranks = torch.arange(SIZE, dtype=torch.int32).mul(40503).to(torch.int16)[begin : begin + len(tensors[0])]
    out = []
    for number, (tensor, weight) in enumerate(zip(tensors, WEIGHTS, strict=False)):
        seed = 0xFEDC_BA98_7654_3210 + number
        select: Limits | Chance | RankedChance
        if rule == "limits":
            select = Limits(0.2 * number, 2.0)
        elif rule == "chance":
            select = Chance(seed, 0.3)
        else:
            select = RankedChance(seed, 0.2, 0.6 / 65535, ranks, inverse=rule == "inverse")
        out.append(Term(tensor, weight, select, 1.0 + 0.5 * number))
    return out


def both(tensors: Sequence[Tensor], chosen: list[Term], form: tuple[Vote | None, Combine], target: torch.dtype,
         begin: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result of the compiled kernel, and of the portable one."""
    found, wanted = (torch.full((len(tensors[0]),), torch.nan, dtype=target) for _ in range(2))
    merge_sparse(found, tensors[0], chosen, vote=form[0], combine=form[1], scale=0.7, begin=begin)
    portable.merge_sparse(wanted, tensors, chosen, form[0], form[1], 0.7, begin)
    return found, wanted


@pytest.mark.parametrize(("source", "target"), [(dtype, dtype) for dtype in TYPES] + [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
    pytest.param(torch.float16, torch.float64, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_sums_agree(source: torch.dtype, target: torch.dtype, count: int) -> None:
    tensors = models(count, source)
    found, wanted = torch.empty(SIZE, dtype=target), torch.empty(SIZE, dtype=target)
    fused_sum(found, tensors, WEIGHTS[:count])
    portable.fused_sum(wanted, tensors, WEIGHTS[:count])
    assert torch.equal(found, wanted)
    exact = sum(weight * tensor.double() for weight, tensor in zip(WEIGHTS, tensors, strict=False))
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("rule", "form"), [*(("limits", form) for form in FORMS), *((rule, FORMS[2]) for rule in RULES[1:])]
)
def test_sparse_merges_agree(rule: str, form: tuple[Vote | None, Combine]) -> None:
    tensors = models(4)
    for count in (1, 2, 3):
        found, wanted = both(tensors[: count + 1], terms(rule, tensors[1 : count + 1]), form, torch.float32)
        assert torch.equal(found, wanted) and bool((found != tensors[0]).any())


# Each type costs a kernel that takes seconds to compile. How each is read and written shows in the sums as well.
@pytest.mark.parametrize("dtype", quick_or_slow(TYPES, "torch.float32", "torch.bfloat16"), ids=str)
def test_sparse_merges_agree_in_every_type(dtype: torch.dtype) -> None:
    tensors = models(6, dtype)
    found, wanted = both(tensors, terms("inverse", tensors[1:]), ("sum", "mean"), dtype)
    assert torch.equal(found, wanted)


def reference(tensors: Sequence[Tensor], chosen: Sequence[Term], vote: Vote, combine: Combine) -> Tensor:
    """By definition, entry by entry, in float64."""
    base = tensors[0].double().numpy()
    out = base.copy()
    for place in range(len(base)):
        rows = []
        for term in chosen:
            delta = term.tensor.double().numpy()[place] - base[place]
            assert isinstance(term.select, Limits)
            kept = term.select.low <= abs(delta) <= term.select.high
            rows.append((term.weight * term.factor * delta * kept, abs(term.weight)))
        ballot = sum(entry if vote == "sum" else np.sign(entry) for entry, _ in rows)
        agree = [(entry, weight) for entry, weight in rows if (entry > 0 if ballot >= 0 else entry < 0)]
        if combine == "max":
            value = max((entry for entry, _ in agree), key=abs, default=0.0)
        else:
            value = sum(entry for entry, _ in agree)
            value /= (sum(weight for _, weight in agree) or 1.0) if combine == "mean" else 1.0
        out[place] = base[place] + 0.7 * value
    return torch.from_numpy(out)


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), pytest.param(torch.float64, 1e-12, marks=pytest.mark.slow)], ids=str
)
def test_votes_by_definition(form: tuple[Vote, Combine], dtype: torch.dtype, close: float) -> None:
    """Compiled code in float32, for which other tests compile as well; see below for its twin in float64."""
    tensors = models(5, dtype, 400)
    chosen = terms("limits", tensors[1:])
    found, _ = both(tensors, chosen, form, dtype)
    torch.testing.assert_close(found.double(), reference(tensors, chosen, *form), rtol=close, atol=close)


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_votes_of_portable_code_by_definition(form: tuple[Vote, Combine]) -> None:
    tensors = models(5, torch.float64, 400)
    chosen = terms("limits", tensors[1:])
    out = torch.full((400,), torch.nan, dtype=torch.float64)
    portable.merge_sparse(out, tensors, chosen, form[0], form[1], 0.7, 0)
    torch.testing.assert_close(out, reference(tensors, chosen, *form), rtol=1e-12, atol=1e-12)


@given(cuts=st.lists(st.integers(1, SIZE - 1), max_size=4, unique=True).map(sorted), rule=st.sampled_from(RULES))
@settings(max_examples=40, deadline=None)
def test_stretches_are_parts_of_the_whole(cuts: list[int], rule: str) -> None:
    tensors = models(4)
    whole, _ = both(tensors, terms(rule, tensors[1:]), ("sum", "mean"), torch.float32)
    edges = [0, *cuts, SIZE]
    for begin, end in pairwise(edges):
        part = [tensor[begin:end] for tensor in tensors]
        for found in both(part, terms(rule, part[1:], begin), ("sum", "mean"), torch.float32, begin):
            assert torch.equal(found, whole[begin:end])


def test_neither_threads_nor_cache_lines_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "SMALLEST", 256)
    size = 5 * threads.ALIGNED + 77
    tensors = models(3, torch.bfloat16, size)
    chosen = [Term(tensor, 0.5, Chance(5, 0.4)) for tensor in tensors[1:]]
    room = torch.empty(size + 64, dtype=torch.bfloat16)
    count, results = torch.get_num_threads(), []
    for number, shift in ((1, 0), (2, 0), (4, 0), (3, 1), (1, 31)):
        torch.set_num_threads(number)
        try:
            out = room[shift : shift + size].fill_(torch.nan)
            merge_sparse(out, tensors[0], chosen)
            total = torch.empty(size, dtype=torch.bfloat16)
            fused_sum(total, tensors, WEIGHTS[:3])
            results.append((out.clone(), total))
        finally:
            torch.set_num_threads(count)
    assert not results[0][0].isnan().any()
    assert all(torch.equal(out, results[0][0]) and torch.equal(total, results[0][1]) for out, total in results)


def test_only_the_stretch_is_written() -> None:
    tensors = models(3, torch.float32, 700)
    out = torch.full((1000,), torch.nan)
    fused_sum(out[100:800], tensors, WEIGHTS[:3])
    assert bool(out[:100].isnan().all()) and bool(out[800:].isnan().all()) and not out[100:800].isnan().any()


def test_element_numbers_beyond_32_bits() -> None:
    """A tensor may have more than 2³² elements: the lots go on, and do not begin anew."""
    tensors = models(2)
    begin = 2**32 - 1500
    chosen = [Term(tensors[1], 1.0, Chance(9, 0.5))]
    found, wanted = both(tensors, chosen, (None, "sum"), torch.float32, begin)
    assert torch.equal(found, wanted)
    after, start = (portable.lots(9, number, 1500, torch.device("cpu")) for number in (2**32, 0))
    assert not torch.equal(after, start)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_types_without_code_of_their_own_are_converted(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", 1000)
    tensors = [tensor.to(dtype) for tensor in models(4)]
    for mixed in (tensors, [tensors[0].float(), *tensors[1:]]):
        for rule in ("limits", "inverse"):
            found, wanted = both(mixed, terms(rule, mixed[1:]), ("sum", "mean"), dtype)
            assert torch.equal(found.float(), wanted.float())
    found = torch.empty(SIZE, dtype=dtype)
    fused_sum(found, tensors, WEIGHTS[:4])
    exact = sum(weight * tensor.float() for weight, tensor in zip(WEIGHTS, tensors, strict=False))
    assert isinstance(exact, Tensor)
    assert float((found.float() - exact.to(dtype).float()).abs().max()) <= 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(every.shape, dtype=torch.float32)
    fused_sum(out, [every], [0.75])
    assert torch.equal(out.nan_to_num(nan=7.5), (every.float() * 0.75).nan_to_num(nan=7.5))
    back = torch.empty_like(every)
    fused_sum(back, [out], [1.0])  # values between those of the type, and infinite and undefined ones
    assert torch.equal(back.float().nan_to_num(nan=7.5), out.to(dtype).float().nan_to_num(nan=7.5))
    assert torch.equal(back.isnan(), out.isnan())


class TestLots:
    COUNT = 1 << 18

    def lots(self, seed: int) -> Tensor:
        return portable.lots(seed, 0, self.COUNT, torch.device("cpu"))

    def test_are_known_numbers(self) -> None:
        """The same on every machine and in every release: recipes rely on them."""
        device = torch.device("cpu")
        assert portable.lots(0, 1, 3, device).tolist() == [0x1DAA8609, 0x190E7F0A, 0x080739AA]
        assert portable.lots(0x0123_4567_89AB_CDEF, 2**33 + 5, 2, device).tolist() == [0x66D54FBA, 0xE45D453C]

    @pytest.mark.parametrize("seed", [0, 1, 2**32, 0xFFFF_FFFF_FFFF_FFFF])
    def test_are_uniform(self, seed: int) -> None:
        lots = self.lots(seed)
        for shift in (16, 20, 24):  # each value of these bytes comes equally often
            counts = ((lots >> shift) & 255).bincount(minlength=256).double()
            expected = self.COUNT / 256
            assert 160 < float(((counts - expected) ** 2 / expected).sum()) < 380  # χ² of 255 degrees of freedom

    def test_keep_the_share_asked_for(self) -> None:
        for keep in (0.01, 0.3, 0.5, 0.99):
            share = float((self.lots(77) <= Chance(77, keep).top).double().mean())
            assert share == pytest.approx(keep, abs=5 * (keep * (1 - keep) / self.COUNT) ** 0.5)
        assert bool((self.lots(77) <= Chance(77, 1.0).top).all())

    def test_of_different_seeds_and_neighbours_are_independent(self) -> None:
        mask = self.lots(5) < 2**31
        others = [self.lots(seed) < 2**31 for seed in (6, 4, 5 + 2**32, 5 + 2**31, 5 ^ (2**63))]
        others += [mask.roll(shift) for shift in (1, 2, 16, 256, 4096)]
        for other in others:
            agreement = float((mask == other).double().mean())
            assert agreement == pytest.approx(0.5, abs=5 * 0.5 / self.COUNT**0.5)


def test_small_tensors_wait_for_no_compiler() -> None:
    """Small merges start at once: numba is not even imported."""
    code = (
        "import sys, torch; from workers.merging.kernels import fused_sum; t = torch.ones(100);"
        "fused_sum(t, [torch.ones(100)] * 2, [1.0, 2.0]); assert float(t.sum()) == 300.0; assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
