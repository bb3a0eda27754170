"""What an evaluator is: it reads its items once, and scores any number of models on them."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from optimizer.errors import InvalidData, InvalidInput, RetryableError, from_validation
from optimizer.fitness.aggregate import ItemScores
from optimizer.fitness.cost import Cost
from optimizer.problem import EvaluatorInfo
from optimizer.registry import Registry
from optimizer.spec import Direction, Objective, Strict
from workers.data import Rows, digest_of
from workers.evaluators.loading import load_config
from workers.policy import Policy
from workers.roots import NOTHING, NOWHERE, Roots
from workers.services.sharing import Services


class Cancelled(RetryableError):
    """An evaluation was called off between two batches; it has no scores."""

    code = "cancelled"


def never() -> bool:
    return False


@dataclass(frozen=True)
class Prediction:
    """What a model holds likely of one item (or window of a long text).

    Attributes:
        log_likelihoods: shape (draws, classes), float32 or float64: log-probabilities (nats) of each draw's classes. A
            classifier draws once, a language model draws every token from its vocabulary.
        observed: shape (draws,): the class that each draw has in the data.
        last: whether no later prediction comes from the same forward pass, so that one backward pass can be for all that
            do.
    """

    log_likelihoods: Tensor
    observed: Tensor
    last: bool = True


class Scores(dict[str, ItemScores]):
    """The scores of an evaluation by metric, and what they cost.

    Attributes:
        cost: of all of them together.
    """

    def __init__(self, scores: Mapping[str, ItemScores], cost: Cost) -> None:
        super().__init__(scores)
        self.cost = cost


@dataclass(frozen=True)
class Inputs:
    """What an evaluator is made from, beside its options.

    Attributes:
        rows: the items, at least one; none where the evaluator has items of its own.
        model_dir: checkpoint directory with the config and the tokenizer or image processor: the head expert's, else the
            base's. In jobs without checkpoints it is empty, and only evaluators that ask services are used.
        field: dotted path of the objective in the job: ``objectives.0``.
        policy: what the server allows.
        roots: where files that options name may be; nowhere by default.
        services: by which services are asked; of its own by default.
    """

    rows: Rows
    model_dir: Path
    field: str
    policy: Policy = NOTHING
    roots: Roots = NOWHERE
    services: Services = dataclasses.field(default_factory=Services)


class Evaluator(ABC):
    """A measure of a model on the rows of an objective.

    The contract (tests/workers/evaluators/test_conformance.py runs it over every evaluator):

    - The constructor does all that does not depend on the weights: it checks every row against the model's config,
      and tokenises or decodes it. Bad rows raise `InvalidData` that names the column's field and the row.
    - `evaluate` returns every metric, item by item, from one pass over the items, in the rows' order. The same model
      gives the same scores bit for bit; the batch size and the order of the rows change no more than rounding.
    - The model may be on any device, in float32 or bfloat16; it is left as it was. Losses are computed in float32.
    - Scores that are NaN or infinite are returned as they are: the aggregation decides what they mean.
    - What an evaluation cost comes with its scores: `scored` does so where every evaluation takes the same tokens.

    Attributes:
        metrics: metric to its direction; the first is the default. An instance's are those it returns; they may be others
            than those of its class, which the catalogue shows.
        columns: role of each data column to its description.
        auto_class: name of the class of `transformers` that opens the models it scores; empty for those that ask a
            service instead (`workers.evaluators.service`).
        uses_head: whether it needs a head that belongs to one expert.
        whole_only: metrics that are measured on all items or not at all. Others are means of what every item has by itself,
            so that a part of the items gives an estimate of the whole; of these an item's score depends on the others
            (`workers.evaluators.contributions`), and on a part they are the measure of that part.
        own_items: whether the items come from its options, so that an objective names no data.
        data_optional: whether an objective may name data or not.
        version: raise it when the same model and rows no longer give the same scores, so that none is read from a cache.
        remembered: whether an item's score may be kept and taken for the same merge again; see also `depends_on`.
        digest: SHA-256 over the rows, as hexadecimal digits.
        tokens: that a model reads in an evaluation of all rows; 0 where it reads none, or where they are counted otherwise.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    metrics: Mapping[str, Direction]
    columns: ClassVar[dict[str, str]]
    auto_class: ClassVar[str]
    uses_head: ClassVar[bool]
    whole_only: frozenset[str] = frozenset()
    own_items: ClassVar[bool] = False
    data_optional: ClassVar[bool] = False
    version: ClassVar[int] = 1
    remembered: ClassVar[bool] = True

    class Options(Strict):
        """Options of the evaluator; subclasses add fields with bounds and descriptions."""

        batch_size: int = Field(
            default=32, ge=1, le=4096, description="Most sequences or images in one forward pass.", examples=[32]
        )

    def __init__(self, options: Any, inputs: Inputs) -> None:
        """Prepare the rows.

        Args:
            options: an instance of the class's ``Options``.
            inputs: the rows and what they are to be read with.

        Raises:
            InvalidData: a row does not fit; names the column's field and the row.
            InvalidInput: the data maps a role that the evaluator does not have, or an option does not fit the model.
            InvalidCheckpoint: the config, tokenizer or image processor is missing or unusable.
        """
        rows = inputs.rows
        for role in rows.columns:
            if role not in self.columns:
                raise InvalidData(
                    f"{self.name} has no column role {role!r}",
                    field=f"{rows.field}.columns.{role}",
                    remedy=f"its roles are: {', '.join(self.columns)}",
                )
        if self.auto_class:
            self.config = load_config(inputs.model_dir, inputs.field)
        self.options = options
        self._items = len(rows)
        self.digest = rows.digest
        self.tokens = 0
        self._inputs = inputs

    def __len__(self) -> int:
        return self._items

    def subset(self, items: Sequence[int]) -> Self:
        """Return an evaluator of the same kind over some of the rows, in the order of ``items``."""
        rows = self._inputs.rows
        chosen = [rows.items[item] for item in items]
        places = [rows.places[item] for item in items]
        part = dataclasses.replace(rows, items=chosen, places=places, digest=digest_of(chosen))
        return type(self)(self.options, dataclasses.replace(self._inputs, rows=part))

    @property
    def rows(self) -> Rows:
        """The rows that it was made from; none where it has items of its own."""
        return self._inputs.rows

    @cached_property
    def item_digests(self) -> tuple[bytes, ...]:
        """What each item is known by, 16 bytes each: its content, or its place among items of the evaluator's own."""
        rows = self._inputs.rows
        if len(rows) == len(self):
            return rows.digests
        return tuple(hashlib.sha256(f"{self.digest}:{n}".encode()).digest()[:16] for n in range(len(self)))

    def depends_on(self) -> Mapping[str, Any]:
        """Return as plain data what scores depend on beside model, items, version and options: versions of others' code."""
        return {"classes": {name: list(classes) for name, classes in self._inputs.rows.classes.items()}}

    @property
    def differentiable(self) -> bool:
        """Whether `predictions` gives likelihoods, so that their gradients with respect to the weights can be had."""
        return type(self).predictions is not Evaluator.predictions

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a model.

        Args:
            model: of the class that ``auto_class`` names, with the config of ``model_dir``.
            cancelled: asked before every batch; True raises `Cancelled`.

        Returns:
            For each metric its scores, shape (items,), and the cost.
        """

    def scored(self, scores: Mapping[str, ItemScores], tokens: int | None = None) -> Scores:
        """Return scores of all rows with their cost; ``tokens`` where an evaluation does not take `tokens` of them."""
        return Scores(scores, Cost(items=len(self), tokens=self.tokens if tokens is None else tokens))

    def estimate(self) -> Cost:
        """Return the most that one evaluation is thought to cost."""
        return Cost(items=len(self), tokens=self.tokens)

    def predictions(self, model: PreTrainedModel) -> Iterator[Prediction]:
        """Yield what a model holds likely of each item, in no particular order, for gradients with respect to weights.

        Whether gradients are recorded, and the model's mode, are the caller's. Draws are those that ``loss`` is the
        negative log-likelihood of.

        Raises:
            InvalidInput: the evaluator's scores are no likelihoods.
        """
        del model
        raise InvalidInput(
            f"{self.name} gives no likelihoods, so nothing can be derived from its items",
            field="evaluator",
            remedy="use another evaluator for calibration, for example causal_lm or text_classification",
        )

    @classmethod
    def info(cls) -> EvaluatorInfo:
        """Return what the API tells of this evaluator."""
        return EvaluatorInfo(
            name=cls.name,
            summary=cls.summary,
            metrics=dict(cls.metrics),
            columns=cls.columns,
            options_schema=cls.Options.model_json_schema(),
        )


EVALUATORS: Registry[type[Evaluator]] = Registry("evaluator", "workers.evaluators")

E = TypeVar("E", bound=type[Evaluator])


def evaluator(name: str) -> Callable[[E], E]:
    """Register an evaluator under ``name``: ``@evaluator("causal_lm")``."""

    def decorate(cls: E) -> E:
        cls.name = name
        EVALUATORS.register(name)(cls)
        return cls

    return decorate


def parse_evaluator(objective: Objective, index: int) -> tuple[type[Evaluator], Evaluator.Options]:
    """Find the evaluator of the job's objective number ``index`` and validate its options.

    Raises:
        InvalidInput: names ``objectives.N.evaluator`` or the option.
    """
    return find_evaluator(objective.evaluator, objective.options, f"objectives.{index}")


def find_evaluator(name: str, options: Mapping[str, Any], field: str) -> tuple[type[Evaluator], Evaluator.Options]:
    """Find an evaluator and validate its options; raises `InvalidInput` below the dotted path ``field``."""
    cls = EVALUATORS.find(name, f"{field}.evaluator")
    try:
        return cls, cls.Options.model_validate(dict(options))
    except ValidationError as error:
        raise from_validation(error, f"{field}.options") from error


def resolve_metric(objective: Objective, found: Evaluator | type[Evaluator], index: int) -> tuple[str, Direction]:
    """Return the objective's metric and direction with the evaluator's defaults filled in.

    Raises:
        InvalidInput: the evaluator has no such metric; names ``objectives.N.metric`` and lists those it has.
    """
    metric = objective.metric if objective.metric is not None else next(iter(found.metrics))
    if metric not in found.metrics:
        raise InvalidInput(
            f"{found.name} has no metric {metric!r}",
            field=f"objectives.{index}.metric",
            remedy=f"use one of: {', '.join(found.metrics)}",
        )
    return metric, objective.direction or found.metrics[metric]


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once.

    Attributes:
        items: shape (batch,): positions in the original order.
        inputs: keyword arguments of the model's forward, padded to the batch's longest.
        targets: what the outputs are compared with; first dimension is the batch.
    """

    items: NDArray[np.int64]
    inputs: dict[str, Tensor]
    targets: Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities over the last dimension, in float32 where the logits are less precise."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def by_length(lengths: Sequence[int], batch_size: int, max_padded: int | None = None) -> list[NDArray[np.int64]]:
    """Group positions into batches of similar length, the longest first.

    Args:
        lengths: one a sequence, in tokens.
        batch_size: most sequences in a batch.
        max_padded: most tokens in a batch, padding counted; a single longer sequence is still a batch.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches = []
    while len(order):
        longest = max(1, lengths[order[0]])
        size = batch_size if max_padded is None else min(batch_size, max(1, max_padded // longest))
        batches.append(order[:size])
        order = order[size:]
    return batches


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return sequences as rows padded on the right, shape (sequences, longest), int64."""
    tensors = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def run(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    score: Callable[[PreTrainedModel, Batch], Tensor],
    cancelled: Callable[[], bool],
) -> NDArray[np.float64]:
    """Score all batches and put the results back into the original order.

    Args:
        model: stays as it is.
        batches: which cover every position once.
        score: returns the scores of one batch, shape (scores, batch), on any device.
        cancelled: asked before every batch.

    Returns:
        Shape (scores, items).

    Raises:
        Cancelled: ``cancelled`` returned True.
    """
    parts = []
    with inference(model):
        for batch in batches:
            if cancelled():
                raise Cancelled("the evaluation was called off")
            parts.append(score(model, batch))
        # One transfer at the end: a GPU need not wait for each batch's results.
        flat = torch.cat(parts, dim=1).double().cpu().numpy()
    out = np.empty_like(flat)
    out[:, np.concatenate([batch.items for batch in batches])] = flat
    return out


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
