"""API, two controllers, PostgreSQL and a two-node Ray cluster as separate processes; a controller and a node are killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.durability.rows import history
from tests.jobs import write_job
from tests.service import Process, Service, serving, until

pytestmark = [pytest.mark.ray, pytest.mark.postgres, pytest.mark.timeout(600)]

EVALUATIONS = 60


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A Ray cluster that notices a dead node within two seconds; its head has one CPU."""
    fast = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 3,
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": fast},
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_job_survives_its_controller_and_one_of_two_nodes(
    cluster: Cluster, postgres_url: str, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    job = write_job(root, items=1500, budget={"evaluations": EVALUATIONS}, workers={"count": 2})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    apart = {"database_url": postgres_url, "ray_address": cluster.address, "lease_ttl_s": 2}

    def controller(name: str) -> Process:
        return Process(["controller"], tmp_path / name, roots=root, **apart)

    with Service(tmp_path / "api", root, "api", **apart) as api, controller("first") as first:
        client = api.wait_ready()
        job_id = client.submit(job).id

        def done() -> int:
            return client.get_job(job_id).progress.completed

        def workers() -> set[str]:
            return {client.get_candidate(job_id, c.index).worker for c in client.candidates(job_id, state="completed")}

        until("both nodes have worked", lambda: len(workers()) == 2)
        with controller("second"):
            first.kill()
            before = done()
            until("the second controller goes on", lambda: done() > before)
            cluster.remove_node(second, allow_graceful=False)
            finished = client.wait(job_id)
        assert (finished.state, finished.progress.completed) == ("completed", EVALUATIONS)

    with serving(tmp_path / "whole", root, pool="local") as whole_client:
        whole = whole_client.wait(whole_client.submit(job).id)
    assert history(postgres_url, job_id) == history(f"sqlite:///{tmp_path / 'whole'}/mergeopt.db", whole.id)
