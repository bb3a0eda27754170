"""Makes data/adapters.safetensors: merged LoRA adapters as PEFT and the authors' own code compute them, in float64.

Not part of the tests and never imported by them. It ran in an environment of its own with Python 3.11, torch 2.13.0,
peft 0.21.2, einops and tqdm, and these checkouts::

    python make_adapters.py --fusion-bench DIR --knots DIR --core-space DIR --evo DIR

- peft, `add_weighted_adapter`: linear, cat, svd (full and cut), ties_svd
- tanganke/fusion_bench at 54c9e8c9, fusion_bench/method/knots/knots_utils.py: the alignment of KnOTS, and
  gstoica27/KnOTS at baa35e85, masking_ops.py: TIES and sums of the aligned parts (the authors' own alignment rounds to
  float32)
- apanariello4/core-space-merging at 85176fab, task_merger.py: Core Space with TIES and with sums, its alignment, and
  TIES on KnOTS' parts without the singular values; `utils`, which loads data sets, is left out
- Chansl-Lucky/Black-Box-Merging at 739c9c8e, BMM_code/core/merger.py: Evo-Merging's fused factors

``base``, and for three adapters ``up.I``, ``down.I`` and their ``scales``. PEFT's adapters have these scales; all
other code knows none, so there A and B are given with its root in each, except for Evo-Merging, whose adapters have scale 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "adapters.safetensors"
HEIGHT, WIDTH, RANK = 14, 11, 3
SCALES = [2.0, 0.5, 1.0]
WEIGHTS = [0.5, -0.5, 0.25]  # PEFT rounds them, and the roots of their products with the scales, to float32
BETAS, ALPHAS = [0.8, -0.5, 0.25], [0.5, 1.0, 0.3]
EQUAL = 0.5


def load(path: Path, name: str) -> Any:
    """Import a single file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def inputs() -> dict[str, Tensor]:
    """A base and three adapters of one rank."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out = {"base": random(HEIGHT, WIDTH), "scales": torch.tensor(SCALES, dtype=torch.float64)}
    for number in range(3):
        out |= {f"up.{number}": random(HEIGHT, RANK), f"down.{number}": random(RANK, WIDTH)}
    return out


def with_peft(known: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `add_weighted_adapter` makes of them."""
    from peft import LoraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, HEIGHT, bias=False, dtype=torch.float64)

    def config(scale: float) -> LoraConfig:
        return LoraConfig(r=RANK, lora_alpha=RANK * scale, target_modules=["layer"])

    names = ["first", "second", "third"]
    model: Any = get_peft_model(Model(), config(SCALES[0]), adapter_name=names[0], autocast_adapter_dtype=False)
    for name, scale in zip(names[1:], SCALES[1:], strict=True):
        model.add_adapter(name, config(scale), autocast_adapter_dtype=False)
    layer = model.base_model.model.layer
    for number, name in enumerate(names):
        layer.lora_A[name].weight.data = known[f"down.{number}"].clone()
        layer.lora_B[name].weight.data = known[f"up.{number}"].clone()
    cases: dict[str, dict[str, Any]] = {
        "linear": {"combination_type": "linear"},
        "cat": {"combination_type": "cat"},
        "svd": {"combination_type": "svd", "svd_rank": WIDTH},
        "svd_cut": {"combination_type": "svd", "svd_rank": 2},
        "ties_svd": {"combination_type": "ties_svd", "svd_rank": WIDTH, "density": 0.4, "weights": [EQUAL] * 3},
    }
    out = {}
    for name, settings in cases.items():
        model.add_weighted_adapter(names, **({"weights": WEIGHTS, "adapter_name": name} | settings))
        for parts in (layer.lora_A, layer.lora_B):
            parts[name].to(torch.float64)
        out[f"peft.{name}"] = layer.get_delta_weight(name).detach().clone()
    return out


def with_knots(known: dict[str, Tensor], fusion_bench: Path, knots: Path) -> dict[str, Tensor]:
    """KnOTS with TIES and with a sum inside."""
    align = load(fusion_bench / "fusion_bench/method/knots/knots_utils.py", "knots_utils").subspace_alignment
    operations = load(knots / "masking_ops.py", "knots_masking_ops")
    deltas = [SCALES[number] * known[f"up.{number}"] @ known[f"down.{number}"] for number in range(3)]
    out = {}
    for shared in ("output", "input"):
        left, values, rows = align([delta if shared == "output" else delta.T for delta in deltas])
        parts = [(values[:, None] * row).reshape(-1) for row in rows]
        masked = torch.vstack(parts) * operations.ties_masking(parts, topK=30)
        for rule in ("mean", "sum"):
            merged = operations.masked_merge(masked.clone(), rule, torch.tensor([EQUAL] * 3)).view_as(rows[0])
            product = left @ merged
            out[f"knots.{shared}.{rule}"] = product if shared == "output" else product.T
    return out


def with_core_space(known: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Core Space, and the same authors' form of KnOTS, with TIES and with a sum inside."""
    sys.modules["utils"] = types.ModuleType("utils")
    sys.modules["utils"].get_mask_fn = None  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))
    merger = load(folder / "task_merger.py", "task_merger").MatrixPerLayerMerger
    own = types.SimpleNamespace(cache={}, scaling_coeffs=torch.ones(3), lmc=False)
    own._process_ties = lambda tensors, topK: merger._process_ties(own, tensors, topK)  # noqa: N803
    roots = [scale**0.5 for scale in SCALES]
    pairs = [{"x": (roots[n] * known[f"down.{n}"], roots[n] * known[f"up.{n}"])} for n in range(3)]
    cores, left, right = merger.get_core_matrices(own, pairs, "x", {})
    out = {}
    for method in ("ties", "sum"):
        settings = {"merge_method": method, "topK": 30}
        merged = merger._merge_tensors(own, [core.clone() for core in cores], settings)
        out[f"core_space.{method}"] = left @ merged @ right
    deltas = [scaled @ down for pair in pairs for down, scaled in [pair["x"]]]
    stacked = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    rank = int((stacked.S > 1e-5).sum())
    rows = [row[:rank].contiguous() for row in stacked.Vh.split(WIDTH, dim=1)]
    merged = merger._merge_tensors(own, rows, {"merge_method": "ties", "topK": 30})
    out["knots.unscaled"] = (stacked.U[:, :rank] * stacked.S[:rank]) @ merged
    return out


def with_evo(known: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Evo-Merging's fused factors, times their adapters' common scale of 2."""
    merger = load(folder / "BMM_code/core/merger.py", "evo_merger")
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for number in range(3):
            path = Path(directory) / f"{number}" / "adapter_model.safetensors"
            path.parent.mkdir()
            tensors = {"x.lora_A.weight": known[f"down.{number}"], "x.lora_B.weight": known[f"up.{number}"]}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            paths[str(number)] = path
        merged = merger.materialize_merged_adapter(paths, ALPHAS, BETAS, Path(directory) / "out", "base", "preset")
        found = load_file(merged)
    return {"evo": 2.0 * found["x.lora_B.weight"] @ found["x.lora_A.weight"]}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--fusion-bench", "--knots", "--core-space", "--evo"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    known = inputs()
    out = known | with_peft(known) | with_knots(known, arguments.fusion_bench, arguments.knots)
    out |= with_core_space(known, arguments.core_space) | with_evo(known, arguments.evo)
    assert all(tensor.dtype == torch.float64 for tensor in out.values())
    save_file({name: tensor.contiguous() for name, tensor in sorted(out.items())}, DATA)


if __name__ == "__main__":
    main()
