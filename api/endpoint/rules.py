"""Which recipes the owner merges: those over its models, within its rules, and of a sane size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from api.endpoint.offer import Offer
from optimizer.errors import Conflict, InvalidInput, NotOffered
from optimizer.phases import influence
from optimizer.recipe import Leaf, Merge, Recipe

DEEPEST = 4
"""Times the models' own number of layers that a layer plan may have."""


class Rules:
    """The owner's rules.

    Args:
        offer: what the owner allows.
        ids: of the models by name, as clients know them.
        operators: names of those that recipes may use.
        layers: number of layers of the models.
    """

    def __init__(self, offer: Offer, ids: Mapping[str, str], operators: Collection[str], layers: int) -> None:
        self._offer = offer
        self._ids = ids
        self._operators = operators
        self._layers = layers

    def check(self, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a client sent.

        Raises:
            InvalidInput: it is none, or names a model that is not the owner's.
            NotOffered: the owner does not evaluate such candidates; names the part at fault.
            Conflict: a model has changed since the client asked for its id.
        """
        recipe = Recipe.parse(data)
        self._check_models(recipe)
        self._check_plan(recipe)
        nodes = list(_merges(recipe))
        if len(nodes) > self._offer.limits.nodes:
            raise NotOffered(
                f"the recipe has {len(nodes)} merges, and {self._offer.limits.nodes} are allowed", field="recipe.root"
            )
        numbers = 0
        for where, node in nodes:
            self._check_node(node, where)
            numbers += _numbers(node)
        if numbers > self._offer.limits.numbers:
            raise NotOffered(
                f"the recipe has {numbers} numbers in its tables, and {self._offer.limits.numbers} are allowed",
                field="recipe.root",
                remedy="search with fewer coefficients: larger groups of layers",
            )
        return recipe

    def _check_models(self, recipe: Recipe) -> None:
        for name, model in recipe.models.items():
            if name not in self._ids:
                raise InvalidInput(
                    f"there is no model {name!r}", field=f"recipe.models.{name}", remedy="see the repository"
                )
            if model.digest != self._ids[name]:
                raise Conflict(
                    f"the model {name!r} is not the one that the recipe was made for",
                    field=f"recipe.models.{name}",
                    remedy="ask for the repository again",
                )
            if model.vocabulary is not None:
                raise NotOffered("vocabularies are the owner's", field=f"recipe.models.{name}.vocabulary")
        if recipe.calibration is not None:
            raise NotOffered("nothing is measured on calibration data", field="recipe.calibration")

    def _check_plan(self, recipe: Recipe) -> None:
        if recipe.layers is None:
            return
        if not self._offer.plans:
            raise NotOffered("recipes may not rearrange layers", field="recipe.layers", remedy="leave it out")
        if len(recipe.layers) > DEEPEST * self._layers:
            raise NotOffered(
                f"the plan has {len(recipe.layers)} layers, and {DEEPEST * self._layers} are allowed",
                field="recipe.layers",
            )

    def _check_node(self, node: Merge, where: str) -> None:
        if node.operator not in self._operators:
            raise NotOffered(
                f"the operator {node.operator[:100]!r} is not offered",
                field=f"{where}.operator",
                remedy=f"use one of: {', '.join(self._operators)}",
            )
        if not self._offer.plans and any(_moves(child) for child in (node.base, *node.inputs)):
            raise NotOffered("recipes may not rearrange layers", field=where, remedy="leave `layer` out")
        if self._offer.detail == "layers" and (
            node.breaks is not None or any(group.tensors is not None for group in node.groups or ())
        ):
            raise NotOffered(
                "coefficients are for layers and kinds of modules, not for single parameters",
                field=where,
                remedy="use groups of positions and modules",
            )

    def check_share(self, recipe: Recipe) -> None:
        """Raise `NotOffered` if one expert of a well-formed recipe stands (almost) alone."""
        if self._offer.max_share >= 1:
            return
        planned = [entry.node for entry in recipe.layers or () if entry.node is not None]
        total: dict[str, float] = {}
        for node in (recipe.root, *planned):
            found = influence(recipe.model_copy(update={"root": node}))
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value
        experts = {name: value for name, value in total.items() if name != "base"}
        whole = sum(experts.values())
        largest = max(experts.values(), default=0.0)
        if whole == 0 or largest > self._offer.max_share * whole:
            raise NotOffered(
                f"one model alone is not evaluated: none may have more than {self._offer.max_share:.0%} of the coefficients",
                field="recipe.root",
                remedy="mix two or more experts",
            )


def _merges(recipe: Recipe) -> Iterator[tuple[str, Merge]]:
    """All merges of a recipe, each with its dotted path."""
    yield from _below(recipe.root, "recipe.root")
    for depth, planned in enumerate(recipe.layers or ()):
        if planned.node is not None:
            yield from _below(planned.node, f"recipe.layers.{depth}.node")


def _below(node: Leaf | Merge, where: str) -> Iterator[tuple[str, Merge]]:
    if isinstance(node, Leaf):
        return
    yield where, node
    yield from _below(node.base, f"{where}.base")
    for number, child in enumerate(node.inputs):
        yield from _below(child, f"{where}.inputs.{number}")


def _moves(node: Leaf | Merge) -> bool:
    return isinstance(node, Leaf) and node.layer is not None


def _numbers(node: Merge) -> int:
    tables = (node.coefficients, *(node.tables or {}).values())
    return len(node.options) + len(node.breaks or ()) + sum(len(row) for table in tables for row in table)
