"""Clients and questions for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from optimizer.errors import InfeasibleCandidate
from tests.workers.services.server import Server
from workers.merging.cache import Cache
from workers.policy import Policy
from workers.services.addresses import Resolver, system_resolver
from workers.services.client import BadAnswer, Question, Reading, ServiceClient
from workers.services.options import Limits, Prices
from workers.services.pace import SYSTEM, Clock
from workers.services.requests import Request

FIELD = "objectives.0.options.url"


def client(
    server: Server,
    *,
    clock: Clock = SYSTEM,
    resolver: Resolver | None = None,
    cache: Cache | None = None,
    prices: Prices | None = None,
    policy: Policy | None = None,
    url: str | None = None,
    **limits: Any,
) -> ServiceClient:
    """Return a client that may ask the server on loopback."""
    allowed = policy or Policy(hosts=(f"127.0.0.1:{server.port}",), private_hosts=True)
    return ServiceClient(
        url or server.url,
        Limits(**limits),
        policy=allowed,
        field=FIELD,
        clock=clock,
        rng=random.Random(0),
        cache=cache,
        prices=prices,
        resolver=resolver or system_resolver,
    )


def read_score(data: Any) -> Reading[float]:
    """Read ``score`` and the tokens in ``usage``."""
    if not isinstance(data, dict) or "score" not in data:
        raise BadAnswer("there is no score")
    if not isinstance(data["score"], float):
        raise InfeasibleCandidate("the score is no number", field=FIELD)
    usage = data.get("usage", {})
    return Reading(data["score"], usage.get("in", 0), usage.get("out", 0))


def question(server: Server, number: int = 0, url: Any = None, **changes: Any) -> Question[float]:
    """Return a question that differs from those of other numbers."""
    request = Request("POST", url or f"{server.url}/score", body={"number": number}, **changes)
    return Question(request, read_score, tokens_in=10, tokens_out=5)


def questions(server: Server, count: int) -> Sequence[Question[float]]:
    return [question(server, number) for number in range(count)]
