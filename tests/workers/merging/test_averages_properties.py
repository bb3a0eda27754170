"""Properties and edge cases of the operators on whole weights and task vectors; their references are in test_averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from optimizer.geometry import TensorInfo
from optimizer.recipe import Leaf, Merge, Recipe
from tests.workers.merging import running
from tests.workers.merging.running import PlainFacts, make_info
from tests.workers.merging.test_conformance import DTYPES, models
from tests.workers.models import make_recipe, model_ids, open_models, tiny_bert, tiny_bert_base
from workers.merging import blocks, competition
from workers.merging.cache import Cache
from workers.merging.competition import entries, limits
from workers.merging.engine import MergeEngine
from workers.merging.operator import OPERATORS, Numbers, Parameter, make_options
from workers.merging.ranks import order_statistics

FORMS: list[tuple[str, int, list[float], dict[str, Any]]] = [
    ("slerp", 2, [0.3], {}),
    ("slerp", 2, [0.3], {"scope": "model"}),
    ("nuslerp", 2, [0.3], {"origin": "base"}),
    ("nuslerp", 2, [0.3], {"angle": "row"}),
    ("nuslerp", 2, [0.3], {"angle": "row", "origin": "base"}),
    ("nuslerp", 2, [0.3], {"angle": "column"}),
    ("nuslerp", 2, [0.3], {"angle": "column", "origin": "base"}),
    ("multislerp", 3, [0.5, 0.3, 0.4], {"origin": "base"}),
    ("multislerp", 3, [0.5, 0.3, 0.4], {"normalise": False}),
    ("karcher", 3, [0.5, 0.3, 0.4], {"max_iter": 30}),
    ("model_stock", 3, [0.9], {"filter_wise": True}),
    ("model_stock", 3, [0.9], {"average": "angle"}),
    ("sce", 3, [0.9], {"select_topk": 0.4, "uniform_below": 0.0}),
    ("arcee_fusion", 1, [0.9], {"sample": 0}),
    ("nearswap", 1, [0.9], {"t": 0.05}),
    ("passthrough", 1, [0.9], {}),
    ("pcb", 3, [0.9], {"inter": "pairs", "density": 0.3}),
    ("pcb", 3, [0.9], {"inter": "normalised", "scope": "tensor"}),
    ("consensus", 3, [0.4], {"agreeing": 1}),
    ("widen", 3, [0.9], {"above_average": 0.5}),
    ("magmax", 3, [0.5], {}),
    ("emr", 3, [0.5], {}),
]
forms = pytest.mark.parametrize(
    ("name", "count", "row", "options"),
    FORMS,
    ids=[f"{name}-{'-'.join(map(str, o.values()))}" for name, _, _, o in FORMS],
)
DIRECTIONAL = [
    ("slerp", "zero"),
    ("nuslerp", "zero"),
    ("nuslerp", "base"),
    ("multislerp", "zero"),
    ("multislerp", "base"),
]
quick = settings(max_examples=20, deadline=None)


def merge(name: str, tensors: Sequence[Tensor], row: Sequence[float], each: Any = None, **options: Any) -> Tensor:
    return running.merge(OPERATORS[name], tensors, row, options=options, each=each)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@forms
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2), (11,), (1,)], ids=str)
def test_a_stretch_is_a_piece_of_the_whole(
    name: str, count: int, row: list[float], options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    operator = OPERATORS[name]
    assert operator.info.elementwise
    base, *experts = models(count, shape)
    whole = (base if operator.info.uses_base else None, tuple(experts))
    info = make_info("layers.0.mlp.weight", whole)
    wanted = merge(name, [base, *experts], row, **options).reshape(-1)
    found = torch.full_like(wanted, math.nan)
    cuts = sorted({0, wanted.numel() // 3, wanted.numel() // 2, wanted.numel()})
    for begin, end in pairwise(cuts):
        operator.merge(
            Parameter(
                info,
                1,
                whole[0].reshape(-1)[begin:end] if whole[0] is not None else None,
                tuple(expert.reshape(-1)[begin:end] for expert in experts),
                tuple(row),
                make_options(operator, options, "options"),
                PlainFacts(info, whole),
                begin=begin,
            ),
            found[begin:end],
        )
    assert torch.equal(found, wanted)


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (2, 3, 4), (0, 3)], ids=str)
def test_every_form_takes_every_shape_and_type(
    name: str, count: int, row: list[float], options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensors = [tensor.to(dtype) for tensor in models(count, shape)]
    found = merge(name, tensors, row, **options)
    assert bool(found.isfinite().all())
    still = merge(name, [tensors[0]] * (count + 1), row if row != [0.9] else [1.0], **options)
    if sum(row) in (0.3, 0.9, 0.5, 0.4) and name != "passthrough":  # equal models: no task vector
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(still, tensors[0], rtol=tolerance, atol=tolerance)


@forms
@given(seed=st.integers(0, 10_000), order=st.permutations(range(3)))
@quick
def test_the_order_of_the_experts_does_not_matter(
    name: str, count: int, row: list[float], options: dict[str, Any], seed: int, order: list[int]
) -> None:
    base, *experts = models(count, seed=seed)
    turned = [number for number in order if number < count]
    if OPERATORS[name].info.columns == "interpolation":
        other = [1.0 - row[0]] if turned == [1, 0] else row
    else:
        other = [row[number] for number in turned] if len(row) == count else row
    swapped = [experts[number] for number in turned]
    close(merge(name, [base, *swapped], other, **options), merge(name, [base, *experts], row, **options))


@forms
def test_blocks_and_pieces_do_not_change_a_bit(
    name: str, count: int, row: list[float], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [tensor.float() for tensor in models(count, (60, 80))]
    first = merge(name, tensors, row, **options)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 12)
    monkeypatch.setattr(competition, "_CHUNK", 700)
    assert torch.equal(merge(name, tensors, row, **options), first)


class CountingFacts(PlainFacts):
    """Computes every answer once."""

    def of_tensor(self, question: str, compute: Any, *, of: Any = None, settings: Any = None) -> Numbers:
        return self._once(
            f"{question} {of} {settings}", lambda: super(CountingFacts, self).of_tensor(question, compute)
        )

    def of_model(self, question: str, compute: Any, *, of: Any = None, settings: Any = None) -> Numbers:
        return self._once(f"{question} {of} {settings}", lambda: super(CountingFacts, self).of_model(question, compute))

    def _once(self, key: str, compute: Any) -> Numbers:
        known: dict[str, Numbers] = self.__dict__.setdefault("known", {})
        if key not in known:
            known[key] = compute()
        return known[key]


@forms
def test_what_does_not_depend_on_coefficients_is_found_out_once(
    name: str, count: int, row: list[float], options: dict[str, Any]
) -> None:
    operator = OPERATORS[name]
    base, *experts = models(count)
    whole = (base if operator.info.uses_base else None, tuple(experts))
    info = make_info("layers.0.mlp.weight", whole)
    facts = CountingFacts(info, whole)
    asked = []
    for factor in (1.0, 0.7, 0.4):
        out = torch.empty_like(base)
        given_row = tuple(factor * number for number in row)
        options_of = make_options(operator, options, "options")
        operator.merge(Parameter(info, 1, *whole, given_row, options_of, facts), out)
        asked.append(len(facts.__dict__.get("known", {})))
        assert torch.equal(out, merge(name, [base, *experts], given_row, **options))
    assert asked[0] == asked[-1] and (asked[0] > 0 or name in ("nearswap", "passthrough"))


class TestOneExpertAlone:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("name", "origin"), [*DIRECTIONAL, ("karcher", "zero")])
    def test_is_that_expert_bit_for_bit(self, name: str, origin: str, dtype: torch.dtype) -> None:
        interpolates = OPERATORS[name].info.columns == "interpolation"
        base, *experts = [tensor.to(dtype) for tensor in models(2 if interpolates else 3)]
        options = {"origin": origin} if "origin" in OPERATORS[name].options.model_fields else {}
        for number, expert in enumerate(experts):
            row = [float(number)] if interpolates else [0.4 * (other == number) for other in range(3)]
            assert torch.equal(merge(name, [base, *experts], row, **options), expert)

    def test_passes_through(self) -> None:
        base, expert = models(1)
        assert torch.equal(merge("passthrough", [base, expert], [1.0]), expert)
        close(merge("passthrough", [base, expert], [-0.5]), -0.5 * expert)

    def test_has_no_limits_where_nothing_competes(self) -> None:
        base, expert = models(1)
        for name in ("magmax", "emr"):
            close(merge(name, [base, expert], [0.7]), base + 0.7 * (expert - base))
        close(merge("widen", [base, expert], [1.0]), expert)
        close(merge("consensus", [base, expert], [0.7], agreeing=1), base + 0.7 * (expert - base))
        assert torch.equal(merge("consensus", [base, expert], [0.7]), base)


class TestSpheres:
    @given(seed=st.integers(0, 10_000), t=st.floats(0.01, 0.99))
    @quick
    def test_arcs_keep_the_norm(self, seed: int, t: float) -> None:
        base, first, second = models(2, seed=seed)
        deltas = [(expert - base) / (expert - base).norm() for expert in (first, second)]
        found = merge("nuslerp", [base, *(base + delta for delta in deltas)], [t], origin="base")
        assert float((found - base).norm()) == pytest.approx(1.0, abs=1e-12)
        rows = [tensor / tensor.norm(dim=1, keepdim=True) for tensor in (first, second)]
        lines = merge("nuslerp", [base, *rows], [t], angle="row")
        torch.testing.assert_close(lines.norm(dim=1), torch.ones(7, dtype=torch.float64), rtol=1e-12, atol=1e-12)

    def test_columns_are_rows_of_the_transposed(self) -> None:
        tensors = models(2)
        turned = [tensor.T.contiguous() for tensor in tensors]
        for origin in ("zero", "base"):
            found = merge("nuslerp", turned, [0.3], angle="column", origin=origin)
            assert torch.equal(found.T, merge("nuslerp", tensors, [0.3], angle="row", origin=origin))

    def test_opposite_and_equal_vectors_are_interpolated_linearly(self) -> None:
        base, expert = models(1)
        for name, row in (("slerp", [0.25]), ("nuslerp", [0.25]), ("multislerp", [0.5, 0.5])):
            share = 1 - row[0]
            close(merge(name, [base, expert, -expert], row), share * expert - (1 - share) * expert)
            close(merge(name, [base, expert, expert], row), expert)

    def test_one_angle_for_the_whole_model(self) -> None:
        """Two parameters that are parallel and opposite by themselves make a right angle together."""
        first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
        model: dict[str, Any] = {"a": (None, (first, first)), "b": (None, (first, -first))}
        found = running.merge(OPERATORS["slerp"], [first, first, first], [0.5], options={"scope": "model"}, model=model)
        close(found, 2 * math.sin(math.pi / 4) * first)
        close(merge("slerp", [first, first, first], [0.5]), first)
        close(merge("slerp", [first, first, second], [0.5]), math.sin(math.pi / 4) * (first + second))

    def test_tensors_without_direction(self) -> None:
        base, expert = models(1)
        nothing = torch.zeros_like(base)
        close(merge("slerp", [base, expert, nothing], [0.3]), 0.7 * expert)
        close(
            merge("slerp", [base, expert, nothing], [0.3], no_direction="right_angle"),
            math.cos(0.15 * math.pi) * expert,
        )
        assert not merge("karcher", [base, nothing, nothing], [0.5, 0.5]).any()
        close(merge("karcher", [base, expert, nothing], [0.5, 0.5]), 0.5 * expert)
        assert not merge("multislerp", [base, nothing, nothing, nothing], [0.5, 0.3, 0.2]).any()

    @given(seed=st.integers(0, 10_000))
    @quick
    def test_karcher_balances_the_pulls_along_the_sphere(self, seed: int) -> None:
        base, *experts = models(3, seed=seed)
        weights = [0.5, 0.3, 0.2]
        found = merge("karcher", [base, *experts], weights, max_iter=200, tol=1e-9)
        centre = found / found.norm()
        pull = torch.zeros_like(centre)
        for weight, expert in zip(weights, experts, strict=True):
            unit = expert / expert.norm()
            cosine = (centre * unit).sum()
            angle = torch.acos(cosine)
            pull += weight * angle / torch.sin(angle) * (unit - cosine * centre)
        assert float(pull.norm()) < 1e-8
        norm = sum(weight * float(expert.norm()) for weight, expert in zip(weights, experts, strict=True))
        assert float(found.norm()) == pytest.approx(norm, rel=1e-12)

    @pytest.mark.parametrize("name", ["multislerp", "karcher"])
    def test_coefficients_without_a_sum_are_infeasible(self, name: str) -> None:
        with pytest.raises(InfeasibleCandidate, match="coefficients sum to"):
            merge(name, models(2), [0.5, -0.5])

    def test_directions_that_cancel_out_are_infeasible(self) -> None:
        base, expert = models(1)
        with pytest.raises(InfeasibleCandidate, match="cancel each other out"):
            merge("multislerp", [base, expert, -0.5 * expert, expert], [0.25, 0.5, 0.25])
        with pytest.raises(InfeasibleCandidate, match="experts that are not zero"):
            merge("karcher", [base, expert, expert, torch.zeros_like(base)], [0.5, -0.5, 1.0])

    def test_a_short_task_vector_beside_a_long_one_keeps_its_digits(self) -> None:
        base, long, other = models(2)
        tensors = [base, long, base + 1e-4 * (other - base)]
        exact = merge("multislerp", [tensor.float().double() for tensor in tensors], [0.5, 0.5], origin="base")
        found = merge("multislerp", [tensor.float() for tensor in tensors], [0.5, 0.5], origin="base")
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


class TestSelections:
    def test_model_stock_between_parallel_orthogonal_and_opposite_changes(self) -> None:
        base = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        step, other = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
        close(merge("model_stock", [base, base + step, base + step], [1.0]), base + step)
        close(merge("model_stock", [base, base + step, base + other], [1.0]), base)
        for average in ("cosine", "angle"):
            assert torch.equal(merge("model_stock", [base, base + step, base - step], [1.0], average=average), base)

    @given(seed=st.integers(0, 10_000))
    @quick
    def test_sce_weighs_by_energy_and_drops_the_minority(self, seed: int) -> None:
        base, *experts = models(3, seed=seed)
        deltas = torch.stack(experts) - base
        weights = deltas.square().mean(dim=(1, 2)).view(3, 1, 1)
        agree = torch.where(deltas.sum(dim=0) >= 0, deltas > 0, deltas < 0) * weights
        close(merge("sce", [base, *experts], [0.6]) - base, 0.6 * (deltas * agree).sum(0) / agree.sum(0))

    def test_sce_with_short_task_vectors(self) -> None:
        base, first, second = models(2, (40,))
        tensors = [base, base + 1e-5 * first, base + 2e-5 * second]
        short = [tensor - base for tensor in tensors[1:]]
        same = short[0].sign() == short[1].sign()
        plain, weighed = (merge("sce", tensors, [1.0], uniform_below=bound) - base for bound in (1e-6, 0.0))
        torch.testing.assert_close(plain[same], (0.5 * (short[0] + short[1]))[same], rtol=1e-9, atol=0)
        assert bool((weighed[same].abs() > plain[same].abs()).float().mean() > 0.5)

    def test_sce_without_anything_that_varies_is_the_base(self) -> None:
        base, expert = models(1)
        assert torch.equal(merge("sce", [base, expert, expert], [1.0], select_topk=0.5), base)
        assert torch.equal(merge("sce", models(3), [1.0], select_topk=0.0), models(3)[0])

    def test_nearswap_is_a_clamped_step(self) -> None:
        base, expert = models(1)
        close(merge("nearswap", [base, expert], [1.0], t=0.05), base + (expert - base).clamp(-0.05, 0.05))
        near = merge("nearswap", [base, expert], [1.0], t=1.0)
        assert torch.equal(near, expert)

    def test_arcee_fusion_takes_over_the_important_part(self) -> None:
        base, expert = models(1, (60, 40))
        found = merge("arcee_fusion", [base, expert], [1.0])
        taken = found != base
        close(found[taken], expert[taken])
        assert 0.02 < float(taken.double().mean()) < 0.3
        size = (expert - base).abs()
        assert float(size[taken].mean()) > 2 * float(size[~taken].mean())

    def test_arcee_fusion_samples_the_same_each_time(self) -> None:
        base, expert = models(1, (60, 40))
        exact = merge("arcee_fusion", [base, expert], [1.0], sample=0)
        assert torch.equal(merge("arcee_fusion", [base, expert], [1.0], sample=2400), exact)
        few = merge("arcee_fusion", [base, expert], [1.0], sample=300)
        assert torch.equal(merge("arcee_fusion", [base, expert], [1.0], sample=300), few)
        shares = [float((found != base).double().mean()) for found in (exact, few)]
        assert shares[0] != shares[1] and shares[1] == pytest.approx(shares[0], abs=0.06)
        assert torch.equal(merge("arcee_fusion", [base[:1, :1], expert[:1, :1]], [1.0]), expert[:1, :1])

    def test_consensus_between_all_and_nothing(self) -> None:
        base, *experts = models(3)
        total = sum((expert - base for expert in experts), torch.zeros_like(base))
        close(merge("consensus", [base, *experts], [0.3], agreeing=0), base + 0.3 * total)
        assert torch.equal(merge("consensus", [base, *experts], [0.3], agreeing=4), base)
        kept = [
            float((merge("consensus", [base, *experts], [1.0], mask_lambda=bound) != base).double().mean())
            for bound in (0.1, 0.4, 2.0)
        ]
        assert kept[0] > kept[1] > kept[2]
        equal = merge("consensus", [base, *experts], [0.3], each={"mask_lambda": (0.4, 0.4, 0.4)})
        assert torch.equal(equal, merge("consensus", [base, *experts], [0.3], mask_lambda=0.4))

    @given(seed=st.integers(0, 10_000))
    @quick
    def test_largest_entries(self, seed: int) -> None:
        base, *experts = models(3, seed=seed)
        deltas = torch.stack(experts) - base
        largest = deltas.gather(0, deltas.abs().argmax(dim=0, keepdim=True))[0]
        close(merge("magmax", [base, *experts], [0.5]), base + 0.5 * largest)
        sign = deltas.sum(dim=0).sign()
        elected = sign * (deltas * sign).max(dim=0).values
        close(merge("emr", [base, *experts], [0.5]), base + 0.5 * elected)

    def test_of_opposite_entries_of_one_size_the_positive_one_is_largest(self) -> None:
        base, step = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
        for tensors in ([base, step, -step], [base, -step, step]):
            assert merge("magmax", tensors, [1.0]).tolist() == [1.0, 2.0, 0.0]


class TestWiden:
    def run(self, tensors: Sequence[Tensor], kind: Any) -> Tensor:
        operator = OPERATORS["widen"]
        whole = (tensors[0], tuple(tensors[1:]))
        info = TensorInfo("x.weight", tuple(tensors[0].shape), "F64", 0, kind)
        out = torch.empty_like(tensors[0])
        operator.merge(Parameter(info, 1, *whole, (1.0,), operator.options(), PlainFacts(info, whole)), out)
        return out

    def test_rows_of_embeddings_are_treated_as_columns_of_matrices(self) -> None:
        tensors = models(3)
        turned = self.run([tensor.T.contiguous() for tensor in tensors], "mlp")
        close(self.run(tensors, "embeddings"), turned.T)

    def test_a_column_that_changed_more_than_most_counts_fully(self) -> None:
        base = torch.eye(4, dtype=torch.float64)
        first, second = base.clone(), base.clone()
        first[1, 0] = 0.5  # columns 0 of the first and 1 of the second turn and grow, the rest stays
        second[2, 1] = 0.5
        found = self.run([base, first, second], "mlp")
        close(found, first + second - base)

    def test_columns_of_zeros(self) -> None:
        base, first, second = models(2)
        for tensor in (base, first, second):
            tensor[:, 0] = 0.0
        base[:, 1] = 0.0
        found = self.run([base, first, second], "mlp")
        assert bool(found.isfinite().all()) and not found[:, 0].any()
        close(found[:, 1], first[:, 1] + second[:, 1])


class TestPcb:
    def test_keeps_the_share_asked_for_of_each_expert(self) -> None:
        base, expert = models(1, (50, 40))
        for density in (0.05, 0.3, 1.0):
            found = merge("pcb", [base, expert], [1.0], density=density)
            assert int((found != base).sum()) == pytest.approx(density * 2000, abs=1.5)
            kept = (found - base).abs()[found != base]
            close(kept, (expert - base).abs()[found != base].clamp(max=float(kept.max())))

    def test_factors_of_experts_and_the_common_one(self) -> None:
        base, *experts = models(3)
        parts = [
            merge("pcb", [base, *experts], [1.0], each={"factor": tuple(float(n == m) for n in range(3))}) - base
            for m in range(3)
        ]
        found = merge("pcb", [base, *experts], [0.5], each={"factor": (0.8, -1.0, 2.0)})
        close(found, base + 0.5 * (0.8 * parts[0] - parts[1] + 2.0 * parts[2]))
        assert torch.equal(merge("pcb", [base, *experts], [0.5], factor=0.0), base)

    @pytest.mark.parametrize("density", [0.1, 0.5, 0.95])
    @pytest.mark.parametrize("form", ["sum", "normalised", "pairs"])
    def test_ranks_the_whole_model(self, form: Any, density: float) -> None:
        """Over several parameters as over their concatenation, and as by sorting."""
        base, *experts = models(3, (90,))
        model = {
            name: (base[part], tuple(expert[part] for expert in experts))
            for name, part in (("a", slice(0, 20)), ("b", slice(20, 21)), ("c", slice(21, 90)))
        }
        whole = (base, tuple(experts))
        together = limits(lambda: [whole], 3, density=density, outliers=0.01, form=form)
        assert torch.equal(limits(model.values, 3, density=density, outliers=0.01, form=form), together)
        for expert, (low, high, least, best) in zip(experts, together.tolist(), strict=True):
            sizes = (expert - base).abs().sort().values.tolist()
            assert (low, high) == (sizes[int(90 * 0.01)], sizes[int(90 * 0.99 - 1)])
            assert least < best
        kept = entries(whole, together, form)
        for number in range(3):
            assert len(kept[f"places_{number}"]) == 90 - int(90 * (1 - density)) - 1

    def test_a_single_weight_has_nothing_to_compete_with(self) -> None:
        tensors = [torch.tensor(1.0), torch.tensor(2.0)]
        assert torch.equal(merge("pcb", tensors, [1.0], scope="tensor"), tensors[0])

    def test_an_expert_that_is_the_base_counts_nothing(self) -> None:
        base, *experts = models(2)
        without = merge("pcb", [base, *experts], [1.0])
        # The number of experts sharpens the scores, so the values differ, but not who is in the average.
        found = merge("pcb", [base, *experts, base], [1.0])
        assert torch.equal(found != base, without != base)


@given(
    numbers=st.lists(st.floats(-3, 3, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0]), min_size=1, max_size=60),
    room=st.sampled_from([0, 3, 1000]),
    step=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@quick
def test_order_statistics_as_by_sorting(numbers: list[float], room: int, step: int, dtype: torch.dtype) -> None:
    first = torch.tensor(numbers, dtype=dtype)
    second = first.square() - 1.0
    every = list(range(len(numbers)))
    pieces = [(first[begin : begin + step], second[begin : begin + step]) for begin in range(0, len(numbers), step)]
    found = order_statistics(lambda: pieces, len(numbers), [every, every[::-1]], room)
    assert found == [first.sort().values.tolist(), second.sort(descending=True).values.tolist()]


class TestEngine:
    @pytest.fixture
    def engine(self, tmp_path: Path) -> MergeEngine:
        tiny_bert_base(tmp_path / "base")
        for seed, name in enumerate(("one", "two"), start=1):
            tiny_bert(tmp_path / name, seed=seed)
        checkpoints, layout = open_models(tmp_path / "base", {name: tmp_path / name for name in ("one", "two")})
        return MergeEngine(checkpoints, layout, cache=Cache(tmp_path / "cache"))

    def applied(self, engine: MergeEngine, recipe: Recipe) -> dict[str, Tensor]:
        out = {tensor.name: torch.empty(tensor.shape) for tensor in engine.layout.shared}
        engine.apply(recipe, out)
        return out

    @pytest.mark.parametrize(("name", "count", "row", "options"), [form for form in FORMS if form[1] > 1])
    def test_ranges_cut_through_tensors(
        self, engine: MergeEngine, name: str, count: int, row: list[float], options: dict[str, Any]
    ) -> None:
        """A table whose ranges all have the same row is the merge without ranges; the split costs no exactness."""
        row = row[:2]
        whole = self.applied(engine, make_recipe(engine.checkpoints, name, row, **options))
        root = Merge(
            operator=name,
            options=options,
            base=Leaf(model="base"),
            inputs=[Leaf(model="one"), Leaf(model="two")],
            breaks=[5, 700, 701, 3000],
            coefficients=[row] * 5,
        )
        found = self.applied(engine, Recipe(models=model_ids(engine.checkpoints), root=root))
        assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())

    def test_one_angle_over_the_checkpoints(self, engine: MergeEngine) -> None:
        found = self.applied(engine, make_recipe(engine.checkpoints, "slerp", [0.3], scope="model", lerp_threshold=1.0))
        one, two = (self.applied(engine, self.alone(engine, name)) for name in ("one", "two"))
        flat = [torch.cat([tensor.reshape(-1).double() for tensor in model.values()]) for model in (one, two)]
        angle = math.acos(float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()))
        for key, tensor in found.items():
            wanted = (
                math.sin(0.7 * angle) / math.sin(angle) * one[key] + math.sin(0.3 * angle) / math.sin(angle) * two[key]
            )
            torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-6)

    def alone(self, engine: MergeEngine, name: str) -> Recipe:
        return Recipe(models=model_ids(engine.checkpoints), root=Leaf(model=name))
