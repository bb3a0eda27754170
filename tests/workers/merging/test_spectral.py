"""Operators on the spectra of task vectors: against their references, and what they keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from optimizer.recipe import Merge, Recipe, Selector
from optimizer.spec import Scalar
from tests.workers.merging import running
from tests.workers.merging.spectral_reference import COUNTS, compare
from tests.workers.models import make_recipe, open_models, tiny_llama
from workers.merging.cache import Cache
from workers.merging.engine import MergeEngine
from workers.merging.operator import OPERATORS
from workers.merging.spectral import one_thread, polar, svd

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "tsv_m": ("tsv_m", {}, 7),
    "iso_c": ("iso_c", {}, 7),
    "iso_cts-0.8": ("iso_cts", {}, 7),
    "iso_cts-0.4": ("iso_cts", {"common_fraction": 0.4}, 7),
    "star-40": ("star", {}, 3),
    "star-90": ("star", {"eta": 0.9}, 3),
    "drm-horizontal-0.2": ("drm", {}, 7),
    "drm-horizontal-0.6": ("drm", {"density": 0.6}, 7),
    "drm-vertical-0.2": ("drm", {"direction": "vertical"}, 7),
    "drm-vertical-0.6": ("drm", {"direction": "vertical", "density": 0.6}, 7),
    "opcm-0.5": ("opcm", {}, 7),
    "opcm-0.8": ("opcm", {"alpha": 0.8}, 7),
}
SPECTRAL = ("tsv_m", "iso_c", "iso_cts", "star", "drm", "opcm")
ISOTROPIC = ("tsv_m", "iso_c", "iso_cts", "star", "opcm")
quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10_000)
shapes = st.sampled_from([(12, 8), (8, 12), (6, 6)])


def task_vectors(seed: int, count: int = 3, shape: tuple[int, int] = (12, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def merged(name: str, deltas: Sequence[Tensor], scale: float = 1.0, **options: Any) -> Tensor:
    """The merged task vector: the base is 0."""
    info = OPERATORS[name].info
    row = [scale] * len(deltas) if info.columns == "per_expert" else [scale]
    return running.merge(OPERATORS[name], [torch.zeros_like(deltas[0]), *deltas], row, options=options)


def rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turned: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return turned


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: str, count: int) -> None:
    operator, options, parameters = CASES[case]
    assert compare(case, count, operator, options) == parameters


@given(seeds, shapes)
@quick
def test_rotated_weights_merge_to_the_rotated_merge(seed: int, shape: tuple[int, int]) -> None:
    deltas = task_vectors(seed, shape=shape)
    left, right = rotation(shape[0], seed + 1), rotation(shape[1], seed + 2)
    for name in ISOTROPIC:
        turned = merged(name, [left @ delta @ right for delta in deltas])
        close(turned, left @ merged(name, deltas) @ right, 1e-8)
    close(merged("drm", [left @ delta for delta in deltas]), left @ merged("drm", deltas), 1e-8)
    vertical: dict[str, Any] = {"direction": "vertical"}
    close(
        merged("drm", [delta @ right for delta in deltas], **vertical), merged("drm", deltas, **vertical) @ right, 1e-8
    )


@given(seeds, st.floats(0.01, 100))
@quick
def test_is_in_proportion_to_the_task_vectors_and_to_the_scale(seed: int, factor: float) -> None:
    deltas = task_vectors(seed)
    for name in SPECTRAL:
        once = merged(name, deltas)
        close(merged(name, [delta * factor for delta in deltas]) / factor, once, 1e-8)
        close(merged(name, deltas, 0.3), 0.3 * once, 1e-12)


@pytest.mark.parametrize("name", SPECTRAL)
def test_does_not_hang_on_the_signs_of_singular_vectors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = task_vectors(3)
    wanted = merged(name, deltas)
    plain, generator = torch.linalg.svd, torch.Generator().manual_seed(4)

    def turned(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = plain(matrix, full_matrices=full_matrices)
        signs = torch.randint(0, 2, values.shape, generator=generator).mul(2).sub(1).to(matrix.dtype)
        return left * signs, values, signs[:, None] * right

    monkeypatch.setattr(torch.linalg, "svd", turned)
    close(merged(name, deltas), wanted)


@given(seeds, shapes, st.integers(1, 5))
@quick
def test_iso_c_has_equal_singular_values_of_the_same_sum(seed: int, shape: tuple[int, int], count: int) -> None:
    deltas = task_vectors(seed, count, shape)
    values = torch.linalg.svdvals(merged("iso_c", deltas))
    close(values, torch.linalg.svdvals(sum(deltas[1:], deltas[0])).mean().expand_as(values), 1e-9)


@given(seeds, shapes, st.floats(0, 1))
@quick
def test_iso_cts_has_full_rank_whatever_the_fraction(seed: int, shape: tuple[int, int], fraction: float) -> None:
    found = merged("iso_cts", task_vectors(seed, shape=shape), common_fraction=fraction)
    assert len(svd(found).values) == min(shape)
    close(
        merged("iso_cts", task_vectors(seed, shape=shape), common_fraction=1.0),
        merged("iso_c", task_vectors(seed, shape=shape)),
    )


@given(seeds, shapes)
@quick
def test_tsv_m_of_one_expert_is_that_expert(seed: int, shape: tuple[int, int]) -> None:
    (delta,) = task_vectors(seed, 1, shape)
    close(merged("tsv_m", [delta]), delta)
    close(merged("opcm", [delta]), delta)


def test_tsv_m_of_equal_experts_is_their_leading_part() -> None:
    (delta,) = task_vectors(1, 1)
    close(merged("tsv_m", [delta] * 3), svd(delta).leading(8 // 3).matrix())


def test_tsv_m_of_orthogonal_tasks_is_their_sum() -> None:
    first, second = torch.zeros(2, 6, 6, dtype=torch.float64)
    first[:3, :3], second[3:, 3:] = task_vectors(2, 2, (3, 3))
    close(merged("tsv_m", [first, second]), first + second)


def test_tasks_that_did_not_change_a_matrix_do_not_disturb_it() -> None:
    first, second = task_vectors(5, 2)
    none = torch.zeros_like(first)
    close(merged("tsv_m", [none, first, none]), svd(first).leading(8 // 3).matrix())
    close(merged("iso_c", [first, none]), merged("iso_c", [first]))
    close(merged("star", [none, first]), merged("star", [first]))
    close(merged("opcm", [none, first]), first / 2)  # the mean of the norms 0 and ‖first‖
    for name in SPECTRAL:
        close(merged(name, [none, none]), none)
        assert bool(merged(name, [first, none, second]).isfinite().all())


def test_directions_that_the_sum_does_not_have_are_not_made_up() -> None:
    column, row = task_vectors(6, 1, (12, 1))[0], task_vectors(7, 1, (1, 8))[0]
    for name in ("iso_c", "iso_cts", "tsv_m"):
        close(merged(name, [column @ row]), column @ row)
    assert len(svd(merged("iso_c", [column @ row, 2 * column @ row])).values) == 1


def test_opcm_keeps_what_the_first_expert_needs_most() -> None:
    first, second = task_vectors(8, 2)
    basis = svd(first)
    found = merged("opcm", [first, second], alpha=0.5)
    core = basis.left.T @ found @ basis.right.T
    split = int((basis.values.cumsum(0) / basis.values.sum() <= 0.5).sum())
    assert split >= 2
    factor = core[0, 0] / basis.values[0]
    close(core[:split, :split], factor * torch.diag(basis.values[:split]), 1e-9)
    close(core.diagonal(), factor * basis.values, 1e-9)
    lengths = [float(torch.linalg.vector_norm(delta)) for delta in (first, second, found)]
    assert math.isclose(lengths[2], (lengths[0] + lengths[1]) / 2, rel_tol=1e-12)
    assert not torch.allclose(found, merged("opcm", [second, first], alpha=0.5), atol=1e-2)


def test_star_keeps_the_nuclear_norm_and_takes_a_share_for_each_expert() -> None:
    first, second = task_vectors(9, 2)
    zero = torch.zeros_like(first)
    alone = []
    for delta, eta in ((first, 0.4), (second, 0.9)):
        found = merged("star", [delta], eta=eta)
        values = torch.linalg.svdvals(delta)
        assert len(svd(found).values) == int((values.cumsum(0) < eta * values.sum()).sum()) + 1
        assert math.isclose(float(torch.linalg.svdvals(found).sum()), float(values.sum()), rel_tol=1e-12)
        alone.append(found)
    both = running.merge(OPERATORS["star"], [zero, first, second], [0.5, -2.0], each={"eta": (0.4, 0.9)})
    close(both, 0.5 * alone[0] - 2.0 * alone[1])
    close(merged("star", [first], eta=1.0), first)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)], ids=str)
def test_other_tensors_take_the_mean(name: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(10)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    found = running.merge(OPERATORS[name], tensors, [1.5])
    wanted = tensors[0] + 1.5 * (sum(tensors[1:], torch.zeros(())) / 3 - tensors[0])
    close(found, wanted, 1e-12)


def test_tsv_m_takes_the_mean_where_there_are_fewer_rows_than_tasks() -> None:
    deltas = task_vectors(11, 3, (2, 8))
    close(merged("tsv_m", deltas), sum(deltas[1:], deltas[0]) / 3, 1e-12)


@pytest.mark.parametrize("name", SPECTRAL)
def test_weights_that_are_not_finite_make_a_candidate_infeasible(name: str) -> None:
    first, second = task_vectors(12, 2)
    second[3, 4] = math.inf
    with pytest.raises(InfeasibleCandidate, match="not finite"):
        merged(name, [first, second])


def test_svd_counts_rounding_noise_as_nothing() -> None:
    factor = task_vectors(13, 1, (40, 3))[0]
    for matrix in (factor @ factor.T, (factor @ factor.T).float()):
        found = svd(matrix)
        assert found.left.shape == (40, 3) and found.right.shape == (3, 40)
        torch.testing.assert_close(found.matrix(), matrix)
    assert len(svd(torch.zeros(4, 3)).values) == 0 and svd(torch.zeros(0, 3)).matrix().shape == (0, 3)
    assert torch.equal(polar(torch.zeros(4, 3)), torch.zeros(4, 3))


def test_one_thread_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


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


def candidate(engine: MergeEngine, name: str, scale: float, **options: Scalar) -> Recipe:
    count = 2 if OPERATORS[name].info.columns == "per_expert" else 1
    return make_recipe(engine.checkpoints, name, [scale] * count, (Selector(),), **options)


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_search_decomposes_once(name: str, paths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = torch.linalg.svd, []

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        return plain(*arguments, **settings)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    engine = make_engine(paths, tmp_path)
    first = apply(engine, candidate(engine, name, 0.5))
    matrices = [tensor for tensor in engine.layout.shared if len(tensor.shape) == 2]
    assert len(calls) >= len(matrices) - 1  # some leave the embeddings out
    done = len(calls)
    apply(engine, candidate(engine, name, 0.8))
    apply(engine, candidate(engine, name, 0.0))
    assert len(calls) == done
    again = make_engine(paths, tmp_path)  # another worker of the machine
    assert all(torch.equal(first[key], tensor) for key, tensor in apply(again, candidate(again, name, 0.5)).items())
    assert len(calls) == done


@pytest.mark.parametrize("name", SPECTRAL)
def test_ranges_may_cut_through_a_matrix(name: str, paths: Path) -> None:
    engine = make_engine(paths)
    plain = candidate(engine, name, 0.5)
    assert isinstance(plain.root, Merge)
    breaks = [100, 1111, 3000]
    row = plain.root.coefficients[0]
    other = [0.25 * number for number in row]
    cut = plain.root.model_copy(update={"groups": None, "breaks": breaks, "coefficients": [row, other, row, other]})
    found = apply(engine, plain.model_copy(update={"root": cut}))
    halves = apply(engine, plain), apply(engine, candidate(engine, name, 0.125))
    flat = [torch.cat([part[tensor.name].flatten() for tensor in engine.layout.flat]) for part in (found, *halves)]
    begins = [0, *breaks]
    for number, (begin, end) in enumerate(zip(begins, [*breaks, None], strict=True)):
        assert torch.equal(flat[0][begin:end], flat[1 + number % 2][begin:end])


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
def test_embeddings_can_be_averaged(name: str, paths: Path) -> None:
    engine = make_engine(paths)
    (embeddings,) = [tensor for tensor in engine.layout.shared if tensor.kind == "embeddings"]
    mean = engine.merged(make_recipe(engine.checkpoints, "linear", [1.0, 1.0]), embeddings)
    torch.testing.assert_close(engine.merged(candidate(engine, name, 1.0, embeddings=False), embeddings), mean)
    assert not torch.allclose(engine.merged(candidate(engine, name, 1.0), embeddings), mean, atol=1e-2)


def test_opcm_brings_the_whole_model_to_the_mean_length(paths: Path) -> None:
    engine = make_engine(paths)
    found = apply(engine, candidate(engine, "opcm", 1.0))
    sources = [
        apply(engine, make_recipe(engine.checkpoints, "task_arithmetic", row)) for row in ([0, 0], [1, 0], [0, 1])
    ]
    base = sources[0]

    def length(model: dict[str, Tensor]) -> float:
        return math.sqrt(
            sum(float((tensor.double() - base[key].double()).square().sum()) for key, tensor in model.items())
        )

    assert math.isclose(length(found), (length(sources[1]) + length(sources[2])) / 2, rel_tol=1e-6)
    assert length(found) > 1.0
    recipe = candidate(engine, "opcm", 1.0)
    assert isinstance(recipe.root, Merge)
    turned = recipe.model_copy(update={"root": recipe.root.model_copy(update={"inputs": recipe.root.inputs[::-1]})})
    assert any(not torch.allclose(found[key], tensor, atol=1e-2) for key, tensor in apply(engine, turned).items())


def test_drm_gives_other_tensors_and_embeddings_no_joint_space(paths: Path) -> None:
    engine = make_engine(paths)
    for tensor in engine.layout.shared:
        base, one, two = (
            engine.merged(make_recipe(engine.checkpoints, "task_arithmetic", row), tensor).double()
            for row in ([0, 0], [1, 0], [0, 1])
        )
        deltas = torch.stack([one - base, two - base])
        agreeing = torch.where(deltas.sign() == deltas.sum(0).sign(), deltas, 0.0)
        plain = base + agreeing.sum(0) / agreeing.count_nonzero(0).clamp(min=1)
        found = engine.merged(candidate(engine, "drm", 1.0), tensor).double()
        spectral_form = tensor.kind != "embeddings" and len(tensor.shape) == 2
        assert torch.allclose(found, plain, atol=1e-5) != spectral_form, tensor.name
