"""Operators that optimise the merged task vector without data: WUDI (with OptMerge) and DOGE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from optimizer.recipe import Recipe
from tests.workers.merging import running
from tests.workers.merging.spectral_reference import COUNTS, compare
from tests.workers.models import make_recipe, open_models, tiny_llama
from workers.merging import descent
from workers.merging.cache import Cache
from workers.merging.engine import MergeEngine
from workers.merging.operator import OPERATORS
from workers.merging.operators import doge as doge_module
from workers.merging.operators import wudi as wudi_module
from workers.merging.selection import kth_magnitudes
from workers.merging.spectral import svd

OPTMERGE: dict[str, Any] = {"low_rank": True, "start": "mean", "optimiser": "sgd", "learning_rate": 1e-4}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "wudi": ("wudi", {}, 7),
    "optmerge": ("wudi", OPTMERGE, 7),
    "doge-30": ("doge", {}, 3),
    "doge-60": ("doge", {"density": 0.6}, 3),
}
quick = settings(max_examples=40, deadline=None)


def task_vectors(seed: int, count: int, shape: tuple[int, int] = (6, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def merged(name: str, deltas: Sequence[Tensor], scale: float = 1.0, **options: Any) -> Tensor:
    """The merged task vector: the base is 0."""
    return running.merge(OPERATORS[name], [torch.zeros_like(deltas[0]), *deltas], [scale], options=options)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: str, count: int) -> None:
    operator, options, moved = CASES[case]
    assert compare(case, count, operator, options) == (0 if operator == "doge" and count == 1 else moved)


def interference(point: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """What WUDI reduces, as the paper writes it."""
    terms = [((point - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas]
    return torch.stack(terms).sum()


def by_autograd(
    deltas: Sequence[Tensor], loss: Callable[[Tensor], Tensor], start: Tensor, rate: float, steps: int
) -> Tensor:
    point = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([point], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.autograd.backward(loss(point))
        optimiser.step()
    return point.detach()


@pytest.mark.parametrize("shape", [(12, 5), (6, 6), (2, 20)], ids=str)  # the last is too wide for a Gram matrix
def test_wudi_follows_the_gradient_of_its_loss(shape: tuple[int, int]) -> None:
    deltas = task_vectors(1, 3, shape)
    start = sum(deltas[1:], deltas[0])
    wanted = by_autograd(deltas, lambda point: interference(point, deltas), start, 1e-3, 50)
    found = merged("wudi", deltas, learning_rate=1e-3, iterations=50)
    close(found, wanted)
    assert float(interference(found, deltas)) < 0.9 * float(interference(start, deltas))


def test_wudi_with_enough_steps_merges_tasks_on_other_inputs_to_their_sum() -> None:
    first, second = torch.zeros(2, 6, 6, dtype=torch.float64)
    first[:, :3], second[:, 3:] = task_vectors(2, 2, (6, 3))
    found = merged("wudi", [first, second], start="mean", learning_rate=1e-3, iterations=3000)
    close(found, first + second, 1e-3)
    assert float(interference(found, [first, second])) < 1e-6 * float(
        interference(0.5 * (first + second), [first, second])
    )


def test_wudi_stays_where_nothing_pushes() -> None:
    first, second = task_vectors(3, 2)
    none = torch.zeros_like(first)
    single = first.float()
    assert torch.equal(merged("wudi", [single]), single)
    assert torch.equal(merged("wudi", [none, first]), first)
    assert torch.equal(merged("wudi", [none, none]), none)
    close(merged("wudi", [first, none, second]), merged("wudi", [first, second]))
    close(merged("wudi", [first] * 3, start="mean"), first)


@pytest.mark.parametrize("name", ["wudi", "doge"])
def test_is_in_proportion_to_the_scale(name: str) -> None:
    deltas = task_vectors(4, 3)
    close(merged(name, deltas, 0.3), 0.3 * merged(name, deltas), 1e-14)


def test_optmerge_uses_leading_singular_values_only() -> None:
    deltas = task_vectors(5, 2, (8, 8))
    leading = [svd(delta).leading(4).matrix() for delta in deltas]
    norms = [delta.square().sum() for delta in deltas]

    def loss(point: Tensor) -> Tensor:
        terms = [((point - part) @ part.T).square().sum() for part in leading]
        return torch.stack([term / norm for term, norm in zip(terms, norms, strict=True)]).sum()

    start = 0.5 * (deltas[0] + deltas[1])
    wanted = by_autograd(deltas, loss, start, 1e-3, 30)
    close(merged("wudi", deltas, low_rank=True, start="mean", learning_rate=1e-3, iterations=30), wanted)


def test_optimiser_settings_matter() -> None:
    deltas = task_vectors(6, 2)
    plain = merged("wudi", deltas)
    for change in ({"iterations": 200}, {"learning_rate": 2e-5}, {"optimiser": "sgd"}, {"start": "mean"}):
        assert not torch.equal(merged("wudi", deltas, **change), plain)
    plain = merged("doge", task_vectors(6, 2, (8, 8)))
    for change in ({"iterations": 200}, {"learning_rate": 2e-4}, {"strength": 0.1}, {"subspace": 2}, {"density": 0.5}):
        assert not torch.equal(merged("doge", task_vectors(6, 2, (8, 8)), **change), plain)


def test_doge_reduces_the_conflict_between_tasks() -> None:
    deltas = task_vectors(7, 3, (8, 8))
    factors = [0.07 / float(torch.linalg.vector_norm(delta)) for delta in deltas]
    total = sum(factors)

    def conflict(correction: Tensor) -> float:
        point = sum((factor * delta for factor, delta in zip(factors, deltas, strict=True)), total * correction)
        return sum(float((delta * (delta - point)).sum(dim=1).square().sum()) for delta in deltas)

    found = merged("doge", deltas, density=1.0, learning_rate=1e-2)  # Σ λ_i (τ_i + δ)
    sums = sum((factor * delta for factor, delta in zip(factors, deltas, strict=True)), torch.zeros(8, 8).double())
    correction = (found - sums) / total
    assert conflict(correction) < 0.5 * conflict(torch.zeros_like(correction))


def test_doge_keeps_the_largest_entries_of_the_whole_model() -> None:
    small, large = task_vectors(8, 2, (4, 5)), task_vectors(9, 2, (6, 6))
    large = [10.0 * delta for delta in large]
    model = {
        name: (torch.zeros_like(deltas[0]), tuple(deltas)) for name, deltas in (("small", small), ("large", large))
    }
    zero = torch.zeros_like
    options = {"density": 0.5}
    found = [
        running.merge(OPERATORS["doge"], [zero(deltas[0]), *deltas], [1.0], options=options, model=model)
        for deltas in (small, large)
    ]
    kept = int(0.5 * (small[0].numel() + large[0].numel())) + 1  # of each expert; the reference keeps one more
    for number in range(2):
        sizes = torch.cat([small[number].flatten(), large[number].flatten()]).abs().sort(descending=True).values
        alone = torch.where(large[number].abs() >= sizes[kept - 1], 1.0, 0.0)
        assert bool((found[1][alone == 1.0] != 0).all())
    assert torch.count_nonzero(found[0]) < small[0].numel() / 2


def test_doge_lets_tasks_that_did_not_change_a_matrix_have_no_say() -> None:
    first, second = task_vectors(10, 2, (8, 8))
    none = torch.zeros_like(first)
    assert torch.equal(merged("doge", [none, none]), none)
    assert bool(merged("doge", [first, none, second]).isfinite().all())


@pytest.mark.parametrize("name", ["wudi", "doge"])
def test_weights_that_are_not_finite_make_a_candidate_infeasible(name: str) -> None:
    first, second = task_vectors(11, 2)
    second[3, 4] = float("nan")
    with pytest.raises(InfeasibleCandidate, match="not finite"):
        merged(name, [first, second])


@given(st.data(), st.integers(1, 3))
@quick
def test_kth_magnitudes_are_those_of_the_sorted_vectors(data: st.DataObject, count: int) -> None:
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    numbers = st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-300, -3e300, 5e-324])
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    pieces = [
        [
            torch.tensor(data.draw(st.lists(numbers, min_size=length, max_size=length)), dtype=torch.float64).to(dtype)
            for _ in range(count)
        ]
        for length in lengths
    ]
    size = sum(lengths)
    rank = data.draw(st.integers(0, size))

    def parts() -> Iterator[list[Tensor]]:
        return iter(pieces)

    found = kth_magnitudes(parts, lambda length: rank + length - size, count)
    for number, value in enumerate(found):
        magnitudes = np.sort(np.abs(np.concatenate([piece[number].double().numpy() for piece in pieces])))
        assert value == (magnitudes[rank - 1] if rank else 0.0)


def test_descend_leaves_the_start() -> None:
    start = torch.tensor([1.0, -2.0])
    for method, wanted in (("adam", [0.9, -1.9]), ("sgd", [0.8, -1.6])):
        found = descent.descend(start, lambda point: 2 * point, rate=0.1, steps=1, method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(wanted))
    assert torch.equal(start, torch.tensor([1.0, -2.0]))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        tiny_llama(root / name, seed=seed)
    return root


def make_engine(paths: Path, cache: Path | None = None) -> MergeEngine:
    checkpoints, layout = open_models(paths / "base", {"one": paths / "one", "two": paths / "two"})
    return MergeEngine(checkpoints, layout, cache=Cache(cache))


def apply(engine: MergeEngine, recipe: Recipe) -> dict[str, Tensor]:
    out = {tensor.name: torch.full(tensor.shape, 7.0) for tensor in engine.layout.shared}
    engine.apply(recipe, out)
    return out


@pytest.mark.parametrize("module", [wudi_module, doge_module], ids=["wudi", "doge"])
def test_a_search_optimises_once(module: Any, paths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = [], descent.descend

    def counted(*arguments: Any, **settings: Any) -> Tensor:
        calls.append(arguments)
        return plain(*arguments, **settings)

    monkeypatch.setattr(module, "descend", counted)
    name = module.__name__.rpartition(".")[2]
    engine = make_engine(paths, tmp_path)
    first = apply(engine, make_recipe(engine.checkpoints, name, [0.5]))
    matrices = [tensor for tensor in engine.layout.shared if len(tensor.shape) == 2]
    done = len(calls)
    assert done == len(matrices) - (1 if name == "doge" else 0)  # doge leaves the embeddings as they are
    apply(engine, make_recipe(engine.checkpoints, name, [0.8]))
    again = make_engine(paths, tmp_path)  # another worker of the machine
    found = apply(again, make_recipe(again.checkpoints, name, [0.5]))
    assert all(torch.equal(first[key], tensor) for key, tensor in found.items())
    assert len(calls) == done


def test_doge_leaves_all_but_the_layers_matrices_as_they_are(paths: Path) -> None:
    engine = make_engine(paths)
    found = apply(engine, make_recipe(engine.checkpoints, "doge", [1.0]))
    base = apply(engine, make_recipe(engine.checkpoints, "task_arithmetic", [0.0, 0.0]))
    for tensor in engine.layout.shared:
        inside = isinstance(tensor.position, int) and len(tensor.shape) == 2
        assert torch.equal(found[tensor.name], base[tensor.name]) != inside, tensor.name
