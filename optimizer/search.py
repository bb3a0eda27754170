"""A search as a pure fold over its log: the same log always leads to the same next proposals.

Everything that decides *what is proposed next* lives here, and depends on nothing but the spec, the problem and the
sequence of recorded candidates and outcomes. Outcomes are told to the algorithm in the order of the candidates, however
they arrive, and each candidate records how many had been told when it was proposed. So a search that is killed and
replayed goes on exactly as one that was never interrupted, with any number of evaluations in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms import Algorithm, AlgorithmContext, Outcome, Proposal
from optimizer.algorithms.base import parse_options
from optimizer.errors import JobError
from optimizer.fitness.aggregate import ItemScores, to_gains, to_losses
from optimizer.pareto import update_front
from optimizer.ports import Candidate, Evaluation
from optimizer.problem import Problem
from optimizer.recipe import Recipe
from optimizer.space import Genome, JobSpace, make_space
from optimizer.spec import CandidateInput, JobSpec

ItemsOf = Callable[[int], Mapping[str, ItemScores]]

EXHAUSTED_AFTER = 200
"""Proposals in a row that repeat earlier recipes before a search space counts as exhausted."""


@dataclass
class _Patience:
    """Counts evaluations since the front last improved."""

    front: np.ndarray[tuple[int, int], np.dtype[np.float64]]
    since: int = 0

    def add(self, outcome: Outcome | None) -> None:
        self.since += 1
        if outcome is None or not outcome.feasible or outcome.losses is None:
            return
        joins, pushed_out = update_front(self.front, outcome.losses)
        if joins and not (self.front == outcome.losses).all(axis=1).any():
            self.front = np.vstack([self.front[~pushed_out], outcome.losses])
            self.since = 0


class Search:
    """The state of one job's search.

    Args:
        spec: the job.
        problem: its inputs as found.
        items: returns the recorded per-item scores of a candidate; needed for algorithms that learn from them.

    Attributes:
        candidates: all recorded candidates, by index.
        evaluations: outcomes by candidate index, without those of duplicates.
        told: how many outcomes, from index 0 on, the algorithm has been told.
    """

    def __init__(self, spec: JobSpec, problem: Problem, items: ItemsOf | None = None) -> None:
        self._items = items
        self.spec = spec
        self.problem = problem
        self.space: JobSpace = make_space(spec, problem)
        self.algorithm: Algorithm = self._make_algorithm()
        self.candidates: list[Candidate] = []
        self.evaluations: dict[int, Evaluation] = {}
        self.told = 0
        self._by_fingerprint: dict[str, int] = {}
        self._spent = 0
        self._repeats = 0
        self._patience = _Patience(np.empty((0, len(problem.objectives))))

    # --- what the log says ------------------------------------------------------------------------------------------

    def replay(self, candidates: Sequence[Candidate], evaluations: Mapping[int, Evaluation]) -> None:
        """Bring a fresh search to where the log ends.

        Raises:
            JobError: the log is not one that this search could have written.
        """
        self.evaluations.update(evaluations)
        pending: list[Proposal] = []
        for candidate in candidates:
            self._tell_until(candidate.told)
            if candidate.origin == "algorithm":
                pending = pending or self.algorithm.ask(self._room())
                if not pending:
                    raise JobError(
                        f"the log has a proposal at candidate {candidate.index} where the algorithm makes none"
                    )
                pending.pop(0)  # the recorded genome counts: last bits differ between kinds of CPU
            elif pending:
                raise JobError(f"the log breaks off a generation at candidate {candidate.index}")
            self._append(candidate)
        if pending:
            raise JobError("the log breaks off in the middle of a generation")

    def record(self, evaluation: Evaluation) -> None:
        """Take in the outcome of a recorded candidate; its item scores and its recipe are not needed any more."""
        self.evaluations[evaluation.index] = replace(evaluation, items={})
        self.candidates[evaluation.index] = replace(self.candidates[evaluation.index], recipe={})

    # --- what comes next --------------------------------------------------------------------------------------------

    def first(self) -> list[Candidate]:
        """Return the candidates every job begins with: the user's own, then the warm starts, as the budget allows."""
        wanted: list[Candidate] = []
        for given in self.spec.warm_starts.candidates:
            genome, recipe = self.space.encode(given)
            wanted.append(self._candidate(genome, recipe, label=given.label, origin="user"))
        for start in self.space.warm_starts(self.spec):
            wanted.append(self._candidate(start.genome, start.recipe, label=start.label, origin="warm_start"))
        return self._number(wanted[: self.spec.budget.evaluations])

    def next(self) -> list[Candidate]:
        """Tell what can be told and return new candidates to record; none while the search waits for outcomes."""
        while True:
            new = self._ask()
            if new or not self._tell_next():
                return new

    def enqueued(self, given: CandidateInput) -> Candidate:
        """Return a user's candidate, to record as the next one; raises `InvalidInput`."""
        genome, recipe = self.space.encode(given)
        return self._number([self._candidate(genome, recipe, label=given.label, origin="user")])[0]

    def add(self, candidates: Sequence[Candidate]) -> None:
        """Take in candidates that have been recorded."""
        for candidate in candidates:
            self._append(candidate)

    @property
    def waiting(self) -> list[Candidate]:
        """Candidates that need an evaluation and have none, by index."""
        return [
            candidate
            for candidate in self.candidates[self.told :]
            if candidate.duplicate_of is None and candidate.index not in self.evaluations
        ]

    @property
    def stop_reason(self) -> str | None:
        """Why no more candidates will be proposed, or None."""
        budget = self.spec.budget
        if self._spent >= budget.evaluations:
            return f"the budget of {budget.evaluations} evaluations is spent"
        if budget.patience is not None and self._patience.since >= budget.patience:
            return f"the front has not improved for {budget.patience} evaluations"
        if self._repeats >= max(EXHAUSTED_AFTER, 2 * self._window()):
            return f"the last {self._repeats} proposals were all known: the search space is exhausted"
        return None

    @property
    def accepts_more(self) -> bool:
        """Whether one more evaluation fits the budget."""
        return self._spent < self.spec.budget.evaluations

    @property
    def finished(self) -> bool:
        """Whether nothing will be proposed any more and every outcome is in."""
        return self.stop_reason is not None and self.told == len(self.candidates)

    # --- the fold ---------------------------------------------------------------------------------------------------

    def _make_algorithm(self) -> Algorithm:
        cls, options = parse_options(self.spec.algorithm)
        context = AlgorithmContext(
            space=self.space,
            weights=np.array([objective.weight for objective in self.problem.objectives]),
            seed=self.spec.seed,
            start=self.space.uniform(),
            parallel=self.spec.in_flight,
            budget=self.spec.budget.evaluations,
        )
        return cls(context, options)

    def _window(self) -> int:
        """Most proposals of the algorithm that may wait for being told; it follows a generation that grows.

        Outcomes are told in order, so one slow candidate holds up the rest: with several in flight as many again are
        proposed ahead, which keeps the other workers busy meanwhile.
        """
        ahead = 2 * self.spec.in_flight if self.spec.in_flight > 1 else 1
        return max(self.algorithm.batch_size, ahead)

    def _room(self) -> int:
        """How many proposals may be asked for now. Warm starts are told first: an algorithm may begin from them."""
        if any(candidate.generation < 0 and candidate.told == 0 for candidate in self.candidates[self.told :]):
            return 0
        own = sum(candidate.origin == "algorithm" for candidate in self.candidates[self.told :])
        return max(0, min(self._window() - own, self.spec.budget.evaluations - self._spent))

    def _ask(self) -> list[Candidate]:
        room = self._room()
        if room == 0 or self.stop_reason is not None:
            return []
        proposals = self.algorithm.ask(room)
        if not proposals and self.told == len(self.candidates):
            raise JobError(f"the algorithm {self.algorithm.name} waits although it has been told everything")
        return self._number([self._candidate_of(proposal) for proposal in proposals])

    def _candidate_of(self, proposal: Proposal) -> Candidate:
        genome = self.space.clip(proposal.genome)
        candidate = self._candidate(genome, self.space.recipe(genome), label=None, origin="algorithm")
        return replace(candidate, generation=proposal.generation, parents=proposal.parents)

    def _candidate(self, genome: Genome | None, recipe: Recipe, *, label: str | None, origin: str) -> Candidate:
        return Candidate(
            index=-1,
            generation=-1,
            told=self.told,
            origin=origin,  # type: ignore[arg-type]
            label=label,
            genome=genome,
            recipe=recipe.to_json(),
            fingerprint=recipe.fingerprint,
        )

    def _number(self, candidates: list[Candidate]) -> list[Candidate]:
        """Give the next indices, and point each repeated recipe to the first candidate that has it."""
        new: dict[str, int] = {}
        out = []
        for index, candidate in enumerate(candidates, start=len(self.candidates)):
            earlier = self._by_fingerprint.get(candidate.fingerprint)
            first = new.setdefault(candidate.fingerprint, index) if earlier is None else earlier
            out.append(replace(candidate, index=index, duplicate_of=None if first == index else first))
        return out

    def _append(self, candidate: Candidate) -> None:
        if candidate.index != len(self.candidates):
            raise JobError(f"the log has candidate {candidate.index} where {len(self.candidates)} was due")
        self.candidates.append(candidate)
        self._by_fingerprint.setdefault(candidate.fingerprint, candidate.index)
        self._spent += candidate.duplicate_of is None
        if candidate.origin == "algorithm":
            self._repeats = 0 if candidate.duplicate_of is None else self._repeats + 1

    def _tell_until(self, count: int) -> None:
        while self.told < count:
            if not self._tell_next():
                raise JobError(f"the log lacks the outcome of candidate {self.told}")

    def _source(self, index: int) -> int:
        """The candidate whose outcome is that of ``index``."""
        original = self.candidates[index].duplicate_of
        return index if original is None else original

    def _tell_next(self) -> bool:
        """Tell the algorithm the next outcome in order, if it is there."""
        if self.told == len(self.candidates):
            return False
        candidate = self.candidates[self.told]
        evaluation = self.evaluations.get(self._source(self.told))
        if evaluation is None:
            return False
        outcome = self._outcome(candidate, evaluation)
        if outcome is not None:
            self.algorithm.tell(outcome)
        if candidate.duplicate_of is None:
            self._patience.add(outcome)
        self.told += 1
        return True

    def _outcome(self, candidate: Candidate, evaluation: Evaluation) -> Outcome | None:
        """The outcome as the algorithm sees it; None for a foreign recipe, which has no genome."""
        if candidate.genome is None:
            return None
        values = evaluation.values
        return Outcome(
            index=candidate.index,
            genome=candidate.genome,
            losses=None if values is None else to_losses(self.problem.objectives, values),
            violation=evaluation.violation,
            own=candidate.origin == "algorithm",
            gains=self._gains(evaluation),
        )

    def _gains(self, evaluation: Evaluation) -> tuple[NDArray[np.float32], ...]:
        if not self.algorithm.needs_items or evaluation.values is None:
            return ()
        if self._items is None:
            raise JobError(f"the algorithm {self.algorithm.name} needs per-item scores, which nobody keeps here")
        return to_gains(self.problem.objectives, self._items(evaluation.index))
