"""Makes data/data_driven.safetensors: what fusion_bench and the authors of AIM make of measured models, in float64.

Not part of the tests and never imported by them. It ran in an environment of its own with Python 3.11, torch 2.13.0,
fusion-bench 0.2.33 (with transformers 4.57) and a checkout of ahnobari/ActivationInformedMerging at e7eccd57::

    python make_data_driven.py --aim ActivationInformedMerging

- fusion_bench: merging_with_fisher_weights, merging_with_regmean_weights, and RegMeanAlgorithmPlusPlus run over a tiny
  Bert (its layers, its Gram matrices by RegMeanAlgorithmForCLIPPlusPlus)
- the authors' apply_relaxation, with the conversion to bfloat16 taken out of the text

Tensors are named ``METHOD/…``: ``fisher/theta/I/PARAMETER`` and ``fisher/F/I/PARAMETER`` with the results
``fisher/CASE/PARAMETER``; the same with ``G`` for RegMean; for AIM ``base``, ``merged``, ``a`` and ``omega``;
``plus/base/…``, ``plus/expertI/…`` and ``plus/ids/I`` (items, tokens) with the result ``plus/merged/…``.
"""

# mypy: disable-error-code="import-not-found,misc"

from __future__ import annotations

import argparse
import ast
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fusion_bench.method.fisher_merging.fisher_merging import get_models_fisher_norm, merging_with_fisher_weights
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
from fusion_bench.method.regmean_plusplus.clip_regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus
from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
from fusion_bench.modelpool import BaseModelPool
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

DATA = Path(__file__).parent / "data" / "data_driven.safetensors"
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CLS, SEP, FIRST_WORD = 2, 3, 7
SHAPES = {"layer.weight": (6, 5), "layer.bias": (6,), "norm.weight": (5,)}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--aim", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    tensors = fisher() | regmean() | aim(arguments.aim) | plus()
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, DATA)


def fisher() -> dict[str, Tensor]:
    """Three models, one of whose Fisher information is 0 in places; with and without norms, equal and other weights."""
    torch.manual_seed(0)
    theta = [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(3)]
    known = [
        {name: torch.rand(shape).pow(4) * 10.0 ** (-number) for name, shape in SHAPES.items()} for number in range(3)
    ]
    for part in known:
        part["layer.weight"][0] = 0.0
    out = _inputs("fisher", "theta", theta) | _inputs("fisher", "F", known)
    lists = {name: [model[name] for model in theta] for name in SHAPES}
    for number, value in enumerate(get_models_fisher_norm(lists, known)):
        out[f"fisher/norm/{number}"] = value
    for case, weights, normalise, floor in (
        ("equal", [1 / 3] * 3, True, 1e-6),
        ("plain", [1 / 3] * 3, False, 1e-6),
        ("weights", [0.5, 0.2, 0.9], True, 1e-3),
    ):
        merged = merging_with_fisher_weights(lists, known, torch.tensor(weights), normalise, floor)
        out |= {f"fisher/{case}/{name}": tensor for name, tensor in merged.items()}
    return out


def regmean() -> dict[str, Tensor]:
    """Three models with as many inputs as are needed, three off-diagonal factors, and transposed weights."""
    torch.manual_seed(1)
    theta = [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(3)]
    inputs = [torch.randn(40, 5) @ torch.randn(5, 5) for _ in range(3)]
    grams = [{"layer": rows.T @ rows / len(rows)} for rows in inputs]
    out = _inputs("regmean", "theta", theta)
    out |= {f"regmean/G/{number}": known["layer"] for number, known in enumerate(grams)}
    lists = {name: [model[name] for model in theta] for name in SHAPES}
    for factor in (1.0, 0.95, 0.1):
        merged = merging_with_regmean_weights(lists, grams, factor)
        out |= {f"regmean/{factor}/{name}": tensor for name, tensor in merged.items()}
    turned = {"layer.weight": [model["layer.weight"].T.contiguous() for model in theta]}
    merged = merging_with_regmean_weights(turned, grams, 0.95, weight_transpose=False)
    out["regmean/transposed/layer.weight"] = merged["layer.weight"]
    return out


def aim(checkout: Path) -> dict[str, Tensor]:
    """A linear layer and a norm, with the authors' two values of ω."""
    path = checkout / "MergeModels/ActivationMerging/_utils.py"
    tree = ast.parse(path.read_text().replace(".to(torch.bfloat16)", ""))
    wanted: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "apply_relaxation"
    ]
    names: dict[str, Any] = {"torch": torch, "tqdm": lambda entries, **_: entries}
    exec(compile(ast.Module(wanted, []), str(path), "exec"), names)  # the authors' text, in their place
    torch.manual_seed(2)
    out: dict[str, Tensor] = {}
    layers = {"layer": (6, 5), "norm": (5,)}
    base = {name: torch.randn(shape) for name, shape in layers.items()}
    merged = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in base.items()}
    activation = {name: torch.rand(5) for name in layers}
    for name in layers:
        out |= {f"aim/base/{name}": base[name], f"aim/merged/{name}": merged[name], f"aim/a/{name}": activation[name]}
    modules = {name: SimpleNamespace(weight=SimpleNamespace(data=tensor)) for name, tensor in base.items()}
    for omega in (0.2, 0.4):
        deltas = {name: merged[name] - base[name] for name in layers}
        found = names["apply_relaxation"](deltas, activation, modules, None, omega)
        out |= {f"aim/{omega}/{name}": tensor for name, tensor in found.items()}
    return out


class _Plus(RegMeanAlgorithmPlusPlus):
    """The abstract parts for a Bert; the Gram matrices are those of fusion_bench's version for CLIP."""

    get_regmean_weights = RegMeanAlgorithmForCLIPPlusPlus.get_regmean_weights

    @property
    def fabric(self) -> Any:
        return SimpleNamespace(setup=lambda module: module)

    def merge_embedding_layer(self, models_to_merge_dict: dict[str, nn.Module]) -> dict[str, Tensor]:
        states = [model.state_dict() for model in models_to_merge_dict.values()]
        return {
            name: torch.stack([state[name] for state in states]).mean(dim=0)
            for name in states[0]
            if name.startswith("embeddings")
        }

    def get_input_for_first_layer(self, model: nn.Module, train_dataset: Tensor) -> list[Tensor]:
        return [model.embeddings(train_dataset).detach()]  # type: ignore[operator]

    def get_layers(self, model: nn.Module) -> Any:
        return model.encoder.layer  # type: ignore[union-attr]

    def update_merged_params_dict(
        self, merged_params_dict: dict[str, Tensor], new_merged_params: dict[str, Tensor], layer_idx: int
    ) -> dict[str, Tensor]:
        return merged_params_dict | {
            f"encoder.layer.{layer_idx}.{name}": tensor for name, tensor in new_merged_params.items()
        }

    def layer_batches_forward(self, layer: nn.Module, batches_input: list[Tensor]) -> list[Tensor]:
        return [layer(batch)[0].detach() for batch in batches_input]


class _Pool(BaseModelPool):
    """Models and token ids that are there already."""

    def load_train_dataset(self, dataset_name: str, *_: Any, **__: Any) -> Tensor:
        return IDS[dataset_name]


IDS: dict[str, Tensor] = {}


def plus() -> dict[str, Tensor]:
    """Two experts of a Bert with three layers, each with items of one length, so that nothing is padded."""
    torch.manual_seed(3)
    base = _bert(None)
    experts = {"one": _bert(base), "two": _bert(base)}
    for number, name in enumerate(experts):
        words = torch.randint(FIRST_WORD, CONFIG["vocab_size"], (12, 5 + number))
        ends = torch.full((12, 1), CLS), torch.full((12, 1), SEP)
        IDS[name] = torch.cat([ends[0], words, ends[1]], dim=1)
    method = _Plus(
        num_regmean_examples=256, exclude_param_names_regex=[], reduce_non_diagonal_ratio=0.95, weight_transpose=True
    )
    merged = method.run(_Pool({"_pretrained_": deepcopy(base), **experts}))
    out = {f"plus/ids/{name}": ids for name, ids in IDS.items()}
    for name, model in {"base": base, **experts, "merged": merged}.items():
        out |= {f"plus/{name}/{key}": tensor for key, tensor in model.state_dict().items()}
    return out


def _bert(start: BertModel | None) -> BertModel:
    model = deepcopy(start) if start is not None else BertModel(BertConfig(**CONFIG), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.train(False)
    return model


def _inputs(method: str, what: str, models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{method}/{what}/{number}/{name}": tensor
        for number, model in enumerate(models)
        for name, tensor in model.items()
    }


if __name__ == "__main__":
    main()
