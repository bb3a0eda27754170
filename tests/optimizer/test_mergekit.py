"""mergekit's files as recipes and as searches. That they give the same tensors: tests/workers/test_rebuild.py."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, make_layout
from optimizer.mergekit import (
    asks_for_search,
    model_names,
    model_ref,
    notes_on,
    read_configuration,
    to_configuration,
    to_job,
    to_recipe,
    vocabulary_rule,
)
from optimizer.mergekit.format import Condition, Range, Reference, Setting, evaluate
from optimizer.mergekit.writing import conditions
from optimizer.problem import OperatorInfo
from optimizer.recipe import UNKNOWN_DIGEST, JoinedVocabulary, Leaf, Merge, ModelId, PlannedLayer, Recipe, Selector
from optimizer.spec import ModelRef, parse_spec

LAYERS = 4
INSIDE = (
    "self_attn.q_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "norm.weight",
)
OUTSIDE = ("embed_tokens.weight", "norm.weight", "lm_head.weight")
LAYOUT = make_layout(
    [(name, (4, 2), "BF16") for name in OUTSIDE]
    + [(f"layers.{layer}.{name}", (4, 2), "BF16") for layer in range(LAYERS) for name in INSIDE]
)
NAMES = {tensor.name: tensor.name if "lm_head" in tensor.name else f"model.{tensor.name}" for tensor in LAYOUT.tensors}
SLERP = "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], parameters: {t: 0.5}}"
LINEAR = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}}"
TIES = "{merge_method: ties, base_model: m, models: [{model: a}, {model: b}], parameters: {weight: 1, density: 0.5}}"


def info(name: str) -> OperatorInfo:
    """Operators as far as a file for mergekit depends on them."""
    known: dict[str, dict[str, Any]] = {
        "linear": {"normalise": True},
        "slerp": {"lerp_threshold": 0.9995, "scope": "tensor", "no_direction": "linear"},
        "ties": {
            "density": 0.2,
            "scale": 1.0,
            "normalise": "mean",
            "consensus": "sum",
            "scope": "tensor",
            "rescale": "none",
        },
        "nuslerp": {"origin": "zero", "angle": "tensor"},
        "sce": {"select_topk": 1.0, "uniform_below": 1e-6},
    }
    return OperatorInfo(
        name=name,
        summary="",
        reference="",
        options_schema={"properties": {option: {"default": value} for option, value in known.get(name, {}).items()}},
    )


def read(text: str) -> Any:
    return read_configuration(yaml.safe_load(text))


def models(*names: str) -> dict[str, ModelId]:
    return {name: ModelId(ref=ModelRef(path=name), digest=UNKNOWN_DIGEST) for name in names}


def recipe_of(text: str, layout: Layout = LAYOUT) -> Recipe:
    configuration = read(text)
    return to_recipe(configuration, models(*model_names(configuration).values()), layout, NAMES).recipe


def written(recipe: Recipe, layout: Layout = LAYOUT) -> dict[str, Any]:
    return to_configuration(recipe, layout, NAMES, {name: name for name in recipe.models}, info)


def table(recipe: Recipe) -> dict[str, tuple[float, ...] | None]:
    """The coefficients of every parameter."""
    assert isinstance(recipe.root, Merge)
    rows = {tensor.name: recipe.root.row(tensor) for tensor in LAYOUT.shared}
    return {name: tuple(recipe.root.coefficients[row]) if row is not None else None for name, row in rows.items()}


class TestReading:
    @pytest.mark.parametrize(
        ("text", "path", "message"),
        [
            ("{models: [{model: a}]}", "mergekit.merge_method", "required"),
            ("{merge_method: linear}", "mergekit", "exactly one of"),
            ("{merge_method: linear, models: [{model: a}], slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}",
             "mergekit", "exactly one of"),
            ("{merge_method: linear, models: [{modell: a}]}", "mergekit.models.0.model", "required"),
            ("{merge_method: ram, models: [{model: a}]}", "mergekit.merge_method", "no operator"),
            ("{merge_method: linear, models: [{model: a+b+c}]}", "mergekit.models.0.model", "is no model"),
            ("{merge_method: linear, models: [{model: a, parameters: {weight: {x: 1}}}]}",
             "mergekit.models.0.parameters.weight", "give a number, a list of numbers"),
            ("{merge_method: linear, slices: [{sources: [{model: a, layer_range: [2, 1]}]}]}",
             "mergekit.slices.0.sources.0", "first layer"),
            ("{merge_method: linear, slices: [{sources: "
             "[{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 2]}]}]}",
             "mergekit.slices.0", "equally long"),
            ("{merge_method: linear, modules: {a: {models: [{model: a}]}, b: {models: [{model: a}]}}}",
             "mergekit.modules", "several modules"),
            ("{merge_method: linear, modules: {a: {}}}", "mergekit.modules", "give `models` or `slices`"),
            ("{merge_method: linear, models: [{model: a}], tokenizer_source: base, tokenizer: {source: union}}",
             "mergekit.tokenizer", "says the same"),
            ("[1]", "mergekit", "valid dictionary"),
        ],
    )  # fmt: skip
    def test_errors_name_the_yaml_path(self, text: str, path: str, message: str) -> None:
        with pytest.raises(InvalidInput, match=message) as caught:
            read(text)
        assert str(caught.value.field).startswith(path)

    def test_long_references(self) -> None:
        text = "{merge_method: linear, models: [{model: {model: {path: o/m, revision: v1}, lora: {path: l}}}]}"
        assert [str(reference) for reference in read(text).references] == ["o/m@v1+l"]

    @pytest.mark.parametrize(
        ("setting", "name", "t", "value"),
        [
            (0.5, "x", 0.3, 0.5),
            ([0, 1], "x", 0.25, 0.25),
            ([0, 10, 40], "x", 0.75, 25.0),
            ([0, 10, 40], "x", 1.0, 40.0),
            (["a", "b", "c"], "x", 0.6, "b"),
            (["1e-1", 0.3], "x", 0.5, 0.2),
            ([], "x", 0.0, None),
            (Condition(filter="mlp", value=1), "a.mlp.b", 0.0, 1),
            (Condition(filter="mlp", value=1), "a.attn.b", 0.0, None),
            ([Condition(filter="mlp", value=[0, 1]), Condition(filter="*", value=7)], "mlp", 0.5, 0.5),
            ([Condition(filter="mlp", value=[0, 1]), Condition(value=7)], "attn", 0.5, 7),
            (Range(low=0, high=1), "x", 0.0, Range(low=0, high=1)),
        ],
    )
    def test_settings(self, setting: Setting, name: str, t: float, value: Any) -> None:
        found = evaluate(setting, name, t)
        assert found == (pytest.approx(value) if isinstance(value, float) else value)


class TestModels:
    def test_names(self) -> None:
        text = (
            "{merge_method: linear, base_model: org/b@v1, models: "
            "[{model: x/one}, {model: y/one}, {model: 'my models/ö'}, {model: org/b@v1+lora/one}]}"
        )
        names = model_names(read(text))
        assert list(names.values()) == ["base", "one", "one-2", "model", "one-3"]

    def test_what_stands_in_for_a_base(self) -> None:
        assert list(model_names(read(LINEAR)).values()) == ["base", "b"]
        adapters = read("{merge_method: linear, models: [{model: m+l1}, {model: m+l2}], parameters: {weight: 1}}")
        assert {str(key): name for key, name in model_names(adapters).items()} == {
            "m": "base",
            "m+l1": "l1",
            "m+l2": "l2",
        }

    def test_references(self) -> None:
        def ref(text: str, *known: str) -> ModelRef:
            return model_ref(Reference.model_validate(text), known.__contains__)

        assert ref("org/model") == ModelRef(hub="org/model", revision="main")
        assert ref("org/model@v1") == ModelRef(hub="org/model", revision="v1")
        assert ref("org/model", "org/model") == ModelRef(path="org/model")
        assert ref("./x") == ModelRef(path="./x") and ref("/a/b") == ModelRef(path="/a/b")
        assert ref("org/model+some/lora", "some/lora") == ModelRef(path="some/lora")

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("", "refuse"),
            ("tokenizer_source: union", "union"),
            ("tokenizer_source: base", "base"),
            ("tokenizer_source: m", "base"),
            ("tokenizer: {source: union}", "union"),
            ("tokenizer: {}", "union"),
            ("tokenizer_source: a", None),
            ("tokenizer: {pad_to_multiple_of: 8}", None),
        ],
    )
    def test_vocabularies(self, text: str, rule: str | None) -> None:
        configuration = read(f"merge_method: ties\nbase_model: m\nmodels: [{{model: a}}]\n{text}")
        if rule is not None:
            assert vocabulary_rule(configuration) == rule
            return
        with pytest.raises(InvalidInput) as caught:
            vocabulary_rule(configuration)
        assert str(caught.value.field).startswith("mergekit.tokenizer")

    def test_notes(self) -> None:
        notes = notes_on(read(
            "{merge_method: dare_ties, base_model: m, models: [{model: a, parameters: {weigth: 1, int8_mask: true}}],"
            " dtype: float16, chat_template: auto}"
        ))  # fmt: skip
        assert [note.split()[0] for note in notes] == [
            "dare_ties", "dtype", "chat_template", "parameters.weigth", "parameters.int8_mask",
        ]  # fmt: skip


class TestRecipes:
    def test_as_few_groups_as_it_takes(self) -> None:
        root = recipe_of(TIES).root
        assert isinstance(root, Merge) and root.groups == [Selector()] and root.coefficients == [[1.0, 1.0]]
        assert root.options["density"] == 0.5 and root.tables is None
        root = recipe_of(SLERP.replace("0.5", "[0, 1]")).root
        assert isinstance(root, Merge) and root.groups is not None
        assert [group.positions for group in root.groups] == [["input", 0, "output"], [1], [2], [3]]
        root = recipe_of(SLERP.replace("0.5", "[{filter: mlp, value: 1}, {value: 0.2}]")).root
        assert isinstance(root, Merge) and root.groups is not None
        assert {group.label: row for group, row in zip(root.groups, root.coefficients, strict=True)} == {
            "input + output": [0.2],
            "layers 0-3 · attention + norm": [0.2],
            "layers 0-3 · mlp": [1.0],
        }

    def test_values_that_differ_between_models_and_layers_stand_in_tables(self) -> None:
        root = recipe_of(TIES.replace("{model: a}", "{model: a, parameters: {density: [0.1, 0.4]}}")).root
        assert isinstance(root, Merge) and root.tables is not None and "density" not in root.options
        assert root.tables["density"] == [pytest.approx([0.1 + 0.1 * layer, 0.5]) for layer in range(LAYERS)]

    def test_encoder_and_decoder_each_have_their_gradient(self) -> None:
        layout = make_layout(
            [
                (f"{stack}.block.{n}.w", (2,), "F32")
                for stack, depth in (("encoder", 2), ("decoder", 3))
                for n in range(depth)
            ]
        )
        root = recipe_of(SLERP.replace("0.5", "[0, 1]"), layout).root
        assert isinstance(root, Merge)
        found = {tensor.name: root.coefficients[root.row(tensor) or 0][0] for tensor in layout.shared}
        assert found == {
            "encoder.block.0.w": 0.0, "encoder.block.1.w": 1.0,
            "decoder.block.0.w": 0.0, "decoder.block.1.w": 0.5, "decoder.block.2.w": 1.0,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "path", "message"),
        [
            (LINEAR.replace("{weight: 1}", "{}"), "mergekit.models.parameters.weight", "no weight of a is given for"),
            (LINEAR.replace("{weight: 1}", "{weight: {low: 0, high: 1}}"), "mergekit.models.parameters.weight", "range"),
            (LINEAR.replace("weight: 1", "weight: x"), "mergekit.models.parameters.weight", "'x' is no number"),
            (LINEAR.replace("weight: 1", "weight: 1, normalize: 3"), "mergekit.models.parameters.normalize", "neither"),
            (LINEAR.replace("weight: 1", "weight: .inf"), "mergekit.parameters.weight", "give a number"),
            (LINEAR.replace("model: b", "model: a"), "mergekit.models", "stands twice"),
            (SLERP.replace("base_model: a, ", ""), "mergekit.base_model", "needs a base"),
            (SLERP.replace("{model: b}", "{model: b}, {model: c}"), "mergekit.models", "merges 1 beside the base, not 2"),
            ("{merge_method: passthrough, models: [{model: a}, {model: b}]}", "mergekit.models", "takes one model"),
            ("{merge_method: karcher, models: [{model: a}], parameters: {max_iter: 1.5}}", "mergekit", "whole number"),
            ("{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [2, 5]}]}]}",
             "mergekit.slices.0.sources.0.layer_range", "no layer 4"),
            (TIES.replace("density: 0.5", "normalize: [{filter: mlp, value: true}, {value: false}]"),
             "mergekit.models.parameters", "must be the same"),
        ],
    )  # fmt: skip
    def test_errors_name_the_yaml_path(self, text: str, path: str, message: str) -> None:
        with pytest.raises(InvalidInput, match=message) as caught:
            recipe_of(text)
        assert str(caught.value.field).startswith(path)

    def test_stacks(self) -> None:
        recipe = recipe_of(
            "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 3]}]},"
            " {sources: [{model: b, layer_range: [1, 4]}]}]}"
        )
        assert recipe.layers is not None
        planned = [(layer.layer, layer.node) for layer in recipe.layers]
        assert planned == [*((n, Leaf(model="base")) for n in range(3)), *((n, Leaf(model="b")) for n in range(1, 4))]
        assert isinstance(recipe.root, Merge) and recipe.root.inputs == [Leaf(model="base"), Leaf(model="b")]

    def test_removed_layers_are_the_root_itself(self) -> None:
        recipe = recipe_of(
            "{merge_method: linear, slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]},"
            " {sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [3, 4]}]}], parameters: {weight: 1}}"
        )
        assert recipe.layers == [PlannedLayer(layer=0), PlannedLayer(layer=3)]


numbers = st.floats(-2, 2, allow_nan=False).map(lambda value: value + 0.0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), min_size=len(LAYOUT.shared), max_size=len(LAYOUT.shared)),
    st.sampled_from(["task_arithmetic", "linear", "ties", "slerp"]),
)
def test_a_recipe_comes_back_with_the_same_coefficients(
    rows: list[tuple[float, float]], owner: list[int], operator: str
) -> None:
    """Any assignment of rows to parameters, with some in no group."""
    groups = [
        [tensor.name for tensor, number in zip(LAYOUT.shared, owner, strict=True) if number == row]
        for row in range(len(rows))
    ]
    kept = [(Selector(tensors=names), row) for names, row in zip(groups, rows, strict=True) if names]
    if not kept:
        return
    inputs = [Leaf(model="base"), Leaf(model="a")] if operator == "slerp" else [Leaf(model="a"), Leaf(model="b")]
    width = 1 if operator == "slerp" else 2
    recipe = Recipe(
        models=models("base", "a", "b"),
        root=Merge(
            operator=operator,
            base=Leaf(model="base"),
            inputs=inputs,
            groups=[selector for selector, _ in kept],
            coefficients=[list(row[:width]) for _, row in kept],
        ),
    )
    text = yaml.safe_dump(written(recipe))
    again = recipe_of(text)
    stays = {"linear": (1.0, 0.0, 0.0), "slerp": (0.0,)}.get(operator, (0.0, 0.0))
    added = operator == "linear" and None in table(recipe).values()
    wanted = {name: stays if row is None else ((0.0, *row) if added else row) for name, row in table(recipe).items()}
    assert table(again) == wanted


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.lists(st.sampled_from(["a", "b", "0", "1", "10", "w"]), min_size=1, max_size=4).map(".".join),
        st.sampled_from([0.0, 0.5, 1.0]),
        min_size=1,
        max_size=12,
    )
)
def test_conditions_give_every_name_its_value(values: dict[str, float]) -> None:
    """Also where names contain one another."""
    found = conditions(values)
    setting = found if isinstance(found, float) else [Condition.model_validate(entry) for entry in found]
    assert {name: evaluate(setting, name, 0.0) for name in values} == values


class TestWriting:
    def merge(self, operator: str = "ties", **changes: Any) -> Recipe:
        node = {
            "operator": operator,
            "base": Leaf(model="base"),
            "inputs": [Leaf(model="a"), Leaf(model="b")],
            "groups": [Selector()],
            "coefficients": [[0.5, 0.25]],
        }
        return Recipe(models=models("base", "a", "b"), root=Merge(**{**node, **changes}))

    def test_defaults_of_ours_are_written(self) -> None:
        assert written(self.merge()) == {
            "merge_method": "ties",
            "base_model": "base",
            "models": [
                {"model": "base"},
                {"model": "a", "parameters": {"weight": 0.5}},
                {"model": "b", "parameters": {"weight": 0.25}},
            ],
            "parameters": {"lambda": 1.0, "normalize": True, "rescale": False, "density": 0.2},
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }

    def test_modules_need_one_condition_each(self) -> None:
        recipe = self.merge(groups=[Selector(modules=["mlp"]), Selector()], coefficients=[[0.1, 0.2], [0.3, 0.4]])
        weight = written(recipe)["models"][1]["parameters"]["weight"]
        assert weight == [{"filter": "mlp.", "value": 0.1}, {"value": 0.3}]

    def test_ranges_that_end_with_a_tensor(self) -> None:
        recipe = self.merge("linear", groups=None, breaks=[8], coefficients=[[1.0, 0.0], [0.5, 0.5]])
        first = LAYOUT.flat[0].name
        assert {
            name for name, row in table(recipe_of(yaml.safe_dump(written(recipe)))).items() if row == (1.0, 0.0)
        } == {first}

    def test_the_share_of_nuslerp_becomes_two_weights(self) -> None:
        recipe = self.merge("nuslerp", coefficients=[[0.25]], options={"angle": "row", "origin": "base"})
        found = written(recipe)
        assert found["base_model"] == "base" and found["parameters"] == {
            "nuslerp_row_wise": False,
            "nuslerp_flatten": False,
        }
        assert [entry.get("parameters") for entry in found["models"]] == [None, {"weight": 0.75}, {"weight": 0.25}]

    def test_a_model_as_it_is(self) -> None:
        found = written(Recipe(models=models("base", "a"), root=Leaf(model="a")))
        assert found == {
            "merge_method": "passthrough", "models": [{"model": "a"}], "dtype": "float32", "out_dtype": "bfloat16"
        }  # fmt: skip

    def test_joined_vocabularies(self) -> None:
        recipe = self.merge()
        joined = JoinedVocabulary(rule="union", order=["base", "a", "b"], digest="0" * 64)
        changed = {name: model.model_copy(update={"vocabulary": joined}) for name, model in recipe.models.items()}
        assert written(recipe.model_copy(update={"models": changed}))["tokenizer_source"] == "union"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"operator": "tsv_m", "coefficients": [[1.0]]}, "mergekit has no tsv_m"),
            ({"options": {"normalise": "other"}}, "no normalise = other"),
            ({"options": {"scope": "model"}}, "no scope = model"),
            ({"operator": "sce", "coefficients": [[0.5]]}, "sce has no coefficients"),
            ({"operator": "karcher", "coefficients": [[0.5, 0.25]]}, "karcher has no coefficients"),
            ({"operator": "linear", "groups": None, "breaks": [3], "coefficients": [[1, 0], [0, 1]]}, "cut through"),
            ({"operator": "karcher", "coefficients": [[1, 1]], "groups": [Selector(modules=["mlp"])]}, "in no group"),
            ({"inputs": [Leaf(model="a"), Leaf(model="base")]}, "compared with it"),
            ({"inputs": [Leaf(model="a"), Leaf(model="a")]}, "twice"),
            ({"tables": {"seed": [[1.0]]}}, "no seed of its own"),
        ],
    )
    def test_what_mergekit_cannot_express(self, changes: dict[str, Any], reason: str) -> None:
        with pytest.raises(InvalidInput, match=reason):
            written(self.merge(**changes))

    def test_chains_heads_and_scales(self) -> None:
        inner = self.merge().root
        with pytest.raises(InvalidInput, match="a chain of operators"):
            written(self.merge(inputs=[inner, Leaf(model="b")]))
        layout = make_layout([("w", (2,), "F32"), ("classifier.weight", (2,), "F32")], frozenset(["classifier.weight"]))
        with pytest.raises(InvalidInput, match="heads stay their own"):
            written(self.merge(), layout)
        scaled = self.merge().model_copy(update={"layers": [PlannedLayer(layer=0, scale=0.5)]})
        with pytest.raises(InvalidInput, match="cannot scale"):
            written(scaled)
        mixed = self.merge().model_copy(
            update={"layers": [PlannedLayer(layer=0), PlannedLayer(layer=1, node=Leaf(model="a"))]}
        )
        with pytest.raises(InvalidInput, match=r"made of other models|different operators"):
            written(mixed)


class TestJobs:
    def job(self, text: str, layers: int | None = LAYERS) -> dict[str, Any]:
        return to_job(read(text), lambda _: True, layers)[0]

    @pytest.mark.parametrize(
        ("weight", "search"),
        [("1", False), ("[0, 1]", True), ("{low: 0, high: 1}", True), ("[{filter: mlp, value: 1}, {value: 0}]", False),
         ("[{filter: mlp, value: [0, 1]}, {value: 0}]", True)],
    )  # fmt: skip
    def test_lists_and_ranges_ask_for_a_search(self, weight: str, search: bool) -> None:
        assert asks_for_search(read(TIES.replace("weight: 1", f"weight: {weight}"))) == search
        assert not asks_for_search(read(TIES.replace("weight: 1", f"weight: 1, wait: {weight}")))

    def test_ties(self) -> None:
        found = self.job(
            "{merge_method: ties, base_model: m, tokenizer_source: union, models: ["
            "{model: a, parameters: {weight: [0.2, 0.8], density: {low: 0.1, high: 0.9}}},"
            "{model: b, parameters: {weight: 0.5}}], parameters: {density: 0.5, lambda: [0.5, 1.5]}}"
        )
        assert found["base"] == "m" and [expert["name"] for expert in found["experts"]] == ["a", "b"]
        merge = found["merge"]
        assert merge["bounds"] == {"low": 0.2, "high": 0.8} and merge["vocabulary"] == "union"
        assert merge["granularity"] == {"layers": "groups", "group_size": 2}
        assert merge["options"]["density"] == {"low": 0.1, "high": 0.9, "per_expert": True}
        assert merge["options"]["scale"] == {"low": 0.5, "high": 1.5, "per_group": True}
        assert merge["options"]["normalise"] == "mean"
        start = found["warm_starts"]["candidates"][0]["coefficients"]
        assert start == {"a": 0.5, "b": 0.5}

    def test_slerp(self) -> None:
        text = SLERP.replace(
            "0.5", "[{filter: self_attn, value: [0, 0.5, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.5}]"
        )
        found = self.job(text, None)
        assert (found["base"], [expert["path"] for expert in found["experts"]]) == ("a", ["b"])
        assert found["merge"]["granularity"] == {"layers": "each", "modules": [["attention"], ["mlp"]]}
        assert found["merge"]["bounds"] == {"low": 0.0, "high": 1.0}
        assert found["warm_starts"]["candidates"][0]["coefficients"] == {"t": 0.5}

    def test_a_linear_base_is_an_expert_too(self) -> None:
        found = self.job(LINEAR.replace("weight: 1", "weight: {low: -0.5, high: 1}"))
        assert [(expert["name"], expert["path"]) for expert in found["experts"]] == [("base-model", "a"), ("b", "b")]
        assert found["merge"]["granularity"] == {"layers": "whole"}

    def test_task_arithmetic_has_lambda_in_its_bounds(self) -> None:
        text = TIES.replace("ties", "task_arithmetic").replace("weight: 1", "weight: [1, 2], lambda: 0.5")
        assert self.job(text)["merge"]["bounds"] == {"low": 0.5, "high": 1.0}

    def test_the_rest_of_a_job_is_all_that_is_missing(self) -> None:
        found = self.job(TIES.replace("density: 0.5", "density: [0.2, 0.6]"))
        objective = {"name": "x", "evaluator": "text_classification", "data": {"path": "data"}}
        spec = parse_spec({**found, "objectives": [objective], "budget": {"evaluations": 5}})
        assert spec.merge.operator == "ties" and spec.merge.bounds is None
        assert len(spec.warm_starts.candidates) == 1

    @pytest.mark.parametrize(
        ("text", "path", "message"),
        [
            ("{merge_method: passthrough, models: [{model: a}]}", "mergekit.merge_method", "nothing to search"),
            ("{merge_method: linear, slices: [{sources: [{model: a, layer_range: [0, 2]}]},"
             " {sources: [{model: a, layer_range: [3, 4]}]}], parameters: {weight: 1}}", "mergekit.slices.1", "rearranged"),
            (TIES.replace("weight: 1, ", ""), "mergekit.parameters.weight", "no weight of a"),
            (TIES.replace("density: 0.5", "normalize: [true, false]"), "mergekit.parameters.normalize", "could vary"),
            ("{merge_method: nearswap, base_model: m, models: [{model: a}]}", "mergekit.parameters.t", "no t is given"),
        ],
    )  # fmt: skip
    def test_errors_name_the_yaml_path(self, text: str, path: str, message: str) -> None:
        with pytest.raises(InvalidInput, match=message) as caught:
            self.job(text)
        assert str(caught.value.field).startswith(path)

    def test_conditions_on_other_names_are_noted(self) -> None:
        _, notes = to_job(read(TIES.replace("weight: 1", "weight: [{filter: q_x, value: [0, 1]}, {value: 1}]")), bool)
        assert any("'q_x' names no kind of module" in note for note in notes)
