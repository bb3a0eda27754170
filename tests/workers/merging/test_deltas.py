"""The operators on sparsified task vectors: against mergekit, fusion_bench and the authors' code; their properties."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.geometry import make_layout
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from tests.marks import quick_or_slow
from tests.workers.merging.running import PlainFacts, make_info, merge
from tests.workers.models import make_recipe, open_models, tiny_bert, tiny_bert_base
from workers.merging.deltas import by_rank
from workers.merging.engine import MergeEngine
from workers.merging.kernels.portable import keep_mask, probabilities
from workers.merging.kernels.terms import RankedChance
from workers.merging.operator import OPERATORS, Numbers, Parameter, Whole, make_options

DATA = Path(__file__).parent / "reference" / "data" / "deltas.safetensors"
SPARSE = ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "prune"]
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]
quick = settings(max_examples=30, deadline=None)


def cases() -> Iterator[Any]:
    with safe_open(DATA, framework="pt") as file:
        found = json.loads(file.metadata()["cases"])
    for name, case in found.items():
        yield pytest.param(name, case, id=name)


class Reference:
    """The inputs of the reference, which are one model, and merges of them."""

    def __init__(self) -> None:
        self.tensors = load_file(DATA)
        self.names = [name.removeprefix("base/") for name in self.tensors if name.startswith("base/")]
        self.names.sort(key=list(self.model("base")).index)
        layout = make_layout((name, tuple(tensor.shape), "F64") for name, tensor in self.model("base").items())
        self.layers, self.infos = layout.layers, {info.name: info for info in layout.tensors}

    def model(self, who: str) -> dict[str, Tensor]:
        order = ["embed.weight", "layers.0.mlp.weight", "layers.0.mlp.bias", "layers.1.conv.weight"]
        return {name: self.tensors[f"{who}/{name}"] for name in (*order, "layers.2.norm.weight", "still.weight")}

    def merged(
        self, operator: str, experts: Sequence[dict[str, Tensor]], row: Sequence[float], options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        return {name: self.one(name, operator, experts, row, options) for name in self.names}

    def one(
        self,
        name: str,
        operator: str,
        experts: Sequence[dict[str, Tensor]],
        row: Sequence[float],
        options: Mapping[str, Any],
        inner: PlainFacts | None = None,
    ) -> Tensor:
        entry, base = OPERATORS[operator], self.model("base")
        model: dict[str, Whole] = {key: (base[key], tuple(expert[key] for expert in experts)) for key in self.names}
        plain = {key: value for key, value in options.items() if not isinstance(value, list)}
        parameter = Parameter(
            info=self.infos[name],
            layers=self.layers,
            base=base[name] if entry.info.uses_base else None,
            models=model[name][1],
            coefficients=tuple(row),
            options=make_options(entry, plain, "options"),
            facts=PlainFacts(self.infos[name], model[name], model=model, inner=inner),
            each={key: tuple(value) for key, value in options.items() if isinstance(value, list)},
        )
        out = torch.full_like(base[name], math.nan)
        entry.merge(parameter, out)
        return out


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.mark.parametrize(("name", "case"), [case for case in cases() if "inner" not in case.values[1]])
def test_agrees_with_the_reference(reference: Reference, name: str, case: dict[str, Any]) -> None:
    numbers = [case["only"]] if "only" in case else range(3)
    experts = [reference.model(f"expert{number}") for number in numbers]
    if "before" in case:
        before = case["before"]
        experts = [reference.merged(before["operator"], [expert], [1.0], before["options"]) for expert in experts]
    found = reference.merged(case["operator"], experts, case["row"], case["options"])
    flat = torch.cat([tensor.reshape(-1) for tensor in found.values()])
    torch.testing.assert_close(flat, reference.tensors[name], rtol=1e-10, atol=1e-10)


def test_lines_finds_the_alpha_of_the_authors(reference: Reference) -> None:
    (case,) = (case.values[1] for case in cases() if case.values[0] == "lines-auto")
    base, experts = reference.model("base"), [reference.model(f"expert{number}") for number in range(3)]
    merged = reference.merged(case["inner"], experts, case["row"], {})
    inside: dict[str, Whole] = {key: (base[key], tuple(expert[key] for expert in experts)) for key in reference.names}
    facts = PlainFacts(reference.infos["embed.weight"], inside["embed.weight"], model=inside)
    found = [reference.one(name, "lines", [merged], [1.0], case["options"], facts) for name in reference.names]
    flat = torch.cat([tensor.reshape(-1) for tensor in found])
    torch.testing.assert_close(flat, reference.tensors["lines-auto"], rtol=1e-10, atol=1e-10)


def test_lines_needs_the_experts_for_an_alpha_of_its_own(reference: Reference) -> None:
    expert = reference.model("expert0")
    with pytest.raises(InvalidInput, match="task vectors") as caught:
        reference.one("embed.weight", "lines", [expert], [1.0], {"auto_alpha": True})
    assert caught.value.field == "options.auto_alpha"
    facts = PlainFacts(reference.infos["embed.weight"], (None, (expert["embed.weight"],)))  # as of a linear merge
    with pytest.raises(InvalidInput, match="task vectors"):
        reference.one("embed.weight", "lines", [expert], [1.0], {"auto_alpha": True}, facts)
    base = reference.model("base")
    with pytest.raises(InfeasibleCandidate, match="is 0"):
        facts = PlainFacts(reference.infos["embed.weight"], (base["embed.weight"], (expert["embed.weight"],)))
        reference.one("embed.weight", "lines", [base], [1.0], {"auto_alpha": True}, facts)


def models(
    count: int, shape: Sequence[int] = (12, 9), seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """A base and models near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    deltas = [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * 0.1 for _ in range(count)]
    return [base.to(dtype), *((base + delta).to(dtype) for delta in deltas)]


def run(name: str, tensors: Sequence[Tensor], row: Sequence[float], **given: Any) -> Tensor:
    return merge(OPERATORS[name], tensors, row, options=given)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_one_expert_with_nothing_dropped_is_that_expert_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    tensors = models(3, dtype=dtype)
    for number in range(3):
        row = [1.0 if other == number else 0.0 for other in range(3)]
        assert torch.equal(run(name, tensors, row, density=1.0), tensors[number + 1])


@pytest.mark.parametrize("name", SPARSE)
def test_nothing_is_added_at_a_scale_of_zero(name: str) -> None:
    tensors = models(3)
    assert torch.equal(run(name, tensors, [0.5, 0.3, 0.4], scale=0.0), tensors[0])


@pytest.mark.parametrize("name", SPARSE)
@given(seed=st.integers(0, 1000), factor=st.floats(0.1, 4), density=st.sampled_from([0.3, 0.7, 1.0]))
@quick
def test_the_scale_is_that_of_the_merged_task_vector(name: str, seed: int, factor: float, density: float) -> None:
    tensors = models(3, seed=seed, dtype=torch.float64)
    once = run(name, tensors, [0.5, -0.3, 0.4], density=density) - tensors[0]
    scaled = run(name, tensors, [0.5, -0.3, 0.4], density=density, scale=factor) - tensors[0]
    torch.testing.assert_close(scaled, once * factor, rtol=1e-10, atol=1e-12)


# Each kind of selection once; with a vote, the kernels' own tests cut.
@pytest.mark.parametrize(
    "name", quick_or_slow(SPARSE, *(name for name in SPARSE if name not in ("della", "dare_ties")))
)
@given(cuts=st.lists(st.integers(1, 107), max_size=4, unique=True).map(sorted), seed=st.integers(0, 100))
@quick
def test_stretches_are_parts_of_the_whole(name: str, cuts: list[int], seed: int) -> None:
    base, *experts = models(3, seed=seed)
    whole: Whole = (base, tuple(experts))
    entry, info = OPERATORS[name], make_info("layers.0.mlp.weight", (base, tuple(experts)))
    given_options = make_options(entry, {"density": 0.6, "rescale": "l1"}, "options")
    edges, parts = [0, *cuts, base.numel()], []
    for begin, end in pairwise(edges):
        cut = [tensor.reshape(-1)[begin:end] for tensor in (base, *experts)]
        out = torch.full((end - begin,), math.nan)
        facts = PlainFacts(info, whole)
        row = (0.5, 0.3, 0.4)
        entry.merge(Parameter(info, 1, cut[0], tuple(cut[1:]), row, given_options, facts, {}, begin), out)
        parts.append(out)
    wanted = run(name, [base, *experts], [0.5, 0.3, 0.4], density=0.6, rescale="l1")
    assert torch.equal(torch.cat(parts), wanted.reshape(-1))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs", "prune"])
def test_an_average_without_weight_is_infeasible(name: str) -> None:
    with pytest.raises(InfeasibleCandidate, match="coefficients sum to"):
        run(name, models(2), [0.5, -0.5], normalise=True)
    tensors = models(2)
    assert torch.equal(run(name, tensors, [0.0, 0.0], normalise=True), tensors[0])


@pytest.mark.parametrize("name", [*SPARSE, "task_arithmetic"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (5,), (1, 6), (6, 1)], ids=str)
def test_small_shapes(name: str, shape: tuple[int, ...]) -> None:
    tensors = models(2, shape)
    given_options = {} if name == "task_arithmetic" else {"rescale": "l2"}
    out = run(name, tensors, [0.5, 0.3], **given_options)
    assert out.shape == shape and bool(out.isfinite().all())


class TestMagnitudes:
    def test_breadcrumbs_by_hand(self) -> None:
        base = torch.zeros(10)
        delta = torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10])
        # The largest fifth goes, then the smallest so that half is left.
        out = run("breadcrumbs", [base, delta], [1.0], density=0.5, gamma=0.2)
        assert out.tolist() == [0, 0, 0, -4, 5, -6, 7, -8, 0, 0]
        # Where the share of the largest is less than one entry, none goes.
        out = run("breadcrumbs", [base, delta], [1.0], density=0.5, gamma=0.05)
        assert out.tolist() == [0, 0, 0, 0, 0, -6, 7, -8, 9, -10]
        # Where the density leaves no room, fewer of the largest go.
        out = run("breadcrumbs", [base, delta], [1.0], density=0.9, gamma=0.5)
        assert out.tolist() == [1, -2, 3, -4, 5, -6, 7, -8, 9, 0]

    def test_of_the_whole_model(self) -> None:
        small, large = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])
        zero = torch.zeros(3)
        whole: dict[str, Whole] = {"small": (zero, (small,)), "large": (zero, (large,))}
        for name, wanted in (("small", [0, 0, 3.0]), ("large", [10.0, 20, 30])):
            entry, info = OPERATORS["ties"], make_info(name, whole[name])
            chosen = make_options(entry, {"density": 0.5, "scope": "model"}, "options")  # three of six, and one more
            out = torch.empty(3)
            facts = PlainFacts(info, whole[name], model=whole)
            entry.merge(Parameter(info, 1, zero, whole[name][1], (1.0,), chosen, facts), out)
            assert out.tolist() == wanted

    @pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
    @pytest.mark.parametrize("name", SPARSE)
    def test_rescaling_keeps_the_norm(self, name: str, norm: str) -> None:
        base, expert = models(1, (40, 30), dtype=torch.float64)
        more = {"normalise": "sum"} if "normalise" in OPERATORS[name].options.model_fields and name in (
            "ties", "dare_ties", "della", "breadcrumbs_ties") else {}  # fmt: skip
        out = run(name, [base, expert], [1.0], density=0.4, rescale=norm, **more)
        order = {"l1": 1.0, "l2": 2.0, "linf": math.inf}[norm]
        found, wanted = ((tensor - base).reshape(-1).norm(order) for tensor in (out, expert))
        assert float(found) == pytest.approx(float(wanted), rel=1e-12)


class OncePerQuestion(PlainFacts):
    """`PlainFacts` that counts what is computed."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.asked: list[str] = []

    def of_tensor(self, question: str, compute: Any, *, of: Any = None, settings: Any = None) -> Numbers:
        self.asked.append(f"{question} {of} {sorted((settings or {}).items())}")
        return super().of_tensor(question, compute, of=of, settings=settings)


@pytest.mark.parametrize("name", SPARSE)
def test_facts_depend_on_one_expert_and_its_settings_only(name: str) -> None:
    """Other coefficients, scales and options of other experts ask for nothing new."""
    base, *experts = models(2)
    entry, info = OPERATORS[name], make_info("w", (base, tuple(experts)))
    facts = OncePerQuestion(info, (base, tuple(experts)))
    asked = []
    for row, scale, density in (((0.5, 0.3), 1.0, 0.5), ((0.1, -0.7), 0.4, 0.5), ((0.1, 0.7), 1.0, 0.8)):
        facts.asked.clear()
        chosen = make_options(entry, {"rescale": "l1", "scale": scale}, "options")
        parameter = Parameter(info, 1, base, tuple(experts), row, chosen, facts, {"density": (0.5, density)})
        entry.merge(parameter, torch.empty_like(base))
        asked.append([question for question in facts.asked if "[0]" in question])
    assert asked[0] and asked[0] == asked[1] == asked[2]


class TestRandomness:
    def kept(self, name: str, density: float, shape: Sequence[int] = (200, 500), **more: Any) -> Tensor:
        base, expert = torch.zeros(tuple(shape)), models(1, shape)[1]
        return run(name, [base, expert], [1.0], density=density, rescale="none", **more) != 0

    @pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
    def test_keeps_the_density(self, density: float) -> None:
        share = float(self.kept("dare_linear", density).double().mean())
        assert share == pytest.approx(density, abs=5 * math.sqrt(density * (1 - density) / 100_000))

    @pytest.mark.slow
    def test_is_unbiased(self) -> None:
        base, expert = models(1, (300, 400), dtype=torch.float64)
        for name, density in (("dare_linear", 0.2), ("della_linear", 0.4)):
            moved = run(name, [base, expert], [1.0], density=density) - base
            wanted = expert - base
            error = float((moved - wanted).mean())
            assert abs(error) < 5 * float((moved - wanted).std()) / math.sqrt(120_000)

    @pytest.mark.parametrize("name", RANDOM)
    def test_depends_on_seed_expert_and_nothing_else(self, name: str) -> None:
        base, *experts = models(3, (40, 50))
        first = run(name, [base, *experts], [1.0, 0.0, 0.0]) - base
        assert torch.equal(run(name, [base, *experts], [1.0, 0.0, 0.0]) - base, first)
        alone = run(name, [base, experts[0]], [1.0]) - base
        assert torch.equal(alone, first)  # the others do not matter
        other = run(name, [base, experts[0]], [1.0], seed=1) - base
        assert 0.1 < float(((first != 0) == (other != 0)).double().mean()) < 0.9
        second = run(name, [base, experts[1]], [1.0]) - base
        assert 0.1 < float(((first != 0) == (second != 0)).double().mean()) < 0.9

    def test_linear_and_elected_drop_the_same(self) -> None:
        tensors = models(1, (40, 50))
        for linear, elected in (("dare_linear", "dare_ties"), ("della_linear", "della")):
            first, second = (run(name, tensors, [1.0], density=0.5) != tensors[0] for name in (linear, elected))
            assert torch.equal(first, second)

    def test_della_prefers_large_entries_of_each_row(self) -> None:
        delta = torch.linspace(0.1, 1.0, 1000).repeat(200, 1)
        kept = (run("della_linear", [torch.zeros(200, 1000), delta], [1.0], density=0.5, epsilon=0.3) != 0).double()
        shares = kept.view(200, 10, 100).mean(dim=(0, 2))
        wanted = torch.linspace(0.2, 0.8, 1000).view(10, 100).mean(dim=1).double()
        torch.testing.assert_close(shares, wanted, rtol=0, atol=5 * 0.5 / math.sqrt(20_000))

    @pytest.mark.parametrize("shape", [(4, 9), (7,), (3, 5, 2), (2, 70_000)], ids=str)
    def test_della_probabilities(self, shape: tuple[int, ...]) -> None:
        base, expert = models(1, shape, dtype=torch.float64)
        info, entry = make_info("w", (base, (expert,))), OPERATORS["della"]
        chosen = make_options(entry, {"density": 0.5, "epsilon": 0.2}, "options")
        facts = PlainFacts(info, (base, (expert,)))
        select, _ = by_rank(Parameter(info, 1, base, (expert,), (1.0,), chosen, facts))(0, torch.float64)
        assert isinstance(select, RankedChance)
        found = probabilities(select, slice(0, base.numel())).view(shape)
        rows = np.moveaxis(np.abs((expert - base).numpy()).reshape(shape if len(shape) > 1 else (1, -1)), 1, -1)
        ranks = rows.argsort(axis=-1).argsort(axis=-1) / (rows.shape[-1] - 1)
        wanted = torch.from_numpy(np.moveaxis(0.3 + 0.4 * ranks, -1, 1)).reshape(shape)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
        assert keep_mask(select, (expert - base).view(-1), 0, slice(0, base.numel())).shape == (base.numel(),)

    def test_probabilities_outside_0_to_1_keep_nothing_or_everything(self) -> None:
        delta = torch.arange(1.0, 101.0)
        kept = run("della_linear", [torch.zeros(100), delta], [1.0], density=0.5, epsilon=1.0) != 0
        assert not kept[:25].any() and bool(kept[75:].all())


class TestPrune:
    def test_by_magnitude_and_at_random(self) -> None:
        base, expert = models(1, (50, 40), dtype=torch.float64)
        trimmed = run("prune", [base, expert], [1.0], density=0.25, rescale="probability")
        changed = trimmed != base
        assert int(changed.sum()) == 500
        torch.testing.assert_close((trimmed - base)[changed], 4 * (expert - base)[changed], rtol=1e-9, atol=1e-12)
        assert float((expert - base)[changed].abs().min()) >= float((expert - base)[~changed].abs().max())
        random = run("prune", [base, expert], [1.0], density=0.25, method="random", rescale="probability")
        dared = run("dare_linear", [base, expert], [1.0], density=0.25)
        assert torch.equal(random, dared)

    def test_before_a_merge_is_a_merge_with_less(self) -> None:
        base, *experts = models(2, dtype=torch.float64)
        pruned = [run("prune", [base, expert], [1.0], density=0.3) for expert in experts]
        found = run("ties", [base, *pruned], [0.5, 0.4], density=1.0)
        torch.testing.assert_close(
            found, run("ties", [base, *experts], [0.5, 0.4], density=0.3), rtol=1e-10, atol=1e-12
        )


def test_the_engine_knows_what_a_modifier_modifies(tmp_path: Path) -> None:
    """The facts behind an input are those of the merge that it is the result of."""
    tiny_bert_base(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        tiny_bert(tmp_path / name, labels=2, seed=seed + 1)
    checkpoints, layout = open_models(tmp_path / "base", {name: tmp_path / name for name in ("one", "two")})
    engine, plain = MergeEngine(checkpoints, layout), make_recipe(checkpoints, "ties", [0.5, 0.7], scope="model")
    modified = Merge(
        operator="lines",
        options={"auto_alpha": True, "beta": 0.0},
        base=Leaf(model="base"),
        inputs=[plain.root],
        groups=[Selector()],
        coefficients=[[1.0]],
    )
    recipe = Recipe(models=plain.models, root=modified)
    found, merged, base, one, two = (
        torch.cat([engine.merged(which, tensor, torch.float64).view(-1) for tensor in layout.shared])
        for which in (recipe, plain, *(Recipe(models=plain.models, root=Leaf(model=name)) for name in checkpoints))
    )
    alpha = (one + two - 2 * base).abs().sum() / (merged - base).abs().sum() / 2
    torch.testing.assert_close(found, base + alpha * (merged - base), rtol=1e-9, atol=1e-9)


class TestLines:
    @pytest.mark.parametrize(
        ("position", "wanted"), [(0, 0.2), (2, 0.5), (4, 0.8), ("input", 0.2), ("output", 0.2)], ids=str
    )
    def test_grows_with_depth(self, position: Any, wanted: float) -> None:
        base, expert = models(1, dtype=torch.float64)
        info = make_info("w", (base, (expert,)))
        object.__setattr__(info, "position", position)
        chosen = make_options(OPERATORS["lines"], {"alpha": 0.2, "beta": 0.6}, "options")
        out = torch.empty_like(base)
        facts = PlainFacts(info, (base, (expert,)))
        OPERATORS["lines"].merge(Parameter(info, 5, base, (expert,), (1.0,), chosen, facts), out)
        torch.testing.assert_close(out, base + wanted * (expert - base), rtol=1e-12, atol=1e-12)

    def test_leaves_a_model_of_one_layer_and_the_last_layer_alone(self) -> None:
        base, expert = models(1)
        assert torch.equal(
            run("lines", [base, expert], [1.0], alpha=1.0, beta=0.3), expert
        )  # its only layer is the first
