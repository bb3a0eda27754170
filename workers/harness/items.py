"""The documents of the harness's tasks as items: their prompts, made once, and their scores, each time a model answers."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, mean, median, nanmean, perplexity, weighted_perplexity
from lm_eval.api.task import Task

from optimizer.errors import InvalidData, InvalidInput
from optimizer.spec import Direction
from workers.data import digest_of
from workers.evaluators.base import Cancelled
from workers.harness.contained import silent
from workers.harness.language_model import ResidentLM

Response = tuple[float, bool] | float | str

_CORPUS_ONLY = ("f1_score", "matthews_corrcoef")
"""Aggregations that mean nothing for a single document."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Prompting:
    """How documents become prompts, as in the harness.

    Attributes:
        num_fewshot: examples before each question; each task's own number by default. A task that says 0 keeps it.
        fewshot_seed: which examples.
        limit: most documents of each task, or the share of them if below 1.
        chat: whether prompts are put into the tokenizer's chat template.
        multiturn: whether examples are turns of their own there.
        system: a system prompt.
        generation: arguments of generation that replace the tasks'.
    """

    num_fewshot: int | None
    fewshot_seed: int
    limit: float | None
    chat: bool
    multiturn: bool
    system: str | None
    generation: Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """A document with its requests.

    Attributes:
        task: name of its task.
        number: of the document within the task.
        doc: as the task has it.
        requests: to the language model; their responses are written into them.
        digest: SHA-256 over the document, what is asked, and the answer.
    """

    task: str
    number: int
    doc: Any
    requests: Sequence[Instance]
    digest: str

    @property
    def place(self) -> str:
        """How errors name it."""
        return f"task {self.task!r}, document {self.number}"


@dataclass(frozen=True)
class Metric:
    """A metric of a task, or the logarithm of a perplexity.

    Attributes:
        key: the harness's name.
        filter: name of the filter that answers go through first.
        aggregation: the harness's, from scores to the task's score.
        kind: ``value`` is the document's score; ``log`` is that of a perplexity in nats per unit.
    """

    key: str
    filter: str
    aggregation: Callable[[Sequence[Any]], float]
    kind: Literal["value", "log"] = "value"

    def score(self, value: Any) -> tuple[float, float]:
        """Return a document's score and what it counts in the mean.

        Raises:
            TypeError or ValueError: the document alone has no score.
        """
        if self.kind == "log":
            likelihood, units = value if isinstance(value, tuple) else (value, 1)
            return -float(likelihood) / units, float(units)
        if self.aggregation in (mean, nanmean, median):
            return float(value), 1.0
        weight = float(value[1]) if self.aggregation is bits_per_byte else 1.0
        try:
            return float(self.aggregation([value])), weight
        except OverflowError:
            return math.inf, weight


def build(name: str, task: Task, lm: ResidentLM, how: Prompting, field: str) -> list[Item]:
    """Make the requests of a task's documents, in their order.

    Args:
        name: of the task.
        task: with its documents loaded; its number of examples, seed and generation arguments are set.
        lm: for its chat template and tokens; no model is needed.
        how: the prompts are made.
        field: dotted path of the objective's options.

    Raises:
        InvalidData: a document lacks a column, or cannot be asked; names the document.
        InvalidInput: the tokenizer has no chat template.
    """
    _configure(task, how)
    docs = task.eval_docs
    limit = how.limit if how.limit is None or how.limit >= 1 else math.ceil(len(docs) * how.limit)
    items = []
    for number, doc in task.doc_iterator(limit=None if limit is None else int(limit)):
        try:
            requests = _requests(name, task, number, doc, lm, how)
            _check(requests, lm)
            target = task.doc_to_target(doc)
        except (InvalidInput, Cancelled):
            raise
        except Exception as error:  # templates and tasks' own code raise anything
            raise InvalidData(
                f"task {name!r}, document {number}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                field=f"{field}.tasks",
                remedy=_columns(doc),
            ) from error
        row = {"doc": doc, "asked": [request.args for request in requests], "target": target}
        items.append(Item(name, number, doc, requests, digest_of([row])))
    if not items:
        raise InvalidData(f"the task {name!r} has no documents", field=f"{field}.tasks")
    return items


def identity(name: str, task: Task) -> str:
    """Return what else than its items makes a task's scores: version, metrics, filters, functions; as canonical JSON."""
    config = {key: value for key, value in task.dump_config().items() if key != "dataset_kwargs"}
    config["metadata"] = {
        key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"
    }  # where a file is, is not what it says
    text = json.dumps([name, str(task.VERSION), config], sort_keys=True, default=str)
    return _ADDRESS.sub("", text)


def metrics_of(task: Task) -> dict[str, tuple[Metric, Direction]]:
    """Return the metrics that a task gives single documents, with their directions, in the task's order.

    Where the task has several filters, their names follow: ``exact_match,strict-match``. Metrics of a whole corpus only
    (F1, Matthews correlation) are left out. Each perplexity is followed by its logarithm, whose weighted mean over the
    documents is the logarithm of the harness's score.
    """
    filters = [ensemble.name for ensemble in task._filters]
    found: dict[str, tuple[Metric, Direction]] = {}
    for key, higher in task.higher_is_better().items():
        aggregation = task.aggregation().get(key, mean)
        if getattr(aggregation, "__name__", "") in _CORPUS_ONLY or key == "bypass":
            continue
        direction: Direction = "minimise" if higher is False else "maximise"
        for name in filters:
            label = key if len(filters) == 1 else f"{key},{name}"
            found[label] = (Metric(key, name, aggregation), direction)
            if aggregation in (perplexity, weighted_perplexity):
                found[f"log_{label}"] = (Metric(key, name, aggregation, "log"), direction)
    return found


def ask(items: Sequence[Item], lm: ResidentLM) -> None:
    """Send all requests to the language model, grouped by kind as the harness does, and keep the responses in them."""
    kinds: dict[str, list[Instance]] = defaultdict(list)
    for item in items:
        for request in item.requests:
            request.resps, request.filtered_resps = [], {}
            kinds[request.request_type] += [request] * request.repeats
    for kind, requests in kinds.items():
        for request, response in zip(requests, getattr(lm, kind)(requests), strict=True):
            request.resps.append(response)


def score(
    task: Task, items: Sequence[Item], metrics: Mapping[str, Metric], broken: bool, field: str
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Return scores and weights of a task's items after `ask`, by metric, shape (2, items).

    Items whose responses are NaN or infinite have NaN scores.

    Args:
        task: of the items.
        items: at least one.
        metrics: by the name they are asked for.
        broken: whether the model predicted NaN while it generated.
        field: dotted path of the objective.

    Raises:
        InvalidData: the task gives a document no score; names it.
    """
    out = {label: np.full((2, len(items)), np.nan) for label in metrics}
    for scores in out.values():
        scores[1] = 1.0
    with silent():
        task._instances = [request for item in items for request in item.requests]
        task.apply_filters()
        for column, item in enumerate(items):
            if _is_broken(item, broken):
                continue
            for name in {metric.filter for metric in metrics.values()}:
                _score_one(task, item, name, metrics, out, column, field)
    return out


def _score_one(
    task: Task,
    item: Item,
    name: str,
    metrics: Mapping[str, Metric],
    out: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]],
    column: int,
    field: str,
) -> None:
    try:
        values = task.process_results(item.doc, [request.filtered_resps[name] for request in item.requests])
        for label, metric in metrics.items():
            if metric.filter == name:
                out[label][:, column] = metric.score(values[metric.key])
    except Exception as error:  # tasks' own code raises anything
        raise InvalidData(
            f"{item.place} cannot be scored: {type(error).__name__}: {error}", field=field, remedy="correct the task"
        ) from error


def _is_broken(item: Item, generated: bool) -> bool:
    for request in item.requests:
        for response in request.resps:
            number = response[0] if isinstance(response, tuple) else response
            if generated if isinstance(number, str) else not math.isfinite(number):
                return True
    return False


def _configure(task: Task, how: Prompting) -> None:
    own = task.get_config("num_fewshot")
    if own is None or (how.num_fewshot is not None and own != 0):
        task.set_config("num_fewshot", how.num_fewshot or 0)
    task.set_fewshot_seed(how.fewshot_seed)
    if how.generation and task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", dict(how.generation), update=True)


def _requests(name: str, task: Task, number: int, doc: Any, lm: ResidentLM, how: Prompting) -> list[Instance]:
    template = lm.apply_chat_template if how.chat else None
    context = task.fewshot_context(
        doc,
        num_fewshot=task.config.num_fewshot,
        system_instruction=how.system,
        apply_chat_template=how.chat,
        fewshot_as_multiturn=how.multiturn,
        chat_template=template,
        gen_prefix=task.doc_to_prefix(doc),
    )
    made = task.construct_requests(
        doc=doc,
        ctx=context,
        metadata=(name, number, task.config.repeats),
        apply_chat_template=how.chat,
        chat_template=template,
    )
    return made if isinstance(made, list) else [made]


def _check(requests: Sequence[Instance], lm: ResidentLM) -> None:
    """Raise ValueError for what the harness would fail at when a model is asked; tokenises everything on the way."""
    for request in requests:
        if request.request_type == "loglikelihood":
            context, continuation = request.args
            scored = lm._encode_pair(context, continuation)[1] if context else lm.tok_encode(continuation, False)
            if not 0 < len(scored) <= lm.max_length:
                raise ValueError(
                    f"the answer {continuation[:100]!r} has {len(scored)} tokens; 1 to {lm.max_length} can be scored"
                )
        elif request.request_type == "loglikelihood_rolling":
            if not lm.tok_encode(request.args[0]):
                raise ValueError("the text has no tokens")
        else:
            lm.check_generation(request.args[1])


def _columns(doc: Any) -> str:
    names = ", ".join(map(str, doc)) if isinstance(doc, dict) else ""
    return f"its columns are: {names}" if names else "correct the task or its data"


def digest(parts: Sequence[str]) -> str:
    """Return the SHA-256 over texts in their order, as hexadecimal digits."""
    return sha256("\n".join(parts).encode()).hexdigest()
