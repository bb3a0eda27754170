"""What all measures of one worker share when they ask services."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.merging.cache import Cache
from workers.policy import Policy
from workers.services.client import ServiceClient
from workers.services.meter import Meter
from workers.services.options import Limits, Prices


@dataclass(frozen=True)
class Services:
    """The services that a worker asks.

    Attributes:
        workers: how many workers share the job's limits.
        cache: where answers are kept, for all jobs; in memory by default.
        meter: counts what all of them cost, and stops at the job's budget.
        clients: one for each host and its limits and prices.
    """

    workers: int = 1
    cache: Cache = field(default_factory=lambda: Cache(memory_bytes=256 * 2**20))
    meter: Meter = field(default_factory=Meter)
    clients: dict[str, ServiceClient] = field(default_factory=dict)

    @classmethod
    def of(cls, workers: int, cache: Cache | None) -> Services:
        """Make those of one of so many workers; without a cache, answers are kept in memory."""
        return cls(workers) if cache is None else cls(workers, cache)

    def client(self, url: str, limits: Limits, prices: Prices, policy: Policy, path: str) -> ServiceClient:
        """Return the client for a URL, looked up and checked.

        Args:
            url: any URL of the service.
            limits: of the whole job.
            prices: what it charges.
            policy: which hosts may be asked.
            path: dotted path of the URL in the job, for errors.

        Raises:
            InvalidInput: it may not be asked.
        """
        key = repr((url.split("/")[:3], limits, prices, path))
        if key not in self.clients:
            self.clients[key] = ServiceClient(
                url,
                limits.shared(self.workers),
                policy=policy,
                field=path,
                prices=prices,
                cache=self.cache,
                meter=self.meter,
            )
            self.clients[key].check()
        return self.clients[key]

    def close(self) -> None:
        """Close all connections."""
        for client in self.clients.values():
            client.close()
