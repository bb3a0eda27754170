"""Operators on LoRA adapters, against PEFT, the authors' code (reference/make_adapters.py), and their own formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from torch import Tensor

from optimizer.errors import InvalidInput
from tests.workers.merging import running
from workers.checkpoints import Factors
from workers.export_adapter import _factors
from workers.merging.low_rank import delta
from workers.merging.operator import OPERATORS, operator_info, parse_operator_options

DATA = Path(__file__).parent / "reference" / "data" / "adapters.safetensors"
ON_FACTORS = ["lora_factors", "lora_lego", "knots", "core_space"]
EQUAL = 0.5
quick = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def known() -> dict[str, Tensor]:
    return load_file(DATA)


def adapters(known: Mapping[str, Tensor], scales: Sequence[float] | None = None) -> list[Factors]:
    own = known["scales"].tolist() if scales is None else scales
    return [Factors(known[f"up.{number}"], known[f"down.{number}"], scale) for number, scale in enumerate(own)]


def turned(factors: Factors) -> Factors:
    """The same adapter on a layer that stores its weight as (in, out)."""
    return Factors(factors.down.T, factors.up.T, factors.scale, not factors.transposed)


def merge(
    name: str,
    base: Tensor,
    found: Sequence[Factors | None],
    row: Sequence[float],
    models: Sequence[Tensor] | None = None,
    each: Mapping[str, tuple[float, ...]] | None = None,
    **options: Any,
) -> Tensor:
    """As the engine does: inputs with factors stand as the base alone."""
    tensors = [base, *(models if models is not None else [base] * len(found))]
    return running.merge(OPERATORS[name], tensors, row, options=options, each=each, low_rank=list(found))


def dense(name: str, base: Tensor, found: Sequence[Factors], row: Sequence[float], **options: Any) -> Tensor:
    """The same on the expanded adapters."""
    models = [base + delta(factors, torch.float64).view(base.shape) for factors in found]
    return running.merge(OPERATORS[name], [base, *models], row, options=options)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def random_adapters(seed: int, ranks: Sequence[int] = (3, 2, 4), shape: Sequence[int] = (9, 7)) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    return [Factors(random(shape[0], rank), random(rank, shape[1]), 0.5 + number) for number, rank in enumerate(ranks)]


def inner(**options: Any) -> str:
    return json.dumps(options)


class TestPeft:
    def test_linear(self, known: dict[str, Tensor]) -> None:
        found = merge("lora_factors", known["base"], adapters(known), [0.5, -0.5, 0.25], weights="root")
        close(found - known["base"], known["peft.linear"])

    def test_cat_and_svd_are_sums_of_the_products(self, known: dict[str, Tensor]) -> None:
        found = dense("task_arithmetic", known["base"], adapters(known), [0.5, -0.5, 0.25]) - known["base"]
        close(found, known["peft.cat"])
        close(found, known["peft.svd"])
        up, down = _factors(found, 2)
        torch.testing.assert_close(up.double() @ down.double(), known["peft.svd_cut"], rtol=1e-5, atol=1e-5)

    def test_ties_of_the_products(self, known: dict[str, Tensor]) -> None:
        """PEFT scales by the coefficients before the mean, and does not elect signs by them."""
        found = dense("ties", known["base"], adapters(known), [EQUAL] * 3, density=0.4, scale=EQUAL)
        close(found - known["base"], known["peft.ties_svd"])


class TestEvoMerging:
    BETAS = (0.8, -0.5, 0.25)
    ALPHAS = (0.5, 1.0, 0.3)

    def test_reference(self, known: dict[str, Tensor]) -> None:
        found = merge(
            "lora_factors", known["base"], adapters(known, [2.0] * 3), self.BETAS, each={"density": self.ALPHAS}
        )
        close(found - known["base"], known["evo"])

    @given(seed=st.integers(0, 1000), density=st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    @quick
    def test_formula_whichever_way_the_weight_is_stored(self, seed: int, density: float) -> None:
        found, row = random_adapters(seed, (3, 3)), [0.9, -0.4]
        base = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        up = sum(w * f.scale**0.5 * f.up for w, f in zip(row, found, strict=True))
        sparse = []
        for factors in found:
            order = factors.down.abs().reshape(-1).argsort(descending=True)
            kept = max(1, round(21 * density)) if density else 0
            mask = torch.zeros(21, dtype=torch.float64).index_fill(0, order[:kept], 1.0).view(3, 7)
            sparse.append(factors.down * mask)
        down = sum(w * f.scale**0.5 * a for w, f, a in zip(row, found, sparse, strict=True))
        wanted = base + up @ down
        close(merge("lora_factors", base, found, row, density=density), wanted)
        other = merge("lora_factors", base.T.contiguous(), [turned(f) for f in found], row, density=density)
        close(other, wanted.T)

    def test_it_is_not_linear_but_a_single_adapter_is(self) -> None:
        base, found = torch.zeros(9, 7, dtype=torch.float64), random_adapters(0, (3, 3))
        single = merge("lora_factors", base, found, [0.5, 0.0], weights="root")
        close(single, 0.5 * delta(found[0], torch.float64))
        close(merge("lora_factors", base, found, [0.5, 0.0]), 0.25 * delta(found[0], torch.float64))
        both = merge("lora_factors", base, found, [1.0, 1.0], weights="root")
        assert not torch.allclose(both, sum(delta(factors, torch.float64) for factors in found))  # type: ignore[arg-type]

    def test_negative_weights_and_scales(self) -> None:
        base, (factors,) = torch.zeros(9, 7, dtype=torch.float64), random_adapters(0, (3,))
        minus = Factors(factors.up, factors.down, -factors.scale)
        for weights, power in (("root", 1), ("both", 2)):
            for weight in (0.7, -0.7):
                found = merge("lora_factors", base, [minus], [weight], weights=weights)
                close(found, weight**power * delta(minus, torch.float64))

    def test_ranks_that_differ(self) -> None:
        base = torch.zeros(9, 7, dtype=torch.float64)
        with pytest.raises(InvalidInput, match=r"the ranks 2, 3 for 'layers.0.mlp.weight'") as caught:
            merge("lora_factors", base, random_adapters(0, (3, 2)), [1.0, 1.0])
        assert caught.value.remedy
        merge("lora_factors", base, random_adapters(0, (3, 2)), [1.0, 0.0])
        alone = random_adapters(0, (3, 0))  # an adapter without factors for this module takes no part
        close(merge("lora_factors", base, alone, [1.0, 1.0]), delta(alone[0], torch.float64))


class TestKnots:
    @pytest.mark.parametrize("shared", ["output", "input"])
    @pytest.mark.parametrize("rule", ["mean", "sum"])
    def test_reference(self, known: dict[str, Tensor], shared: str, rule: str) -> None:
        """The authors keep one entry more than the share says."""
        size = 9 * (known["base"].shape[1] if shared == "output" else known["base"].shape[0])
        options: dict[str, Any] = {
            "density": (int(0.3 * size) + 1) / size,
            "shared": shared,
            "inner_options": inner(normalise=rule, scale=EQUAL if rule == "mean" else 1.0),
        }
        wanted = known[f"knots.{shared}.{rule}"]
        close(merge("knots", known["base"], adapters(known), [EQUAL] * 3, **options) - known["base"], wanted)
        close(dense("knots", known["base"], adapters(known), [EQUAL] * 3, **options) - known["base"], wanted)

    def test_reference_without_singular_values(self, known: dict[str, Tensor]) -> None:
        size = 9 * known["base"].shape[1]
        options: dict[str, Any] = {"density": (int(0.3 * size) + 1) / size, "scaled": False}
        found = merge("knots", known["base"], adapters(known), [1.0] * 3, **options)
        close(found - known["base"], known["knots.unscaled"])

    def test_a_whole_model_beside_adapters(self) -> None:
        found = random_adapters(1)
        base = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        whole = base + delta(found[2], torch.float64)
        mixed = merge("knots", base, [*found[:2], None], [0.5, 0.3, 0.4], [base, base, whole])
        close(mixed, merge("knots", base, found, [0.5, 0.3, 0.4]))


class TestCoreSpace:
    def test_reference(self, known: dict[str, Tensor]) -> None:
        size = 81
        found = merge("core_space", known["base"], adapters(known), [1.0] * 3, density=(int(0.3 * size) + 1) / size)
        close(found - known["base"], known["core_space.ties"])
        found = merge("core_space", known["base"], adapters(known), [1.0] * 3, inner="task_arithmetic")
        close(found - known["base"], known["core_space.sum"])

    def test_a_whole_model_beside_adapters(self) -> None:
        """Bases differ with how a task vector is split, but a sum does not depend on them."""
        found = random_adapters(1)
        base = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        whole = base + delta(found[2], torch.float64)
        row = [0.5, 0.3, 0.4]
        mixed = merge("core_space", base, [*found[:2], None], row, [base, base, whole], inner="task_arithmetic")
        close(mixed, dense("task_arithmetic", base, found, row))


class TestSpaces:
    @pytest.mark.parametrize("name", ["knots", "core_space"])
    @given(seed=st.integers(0, 1000), rank=st.integers(0, 3))
    @quick
    def test_nothing_is_lost(self, name: str, seed: int, rank: int) -> None:
        """A linear operator inside gives what it gives outside; also in more than two dimensions, and stored (in, out)."""
        found, row = random_adapters(seed, (3, rank, 2)), [0.5, -0.3, 0.4]
        base = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        wanted = dense("task_arithmetic", base, found, row)
        close(merge(name, base, found, row, inner="task_arithmetic"), wanted)
        close(merge(name, base.view(9, 7, 1), found, row, inner="task_arithmetic"), wanted.view(9, 7, 1))
        other = merge(name, base.T.contiguous(), [turned(f) for f in found], row, inner="task_arithmetic")
        close(other, wanted.T)

    @pytest.mark.parametrize("name", ["knots", "core_space"])
    def test_ties_in_a_shared_space_differs_from_ties_outside(self, name: str) -> None:
        found, base = random_adapters(3), torch.zeros(9, 7, dtype=torch.float64)
        inside = merge(name, base, found, [1.0] * 3, density=0.3)
        assert not torch.allclose(inside, dense("ties", base, found, [1.0] * 3, density=0.3))

    @pytest.mark.parametrize("name", ["knots", "core_space"])
    def test_vectors_are_merged_by_the_inner_operator(self, name: str) -> None:
        base, first, second = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = merge(name, base, [None, None], [0.5, 0.4], [first, second], density=0.3)
        wanted = running.merge(OPERATORS["ties"], [base, first, second], [0.5, 0.4], options={"density": 0.3})
        assert torch.equal(found, wanted)

    @pytest.mark.parametrize("name", ["knots", "core_space"])
    def test_every_operator_inside(self, name: str) -> None:
        """Those that say what they need of the whole model are refused; the others give something of the right shape."""
        found, base = random_adapters(3), torch.zeros(9, 7, dtype=torch.float64)
        worked = set()
        for inside, entry in OPERATORS.items():
            info = entry.info
            if info.columns == "per_expert" and info.needs == "weights" and not info.ordered and info.min_experts <= 3:
                try:
                    out = merge(name, base, found, [0.5, 0.3, 0.2], inner=inside)
                except InvalidInput as error:
                    assert error.field == "merge.options.inner"
                else:
                    assert bool(out.isfinite().all()) and bool(out.any())
                    worked.add(inside)
        assert {"ties", "task_arithmetic", "linear"} <= worked

    @pytest.mark.parametrize("name", ["knots", "core_space"])
    def test_untouched_parameters_are_the_bases(self, name: str) -> None:
        base = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
        none = [Factors(torch.empty(9, 0), torch.empty(0, 7), 1.0)] * 2
        assert torch.equal(merge(name, base, none, [0.5, 0.4]), base)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"inner": "slerp"}, "slerp cannot merge aligned parts"),
            ({"inner": "fisher"}, "fisher cannot merge aligned parts"),
            ({"inner": "knots"}, "knots cannot merge aligned parts"),
            ({"inner": "mystery"}, "unknown operator 'mystery'"),
            ({"inner_options": "{"}, "inner_options"),
            ({"inner_options": "[1]"}, "a JSON object is needed"),
            ({"inner_options": inner(mystery=1)}, "ties has no option 'mystery'"),
            ({"inner_options": inner(density=7)}, "less than or equal to 1"),
            ({"density": 0.0}, "greater than 0"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInput, match=message) as caught:
            parse_operator_options("knots", options)
        assert str(caught.value.field).startswith("merge.options")

    def test_options_of_the_inner_operator(self) -> None:
        found, base = random_adapters(3), torch.zeros(9, 7, dtype=torch.float64)
        each = merge("core_space", base, found, [1.0] * 3, each={"density": (0.3, 0.3, 0.3)})
        if "density" in operator_info("ties").varies:
            close(each, merge("core_space", base, found, [1.0] * 3, density=0.3))
            assert not torch.equal(each, merge("core_space", base, found, [1.0] * 3, each={"density": (0.3, 1.0, 0.3)}))
        scaled = merge("core_space", base, found, [1.0] * 3, inner_options=inner(scale=0.5))
        close(scaled, 0.5 * merge("core_space", base, found, [1.0] * 3))


class TestLego:
    def clustered(self, spread: float) -> tuple[list[Factors], Tensor]:
        """Four adapters whose units stand close to the same three, in another order each; and these three."""
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(3, 16, generator=generator, dtype=torch.float64)
        out = []
        for number in range(4):
            noise = torch.randn(3, 16, generator=generator, dtype=torch.float64) * spread
            units = (centres + noise)[torch.randperm(3, generator=generator)]
            scale = 0.5 + number
            out.append(Factors(units[:, :9].T / scale**0.5, units[:, 9:] / scale**0.5, scale))
        return out, centres

    def test_units_are_found_wherever_they_stand(self) -> None:
        found, centres = self.clustered(0.0)
        base = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        close(merge("lora_lego", base, found, [0.7]), base + 0.7 * centres[:, :9].T @ centres[:, 9:])

    def test_formula(self) -> None:
        """Clusters as scikit-learn finds them; each centre as large as its units are on average, √(r/k) in all."""
        found, _ = self.clustered(0.05)
        rows = [torch.cat([f.up.T, f.down], dim=1) * f.scale**0.5 for f in found]
        units = torch.cat(rows).numpy()
        base = torch.zeros(9, 7, dtype=torch.float64)
        for rank in (3, 1):
            labels = KMeans(rank, n_init=20, random_state=0).fit_predict(units)
            wanted = np.zeros((9, 7))
            plain = np.zeros((9, 7))
            for label in range(rank):
                members = units[labels == label]
                centre = members.mean(axis=0)
                plain += np.outer(centre[:9], centre[9:])
                centre = centre * np.abs(members).max(axis=1).mean() / np.abs(centre).max()
                wanted += np.outer(centre[:9], centre[9:])
            result = merge("lora_lego", base, found, [1.0], rank=rank)
            close(result, torch.from_numpy(wanted) * (3 / rank) ** 0.5)
            options: dict[str, Any] = {"parameter_reweighting": False, "output_reweighting": False}
            close(merge("lora_lego", base, found, [1.0], rank=rank, **options), torch.from_numpy(plain))

    @given(seed=st.integers(0, 1000), order=st.permutations(range(3)))
    @quick
    def test_deterministic_and_independent_of_the_order(self, seed: int, order: list[int]) -> None:
        found, base = random_adapters(seed), torch.zeros(9, 7, dtype=torch.float64)
        first = merge("lora_lego", base, found, [1.0], rank=4)
        assert torch.equal(first, merge("lora_lego", base, [found[number] for number in order], [1.0], rank=4))
        assert int(torch.linalg.matrix_rank(first)) <= 4

    def test_as_many_clusters_as_units_is_their_sum(self) -> None:
        found, base = random_adapters(0), torch.zeros(9, 7, dtype=torch.float64)
        whole = sum((delta(factors, torch.float64) for factors in found), torch.zeros(9, 7))
        close(merge("lora_lego", base, found, [1.0], rank=9, output_reweighting=False), whole)
        close(merge("lora_lego", base, found, [1.0], rank=64, output_reweighting=False), whole)


class TestAll:
    @pytest.mark.parametrize("name", ON_FACTORS)
    def test_info(self, name: str) -> None:
        assert operator_info(name).needs == "factors"

    @pytest.mark.parametrize("name", ON_FACTORS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_rounds_once(self, name: str, dtype: torch.dtype) -> None:
        found = [
            Factors(f.up.to(dtype), f.down.to(dtype), f.scale) for f in random_adapters(0, (3, 3), shape=(300, 200))
        ]
        base = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
        row = [0.7] if name == "lora_lego" else [0.7, 0.4]
        precise = running.merge(OPERATORS[name], [base] * 3, row, dtype=torch.float32, low_rank=found)
        assert precise.dtype == torch.float32
        assert torch.equal(merge(name, base, found, row), precise.to(dtype))

    @pytest.mark.parametrize("name", ON_FACTORS)
    def test_threads_do_not_change_a_bit(self, name: str) -> None:
        found = [Factors(f.up.float(), f.down.float(), 1.0) for f in random_adapters(0, (8, 8), shape=(300, 501))]
        base = torch.randn(300, 501, generator=torch.Generator().manual_seed(0))
        row = [0.7] if name == "lora_lego" else [0.7, 0.4]
        threads = torch.get_num_threads()
        results = []
        for count in (1, threads, 3):
            torch.set_num_threads(count)
            results.append(merge(name, base, found, row))
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    @pytest.mark.parametrize("name", ["lora_factors", "lora_lego"])
    def test_an_expert_that_is_no_adapter(self, name: str) -> None:
        base, (first, *_) = torch.zeros(9, 7, dtype=torch.float64), random_adapters(0)
        row = [1.0] if name == "lora_lego" else [1.0, 1.0]
        with pytest.raises(InvalidInput, match=r"input 1 has no low-rank factors for 'layers.0.mlp.weight'") as caught:
            merge(name, base, [first, None], row, [base, base + 1.0])
        assert caught.value.field == "experts" and "LoRA adapters only" in str(caught.value.remedy)

    @pytest.mark.parametrize("name", ["lora_factors", "lora_lego"])
    def test_parameters_without_factors(self, name: str) -> None:
        """Biases that one adapter trained, and another did not."""
        base, other = torch.randn(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        none = Factors(torch.empty(9, 0), torch.empty(0, 1), 1.0)
        row = [0.8] if name == "lora_lego" else [0.4, 0.7]
        close(merge(name, base, [None, none], row, [other, base]), base + 0.4 * (other - base))
        assert torch.equal(merge(name, base, [none, none], row), base)
