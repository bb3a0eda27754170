"""A search as a pure fold over its log: the same log always leads to the same next proposals.

Everything that decides *what is proposed next* lives here, and depends on nothing but the spec, the problem and the
sequence of recorded candidates and outcomes. Outcomes are told to the algorithm in the order of the candidates, however
they arrive (or, in an asynchronous job, in the order in which they were recorded), and each candidate records how many
had been told when it was proposed. So a search that is killed and replayed goes on exactly as one that was never
interrupted, with any number of evaluations in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms import Algorithm, AlgorithmContext, Outcome, Proposal
from optimizer.algorithms.base import parse_options
from optimizer.errors import JobError
from optimizer.fitness.aggregate import ItemScores, to_gains, to_losses
from optimizer.fitness.racing import Rivals
from optimizer.pareto import update_front
from optimizer.phases import most_used, narrow, plan, translate
from optimizer.ports import Candidate, Evaluation, Origin
from optimizer.problem import PlannedPhase, Problem
from optimizer.recipe import Recipe
from optimizer.space import Genome, JobSpace, make_space
from optimizer.spec import CandidateInput, JobSpec
from optimizer.telling import Queue

ItemsOf = Callable[[int], Mapping[str, ItemScores]]

EXHAUSTED_AFTER = 200
"""Proposals in a row that repeat earlier recipes before a search space counts as exhausted."""

HANDED_OVER = 8
"""Most candidates of the front that are translated for a phase whose space cannot express them exactly."""


@dataclass
class _Front:
    """The losses of the non-dominated candidates so far and who they are, and how long it has not improved."""

    losses: NDArray[np.float64]
    indices: list[int] = field(default_factory=list)
    since: int = 0

    def add(self, index: int, losses: NDArray[np.float64] | None) -> None:
        """Count an evaluation; ``losses`` is None where it is not feasible."""
        self.since += 1
        if losses is None:
            return
        joins, pushed_out = update_front(self.losses, losses)
        if joins and not (self.losses == losses).all(axis=1).any():
            self.losses = np.vstack([self.losses[~pushed_out], losses])
            self.indices = [known for known, out in zip(self.indices, pushed_out, strict=True) if not out] + [index]
            self.since = 0


@dataclass
class _Stage:
    """A phase that has begun."""

    number: int
    planned: PlannedPhase
    algorithm: Algorithm
    space: JobSpace
    last: bool
    spent: int = 0
    repeats: int = 0
    since: int = 0


class Search:
    """The state of one job's search.

    Args:
        spec: the job.
        problem: its inputs as found.
        items: returns the recorded per-item scores of a candidate; needed for algorithms that learn from them.

    Attributes:
        space: the job's search space, in which users' candidates and warm starts are encoded; an algorithm may search
            another one.
        candidates: all recorded candidates, by index.
        evaluations: outcomes by candidate index, without those of duplicates.
    """

    def __init__(self, spec: JobSpec, problem: Problem, items: ItemsOf | None = None) -> None:
        self._items = items
        self.spec = spec
        self.problem = problem
        self.space: JobSpace = make_space(spec, problem)
        self.candidates: list[Candidate] = []
        self.evaluations: dict[int, Evaluation] = {}
        self._races = spec.fitness.racing.enabled and not any(o.whole for o in problem.objectives)
        self._queue = Queue(in_order=not spec.asynchronous)
        self._waiting: dict[int, None] = {}
        self._by_fingerprint: dict[str, list[int]] = {}
        self._untold: Counter[Origin] = Counter()
        self._first = 0  # of those that the job began with, how many have not been told
        self._spent = 0
        self._front = _Front(np.empty((0, len(problem.axes))))
        self._phases = problem.phases or plan(spec, problem)
        self._spaces: list[JobSpace] = []
        self._stage = self._begin(0)

    @property
    def algorithm(self) -> Algorithm:
        """Who proposes now."""
        return self._stage.algorithm

    @property
    def phase(self) -> int:
        """Number of the phase under way, from 0."""
        return self._stage.number

    @property
    def told(self) -> int:
        """How many outcomes have been told."""
        return self._queue.told

    # --- what the log says ------------------------------------------------------------------------------------------

    def replay(self, candidates: Sequence[Candidate], evaluations: Mapping[int, Evaluation]) -> None:
        """Bring a fresh search to where the log ends.

        Args:
            evaluations: by candidate index, in the order in which they were recorded.

        Raises:
            JobError: the log is not one that this search could have written.
        """
        for index, evaluation in evaluations.items():
            self.evaluations[index] = evaluation
            self._queue.arrived(index)
        for candidate in candidates:
            self._tell_until(candidate.told)
            while self._stage.number < candidate.phase < len(self._phases):
                self._stage = self._begin(self._stage.number + 1)
            if candidate.origin == "algorithm":
                if candidate.genome is None:
                    raise JobError(f"the log lacks the genome of candidate {candidate.index}")
                self.algorithm.recall([candidate.genome])
            self._append(candidate)

    def record(self, evaluation: Evaluation) -> None:
        """Take in the outcome of a recorded candidate. Its item scores are not kept, nor a recipe that has a genome."""
        index = evaluation.index
        self.evaluations[index] = replace(evaluation, items={})
        self._waiting.pop(index, None)
        if self.candidates[index].genome is not None:
            self.candidates[index] = replace(self.candidates[index], recipe={})
        self._queue.arrived(index)

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
    def baselines(self) -> list[int]:
        """The warm starts that the job began with and that were measured: candidates that no search has chosen."""
        return [index for index in self.beginnings if self.candidates[index].origin == "warm_start"]

    @property
    def beginnings(self) -> list[int]:
        """All candidates that the job began with and that were measured."""
        return [candidate.index for candidate in self.candidates if _is_first(candidate) and self._measured(candidate)]

    def _measured(self, candidate: Candidate) -> bool:
        found = self.evaluations.get(candidate.index)
        return candidate.duplicate_of is None and found is not None and found.values is not None

    def recipe_of(self, index: int) -> Recipe:
        """The recipe of a recorded candidate."""
        return self._recipe(self.candidates[index])

    @property
    def waiting(self) -> list[Candidate]:
        """Candidates that need an evaluation and have none, by index."""
        return [self.candidates[index] for index in self._waiting]

    @property
    def stop_reason(self) -> str | None:
        """Why no more candidates will be proposed, or None."""
        budget = self.spec.budget
        if self._spent >= budget.evaluations:
            return f"the budget of {budget.evaluations} evaluations is spent"
        if budget.patience is not None and self._front.since >= budget.patience:
            return f"the front has not improved for {budget.patience} evaluations"
        return self._over() if self._stage.last else None

    @property
    def accepts_more(self) -> bool:
        """Whether one more evaluation fits the budget."""
        return self._spent < self.spec.budget.evaluations

    @property
    def finished(self) -> bool:
        """Whether nothing will be proposed any more and every outcome is in."""
        return self.stop_reason is not None and self.told == len(self.candidates)

    # --- phases -----------------------------------------------------------------------------------------------------

    def _begin(self, number: int) -> _Stage:
        """Begin a phase: its algorithm is told all that is known and that its space can express."""
        planned = self._phases[number]
        last = number == len(self._phases) - 1
        cls, options = parse_options(planned.algorithm)
        spec, problem = self._narrowed(planned)
        own = cls.make_space.__func__ is not Algorithm.make_space.__func__  # type: ignore[attr-defined]
        space = cls.make_space(spec, problem, options) if own or spec is not self.spec else self.space
        self._spaces.append(space)
        left = self.spec.budget.evaluations - self._spent
        context = AlgorithmContext(
            space=space,
            weights=np.array([objective.weight for objective in self.problem.axes]),
            seed=self.spec.seed if number == 0 else _seed(self.spec.seed, number),
            start=self._start(space),
            parallel=self.spec.in_flight,
            budget=left if last else min(left, planned.evaluations),
            items=tuple(objective.items for objective in self.problem.axes),
            differentiable=all(objective.differentiable for objective in self.problem.axes),
        )
        stage = _Stage(number, planned, cls(context, options), space, last)
        for candidate in self.candidates:
            evaluation = self.evaluations.get(self._source(candidate.index))
            if evaluation is not None and candidate.items is None and evaluation.stopped is None:
                outcome = self._outcome(stage, candidate, evaluation)
                if outcome is not None:
                    stage.algorithm.tell(outcome)
        return stage

    def _narrowed(self, planned: PlannedPhase) -> tuple[JobSpec, Problem]:
        if planned.keep_experts is None or not self._front.indices:
            return self.spec, self.problem
        recipes = [self._recipe(self.candidates[index]) for index in self._front.indices]
        experts = most_used(recipes, self.problem.experts, planned.keep_experts)
        return narrow(self.spec, self.problem, experts)

    @property
    def best(self) -> list[int]:
        """The front's candidates, that with the lowest weighted sum of normalised losses first."""
        order = np.argsort(self._sums(self._front.losses), kind="stable")
        return [self._front.indices[place] for place in order]

    @property
    def ranked(self) -> list[int]:
        """All candidates that could join the front, that with the lowest weighted sum of losses first; see `best`."""
        known = [
            (candidate.index, losses)
            for candidate in self.candidates
            if candidate.duplicate_of is None and candidate.items is None
            if (found := self.evaluations.get(candidate.index)) is not None and _joins(found)
            if (losses := self._losses(found)) is not None
        ]
        sums = self._sums(np.array([losses for _, losses in known]).reshape(len(known), len(self.problem.axes)))
        return [known[place][0] for place in np.argsort(sums, kind="stable")]

    def _sums(self, losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weighted sums of losses, shape (n, axes), each counted from the front's least in units of its spread there."""
        if not len(losses):
            return np.empty(0)
        front = self._front.losses
        weights = np.array([objective.weight for objective in self.problem.axes])
        spread = np.ptp(front, axis=0)
        return np.asarray((losses - front.min(axis=0)) / np.where(spread > 0, spread, 1.0) @ weights)

    def _start(self, space: JobSpace) -> Genome:
        if not self._front.indices:
            return space.uniform()
        found, _ = translate(space, self._recipe(self.candidates[self.best[0]]))
        return space.uniform() if found is None else space.clip(found)

    def _handed_over(self) -> list[Candidate]:
        """The best of earlier phases in the words of the new one's space, where it could not be told of them."""
        wanted: list[Candidate] = []
        for index in self.best[:HANDED_OVER]:
            near, exact = translate(self._stage.space, self._recipe(self.candidates[index]))
            if near is not None and not exact:
                found = self._stage.space.recipe(self._stage.space.clip(near))
                # Its genome is one of another space than the job's, which is where those of warm starts belong.
                wanted.append(self._candidate(None, found, label=f"like candidate {index}", origin="warm_start"))
        return [new for new in self._number(wanted) if new.duplicate_of is None][: self._left()]

    def _over(self) -> str | None:
        """Why the present phase proposes nothing any more, or None."""
        stage = self._stage
        if stage.algorithm.stop_reason is not None:
            return stage.algorithm.stop_reason
        if not stage.last and stage.spent >= stage.planned.evaluations:
            return f"the phase's {stage.planned.evaluations} evaluations are spent"
        if stage.planned.patience is not None and min(stage.since, self._front.since) >= stage.planned.patience:
            return f"the front has not improved for {stage.planned.patience} evaluations"
        if stage.repeats >= max(EXHAUSTED_AFTER, 2 * self._window()):
            return f"the last {stage.repeats} proposals were all known: the search space is exhausted"
        return None

    # --- the fold ---------------------------------------------------------------------------------------------------

    def _window(self) -> int:
        """Most proposals of the algorithm that may wait for being told; it follows a generation that grows.

        Where outcomes are told in order, one slow candidate holds up the rest: with several in flight as many again are
        proposed ahead, which keeps the other workers busy meanwhile.
        """
        in_flight = self.spec.in_flight
        ahead = 2 * in_flight if in_flight > 1 and not self.spec.asynchronous else in_flight
        return max(self.algorithm.batch_size, ahead)

    def _left(self) -> int:
        """Evaluations that the budget and the phase still allow."""
        left = self.spec.budget.evaluations - self._spent
        stage = self._stage
        return max(0, left if stage.last else min(left, stage.planned.evaluations - stage.spent))

    def _room(self) -> int:
        """How many proposals may be asked for now. Warm starts are told first: an algorithm may begin from them."""
        if self._first or self._untold["warm_start"]:
            return 0
        return min(max(0, self._window() - self._untold["algorithm"]), self._left())

    def _ask(self) -> list[Candidate]:
        if self.stop_reason is not None:
            return []
        if self._over() is not None:
            return self._next_phase()
        room = self._room()
        if room == 0:
            return []
        proposals = self.algorithm.ask(room)
        if not proposals and self.told == len(self.candidates) and self.algorithm.stop_reason is None:
            raise JobError(f"the algorithm {self.algorithm.name} waits although it has been told everything")
        return self._number([self._candidate_of(proposal) for proposal in proposals])

    def _next_phase(self) -> list[Candidate]:
        """Begin the next phase once every outcome of this one is in; return what is handed over."""
        if self.told < len(self.candidates):
            return []
        self._stage = self._begin(self._stage.number + 1)
        return self._handed_over() or self._ask()

    def _candidate_of(self, proposal: Proposal) -> Candidate:
        genome = self._stage.space.clip(proposal.genome)
        recipe = self._stage.space.recipe(genome)
        candidate = self._candidate(genome, recipe, label=proposal.label, origin="algorithm")
        return replace(
            candidate,
            generation=proposal.generation,
            parents=proposal.parents,
            items=proposal.items,
            slopes=proposal.slopes,
            estimated=self._estimated(proposal),
            rivals=self._rivals(proposal),
        )

    def _estimated(self, proposal: Proposal) -> bool:
        """Whether a proposal is measured on the anchors alone; who learns item by item needs all items."""
        wanted = self.spec.fitness.estimation.method != "none"
        return wanted and proposal.items is None and not proposal.slopes and not self.algorithm.needs_items

    def _rivals(self, proposal: Proposal) -> Rivals | None:
        """Whom a proposal must not lose to, where its evaluation may be stopped."""
        if not self._races or self._estimated(proposal) or proposal.items is not None or proposal.slopes:
            return None
        rivals = self.algorithm.rivals()
        if rivals is None:
            return None
        return replace(rivals, references=tuple(dict.fromkeys(self._source(index) for index in rivals.references)))

    def _candidate(self, genome: Genome | None, recipe: Recipe, *, label: str | None, origin: Origin) -> Candidate:
        return Candidate(
            index=-1,
            generation=-1,
            told=self.told,
            origin=origin,
            label=label,
            genome=genome,
            recipe=recipe.to_json(),
            fingerprint=recipe.fingerprint,
            phase=self._stage.number,
        )

    def _number(self, candidates: list[Candidate]) -> list[Candidate]:
        """Give the next indices, and point each repeated recipe to the first candidate that was measured as it asks."""
        out: list[Candidate] = []
        first = len(self.candidates)
        for index, candidate in enumerate(candidates, start=first):
            known = [self.candidates[place] for place in self._by_fingerprint.get(candidate.fingerprint, [])]
            known += [new for new in out if new.fingerprint == candidate.fingerprint and new.duplicate_of is None]
            original = next((earlier for earlier in known if _serves(earlier, candidate)), None)
            out.append(replace(candidate, index=index, duplicate_of=None if original is None else original.index))
        return out

    def _append(self, candidate: Candidate) -> None:
        index = candidate.index
        if index != len(self.candidates):
            raise JobError(f"the log has candidate {index} where {len(self.candidates)} was due")
        self.candidates.append(candidate)
        self._untold[candidate.origin] += 1
        self._first += _is_first(candidate)
        self._queue.added(index, candidate.duplicate_of)
        if candidate.duplicate_of is None:
            self._by_fingerprint.setdefault(candidate.fingerprint, []).append(index)
            self._spent += 1
            self._stage.spent += 1
            if index not in self.evaluations:
                self._waiting[index] = None
        if candidate.origin == "algorithm":
            self._stage.repeats = 0 if candidate.duplicate_of is None else self._stage.repeats + 1

    def _tell_until(self, count: int) -> None:
        while self.told < count:
            if not self._tell_next():
                raise JobError(f"the log lacks the outcome that was told as number {self.told} of {count}")

    def _source(self, index: int) -> int:
        """The candidate whose outcome is that of ``index``."""
        original = self.candidates[index].duplicate_of
        return index if original is None else original

    def _tell_next(self) -> bool:
        """Tell the algorithm the next outcome, if it is there."""
        index = self._queue.next()
        if index is None:
            return False
        candidate = self.candidates[index]
        evaluation = self.evaluations[self._source(index)]
        outcome = self._outcome(self._stage, candidate, evaluation)
        if outcome is not None:
            self.algorithm.tell(outcome)
        self._untold[candidate.origin] -= 1
        self._first -= _is_first(candidate)
        if candidate.duplicate_of is None and candidate.items is None:
            self._stage.since += 1
            self._front.add(index, self._losses(evaluation) if _joins(evaluation) else None)
        return True

    def _losses(self, evaluation: Evaluation) -> NDArray[np.float64] | None:
        return None if evaluation.values is None else to_losses(self.problem.objectives, evaluation.values)

    def _home(self, candidate: Candidate) -> JobSpace:
        """The space that a candidate's genome belongs to."""
        return self._spaces[candidate.phase] if candidate.origin == "algorithm" else self.space

    def _recipe(self, candidate: Candidate) -> Recipe:
        if candidate.genome is not None:
            return self._home(candidate).recipe(candidate.genome)
        return Recipe.parse(dict(candidate.recipe))

    def _outcome(self, stage: _Stage, candidate: Candidate, evaluation: Evaluation) -> Outcome | None:
        """The outcome as a phase's algorithm sees it; None where its space cannot express the candidate."""
        at_home = candidate.genome is not None and self._home(candidate) is stage.space
        genome, exact = (candidate.genome, True) if at_home else translate(stage.space, self._recipe(candidate))
        if genome is None or not exact:
            return None
        return Outcome(
            index=candidate.index,
            genome=genome,
            losses=self._losses(evaluation),
            violation=evaluation.violation,
            own=candidate.origin == "algorithm" and candidate.phase == stage.number,
            gains=self._gains(stage.algorithm, evaluation),
            items=candidate.items if evaluation.stopped is None else evaluation.stopped,
            slopes=self._slopes(stage, evaluation),
            lost=evaluation.stopped is not None,
        )

    def _slopes(self, stage: _Stage, evaluation: Evaluation) -> NDArray[np.float64] | None:
        """The slopes towards the models that a phase searches among."""
        models = stage.space.problem.models
        if evaluation.slopes is None or len(models) == len(self.problem.models):
            return evaluation.slopes
        columns = [number for number, name in enumerate(self.problem.models) if name in models]
        return evaluation.slopes[..., [*columns, len(self.problem.models)]]

    def _gains(self, algorithm: Algorithm, evaluation: Evaluation) -> tuple[NDArray[np.float32], ...]:
        if not algorithm.needs_items or evaluation.values is None:
            return ()
        if self._items is None:
            raise JobError(f"the algorithm {algorithm.name} needs per-item scores, which nobody keeps here")
        return to_gains(self.problem.objectives, self._items(evaluation.index))


def _is_first(candidate: Candidate) -> bool:
    return candidate.told == 0 and candidate.origin != "algorithm"


def _serves(earlier: Candidate, wanted: Candidate) -> bool:
    """Whether the outcome of ``earlier`` is all that ``wanted``, of the same recipe, asks for."""
    if earlier.rivals is not None and wanted.rivals is None:
        return False  # it may be stopped before it is measured on all items
    if earlier.estimated and not wanted.estimated:
        return False
    return earlier.items == wanted.items and (earlier.slopes or not wanted.slopes)


def _joins(evaluation: Evaluation) -> bool:
    """Whether it may join the front."""
    return evaluation.values is not None and evaluation.violation <= 0 and evaluation.stopped is None


def _seed(seed: int, phase: int) -> int:
    """The seed of a later phase's algorithm."""
    return int(np.random.SeedSequence([seed, phase]).generate_state(1)[0])
