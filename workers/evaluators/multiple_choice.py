"""Multiple choice by log-likelihood: which answer a causal language model finds most likely."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.data import Rows, is_text
from workers.evaluators.base import Evaluator, Inputs, Prediction, Scores, evaluator, never
from workers.evaluators.likelihood import LikelihoodScorer, Scored, encode, prefix_token
from workers.evaluators.loading import load_tokenizer, max_length


@evaluator("multiple_choice")
class MultipleChoice(Evaluator):
    """Each question is an item. With s the log-likelihood of each choice given the question, per item:

    - ``accuracy``: 1 if the right choice has the highest s;
    - ``accuracy_norm``: 1 if it has the highest s per UTF-8 byte of the choice (the separator not counted);
    - ``loss``: −log softmax(s) of the right choice, in nats: smooth where accuracies jump.

    As in lm-evaluation-harness: the question and ``separator + choice`` are tokenised together, spaces at the end of the
    question belonging to the choice; what exceeds the question's own tokens is the choice; nothing is put before them
    unless ``add_bos`` is set, or the question is empty; a question that is too long loses its beginning. It normalises
    by characters, which is the same for ASCII.
    """

    summary: ClassVar[str] = "How often a causal language model finds the right answer the most likely one."
    metrics: Mapping[str, Direction] = {
        "accuracy": "maximise",
        "accuracy_norm": "maximise",
        "loss": "minimise",
    }
    columns: ClassVar[dict[str, str]] = {
        "question": "The question.",
        "choices": "The possible answers: a list of texts, or such a list as JSON.",
        "answer": "The right choice: its index from 0, or its letter from A.",
    }
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    uses_head: ClassVar[bool] = False

    class Options(Evaluator.Options):
        """Options of multiple choice."""

        template: str = Field(
            default="{question}",
            pattern=r"\{question\}",
            max_length=100_000,
            description="What the model reads before a choice; `{question}` stands for the question.",
            examples=["Question: {question}\nAnswer:"],
        )
        separator: str = Field(
            default=" ", max_length=100, description="What stands between the question and a choice."
        )
        add_bos: bool = Field(
            default=False, description="Begin with the tokenizer's BOS token, which some models need (Gemma)."
        )
        max_length: int | None = Field(
            default=None,
            ge=2,
            le=1_000_000,
            description="Longer questions lose their beginning; the model's limit, at most 1024 tokens, by default.",
            examples=[512],
        )

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        rows, model_dir, field = inputs.rows, inputs.model_dir, inputs.field
        tokenizer = load_tokenizer(model_dir, field)
        limit = max_length(options.max_length, tokenizer, self.config, field)
        questions = [options.template.replace("{question}", text) for text in rows.texts("question")]
        choices = [_choices(value, row, rows) for row, value in enumerate(rows.values("choices"))]
        self._answers = np.array(
            [_answer(value, len(choices[row]), row, rows) for row, value in enumerate(rows.values("answer"))]
        )
        self._counts = np.array([len(texts) for texts in choices])
        self._bytes = np.array([len(text.encode()) for texts in choices for text in texts], dtype=np.float64)
        contexts = [question for question, texts in zip(questions, choices, strict=True) for _ in texts]
        continuations = [options.separator + text for texts in choices for text in texts]
        sequences = _encode_pairs(tokenizer, contexts, continuations, prefix_token(tokenizer, field), options.add_bos)
        owners = np.repeat(np.arange(len(choices)), self._counts)
        sequences = [_cut(sequence, limit, int(row), rows) for sequence, row in zip(sequences, owners, strict=True)]
        self._scorer = LikelihoodScorer(sequences, self.config, model_dir, field, options.batch_size)
        self.tokens = self._scorer.tokens

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a causal language model."""
        likelihoods = -self._scorer.losses(model, cancelled)
        ends = np.cumsum(self._counts)[:-1]
        plain = np.split(likelihoods, ends)
        normed = np.split(likelihoods / self._bytes, ends)
        return self.scored(
            {
                "accuracy": _item_scores(_correct, plain, self._answers),
                "accuracy_norm": _item_scores(_correct, normed, self._answers),
                "loss": _item_scores(_loss, plain, self._answers),
            }
        )

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """See `Evaluator.predictions`; the choices are the classes, each as likely as ``loss`` takes it to be."""
        tokens = self._scorer.predictions(model)
        for count, answer in zip(self._counts, self._answers, strict=True):
            choices = [one.log_likelihoods.gather(1, one.observed[:, None]).sum() for one in islice(tokens, int(count))]
            likelihoods = torch.stack(choices).log_softmax(dim=0)
            yield Prediction(likelihoods[None], torch.tensor([int(answer)], device=likelihoods.device))


def _item_scores(
    score: Callable[[NDArray[np.float64], int], float], likelihoods: list[NDArray[np.float64]], answers: NDArray[Any]
) -> ItemScores:
    values = [score(item, int(answer)) for item, answer in zip(likelihoods, answers, strict=True)]
    return ItemScores(np.array(values, dtype=np.float32))


def _correct(likelihoods: NDArray[np.float64], answer: int) -> float:
    if not np.isfinite(likelihoods).all():
        return float("nan")  # the largest of them would be an arbitrary choice
    return float(likelihoods.argmax() == answer)


def _loss(likelihoods: NDArray[np.float64], answer: int) -> float:
    with np.errstate(invalid="ignore"):
        shifted = likelihoods - likelihoods.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[answer])


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, contexts: list[str], continuations: list[str], prefix: int, add_bos: bool
) -> list[Scored]:
    stripped = [context.rstrip() for context in contexts]
    whole = encode(tokenizer, [a + b for a, b in zip(contexts, continuations, strict=True)])
    alone = encode(tokenizer, stripped)
    out = []
    for ids, context in zip(whole, alone, strict=True):
        before = [prefix] if add_bos or not context else []
        out.append(Scored(before + ids, len(before) + len(context)))
    return out


def _cut(sequence: Scored, limit: int, row: int, rows: Rows) -> Scored:
    """Drop the beginning of a context that is too long; the model reads all tokens but the last."""
    excess = max(0, len(sequence.ids) - (limit + 1))
    if sequence.start >= len(sequence.ids):
        raise rows.error("choices", row, "a choice adds no tokens to the question")
    if sequence.start - excess < 1:
        raise rows.error("choices", row, f"a choice is longer than {limit} tokens, the most that the model reads")
    return Scored(sequence.ids[excess:], sequence.start - excess)


def _choices(value: Any, row: int, rows: Rows) -> Sequence[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list) or len(value) < 2 or not all(is_text(text) and text for text in value):
        raise rows.error(
            "choices", row, "two or more texts are needed", remedy='give a list of texts, in CSV as JSON: ["yes", "no"]'
        )
    return value


def _answer(value: Any, count: int, row: int, rows: Rows) -> int:
    index = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str):
        text = value.strip()
        if text.isdecimal() and len(text) < 10:
            index = int(text)
        elif len(text) == 1 and text.upper() in string.ascii_uppercase:
            index = string.ascii_uppercase.index(text.upper())
    if index is None or not 0 <= index < count:
        raise rows.error(
            "answer",
            row,
            f"{str(value)[:100]!r} is none of the {count} choices",
            remedy=f"use an index from 0 to {count - 1}, or a letter from A",
        )
    return index
