"""lm-evaluation-harness: any of its tasks, or the user's own task files, on the resident model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from transformers import PreTrainedModel

from optimizer.errors import InvalidInput
from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction
from workers.evaluators.base import Evaluator, Inputs, Scores, evaluator, never
from workers.evaluators.loading import check_vocabulary, load_tokenizer, max_length
from workers.harness.contained import seeded, silent
from workers.quiet import hushed

if TYPE_CHECKING:
    from workers.harness.items import Item, Metric

Seed = Annotated[int, Field(ge=0, lt=2**32)]


@evaluator("lm_eval")
class LmEval(Evaluator):
    """Each document of the tasks is an item, with the score that the harness (Gao et al., lm-evaluation-harness) gives it.

    The mean over the items of one task is the harness's score, where that is a mean, as accuracy, exact match, Brier score
    and bits per byte are. Other scores are computed for each document alone: a sentence's BLEU, a text's perplexity. Each
    perplexity has a companion, ``log_word_perplexity`` for example, in nats: exp of its mean is the harness's score. What
    has no meaning for one document (F1, Matthews correlation) is left out.

    Several tasks, or a group, are one measure: their items follow one another, and weigh so much that the mean is the mean
    of the tasks' scores (``average: tasks``); or all the same, as in groups that the harness weighs by size (``items``). It
    has the metrics that all the tasks have, with the directions that the tasks declare.

    Prompts are made and tokenised once; the harness's own language model, filters and metrics then do all the rest for each
    model, so that the scores are those that the harness gives the exported checkpoint. Task files are read as data: see
    `workers.harness.files` and `workers.harness.rules` for what they may say.
    """

    summary: ClassVar[str] = (
        "How a causal language model does on tasks of lm-evaluation-harness, or on your own task files."
    )
    metrics: Mapping[str, Direction] = {}  # those of the tasks
    columns: ClassVar[dict[str, str]] = {}
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    uses_head: ClassVar[bool] = False
    own_items: ClassVar[bool] = True

    class Options(Evaluator.Options):
        """Options of the harness."""

        tasks: list[str] = Field(
            default=[],
            max_length=256,
            description="Tasks, groups or tags: of the files in `include_path`, or the harness's own.",
            examples=[["arc_easy"]],
        )
        include_path: str | None = Field(
            default=None,
            max_length=4096,
            description="Directory of your own task files, relative to one of the server's roots.",
            examples=["tasks"],
        )
        num_fewshot: int | None = Field(
            default=None, ge=0, le=1000, description="Examples before each question; the tasks' own number by default."
        )
        limit: float | None = Field(
            default=None,
            gt=0,
            description="Use the first this many documents of each task only, or this share of them if below 1.",
            examples=[200],
        )
        average: Literal["tasks", "items"] = Field(
            default="tasks", description="Of several tasks: whether each task weighs the same, or each document."
        )
        apply_chat_template: bool = Field(default=False, description="Put prompts into the tokenizer's chat template.")
        fewshot_as_multiturn: bool | None = Field(
            default=None, description="Make each example a turn of the chat; so by default with a chat template."
        )
        system_instruction: str | None = Field(
            default=None, max_length=100_000, description="System prompt, or text before every prompt without a chat."
        )
        gen_kwargs: dict[str, Any] = Field(
            default={},
            max_length=32,
            description="Arguments of generation that replace the tasks' own.",
            examples=[{"max_gen_toks": 128}],
        )
        fewshot_seed: int = Field(default=1234, ge=0, lt=2**32, description="Chooses the examples.")
        seeds: list[Seed] = Field(
            default=[0, 1234, 1234],
            min_length=3,
            max_length=3,
            description="Of the generators of Python, numpy and torch, while tasks are built and answers are drawn.",
        )
        max_length: int | None = Field(
            default=None, ge=2, le=1_000_000, description="Longest sequence in tokens; the model's limit by default."
        )
        add_bos_token: bool | None = Field(
            default=None, description="Begin with the tokenizer's BOS token; what the tokenizer does by default."
        )

        @field_validator("tasks", mode="before")
        @classmethod
        def _one(cls, value: Any) -> Any:  # a bare string is the only one
            return [value] if isinstance(value, str) else value

    def __init__(self, options: Options, inputs: Inputs) -> None:
        super().__init__(options, inputs)
        harness = _harness(inputs.field)
        field = f"{inputs.field}.options"
        if not options.tasks:
            raise InvalidInput("no task is named", field=f"{field}.tasks", remedy="name one, for example arc_easy")
        harness.check_generation(options.gen_kwargs, "`gen_kwargs`", f"{field}.gen_kwargs")
        tokenizer = load_tokenizer(inputs.model_dir, inputs.field)
        if options.apply_chat_template and not tokenizer.chat_template:
            raise InvalidInput(
                "the tokenizer has no chat template", field=f"{field}.apply_chat_template", remedy="leave it out"
            )
        if options.max_length is not None:
            max_length(options.max_length, tokenizer, self.config, inputs.field)
        self._lm = harness.ResidentLM(
            tokenizer, self.config, inputs.model_dir, options.batch_size, options.max_length, options.add_bos_token
        )
        directory = None
        if options.include_path is not None:
            directory = inputs.roots.path(options.include_path, f"{field}.include_path")
        with hushed(), seeded(options.seeds), silent():
            self._tasks = harness.load_tasks(options.tasks, directory, inputs.policy, inputs.roots, field)
            how = _prompting(harness, options)
            built = {name: harness.build(name, task, self._lm, how, field) for name, task in self._tasks.items()}
        check_vocabulary(self._lm.encoded(), self.config, inputs.model_dir, inputs.field)
        self._counts = {name: len(items) for name, items in built.items()}
        self._set_metrics(harness, built, field)
        self._head = [harness.VERSION, repr((options.max_length, options.add_bos_token))]
        self._head += [harness.identity(name, task) for name, task in self._tasks.items()]
        self._take([item for items in built.values() for item in items])

    def subset(self, items: Sequence[int]) -> Self:
        """See `Evaluator.subset`; prompts stay as they are."""
        part = copy.copy(self)
        part._take([self._documents[item] for item in items])
        return part

    def evaluate(self, model: PreTrainedModel, cancelled: Callable[[], bool] = never) -> Scores:
        """Score a causal language model."""
        harness = _harness(self._inputs.field)
        device = model.device
        draws = seeded(self.options.seeds, device) if self._draws else nullcontext()
        with hushed(), self._lm.on(model, cancelled), draws:
            harness.ask(self._documents, self._lm)
        found: dict[str, NDArray[np.float64]] = {label: np.empty((2, len(self._documents))) for label in self.metrics}
        for name, places in self._places.items():
            part = [self._documents[place] for place in places]
            scores = harness.score(self._tasks[name], part, self._scored[name], self._lm.broken, self._inputs.field)
            for label, (values, weights) in scores.items():
                found[label][:, places] = values, self._balanced(weights, name)
        return self.scored({label: _item_scores(*both) for label, both in found.items()}, self._lm.tokens)

    def _set_metrics(self, harness: Any, built: Mapping[str, list[Item]], field: str) -> None:
        """Keep the metrics that all tasks have in the same direction."""
        each = {name: harness.metrics_of(self._tasks[name]) for name in built}
        first, *others = each.values()
        self.metrics = {
            label: direction
            for label, (_, direction) in first.items()
            if all(label in other and other[label][1] == direction for other in others)
        }
        if not self.metrics:
            has = "; ".join(f"{name}: {', '.join(metrics) or 'none'}" for name, metrics in each.items())
            raise InvalidInput(
                f"the tasks have no metric of single documents in common ({has})",
                field=f"{field}.tasks",
                remedy="make them objectives of their own",
            )
        self._scored: dict[str, dict[str, Metric]] = {
            name: {label: metrics[label][0] for label in self.metrics} for name, metrics in each.items()
        }

    def _take(self, documents: list[Item]) -> None:
        """Make these documents the items."""
        self._documents = documents
        self._items = len(documents)
        self._places: dict[str, list[int]] = {}
        for place, item in enumerate(documents):
            self._places.setdefault(item.task, []).append(place)
        harness = _harness(self._inputs.field)
        self.digest = harness.digest([*self._head, *(item.digest for item in documents)])
        self._draws = any(
            request.request_type == "generate_until" and request.args[1].get("do_sample")
            for item in documents
            for request in item.requests
        )

    def _balanced(self, weights: NDArray[np.float64], task: str) -> NDArray[np.float64]:
        """Weights of a task's items such that each task weighs the same among several.

        Where all items weigh the same, so do those of a part of them: as much as they weigh in the whole.
        """
        if self.options.average == "items" or len(self._counts) == 1:
            return weights
        share = sum(self._counts.values()) / len(self._counts)
        common = 1.0 if (weights == 1).all() else float(weights.mean())
        out: NDArray[np.float64] = weights * (share / common / self._counts[task])
        return out


def _harness(field: str) -> Any:
    """Return what is needed of `workers.harness`, which imports the harness; raises `InvalidInput` where there is none."""
    try:
        with silent():
            from workers.harness import api
    except ImportError as error:
        raise InvalidInput(
            f"lm-evaluation-harness is not installed here: {error}",
            field=f"{field}.evaluator",
            remedy="install `mergeopt[harness]` with the server and all workers",
        ) from error
    return api


def _prompting(harness: Any, options: LmEval.Options) -> Any:
    multiturn = options.fewshot_as_multiturn
    return harness.Prompting(
        num_fewshot=options.num_fewshot,
        fewshot_seed=options.fewshot_seed,
        limit=options.limit,
        chat=options.apply_chat_template,
        multiturn=options.apply_chat_template if multiturn is None else multiturn,
        system=options.system_instruction,
        generation=options.gen_kwargs,
    )


def _item_scores(values: NDArray[np.float64], weights: NDArray[np.float64]) -> ItemScores:
    with np.errstate(over="ignore"):  # a perplexity is infinite in float32 above 88 nats a token, and meant to be
        uniform = bool((weights == 1).all())
        return ItemScores(values.astype(np.float32), None if uniform else weights.astype(np.float32))
