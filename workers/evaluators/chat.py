"""Models behind an OpenAI-compatible chat API: which model answers, and how it is asked, is the candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from optimizer.errors import InvalidInput
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import Cost
from optimizer.recipe import Recipe
from optimizer.spec import Direction, Name
from workers.evaluators.asking import AskingEvaluator, put
from workers.evaluators.base import Inputs, Scores, evaluator
from workers.evaluators.chatting import NAMES, UNKNOWN, ChatOptions, body_of, candidate_data, check_chat
from workers.graders.base import GRADERS, Answers, GraderInputs, GraderSpec, make_grader
from workers.services.chat import Completion, completion_question
from workers.services.client import Question
from workers.services.rows import sendable
from workers.services.templates import check_template

ALWAYS: Mapping[str, Direction] = {"tokens": "minimise", "truncated": "minimise"}
"""Metrics that need no grader."""


@evaluator("chat")
class Chat(AskingEvaluator):
    """Each row is an item, asked once. Per item:

    - a score of each grader, under the name that ``graders`` gives it;
    - ``tokens``: that the answer has, as the service counts;
    - ``truncated``: 1 where the answer was cut off for its length.

    Placeholders: ``{{values.NAME}}``, ``{{fingerprint}}``, ``{{recipe}}`` and ``{{row.COLUMN}}``. A model's name made of
    them serves APIs that load adapters or merges by name.
    """

    summary: ClassVar[str] = "How good answers of a chat API are, by graders: which model, prompt and sampling is best."
    metrics: Mapping[str, Direction] = {"score": "maximise", **ALWAYS}
    columns: ClassVar[dict[str, str]] = {
        "prompt": "What the model is asked.",
        **{role: text for found in GRADERS.values() for role, text in found.columns.items()},
    }

    class Options(ChatOptions):
        """Options of a chat API."""

        model: str = Field(
            min_length=1,
            max_length=1000,
            description="Name of the model, with placeholders.",
            examples=["large", "{{values.model}}", "merge-{{fingerprint}}"],
        )
        graders: dict[Name, GraderSpec] = Field(
            default={"score": GraderSpec(name="exact_match")},
            max_length=50,
            description="Graders by the name of their metric: the name of a grader, or its `name` and `options`.",
            examples=[{"correct": "number"}],
        )

    options: Options

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        path = f"{inputs.field}.options"
        check_chat(options, path)
        check_template(options.model, NAMES, f"{path}.model", secrets=False)
        self._graders = {
            name: make_grader(spec, GraderInputs(inputs.rows, f"{path}.graders.{name}", inputs.policy, inputs.roots))
            for name, spec in options.graders.items()
        }
        if taken := set(ALWAYS) & set(self._graders):
            name = min(taken)
            raise InvalidInput(f"{name!r} is a metric already", field=f"{path}.graders.{name}", remedy="rename it")
        self.metrics = {name: found.direction for name, found in self._graders.items()} | dict(ALWAYS)
        self._rows = sendable(inputs.rows)
        self._client = self.client(options.url, f"{path}.url")

    def estimate(self) -> Cost:
        """See `Evaluator.estimate`; retries and kept answers are not counted."""
        found = [self._question(UNKNOWN, row) for row in self._rows]
        return Cost.total(self.options.prices.cost(one.tokens_in, one.tokens_out) for one in found)

    def ask(self, recipe: Recipe, cancelled: Callable[[], bool]) -> Scores:
        """See `AskingEvaluator.ask`."""
        candidate = candidate_data(recipe)
        questions = [self._question(candidate, row) for row in self._rows]
        answers = put(self._client, questions, cancelled)
        fresh = sum(1 for answer in answers if answer.cost.requests)
        return Scores(self._graded([answer.value for answer in answers], cancelled), Cost(items=fresh))

    def _question(self, candidate: Mapping[str, Any], row: Mapping[str, Any]) -> Question[Completion]:
        options = self.options
        field = f"{self._inputs.field}.options"
        body = body_of(
            options.model, options.system, options.prompt, options.sampling, {**candidate, "row": row}, field
        )
        return completion_question(options.url, options.token, body)

    def _graded(self, answers: Sequence[Completion], cancelled: Callable[[], bool]) -> dict[str, ItemScores]:
        texts = Answers([answer.text for answer in answers], cancelled, torch.device("cpu"))
        scores = {name: list(found.grade(texts)) for name, found in self._graders.items()}
        # Where a service does not count its tokens, words are counted.
        scores["tokens"] = [_tokens(answer) for answer in answers]
        scores["truncated"] = [float(answer.truncated) for answer in answers]
        return {name: ItemScores(np.array(found, dtype=np.float32)) for name, found in scores.items()}


def _tokens(answer: Completion) -> float:
    return float(len(answer.text.split())) if math.isnan(answer.tokens) else answer.tokens
