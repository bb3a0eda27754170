from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.forks import forks
from workers.merging import cache
from workers.merging.cache import SMALL, Cache, key_of
from workers.safetensors_header import DTYPES

LARGE = SMALL // 4 + 1000  # elements
KEY = key_of("question")
OTHER = key_of("another")


class Counted:
    """Computes an answer, and counts how often."""

    def __init__(self, elements: int = LARGE, value: float = 1.0) -> None:
        self.answer = {"values": torch.full((elements,), value), "count": torch.tensor(3.0, dtype=torch.float64)}
        self.calls = 0

    def __call__(self) -> Mapping[str, Tensor]:
        self.calls += 1
        return self.answer


def files(path: Path, pattern: str = "*") -> list[Path]:
    return sorted(found for found in path.rglob(pattern) if found.is_file())


def anonymous_bytes() -> int:
    with Path("/proc/self/smaps_rollup").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))


@pytest.mark.parametrize("elements", [0, 3, LARGE])
def test_an_answer_is_computed_once_and_outlives_the_process(tmp_path: Path, elements: int) -> None:
    compute = Counted(elements)
    first = Cache(tmp_path)
    for asked in (first, first, Cache(tmp_path)):
        found = asked.get(KEY, compute, True)
        assert set(found) == {"values", "count"} and found["count"].shape == ()
        assert all(torch.equal(found[name], compute.answer[name]) for name in found)
        assert all(found[name].dtype == compute.answer[name].dtype for name in found)
    assert compute.calls == 1 and len(files(tmp_path)) == 1


def test_every_type_and_shape_comes_back(tmp_path: Path) -> None:
    plain = torch.arange(12, dtype=torch.int16)
    answer = {str(dtype): plain.to(dtype).view(3, 4) for dtype in DTYPES.values()}
    answer |= {"view": torch.arange(100.0)[::7], "turned": torch.arange(6.0).view(2, 3).T, "same": answer["torch.bool"]}
    assert Cache(tmp_path).get(KEY, lambda: answer, True)
    found = Cache(tmp_path).get(KEY, Counted(), True)
    assert set(found) == set(answer)
    for name, tensor in answer.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()


def test_what_is_not_lasting_stays_in_memory(tmp_path: Path) -> None:
    compute, asked = Counted(), Cache(tmp_path)
    for _ in range(2):
        asked.get(KEY, compute, False)
    assert compute.calls == 1 and not files(tmp_path)
    Cache(tmp_path).get(KEY, compute, False)
    assert compute.calls == 2


def test_large_answers_are_mapped(tmp_path: Path) -> None:
    elements = 8 << 20
    Cache(tmp_path).get(KEY, Counted(elements), True)
    before = anonymous_bytes()
    found = Cache(tmp_path).get(KEY, Counted(), True)
    assert float(found["values"].sum()) == elements
    assert anonymous_bytes() - before < elements  # of 4 bytes each


def test_memory_is_bounded_and_the_last_used_stays() -> None:
    room = Cache(memory_bytes=10 * 4 * LARGE)
    computed = [Counted() for _ in range(15)]
    for compute in computed:
        for number in (0, computed.index(compute)):
            room.get(key_of(number), computed[number], False)
    assert computed[0].calls == 1
    again = Counted()
    for number in range(15):
        room.get(key_of(number), again, False)
    assert 5 <= again.calls <= 14


def test_an_answer_larger_than_the_bound_is_still_given() -> None:
    compute = Counted()
    for _ in range(2):
        assert Cache(memory_bytes=1).get(KEY, compute, False)["values"].numel() == LARGE


def test_a_view_does_not_keep_the_whole_alive() -> None:
    found = Cache().get(KEY, lambda: {"part": torch.zeros(1 << 20)[:2]}, False)
    assert found["part"].untyped_storage().nbytes() == 8


@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed", "flipped", "noise", "directory", "no checksum"])
def test_broken_files_are_computed_again_and_replaced(tmp_path: Path, damage: str) -> None:
    compute = Counted()
    Cache(tmp_path).get(KEY, compute, True)
    (path,) = files(tmp_path)
    content = path.read_bytes()
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    if damage == "directory":
        path.unlink()
        path.mkdir()
    elif damage == "no checksum":
        save_file({"values": torch.zeros(3)}, path)
    else:
        new = {"empty": b"", "cut": content[:-1], "zeroed": bytes(len(content)), "flipped": flipped, "noise": b"x" * 99}
        path.write_bytes(new[damage])
    for _ in range(2):
        found = Cache(tmp_path).get(KEY, compute, True)
        assert torch.equal(found["values"], compute.answer["values"])
    assert compute.calls == (3 if damage == "directory" else 2)


def test_threads_ask_once(tmp_path: Path) -> None:
    compute, asked = Counted(), Cache(tmp_path)
    started = threading.Barrier(6)

    def ask(lasting: bool) -> None:
        def slowly() -> Mapping[str, Tensor]:
            time.sleep(0.05)
            return compute()

        started.wait()
        asked.get(KEY if lasting else OTHER, slowly, lasting)

    threads = [threading.Thread(target=ask, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compute.calls == 2  # one for each of the two questions


def test_a_failure_is_not_kept(tmp_path: Path) -> None:
    asked = Cache(tmp_path)

    def fail() -> Mapping[str, Tensor]:
        raise ValueError("no")

    for key, lasting in ((KEY, True), (OTHER, False)):
        with pytest.raises(ValueError, match="no"):
            asked.get(key, fail, lasting)
        assert asked.get(key, Counted(), lasting)


def test_a_question_may_ask_another(tmp_path: Path) -> None:
    asked = Cache(tmp_path)
    inner, outer = Counted(), Counted(value=2.0)
    found = asked.get(KEY, lambda: {"sum": asked.get(OTHER, inner, True)["values"] + outer()["values"]}, True)
    assert float(found["sum"][0]) == 3.0 and inner.calls == 1


def _ask(directory: Path, log: Path, started: Any) -> None:
    def compute() -> Mapping[str, Tensor]:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.2)
        return {"values": torch.ones(LARGE)}

    started.wait(30)
    found = Cache(directory).get(KEY, compute, True)
    assert float(found["values"].sum()) == LARGE


def _hang(directory: Path, began: Path) -> None:
    def compute() -> Mapping[str, Tensor]:
        began.touch()
        time.sleep(600)
        raise AssertionError

    Cache(directory).get(KEY, compute, True)


def process(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    started = forks().Process(target=target, args=arguments, daemon=True)
    started.start()
    return started


def test_processes_compute_once_together(tmp_path: Path) -> None:
    started = forks().Barrier(3)
    processes = [process(_ask, tmp_path / "cache", tmp_path / "log", started) for _ in range(3)]
    for one in processes:
        one.join(120)
    assert [one.exitcode for one in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "x"
    assert [path.suffix for path in files(tmp_path / "cache")] == [".safetensors"]


def test_a_lock_does_not_outlive_its_process(tmp_path: Path) -> None:
    holder = process(_hang, tmp_path / "cache", tmp_path / "began")
    while not (tmp_path / "began").exists():
        assert holder.is_alive()
        time.sleep(0.02)
    found: list[Mapping[str, Tensor]] = []
    compute = Counted()
    waiting = threading.Thread(target=lambda: found.append(Cache(tmp_path / "cache").get(KEY, compute, True)))
    waiting.start()
    time.sleep(0.2)
    assert compute.calls == 0
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    waiting.join(60)
    assert compute.calls == 1 and found
    assert not files(tmp_path / "cache", "*.lock")


def test_the_directory_is_bounded_and_what_was_used_last_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = 4 * LARGE
    old = time.time() - 10_000

    def fill(number: int, bound: int) -> None:
        Cache(tmp_path, disk_bytes=bound).get(key_of(number), Counted(value=float(number)), True)

    for number in range(8):
        fill(number, 100 * size)
        path = next(found for found in files(tmp_path) if found.stem == key_of(number))
        os.utime(path, (old + number, old + number))
    partial = files(tmp_path)[0].with_name(".abc.partial")
    partial.write_bytes(b"left by a crash")
    os.utime(partial, (1, 1))
    again = Counted()
    Cache(tmp_path).get(key_of(0), again, True)  # reading counts as use
    fill(8, 5 * size)
    left = {path.stem for path in files(tmp_path)}
    assert again.calls == 0 and not caplog.records
    assert left == {key_of(number) for number in (0, 6, 7, 8)}
    with caplog.at_level(logging.WARNING):
        fill(9, size // 2)
    assert "too small" in caplog.text and not files(tmp_path)


def test_a_directory_that_cannot_be_used_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no directory")
    compute, asked = Counted(), Cache(tmp_path / "file" / "cache")
    for _ in range(2):
        assert asked.get(KEY, compute, True)["values"].numel() == LARGE
    assert compute.calls == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    asked.get(OTHER, compute, True)
    assert len(caplog.records) == 1  # said once


def test_another_process_gets_one_over_the_same_directory(tmp_path: Path) -> None:
    compute = Counted()
    first = Cache(tmp_path, disk_bytes=10**9)
    first.get(KEY, compute, True)
    second: Cache = pickle.loads(pickle.dumps(first))
    second.get(KEY, compute, True)
    assert compute.calls == 1


def test_another_format_is_another_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Counted()
    Cache(tmp_path).get(KEY, compute, True)
    monkeypatch.setattr(cache, "FORMAT", "next")
    Cache(tmp_path).get(KEY, compute, True)
    assert compute.calls == 2
