"""What is asked of a model that writes, and what it wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Decoding:
    """How answers are written.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        end: tokens that end an answer.
        pad: a token that fills batches up.
        stop: texts that end an answer.
        temperature: of sampling; 0 takes the most likely token each time.
        top_p: sample from the most likely tokens that have this probability together.
        top_k: sample from so many most likely tokens; 0 from all.
        seed: of sampling.
        batch_size: most answers that are written at once.
    """

    max_new_tokens: int
    end: tuple[int, ...]
    pad: int
    stop: tuple[str, ...]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    batch_size: int


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt.

    Attributes:
        ids: all tokens, the one that ended it included.
        finished: whether an end token or a stop text ended it, not the limit.
        sound: whether the model's outputs were finite; what it wrote otherwise means nothing.
    """

    ids: Sequence[int]
    finished: bool
    sound: bool = True


class Writer(Protocol):
    """Lets a model write: one answer a prompt, in their order."""

    def __call__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], cancelled: Callable[[], bool]
    ) -> list[Answer]:
        """Write.

        Args:
            model: a causal language model, in evaluation mode without gradients.
            prompts: tokens, at least one each.
            cancelled: asked at least every few tokens.

        Raises:
            Cancelled: ``cancelled`` returned True.
        """
        ...


def item_seed(seed: int, prompt: Sequence[int]) -> int:
    """Return the 63 bits that the noise of one answer begins with: a function of the prompt, not of its neighbours.

    Args:
        seed: the job's choice.
        prompt: its tokens.
    """
    text = f"{seed} {','.join(map(str, prompt))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
