"""The command line against a real server; the parts that matter to a shell as real processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

import migrations
from api.cli import app
from api.client import Client
from api.commands.live import LiveJob, describe
from api.store.sql import SqlStore
from api.views import CandidateView, JobSummary, JobView, ValidationView
from optimizer.errors import MergeoptError
from optimizer.fitness.intervals import Interval
from optimizer.ports import Failure, Verification
from optimizer.problem import PlannedPhase
from optimizer.spec import AlgorithmSpec
from tests.api.conftest import Runner, Service, spec_json
from tests.api.test_client import free_port
from tests.factories import make_problem, make_spec

Run = Callable[..., Result]


@pytest.fixture
def run(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command against the server."""
    monkeypatch.setenv("MERGEOPT_URL", service.url)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def invoke(*words: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, list(words), input=stdin)

    return invoke


@pytest.fixture
def spec_file(tmp_path: Path) -> str:
    """A job spec as a file."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(spec_json()))
    return str(path)


def succeed(result: Result) -> str:
    """Return what a command printed, which must have succeeded."""
    assert result.exit_code == 0, result.output
    return result.stdout


def commands() -> dict[str, list[str]]:
    """Return every command with its options, groups written out."""
    out: dict[str, list[str]] = {}

    def walk(command: Any, path: str) -> None:
        for name, child in getattr(command, "commands", {}).items():
            walk(child, f"{path} {name}".strip())
        if not getattr(command, "commands", {}):
            out[path] = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]

    walk(get_command(app), "")
    return out


def test_commands_and_their_options() -> None:
    remote = ["--url", "--token"]
    store = ["--home", "--database-url"]
    assert {name: options for name, options in commands().items() if name not in ("serve", "api", "controller")} == {
        "run": [*store, "--root", "--pool", "--ray-address"],
        "demo": ["--home"],
        "version": [],
        "endpoint": [
            "--models",
            "--base",
            "--host",
            "--port",
            "--home",
            "--root",
            "--public-host",
            "--check",
            "--log-level",
        ],
        "token create": ["--days", "--endpoint", *store],
        "token list": ["--endpoint", *store],
        "token revoke": ["--endpoint", *store],
        "db upgrade": store,
        "db downgrade": store,
        "db current": store,
        "submit": ["--watch", "--json", *remote],
        "validate": ["--json", *remote],
        "list": ["--state", "--name", "--limit", "--json", *remote],
        "show": ["--candidate", "--json", *remote],
        "catalog": ["--json", *remote],
        "watch": remote,
        "pause": remote,
        "resume": ["--requests", "--tokens", "--money", *remote],
        "cancel": remote,
        "delete": remote,
        "clone": ["--changes", "--set", "--watch", "--json", *remote],
        "export": ["--head", "--tokenizer-from", "--as-adapter", "--overwrite", "--wait", *remote],
        "merge": [
            "--root", "--model", "--head", "--tokenizer-from", "--shard-size", "--as-adapter", "--overwrite",
        ],
        "import": ["--out", "--recipe", "--root", "--model", "--overwrite"],
    }  # fmt: skip
    service = [*store, "--root", "--exports-dir", "--pool", "--ray-address", "--max-jobs", "--log-level"]
    assert set(commands()["controller"]) == set(service)
    assert set(commands()["serve"]) == {*service, "--host", "--port", "--public-host", "--require-token"}
    assert set(commands()["api"]) == {
        *store, "--root", "--host", "--port", "--public-host", "--require-token", "--log-level",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", *commands()])
def test_help(name: str) -> None:
    assert "--help" in succeed(CliRunner().invoke(app, [*name.split(), "--help"]))


def test_submit_list_show_and_steer(run: Run, spec_file: str, store: SqlStore) -> None:
    job_id = succeed(run("submit", spec_file)).split()[0]
    assert job_id in succeed(run("list"))
    assert job_id not in succeed(run("list", "--state", "running"))
    assert "two tasks" in succeed(run("show", job_id))
    assert succeed(run("pause", job_id)).split() == [job_id, "paused"]
    assert succeed(run("resume", job_id, "--tokens", "1e6")).split() == [job_id, "queued"]
    Runner(store, job_id)
    assert succeed(run("cancel", job_id)).strip() == f"{job_id} running, will cancel"
    assert run("delete", job_id).exit_code == 2


def test_delete(run: Run, job: JobView, store: SqlStore) -> None:
    succeed(run("delete", job.id))
    assert store.list_jobs().items == []
    assert succeed(run("list")).strip() == "no jobs"


def test_json(run: Run, spec_file: str, job: JobView) -> None:
    submitted = JobView.model_validate_json(succeed(run("submit", spec_file, "--json")))
    listed = [JobSummary.model_validate(item) for item in json.loads(succeed(run("list", "--json")))]
    assert [item.id for item in listed] == [submitted.id, job.id]
    assert json.loads(succeed(run("list", "--json", "--limit", "1")))[0]["id"] == submitted.id
    assert JobView.model_validate_json(succeed(run("show", job.id, "--json"))) == job
    assert CandidateView.model_validate_json(succeed(run("show", job.id, "-c", "2", "--json"))).values == [0.8, 0.2]
    assert ValidationView.model_validate_json(succeed(run("validate", spec_file, "--json"))).variables == 8


def test_catalog(run: Run) -> None:
    algorithms = succeed(run("catalog", "algorithms"))
    assert re.search(r"^nsga2 .*several objectives", algorithms, re.MULTILINE)
    for kind, name in (
        ("spaces", "layer_swap"),
        ("operators", "ties"),
        ("evaluators", "text_classification"),
        ("graders", "exact_match"),
    ):
        assert re.search(rf"^{name} ", succeed(run("catalog", kind)), re.MULTILINE)
        assert name in {entry["name"] for entry in json.loads(succeed(run("catalog", kind, "--json")))}
    assert run("catalog", "colours").exit_code == 2


def test_phases_labels_and_partial_evaluations_are_shown(run: Run, store: SqlStore) -> None:
    phases = [
        PlannedPhase(algorithm=AlgorithmSpec(name="baselines"), evaluations=5, why="to know what to beat"),
        PlannedPhase(algorithm=AlgorithmSpec(name="cma_es", options={"sigma0": 0.1}), evaluations=15, keep_experts=1),
    ]
    job_id = store.create_job(make_spec())[0].id
    lease = store.claim("test", 3600, job_id)
    assert lease is not None
    store.start(lease, make_problem(make_spec()).model_copy(update={"phases": phases}))
    runner = Runner(store, job_id, lease)
    runner.propose(1, label="greedy soup")
    runner.propose(1, phase=1, items=7)
    runner.score(0, 0.5, 0.5)
    runner.score(1, 0.75, 0.25)
    shown = succeed(run("show", job_id))
    assert re.search(r"^1 +baselines +5 +all +to know what to beat", shown, re.MULTILINE)
    assert re.search(r"^2 +cma_es sigma0=0.1 +15 +1", shown, re.MULTILINE)
    assert re.search(r"^0 \(greedy soup\) .* algorithm +1 +0 +completed", shown, re.MULTILINE)
    assert "completed on 7 items" in succeed(run("show", job_id, "--candidate", "1"))
    runner.finish()
    watched = succeed(run("watch", job_id))
    assert "candidate 0 (greedy soup)  language 0.5000  polarity 0.5000  on the front" in watched
    assert "candidate 1  language 0.7500  polarity 0.2500  on 7 items" in watched


def test_show_has_the_front_and_candidates_their_recipes(run: Run, job: JobView) -> None:
    shown = succeed(run("show", job.id))
    assert re.search(r"language +accuracy +maximise +0\.9000", shown)
    assert re.search(r"^2 +0\.8000 +0\.2000 +algorithm", shown, re.MULTILINE)
    assert "operator: task_arithmetic" in succeed(run("show", job.id, "--candidate", "2"))
    assert "infeasible: loss is nan" in succeed(run("show", job.id, "--candidate", "3"))


def test_ids_are_never_broken_so_that_they_can_be_copied(
    run: Run, job: JobView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert job.id in succeed(run("list"))


def test_validate(run: Run, spec_file: str, store: SqlStore) -> None:
    assert "valid: 8 variables, 4 coefficient groups × 2" in succeed(run("validate", spec_file))
    assert store.list_jobs().items == []


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_specs_from_stdin(run: Run, form: str) -> None:
    text = yaml.safe_dump(spec_json()) if form == "yaml" else json.dumps(spec_json())
    succeed(run("validate", "-", stdin=text))


def test_every_problem_of_a_spec_is_printed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(spec_json() | {"name": "", "colour": "red"}))
    result = run("validate", "bad.json")

    assert result.exit_code == 2
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("error: name: String should have at least 1 character (see the")
    assert second.strip() == "colour: Extra inputs are not permitted"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "0000"], "there is no job '0000'"),
        (["submit", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["submit", "list.yaml"], "list.yaml: the file holds no object"),
        (["submit", "broken.yaml"], "broken.yaml: not valid YAML"),
        (["submit", "broken.json"], "broken.json: not a valid JSON document"),
        (["submit", "missing.yaml"], "experts.0: there is no such directory (check the path)"),
        (["clone", "0000", "--set", "budget"], "--set: 'budget' is no change"),
        (["clone", "0000", "--set", "a=1", "--set", "a.b=2"], "--set: a is set twice"),
        (["list", "--token", "wrong"], "the token is wrong or has expired"),
        (["run", "bad_spec.yaml"], "budget.evaluations"),
        (["token", "revoke", "99"], "there is no token 99"),
        (["token", "list", "--database-url", "mysql://x/y"], "database: mysql is not supported"),
        (["db", "upgrade", "nonsense"], "nonsense"),
    ],
)
def test_errors_of_the_user_are_one_clear_line_and_exit_code_2(
    run: Run, tmp_path: Path, words: list[str], says: str
) -> None:
    missing = spec_json()
    missing["experts"][0]["path"] = "missing"
    for name, text in {
        "list.yaml": "[1]",
        "broken.yaml": "a: b: c",
        "broken.json": "{",
        "missing.yaml": yaml.safe_dump(missing),
        "bad_spec.yaml": yaml.safe_dump(spec_json() | {"budget": {"evaluations": 0}}),
    }.items():
        (tmp_path / name).write_text(text)
    result = run(*words)

    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert says in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--url", f"http://127.0.0.1:{free_port()}"],
        ["token", "list", "--database-url", "sqlite:////no/where.db"],
    ],
)
def test_other_errors_exit_with_1(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1


def test_a_setting_that_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEOPT_PORT", "many")
    result = run("list")
    assert result.exit_code == 2
    assert "MERGEOPT_PORT" in result.stderr


def test_clone(run: Run, job: JobView, store: SqlStore, tmp_path: Path) -> None:
    (tmp_path / "changes.yaml").write_text("{name: other, budget: {patience: 4}}")
    printed = succeed(
        run("clone", job.id, "--changes", "changes.yaml", "--set", "budget.evaluations=7", "--set", "seed=5")
    )
    clone = store.get_job(printed.split()[0])

    assert (clone.name, clone.spec["seed"], clone.cloned_from) == ("other", 5, job.id)
    assert clone.spec["budget"] == {
        "evaluations": 7,
        "wall_time_s": None,
        "patience": 4,
        "requests": None,
        "tokens": None,
        "money": None,
    }


def in_background(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("failed", 1), ("cancelled", 1)])
def test_watch_tells_what_happens_until_the_end(
    run: Run, store: SqlStore, queued: JobView, state: str, code: int
) -> None:
    runner = Runner(store, queued.id)

    def drive() -> None:
        runner.score(runner.propose()[0], 0.5, 0.25)
        runner.fail(runner.propose()[0])
        runner.finish(state, "as the test says")

    thread = in_background(drive)
    result = run("watch", queued.id)
    thread.join()

    assert result.exit_code == code, result.output
    assert result.stdout.splitlines() == [
        "job queued",
        "job running",
        "candidate 0  language 0.5000  polarity 0.2500  on the front",
        "candidate 1 failed",
        f"job {state}: as the test says",
    ]


def test_submit_and_watch(run: Run, store: SqlStore, spec_file: str) -> None:
    def drive() -> None:
        while not store.list_jobs().items:
            time.sleep(0.01)
        Runner(store, store.list_jobs().items[0].id).finish()

    thread = in_background(drive)
    printed = succeed(run("submit", spec_file, "--watch"))
    thread.join()
    assert printed.splitlines()[-1] == "job completed"


def test_the_live_table(store: SqlStore, job: JobView) -> None:
    console = Console(force_terminal=True, width=100, record=True, legacy_windows=False)
    with LiveJob(console, store.get_job) as live:
        for event in store.events(job.id, 0):
            live.push(event)
    text = console.export_text()

    assert "two tasks" in text
    assert "5/20" in text
    assert "front 2" in text
    assert re.search(r"polarity +loss +minimise +0\.2000", text)
    assert "candidate 4  language 0.5000  polarity 0.9000" in text


def test_watch_says_on_which_items_the_best_were_measured_anew(store: SqlStore, queued: JobView) -> None:
    runner = Runner(store, queued.id)
    runner.score(*runner.propose(), 0.5, 0.25)
    runner.propose(3)
    store.begin_verification(runner.lease, range(4))
    known = {"language": Interval(0.5, 0.4, 0.6, 200), "polarity": Interval(0.25, 0.2, 0.3, 200)}
    tested = {"language": Interval(0.75, 0.7, 0.8, 100)}
    for verification in (
        Verification(0, search=known),
        Verification(1, search=known, test=tested, overfitted=("language",)),
        Verification(2, test=tested),
        Verification(3, failure=Failure("infeasible", "loss is nan")),
    ):
        store.add_verification(runner.lease, verification)
    names = ["language", "polarity"]
    lines = [describe(event, names) for event in store.events(queued.id, 0)][-5:]

    assert lines == [
        "4 candidates to measure anew",
        "candidate 0 on all items  language 0.5000  polarity 0.2500",
        "candidate 1 on all items  language 0.5000  polarity 0.2500  on test items  language 0.7500  overfitted: language",
        "candidate 2 on test items  language 0.7500",
        "candidate 3 measured anew: failed",
    ]


def test_export(run: Run, job: JobView, store: SqlStore) -> None:
    assert succeed(run("export", job.id, "2", "--head", "polarity")).split()[1] == "queued"
    assert [export.head for export in store.list_exports(job.id)] == ["polarity"]
    assert run("export", job.id, "3").exit_code == 2
    assert "use one of: language, polarity" in run("export", job.id, "2", "--head", "nobody").stderr


@pytest.mark.parametrize("fails", [False, True])
def test_export_and_wait(run: Run, job: JobView, store: SqlStore, fails: bool) -> None:
    def write() -> None:
        while (task := store.claim_export("test", 60)) is None:
            time.sleep(0.01)
        store.update_export(task, state="running", progress=0.5, ttl_s=60)
        if fails:
            error = {"code": "job_failed", "message": "the disk is full"}
            store.update_export(task, state="failed", progress=0.5, ttl_s=60, error=error)
        else:
            store.update_export(task, state="completed", progress=1, ttl_s=60, path="/exports/best")

    thread = in_background(write)
    result = run("export", job.id, "2", "--wait")
    thread.join()
    if fails:
        assert result.exit_code == 1
        assert "the disk is full" in result.stderr
    else:
        assert succeed(result) == "/exports/best\n"


def test_tokens(run: Run, tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"))
    result = run("token", "create", "laptop", "--days", "30", *home)
    secret = succeed(result).strip()
    assert "\n" not in secret
    assert "store it now" in result.stderr

    listed = succeed(run("token", "list", *home))
    assert "laptop" in listed
    assert secret not in listed
    store = SqlStore(f"sqlite:///{tmp_path}/home/mergeopt.db")
    token = store.check_token(secret)
    assert token is not None
    succeed(run("token", "revoke", str(token.id), *home))
    assert store.check_token(secret) is None
    store.close()
    assert succeed(run("token", "list", *home)).strip() == "no tokens"


def test_database(run: Run, tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "new" / "home"))
    succeed(run("db", "upgrade", *home))
    assert succeed(run("db", "current", *home)).strip() == migrations.head()
    succeed(run("db", "downgrade", "base", *home))
    assert succeed(run("db", "current", *home)).strip() == "none"


def mergeopt(*words: str, **env: str) -> subprocess.Popen[str]:
    """Start `mergeopt` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "api.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def test_commands_load_nothing_heavy() -> None:
    code = (
        "import sys, api.cli\n"
        "heavy = {'torch', 'ray', 'transformers', 'fastapi', 'sqlalchemy', 'uvicorn', 'scipy', 'datasets', 'alembic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_service_of_its_own_process(tmp_path: Path) -> None:
    """`mergeopt api` serves, says where, refuses an address without a token, and ends at SIGTERM with a stream open."""
    port = str(free_port())
    env = {"MERGEOPT_HOME": str(tmp_path), "MERGEOPT_URL": f"http://127.0.0.1:{port}"}
    with mergeopt("db", "upgrade", **env) as upgrade:
        upgrade.communicate(timeout=60)
        assert upgrade.returncode == 0
    with mergeopt("api", "--host", "0.0.0.0", "--port", port, **env) as refused:
        _, errors = refused.communicate(timeout=60)
        assert refused.returncode == 2
        assert "mergeopt token create" in " ".join(errors.split())
        assert "Traceback" not in errors

    with mergeopt("api", "--port", port, "--root", str(tmp_path), **env) as server:
        try:
            with Client(env["MERGEOPT_URL"]) as client:
                wait_until_ready(client, server)
                with mergeopt("list", "--json", **env) as listing:
                    assert json.loads(listing.communicate(timeout=60)[0]) == []
                with client._http.stream("GET", "/api/v1/events") as stream:
                    lines = stream.iter_lines()
                    assert next(lines).startswith(":")
                    server.send_signal(signal.SIGTERM)
                    assert [line for line in lines if line.startswith("data")] == []
        finally:
            server.terminate()
        _, errors = server.communicate(timeout=60)
    assert server.returncode in (0, -signal.SIGTERM)
    assert f"http://127.0.0.1:{port}/ui/" in errors
    assert "Traceback" not in errors


def wait_until_ready(client: Client, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None, server.communicate()[1]
        try:
            client.ready()
            return
        except MergeoptError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
