"""Measures against what experts say of the same items: each expert answers once, and its answers are kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.errors import InvalidInput
from workers.evaluators.base import Cancelled, Inputs, inference, never
from workers.evaluators.unlabelled import Unlabelled, UnlabelledOptions

Answers = Mapping[str, Tensor]


@dataclass(frozen=True)
class Ragged:
    """Rows that belong to items, different numbers of them to each, one item after the other.

    Attributes:
        values: shape (rows, …).
        counts: shape (items,), int64.
    """

    values: Tensor
    counts: Tensor

    def take(self, items: Sequence[int] | NDArray[np.int64]) -> Ragged:
        """Return the rows of some items, in their order."""
        chosen = torch.as_tensor(np.asarray(items, dtype=np.int64))
        ends = self.counts.cumsum(0)
        parts = [torch.arange(int(ends[item] - self.counts[item]), int(ends[item])) for item in chosen]
        return Ragged(self.values[torch.cat(parts)], self.counts[chosen])

    def split(self) -> list[Tensor]:
        """Return each item's rows."""
        return list(torch.split(self.values, self.counts.tolist()))

    @classmethod
    def gather(cls, parts: Sequence[tuple[NDArray[np.int64], Tensor, Tensor]]) -> Ragged:
        """Put batches into the items' order: of each its items, their rows one after the other, and their counts."""
        items = np.concatenate([part[0] for part in parts])
        found = cls(torch.cat([part[1].cpu() for part in parts]), torch.cat([part[2] for part in parts]))
        return found.take(np.argsort(items))

    @classmethod
    def read(cls, answers: Answers, name: str) -> Ragged:
        """Read what `written` wrote."""
        return cls(answers[name], answers[f"{name}.counts"])

    def written(self, name: str) -> dict[str, Tensor]:
        """Return it as tensors by name."""
        return {name: self.values, f"{name}.counts": self.counts}


class ReferenceOptions(UnlabelledOptions):
    """Options of measures against experts."""

    experts: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Experts to compare with; by default the one whose head the objective uses, else all.",
        examples=[["german"]],
    )


class ReferenceEvaluator(Unlabelled):
    """An evaluator that compares a model with experts.

    Who makes one lets it `observe` each expert in its own weights, once, and hands it all answers by `refer` before it
    evaluates (`workers.references` does so, and keeps the answers). The answers depend on the expert's weights, on what
    `content` digests, on `version`, and on the options but for ``experts`` and ``batch_size``.
    """

    remembered: ClassVar[bool] = False  # other jobs have other experts under the same names

    def __init__(self, options: ReferenceOptions, inputs: Inputs, room: int = 0) -> None:
        super().__init__(options, inputs, room)
        self._answers: dict[str, Answers] = {}

    @abstractmethod
    def observe(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> dict[str, Tensor]:
        """Return what an expert says of the items, on the CPU: every answer as `Ragged.written` writes it.

        Args:
            model: as for `evaluate`, with the expert's weights.
            cancelled: asked before every batch; True raises `Cancelled`.
        """

    def refer(self, answers: Mapping[str, Answers]) -> None:
        """Take what `observe` returned, by expert, at least one."""
        self._answers = dict(answers)

    def subset(self, items: Sequence[int]) -> Self:
        """See `Evaluator.subset`; what experts say of the chosen items is not asked again."""
        part = super().subset(items)
        part.refer({expert: _part(answers, items) for expert, answers in self._answers.items()})
        return part

    @property
    def answers(self) -> dict[str, Answers]:
        """What the experts said; raises `InvalidInput` where none was asked."""
        if not self._answers:
            raise InvalidInput(
                f"{self.name} compares with experts, and none was asked",
                field="evaluator",
                remedy="use it for objectives; for calibration use for example causal_lm or text_classification",
            )
        return self._answers

    def _gather(
        self,
        model: PreTrainedModel,
        look: Callable[[Any], Mapping[str, tuple[Tensor, Tensor]]],
        cancelled: Callable[[], bool],
    ) -> dict[str, Tensor]:
        """Run a model over all batches; ``look`` returns of each, by name, rows of its items and how many each has."""
        parts: dict[str, list[tuple[NDArray[np.int64], Tensor, Tensor]]] = {}
        with inference(model):
            for batch in self._batches:
                if cancelled():
                    raise Cancelled("the evaluation was called off")
                for name, (rows, counts) in look(batch).items():
                    parts.setdefault(name, []).append((batch.items, rows.cpu(), counts))
        out: dict[str, Tensor] = {}
        for name, found in parts.items():
            out |= Ragged.gather(found).written(name)
        return out


def item_means(values: Tensor, counts: Tensor) -> Tensor:
    """Return the mean over each item's rows, shape (items,); ``values`` has shape (rows,).

    One after the other: sums by index are not the same every time on a GPU.
    """
    return torch.stack([part.mean() for part in torch.split(values, counts.tolist())])


def _part(answers: Answers, items: Sequence[int]) -> dict[str, Tensor]:
    names = [name for name in answers if f"{name}.counts" in answers]
    out: dict[str, Tensor] = {}
    for name in names:
        out |= Ragged.read(answers, name).take(items).written(name)
    return out
