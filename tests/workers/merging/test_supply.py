"""The bookkeeping of what stays and what is asked for ahead; copies to a GPU need one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.checkpoints import random_llama
from tests.workers.models import make_recipe, open_models
from workers.checkpoints import Checkpoint
from workers.merging import supply
from workers.merging.engine import MergeEngine
from workers.merging.supply import Source, Supply, _Ahead, _Kept

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        random_llama(root / name, seed, layers=2, hidden=64)
    return root


@given(
    sizes=st.lists(st.lists(st.integers(0, 10), max_size=3), max_size=12),
    window=st.integers(1, 40),
)
def test_a_window_of_bytes_moves_over_the_steps(sizes: list[list[int]], window: int) -> None:
    order: list[list[Source]] = [
        [(f"{step}", f"{number}") for number in range(len(found))] for step, found in enumerate(sizes)
    ]
    known = {
        source: size for step, found in zip(order, sizes, strict=True) for source, size in zip(step, found, strict=True)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supply, "AHEAD", window)
        ahead = _Ahead(order, known.__getitem__)
        here: Counter[Source] = Counter()
        seen: Counter[Source] = Counter()
        for number in range(len(order)):
            done, coming = ahead.reached(number)
            here.update(coming)
            seen.update(coming)
            here.subtract(done)
            waiting = {source for source, count in here.items() if count}
            assert set(order[number]) <= waiting  # what is needed now is there
            assert not {source for step in order[:number] for source in step} & waiting
            last = max((int(source[0]) for source in waiting), default=number)
            before = sum(known[source] for source in waiting if int(source[0]) < last)
            assert last == number or before < window  # no more than the window and one step
    assert set(seen.values()) <= {1}


def tensor(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def passes(kept: _Kept, times: int, keys: Sequence[str], size: int = 10) -> list[str]:
    """Go over keys several times; returns those that were found in the last pass."""
    found: list[str] = []
    for _ in range(times):
        kept.passes += 1
        found = []
        for key in keys:
            if kept.get(key) is None:
                kept.put(key, tensor(size))
            else:
                found.append(key)
    return found


def test_as_many_stay_as_fit_however_often_all_are_used() -> None:
    kept = _Kept(45)
    assert passes(kept, 1, "abcdefgh") == []
    for _ in range(5):
        assert passes(kept, 1, "abcdefgh") == ["a", "b", "c", "d"]


def test_what_is_not_used_any_more_makes_room() -> None:
    kept = _Kept(45)
    passes(kept, 3, "abcd")
    assert passes(kept, 2, "wxyz") == []
    assert passes(kept, 2, "wxyz") == ["w", "x", "y", "z"]
    assert "a" not in kept


def test_what_does_not_fit_at_all_stays_out() -> None:
    kept = _Kept(45)
    passes(kept, 2, "ab")
    assert passes(kept, 3, "xyz", size=100) == []
    kept = _Kept(0)
    assert passes(kept, 3, "ab") == []


def test_tensors_on_the_cpu_are_the_mapped_ones(paths: Path) -> None:
    checkpoints, layout = open_models(paths / "base", {"one": paths / "one"})
    found = Supply(checkpoints)
    raw = f"model.{layout.shared[0].name}"
    assert found.get(("one", raw), CPU).data_ptr() == checkpoints["one"].tensor(raw).data_ptr()


def test_a_pass_asks_for_every_tensor_ahead_once(paths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, layout = open_models(paths / "base", {"one": paths / "one", "two": paths / "two"})
    engine = MergeEngine(checkpoints, layout)
    asked: Counter[tuple[str, str]] = Counter()
    ask = Checkpoint.read_ahead

    def asking(self: Checkpoint, name: str) -> None:
        asked[self.name, name] += 1
        ask(self, name)

    monkeypatch.setattr(Checkpoint, "read_ahead", asking)
    targets = {info.name: torch.empty(info.shape) for info in layout.shared}
    engine.apply(make_recipe(checkpoints, "task_arithmetic", [0.5, 0.5]), targets)
    engine.supply._reader.shutdown()
    assert set(asked.values()) == {1} and len(asked) == 3 * len(layout.shared)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0], ids=["all streams", "half stays", "all stays"])
def test_a_gpu_merges_the_same_whatever_stays(paths: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    checkpoints, layout = open_models(paths / "base", {"one": paths / "one", "two": paths / "two"})
    size = sum(checkpoint.tensor(name).nbytes for checkpoint in checkpoints.values() for name in checkpoint.tensors)
    engine = MergeEngine(checkpoints, layout, keep_on=device)
    engine.supply = Supply(checkpoints, device, int(size * share))
    monkeypatch.setattr(supply, "AHEAD", 20_000)
    recipe = make_recipe(checkpoints, "task_arithmetic", [0.5, 0.25])
    wanted = {info.name: engine.merged(recipe, info) for info in layout.shared}
    for _ in range(3):
        targets = {info.name: torch.empty(info.shape, device=device) for info in layout.shared}
        engine.apply(recipe, targets)
        for name, found in targets.items():
            torch.testing.assert_close(found.cpu(), wanted[name], rtol=1e-6, atol=1e-6)
