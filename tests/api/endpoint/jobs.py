"""Jobs over somebody else's models, and the same jobs over the models themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from api.store.sql import SqlStore
from api.views import JobView
from optimizer.controller import Controller, ControllerConfig
from optimizer.ports import PoolFactory
from optimizer.spec import JobSpec, parse_spec
from tests.durability.rows import Rows, history
from workers.policy import Policy
from workers.pool import LocalPoolFactory, RayPoolFactory

SECRET = "owner"


def job(url: str, **changes: Any) -> JobSpec:
    """An Evo-Merging job over an endpoint, measured on uploaded items."""
    data: dict[str, Any] = {
        "endpoint": {"url": url, "token": SECRET},
        "merge": {"operator": "lora_factors"},
        "objectives": [
            {
                "name": "query",
                "evaluator": "text_classification",
                "data": {"path": "query.jsonl"},
                "metric": "loss",
            }
        ],
        "algorithm": {"name": "evo_merging", "options": {"population": 6}},
        "budget": {"evaluations": 24},
        "seed": 5,
    }
    return parse_spec(data | changes)


def local(spec: JobSpec, models: Path) -> JobSpec:
    """The same job with the models at hand."""
    experts = [{"name": path.name, "path": str(path)} for path in sorted((models / "adapters").iterdir())]
    data = spec.model_dump(mode="json", exclude={"endpoint"}, exclude_unset=True)
    data["merge"] = data["merge"] | {"heads": []}
    return parse_spec(data | {"base": "base", "experts": experts})


def allowing(port: int) -> Policy:
    """A policy that lets jobs ask an endpoint on this machine."""
    return Policy(hosts=(f"127.0.0.1:{port}",), private_hosts=True)


class Client:
    """The side that searches: a store, and a controller for one turn at a job.

    Args:
        url: of its database.
        root: where its data are.
        policy: what its jobs may do.
        ray: whether its workers are those of a Ray cluster.
    """

    def __init__(self, url: str, root: Path, policy: Policy, *, ray: bool = False) -> None:
        self.url = url
        self.store = SqlStore(url)
        self._pools: PoolFactory = (RayPoolFactory if ray else LocalPoolFactory)([root], policy=policy)
        self.controller = Controller(self.store, self._pools, ControllerConfig("test", poll_s=0.01, retry_s=0.01))

    def submit(self, spec: JobSpec) -> str:
        """Record a job."""
        return self.store.create_job(spec)[0].id

    def turn(self, job_id: str) -> JobView:
        """Run a job until it ends, or pauses."""
        while self.store.get_job(job_id).state in ("queued", "running"):
            assert self.controller.run_next(job_id)
        return self.store.get_job(job_id)

    def run(self, spec: JobSpec) -> tuple[JobView, Rows]:
        """Run a job; returns it and its candidates."""
        job_id = self.submit(spec)
        return self.turn(job_id), self.rows(job_id)

    def rows(self, job_id: str) -> Rows:
        """All candidates with genomes and scores, bit for bit; without fingerprints, which name models by their ids."""
        return [row[:5] + row[6:] for row in history(self.url, job_id)]

    def close(self) -> None:
        """Close the store."""
        self._pools.close()
        self.store.close()
