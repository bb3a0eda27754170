"""Sessions: the query sets and candidates of one client, in memory, until they are not used for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock

from api.endpoint.evaluations import Evaluation
from api.endpoint.limits import Limits
from api.endpoint.repository import QuerySet
from optimizer.errors import Gone, NotFound, NotOffered, TooManyRequests
from optimizer.recipe import Recipe
from workers.endpoint.protocol import SessionView

REMEMBERED = 1000
"""Evaluations of a session that are over and can still be asked for by their id; their results are kept much longer."""


@dataclass
class Session:
    """What one client has sent.

    Attributes:
        token: whose it is.
        used: when it was last used, by the clock of `Sessions`.
        sets: uploaded ones by digest.
        candidates: recipes over the models themselves by fingerprint, the oldest first.
        evaluations: those that were asked for by id, the oldest first.
    """

    id: str
    token: int
    used: float
    sets: dict[str, QuerySet] = field(default_factory=dict)
    candidates: OrderedDict[str, Recipe] = field(default_factory=OrderedDict)
    evaluations: OrderedDict[str, Evaluation] = field(default_factory=OrderedDict)

    @property
    def under_way(self) -> int:
        """Number of evaluations that are not over."""
        return sum(not evaluation.over for evaluation in self.evaluations.values())


class Sessions:
    """All sessions; safe to use from several threads.

    Args:
        limits: of each token.
        most_sets: in a session.
        clock: seconds, from any origin.
    """

    def __init__(self, limits: Limits, most_sets: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._most_sets = most_sets
        self._clock = clock
        self._open: dict[str, Session] = {}
        self._lock = Lock()

    def open(self, token: int) -> Session:
        """Open a session; the one of that token that was unused for longest makes room if there are too many.

        Raises:
            TooManyRequests: there are, and evaluations are under way in each of them.
        """
        with self._lock:
            self._sweep()
            own = sorted((found for found in self._open.values() if found.token == token), key=lambda found: found.used)
            if len(own) >= self._limits.sessions:
                idle = next((found for found in own if not found.under_way), None)
                if idle is None:
                    raise TooManyRequests(
                        f"{self._limits.sessions} sessions are open and busy", remedy="close one of them"
                    )
                del self._open[idle.id]
            made = Session(secrets.token_urlsafe(24), token, self._clock())
            self._open[made.id] = made
            return made

    def get(self, number: str, token: int) -> Session:
        """Return an open session and count it as used; raises `Gone` if there is none of that token under this id."""
        with self._lock:
            self._sweep()
            found = self._open.get(number)
            if found is None or found.token != token:
                raise Gone("the session has ended, or there never was one", field="session", remedy="open another one")
            found.used = self._clock()
            return found

    def close(self, session: Session) -> None:
        """End a session."""
        with self._lock:
            self._open.pop(session.id, None)

    def view(self, session: Session) -> SessionView:
        """Return what the client sees of it."""
        left = self._limits.session_ttl_s - (self._clock() - session.used)
        return SessionView(
            id=session.id,
            expires_at=datetime.now(UTC) + timedelta(seconds=left),
            sets=[found.view for found in session.sets.values()],
            candidates=len(session.candidates),
        )

    def check_room(self, session: Session) -> None:
        """Raise `NotOffered` if the session has as many sets as it may have."""
        if len(session.sets) >= self._most_sets:
            raise NotOffered(
                f"a session has at most {self._most_sets} sets", field="set", remedy="open another session"
            )

    def add_set(self, session: Session, found: QuerySet) -> None:
        """Keep an uploaded set."""
        with self._lock:
            session.sets[found.view.digest] = found

    def add_candidate(self, session: Session, fingerprint: str, recipe: Recipe) -> None:
        """Keep a candidate; the oldest goes where there are too many."""
        with self._lock:
            session.candidates[fingerprint] = recipe
            session.candidates.move_to_end(fingerprint)
            while len(session.candidates) > self._limits.candidates:
                session.candidates.popitem(last=False)

    def add_evaluation(self, session: Session, evaluation: Evaluation) -> None:
        """Take note of an evaluation that the session asked for."""
        with self._lock:
            session.evaluations[evaluation.id] = evaluation
            session.evaluations.move_to_end(evaluation.id)
            over = [number for number, known in session.evaluations.items() if known.over]
            for number in over[: max(0, len(session.evaluations) - REMEMBERED)]:
                del session.evaluations[number]

    def candidate(self, session: Session, fingerprint: str) -> Recipe:
        """Return a materialised candidate; raises `NotFound`."""
        with self._lock:
            found = session.candidates.get(fingerprint)
        if found is None:
            raise NotFound("the session has no such candidate", field="candidate", remedy="materialise it first")
        return found

    def under_way(self, token: int) -> int:
        """Return how many evaluations of a token are not over."""
        with self._lock:
            return sum(found.under_way for found in self._open.values() if found.token == token)

    def drop_evaluation(self, session: Session, evaluation: Evaluation) -> None:
        """Forget an evaluation that was called off."""
        with self._lock:
            session.evaluations.pop(evaluation.id, None)

    def _sweep(self) -> None:
        """Drop sessions that were not used for too long; those with evaluations under way are in use."""
        now = self._clock()
        for found in list(self._open.values()):
            if found.under_way:
                found.used = now
            elif now - found.used > self._limits.session_ttl_s:
                del self._open[found.id]
