"""`mergeopt endpoint` and its tokens, as owners run them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from api.cli import app
from api.store.sql import SqlStore
from tests.api.endpoint.conftest import offer_data
from tests.service import Process, free_port, until


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, models: Path, tmp_path: Path) -> Iterator[CliRunner]:
    """Runs commands with a home of their own."""
    monkeypatch.setenv("MERGEOPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MERGEOPT_ROOTS", str(models))
    yield CliRunner()


def test_an_endpoint_without_tokens_does_not_start(runner: CliRunner) -> None:
    done = runner.invoke(app, ["endpoint", "--base", "base", "--models", "adapters"])
    assert done.exit_code == 2
    assert "mergeopt token create NAME --endpoint" in done.output


def test_its_tokens_are_not_the_services(runner: CliRunner, tmp_path: Path) -> None:
    secret = runner.invoke(app, ["token", "create", "alice", "--endpoint"]).stdout.split()[0]
    assert secret.startswith("mo_")
    assert "alice" in runner.invoke(app, ["token", "list", "--endpoint"]).output
    assert "no tokens" in runner.invoke(app, ["token", "list"]).output
    store = SqlStore(f"sqlite:///{tmp_path}/home/mergeopt.db")
    assert store.check_token(secret) is None
    store.close()
    assert runner.invoke(app, ["token", "revoke", "1", "--endpoint"]).exit_code == 0
    assert "no tokens" in runner.invoke(app, ["token", "list", "--endpoint"]).output


def test_check_says_what_clients_would_see(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "offer.json"
    file.write_text(json.dumps(offer_data(operators=["linear"], decimals=3)))
    done = runner.invoke(app, ["endpoint", str(file), "--check"])
    assert done.exit_code == 0, done.output
    assert "models: base, a0, a1, a2, a3" in done.output
    assert "sets: own (40 items)" in done.output
    assert "scores: items, rounded to 3 decimals" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "base"),
        (["--base", "base"], "nothing to merge"),
        (["--base", "base", "--models", "nowhere", "--check"], "does not exist"),
        (["--base", "adapters/a0", "--models", "adapters", "--check"], "PEFT adapter"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(runner: CliRunner, arguments: list[str], message: str) -> None:
    done = runner.invoke(app, ["endpoint", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.slow
def test_the_command_serves(runner: CliRunner, models: Path, tmp_path: Path) -> None:
    secret = runner.invoke(app, ["token", "create", "alice", "--endpoint"]).stdout.split()[0]
    port = free_port()
    arguments = ["endpoint", "--base", "base", "--models", "adapters", "--port", str(port)]
    with Process(arguments, tmp_path / "home", roots=models) as process:

        def answer() -> httpx.Response | None:
            assert process.popen.poll() is None, process.log.read_text()[-3000:]
            try:
                return httpx.get(
                    f"http://127.0.0.1:{port}/v1/repository", headers={"Authorization": f"Bearer {secret}"}, timeout=10
                )
            except httpx.TransportError:
                return None

        view = until("the endpoint answers", answer).json()
    assert len(view["models"]) == 5
    assert view["uploads"]["heads_needed"] == ["text_classification"]  # classifiers' heads stay their own by default
    assert view["scoring"] == {"scores": "aggregate", "decimals": 4, "min_items": 32}
