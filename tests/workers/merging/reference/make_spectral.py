"""Makes data/spectral.safetensors: merged models as fusion_bench and the authors' own code compute them, in float64.

Not part of the tests and never imported by them. It ran in an environment of its own with Python 3.11, torch 2.13.0,
fusion-bench 0.2.33 (with transformers 4.57 and datasets 4.4, which it needs) and these checkouts::

    python make_spectral.py --star STAR --drm decom-renorm-merge --optmerge MLLMerging

- fusion_bench: tsv_m, iso_c, iso_cts, opcm (OPCM), wudi, doge (DOGE_TA_Algorithm)
- IBM/STAR at e6bfcf70: star
- yophis/decom-renorm-merge at 8c0f961c: drm, horizontal and vertical, and its rule for other tensors
- WalkerWorldPeace/MLLMerging at 5f8a4583, LLaMA-Factory/model_merging.py: OptMerge (wudi_merging2), with its
  conversions to float32 and to a GPU taken out of the text

Tensors are named ``base/PARAMETER``, ``expertI/PARAMETER`` and ``CASE/N/PARAMETER``, N being the number of experts
(the first N). What a method does not define is left out.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data" / "spectral.safetensors"
STAR_WEIGHTS = [0.5, 0.3, 0.4, 0.2, -0.1]
State = dict[str, Tensor]


class Tiny(nn.Module):
    """Matrices of three shapes, with and without biases, and a norm; all names that doge takes contain `encoder`."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(8, 12), nn.Linear(12, 8, bias=False), nn.Linear(6, 6)]
        self.encoder = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(8)


def make_models(count: int) -> list[Tiny]:
    """A base and experts with a common part; a bias of the second expert has not moved, and one entry cancels."""
    generator = torch.Generator().manual_seed(20)
    models = [Tiny() for _ in range(count + 1)]
    with torch.no_grad():
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            base = torch.randn(parameters[0].shape, generator=generator)
            common = torch.randn(base.shape, generator=generator)
            for number, parameter in enumerate(parameters):
                own = torch.randn(base.shape, generator=generator)
                parameter.copy_(base if number == 0 else base + 0.03 * (0.5 * common + own))
        models[2].get_parameter("encoder.2.bias").copy_(models[0].get_parameter("encoder.2.bias"))
        models[2].norm.bias[0] = 2 * models[0].norm.bias[0] - models[1].norm.bias[0]
    return models


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("star", "drm", "optmerge"):
        arguments.add_argument(f"--{name}", type=Path, required=True)
    given = arguments.parse_args()
    torch.set_default_dtype(torch.float64)
    models = make_models(5)
    out: State = {}
    before = deepcopy(models)
    for number, model in enumerate(models):
        prefix = f"expert{number - 1}" if number else "base"
        out |= {f"{prefix}/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for count in (1, 2, 3, 5):
        base, experts = models[0], models[1 : count + 1]
        for case, state in cases(base, experts, given):
            out |= {f"{case}/{count}/{name}": tensor.detach() for name, tensor in state.items()}
    for old, new in zip(before, models, strict=True):
        assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items())
    save_file({name: tensor.clone().contiguous() for name, tensor in out.items()}, DATA)


def cases(base: Tiny, experts: list[Tiny], given: argparse.Namespace) -> Iterator[tuple[str, State]]:
    deltas = [subtract(expert.state_dict(), base.state_dict()) for expert in experts]
    for name, merged in [*data_free(deltas), *authors(deltas, given)]:
        yield name, {key: base.state_dict()[key] + tensor for key, tensor in merged.items()}
    yield from whole_models(base, experts)
    yield "optmerge", optmerge(base, experts, given.optmerge)


def data_free(deltas: list[State]) -> Iterator[tuple[str, State]]:
    methods = "fusion_bench.method"
    tsv = importlib.import_module(f"{methods}.task_singular_vector.utils.TSVM_utils")
    iso = importlib.import_module(f"{methods}.isotropic_merging.iso_utils")
    wudi = importlib.import_module(f"{methods}.wudi.wudi")
    yield "tsv_m", tsv.compute_and_sum_svd_mem_reduction(deltas, accelerator="cpu")
    yield "iso_c", iso.iso_c(deltas, accelerator="cpu")
    for fraction in (0.8, 0.4):
        yield f"iso_cts-{fraction}", iso.iso_cts(deltas, common_space_fraction=fraction, accelerator="cpu")
    yield "wudi", wudi.wudi_merging(deltas, accelerator="cpu", iter_num=300)


def authors(deltas: list[State], given: argparse.Namespace) -> Iterator[tuple[str, State]]:
    star = load(given.star / "merger" / "STAR.py")
    matrices = [key for key, tensor in deltas[0].items() if tensor.ndim == 2]
    for eta in (40, 90):
        yield (
            f"star-{eta}",
            {
                key: sum(weight * star.star(delta[key], eta) for weight, delta in zip(STAR_WEIGHTS, deltas))  # noqa: B905
                for key in matrices
            },
        )
    sys.path.insert(0, str(given.drm))
    drm = importlib.import_module("drm._decom_renorm_merge")
    for direction, function in (("horizontal", drm.right_drm), ("vertical", drm.left_drm)):
        for density in (0.2, 0.6):
            merged = {}
            for key in deltas[0]:
                stack = torch.stack([delta[key] for delta in deltas])
                if key in matrices:
                    merged[key] = function(stack, 1.0, None, basis_dropping_rate=1 - density)
                else:
                    merged[key] = drm.average(drm.resolve_elementwise_sign_conflict(stack), disjoint=True)
            yield f"drm-{direction}-{density}", merged


def whole_models(base: Tiny, experts: list[Tiny]) -> Iterator[tuple[str, State]]:
    """OPCM and DOGE work on modules; DOGE takes the weights under `encoder` and leaves all else as it is."""
    pools = importlib.import_module("fusion_bench.modelpool")
    opcm = importlib.import_module("fusion_bench.method.opcm.opcm_general")
    doge = importlib.import_module("fusion_bench.method.doge_ta.doge_ta")

    def pool() -> Any:  # the methods write into the models that they are given
        named = {f"expert{number}": expert for number, expert in enumerate(experts)}
        return pools.BaseModelPool(deepcopy({"_pretrained_": base, **named}))

    for alpha in (0.5, 0.8):
        method = opcm.OPCM(alpha=alpha, shuffle_order=False, save_on_every_step=False)
        yield f"opcm-{alpha}", method.run(pool()).state_dict()
    if len(experts) > 1:
        for density in (30, 60):
            method = doge.DOGE_TA_Algorithm(subspace=6, K=density, lamda=0.07)
            merged = method.run(pool()).state_dict()
            yield f"doge-{density}", merged


def optmerge(base: Tiny, experts: list[Tiny], checkout: Path) -> State:
    source = (checkout / "LLaMA-Factory" / "model_merging.py").read_text()
    source = source.replace(".to(torch.float32).cuda()", "").replace("torch.cuda.empty_cache()", "pass")
    wanted = {"get_param_names_to_merge", "TaskVector", "wudi_merging2"}
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
    names: dict[str, Any] = {"torch": torch, "nn": nn, "re": re, "tqdm": lambda steps, **_: steps}
    exec(compile(tree, "model_merging.py", "exec"), names)
    merge: Callable[..., State] = names["wudi_merging2"]
    return merge(deepcopy(base), experts, [], scaling_coefficient=1.0)


def subtract(left: State, right: State) -> State:
    return {key: (left[key] - right[key]).detach() for key in left}


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
