"""Log-likelihoods of token sequences under a causal language model: what its evaluators share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimizer.errors import InvalidCheckpoint
from workers.evaluators.base import Batch, Prediction, by_length, log_softmax, pad, run
from workers.evaluators.loading import check_vocabulary

# Logits take most of the memory: tokens × vocabulary, in float32 and once more for the softmax.
MAX_LOGITS = 2**27
UNSCORED = -100
"""Target of a token that is only context."""


@dataclass(frozen=True)
class Scored:
    """A sequence of tokens of which some are predicted.

    Attributes:
        ids: the tokens.
        start: the first token that is predicted, at least 1; all before it are only context.
    """

    ids: list[int]
    start: int


class LikelihoodScorer:
    """Prepared sequences, scored by any number of models.

    Args:
        sequences: each with at least one predicted token.
        config: the model's.
        model_dir: where the tokenizer is from, for errors.
        field: dotted path of the objective.
        batch_size: most sequences in a batch; fewer where they are long.

    Attributes:
        tokens: that a model reads for all of them.

    Raises:
        InvalidCheckpoint: a token is not in the model's vocabulary.
    """

    def __init__(
        self, sequences: Sequence[Scored], config: PreTrainedConfig, model_dir: Path, field: str, batch_size: int
    ) -> None:
        check_vocabulary((sequence.ids for sequence in sequences), config, model_dir, field)
        vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 1
        groups = by_length([len(s.ids) - 1 for s in sequences], batch_size, MAX_LOGITS // vocabulary)
        self._sequences = sequences
        self.tokens = sum(len(sequence.ids) - 1 for sequence in sequences)
        self._batches = [_batch(items, [sequences[i] for i in items]) for items in groups]

    def losses(self, model: PreTrainedModel, cancelled: Callable[[], bool]) -> NDArray[np.float64]:
        """Return the negative log-likelihood (nats) of each sequence's predicted tokens, shape (sequences,)."""
        out: NDArray[np.float64] = self.scores(model, _losses, cancelled)[0]
        return out

    def scores(
        self, model: PreTrainedModel, score: Callable[[Tensor, Tensor], Tensor], cancelled: Callable[[], bool]
    ) -> NDArray[np.float64]:
        """Return anything else about the predicted tokens, shape (scores, sequences).

        Args:
            model: a causal language model.
            score: gets the logits, shape (batch, tokens, vocabulary), and the tokens that they predict, shape (batch,
                tokens), `UNSCORED` where none is; returns shape (scores, batch).
            cancelled: asked before every batch.
        """
        return run(model, self._batches, lambda model, batch: score(*_outputs(model, batch)), cancelled)

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """Yield the predicted tokens of each sequence, one sequence after the other; see `Evaluator.predictions`."""
        for number, sequence in enumerate(self._sequences):
            logits, targets = _outputs(model, _batch(np.array([number]), [sequence]))
            yield Prediction(log_softmax(logits[0]), targets[0])


def _batch(items: NDArray[np.int64], sequences: list[Scored]) -> Batch:
    ids = pad([s.ids[:-1] for s in sequences], 0)  # masked, and behind the tokens: any id serves
    mask = pad([[1] * (len(s.ids) - 1) for s in sequences], 0)
    targets = pad([[UNSCORED] * (s.start - 1) + s.ids[s.start :] for s in sequences], UNSCORED)
    first = min(s.start for s in sequences) - 1
    return Batch(items, {"input_ids": ids, "attention_mask": mask}, targets[:, first:])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="none"
    )
    return losses.view(targets.shape).double().sum(dim=1)[None]


def _outputs(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
    targets = batch.targets.to(model.device)
    # Positions at which no sequence is scored yet need no logits; in small models these cost a quarter of the pass.
    kept = targets.shape[1]
    options = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(**inputs, **options, use_cache=False).logits[:, -kept:], targets


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each text, without special ones."""
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def prefix_token(tokenizer: PreTrainedTokenizerBase, field: str) -> int:
    """Return the token that stands before a text: BOS, or EOS where the tokenizer has no BOS.

    Raises:
        InvalidCheckpoint: it has neither, so that nothing can predict the first token.
    """
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise InvalidCheckpoint(
            "the tokenizer has neither a BOS nor an EOS token to stand before the first token",
            field=f"{field}.evaluator",
            remedy="give the tokenizer a bos_token",
        )
    return int(token)
