"""What experts say of an objective's items: found once for all workers of a machine and all jobs, and kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from optimizer.errors import InvalidInput
from optimizer.recipe import Leaf, ModelId, Recipe
from workers.alignment import content_of
from workers.evaluators.base import Evaluator
from workers.evaluators.reference import ReferenceEvaluator
from workers.merging.cache import Cache, Numbers, key_of
from workers.merging.resident import ResidentModels

log = logging.getLogger(__name__)


def check_experts(evaluator: Evaluator, experts: Sequence[str], field: str) -> None:
    """Raise `InvalidInput` where an objective compares with an expert that the job does not have.

    Args:
        evaluator: the objective's.
        experts: of the job.
        field: dotted path of the objective.
    """
    named = evaluator.options.experts if isinstance(evaluator, ReferenceEvaluator) else None
    for name in named or ():
        if name not in experts:
            raise InvalidInput(
                f"the job has no expert {name!r}",
                field=f"{field}.options.experts",
                remedy=f"use some of: {', '.join(experts)}",
            )


def experts_of(evaluator: ReferenceEvaluator, head: str | None, experts: Sequence[str]) -> list[str]:
    """Return the experts that an objective compares with: those it names, else its head's, else all."""
    named: list[str] | None = evaluator.options.experts
    if named is not None:
        return list(dict.fromkeys(named))
    return [head] if head is not None else list(experts)


class References:
    """Asks experts, each in its own weights with the objective's head, and keeps what they say.

    Answers are kept by the content of expert, head and items, by evaluator, version and options, and by the type and kind
    of device that the weights are in.

    Args:
        models: the resident model; an expert is merged into it by a recipe of its own, and then what was there before.
        known: the models of the job's recipes.
        cache: of the answers; in memory by default.
    """

    def __init__(self, models: ResidentModels, known: Mapping[str, ModelId], cache: Cache | None = None) -> None:
        self._models = models
        self._checkpoints = models.checkpoints
        self._known = dict(known)
        self._cache = cache or Cache()

    def provide(self, evaluator: Evaluator, head: str | None) -> None:
        """Give an objective's evaluator the answers of the experts that it compares with; most compare with none."""
        if isinstance(evaluator, ReferenceEvaluator):
            content = evaluator.content
            experts = experts_of(evaluator, head, [name for name in self._checkpoints if name != "base"])
            evaluator.refer({name: self._answers(evaluator, content, head, name) for name in experts})

    def _answers(self, evaluator: ReferenceEvaluator, content: str, head: str | None, expert: str) -> Numbers:
        def ask() -> Numbers:
            log.info("asking %r once about the items of %s", expert, evaluator.name)
            before = self._models.recipe
            self._models.apply(Recipe(models=self._known, root=Leaf(model=expert)))
            try:
                return evaluator.observe(self._models.model(head, evaluator.auto_class))
            finally:
                if before is not None:
                    self._models.apply(before)

        key = key_of(
            {
                "references": evaluator.name,
                "version": evaluator.version,
                "expert": content_of(expert, self._checkpoints),
                "head": content_of(head or "base", self._checkpoints),
                "config": evaluator.config.to_dict(),
                "items": content,
                "model": evaluator.kind,
                "options": evaluator.options.model_dump(mode="json", exclude={"batch_size", "experts"}),
                "layout": [[tensor.name, list(tensor.shape)] for tensor in self._models.layout.shared],
                "dtype": str(self._models.dtype),
                "device": self._models.device.type,
            }
        )
        return self._cache.get(key, ask, True)
