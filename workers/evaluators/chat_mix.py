"""Several closed models behind chat APIs, merged in their outputs: weights, routes and prompts are the candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue, model_validator

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import Cost
from optimizer.recipe import Recipe
from optimizer.spec import Direction, Name, Strict
from workers.evaluators.asking import AskingEvaluator, put
from workers.evaluators.base import Inputs, Scores, evaluator
from workers.evaluators.chatting import UNKNOWN, ChatOptions, body_of, candidate_data, check_chat, text_of
from workers.services.chat import Completion, completion_question
from workers.services.client import BadAnswer, Question, Reading, ServiceClient
from workers.services.mixing import Pool, by_likelihood, by_votes, check_weights, mix, vote
from workers.services.options import Limits, Prices
from workers.services.rows import sendable
from workers.services.templates import check_template, render

Weight = float | str
Asked = Question[NDArray[np.float64]]


class Member(Strict):
    """One of the models that are mixed."""

    model: str = Field(
        min_length=1, max_length=1000, description="Name of the model, with placeholders.", examples=["large"]
    )
    weight: Weight = Field(
        default=1.0, description="What it counts: a number or a placeholder.", examples=["{{values.large}}"]
    )
    weights: dict[str, Weight] = Field(
        default_factory=dict,
        max_length=1000,
        description="What it counts for items of a task, by task, where that differs.",
        examples=[{"law": "{{values.large_law}}"}],
    )
    url: str | None = Field(
        default=None, max_length=4000, description="Where its API is; the evaluator's `url` by default."
    )
    token: Name | None = Field(default=None, description="Name of its secret; the evaluator's `token` by default.")
    sampling: dict[str, JsonValue] = Field(
        default_factory=dict, max_length=64, description="Fields of its requests that differ from `sampling`."
    )
    system: str | None = Field(
        default=None, max_length=100_000, description="Its system prompt; the evaluator's `system` by default."
    )
    limits: Limits | None = Field(default=None, description="Limits of its service; the evaluator's by default.")
    prices: Prices | None = Field(default=None, description="What it charges; the evaluator's by default.")


@dataclass(frozen=True)
class _Ask:
    """What one member is asked of one item."""

    member: str
    row: int
    questions: list[Asked]


@evaluator("chat_mix")
class ChatMix(AskingEvaluator):
    """Each row is an item with a few possible answers (labels). Each member that counts for it says what it holds likely
    of each: by log-probabilities of its first token, or by votes. The mixture of them answers. Per item:

    - ``accuracy``: 1 if the right label is the most likely one;
    - ``loss``: −log of the right label's probability, in nats.

    A member whose weight is 0 is not asked. A task's route names the one member that answers its items. What members say
    is kept by model, prompt and sampling, so candidates that differ only in weights and routes cost no request.
    """

    summary: ClassVar[str] = (
        "Mixes what several chat models hold likely of given answers; weights and routes are searched."
    )
    metrics: Mapping[str, Direction] = {"accuracy": "maximise", "loss": "minimise"}
    columns: ClassVar[dict[str, str]] = {
        "prompt": "What the models are asked.",
        "answer": "The right label.",
        "labels": "The possible answers of the row: a list of texts (optional, in place of the option).",
        "task": "Which task the row belongs to, for routes and weights (optional).",
    }

    class Options(ChatOptions):
        """Options of a mixture."""

        members: dict[Name, Member] = Field(
            min_length=1,
            max_length=64,
            description="The models, by a name of your choice.",
            examples=[{"small": {"model": "small", "weight": "{{values.small}}"}, "large": {"model": "large"}}],
        )
        labels: list[str] = Field(
            default_factory=list,
            max_length=1000,
            description="The possible answers, where rows have none of their own.",
            examples=[["A", "B", "C", "D"]],
        )
        routes: dict[str, str] = Field(
            default_factory=dict,
            max_length=1000,
            description="By task, the member that alone answers its items (or a placeholder for it); empty mixes all.",
            examples=[{"law": "large", "maths": "{{values.maths}}"}],
        )
        by: Literal["logprobs", "votes"] = Field(
            default="logprobs", description="What members are judged by: `top_logprobs` of their first token, or votes."
        )
        top_logprobs: int = Field(
            default=20, ge=1, le=1000, description="How many tokens' log-probabilities are asked for."
        )
        votes: int = Field(
            default=5, ge=1, le=100, description="Answers of each member to an item, by seeds from `seed` on."
        )
        pool: Pool = Field(
            default="linear",
            description="`linear`: the weighted mean of probabilities; `logarithmic`: of their logarithms, normalised.",
        )
        sampling: dict[str, JsonValue] = Field(
            default={"temperature": 0},
            max_length=64,
            description="Further fields of the requests, with placeholders: temperature, top_p, seed, …",
            examples=[{"temperature": "{{values.temperature}}", "seed": 0}],
        )

        @model_validator(mode="after")
        def _routes_lead_to_members(self) -> ChatMix.Options:
            for task, route in self.routes.items():
                if "{{" not in route and route and route not in self.members:
                    raise ValueError(
                        f"routes.{task}: there is no member {route!r}; use one of: {', '.join(self.members)}"
                    )
            return self

    options: Options

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        self._path = f"{inputs.field}.options"
        check_chat(options, self._path)
        for name, member in options.members.items():
            self._check_member(member, f"{self._path}.members.{name}")
        check_template(options.routes, ("values",), f"{self._path}.routes", secrets=False)
        self._rows = sendable(inputs.rows)
        self._labels = self._read_labels()
        self._right = self._read_right()
        self._clients = {name: self._client_of(name, member) for name, member in options.members.items()}

    def estimate(self) -> Cost:
        """See `Evaluator.estimate`; retries and kept answers are not counted; every member is asked of every item."""
        total = Cost()
        for name in self.options.members:
            prices = self._clients[name].prices
            for row in range(len(self._rows)):
                questions = self._questions(name, row, UNKNOWN)
                total += Cost.total(prices.cost(one.tokens_in, one.tokens_out) for one in questions)
        return total

    def ask(self, recipe: Recipe, cancelled: Callable[[], bool]) -> Scores:
        """See `AskingEvaluator.ask`."""
        candidate = candidate_data(recipe)
        weights = np.stack([self._weights(row, candidate) for row in range(len(self._rows))])
        members = list(self.options.members)
        asks = [
            _Ask(name, row, self._questions(name, row, candidate))
            for row in range(len(self._rows))
            for number, name in enumerate(members)
            if weights[row, number]
        ]
        said, fresh = self._said(asks, cancelled)
        mixed = [
            mix(
                np.stack([said[row, name] for number, name in enumerate(members) if counts[number]]),
                counts[counts != 0],
                self.options.pool,
            )
            for row, counts in enumerate(weights)
        ]
        return Scores(self._scored(mixed), Cost(items=len(fresh)))

    # --- what is known before a candidate is ---------------------------------------------------------------------------

    def _check_member(self, member: Member, path: str) -> None:
        candidate = ("values", "recipe", "fingerprint")
        check_template(member.model, (*candidate, "row"), f"{path}.model", secrets=False)
        check_template(member.system or "", (*candidate, "row"), f"{path}.system", secrets=False)
        check_template(member.sampling, (*candidate, "row"), f"{path}.sampling", secrets=False)
        check_template([member.weight, member.weights], ("values",), f"{path}.weight", secrets=False)

    def _client_of(self, name: str, member: Member) -> ServiceClient:
        options = self.options
        path = f"{self._path}.url" if member.url is None else f"{self._path}.members.{name}.url"
        return self._inputs.services.client(
            member.url or options.url,
            member.limits or options.limits,
            member.prices or options.prices,
            self._inputs.policy,
            path,
        )

    def _read_labels(self) -> list[list[str]]:
        rows = self._inputs.rows
        if not rows.has("labels"):
            if len(set(self.options.labels)) < 2:
                raise InvalidInput(
                    "there must be at least two different labels",
                    field=f"{self._path}.labels",
                    remedy="name them, or give each row a list of them in the column `labels`",
                )
            return [self.options.labels] * len(rows)
        out = []
        for row, value in enumerate(rows.values("labels")):
            if (
                not isinstance(value, list)
                or len(set(map(str, value))) < 2
                or not all(isinstance(one, str) and one.strip() for one in value)
            ):
                raise rows.error("labels", row, "a list of at least two different texts is needed")
            out.append(value)
        return out

    def _read_right(self) -> list[int]:
        rows = self._inputs.rows
        out = []
        for row, value in enumerate(rows.values("answer")):
            if str(value) not in self._labels[row]:
                raise rows.error("answer", row, f"{value!r:.60} is none of the labels {', '.join(self._labels[row])}")
            out.append(self._labels[row].index(str(value)))
        return out

    # --- a candidate -----------------------------------------------------------------------------------------------------

    def _weights(self, row: int, candidate: Mapping[str, Any]) -> NDArray[np.float64]:
        """What each member counts for a row, shape (members,)."""
        members, path = self.options.members, f"{self._path}.members"
        task = str(self._rows[row].get(self._inputs.rows.columns.get("task", "task"), ""))
        route = text_of(self.options.routes.get(task, ""), candidate)
        if route and route not in members:
            raise InfeasibleCandidate(f"there is no member {route!r}", field=f"{self._path}.routes.{task}")
        if route:
            return np.array([float(name == route) for name in members])
        found = np.array(
            [
                _number(member.weights.get(task, member.weight), candidate, f"{path}.{name}.weight")
                for name, member in members.items()
            ]
        )
        check_weights(found, self.options.pool, self._inputs.rows.places[row], path)
        return found

    def _questions(self, name: str, row: int, candidate: Mapping[str, Any]) -> list[Asked]:
        options, member = self.options, self.options.members[name]
        data = {**candidate, "row": self._rows[row]}
        system = options.system if member.system is None else member.system
        sampling = {**options.sampling, **member.sampling}
        body = body_of(member.model, system, options.prompt, sampling, data, f"{self._path}.members.{name}")
        url, token = member.url or options.url, member.token or (options.token if member.url is None else None)
        if options.by == "logprobs":
            asked = {"max_tokens": 1, **body, "logprobs": True, "top_logprobs": options.top_logprobs}
            return [self._judged(completion_question(url, token, asked), row)]
        seed = body.get("seed", 0)
        first = seed if isinstance(seed, int) else 0
        bodies = [{"max_tokens": 16, **body, "seed": first + number} for number in range(options.votes)]
        return [self._judged(completion_question(url, token, one), row) for one in bodies]

    def _judged(self, question: Question[Completion], row: int) -> Asked:
        """The question, read as what it says of the row's labels."""
        labels, likely = self._labels[row], self.options.by == "logprobs"

        def read(document: Any) -> Reading[NDArray[np.float64]]:
            found = question.read(document)
            if likely and not found.value.first:
                raise BadAnswer("it tells no log-probabilities: use `by: votes`")
            value = by_likelihood(found.value.first, labels) if likely else vote(found.value.text, labels)
            return Reading(value, found.tokens_in, found.tokens_out)

        return Question(question.request, read, question.tokens_in, question.tokens_out)

    def _said(
        self, asks: Sequence[_Ask], cancelled: Callable[[], bool]
    ) -> tuple[dict[tuple[int, str], NDArray[np.float64]], set[int]]:
        """What members hold likely of rows' labels, and the rows for which some were asked now."""
        said: dict[tuple[int, str], NDArray[np.float64]] = {}
        fresh: set[int] = set()
        for client in dict.fromkeys(self._clients.values()):
            here = [ask for ask in asks if self._clients[ask.member] is client]
            answers = iter(put(client, [question for ask in here for question in ask.questions], cancelled))
            for ask in here:
                found = [next(answers) for _ in ask.questions]
                values = [answer.value for answer in found]
                said[ask.row, ask.member] = values[0] if self.options.by == "logprobs" else by_votes(values)
                if any(answer.cost.requests for answer in found):
                    fresh.add(ask.row)
        return said, fresh

    def _scored(self, mixed: Sequence[NDArray[np.float64]]) -> dict[str, ItemScores]:
        right = [float(found[place]) for found, place in zip(mixed, self._right, strict=True)]
        accuracy = [float(found.argmax() == place) for found, place in zip(mixed, self._right, strict=True)]
        return {
            "accuracy": ItemScores(np.array(accuracy, dtype=np.float32)),
            "loss": ItemScores(-np.log(np.array(right)).astype(np.float32)),
        }


def _number(template: Weight, candidate: Mapping[str, Any], field: str) -> float:
    try:
        found = render(template, candidate)
        return float(found)
    except InfeasibleCandidate as error:
        raise InfeasibleCandidate(error.message, field=field) from None
    except (TypeError, ValueError):
        raise InfeasibleCandidate("the weight is no number", field=field) from None
