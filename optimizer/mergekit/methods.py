"""mergekit's merge methods: which operator computes the same, and what their settings are called there and here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Value = bool | int | float | str

Role = Literal["weight", "t", "scale", "option", "ignored"]
Coefficients = Literal["weights", "t", "share", "ones", "one"]


@dataclass(frozen=True)
class Parameter:
    """A setting that a method takes.

    Attributes:
        role: ``weight``: the coefficient of each input; ``t``: the one coefficient of an interpolation; ``scale``: the
            factor of a passed-through tensor; ``option``: an option of our operator; ``ignored``: of no effect here.
        option: our operator's name of it.
        default: mergekit's; None where it must be given.
        each: it may differ between models.
        kind: of its values.
        values: what our operator calls them, where it has words for them.
    """

    role: Role
    option: str = ""
    default: bool | float | None = None
    each: bool = False
    kind: type[bool] | type[int] | type[float] = float
    values: Mapping[Value, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A merge method of mergekit and the operator that computes the same.

    Attributes:
        operator: ours.
        base: ``input``: one model among the others; ``required``: what the others are compared with; ``optional``:
            the same, where there is one.
        parameters: by mergekit's name.
        coefficients: what our operator's are: the ``weights``; ``t``; the second's ``share`` of two weights; ``ones``,
            where all models count the same; or ``one``, the factor of a merged task vector.
        others: number of models beside the base, where the method takes so many only.
        random: it draws random numbers, so that two runs of mergekit differ as well.
        folds: the result is linear in the coefficients, so that ``lambda`` and ``normalize`` go into them.
        fixed: our options that stand for mergekit's way.
        lax: options that may be others when a recipe is written for mergekit: they matter in corner cases only.
    """

    operator: str
    base: Literal["input", "required", "optional"] = "required"
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    coefficients: Coefficients = "weights"
    others: int | None = None
    random: bool = False
    folds: bool = False
    fixed: Mapping[str, Value] = field(default_factory=dict)
    lax: tuple[str, ...] = ()


_WEIGHT = Parameter("weight", each=True)
_IGNORED = Parameter("ignored", kind=bool)


def _option(
    name: str, default: bool | int | float, kind: type[bool] | type[int] | type[float] = float, *, each: bool = False
) -> Parameter:
    return Parameter("option", name, default, each, kind)


def _arithmetic(
    operator: str, *own: str, normalise: bool, rescale: bool = False, elects: bool = False, random: bool = False
) -> Method:
    """A method that adds up sparse task vectors; ``own`` names the settings that trim them."""
    defaults = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15}
    words: dict[Value, Value] = {True: "mean", False: "sum"} if elects else {}
    norms: dict[Value, Value] = {True: "l1", False: "none"}
    parameters = {
        "weight": _WEIGHT,
        "lambda": _option("scale", 1.0),
        "normalize": Parameter("option", "normalise", normalise, kind=bool, values=words),
        "rescale": Parameter("option", "rescale", rescale, kind=bool, values=norms),
        "int8_mask": _IGNORED,
    }
    parameters |= {name: _option(name, defaults[name], each=True) if name in own else _IGNORED for name in defaults}
    fixed: dict[str, Value] = {"consensus": "sum"} if elects else {}
    fixed |= {"scope": "tensor"} if operator == "ties" else {}
    return Method(operator, "required", parameters, random=random, fixed=fixed, lax=("seed",))


_TASK_ARITHMETIC = Method(
    "task_arithmetic",
    "required",
    {
        "weight": _WEIGHT,
        "lambda": _option("scale", 1.0),
        "normalize": _option("normalise", False, bool),
        **dict.fromkeys(("rescale", "density", "int8_mask"), _IGNORED),
    },
    folds=True,
)


METHODS: dict[str, Method] = {
    "linear": Method("linear", "input", {"weight": _WEIGHT, "normalize": _option("normalise", True, bool)}),
    "slerp": Method(
        "slerp",
        "required",
        {"t": Parameter("t")},
        "t",
        1,
        fixed={"lerp_threshold": 0.9995, "scope": "tensor", "no_direction": "right_angle"},
        lax=("no_direction",),
    ),
    "nuslerp": Method(
        "nuslerp",
        "optional",
        {
            "weight": _WEIGHT,
            "nuslerp_row_wise": _option("row_wise", False, bool),
            "nuslerp_flatten": _option("flatten", True, bool),
        },
        "share",
        others=2,
    ),
    "multislerp": Method(
        "multislerp",
        "optional",
        {"weight": _WEIGHT, "normalize_weights": _option("normalise", True, bool), "eps": _option("eps", 1e-8)},
    ),
    "karcher": Method(
        "karcher", "input", {"max_iter": _option("max_iter", 10, int), "tol": _option("tol", 1e-5)}, "ones"
    ),
    "task_arithmetic": _TASK_ARITHMETIC,
    "ties": _arithmetic("ties", "density", normalise=True, elects=True),
    "dare_ties": _arithmetic("dare_ties", "density", normalise=False, rescale=True, elects=True, random=True),
    "dare_linear": _arithmetic("dare_linear", "density", normalise=False, rescale=True, random=True),
    "breadcrumbs": _arithmetic("breadcrumbs", "density", "gamma", normalise=False),
    "breadcrumbs_ties": _arithmetic("breadcrumbs_ties", "density", "gamma", normalise=False, elects=True),
    "della": _arithmetic("della", "density", "epsilon", normalise=True, rescale=True, elects=True, random=True),
    "della_linear": _arithmetic("della_linear", "density", "epsilon", normalise=False, rescale=True, random=True),
    "model_stock": Method(
        "model_stock",
        "required",
        {"filter_wise": _option("filter_wise", False, bool)},
        "one",
        fixed={"average": "cosine"},
    ),
    "sce": Method(
        "sce",
        "required",
        {"int8_mask": _IGNORED, "select_topk": _option("select_topk", 1.0)},
        "one",
        fixed={"uniform_below": 1e-6},
    ),
    "arcee_fusion": Method("arcee_fusion", coefficients="one", others=1, random=True, fixed={"sample": 1_000_000}),
    "nearswap": Method("nearswap", "required", {"t": Parameter("option", "t")}, "one", others=1),
    "passthrough": Method("passthrough", "input", {"scale": Parameter("scale", each=True)}),
}
"""mergekit's methods. ram and ramplus_tl have no counterpart here."""


def to_ours(method: str, options: dict[str, Value], with_base: bool) -> dict[str, Value]:
    """Return our operator's options for those of a mergekit method that stand in several of its settings."""
    if method == "nuslerp":
        flat, by_column = options.pop("flatten"), options.pop("row_wise")
        options["angle"] = "tensor" if flat else "column" if by_column else "row"
    if METHODS[method].base == "optional":
        options["origin"] = "base" if with_base else "zero"
    return options


def to_theirs(method: str, options: dict[str, Value]) -> tuple[dict[str, Value], bool | None]:
    """Return the reverse of `to_ours`: mergekit's settings, and whether there is a base (None where there always is)."""
    if method == "nuslerp":
        angle = options.pop("angle", "tensor")
        options |= {"flatten": angle == "tensor", "row_wise": angle == "column"}
    if METHODS[method].base == "optional":
        return options, options.pop("origin", "zero") == "base"
    return options, None
