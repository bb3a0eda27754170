"""Any HTTP service that returns scores: requests by templates, scores by JSON pointers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, JsonValue, field_validator

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import Cost
from optimizer.recipe import Recipe
from optimizer.spec import Direction, Name, Strict
from workers.evaluators.asking import AskingEvaluator, check_headers, number, put
from workers.evaluators.base import Inputs, Scores, evaluator
from workers.merging.cache import key_of
from workers.services.client import BadAnswer, Question, Reading
from workers.services.pointers import NothingThere, follow, kind_of, parse_pointer
from workers.services.requests import Request, mask
from workers.services.rows import sendable
from workers.services.templates import check_template, render, render_text, render_url, uses

_CANDIDATE = ("values", "recipe", "fingerprint")
_DATA = ("row", "rows", "items")


def _pointer(text: str) -> str:
    parse_pointer(text)
    return text


class Score(Strict):
    """Where in an answer a metric stands, and what it means."""

    pointer: str = Field(
        max_length=1000,
        description="JSON pointer (RFC 6901) to the score, or to the list of them; `*` means all elements of a list.",
        examples=["/score", "/results/*/accuracy"],
    )
    direction: Direction = Field(default="maximise", description="Whether more or less is better.")
    low: float | None = Field(
        default=None, description="Lowest score that makes sense; a lower one fails the candidate."
    )
    high: float | None = Field(default=None, description="Highest score that makes sense.")

    _checked = field_validator("pointer")(_pointer)


@evaluator("http")
class HttpService(AskingEvaluator):
    """A service scores each candidate. What is sent, and where in its answers the scores stand, is in the options.

    Placeholders of templates: ``{{values.NAME}}`` (the candidate's values, in jobs with ``parameters``), ``{{recipe}}`` (all
    of it as JSON), ``{{fingerprint}}``, ``{{row.COLUMN}}`` with one request an item, ``{{rows}}`` and ``{{items}}`` (rows
    and their numbers), and ``{{secret.NAME}}``.

    The answer to a request has one score for each of its rows, in their order; or one for all of them with ``aggregate``.
    """

    summary: ClassVar[str] = "Scores from any HTTP service: requests by templates, scores by JSON pointers."
    metrics: Mapping[str, Direction] = {}
    columns: ClassVar[dict[str, str]] = {}
    data_optional: ClassVar[bool] = True

    class Options(AskingEvaluator.Options):
        """Options of an HTTP service."""

        url: str = Field(
            max_length=4000,
            description="Where it is; placeholders may stand in path and query.",
            examples=["https://scores.example.org/v1/score"],
        )
        method: Literal["POST", "PUT", "GET"] = Field(default="POST", description="HTTP method.")
        headers: dict[str, str] = Field(
            default_factory=dict,
            max_length=64,
            description="Headers; placeholders may stand in their values.",
            examples=[{"Authorization": "Bearer {{secret.scores}}"}],
        )
        body: JsonValue = Field(
            default=None,
            description="What is sent as JSON, with placeholders; nothing by default.",
            examples=[{"settings": "{{values}}", "questions": "{{rows}}"}],
        )
        metrics: dict[Name, Score] = Field(
            min_length=1,
            max_length=64,
            description="Metrics by name, the first being the default.",
            examples=[{"accuracy": {"pointer": "/scores", "low": 0, "high": 1}}],
        )
        each: Literal["item", "batch", "candidate"] = Field(
            default="candidate", description="What a request is for: one item, `batch_size` items, or all of them."
        )
        batch_size: int = Field(default=32, ge=1, le=100_000, description="Items of a request with `each: batch`.")
        aggregate: bool = Field(
            default=False,
            description="The answer has one score for all rows together (`each: candidate`), or there are no rows.",
        )
        tokens_in: str | None = Field(
            default=None,
            description="JSON pointer to the number of tokens that it read, where it tells.",
            examples=["/usage/prompt_tokens"],
        )
        tokens_out: str | None = Field(
            default=None,
            description="JSON pointer to the number of tokens that it wrote.",
            examples=["/usage/completion_tokens"],
        )
        expected_tokens: float = Field(
            default=0, ge=0, le=1e9, description="Tokens that a request takes, for rate limits and the estimate."
        )

        _checked = field_validator("tokens_in", "tokens_out")(lambda text: text if text is None else _pointer(text))

    options: Options

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        self.metrics = {name: score.direction for name, score in options.metrics.items()}
        self._path = f"{inputs.field}.options"
        self._check_shape()
        self._check_templates()
        self._rows = sendable(inputs.rows)
        self._items = 1 if options.aggregate else len(self._rows)
        self._client = self.client(options.url, f"{self._path}.url")

    def estimate(self) -> Cost:
        """See `Evaluator.estimate`; retries and kept answers are not counted."""
        requests = len(self._chunks())
        return self.options.prices.cost(self.options.expected_tokens * requests, 0.0, requests)

    def ask(self, recipe: Recipe, cancelled: Callable[[], bool]) -> Scores:
        """See `AskingEvaluator.ask`."""
        chunks = self._chunks()
        candidate = recipe.to_json()
        questions = [self._question(recipe.values, candidate, recipe.fingerprint, chunk) for chunk in chunks]
        answers = put(self._client, questions, cancelled)
        fresh = sum(len(chunk) for chunk, answer in zip(chunks, answers, strict=True) if answer.cost.requests)
        scores = {
            name: ItemScores(np.array([one for answer in answers for one in answer.value[name]], dtype=np.float32))
            for name in self.options.metrics
        }
        return Scores(scores, Cost(items=fresh))

    def _check_shape(self) -> None:
        options, rows = self.options, len(self._inputs.rows)
        if options.aggregate and options.each != "candidate":
            raise InvalidInput(
                "one score for all rows can only come from one request for all of them",
                field=f"{self._path}.aggregate",
                remedy="set `each: candidate`, or leave `aggregate` out",
            )
        if not rows and not options.aggregate:
            raise InvalidInput(
                "without data there are no items, so the service's answer is one score for the candidate",
                field=f"{self._path}.aggregate",
                remedy="set `aggregate: true`, or name the data",
            )

    def _check_templates(self) -> None:
        options = self.options
        data = _DATA if options.each == "item" else _DATA[1:]
        for name in ("url", "headers", "body"):
            check_template(getattr(options, name), (*_CANDIDATE, *data), f"{self._path}.{name}")
        check_headers(options.headers, f"{self._path}.headers")
        parts = [options.url, options.headers, options.body]
        if not any(uses(part, name) for part in parts for name in _CANDIDATE):
            raise InvalidInput(
                "no request says which candidate it is for, so all candidates would score the same",
                field=f"{self._path}.body",
                remedy="use {{values}}, {{recipe}} or {{fingerprint}} in the body, the URL or a header",
            )
        if (
            len(self._inputs.rows)
            and options.each != "candidate"
            and not any(uses(part, name) for part in parts for name in data)
        ):
            raise InvalidInput(
                "no request says which items it is for",
                field=f"{self._path}.body",
                remedy="use {{row.COLUMN}}, {{rows}} or {{items}} in the body or the URL",
            )

    def _chunks(self) -> list[list[int]]:
        """The rows of each request."""
        rows = list(range(len(self._rows)))
        size = {"item": 1, "batch": self.options.batch_size, "candidate": max(1, len(rows))}[self.options.each]
        return [rows[begin : begin + size] for begin in range(0, len(rows), size)] or [[]]

    def _question(
        self, values: Mapping[str, Any], recipe: Mapping[str, Any], fingerprint: str, chunk: Sequence[int]
    ) -> Question[dict[str, list[float]]]:
        data: dict[str, Any] = {"values": values, "recipe": recipe, "fingerprint": fingerprint, "items": list(chunk)}
        data["rows"] = [self._rows[row] for row in chunk]
        if self.options.each == "item":
            data["row"] = self._rows[chunk[0]]
        try:
            url, headers, body = (
                render_url(self.options.url, data),
                {name: render_text(value, data) for name, value in self.options.headers.items()},
                render(self.options.body, data),
            )
        except InfeasibleCandidate as error:
            raise InfeasibleCandidate(error.message, field=self._path) from None
        request = Request(self.options.method, url, headers, body, key=self._key(headers))
        # Who is asked twice, after an answer was lost, may know it by this.
        name = key_of({"fingerprint": fingerprint, "request": request.identity()})
        named = replace(request, headers={"Idempotency-Key": name, **headers})
        return Question(named, partial(self._read, chunk), tokens_in=self.options.expected_tokens)

    def _key(self, headers: Any) -> str:
        """What an answer depends on besides, and what it is read by: with other pointers it is asked for again."""
        reading = self.options.model_dump(mode="json", include={"metrics", "tokens_in", "tokens_out", "aggregate"})
        return key_of({"version": self.version, "headers": mask(headers), **reading})

    def _read(self, chunk: Sequence[int], document: Any) -> Reading[dict[str, list[float]]]:
        found = {name: self._scores(name, score, chunk, document) for name, score in self.options.metrics.items()}
        return Reading(found, self._tokens(document, "tokens_in"), self._tokens(document, "tokens_out"))

    def _scores(self, name: str, score: Score, chunk: Sequence[int], document: Any) -> list[float]:
        """One metric of the rows of a request, or the one of all of them."""
        field = f"{self._path}.metrics.{name}"
        try:
            value = follow(document, score.pointer, spread=True)
        except NothingThere as error:
            raise BadAnswer(f"{field}: {error}") from None
        places = ["all rows"] if self.options.aggregate else [self._inputs.rows.places[row] for row in chunk]
        one = self.options.aggregate or self.options.each == "item"
        values = [value] if one and not isinstance(value, list) else value
        if not isinstance(values, list) or len(values) != len(places):
            raise InfeasibleCandidate(
                f"{kind_of(value)} stands at {score.pointer!r}, but there must be {len(places)} scores, from "
                f"{places[0]} to {places[-1]}",
                field=field,
            )
        return [number(one, place, field, score.low, score.high) for one, place in zip(values, places, strict=True)]

    def _tokens(self, document: Any, name: Literal["tokens_in", "tokens_out"]) -> float:
        pointer: str | None = getattr(self.options, name)
        if pointer is None:
            return self.options.expected_tokens if name == "tokens_in" and self.options.tokens_out is None else 0.0
        try:
            return number(follow(document, pointer), "tokens", f"{self._path}.{name}", low=0)
        except NothingThere as error:
            raise BadAnswer(f"{self._path}.{name}: {error}") from None
