"""Language modelling: how well a causal language model predicts texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import numpy as np
from pydantic import Field
from transformers import PreTrainedModel

from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.evaluators.base import Evaluator, Inputs, Prediction, Scores, evaluator, never
from workers.evaluators.likelihood import LikelihoodScorer, Scored, encode, prefix_token
from workers.evaluators.loading import load_tokenizer, max_length


@evaluator("causal_lm")
class CausalLM(Evaluator):
    """Each text is an item. With L its negative log-likelihood in nats, T its tokens and B its UTF-8 bytes, per item:

    - ``bits_per_byte`` = L / (B ln 2), weight B: the mean is all bits over all bytes, comparable between tokenizers;
    - ``loss`` = L / T, weight T: the mean is the loss per token;
    - ``perplexity`` = exp(L / T), no weights: the mean is the mean of the texts' perplexities, which is not the
      perplexity of all texts together; that is exp of the mean ``loss``.

    Every token of a text is predicted exactly once. The first one is predicted from the BOS token alone (EOS where the
    tokenizer has no BOS); no other special token is added. A text longer than ``max_length`` is cut into windows of that
    many predicted tokens, which do not overlap; each window but the first begins with the last token of the one before
    as its only context. (lm-evaluation-harness's rolling log-likelihood does the same, except that its last window looks
    further back.)
    """

    summary: ClassVar[str] = "How well a causal language model predicts texts."
    metrics: Mapping[str, Direction] = {
        "bits_per_byte": "minimise",
        "loss": "minimise",
        "perplexity": "minimise",
    }
    columns: ClassVar[dict[str, str]] = {"text": "The text to predict."}
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    uses_head: ClassVar[bool] = False

    class Options(Evaluator.Options):
        """Options of language modelling."""

        max_length: int | None = Field(
            default=None,
            ge=2,
            le=1_000_000,
            description="Tokens in a window; the model's limit, at most 1024, by default.",
            examples=[512],
        )

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        rows, model_dir, field = inputs.rows, inputs.model_dir, inputs.field
        tokenizer = load_tokenizer(model_dir, field)
        window = max_length(options.max_length, tokenizer, self.config, field)
        prefix = prefix_token(tokenizer, field)
        texts = rows.texts("text")
        encoded = encode(tokenizer, texts)
        sequences: list[Scored] = []
        owners: list[int] = []
        for row, ids in enumerate(encoded):
            if not ids:
                raise rows.error("text", row, "the text has no tokens")
            windows = _windows([prefix, *ids], window)
            sequences += windows
            owners += [row] * len(windows)
        self._owners = np.array(owners)
        self._tokens = np.array([len(ids) for ids in encoded])
        self._bytes = np.array([len(text.encode()) for text in texts])
        self._scorer = LikelihoodScorer(sequences, self.config, model_dir, field, options.batch_size)
        self.tokens = self._scorer.tokens

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a causal language model."""
        losses = self._scorer.losses(model, cancelled)
        nats = np.bincount(self._owners, weights=losses, minlength=len(self))
        per_token = nats / self._tokens
        with np.errstate(over="ignore"):  # a perplexity is infinite in float32 above 88 nats a token, and meant to be
            return self.scored(
                {
                    "bits_per_byte": ItemScores(
                        (nats / math.log(2) / self._bytes).astype(np.float32), self._bytes.astype(np.float32)
                    ),
                    "loss": ItemScores(per_token.astype(np.float32), self._tokens.astype(np.float32)),
                    "perplexity": ItemScores(np.exp(per_token).astype(np.float32)),
                }
            )

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """See `Evaluator.predictions`; every window is an item."""
        return self._scorer.predictions(model)


def _windows(ids: list[int], size: int) -> list[Scored]:
    return [Scored(ids[first : first + size + 1], 1) for first in range(0, len(ids) - 1, size)]
