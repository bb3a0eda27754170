"""Inner products of real checkpoints, and SLERP by tables through the merge engine."""

from __future__ import annotations

import base64
from itertools import pairwise
from pathlib import Path
from typing import cast, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from optimizer.geometry import Cuts, Layout
from optimizer.niches.breeding import TableBreeding
from optimizer.tables import Table, cut_edges, make_table_space
from tests.factories import make_problem, make_spec
from tests.workers.adapter_models import causal, open_all
from tests.workers.models import model_ids, open_models, tiny_llama
from workers import grams as grams_module
from workers.checkpoints import Checkpoint
from workers.compatibility import inspect, raise_on_errors
from workers.grams import LARGEST, gram_edges, measure_grams
from workers.merging.engine import MergeEngine

Models = tuple[dict[str, Checkpoint], Layout]
Vector = NDArray[np.float64]
EVERY = cast(tuple[Cuts, ...], get_args(Cuts))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grams")
    tiny_llama(root / "llama")
    for name, seed, dtype in (("language", 1, torch.float32), ("polarity", 2, torch.bfloat16)):
        tiny_llama(root / name, seed=seed, dtype=dtype)
    tiny_llama(root / "half", seed=3, dtype=torch.float16)
    causal(root / "llama", root / "adapter", 1)
    causal(root / "llama", root / "other", 2, r=2, target_modules=["embed_tokens", "down_proj"])
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> Models:
    return open_models(root / "llama", {name: root / name for name in ("language", "polarity", "half")})


@pytest.fixture(scope="module")
def adapters(root: Path) -> Models:
    opened = open_all(root / "llama", [root / "adapter", root / "other", root / "language"])
    base, *experts = opened.values()
    layout, findings = inspect(base, experts, [])
    raise_on_errors(findings)
    return opened, layout


def vectors(models: Models) -> Vector:
    """All models as flat vectors."""
    engine, layout = MergeEngine(*models), models[1]
    rows = [[engine.source(name, tensor, torch.device("cpu")) for tensor in layout.flat] for name in models[0]]
    return np.array([np.concatenate([tensor.double().numpy().ravel() for tensor in row]) for row in rows])


@pytest.mark.parametrize("cuts", EVERY)
@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_inner_products_are_those_of_the_vectors(
    cuts: Cuts, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: Models = request.getfixturevalue(kind)
    monkeypatch.setattr(grams_module, "BLOCK", 1000)  # so that tensors are cut
    found, rows = measure_grams(*models, cuts), vectors(models)
    assert found.edges == gram_edges(models[1], cuts, len(models[0])) and found.edges[-1] == models[1].size
    assert {*cut_edges(models[1], cuts)} <= {*found.edges}
    parts = [rows[:, begin:end] for begin, end in pairwise(found.edges)]
    wanted = np.array([part @ part.T for part in parts])
    np.testing.assert_allclose(found.products, wanted, rtol=1e-12, atol=1e-9 if kind == "whole" else 1e-5)


def test_memory_does_not_grow_with_the_adapters(adapters: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an adapter was written out")

    monkeypatch.setattr("workers.merging.engine.expand", refuse)
    monkeypatch.setattr("workers.adapters.expand", refuse)
    measure_grams(*adapters, "tensors")


class TestEdges:
    def test_small_models_have_every_position(self, whole: Models) -> None:
        assert gram_edges(whole[1], "parameters", 2) == list(range(whole[1].size + 1))

    @pytest.mark.parametrize("models", [4, 11, 30])
    def test_large_ones_as_many_as_fit(self, whole: Models, models: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(grams_module, "LARGEST", 200_000)
        edges = gram_edges(whole[1], "parameters", models)
        size = 4 / 3 * 8 * models * models * (len(edges) - 1)
        tensors = cut_edges(whole[1], "tensors")
        assert edges == sorted({*edges}) and {*tensors} <= {*edges} and edges[-1] == whole[1].size
        assert size <= 200_000 or edges == tensors
        assert len(edges) > len(tensors) or models == 30

    def test_the_packed_size(self, whole: Models) -> None:
        found = measure_grams(*whole, "parameters")
        assert 0.8 * LARGEST < len(found.packed) <= LARGEST or len(found.edges) == whole[1].size + 1
        assert len(base64.b64decode(found.packed)) == (len(found.edges) - 1) * 16 * 8


def test_children_through_the_merge_engine_are_slerps_of_the_parents(root: Path) -> None:
    """Three generations: what the engine makes of each child is SLERP of what it made of the parents."""
    checkpoints, layout = open_models(root / "llama", {name: root / name for name in ("language", "polarity")})
    engine = MergeEngine(checkpoints, layout)
    spec = make_spec()
    problem = make_problem(spec).model_copy(
        update={
            "layout": layout,
            "models": model_ids(checkpoints),
            "grams": measure_grams(checkpoints, layout, "parameters"),
        }
    )
    space = make_table_space(spec, problem)
    breeding = TableBreeding(space, np.random.default_rng(0))

    def weights(table: Table) -> Vector:
        recipe = space.recipe(table.encode())
        merged = [engine.merged(recipe, tensor, torch.float64) for tensor in layout.flat]
        return np.concatenate([tensor.numpy().ravel() for tensor in merged])

    edges = problem.grams.edges if problem.grams else []
    a, b = (space.table(space.alone(name)) for name in ("language", "polarity"))
    for split, t in ((edges[len(edges) // 3], 0.3), (edges[-5], 0.8), (0, 0.45)):
        first, second = weights(a), weights(b)
        child = breeding.child(a, b, split, t)
        angle = np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
        at = np.where(np.arange(layout.size) < split, t, 1 - t)
        wanted = (np.sin((1 - at) * angle) * first + np.sin(at * angle) * second) / np.sin(angle)
        np.testing.assert_allclose(weights(child), wanted, rtol=1e-10, atol=1e-12)
        a, b = child, a
