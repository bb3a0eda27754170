"""Evaluations under way: queued, merged and scored by a few threads, each thing computed once, whoever asks for it."""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from api.endpoint.repository import QuerySet, Repository, Scorer
from optimizer.errors import InfeasibleCandidate, InputsChanged, MergeoptError, RetryableError, UserError
from optimizer.recipe import Recipe, canonical_json
from workers.endpoint.protocol import (
    CostView,
    EvaluationView,
    FailureView,
    MetricScores,
    PartView,
    State,
    read_scores,
    write_scores,
)

log = logging.getLogger(__name__)

REMEMBERED = 1000
"""Evaluations that are over and can still be asked for by their id; their results are kept much longer."""


Parts = Sequence[tuple[QuerySet, Sequence[int] | None]]
"""Sets to evaluate on, each with positions in it, or None for all items. No set with the same positions twice."""

Done = Callable[[str, QuerySet, int, "Outcome"], None]


class Results(Protocol):
    """Where results outlive the process."""

    def result(self, key: str) -> dict[str, Any] | None:
        """Return a result, or None."""
        ...

    def add_result(self, key: str, data: Mapping[str, Any]) -> None:
        """Keep a result; the first one of a key stays."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What came of one candidate on one set or a part of it: scores by metric, complete and unrounded, or a failure.

    Attributes:
        lasting: whether computing it again would give the same.
    """

    scores: Mapping[str, MetricScores] | None = None
    failure: FailureView | None = None
    cost: CostView = field(default_factory=CostView)
    lasting: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return it as it is kept."""
        if self.failure is not None:
            return {"failure": self.failure.model_dump()}
        return {"scores": {metric: found.model_dump() for metric, found in (self.scores or {}).items()}}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Outcome:
        """Return what `to_json` wrote; it costs nothing again."""
        if "failure" in data:
            return cls(failure=FailureView.model_validate(data["failure"]))
        return cls({metric: MetricScores.model_validate(found) for metric, found in data["scores"].items()})


@dataclass
class _Piece:
    """A candidate on a set or a part of one, computed once for all evaluations that contain it."""

    key: str
    found: QuerySet
    items: tuple[int, ...] | None
    future: Future[Outcome] = field(default_factory=Future)
    wanted: int = 0
    running: bool = False

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # those who wait for it cannot cancel it

    @property
    def count(self) -> int:
        """Number of items."""
        return len(self.found.evaluator) if self.items is None else len(self.items)


@dataclass
class Evaluation:
    """An evaluation that somebody asked for.

    Attributes:
        id: the same for the same candidate, sets and items.
        candidate: its fingerprint.
        askers: who waits for it; it is called off when nobody does any more.
    """

    id: str
    candidate: str
    pieces: list[_Piece]
    fresh: list[_Piece]  # those that are computed for it
    askers: set[str] = field(default_factory=set)

    @property
    def over(self) -> bool:
        """Whether nothing more will come of it."""
        return not self.askers or all(piece.future.done() for piece in self.pieces)

    @property
    def futures(self) -> list[Future[Outcome]]:
        """What it waits for."""
        return [piece.future for piece in self.pieces]

    def view(self, keep_items: bool, decimals: int | None) -> EvaluationView:
        """Return what the client sees of it.

        Args:
            keep_items: whether scores of single items are given out.
            decimals: to which scores are rounded.
        """
        outcomes = [piece.future.result() for piece in self.pieces if piece.future.done()]
        failure = next((outcome.failure for outcome in outcomes if outcome.failure is not None), None)
        state = self._state(failure)
        parts = None
        if state == "done":
            parts = [_part(piece, keep_items, decimals) for piece in self.pieces]
        return EvaluationView(
            id=self.id, candidate=self.candidate, state=state, parts=parts, failure=failure, cost=self.cost
        )

    @property
    def cost(self) -> CostView:
        """What was computed for it so far."""
        found = [piece.future.result().cost for piece in self.fresh if piece.future.done()]
        return CostView(
            items=sum(cost.items for cost in found),
            tokens=sum(cost.tokens for cost in found),
            seconds=round(sum(cost.seconds for cost in found), 6),
        )

    def _state(self, failure: FailureView | None) -> State:
        if all(piece.future.done() for piece in self.pieces):
            return "failed" if failure is not None else "done"
        if not self.askers:
            return "cancelled"
        return "running" if any(piece.running for piece in self.pieces) else "queued"


def _part(piece: _Piece, keep_items: bool, decimals: int | None) -> PartView:
    scores = {
        metric: write_scores(read_scores(found), keep_items, decimals)
        for metric, found in (piece.future.result().scores or {}).items()
    }
    view = piece.found.view
    return PartView(set=view.name, digest=view.digest, items=piece.count, scores=scores)


class Evaluations:
    """Computes evaluations with one thread for each merged model in memory.

    Args:
        repository: the models.
        results: where results are kept.
        done: called with a candidate's fingerprint, a set and what came of it, whenever something was computed.
    """

    def __init__(self, repository: Repository, results: Results, done: Done = lambda *_: None) -> None:
        self._repository = repository
        self._results = results
        self._done = done
        self._timeout_s = repository.offer.workers.timeout_s
        self._queue: queue.SimpleQueue[tuple[str, Recipe, list[_Piece]] | None] = queue.SimpleQueue()
        self._pieces: dict[str, _Piece] = {}  # those under way
        self._known: OrderedDict[str, Evaluation] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"scorer-{number}", daemon=True)
            for number in range(repository.offer.workers.count)
        ]
        for thread in self._threads:
            thread.start()

    def name(self, fingerprint: str, parts: Parts) -> tuple[str, dict[str, int]]:
        """Return the id of an evaluation, and what its results are known by, each with its number of items."""
        keys = {
            self._repository.result_key(fingerprint, found, items): len(found.evaluator if items is None else items)
            for found, items in parts
        }
        return hashlib.sha256(canonical_json([fingerprint, list(keys)]).encode()).hexdigest(), keys

    def submit(self, asker: str, fingerprint: str, recipe: Recipe, parts: Parts) -> Evaluation:
        """Return the evaluation of a candidate on sets or parts of them: a known one, or one that is queued now.

        Args:
            asker: who waits for it.
            fingerprint: of the candidate as clients know it.
            recipe: the candidate over the models themselves.
            parts: sets, each with positions or None for all items.
        """
        number, keys = self.name(fingerprint, parts)
        kept = {key: self._results.result(key) for key in keys}
        with self._lock:
            known = self._known.get(number)
            if known is not None and _lasts(known):
                known.askers.add(asker)
                return known
            made = self._make(number, fingerprint, dict(zip(keys, parts, strict=True)), asker)
        missing = []
        for piece in made.fresh:
            data = kept[piece.key]
            if data is None:
                missing.append(piece)
            else:
                self._finish(piece, Outcome.of(data))
        if missing:
            self._queue.put((fingerprint, recipe, missing))
        return made

    def _make(
        self, number: str, fingerprint: str, parts: Mapping[str, tuple[QuerySet, Sequence[int] | None]], asker: str
    ) -> Evaluation:
        made = Evaluation(number, fingerprint, [], [], {asker})
        for key, (found, items) in parts.items():
            if key not in self._pieces:
                self._pieces[key] = _Piece(key, found, None if items is None else tuple(items))
                made.fresh.append(self._pieces[key])
            made.pieces.append(self._pieces[key])
            self._pieces[key].wanted += 1
        self._known[number] = made
        self._known.move_to_end(number)
        over = [name for name, known in self._known.items() if known.over]
        for name in over[: max(0, len(self._known) - REMEMBERED)]:
            del self._known[name]
        return made

    def cancel(self, evaluation: Evaluation, asker: str) -> None:
        """Somebody no longer waits for an evaluation; what nobody waits for is not computed."""
        with self._lock:
            if evaluation.over or asker not in evaluation.askers:
                return
            evaluation.askers.discard(asker)
            if not evaluation.askers:
                for piece in evaluation.pieces:
                    piece.wanted -= 1

    def close(self) -> None:
        """Stop within a batch of what is being computed; what is not done is done again when somebody asks for it."""
        self._closed.set()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        torch.set_num_threads(max(1, int(self._repository.offer.workers.cpus)))
        scorer = self._repository.scorer()
        while (work := self._queue.get()) is not None and not self._closed.is_set():
            fingerprint, recipe, pieces = work
            for piece in pieces:
                piece.running = True
                outcome = self._compute(scorer, fingerprint, recipe, piece)
                self._done(fingerprint, piece.found, piece.count, outcome)
                self._finish(piece, outcome)

    def _compute(self, scorer: Scorer, fingerprint: str, recipe: Recipe, piece: _Piece) -> Outcome:
        kept = self._results.result(piece.key)  # it may have come since it was asked for
        if kept is not None:
            return Outcome.of(kept)
        began = time.perf_counter()
        deadline = time.monotonic() + self._timeout_s

        def called_off() -> bool:
            return self._closed.is_set() or piece.wanted <= 0 or time.monotonic() > deadline

        outcome = _attempt(scorer, fingerprint, recipe, piece, called_off)
        if outcome.failure is not None and outcome.failure.code == "cancelled" and time.monotonic() > deadline:
            message = f"the evaluation took longer than {self._timeout_s:g} s"
            outcome = _failed("evaluation_timeout", message, lasting=False)
        seconds = time.perf_counter() - began
        return replace(outcome, cost=outcome.cost.model_copy(update={"seconds": seconds}))

    def _finish(self, piece: _Piece, outcome: Outcome) -> None:
        if outcome.lasting and self._results.result(piece.key) is None:
            try:
                self._results.add_result(piece.key, outcome.to_json())
            except MergeoptError:  # it is known until the server stops
                log.exception("a result could not be kept")
        with self._lock:
            self._pieces.pop(piece.key, None)
        piece.future.set_result(outcome)


def _lasts(known: Evaluation) -> bool:
    """Whether asking again would bring nothing new."""
    if not known.over:
        return True
    return all(future.done() and future.result().lasting for future in known.futures)


def _attempt(
    scorer: Scorer, fingerprint: str, recipe: Recipe, piece: _Piece, called_off: Callable[[], bool]
) -> Outcome:
    """Merge and score. What clients learn of a failure is its kind; what only the owner may know goes to the log."""
    try:
        if called_off():
            return _failed("cancelled", "the evaluation was called off", lasting=False)
        scores = scorer.score(fingerprint, recipe, piece.found, piece.items, called_off)
    except Exception as error:  # noqa: BLE001 - whatever it is, it costs this candidate, not the server
        return _failure(fingerprint, error)
    cost = CostView(items=scores.cost.items, tokens=scores.cost.tokens)
    return Outcome({metric: write_scores(found, True, None) for metric, found in scores.items()}, cost=cost)


def _failure(fingerprint: str, error: Exception) -> Outcome:
    if isinstance(error, RetryableError):
        return _failed("cancelled", "the evaluation was called off", lasting=False)
    if isinstance(error, InfeasibleCandidate | UserError):
        return _failed(error.code, str(error), lasting=True)
    log.error("candidate %s could not be evaluated", fingerprint, exc_info=error)
    if isinstance(error, InputsChanged):
        return _failed(error.code, "the owner's models were changed while they were in use", lasting=False)
    if isinstance(error, torch.OutOfMemoryError):
        return _failed("out_of_memory", "the candidate does not fit into the owner's memory", lasting=False)
    return _failed("evaluation_failed", "the candidate could not be evaluated", lasting=False)


def _failed(code: str, message: str, *, lasting: bool) -> Outcome:
    return Outcome(failure=FailureView(code=code, message=message[:1000]), lasting=lasting)
