"""Generation: a causal language model answers every row, and graders score what it wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, StringConstraints
from transformers import PreTrainedModel

from optimizer.errors import InvalidInput
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.evaluators.base import Evaluator, Inputs, Scores, evaluator, inference, never
from workers.evaluators.loading import check_vocabulary, load_tokenizer, longest_sequence
from workers.generation.answers import Answer, Decoding, Writer
from workers.generation.continuous import ContinuousWriter, EitherWriter, suits
from workers.generation.padded import PaddedWriter
from workers.generation.prompts import chat_tokens, conversations, end_tokens, plain_tokens, texts
from workers.generation.vllm import VllmWriter
from workers.graders.base import GRADERS, Answers, GraderInputs, GraderSpec, make_grader

ALWAYS: Mapping[str, Direction] = {"tokens": "minimise", "truncated": "minimise"}
"""Metrics that need no grader."""

MetricName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.-]{0,63}$")]


@evaluator("generation")
class Generation(Evaluator):
    """Each row is an item, answered once. Per item:

    - a score of each grader, under the name that ``graders`` gives it;
    - ``tokens``: that the answer has, its end included;
    - ``truncated``: 1 where ``max_new_tokens`` cut the answer off.

    Objectives that differ only in the metric share one generation, so that correctness and length of the same answers
    can be weighed against each other, and refusals be a constraint.

    Greedy decoding unless ``temperature`` is set. Noise belongs to the prompt and the seed, so that sampled answers
    do not depend on batches or on other rows either. Where a model's outputs are not finite, so are an item's scores not.
    """

    summary: ClassVar[str] = "How good a causal language model's answers are, by graders, and how long."
    metrics: Mapping[str, Direction] = {"score": "maximise", **ALWAYS}
    columns: ClassVar[dict[str, str]] = {
        "prompt": "What the model is asked.",
        "messages": "A conversation in place of the prompt: a list of role and content (optional; needs `chat`).",
        **{role: text for found in GRADERS.values() for role, text in found.columns.items()},
    }
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    uses_head: ClassVar[bool] = False

    class Options(Evaluator.Options):
        """Options of generation."""

        graders: dict[MetricName, GraderSpec] = Field(
            default={"score": GraderSpec(name="exact_match")},
            max_length=50,
            description="Graders by the name of their metric: the name of a grader, or its `name` and `options`.",
            examples=[{"correct": "number", "polite": {"name": "regex", "options": {"pattern": "(?i)please"}}}],
        )
        template: str = Field(
            default="{prompt}",
            min_length=1,
            max_length=100_000,
            description="What the model reads; `{name}` stands for the role or column of that name.",
            examples=["Question: {prompt}\nAnswer:"],
        )
        chat: bool = Field(default=False, description="Write prompts as the model's chat template does.")
        system: str | None = Field(
            default=None, max_length=100_000, description="System prompt of the chat template.", examples=["Be brief."]
        )
        chat_variables: dict[str, bool | int | float | str] = Field(
            default={},
            description="Variables of the chat template, such as switches between ways to think.",
            examples=[{"enable_thinking": False}],
        )
        max_new_tokens: int = Field(default=256, ge=1, le=100_000, description="Longest answer, in tokens.")
        stop: list[str] = Field(
            default=[],
            max_length=20,
            description="Texts that end an answer; they do not belong to it.",
            examples=[["\n\n", "Question:"]],
        )
        answer_after: str | None = Field(
            default=None,
            min_length=1,
            max_length=1000,
            description="Only what follows the last of these in an answer is graded, all of it where there is none.",
            examples=["</think>"],
        )
        temperature: float = Field(default=0.0, ge=0, le=10, description="Of sampling; 0 is greedy decoding.")
        top_p: float = Field(
            default=1.0, gt=0, le=1, description="Sample from the most likely tokens of this probability together."
        )
        top_k: int = Field(default=0, ge=0, description="Sample from so many most likely tokens; 0 from all.")
        seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Of sampling.")
        batching: Literal["auto", "continuous", "padded"] = Field(
            default="auto",
            description="`continuous` fills places up as answers end (greedy decoding without stop texts, plain attention); "
            "`padded` takes prompts of similar length together; `auto` the first where it can.",
        )
        backend: Literal["transformers", "vllm"] = Field(
            default="transformers", description="What generates; vLLM is an optional extra, for GPUs."
        )

    options: Options
    prompts: list[list[int]]

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        self._graders = {
            name: make_grader(spec, GraderInputs(inputs.rows, self._field(name), inputs.policy, inputs.roots))
            for name, spec in options.graders.items()
        }
        for name in ALWAYS:
            if name in self._graders:
                raise InvalidInput(
                    f"{name!r} is a metric already", field=self._field(name), remedy="choose another name"
                )
        self.metrics = {name: found.direction for name, found in self._graders.items()} | dict(ALWAYS)
        self.digest = _digest(self.digest, [found.digest for found in self._graders.values()])
        self._tokenizer = load_tokenizer(inputs.model_dir, inputs.field)
        self.prompts = self._tokenised()
        check_vocabulary(self.prompts, self.config, inputs.model_dir, inputs.field)
        self._check_lengths()
        self._writer = self._make_writer()

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Let a causal language model answer, and grade its answers."""
        answers = self.answers(model, cancelled)
        graded = Answers([self._text(answer) for answer in answers], cancelled, model.device)
        scores = {name: found.grade(graded) for name, found in self._graders.items()}
        scores["tokens"] = [float(len(answer.ids)) for answer in answers]
        scores["truncated"] = [float(not answer.finished) for answer in answers]
        sound = np.array([answer.sound for answer in answers])
        read = sum(map(len, self.prompts)) + sum(len(answer.ids) for answer in answers)
        return self.scored({name: _item_scores(values, sound) for name, values in scores.items()}, tokens=read)

    def answers(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> list[Answer]:
        """Return what a model writes after each of `prompts`."""
        with inference(model):
            return self._writer(model, self.prompts, cancelled)

    def depends_on(self) -> Mapping[str, Any]:
        """See `Evaluator.depends_on`: also on checkpoints that judge."""
        return {**super().depends_on(), "graders": {name: found.digest for name, found in self._graders.items()}}

    def _field(self, name: str) -> str:
        return f"{self._inputs.field}.options.graders.{name}"

    def _tokenised(self) -> list[list[int]]:
        options, rows = self.options, self._inputs.rows
        if options.chat:
            chats = conversations(rows, options.template, options.system)
            out = chat_tokens(self._tokenizer, chats, options.chat_variables, self._inputs.field)
        else:
            if options.system is not None:
                raise InvalidInput(
                    "a system prompt belongs to a chat template",
                    field=f"{self._inputs.field}.options.system",
                    remedy="set `chat: true`, or write it into the template",
                )
            out = plain_tokens(self._tokenizer, texts(rows, options.template), special=True)
        for row, ids in enumerate(out):
            if not ids:
                raise rows.error("prompt", row, "the prompt has no tokens")
        return out

    def _check_lengths(self) -> None:
        limit = longest_sequence(self._tokenizer, self.config)
        role = "messages" if self.options.chat and self._inputs.rows.has("messages") else "prompt"
        for row, ids in enumerate(self.prompts):
            if len(ids) + self.options.max_new_tokens > limit:
                raise self._inputs.rows.error(
                    role,
                    row,
                    f"the prompt has {len(ids)} tokens, and with {self.options.max_new_tokens} new ones exceeds the "
                    f"model's {limit}",
                    remedy="shorten the prompt, or lower `max_new_tokens`",
                )

    def _make_writer(self) -> Writer:
        options, config = self.options, self.config.get_text_config()
        end = end_tokens(self._inputs.model_dir, self._tokenizer, self.config)
        pad = next((one for one in (self._tokenizer.pad_token_id, config.pad_token_id, *end) if one is not None), 0)
        decoding = Decoding(
            max_new_tokens=options.max_new_tokens,
            end=end,
            pad=int(pad),
            stop=tuple(options.stop),
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            batch_size=options.batch_size,
        )
        if options.backend == "vllm":
            return VllmWriter(decoding, self._inputs.model_dir, self._inputs.field)
        fits = suits(decoding, self.config)
        if options.batching == "continuous" and not fits:
            raise InvalidInput(
                "continuous batching is for greedy decoding without stop texts, of models with plain attention",
                field=f"{self._inputs.field}.options.batching",
                remedy="use `auto` or `padded`",
            )
        padded = PaddedWriter(decoding, self._tokenizer)
        if not fits or options.batching == "padded":
            return padded
        continuous = ContinuousWriter(decoding, self._inputs.field)
        return continuous if options.batching == "continuous" else EitherWriter(continuous, padded)

    def _text(self, answer: Answer) -> str:
        """What is graded of an answer: without special tokens, up to the first stop text, after the last marker."""
        text = str(self._tokenizer.decode(list(answer.ids), skip_special_tokens=True))
        ends = [place for place in (text.find(stop) for stop in self.options.stop) if place >= 0]
        text = text[: min(ends, default=len(text))]
        return text if self.options.answer_after is None else text.rpartition(self.options.answer_after)[2]


def _item_scores(values: Sequence[float], sound: Any) -> ItemScores:
    return ItemScores(np.where(sound, np.array(values, dtype=np.float32), np.float32("nan")))


def _digest(rows: str, graders: list[str]) -> str:
    """The rows' digest, with that of what graders read besides."""
    if not any(graders):
        return rows
    return hashlib.sha256("\n".join([rows, *graders]).encode()).hexdigest()
