"""Makes data/deltas.safetensors: what mergekit, fusion_bench and the authors' own code make of task vectors, in float64.

Not part of the tests and never imported by them. From the repository's root, in this order::

    python -m tests.workers.merging.reference.make_deltas inputs          # here: tensors, and the random masks drawn here
    python make_deltas.py mergekit                                        # where mergekit 0.1.5 is installed
    python make_deltas.py fusion_bench                                    # where fusion-bench 0.2.33 is installed
    python make_deltas.py authors --lines FILE   # src/eval/eval.py of wang-kee/LiNeS at 43a7bdd

Every part adds its results to the file. Random masks are ours: the references are made to draw them, so that everything
else can be compared exactly. mergekit computes random ones in float32 on CPUs; here it is made to use float64.

``base/PARAMETER`` and ``expertI/PARAMETER`` are the inputs, ``mask/KIND/expertI/PARAMETER`` the masks. Results are named
``CASE``: the merged parameters one after the other, flat. The metadata say what a case is: our operator, its options (a
list has one for each expert), coefficients, and the modifier of each expert before it.
"""

from __future__ import annotations

import argparse
import ast
import copy
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parent / "data" / "deltas.safetensors"
SHAPES = {
    "embed.weight": (9, 6),
    "layers.0.mlp.weight": (12, 8),
    "layers.0.mlp.bias": (7,),
    "layers.1.conv.weight": (4, 3, 5),
    "layers.2.norm.weight": (11,),
    "still.weight": (3, 5),  # of the first expert like the base
}
WEIGHTS = [0.5, 0.3, 0.4]
CHANCES = {
    "dare": [0.5, 0.5, 0.5],
    "dare_each": [0.3, 0.9, 1.0],
    "della": [0.6, 0.6, 0.6],
    "della_each": [0.3, 0.5, 1.0],
}
EPSILONS = {"della": 0.15, "della_each": 0.1}
Model = dict[str, Tensor]


class Book:
    """Everything in the file."""

    def __init__(self) -> None:
        self.tensors = load_file(DATA)
        with safe_open(DATA, framework="pt") as file:
            self.cases: dict[str, Any] = json.loads((file.metadata() or {}).get("cases", "{}"))

    def model(self, name: str) -> Model:
        return {key: self.tensors[f"{name}/{key}"].clone() for key in SHAPES}

    def experts(self) -> list[Model]:
        return [self.model(f"expert{number}") for number in range(3)]

    def add(self, case: str, operator: str, found: Model, row: Sequence[float] = WEIGHTS, **more: Any) -> None:
        """Record what the reference found; ``more``: ``options``, and ``before``, a modifier of the experts."""
        assert all(found[key].shape == shape and found[key].dtype == torch.float64 for key, shape in SHAPES.items()), (
            case
        )
        self.cases[case] = {"operator": operator, "row": list(row), "options": {}, **more}
        self.tensors[case] = torch.cat([found[key].reshape(-1) for key in SHAPES])

    def save(self) -> None:
        save_file(self.tensors, DATA, {"cases": json.dumps(self.cases, sort_keys=True)})
        sys.stdout.write(f"{DATA}: {len(self.cases)} cases, {DATA.stat().st_size} bytes\n")


def make_inputs() -> None:
    """Write random models, and the masks that the operators draw for them."""
    generator = torch.Generator().manual_seed(11)
    tensors: Model = {}
    for name, shape in SHAPES.items():
        base = torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[f"base/{name}"] = base
        for number in range(3):
            delta = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64).pow(3)
            tensors[f"expert{number}/{name}"] = base + (0.0 if (number, name) == (0, "still.weight") else 1.0) * delta
    save_file(tensors, DATA)
    book = Book()
    for kind in CHANCES:
        for name in SHAPES:
            for number, mask in enumerate(_masks(book, kind, name)):
                book.tensors[f"mask/{kind}/expert{number}/{name}"] = mask.view(SHAPES[name])
    book.save()


def _masks(book: Book, kind: str, name: str) -> Iterator[Tensor]:
    from tests.workers.merging.running import PlainFacts, make_info
    from workers.merging.deltas import at_random, by_rank
    from workers.merging.kernels.portable import keep_mask
    from workers.merging.operator import OPERATORS, Parameter, make_options

    base, models = book.model("base")[name], tuple(model[name] for model in book.experts())
    info = make_info(name, (base, models))
    entry = OPERATORS["della" if kind in EPSILONS else "dare_linear"]
    options = {"rescale": "none"} | ({"epsilon": EPSILONS[kind]} if kind in EPSILONS else {})
    facts, each = PlainFacts(info, (base, models)), {"density": tuple(CHANCES[kind])}
    values = make_options(entry, options, "options")
    parameter = Parameter(info, 1, base, models, tuple(WEIGHTS), values, facts, each)
    select = (by_rank if kind in EPSILONS else at_random)(parameter)
    for number, model in enumerate(models):
        selection, _ = select(number, torch.float64)
        delta = (model - base).view(-1)
        yield keep_mask(selection, delta, 0, slice(0, delta.numel()))


class _InFloat64:
    """torch, but single precision is double precision, and what is drawn is known."""

    def __init__(self, drawn: list[Tensor]) -> None:
        self.float32 = torch.float64
        self._drawn = drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def bernoulli(self, probabilities: Tensor) -> Tensor:
        return self._drawn.pop(0).to(probabilities.dtype).view(probabilities.shape)


def run_mergekit() -> None:
    """Add what mergekit's merge methods make of the tensors."""
    book = Book()
    _add_plain(book)
    _add_magnitude(book)
    _add_random(book)
    book.save()


def _mergekit(book: Book, method: Any, parameters: dict[str, Any], kind: str | None = None) -> Model:
    """Merge with one of mergekit's methods; ``kind`` names the masks that are drawn."""
    sparsify: Any = import_module("mergekit.sparsify")
    merge_tensors = import_module("mergekit.merge_methods").merge_tensors
    group = import_module("mergekit.merge_methods.base").TensorGroup
    base, experts, found = book.model("base"), book.experts(), {}
    for name in SHAPES:
        drawn = [
            book.tensors[f"mask/{kind}/expert{number}/{name}"].clone()
            for number, chance in enumerate(CHANCES.get(kind or "", []))
            if chance < 1.0
        ]
        sparsify.torch = _InFloat64(drawn)
        tensors = [base[name], *(expert[name] for expert in experts)]
        based = method != "linear"
        if isinstance(method, str):
            used = tensors if based else tensors[1:]
            found[name] = merge_tensors(used, method, parameters=parameters, base_index=0 if based else None)
        else:
            given = {key: dict(enumerate([None, *value], start=0)) if isinstance(value, list) else value for key, value in
                     parameters.items()}  # fmt: skip
            found[name] = method.merge_group(group.from_tensors(tensors, base_index=0), **given)
        assert not drawn, (method, name)
    return found


def _add_plain(book: Book) -> None:
    for row in ([0.5, 0.3, 0.4], [1.2, -0.3, 0.4]):
        for normalise in (True, False):
            found = _mergekit(book, "linear", {"weight": row, "normalize": normalise})
            book.add(f"linear-{row[0]}-{normalise}", "linear", found, row, options={"normalise": normalise})
        found = _mergekit(book, "task_arithmetic", {"weight": row})
        book.add(f"task_arithmetic-{row[0]}", "task_arithmetic", found, row)
    found = _mergekit(book, "task_arithmetic", {"weight": WEIGHTS, "lambda": 0.7})
    book.add("task_arithmetic-lambda", "task_arithmetic", found, [0.7 * weight for weight in WEIGHTS])


def _add_magnitude(book: Book) -> None:
    combine = {True: "mean", False: "sum"}
    for density in (0.5, [0.2, 0.6, 1.0]):
        each = density if isinstance(density, list) else [density] * 3
        for normalise in (True, False):
            given = {"weight": WEIGHTS, "density": each, "normalize": normalise, "lambda": 0.7}
            label = f"{each[0]}-{normalise}"
            options = {"density": density, "scale": 0.7}
            found = _mergekit(book, "ties", given)
            book.add(f"ties-{label}", "ties", found, options={**options, "normalise": combine[normalise]})
            found = _mergekit(book, "ties", {**given, "rescale": True})
            more: dict[str, Any] = {"normalise": combine[normalise], "rescale": "l1"}
            book.add(f"ties-{label}-l1", "ties", found, options={**options, **more})
            for gamma in (0.15, 0.01):  # of small tensors the smaller one drops nothing
                shares = {**given, "gamma": [gamma] * 3}
                found = _mergekit(book, "breadcrumbs", shares)
                more = {"gamma": gamma, "normalise": normalise}
                book.add(f"breadcrumbs-{label}-{gamma}", "breadcrumbs", found, options={**options, **more})
                found = _mergekit(book, "breadcrumbs_ties", {**shares, "rescale": True})
                more = {"gamma": gamma, "normalise": combine[normalise], "rescale": "l1"}
                book.add(f"breadcrumbs_ties-{label}-{gamma}", "breadcrumbs_ties", found, options={**options, **more})
    row = [0.5, -0.3, 0.4]
    found = _mergekit(book, "ties", {"weight": row, "density": [0.5] * 3, "normalize": False})
    book.add("ties-negative", "ties", found, row, options={"density": 0.5, "normalise": "sum"})
    _add_count(book)
    _add_norms(book)


def _add_count(book: Book) -> None:
    """Votes by the number of signs: no method of mergekit's has them, but its class does."""
    arithmetic = import_module("mergekit.merge_methods.generalized_task_arithmetic")
    method = arithmetic.GeneralizedTaskArithmeticMerge(
        consensus_method=arithmetic.ConsensusMethod.count,
        sparsification_method=import_module("mergekit.sparsify").SparsificationMethod.magnitude,
        default_normalize=True,
        default_rescale=False,
        method_name="count",
        method_pretty_name=None,
        method_reference_url=None,
    )
    given = {"weight": WEIGHTS, "density": [0.6] * 3, "int8_mask": False, "rescale": False, "normalize": True}
    found = _mergekit(book, method, {**given, "lambda": 1.0})
    book.add("ties-count", "ties", found, options={"density": 0.6, "consensus": "count"})


def _add_norms(book: Book) -> None:
    sparsify: Any = import_module("mergekit.sparsify")
    base, expert = book.model("base"), book.experts()[1]
    for norm in ("l1", "l2", "linf"):
        for method in ("magnitude", "random"):
            found = {}
            for name in SHAPES:
                sparsify.torch = _InFloat64([book.tensors[f"mask/dare/expert1/{name}"].clone()])
                kind = sparsify.SparsificationMethod(method)
                delta = sparsify.sparsify(expert[name] - base[name], 0.5, kind, rescale_norm=sparsify.RescaleNorm(norm))
                found[name] = base[name] + delta
            options = {"density": 0.5, "method": method, "rescale": norm}
            book.add(f"prune-{method}-{norm}", "prune", found, [0.0, 1.0, 0.0], options=options)


def _add_random(book: Book) -> None:
    combine = {True: "mean", False: "sum"}
    for kind, chances in CHANCES.items():
        family = kind.split("_")[0]
        density: Any = chances if kind.endswith("each") else chances[0]
        given: dict[str, Any] = {"weight": WEIGHTS, "density": chances}
        options: dict[str, Any] = {"density": density}
        if family == "della":
            given["epsilon"], options["epsilon"] = [EPSILONS[kind]] * 3, EPSILONS[kind]
        for rescale in ("none", "l1"):
            for normalise in (True, False):
                switches = {"rescale": rescale == "l1", "normalize": normalise}
                found = _mergekit(book, f"{family}_linear", {**given, **switches}, kind)
                more: dict[str, Any] = {"rescale": rescale, "normalise": normalise}
                book.add(f"{kind}_linear-{rescale}-{normalise}", f"{family}_linear", found, options={**options, **more})
                name = "dare_ties" if family == "dare" else "della"
                found = _mergekit(book, name, {**given, **switches}, kind)
                more = {"rescale": rescale, "normalise": combine[normalise]}
                book.add(f"{kind}_ties-{rescale}-{normalise}", name, found, options={**options, **more})


def run_fusion_bench() -> None:
    """Add what fusion_bench's functions make of the tensors."""
    book = Book()
    ties_merging = import_module("fusion_bench.method.ties_merging.ties_merging_utils").ties_merging
    base, experts = book.model("base"), book.experts()

    def flat(models: Sequence[Model]) -> Tensor:
        return torch.stack([torch.cat([(model[key] - base[key]).reshape(-1) for key in SHAPES]) for model in models])

    def placed(vector: Tensor, scale: float) -> Model:
        parts = torch.split(vector, [base[key].numel() for key in SHAPES])
        return {key: base[key] + scale * part.view(base[key].shape) for key, part in zip(SHAPES, parts, strict=True)}

    row = [1.0] * 3
    for combine in ("sum", "mean", "max"):
        for percent in (20, 70):
            with redirect_stdout(io.StringIO()):
                vector = ties_merging(flat(experts), reset_thresh=percent, merge_func=combine)
            options = {"density": percent / 100, "scope": "model", "normalise": combine, "scale": 0.3}
            book.add(f"fusion-ties-{combine}-{percent}", "ties", placed(vector, 0.3), row, options=options)
    with _fed(book) as dropped:
        pruned = [{key: base[key] + dropped(expert[key] - base[key], number, key) for key in SHAPES} for number, expert in
                  enumerate(experts)]  # fmt: skip
    found = placed(flat(pruned).sum(dim=0), 0.3)
    book.add("fusion-dare", "dare_linear", found, row, options={"density": 0.5, "scale": 0.3})
    with redirect_stdout(io.StringIO()):
        vector = ties_merging(flat(pruned), reset_thresh=20, merge_func="sum")
    options = {"density": 0.2, "scope": "model", "normalise": "sum", "scale": 0.5}
    before = {"operator": "prune", "options": {"density": 0.5, "method": "random", "rescale": "probability"}}
    book.add("fusion-dare-ties", "ties", placed(vector, 0.5), row, options=options, before=before)
    book.save()


@contextmanager
def _fed(book: Book) -> Iterator[Callable[[Tensor, int, str], Tensor]]:
    """Its function that drops entries at random, made to draw our masks."""
    utils = import_module("fusion_bench.method.dare.utils")
    torch_: Any = torch
    original = torch.rand_like

    def dropped(delta: Tensor, number: int, name: str) -> Tensor:
        mask = book.tensors[f"mask/dare/expert{number}/{name}"].double()
        torch_.rand_like = lambda _: mask
        utils.param_random_drop_(delta, 0.5, rescale=True)
        return delta

    try:
        yield dropped
    finally:
        torch_.rand_like = original


def run_authors(path: Path) -> None:
    """Add what the authors' function makes of a task vector."""
    book = Book()
    tree = ast.parse(path.read_text())
    wanted: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "LiNeS_scaling"
    ]
    names: dict[str, Any] = {"copy": copy}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), names)
    base, experts = book.model("base"), book.experts()

    class Vector:
        def __init__(self, vector: Model) -> None:
            self.vector = vector

    def scaled(model: Model, alpha: float, beta: float) -> Model:
        with redirect_stdout(io.StringIO()):
            vector = names["LiNeS_scaling"](
                Vector({key: model[key] - base[key] for key in SHAPES}), alpha, beta, 3
            ).vector
        return {key: base[key] + vector[key] for key in SHAPES}

    found = scaled(experts[1], 0.3, 0.7)
    book.add("lines", "lines", found, [1.0], options={"alpha": 0.3, "beta": 0.7}, only=1)
    # Their alpha for merged models, from `evaluate`: norms as `aggregation.py` takes them.
    merged = {
        key: base[key] + 0.3 * sum((expert[key] - base[key] for expert in experts), torch.zeros(())) for key in base
    }
    summed = sum(
        sum((expert[key] - base[key] for expert in experts), torch.zeros(())).abs().sum().item() for key in base
    )
    alpha = (summed / sum((merged[key] - base[key]).abs().sum().item() for key in base)) * 1 / 3
    options = {"auto_alpha": True, "beta": 0.5}
    book.add("lines-auto", "lines", scaled(merged, alpha, 0.5), [0.3] * 3, options=options, inner="task_arithmetic")
    book.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["inputs", "mergekit", "fusion_bench", "authors"])
    parser.add_argument("--lines", type=Path)
    given = parser.parse_args()
    if given.part == "authors":
        run_authors(given.lines)
    else:
        {"inputs": make_inputs, "mergekit": run_mergekit, "fusion_bench": run_fusion_bench}[given.part]()


if __name__ == "__main__":
    main()
