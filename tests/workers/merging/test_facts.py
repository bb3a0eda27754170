"""What operators ask beside the tensors: computed once per content, in memory and on disk, for every worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.errors import InvalidInput
from optimizer.geometry import TensorInfo
from optimizer.recipe import UNKNOWN_DIGEST, Leaf, Merge, Selector
from tests.workers.merging.test_engine import applied
from tests.workers.models import make_recipe, open_models, tiny_bert, tiny_bert_base
from workers.merging.cache import Cache
from workers.merging.engine import MergeEngine
from workers.merging.facts import NodeFacts, Work
from workers.merging.nodes import Node, compile_node
from workers.merging.operator import OPERATORS, Numbers, Whole

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_bert_base(root / "base")
    tiny_bert(root / "one", labels=2, seed=1)
    tiny_bert(root / "two", labels=3, seed=2)
    return root


def make_engine(paths: Path, cache: Path | None = None) -> MergeEngine:
    checkpoints, layout = open_models(paths / "base", {"one": paths / "one", "two": paths / "two"})
    return MergeEngine(checkpoints, layout, cache=Cache(cache))


class Asking:
    """Asks questions for one node and counts what was computed."""

    def __init__(self, engine: MergeEngine, operator: str = "task_arithmetic", **change: Any) -> None:
        self.engine = engine
        merge = make_recipe(engine.checkpoints, operator, [0.5, 0.5]).root
        assert isinstance(merge, Merge)
        digests = {name: checkpoint.digest for name, checkpoint in engine.checkpoints.items()} | change.pop(
            "digests", {}
        )
        node = compile_node(merge.model_copy(update=change), "root", digests, engine.layout)
        assert isinstance(node, Node)
        self.node = node
        self.computed: Counter[str] = Counter()

    def facts(self, number: int = 0, dtype: torch.dtype = torch.float32) -> NodeFacts:
        return NodeFacts(self.engine, self.node, self.engine.layout.shared[number], Work(CPU, dtype))

    def total(self, number: int = 0, **question: Any) -> Numbers:
        def compute(whole: Whole) -> Numbers:
            self.computed["tensor"] += 1
            base, models = whole
            parts = [part for part in (base, *models) if part is not None]
            return {"sum": torch.stack([part.double().sum() for part in parts])}

        dtype = question.pop("dtype", torch.float32)
        return self.facts(number, dtype).of_tensor(question.pop("question", "total"), compute, **question)

    def totals(self, number: int = 0, **question: Any) -> Numbers:
        def compute(wholes: Iterable[tuple[TensorInfo, Whole]]) -> Numbers:
            self.computed["model"] += 1
            found = {info.name: whole[1][0].double().sum() for info, whole in wholes}
            assert found == {info.name: whole[1][0].double().sum() for info, whole in wholes}  # iterates again
            return found

        return self.facts(number).of_model("totals", compute, **question)


def test_answers_are_of_the_whole_and_asked_once(paths: Path) -> None:
    asking = Asking(make_engine(paths))
    engine = asking.engine
    for number, tensor in enumerate(engine.layout.shared):
        for _ in range(2):
            found = asking.total(number)["sum"]
        sources = [engine.source(name, tensor, CPU) for name in ("base", "one", "two")]
        assert found.tolist() == [float(source.double().sum()) for source in sources]
    assert asking.computed["tensor"] == len(engine.layout.shared)
    for number in range(len(engine.layout.shared)):
        assert set(asking.totals(number)) == {tensor.name for tensor in engine.layout.shared}
    assert asking.computed["model"] == 1


def test_a_second_engine_computes_nothing_again(paths: Path, tmp_path: Path) -> None:
    first, second = (Asking(make_engine(paths, tmp_path)) for _ in range(2))
    for asking in (first, second):
        for number in range(len(asking.engine.layout.shared)):
            asking.total(number, settings={"density": 0.2})
            asking.totals(number)
    assert first.computed == {"tensor": len(first.engine.layout.shared), "model": 1}
    assert not second.computed


@pytest.mark.parametrize(
    "other",
    [
        {"question": "other"},
        {"of": [0]},
        {"of": [1, 0]},
        {"settings": {"density": 0.3}},
        {"settings": {"order": [1.0, 2.0]}},
        {"dtype": torch.float64},
        {"number": 1},
    ],
    ids=str,
)
def test_another_question_is_another_answer(paths: Path, tmp_path: Path, other: Mapping[str, Any]) -> None:
    asking = Asking(make_engine(paths, tmp_path))
    for _ in range(2):
        asking.total(settings={"density": 0.2} if "dtype" not in other else None)
        asking.total(**other)
    assert asking.computed["tensor"] == 2


def test_answers_are_known_by_content_and_not_by_name_or_coefficient(paths: Path, tmp_path: Path) -> None:
    first = Asking(make_engine(paths, tmp_path))
    first.total(of=[1])
    swapped = Asking(
        make_engine(paths, tmp_path), inputs=[Leaf(model="two"), Leaf(model="one")], coefficients=[[9.0, 1.0]]
    )
    swapped.total(of=[0])
    assert first.computed["tensor"] == 1 and not swapped.computed
    moved = Asking(make_engine(paths, tmp_path), inputs=[Leaf(model="one"), Leaf(model="two", layer=1)])
    moved.total(5, of=[1])
    assert moved.computed["tensor"] == 1


def test_operators_without_a_base_are_not_given_one(paths: Path, tmp_path: Path) -> None:
    asking = Asking(make_engine(paths, tmp_path), "linear")
    assert len(asking.total()["sum"]) == 2
    assert len(Asking(make_engine(paths, tmp_path)).total()["sum"]) == 3


@pytest.mark.parametrize("reason", ["merged input", "merged base", "unknown digest"])
def test_what_is_about_merged_or_unknown_models_stays_in_memory(paths: Path, tmp_path: Path, reason: str) -> None:
    inner = make_recipe(make_engine(paths).checkpoints, "task_arithmetic", [0.3, 0.1]).root
    changes: dict[str, dict[str, Any]] = {
        "merged input": {"inputs": [inner, Leaf(model="two")]},
        "merged base": {"base": inner},
        "unknown digest": {"digests": {"one": f"{UNKNOWN_DIGEST}:one"}},
    }
    shared = Cache(tmp_path)
    for computed in (1, 1):
        engine = make_engine(paths)
        engine.cache = shared
        asking = Asking(engine, **changes[reason])
        for _ in range(2):
            asking.total()
        assert asking.computed["tensor"] == computed
    assert not list(tmp_path.rglob("*.safetensors"))


def test_questions_about_part_of_the_inputs_last_where_that_part_does(paths: Path, tmp_path: Path) -> None:
    inner = make_recipe(make_engine(paths).checkpoints, "task_arithmetic", [0.3, 0.1]).root
    for computed in (1, 0):
        asking = Asking(make_engine(paths, tmp_path), inputs=[inner, Leaf(model="two")])
        asking.total(of=[1])
        assert asking.computed["tensor"] == computed


def test_merged_inputs_are_merged_once_for_a_question_and_its_operator(
    paths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = make_recipe(make_engine(paths).checkpoints, "task_arithmetic", [0.3, 0.1]).root
    asking = Asking(make_engine(paths), base=inner, inputs=[inner, Leaf(model="two")])
    reads: Counter[Any] = Counter()
    get = asking.engine.supply.get
    monkeypatch.setattr(
        asking.engine.supply, "get", lambda source, device: (reads.update([source]), get(source, device))[1]
    )
    found = asking.total(3)["sum"]
    assert float(found[0]) == float(found[1]) != float(found[2])
    assert set(reads.values()) == {1} and len(reads) == 3


def test_seeds_depend_on_content_tensor_and_settings_alone(paths: Path) -> None:
    asking, again = Asking(make_engine(paths)), Asking(make_engine(paths), coefficients=[[0.1, 0.9]])
    assert asking.facts().seed(0) == again.facts().seed(0)
    swapped = Asking(make_engine(paths), inputs=[Leaf(model="two"), Leaf(model="one")])
    assert asking.facts().seed(0) == swapped.facts().seed(1)
    seeds = {
        asking.facts().seed(0),
        asking.facts().seed(1),
        asking.facts(1).seed(0),
        asking.facts().seed(0, {"density": 0.5}),
        asking.facts().seed(0, {"density": 0.25}),
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**64 for seed in seeds)


def test_without_calibration_data_measurements_are_refused(paths: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        Asking(make_engine(paths)).facts().measured(0, "fisher")
    assert caught.value.remedy


@pytest.mark.parametrize("operator", sorted({"ties", "dare_ties", "breadcrumbs", "tsv_m", "iso_c"} & set(OPERATORS)))
def test_operators_find_what_another_worker_prepared(
    paths: Path, tmp_path: Path, operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = [0.7] if OPERATORS[operator].info.columns == "scale" else [0.4, 0.6]
    computed: list[int] = []
    get = Cache.get

    def counting(self: Cache, key: str, compute: Callable[[], Numbers], lasting: bool) -> Numbers:
        def counted() -> Numbers:
            computed[-1] += 1
            return compute()

        return get(self, key, counted, lasting)

    monkeypatch.setattr(Cache, "get", counting)
    results = []
    for _ in range(2):
        computed.append(0)
        engine = make_engine(paths, tmp_path)
        results.append(applied(engine, make_recipe(engine.checkpoints, operator, row)))
        first = computed[-1]
        applied(engine, make_recipe(engine.checkpoints, operator, [number * 1.5 for number in row]))
        assert computed[-1] == first  # another candidate asks nothing new
    assert computed[1] == 0
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_group_is_part_of_no_answer(paths: Path, tmp_path: Path) -> None:
    whole = Asking(make_engine(paths, tmp_path))
    whole.total()
    part = Asking(
        make_engine(paths, tmp_path), groups=[Selector(positions=[0]), Selector()], coefficients=[[1, 2], [3, 4]]
    )
    part.total()
    assert not part.computed
