"""What a job says about how a service may be asked, and what it charges."""

from __future__ import annotations

import math

from pydantic import Field

from optimizer.fitness.cost import Cost
from optimizer.spec import Strict


class Limits(Strict):
    """How fast, how long and how often a service is asked. Rates and concurrency are those of the whole job."""

    concurrency: int = Field(default=8, ge=1, le=1024, description="Most requests under way at once.")
    requests_per_minute: float | None = Field(default=None, gt=0, le=1e7, description="Most requests a minute.")
    tokens_per_minute: float | None = Field(default=None, gt=0, le=1e10, description="Most tokens a minute.")
    connect_s: float = Field(default=10, gt=0, le=600, description="Longest wait for a connection, in seconds.")
    read_s: float = Field(default=60, gt=0, le=3600, description="Longest silence of a service, in seconds.")
    total_s: float = Field(default=300, gt=0, le=86400, description="Longest time of one try, in seconds.")
    attempts: int = Field(default=8, ge=1, le=50, description="Tries for a request, waiting longer after each.")
    backoff_s: float = Field(
        default=1, gt=0, le=60, description="Longest wait after the first try, in seconds; it doubles with each."
    )
    longest_wait_s: float = Field(
        default=60,
        gt=0,
        le=3600,
        description="Longest wait between tries, in seconds; a service that asks for a longer one pauses the job.",
    )
    breaker: int = Field(
        default=6,
        ge=1,
        le=1000,
        description=(
            "Evaluations in a row, repeated ones counted, to which the service has no usable answer, that pause the job. "
            "A service that cannot be reached, or says that it is busy in each of the `attempts`, pauses it at once."
        ),
    )
    refusals: int = Field(
        default=20,
        ge=1,
        le=10_000,
        description="Evaluations in a row that the service refuses as wrong, that pause the job.",
    )
    max_response_bytes: int = Field(default=16 * 2**20, ge=1, le=2**30, description="Largest answer, in bytes.")
    keep_alive: bool = Field(
        default=False,
        description=(
            "Use a connection for several requests. It saves a handshake each; but a service that answers a request "
            "twice is then taken to have answered the next one."
        ),
    )

    def shared(self, workers: int) -> Limits:
        """Return the part of one of so many workers, so that all together keep the limits where that is possible."""
        requests, tokens = self.requests_per_minute, self.tokens_per_minute
        return self.model_copy(
            update={
                "concurrency": max(1, self.concurrency // workers),
                "requests_per_minute": None if requests is None else requests / workers,
                "tokens_per_minute": None if tokens is None else tokens / workers,
            }
        )


class Prices(Strict):
    """What a service charges, in a currency of the user's choice; budgets of money are in the same."""

    per_request: float = Field(default=0, ge=0, description="For each request.")
    per_million_input_tokens: float = Field(default=0, ge=0, description="For a million tokens that it reads.")
    per_million_output_tokens: float = Field(default=0, ge=0, description="For a million tokens that it writes.")

    def cost(self, tokens_in: float, tokens_out: float, requests: float = 1.0) -> Cost:
        """Return what requests cost together."""
        money = math.fsum(
            (
                self.per_request * requests,
                self.per_million_input_tokens * tokens_in / 1e6,
                self.per_million_output_tokens * tokens_out / 1e6,
            )
        )
        return Cost(tokens=tokens_in + tokens_out, requests=requests, money=money)
