"""What a job's inputs turned out to be: plain data that the workers' side finds out once and the store keeps."""

from __future__ import annotations

import base64
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.geometry import Layout
from optimizer.recipe import CalibrationId, ModelId
from optimizer.spec import AlgorithmSpec, Direction, Strict, Use

Columns = Literal["per_expert", "interpolation", "scale"]
Needs = Literal["weights", "factors", "items", "gradients"]


class OperatorInfo(Strict):
    """What the optimizer and the API know of an operator; the arithmetic lives with the workers."""

    name: str
    summary: str = Field(description="One sentence.")
    reference: str = Field(description="Paper or origin.")
    columns: Columns = Field(
        default="per_expert",
        description=(
            "`per_expert`: a coefficient for each expert; `interpolation`: one position between two models; `scale`: one "
            "factor of the merged task vector."
        ),
    )
    needs: Needs = Field(
        default="weights",
        description=(
            "What it is computed from beside the weights: `factors` of LoRA adapters, calibration `items`, or "
            "`gradients` on them."
        ),
    )
    measures: Literal["experts", "base"] = Field(
        default="experts", description="Which models it measures on calibration data, where it needs any."
    )
    elementwise: bool = Field(
        default=False,
        description=(
            "An element of the result depends on the same element of the inputs and on prepared numbers only, so that "
            "ranges of coefficients may cut through a tensor."
        ),
    )
    ordered: bool = Field(default=False, description="Whether the order of the experts matters.")
    idempotent: bool = Field(
        default=True,
        description="Whether experts that are all equal merge to themselves, with coefficients that sum to 1.",
    )
    modifier: bool = Field(
        default=False, description="Takes a single model: changes an expert before, or the result after, a merge."
    )
    varies: list[str] = Field(default_factory=list, description="Options that may differ from expert to expert.")
    uses_base: bool = Field(default=True, description="Whether the result depends on the base's weights.")
    min_experts: int = 1
    max_experts: int | None = None
    low: float = Field(default=0.0, description="Default lower bound of a coefficient.")
    high: float = Field(default=1.0, description="Default upper bound of a coefficient.")
    options_schema: dict[str, Any] = Field(default_factory=dict, description="JSON schema of the options.")


class EvaluatorInfo(Strict):
    """What the API knows of an evaluator."""

    name: str
    summary: str
    metrics: dict[str, Direction] = Field(description="Metric to its direction; the first is the default.")
    columns: dict[str, str] = Field(description="Role of each data column it reads.")
    options_schema: dict[str, Any] = Field(default_factory=dict)


class GraderInfo(Strict):
    """What the API knows of a grader of generated answers."""

    name: str
    summary: str
    direction: Direction = Field(description="Whether more or less of it is better.")
    columns: dict[str, str] = Field(description="Role of each data column it reads.")
    options_schema: dict[str, Any] = Field(default_factory=dict)


@lru_cache(maxsize=64)
def _unpacked(digests: str) -> NDArray[np.uint8]:
    return np.frombuffer(base64.b64decode(digests), dtype=np.uint8).reshape(-1, 16)


class TestItems(Strict):
    """The items of an objective that no search sees."""

    __test__ = False  # no test class, whatever pytest makes of the name

    items: int = Field(ge=1, description="How many.")
    data_digest: str = Field(description="SHA-256 over the items.")
    digests: str = Field(default="", exclude=True, description="See `ResolvedObjective.digests`.")


class ResolvedObjective(Strict):
    """An objective with its defaults filled in."""

    name: str
    metric: str
    direction: Direction
    use: Use = "objective"
    weight: float
    at_least: float | None = None
    at_most: float | None = None
    items: int = Field(ge=1, description="Number of items it is measured on.")
    data_digest: str = Field(description="SHA-256 over the items.")
    whole: bool = Field(
        default=False,
        description="Whether it is measured on all items even where others are on a part, for it is no mean over items.",
    )
    means_only: bool = Field(
        default=False, description="Whether only the mean over the items is known, of which no error can be told."
    )
    differentiable: bool = Field(
        default=False, description="Whether workers can derive its likelihoods with respect to the weights."
    )
    test: TestItems | None = Field(default=None, description="What the best are measured on at the end.")
    # What depends on the installation, or is as long as the data, is found anew whenever the job is prepared.
    measure: str = Field(
        default="",
        exclude=True,
        description=(
            "SHA-256 over all that an item's score depends on beside the merge and the item; empty where scores are not to "
            "be remembered."
        ),
    )
    digests: str = Field(
        default="", exclude=True, description="Base64 of 16 bytes for each item; empty where they are unknown."
    )

    @property
    def item_digests(self) -> NDArray[np.uint8]:
        """What each item is known by: the beginning of the SHA-256 of its content, shape (items, 16); read-only."""
        return _unpacked(self.digests)

    @property
    def test_items(self) -> ResolvedObjective:
        """The same objective over its test items; raises ``ValueError`` where it has none."""
        if self.test is None:
            raise ValueError(f"{self.name} has no test items")
        return self.model_copy(update=dict(self.test) | {"test": None})


class Finding(Strict):
    """One line of the compatibility report."""

    severity: Literal["error", "warning", "info"]
    model: str = Field(description="Name of the model in the job.")
    message: str
    tensors: list[str] = Field(default_factory=list, description="Names of the tensors concerned (the first 20).")


class Grams(Strict):
    """Inner products of the models' weights over consecutive ranges of the flat vector of all shared parameters.

    The flat vector is that of `Layout.flat`. Sums over ranges give the angle between any two linear combinations of the
    models without reading a weight.
    """

    edges: list[int] = Field(min_length=2, description="Where ranges begin and end: 0, …, number of parameters.")
    packed: str = Field(
        description="Base64 of little-endian float64, shape (ranges, models, models): ⟨θ_a, θ_b⟩, the base first."
    )

    @classmethod
    def pack(cls, edges: list[int], products: NDArray[np.float64]) -> Grams:
        """Make it from ``products``, shape (ranges, models, models)."""
        return cls(edges=edges, packed=base64.b64encode(products.astype("<f8").tobytes()).decode())

    @cached_property
    def products(self) -> NDArray[np.float64]:
        """The inner products, shape (ranges, models, models)."""
        flat = np.frombuffer(base64.b64decode(self.packed), dtype="<f8").astype(np.float64)
        models = round((flat.size / (len(self.edges) - 1)) ** 0.5)
        return flat.reshape(-1, models, models)


class PlannedPhase(Strict):
    """A phase of a job with everything settled: who proposes, on how many evaluations, among how many experts."""

    algorithm: AlgorithmSpec
    evaluations: int = Field(ge=1, description="Evaluations it may spend; the last phase also what others left over.")
    patience: int | None = Field(default=None, ge=1)
    keep_experts: int | None = Field(default=None, ge=1)
    why: str = Field(default="", description="Where mergeopt chose it: why, for the user.")


class Problem(Strict):
    """A job's inputs as found: models by digest, the parameter layout, the operator, objectives with defaults."""

    models: dict[str, ModelId] = Field(description="`base` and the experts, in the job's order.")
    layout: Layout
    operator: OperatorInfo
    operators: dict[str, OperatorInfo] = Field(
        default_factory=dict, description="Those that the search space names besides, by name."
    )
    objectives: list[ResolvedObjective]
    calibration: dict[str, CalibrationId] = Field(
        default_factory=dict, description="By model, the data that operators measure it on."
    )
    findings: list[Finding] = Field(default_factory=list)
    phases: list[PlannedPhase] = Field(default_factory=list, description="The phases; the spec's algorithm if empty.")
    grams: Grams | None = Field(default=None, description="Where an algorithm needs them.")
    alone: bool = Field(default=True, description="Whether a model by itself may be evaluated.")
    estimate: dict[str, float] = Field(
        default_factory=dict,
        description="Most that one evaluation is thought to cost: items, tokens, requests, money; zeros left out.",
    )

    @property
    def experts(self) -> list[str]:
        """Names of the models to merge, in the job's order."""
        return [name for name in self.models if name != "base"]

    @property
    def axes(self) -> list[ResolvedObjective]:
        """The objectives that the search is for: those that are not only constraints or reported."""
        return [objective for objective in self.objectives if objective.use == "objective"]
