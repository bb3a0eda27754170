"""What all measures have in common that ask services with the same manners: limits, prices, budgets, kept answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.fitness.cost import Cost
from optimizer.recipe import Recipe
from optimizer.spec import Strict
from workers.evaluators.base import Cancelled, Scores, never
from workers.evaluators.service import ServiceEvaluator
from workers.services.client import Answer, Question, ServiceClient
from workers.services.options import Limits, Prices
from workers.services.pointers import kind_of
from workers.services.wire import CalledOff

T = TypeVar("T")

_RESERVED = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding", "content-type", "te"}


class AskingEvaluator(ServiceEvaluator):
    """A measure that asks services by `ServiceClient`."""

    class Options(Strict):
        """Options that all of them have."""

        limits: Limits = Field(default_factory=Limits, description="How fast, how long and how often it is asked.")
        prices: Prices = Field(default_factory=Prices, description="What it charges, for budgets and estimates.")

    def score(self, recipe: Recipe, cancelled: Callable[[], bool] = never) -> Scores:
        """See `ServiceEvaluator.score`; the cost is all that was spent since the last, tries that failed counted."""
        scores = self.ask(recipe, cancelled)
        return Scores(scores, self._inputs.services.meter.take() + Cost(items=scores.cost.items))

    @abstractmethod
    def ask(self, recipe: Recipe, cancelled: Callable[[], bool]) -> Scores:
        """Return the scores of a candidate; of the cost only the items count."""

    def client(self, url: str, path: str) -> ServiceClient:
        """Return who asks the service at a URL; raises `InvalidInput` below ``path`` where it may not be asked."""
        return self._inputs.services.client(url, self.options.limits, self.options.prices, self._inputs.policy, path)


def put(client: ServiceClient, questions: Sequence[Question[T]], cancelled: Callable[[], bool]) -> list[Answer[T]]:
    """Put questions to a service; see `ServiceClient.ask_all`."""
    try:
        return client.ask_all(questions, cancelled)
    except CalledOff:
        raise Cancelled("the evaluation was called off") from None


def check_headers(headers: Mapping[str, str], field: str) -> None:
    """Raise `InvalidInput` where a header is one that the client sets itself."""
    for name in headers:
        if name.lower() in _RESERVED:
            raise InvalidInput(
                f"the header {name} is set by the client", field=f"{field}.{name}", remedy="leave it out"
            )


def number(value: Any, what: str, field: str, low: float | None = None, high: float | None = None) -> float:
    """Return a score that a service gave.

    Args:
        value: what stands in the answer.
        what: which score it is, for errors: ``line 3``.
        field: dotted path of what asks for it.
        low: lowest that makes sense.
        high: highest that makes sense.

    Raises:
        InfeasibleCandidate: it is no number, not finite, or out of range; names the field and the item.
    """
    if not isinstance(value, int | float):
        raise InfeasibleCandidate(f"{what}: the score is {_shown(value)}, no number", field=field)
    found = float(value) if abs(value) < 1e308 else float("inf")
    if not -3e38 < found < 3e38:
        raise InfeasibleCandidate(f"{what}: the score is {value!r:.40}, which is not finite", field=field)
    if low is not None and found < low:
        raise InfeasibleCandidate(f"{what}: the score {found:g} is below {low:g}", field=field)
    if high is not None and found > high:
        raise InfeasibleCandidate(f"{what}: the score {found:g} is above {high:g}", field=field)
    return found


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, str) else kind_of(value)
