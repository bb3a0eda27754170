"""The owner's models: described, checked against recipes, merged in memory and scored; no weight leaves this module."""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from api.endpoint.offer import Offer, OwnSet, all_experts
from api.endpoint.rules import Rules
from optimizer.errors import InvalidCheckpoint, InvalidData, InvalidInput, NotOffered
from optimizer.geometry import Cuts, Layout, TensorInfo
from optimizer.problem import Grams, OperatorInfo
from optimizer.recipe import ModelId, Recipe, canonical_json
from optimizer.spec import ModelRef
from workers.checkpoints import Checkpoint, open_models
from workers.compatibility import inspect, raise_on_errors
from workers.data import Rows, digest_of
from workers.endpoint.protocol import (
    PROTOCOL,
    LimitsView,
    ModelView,
    RepositoryView,
    RulesView,
    ScoringView,
    SetUpload,
    SetView,
    UploadView,
    UsageView,
)
from workers.evaluators.base import Evaluator, Inputs, Scores, find_evaluator
from workers.grams import measure_grams
from workers.merging.cache import Cache
from workers.merging.engine import MergeEngine
from workers.merging.operator import OPERATORS, operator_info
from workers.merging.resident import ResidentModels
from workers.prepare import read_rows
from workers.references import References, check_experts
from workers.roots import NOWHERE, Roots
from workers.worker import device_of

log = logging.getLogger(__name__)

PREPARED = 64
"""Uploaded sets whose items stay tokenised after their session, for those who upload the same again."""

UPLOADED = "set"
"""What errors call an uploaded set."""

SUBSETS = 32
"""Parts of a set that stay tokenised."""


@dataclass(frozen=True)
class QuerySet:
    """Items that candidates are evaluated on, read and tokenised.

    Attributes:
        view: what clients see of it.
        evaluator: measures on all items.
    """

    view: SetView
    evaluator: Evaluator
    _parts: OrderedDict[tuple[int, ...], Evaluator] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def on(self, items: Sequence[int] | None) -> Evaluator:
        """Return the evaluator on some of the items, in this order; on all of them, as they come, for None."""
        if items is None:
            return self.evaluator
        key = tuple(items)
        with self._lock:
            if key not in self._parts:
                self._parts[key] = self.evaluator.subset(items)
                while len(self._parts) > SUBSETS:
                    self._parts.popitem(last=False)
            self._parts.move_to_end(key)
            return self._parts[key]


class Repository:
    """The models of an offer, open and checked.

    Safe to use from several threads; each thread that scores takes a `resident` model of its own.

    Args:
        offer: what is offered.
        roots: where checkpoints and data may be.
        key: secret that the models' ids are made with.
        cache: of what operators prepare.

    Raises:
        InvalidInput: names the field of the offer, if anything is missing, malformed or does not fit.
    """

    def __init__(self, offer: Offer, roots: Roots, key: bytes, cache: Cache | None = None) -> None:
        self.offer = offer
        self._key = key
        self._cache = cache
        self.checkpoints = open_models(offer.base, all_experts(offer, roots), roots)
        base, *experts = self.checkpoints.values()
        self.layout, findings = inspect(base, experts, offer.heads)
        raise_on_errors(findings)
        for finding in findings:
            log.info("%s: %s", finding.model, finding.message)
        self.ids = {name: self._opaque("model", found.digest) for name, found in self.checkpoints.items()}
        self.operators = _operators(offer, experts)
        self.rules = Rules(offer, self.ids, [info.name for info in self.operators], self.layout.layers)
        self.device = device_of(offer.workers)
        self._real = {
            name: ModelId(ref=ModelRef(path=name), digest=found.digest) for name, found in self.checkpoints.items()
        }
        self._engine = MergeEngine(
            self.checkpoints,
            self.layout,
            keep_on=self.device if self.device.type == "cuda" else None,
            cache=cache,
        )
        self._grams: dict[Cuts, Grams] = {}
        self._prepared: OrderedDict[str, QuerySet] = OrderedDict()
        self._lock = threading.Lock()
        self.own = {own.name: self._own_set(own, number, roots) for number, own in enumerate(offer.sets)}

    def describe(self, usage: UsageView) -> RepositoryView:
        """Return what a client may know."""
        offer = self.offer
        return RepositoryView(
            protocol=PROTOCOL,
            name=offer.name,
            base="base",
            models=[ModelView(name=name, id=number) for name, number in self.ids.items()],
            detail=offer.detail,
            layout=self.layout if offer.detail == "tensors" else outline(self.layout),
            operators=self.operators,
            sets=[found.view for found in self.own.values()],
            uploads=self._uploads(),
            scoring=ScoringView(scores=offer.scores, decimals=offer.decimals, min_items=offer.min_items),
            rules=RulesView(
                max_share=offer.max_share, plans=offer.plans, grams=offer.grams, max_numbers=offer.limits.numbers
            ),
            limits=LimitsView.model_validate(offer.limits.model_dump()),
            usage=usage,
        )

    def grams(self, cuts: Cuts) -> Grams:
        """Return the inner products of the models' weights, measured when they are first asked for.

        Raises:
            NotOffered: the owner gives none out.
        """
        if not self.offer.grams or self.offer.detail != "tensors":
            raise NotOffered("inner products of the models are not given out", field="grams")
        with self._lock:
            if cuts not in self._grams:
                self._grams[cuts] = measure_grams(self.checkpoints, self.layout, cuts)
            return self._grams[cuts]

    def candidate(self, data: Mapping[str, Any]) -> tuple[str, Recipe]:
        """Check a recipe as a client sent it; return its fingerprint, and the recipe over the models themselves.

        Raises:
            InvalidInput, NotOffered, Conflict: see `Rules` and `MergeEngine.check`.
        """
        asked = self.rules.check(data)
        recipe = asked.model_copy(update={"models": {name: self._real[name] for name in asked.models}, "heads": None})
        self._engine.check(recipe)
        self.rules.check_share(asked)
        return asked.model_copy(update={"heads": None}).fingerprint, recipe

    def upload(self, upload: SetUpload) -> QuerySet:
        """Read and tokenise a query set; one that was uploaded before is known by its content.

        Raises:
            NotOffered: the owner does not take it.
            InvalidInput, InvalidData: an option or a row does not fit; names the row.
        """
        rules = self.offer.uploads
        if rules is None:
            raise NotOffered("query sets cannot be uploaded", field="sets", remedy="use one of the owner's sets")
        if upload.evaluator not in rules.evaluators:
            raise NotOffered(
                f"sets for {upload.evaluator[:100]!r} are not taken",
                field="evaluator",
                remedy=f"use one of: {', '.join(rules.evaluators)}",
            )
        if not rules.min_items <= len(upload.rows) <= rules.max_items:
            raise NotOffered(
                f"the set has {len(upload.rows)} items, and {rules.min_items} to {rules.max_items} are taken",
                field="rows",
            )
        rows = _rows(upload)
        if (different := len({digest_of([row]) for row in upload.rows})) < rules.min_items:
            raise NotOffered(
                f"only {different} of the items are different, and {rules.min_items} are needed", field="rows"
            )
        known = self._digest(upload.evaluator, upload.options, upload.head, rows)
        with self._lock:
            if known in self._prepared:
                self._prepared.move_to_end(known)
                return self._prepared[known]
        made = self._query_set(None, upload, rows, UPLOADED, NOWHERE)  # whatever the server allows its owner
        with self._lock:
            self._prepared[known] = made
            while len(self._prepared) > PREPARED:
                self._prepared.popitem(last=False)
        return made

    def scorer(self) -> Scorer:
        """Return a merged model in memory, for one thread."""
        dtype = getattr(torch, self.offer.workers.dtype)

        def make() -> tuple[ResidentModels, References]:
            models = ResidentModels(self.checkpoints, self.layout, self._engine, self.device, dtype)
            return models, References(models, self._real, self._cache)

        return Scorer(make)

    def result_key(self, fingerprint: str, found: QuerySet, items: Sequence[int] | None) -> str:
        """Return what the scores of a candidate on a set, or a part of one, are known by."""
        parts = [fingerprint, found.view.digest, items, self.offer.workers.dtype]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def _own_set(self, own: OwnSet, number: int, roots: Roots) -> QuerySet:
        where = f"sets.{number}"
        cls, _ = find_evaluator(own.evaluator, own.options, where)
        return self._query_set(own.name, own, read_rows(own.data, cls, roots, where), where, roots)

    def _query_set(
        self, name: str | None, wanted: OwnSet | SetUpload, rows: Rows, where: str, roots: Roots
    ) -> QuerySet:
        """Read and tokenise items; they are called by their digest where they have no name."""
        cls, options = find_evaluator(wanted.evaluator, wanted.options, where)
        if not cls.auto_class:
            raise InvalidInput(f"{cls.name} asks a service and scores no models", field=f"{where}.evaluator")
        self._check_head(cls, wanted.head, f"{where}.head")
        model_dir = self.checkpoints[wanted.head or "base"].path
        made = cls(options, Inputs(rows, model_dir, where, roots.policy, roots))
        check_experts(made, list(self.checkpoints)[1:], where)
        digest = self._digest(wanted.evaluator, wanted.options, wanted.head, rows)
        view = SetView(
            name=name or digest,
            evaluator=wanted.evaluator,
            metrics=dict(made.metrics),
            whole_only=sorted(made.whole_only),
            items=len(made),
            digest=digest,
            head=wanted.head,
        )
        return QuerySet(view, made)

    def _check_head(self, cls: type[Evaluator], head: str | None, field: str) -> None:
        remedy = f"use one of: {', '.join(self._heads()[:20])}"
        if head is not None and head not in self.checkpoints:
            raise InvalidInput(f"there is no model {head[:100]!r}", field=field, remedy=remedy)
        if cls.uses_head and head is None and self._heads():
            raise InvalidInput(
                "the models have heads of their own, so a set must name whose head it uses", field=field, remedy=remedy
            )

    def _digest(self, evaluator: str, options: Mapping[str, Any], head: str | None, rows: Rows) -> str:
        cls, settings = find_evaluator(evaluator, options, UPLOADED)
        parts = [evaluator, cls.version, settings.model_dump(mode="json"), head, dict(rows.columns), rows.digest]
        return self._opaque("set", canonical_json(parts))

    def _opaque(self, kind: str, text: str) -> str:
        """An id that says nothing of what it stands for, except whether it is the same."""
        return hmac.new(self._key, f"{kind}:{text}".encode(), hashlib.sha256).hexdigest()

    def _heads(self) -> list[str]:
        """The models with a head of their own; none where all parameters are shared."""
        return [] if len(self.layout.shared) == len(self.layout.tensors) else list(self.checkpoints)[1:]

    def _uploads(self) -> UploadView | None:
        rules = self.offer.uploads
        if rules is None:
            return None
        found = [
            find_evaluator(name, {}, f"uploads.evaluators.{number}")[0] for number, name in enumerate(rules.evaluators)
        ]
        return UploadView(
            evaluators=[cls.info() for cls in found],
            min_items=rules.min_items,
            max_items=rules.max_items,
            heads=self._heads(),
            heads_needed=[cls.name for cls in found if cls.uses_head and self._heads()],
        )


class Scorer:
    """One merged model in memory, made when it is first needed; for one thread."""

    def __init__(self, make: Callable[[], tuple[ResidentModels, References]]) -> None:
        self._make = make
        self._made: tuple[ResidentModels, References] | None = None
        self._holds: str | None = None
        self._ready: WeakSet[Evaluator] = WeakSet()  # those that know what experts say, if they ask for it

    def score(
        self,
        fingerprint: str,
        recipe: Recipe,
        found: QuerySet,
        items: Sequence[int] | None,
        cancelled: Callable[[], bool],
    ) -> Scores:
        """Merge a candidate, unless it is the one that is merged already, and score it.

        Raises:
            InvalidInput, InfeasibleCandidate, InputsChanged: see `ResidentModels.apply`; and what `Evaluator.evaluate`
                raises.
        """
        if self._made is None:
            self._made = self._make()
        models, references = self._made
        if found.evaluator not in self._ready:
            references.provide(found.evaluator, found.view.head)
            self._ready.add(found.evaluator)
        if self._holds != fingerprint:
            self._holds = None
            models.apply(recipe)
            self._holds = fingerprint
        model = models.model(found.view.head, found.evaluator.auto_class)
        return found.on(items).evaluate(model, cancelled)


def outline(layout: Layout) -> Layout:
    """Return a layout with one entry for each depth and kind of module, in place of the parameters themselves."""
    entries: dict[str, TensorInfo] = {}
    for tensor in layout.tensors:
        name = f"{tensor.position}.{tensor.kind}.{tensor.role}"
        entries.setdefault(name, TensorInfo(name, (1,), "F32", tensor.position, tensor.kind, tensor.role))
    return Layout(tuple(entries[name] for name in sorted(entries)), layout.layers)


def _rows(upload: SetUpload) -> Rows:
    places = [f"row {number}" for number in range(len(upload.rows))]
    rows = Rows(upload.rows, places, upload.columns, UPLOADED, digest_of(upload.rows))
    for role, column in upload.columns.items():
        if column not in rows.names:
            raise InvalidData(f"there is no column {column[:100]!r}", field=f"{UPLOADED}.columns.{role}")
    return rows


def _operators(offer: Offer, experts: Iterable[Checkpoint]) -> list[OperatorInfo]:
    """The operators that recipes may use."""
    adapters = any(expert.factors(name) is not None for expert in experts for name in expert.tensors)
    possible = {"weights", "factors"} if adapters else {"weights"}
    if offer.operators is None:
        return [found.info for found in OPERATORS.values() if found.info.needs in possible]
    infos = [operator_info(name, f"operators.{number}") for number, name in enumerate(offer.operators)]
    for number, info in enumerate(infos):
        if info.needs not in possible:
            raise InvalidCheckpoint(
                f"{info.name} needs {info.needs}, which there are none of", field=f"operators.{number}"
            )
    return infos
