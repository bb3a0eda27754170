"""What the endpoint does for a client, step by step: each step checked, limited, charged and recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from api.endpoint.audit import Audit
from api.endpoint.evaluations import Evaluation, Evaluations, Outcome
from api.endpoint.limits import RateLimit
from api.endpoint.repository import QuerySet, Repository
from api.endpoint.sessions import Session, Sessions
from api.endpoint.store import EndpointStore
from optimizer.errors import InvalidInput, MergeoptError, NotFound, NotOffered, TooManyRequests
from optimizer.geometry import Cuts
from optimizer.problem import Grams
from workers.endpoint.protocol import (
    CandidateUpload,
    CandidateView,
    EvaluationRequest,
    EvaluationView,
    Part,
    RepositoryView,
    SessionView,
    SetUpload,
    SetView,
)

log = logging.getLogger(__name__)

AUDIT_LOG = "audit.jsonl"


@dataclass(frozen=True)
class Caller:
    """Who asks: a token's number and name."""

    id: int
    name: str


class Desk:
    """Serves clients of a repository. Safe to use from several threads.

    Args:
        repository: the models.
        store: tokens, charges and results.
        home: where the audit log is.
    """

    def __init__(self, repository: Repository, store: EndpointStore, home: Path) -> None:
        offer = repository.offer
        self.repository = repository
        self.store = store
        self.limits = offer.limits
        self.audit = Audit(home / AUDIT_LOG)
        self.rate = RateLimit(offer.limits.requests_per_minute)
        self._sessions = Sessions(offer.limits, offer.uploads.sets if offer.uploads else 0)
        self._evaluations = Evaluations(repository, store, self._computed)

    def close(self) -> None:
        """Stop computing."""
        self._evaluations.close()

    def describe(self, caller: Caller) -> RepositoryView:
        """Return what is offered."""
        return self.repository.describe(self.store.usage(caller.id))

    def grams(self, caller: Caller, cuts: Cuts) -> Grams:
        """Return inner products of the models; raises `NotOffered`."""
        found = self.repository.grams(cuts)
        self.audit.write("grams", token=caller.id, name=caller.name, cuts=cuts)
        return found

    def open_session(self, caller: Caller) -> SessionView:
        """Open a session; raises `TooManyRequests`."""
        made = self._sessions.open(caller.id)
        self._record("session.open", caller, made)
        return self._sessions.view(made)

    def session(self, caller: Caller, number: str) -> SessionView:
        """Return a session; raises `Gone`."""
        return self._sessions.view(self._sessions.get(number, caller.id))

    def close_session(self, caller: Caller, number: str) -> None:
        """Close a session and call off what is under way in it; raises `Gone`."""
        session = self._sessions.get(number, caller.id)
        for evaluation in session.evaluations.values():
            self._evaluations.cancel(evaluation, session.id)
        self._sessions.close(session)
        self._record("session.close", caller, session)

    def upload(self, caller: Caller, number: str, upload: SetUpload) -> SetView:
        """Read a query set; raises `Gone`, `NotOffered`, `InvalidInput`."""
        session = self._sessions.get(number, caller.id)
        with self._refusals("set.refused", caller, session):
            self._sessions.check_room(session)
            found = self.repository.upload(upload)
        self._record("set.upload", caller, session, set=found.view.digest, items=found.view.items)
        self._sessions.add_set(session, found)
        return found.view

    def materialise(self, caller: Caller, number: str, upload: CandidateUpload) -> CandidateView:
        """Check a recipe and keep it; raises `Gone`, `NotOffered`, `InvalidInput`, `Conflict`."""
        session = self._sessions.get(number, caller.id)
        with self._refusals("candidate.refused", caller, session):
            fingerprint, recipe = self.repository.candidate(upload.recipe)
        if fingerprint not in session.candidates:
            self._record("candidate.materialise", caller, session, candidate=fingerprint)
        self._sessions.add_candidate(session, fingerprint, recipe)
        return CandidateView(fingerprint=fingerprint)

    def evaluate(self, caller: Caller, number: str, request: EvaluationRequest) -> Evaluation:
        """Begin an evaluation, or return one that is known already.

        Raises:
            Gone: the session has ended.
            NotFound: it has no such candidate or set.
            InvalidInput, NotOffered: positions outside the set, or too few.
            QuotaExhausted: the token may not spend that much; nothing is charged.
            TooManyRequests: too many evaluations are under way.
        """
        session = self._sessions.get(number, caller.id)
        with self._refusals("evaluation.refused", caller, session, candidate=request.candidate):
            recipe = self._sessions.candidate(session, request.candidate)
            parts = [(self._set(session, part, n), part.items) for n, part in enumerate(request.parts)]
            for n, (found, items) in enumerate(parts):
                self._check_items(found, items, f"parts.{n}.items")
            name, keys = self._evaluations.name(request.candidate, parts)
            if len(keys) < len(parts):
                raise InvalidInput("the same items of the same set are asked for twice", field="parts")
            if name in session.evaluations and not session.evaluations[name].over:
                return session.evaluations[name]
            if self._sessions.under_way(caller.id) >= self.limits.in_flight:
                raise TooManyRequests(
                    f"{self.limits.in_flight} evaluations are under way", remedy="wait for one of them"
                )
            self.store.charge(caller.id, keys, self.limits)
        self._record(
            "evaluation.begin",
            caller,
            session,
            candidate=request.candidate,
            sets=[found.view.digest for found, _ in parts],
            items=sum(keys.values()),
        )
        evaluation = self._evaluations.submit(session.id, request.candidate, recipe, parts)
        self._sessions.add_evaluation(session, evaluation)
        return evaluation

    def evaluation(self, caller: Caller, number: str, evaluation: str) -> Evaluation:
        """Return an evaluation of a session; raises `Gone`, `NotFound`."""
        session = self._sessions.get(number, caller.id)
        found = session.evaluations.get(evaluation)
        if found is None:
            raise NotFound("the session has no such evaluation", field="evaluation", remedy="ask for it again")
        return found

    def cancel(self, caller: Caller, number: str, evaluation: str) -> None:
        """Call an evaluation off; raises `Gone`, `NotFound`."""
        found = self.evaluation(caller, number, evaluation)
        session = self._sessions.get(number, caller.id)
        self._evaluations.cancel(found, session.id)
        self._sessions.drop_evaluation(session, found)

    def view(self, evaluation: Evaluation) -> EvaluationView:
        """Return what clients see of an evaluation."""
        offer = self.repository.offer
        return evaluation.view(offer.scores == "items", offer.decimals)

    def _set(self, session: Session, part: Part, number: int) -> QuerySet:
        found = session.sets.get(part.set) or self.repository.own.get(part.set)
        if found is None:
            raise NotFound(
                f"there is no set {part.set!r}", field=f"parts.{number}.set", remedy="upload it, or see the repository"
            )
        return found

    def _check_items(self, found: QuerySet, items: Sequence[int] | None, field: str) -> None:
        if items is None:
            return
        if len(set(items)) != len(items) or min(items) < 0 or max(items) >= found.view.items:
            raise InvalidInput(f"the positions must be different ones from 0 to {found.view.items - 1}", field=field)
        if len(items) < min(self.repository.offer.min_items, found.view.items):
            raise NotOffered(
                f"{len(items)} items are too few",
                field=field,
                remedy=f"ask for {self.repository.offer.min_items} or more",
            )

    def _record(self, action: str, caller: Caller, session: Session, **entry: object) -> None:
        self.audit.write(action, token=caller.id, name=caller.name, session=_short(session), **entry)

    def _refusals(self, action: str, caller: Caller, session: Session, **entry: object) -> _Refusals:
        return _Refusals(lambda code: self._record(action, caller, session, code=code, **entry))

    def _computed(self, candidate: str, found: QuerySet, items: int, outcome: Outcome) -> None:
        failure = outcome.failure.code if outcome.failure is not None else None
        cost = {name: value for name, value in outcome.cost.model_dump().items() if value}
        try:
            self.audit.write(
                "evaluation.computed", candidate=candidate, set=found.view.digest, items=items, cost=cost, code=failure
            )
        except MergeoptError:  # what was asked for is recorded already
            log.exception("the audit log lacks an evaluation")


class _Refusals:
    """Records why what the block does was refused."""

    def __init__(self, record: Callable[[str], None]) -> None:
        self._record = record

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MergeoptError):
            self._record(error.code)


def _short(session: Session) -> str:
    """Enough to tell sessions apart; the whole id would let readers of the log use them."""
    return session.id[:8]
