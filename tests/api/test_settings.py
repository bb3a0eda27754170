"""Settings: the table, the environment, the defaults that depend on each other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from api.settings import Settings, load_settings, settings_table
from optimizer.errors import InvalidInput


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside."""
    for name in list(os.environ):
        if name.startswith("MERGEOPT_"):
            monkeypatch.delenv(name)


def test_table_lists_every_setting_with_its_default_and_help() -> None:
    table = {name: (default, text) for name, default, text in settings_table()}

    assert {name: default for name, (default, _) in table.items()} == {
        "MERGEOPT_HOME": ".mergeopt",
        "MERGEOPT_DATABASE_URL": "sqlite:///.mergeopt/mergeopt.db",
        "MERGEOPT_ROOTS": ".",
        "MERGEOPT_EXPORTS_DIR": ".mergeopt/exports",
        "MERGEOPT_CACHE_DIR": ".mergeopt/cache",
        "MERGEOPT_CACHE_GB": "100.0",
        "MERGEOPT_HOST": "127.0.0.1",
        "MERGEOPT_PORT": "8756",
        "MERGEOPT_PUBLIC_HOSTS": "",
        "MERGEOPT_REQUIRE_TOKEN": "auto",
        "MERGEOPT_MAX_BODY_BYTES": "1048576",
        "MERGEOPT_POOL": "ray",
        "MERGEOPT_RAY_ADDRESS": "",
        "MERGEOPT_ENTRY_POINTS": "",
        "MERGEOPT_TASK_CODE": "False",
        "MERGEOPT_CODE_EXECUTION": "False",
        "MERGEOPT_HOSTS": "",
        "MERGEOPT_PRIVATE_HOSTS": "False",
        "MERGEOPT_SECRETS_DIR": "",
        "MERGEOPT_MAX_JOBS": "1",
        "MERGEOPT_LEASE_TTL_S": "30.0",
        "MERGEOPT_POLL_S": "0.2",
        "MERGEOPT_LOG_LEVEL": "info",
        "MERGEOPT_URL": "http://127.0.0.1:8756",
        "MERGEOPT_TOKEN": "",
    }
    assert all(text.endswith(".") for _, text in table.values())


def test_paths_are_absolute_and_follow_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(home=Path("here"))

    assert settings.home == tmp_path / "here"
    assert settings.database_url == f"sqlite:///{tmp_path}/here/mergeopt.db"
    assert settings.exports_dir == tmp_path / "here" / "exports"
    assert settings.cache_dir == tmp_path / "here" / "cache"
    assert settings.roots == [tmp_path]


@pytest.mark.parametrize("separator", [",", os.pathsep, f" {os.pathsep} ", ", "])
def test_roots_from_the_environment(separator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_ROOTS", f"/models{separator}/data")

    assert load_settings().roots == [Path("/models"), Path("/data")]


def test_the_environment_is_read_and_options_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_PORT", "9000")
    monkeypatch.setenv("MERGEOPT_PUBLIC_HOSTS", "merge.example.org, other.example.org")
    monkeypatch.setenv("MERGEOPT_HOST", "")

    settings = load_settings(max_jobs=3, home=None)
    assert (settings.port, settings.max_jobs, settings.host) == (9000, 3, "127.0.0.1")
    assert settings.public_hosts == ["merge.example.org", "other.example.org"]
    assert load_settings(port=1234).port == 1234


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "many"), ("PORT", "70000"), ("POOL", "dask"), ("ROOTS", " , "), ("LEASE_TTL_S", "0"), ("LOG_LEVEL", "x")],
)
def test_a_wrong_value_names_its_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MERGEOPT_{name}", value)

    with pytest.raises(InvalidInput) as caught:
        load_settings()
    assert caught.value.field == f"MERGEOPT_{name}"


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_TOKEN", "mo_secret")
    monkeypatch.setenv("MERGEOPT_DATABASE_URL", "postgresql://me:hunter2@db/mergeopt")

    shown = repr(Settings())
    assert "mo_secret" not in shown
    assert "hunter2" not in shown
