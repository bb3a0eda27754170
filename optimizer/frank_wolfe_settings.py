"""Options of Frank-Wolfe merging."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from optimizer.spec import Strict

REACH = 3.0


class Settings(Strict):
    """Options of Frank-Wolfe merging."""

    variant: Literal["hard", "soft"] = Field(
        default="hard",
        description=(
            "`hard` takes a step towards the one vertex that lowers the weighted sum of the objectives most; with `soft` "
            "each objective picks a vertex of its own, and how much of each is merged is learned."
        ),
    )
    oracle: Literal["auto", "exact", "differences", "spsa"] = Field(
        default="auto",
        description=(
            "Where derivatives come from: `exact` from a backward pass of the workers; `differences` from one evaluation "
            "near the iterate for each vertex; `spsa` from a few pairs of random perturbations, however many experts there "
            "are. `auto` is exact where every objective has gradients."
        ),
    )
    granularity: Literal["model", "layers"] = Field(
        default="model",
        description=(
            "Whether the whole model moves towards one vertex, or each coefficient group of the job picks its own "
            "(`layers`), for which `differences` cost an evaluation for each group and vertex."
        ),
    )
    form: Literal["formula", "cosine"] = Field(
        default="formula",
        description=(
            "What the exact oracle compares vertices by: the inner product of the gradient with where they lie, as the "
            "paper says, or the sum of its cosines with their weights, tensor by tensor, as the authors' code does."
        ),
    )
    step: Literal["line_search", "harmonic"] = Field(
        default="line_search",
        description=(
            "How far: the best of four steps, each half of the one before, which must lower the loss; or "
            "2/(t + 2), without looking."
        ),
    )
    step_size: float = Field(default=1.0, gt=0, le=1, description="Factor of the steps.")
    scale: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Factor of harmonic steps by the merge function; by default 0.3 for task_arithmetic, else 1.",
    )
    check: bool = Field(
        default=True,
        description=(
            "With exact derivatives, try a step of length `h` towards every vertex before it is first used, and leave out "
            "what raises the loss: a steep slope may lead a very short way down."
        ),
    )
    away: Literal["none", "away", "pairwise"] = Field(
        default="none",
        description=(
            "For weighted sums: also step `away` from a bad vertex that the iterate contains, where that promises more, or "
            "always move weight from the worst to the best (`pairwise`)."
        ),
    )
    start: Literal["best", "merge", "base"] = Field(
        default="best",
        description=(
            "Where to begin: at the best candidate known, the merge of all experts (0.3 of each task vector, or the "
            "operator's uniform merge), or the base."
        ),
    )
    base_vertex: bool = Field(default=True, description="Whether the base is among the vertices, beside the experts.")
    reach: float | None = Field(
        default=None,
        ge=1,
        le=10,
        description=(
            "For weighted sums of task vectors: how many of an expert's task vectors its vertex is away from the base. With "
            "1 merges stay in the convex hull of the models, as published; with more, coefficients may sum to as much, as "
            f"those of task arithmetic do. By default {REACH:g} with line search, and 1 with harmonic steps."
        ),
    )
    h: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description=(
            "Distance of probes, as a fraction of the way to a vertex, or of a range; by default 0.1, and 0.03 with `spsa`."
        ),
    )
    central: bool = Field(
        default=False, description="Probe on both sides where the bounds allow it, at twice the evaluations."
    )
    pairs: int = Field(default=4, ge=1, le=1000, description="Pairs of perturbations that `spsa` averages over.")
    probe_items: int | None = Field(
        default=None, ge=1, description="Measure probes on so many items of each objective only, the same for all."
    )
    inner: int = Field(
        default=10, ge=1, le=10_000, description="With `soft`, evaluations that learn the coefficients in an iteration."
    )
    iterations: int | None = Field(
        default=None, ge=1, le=100_000, description="Most iterations; as many as the budget allows by default."
    )
    tolerance: float = Field(
        default=0.0,
        ge=0,
        description=(
            "Stop when the Frank-Wolfe gap, which bounds how far a convex loss is above its minimum over the merges within "
            "reach, is no larger."
        ),
    )

    @property
    def distance(self) -> float:
        """`reach`, where it is not given that of the steps: a step that is not looked at had better be short."""
        return self.reach or (REACH if self.step == "line_search" else 1.0)
