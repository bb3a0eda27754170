from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from optimizer.errors import InfeasibleCandidate, InputsChanged, InvalidCheckpoint, InvalidInput
from optimizer.geometry import Layout
from optimizer.recipe import Leaf, Merge, Recipe, Selector
from tests.benchmarks import memory
from tests.benchmarks.checkpoints import random_llama
from tests.workers.models import make_recipe, model_ids, open_models, tiny_bert, tiny_bert_base, tiny_llama
from workers.checkpoints import WEIGHTS, Checkpoint, open_checkpoint
from workers.export import export_checkpoint
from workers.merging import blocks
from workers.merging import engine as engine_module
from workers.merging.engine import MergeEngine
from workers.merging.nodes import assign, compile_node
from workers.merging.operator import OPERATORS
from workers.merging.resident import ResidentModels


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_bert_base(root / "base")
    tiny_bert(root / "one", labels=2, seed=1)
    tiny_bert(root / "two", labels=3, seed=2, shard_size="10KB")
    return root


@pytest.fixture
def engine(paths: Path) -> MergeEngine:
    checkpoints, layout = open_models(paths / "base", {"one": paths / "one", "two": paths / "two"})
    return MergeEngine(checkpoints, layout)


def targets(engine: MergeEngine, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {tensor.name: torch.full(tensor.shape, 7.0, dtype=dtype) for tensor in engine.layout.shared}


def applied(engine: MergeEngine, recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    out = targets(engine, dtype)
    engine.apply(recipe, out)
    return out


def raw(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.tensor(name if name in checkpoint.tensors else f"bert.{name}")


def test_matches_the_formula_on_every_tensor(engine: MergeEngine) -> None:
    out = applied(engine, make_recipe(engine.checkpoints, "task_arithmetic", [0.6, 0.3]))
    assert len(out) == 39
    for name, found in out.items():
        base, one, two = (raw(checkpoint, name).double() for checkpoint in engine.checkpoints.values())
        torch.testing.assert_close(found.double(), base + 0.6 * (one - base) + 0.3 * (two - base), rtol=1e-5, atol=1e-6)


def test_base_and_experts_come_out_bit_for_bit(engine: MergeEngine) -> None:
    for row, model in (([0.0, 0.0], "base"), ([1.0, 0.0], "one"), ([0.0, 1.0], "two")):
        out = applied(engine, make_recipe(engine.checkpoints, "task_arithmetic", row))
        assert all(torch.equal(found, raw(engine.checkpoints[model], name)) for name, found in out.items())
        alone = applied(engine, Recipe(models=model_ids(engine.checkpoints), root=Leaf(model=model)))
        assert all(torch.equal(out[name], alone[name]) for name in out)


def test_one_tensor_equals_the_same_of_all(engine: MergeEngine) -> None:
    recipe = make_recipe(engine.checkpoints, "ties", [0.5, 0.7], density=0.4)
    out = applied(engine, recipe)
    for tensor in engine.layout.shared:
        assert torch.equal(engine.merged(recipe, tensor), out[tensor.name])
        low = engine.merged(recipe, tensor, torch.bfloat16)
        assert torch.equal(low, out[tensor.name].bfloat16())


def test_groups_select_and_the_rest_is_the_base(engine: MergeEngine) -> None:
    recipe = Recipe(
        models=model_ids(engine.checkpoints),
        root=Merge(
            operator="task_arithmetic",
            base=Leaf(model="base"),
            inputs=[Leaf(model="one"), Leaf(model="two")],
            groups=[Selector(positions=[0], modules=["attention"]), Selector(positions=[0])],
            coefficients=[[1.0, 0.0], [0.0, 1.0]],
        ),
    )
    seen = set()
    for tensor in engine.layout.shared:
        wanted = "base"
        if tensor.position == 0:
            wanted = "one" if tensor.kind == "attention" else "two"
        seen.add(wanted)
        assert torch.equal(engine.merged(recipe, tensor), raw(engine.checkpoints[wanted], tensor.name)), tensor.name
    assert seen == {"base", "one", "two"}


def test_merges_nest_and_are_rounded_once(tmp_path: Path) -> None:
    low = torch.bfloat16
    tiny_bert_base(tmp_path / "base", dtype=low)
    tiny_bert(tmp_path / "one", seed=1, dtype=low)
    tiny_bert(tmp_path / "two", seed=2, dtype=low)
    checkpoints, layout = open_models(tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"})
    engine = MergeEngine(checkpoints, layout)
    inner = make_recipe(checkpoints, "task_arithmetic", [0.3, 0.2]).root
    assert isinstance(inner, Merge)
    outer = Merge(
        operator="linear",
        base=inner,
        inputs=[inner, Leaf(model="two")],
        groups=[Selector(positions=[0, 1])],
        coefficients=[[0.5, 0.5]],
    )
    recipe = Recipe(models=model_ids(checkpoints), root=outer)
    for tensor in layout.shared:
        base, one, two = (raw(checkpoint, tensor.name).float() for checkpoint in checkpoints.values())
        first = 0.5 * base + 0.3 * one + 0.2 * two
        wanted = 0.5 * first + 0.5 * two if isinstance(tensor.position, int) else first
        found = engine.merged(recipe, tensor)
        assert found.dtype == low
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-6)


def test_the_same_bits_from_many_threads_at_once(engine: MergeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(engine.checkpoints, "ties", [0.5, 0.7])
    wanted = applied(engine, recipe)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    found: list[dict[str, Tensor]] = []
    threads = [threading.Thread(target=lambda: found.append(applied(engine, recipe))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(out[name], wanted[name]) for out in found for name in wanted)


def test_slerp_runs_between_two_models(engine: MergeEngine) -> None:
    out = applied(engine, make_recipe(engine.checkpoints, "slerp", [1.0]))
    assert all(torch.equal(found, raw(engine.checkpoints["two"], name)) for name, found in out.items())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"operator": "mystery"}, "recipe.root.operator"),
        ({"options": {"density": 0.5}}, "recipe.root.options.density"),
        ({"operator": "ties", "options": {"density": 7}}, "recipe.root.options.density"),
        ({"coefficients": [[1.0]]}, "recipe.root.coefficients"),
        ({"operator": "slerp"}, "recipe.root.coefficients"),
        ({"operator": "slerp", "coefficients": [[0.5]], "inputs": [{"model": "one"}]}, "recipe.root.inputs"),
    ],
)
def test_a_recipe_that_cannot_be_computed_writes_nothing(
    engine: MergeEngine, change: dict[str, object], field: str
) -> None:
    data = make_recipe(engine.checkpoints, "task_arithmetic", [0.5, 0.5]).to_json()
    data["root"] |= change
    out = targets(engine)
    with pytest.raises(InvalidInput) as caught:
        engine.apply(Recipe.parse(data), out)
    assert caught.value.field == field
    assert all(bool((tensor == 7.0).all()) for tensor in out.values())


def test_a_recipe_of_other_models(engine: MergeEngine) -> None:
    models = model_ids(engine.checkpoints)
    recipe = Recipe(models={"stranger": models["one"]}, root=Leaf(model="stranger"))
    with pytest.raises(InvalidInput, match="not loaded: stranger"):
        engine.check(recipe)


def test_an_average_without_weight(engine: MergeEngine) -> None:
    with pytest.raises(InfeasibleCandidate):
        applied(engine, make_recipe(engine.checkpoints, "linear", [0.5, -0.5]))


def test_a_checkpoint_of_another_shape(engine: MergeEngine, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "short", layers=1)
    checkpoints = {**engine.checkpoints, "one": open_checkpoint(tmp_path / "short", "one")}
    with pytest.raises(InvalidCheckpoint, match=r"one has no tensor 'encoder.layer.1"):
        MergeEngine(checkpoints, engine.layout)


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "base")
    tiny_llama(tmp_path / "one", seed=1)
    checkpoints, layout = open_models(tmp_path / "base", {"one": tmp_path / "one"})
    names = [tensor.name for tensor in layout.shared]
    assert "embed_tokens.weight" in names and "layers.0.self_attn.q_proj.weight" in names
    assert not any("lm_head" in name for name in names)
    out = applied(MergeEngine(checkpoints, layout), make_recipe(checkpoints, "linear", [2.0]))
    expert = checkpoints["one"]
    assert torch.equal(out["embed_tokens.weight"], expert.tensor("model.embed_tokens.weight"))


def flat(tensors: Mapping[str, Tensor], engine: MergeEngine) -> Tensor:
    return torch.cat([tensors[tensor.name].reshape(-1) for tensor in engine.layout.flat])


def model(engine: MergeEngine, name: str) -> dict[str, Tensor]:
    return {tensor.name: engine.source(name, tensor, torch.device("cpu")) for tensor in engine.layout.shared}


def ranged(engine: MergeEngine, breaks: Sequence[int], rows: Sequence[Sequence[float]], **change: Any) -> Recipe:
    data = make_recipe(engine.checkpoints, "task_arithmetic", rows[0]).to_json()
    del data["root"]["groups"]
    data["root"] |= {"breaks": list(breaks), "coefficients": [list(row) for row in rows], **change}
    return Recipe.parse(data)


class TestRanges:
    @given(data=st.data())
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_each_element_has_the_row_of_its_range(self, engine: MergeEngine, data: st.DataObject) -> None:
        base, one, two = (flat(model(engine, name), engine).double() for name in engine.checkpoints)
        edges = list(engine.layout.offsets().values())[1:]
        position = st.integers(1, len(base) - 1) | st.sampled_from([int(edge) for edge in edges])
        breaks = sorted(data.draw(st.sets(position, max_size=30)))
        rows = [(data.draw(st.floats(-1, 1)), data.draw(st.floats(-1, 1))) for _ in range(len(breaks) + 1)]
        found = flat(applied(engine, ranged(engine, breaks, rows)), engine).double()
        for begin, end, (first, second) in zip([0, *breaks], [*breaks, len(base)], rows, strict=True):
            part = slice(begin, end)
            wanted = base[part] + first * (one[part] - base[part]) + second * (two[part] - base[part])
            torch.testing.assert_close(found[part], wanted, rtol=1e-5, atol=1e-5)

    def test_as_many_ranges_as_anybody_may_want(self, engine: MergeEngine) -> None:
        total = len(flat(model(engine, "base"), engine))
        breaks = list(range(1, total, 7))
        rows = [(float(number % 2), float(number % 2 == 0)) for number in range(len(breaks) + 1)]
        found = flat(applied(engine, ranged(engine, breaks, rows)), engine)
        odd = (torch.arange(total) + 6) // 7 % 2 == 1
        one, two = (flat(model(engine, name), engine) for name in ("one", "two"))
        assert torch.equal(found, torch.where(odd, one, two))

    @pytest.mark.parametrize("operator", sorted(name for name, entry in OPERATORS.items() if entry.info.elementwise))
    def test_equal_rows_are_one_row(self, engine: MergeEngine, operator: str) -> None:
        """What an element-wise operator wants to know of a whole tensor does not change with where it is cut."""
        info = OPERATORS[operator].info
        if info.needs != "weights" or not info.min_experts <= 2 <= (info.max_experts or 2):
            pytest.skip("not defined for two models alone")
        row = [0.6, 0.5] if info.columns == "per_expert" else [0.6]
        uncut = flat(applied(engine, ranged(engine, [], [row], operator=operator)), engine)
        breaks = [3, 1000, 1001, 2500, 5000, 6000]
        cut = flat(applied(engine, ranged(engine, breaks, [row] * 7, operator=operator)), engine)
        torch.testing.assert_close(cut, uncut, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("position", [10**6, 2**63, 10**300])
    def test_a_position_behind_the_last_parameter(self, engine: MergeEngine, position: int) -> None:
        with pytest.raises(InvalidInput, match=r"behind the last of \d+ parameters") as caught:
            engine.check(ranged(engine, [1, position], [[1.0, 0.0]] * 3))
        assert caught.value.field == "recipe.root.breaks"

    def test_operators_on_whole_tensors_cannot_be_cut(self, engine: MergeEngine) -> None:
        found = (entry.info for entry in OPERATORS.values() if not entry.info.elementwise)
        info = next(info for info in found if info.min_experts <= 2 <= (info.max_experts or 2))
        first = math.prod(engine.layout.flat[0].shape)
        rows = [[0.5] * (2 if info.columns == "per_expert" else 1)] * 2
        engine.check(ranged(engine, [first], rows, operator=info.name))
        with pytest.raises(InvalidInput, match="whole tensors") as caught:
            engine.check(ranged(engine, [first + 1], rows, operator=info.name))
        assert caught.value.field == "recipe.root.breaks" and caught.value.remedy


class TestGroups:
    @given(data=st.data())
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_are_assigned_as_the_recipe_says(self, engine: MergeEngine, data: st.DataObject) -> None:
        names = [tensor.name for tensor in engine.layout.shared]
        patterns = st.lists(
            st.sampled_from([*names, "*", "*.weight", "encoder.layer.?.*", "[a-e]*", "nothing"]), min_size=1, max_size=3
        )
        group = st.builds(
            Selector,
            positions=st.none() | st.lists(st.sampled_from([0, 1, "input", "output"]), min_size=1, max_size=2),
            modules=st.none() | st.lists(st.sampled_from(["attention", "mlp", "norm"]), min_size=1, max_size=2),
            tensors=st.none() | patterns,
        )
        shared = engine.layout.shared
        groups = [
            found for found in data.draw(st.lists(group, max_size=6)) if any(found.matches(tensor) for tensor in shared)
        ]
        if not groups:
            return
        merge = Merge(
            operator="linear",
            base=Leaf(model="base"),
            inputs=[Leaf(model="one")],
            groups=groups,
            coefficients=[[1.0]] * len(groups),
        )
        assigned = assign(groups, engine.layout, "groups")
        assert {tensor.name: merge.row(tensor) for tensor in shared} == {name: assigned.get(name) for name in names}

    def test_one_for_each_parameter(self, engine: MergeEngine) -> None:
        groups = [Selector(tensors=[tensor.name]) for tensor in reversed(engine.layout.shared)]
        rows = [[float(number % 2), float(number % 2 == 0)] for number in range(len(groups))]
        recipe = make_recipe(engine.checkpoints, "task_arithmetic", [0, 0], groups).to_json()
        recipe["root"]["coefficients"] = rows
        found = applied(engine, Recipe.parse(recipe))
        for row, group in zip(rows, groups, strict=True):
            (name,) = group.tensors or []
            assert torch.equal(found[name], model(engine, "one" if row[0] else "two")[name])

    @pytest.mark.parametrize(
        "group",
        [
            Selector(positions=[7]),
            Selector(tensors=["encoder.layer.0.typo"]),
            Selector(positions=["input"], modules=["mlp"]),
        ],
        ids=str,
    )
    def test_that_contain_nothing_are_a_mistake(self, engine: MergeEngine, group: Selector) -> None:
        with pytest.raises(InvalidInput, match="no merged parameter is in the group") as caught:
            engine.check(make_recipe(engine.checkpoints, "linear", [1.0, 1.0], [Selector(positions=[0]), group]))
        assert caught.value.field == "recipe.root.groups.1" and caught.value.remedy

    def test_that_earlier_ones_cover_are_none(self, engine: MergeEngine) -> None:
        engine.check(make_recipe(engine.checkpoints, "linear", [1.0, 1.0], [Selector(), Selector(positions=[0])]))


class TestTables:
    def recipe(self, engine: MergeEngine, **tables: Any) -> Recipe:
        data = make_recipe(engine.checkpoints, "ties", [0.5, 0.5], [Selector(positions=[0]), Selector()]).to_json()
        data["root"] |= {"tables": tables}
        return Recipe.parse(data)

    def test_each_row_has_its_options(self, engine: MergeEngine) -> None:
        found = applied(engine, self.recipe(engine, density=[[0.1], [0.9]], scale=[[1.0], [0.5]]))
        low = applied(engine, make_recipe(engine.checkpoints, "ties", [0.5, 0.5], density=0.1))
        high = applied(engine, make_recipe(engine.checkpoints, "ties", [0.5, 0.5], density=0.9, scale=0.5))
        for tensor in engine.layout.shared:
            assert torch.equal(found[tensor.name], (low if tensor.position == 0 else high)[tensor.name])

    @pytest.mark.parametrize(
        ("tables", "field"),
        [
            ({"mystery": [[1.0], [1.0]]}, "recipe.root.tables.mystery"),
            ({"mystery": [[1.0, 1.0], [1.0, 1.0]]}, "recipe.root.tables.mystery"),
            ({"scale": [[1.0, 1.0], [1.0, 2.0]]}, "recipe.root.tables.scale"),
            ({"density": [[0.5], [1.5]]}, "recipe.root.tables.density"),
            ({"density": [[0.5], [1e308]]}, "recipe.root.tables.density"),
        ],
    )
    def test_unknown_options_and_values(self, engine: MergeEngine, tables: dict[str, Any], field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            engine.check(self.recipe(engine, **tables))
        assert caught.value.field == field and caught.value.remedy


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_coefficients_that_are_no_numbers_make_no_recipe(engine: MergeEngine, value: float) -> None:
    data = make_recipe(engine.checkpoints, "linear", [0.5, 0.5]).to_json()
    data["root"]["coefficients"] = [[0.5, value]]
    with pytest.raises(InvalidInput) as caught:
        Recipe.parse(data)
    assert (caught.value.field or "").startswith("recipe.root")


@pytest.mark.parametrize("value", [1e31, -1e300, 1.7e308])
def test_coefficients_that_overflow(engine: MergeEngine, value: float) -> None:
    with pytest.raises(InvalidInput, match="no coefficient") as caught:
        engine.check(make_recipe(engine.checkpoints, "linear", [0.5, value]))
    assert caught.value.field == "recipe.root.coefficients.0" and caught.value.remedy


def test_what_is_not_defined_says_for_which_parameter(engine: MergeEngine) -> None:
    recipe = make_recipe(engine.checkpoints, "linear", [1.0, -1.0], [Selector(tensors=["encoder.layer.1.*"])])
    with pytest.raises(InfeasibleCandidate, match=r"^encoder\.layer\.1\."):
        applied(engine, recipe)


def test_a_merge_of_a_merge_scales_what_it_did(engine: MergeEngine) -> None:
    inner = make_recipe(engine.checkpoints, "ties", [0.5, 0.7], density=0.4)
    outer = Merge(
        operator="task_arithmetic",
        base=Leaf(model="base"),
        inputs=[inner.root],
        groups=[Selector(positions=[0]), Selector()],
        coefficients=[[0.3], [2.0]],
    )
    plain, base = applied(engine, inner), model(engine, "base")
    found = applied(engine, Recipe(models=inner.models, root=outer))
    for tensor in engine.layout.shared:
        factor = 0.3 if tensor.position == 0 else 2.0
        wanted = base[tensor.name] + factor * (plain[tensor.name] - base[tensor.name])
        torch.testing.assert_close(found[tensor.name], wanted, rtol=1e-5, atol=1e-6)


def counted(engine: MergeEngine, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Count what is read from the checkpoints."""
    reads: Counter[tuple[str, str]] = Counter()
    get = engine.supply.get

    def counting(source: tuple[str, str], device: torch.device) -> Tensor:
        reads[source] += 1
        return get(source, device)

    monkeypatch.setattr(engine.supply, "get", counting)
    return reads


def test_a_candidate_reads_everything_once(engine: MergeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = make_recipe(engine.checkpoints, "ties", [0.5, 0.7]).root
    outer = Merge(
        operator="task_arithmetic",
        base=inner,
        inputs=[inner, Leaf(model="base"), Leaf(model="one")],
        groups=[Selector()],
        coefficients=[[0.3, 0.2, 0.1]],
    )
    reads = counted(engine, monkeypatch)
    applied(engine, Recipe(models=model_ids(engine.checkpoints), root=outer))
    assert len(reads) == 3 * len(engine.layout.shared) and set(reads.values()) == {1}


def test_experts_outside_every_group_are_not_read(engine: MergeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted(engine, monkeypatch)
    applied(engine, make_recipe(engine.checkpoints, "linear", [0.5, 0.5], [Selector(positions=[0])]))
    first = [tensor for tensor in engine.layout.shared if tensor.position == 0]
    assert Counter(name for name, _ in reads)["one"] == len(first)


def test_a_recipe_is_compiled_once_for_all_its_parameters(engine: MergeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()

    def counting(node: Any, where: str, *rest: Any) -> Any:
        calls[where] += 1
        return compile_node(node, where, *rest)

    monkeypatch.setattr(engine_module, "compile_node", counting)
    recipes = [make_recipe(engine.checkpoints, "linear", [number, 1.0]) for number in (0.1, 0.2)]
    for tensor in engine.layout.shared:
        for recipe in recipes:
            engine.merged(recipe, tensor)
    assert calls == {"recipe.root": 2}
    for number in range(3 * engine_module.COMPILED):
        engine.check(make_recipe(engine.checkpoints, "linear", [float(number), 1.0]))
    assert len(engine._compiled) == engine_module.COMPILED


def test_the_number_of_threads_changes_no_bit(engine: MergeEngine) -> None:
    recipe = make_recipe(engine.checkpoints, "ties", [0.5, 0.7])
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            fresh = MergeEngine(engine.checkpoints, engine.layout)
            results.append(flat(applied(fresh, recipe), engine))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


class TestFilesThatChange:
    @pytest.fixture
    def engine(self, paths: Path, tmp_path: Path) -> MergeEngine:
        for name in ("base", "one", "two"):
            shutil.copytree(paths / name, tmp_path / name)
        checkpoints, layout = open_models(tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"})
        return MergeEngine(checkpoints, layout)

    def test_before_a_candidate(self, engine: MergeEngine) -> None:
        recipe = make_recipe(engine.checkpoints, "linear", [0.5, 0.5])
        applied(engine, recipe)
        path = engine.checkpoints["one"].path / WEIGHTS
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        out = targets(engine)
        with pytest.raises(InputsChanged, match=rf"{WEIGHTS} of the checkpoint 'one'"):
            engine.apply(recipe, out)
        assert all(bool((tensor == 7.0).all()) for tensor in out.values())

    def test_during_a_candidate(self, engine: MergeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        path = engine.checkpoints["base"].path / WEIGHTS
        get = engine.supply.get

        def touching(source: tuple[str, str], device: torch.device) -> Tensor:
            os.utime(path)
            return get(source, device)

        monkeypatch.setattr(engine.supply, "get", touching)
        with pytest.raises(InputsChanged, match="'base'"):
            applied(engine, make_recipe(engine.checkpoints, "task_arithmetic", [0.5, 0.5]))

    def test_before_an_export_is_published(self, engine: MergeEngine, tmp_path: Path) -> None:
        recipe = make_recipe(engine.checkpoints, "linear", [0.5, 0.5])
        path = engine.checkpoints["one"].path / WEIGHTS

        def progress(done: float) -> None:
            if done > 0.5:
                os.utime(path)

        with pytest.raises(InputsChanged, match="'one'"):
            export_checkpoint(
                recipe,
                engine.checkpoints,
                engine.layout,
                tmp_path / "out",
                head="one",
                title="t",
                scores={},
                spec=None,
                progress=progress,
            )
        assert sorted(found.name for found in tmp_path.iterdir()) == ["base", "one", "two"]


def rewritten(source: Path, target: Path, change: Callable[[str, Tensor], Tensor], more: Mapping[str, Tensor]) -> Path:
    """Copy a checkpoint with other tensors."""
    shutil.copytree(source, target)
    tensors = {name: change(name, tensor) for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors | dict(more), target / WEIGHTS, {"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_unscaled_numbers_of_8_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Merged in float32 and rounded once; models come out bit for bit, in memory and in an export."""
    paths = {
        name: rewritten(
            tiny_llama(tmp_path / f"{name}-whole", seed), tmp_path / name, lambda _, tensor: tensor.to(dtype), {}
        )
        for seed, name in enumerate(("base", "one", "two"))
    }
    checkpoints, layout = open_models(paths["base"], {name: paths[name] for name in ("one", "two")})
    engine = MergeEngine(checkpoints, layout)
    recipe = make_recipe(checkpoints, "task_arithmetic", [0.5, 0.25])
    alone = make_recipe(checkpoints, "task_arithmetic", [0.0, 1.0])
    out = applied(engine, recipe)
    for tensor in layout.shared:
        raw_name = f"model.{tensor.name}"
        base, one, two = (checkpoint.tensor(raw_name).float() for checkpoint in checkpoints.values())
        torch.testing.assert_close(out[tensor.name], base + 0.5 * (one - base) + 0.25 * (two - base))
        low = engine.merged(recipe, tensor)
        assert low.dtype == dtype and torch.equal(low.view(torch.uint8), out[tensor.name].to(dtype).view(torch.uint8))
        same = engine.merged(alone, tensor)
        assert torch.equal(same.view(torch.uint8), checkpoints["two"].tensor(raw_name).view(torch.uint8))
    exported = exported_to(tmp_path / "out", alone, checkpoints, layout)
    written = load_file(exported / WEIGHTS)
    whole = load_file(paths["two"] / WEIGHTS)
    assert {name: tensor.dtype for name, tensor in written.items()} == dict.fromkeys(written, dtype)
    assert all(torch.equal(written[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in written)


def test_numbers_of_8_bits_with_scales_are_refused(tmp_path: Path) -> None:
    low, name = torch.float8_e4m3fn, "model.layers.0.self_attn.q_proj.weight"
    whole = tiny_llama(tmp_path / "whole")
    rewritten(whole, tmp_path / "base", lambda _, tensor: tensor.to(low), {f"{name}_scale_inv": torch.ones(1, 1)})
    with pytest.raises(InvalidCheckpoint, match="quantised"):
        open_models(tmp_path / "base", {"one": tmp_path / "base"})


def exported_to(out: Path, recipe: Recipe, checkpoints: Mapping[str, Checkpoint], layout: Layout) -> Path:
    return export_checkpoint(
        recipe, checkpoints, layout, out, head=None, title="t", scores={}, spec=None, progress=lambda _: None
    )


def test_buffers_of_whole_numbers_and_truth_values_pass_through(paths: Path, tmp_path: Path) -> None:
    def more(seed: int) -> dict[str, Tensor]:
        return {
            "embeddings.position_ids": torch.arange(64)[None] + seed,
            "encoder.seen": torch.tensor([True, False, bool(seed % 2)]),
            "encoder.steps": torch.tensor(seed, dtype=torch.uint8),
        }

    def same(_: str, tensor: Tensor) -> Tensor:
        return tensor

    base = rewritten(tiny_bert_base(tmp_path / "b"), tmp_path / "base", same, more(0))
    one = rewritten(tiny_bert_base(tmp_path / "o", seed=1), tmp_path / "one", same, more(1))
    checkpoints, layout = open_models(base, {"one": one})
    assert not set(more(0)) & {tensor.name for tensor in layout.tensors}
    out = load_file(
        exported_to(tmp_path / "out", make_recipe(checkpoints, "linear", [1.0]), checkpoints, layout) / WEIGHTS
    )
    for name, tensor in more(0).items():
        assert out[name].dtype == tensor.dtype and torch.equal(out[name], tensor)
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(out[name], load_file(one / WEIGHTS)[name])


@pytest.mark.parametrize("stored_twice", [False, True])
def test_tied_weights_stay_tied(tmp_path: Path, stored_twice: bool) -> None:
    paths = {}
    for seed, name in enumerate(("base", "one", "two")):
        paths[name] = tiny_llama(tmp_path / f"{name}-once", seed)
        if stored_twice:
            embeddings = load_file(paths[name] / WEIGHTS)["model.embed_tokens.weight"]
            more = {"lm_head.weight": embeddings.clone()}
            paths[name] = rewritten(paths[name], tmp_path / name, lambda _, tensor: tensor, more)
    checkpoints, layout = open_models(paths["base"], {name: paths[name] for name in ("one", "two")})
    recipe = make_recipe(checkpoints, "task_arithmetic", [0.5, 0.5])
    resident = ResidentModels(checkpoints, layout, MergeEngine(checkpoints, layout), torch.device("cpu"), torch.float32)
    resident.apply(recipe)
    merged = cast("LlamaForCausalLM", resident.model(None, "AutoModelForCausalLM"))
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    out = exported_to(tmp_path / "out", recipe, checkpoints, layout)
    assert "lm_head.weight" not in load_file(out / WEIGHTS)
    plain = LlamaForCausalLM.from_pretrained(out)
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert torch.equal(plain.lm_head.weight, merged.lm_head.weight)


OPERATORS_MEASURED = ["linear", "task_arithmetic", "ties", "nested"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for seed, name in enumerate(["base", *map(str, range(8))]):
        random_llama(folder / name, seed, layers=1, hidden=640)
    return folder


def measure_memory(folder: Path, operators: list[str]) -> dict[str, list[memory.Measured]]:
    """The most of five measurements with few and with many experts: on a busy machine the watcher misses peaks."""

    def most(operator: str, count: int) -> memory.Measured:
        return max((memory.measure(folder, operator, count) for _ in range(5)), key=lambda found: found.peak)

    return {operator: [most(operator, count) for count in (2, 8)] for operator in operators}


@pytest.fixture(scope="module")
def measured(pool: Path) -> dict[str, list[memory.Measured]]:
    """In a process of their own: what other tests' threads free and take would be counted."""
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        return processes.apply(measure_memory, (pool, OPERATORS_MEASURED))


@pytest.mark.parametrize("operator", OPERATORS_MEASURED)
def test_what_a_merge_holds_of_its_own_does_not_grow_with_the_experts(
    measured: dict[str, list[memory.Measured]], operator: str
) -> None:
    """See tests/benchmarks/memory.py for the figures."""
    few, many = measured[operator]
    largest = 4 * 640 * (4 * 640 // 3)
    assert many.mapped - few.mapped > 5 * few.model
    assert many.scratch - few.scratch < 2 * largest
