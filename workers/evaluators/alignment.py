"""Alignment of a model's hidden states and logits with those of the experts, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.errors import InfeasibleCandidate, InvalidInput
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.evaluators.base import Batch, Inputs, Scores, evaluator, never, run
from workers.evaluators.reference import Ragged, ReferenceEvaluator, ReferenceOptions, item_means


@evaluator("alignment")
class Alignment(ReferenceEvaluator):
    """Per item, averaged over the experts:

    - ``logits``: T² KL(softmax(expert's logits / T) ‖ softmax(model's logits / T)) in nats, with the temperature T;
    - ``hidden``: the mean squared difference of hidden states, over dimensions, places and then layers;
    - ``alignment``: ``logits`` + ``hidden_weight`` · ``hidden``.

    The losses of Expert Merging (Zhang et al., arXiv 2509.25712) with its code's defaults, where the cross-entropy is less
    the expert's own entropy, so that 0 is perfect; its regulariser is up to the search space's bounds. The method gets by
    with 5 to 10 items. Each expert's answers take, an item, 4 bytes × ``positions`` × (classes + layers × dimensions).
    """

    summary: ClassVar[str] = "How far hidden states and logits are from the experts' (Expert Merging); needs no labels."
    metrics: Mapping[str, Direction] = {"alignment": "minimise", "logits": "minimise", "hidden": "minimise"}

    class Options(ReferenceOptions):
        """Options of alignment."""

        positions: int | None = Field(
            default=16,
            ge=1,
            le=1_000_000,
            description="Most tokens (of images: patches) of an item that are compared, spread evenly. None: all.",
        )
        layers: list[int] | None = Field(
            default=None,
            min_length=1,
            description="Layers whose hidden states count: 0 for the embeddings, −1 for the last; all by default.",
            examples=[[12]],
        )
        temperature: float = Field(default=3.0, gt=0, le=1000, description="Of the softmax of both sides' logits.")
        hidden_weight: float = Field(default=0.1, ge=0, le=1e6, description="Weight of `hidden` in `alignment`.")

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        depth = getattr(self.config.get_text_config(), "num_hidden_layers", None)
        if depth is not None:
            self._layers(depth + 1)

    def observe(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> dict[str, Tensor]:
        """See `ReferenceEvaluator.observe`."""
        return self._gather(model, lambda batch: self._look(model, batch), cancelled)

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a classifier or a causal language model."""
        answers = [
            {name: Ragged.read(found, name) for name in found if f"{name}.counts" in found}
            for found in self.answers.values()
        ]
        found = run(model, self._batches, lambda model, batch: self._score(model, batch, answers), cancelled)
        columns = zip(self.metrics, found.astype(np.float32), strict=True)
        return self.scored({metric: ItemScores(values) for metric, values in columns})

    def _look(self, model: PreTrainedModel, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        outputs = self.outputs(model, batch, self.options.positions, hidden=True)
        found = {"logits": (outputs.logits, outputs.counts)}
        for number in self._layers(len(outputs.hidden)):
            states, counts = outputs.hidden[number]
            found[f"hidden.{number}"] = (states.float(), counts)
        return found

    def _layers(self, count: int) -> list[int]:
        if self.options.layers is None:
            return list(range(count))
        for layer in self.options.layers:
            if not -count <= layer < count:
                raise InvalidInput(
                    f"the model has hidden states 0 to {count - 1}, not {layer}",
                    field=f"{self._inputs.field}.options.layers",
                )
        return sorted({layer % count for layer in self.options.layers})

    def _score(self, model: PreTrainedModel, batch: Batch, answers: Sequence[Mapping[str, Ragged]]) -> Tensor:
        own = self._look(model, batch)
        sums = torch.zeros(3, len(batch.items), dtype=torch.float64, device=own["logits"][0].device)
        for theirs in answers:
            if theirs.keys() != own.keys():
                raise InfeasibleCandidate(
                    "the model has other layers than the expert whose hidden states it is compared with",
                    field="evaluator",
                    remedy="use `divergence`, or leave the number of layers as it is",
                )
            layers = []
            for name, (values, counts) in own.items():
                expected = theirs[name].take(batch.items).values.to(values.device)
                if name == "logits":
                    logits = item_means(self._distance(values, expected), counts)
                else:
                    layers.append(item_means((values - expected).square().mean(dim=-1), counts))
            hidden = torch.stack(layers).mean(dim=0)
            sums += torch.stack([logits + self.options.hidden_weight * hidden, logits, hidden])
        return sums / len(answers)

    def _distance(self, logits: Tensor, expected: Tensor) -> Tensor:
        warm = self.options.temperature
        q, p = ((part / warm).log_softmax(dim=-1) for part in (logits, expected))
        out: Tensor = warm**2 * (p.exp() * (p - q)).sum(dim=-1)
        return out
