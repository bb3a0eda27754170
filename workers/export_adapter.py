"""Writing a merge as a PEFT LoRA adapter to the job's base: every change as a product of two narrow matrices."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimizer.errors import InvalidInput
from optimizer.geometry import Layout, TensorInfo
from optimizer.recipe import Recipe
from optimizer.spec import JobSpec
from workers.adapters_names import PREFIX, names_in_memory
from workers.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from workers.compatibility import head_tensors
from workers.merging.cache import Cache
from workers.merging.configs import load_config
from workers.merging.engine import Measurements, MergeEngine
from workers.merging.low_rank import matrix
from workers.merging.spectral import Svd, one_thread, svd
from workers.model_card import CardFacts, Score, model_card
from workers.naming import architecture, canonical_names, tied_output
from workers.publishing import RECIPE, new_directory, write_json
from workers.quiet import quiet

WHOLE_UP_TO = 1024
"""Matrices with no more rows or columns are decomposed completely; of larger ones only the leading part is found."""

_CPU = torch.device("cpu")
_NEGLIGIBLE = 1e-7  # of the largest singular value: less than float32 keeps
_EXTRA, _ROUNDS = 32, 4  # further directions, and multiplications by ΔΔᵀ, that sharpen the leading part

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_NEEDS_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types for which PEFT expects a head among the adapter's tensors."""


@dataclass(frozen=True)
class Truncation:
    """What became of one matrix.

    Attributes:
        tensor: canonical name.
        rank: of its factors.
        norm: Frobenius norm ‖Δ‖ of the change to the base.
        error: ‖Δ − B A‖ / ‖Δ‖ with the factors as they are written.
    """

    tensor: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class AdapterReport:
    """How well an adapter stands for a merge.

    Attributes:
        rank: that was asked for.
        truncations: the matrices that change, in order of their names.
        whole: canonical names of what is in the adapter as a whole, and exactly: norms, biases, heads.
        error: √Σ‖Δ − B A‖² / √Σ‖Δ‖² over all matrices; 0 where none changes.
    """

    rank: int
    truncations: tuple[Truncation, ...]
    whole: tuple[str, ...]

    @property
    def error(self) -> float:
        """See the class."""
        total = math.fsum(entry.norm**2 for entry in self.truncations)
        lost = math.fsum((entry.norm * entry.error) ** 2 for entry in self.truncations)
        return math.sqrt(lost / total) if total else 0.0


def export_adapter(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    layout: Layout,
    out: Path,
    *,
    rank: int,
    head: str | None,
    title: str,
    scores: Mapping[str, Score],
    spec: JobSpec | None,
    progress: Callable[[float], None],
    test_scores: Mapping[str, Score] | None = None,
    overfitted: Sequence[str] = (),
    overwrite: bool = False,
    measurements: Measurements | None = None,
    cache: Cache | None = None,
) -> AdapterReport:
    """Write the difference between a merged model and the job's base as an adapter that plain PEFT loads.

    ``PeftModel.from_pretrained(model, out)`` expects ``model`` of the class that the head's model has, opened from the
    base's files. Matrices get factors of the given rank at most, exactly where the change has no higher one; what is no
    weight of a linear layer, a convolution or an embedding is kept as a whole. Where the base ties its output layer to
    embeddings that change, the adapter says so (``ensure_weight_tying``); PEFT's own ``merge_and_unload`` then adds
    their change twice, as it does with every such adapter.

    ``out`` appears complete or not at all. At most one parameter is in memory besides the adapter.

    Args:
        recipe: the merged model; without a layer plan.
        checkpoints: ``base`` and the experts by name.
        layout: what they share.
        out: directory to create.
        rank: of the factors.
        head: expert whose head is part of the adapter; None for the base's own, which is not.
        title, scores, test_scores, overfitted, spec: for the model card, see `workers.export.export_checkpoint`.
        progress: called with the share done, from 0 to 1.
        overwrite: replace an earlier export that stands at ``out``.
        measurements: what operators such as Fisher merging know of the models.
        cache: of what operators prepare; in memory by default.

    Returns:
        How much was lost.

    Raises:
        Conflict: ``out`` exists already; it is left as it is.
        InvalidInput: no such expert, a layer plan, a rank below 1, or a change that no adapter can express.
        InfeasibleCandidate: an operator is not defined for the recipe's coefficients.
        MergeoptError: the disk is full or cannot be written to; nothing is left behind.
    """
    _check(recipe, checkpoints, rank, head)
    source = checkpoints[head or "base"]
    engine = MergeEngine(checkpoints, layout, measurements=measurements, cache=cache)
    engine.check(recipe)
    with new_directory(out, overwrite, checkpoints) as partial:
        progress(0.0)
        writer = _Writer(source, checkpoints["base"], rank)
        for number, tensor in enumerate(layout.shared):
            writer.add(tensor, *_change(engine, recipe, tensor))
            progress((number + 1) / (len(layout.shared) + 1))
        for name, raw in head_tensors(source, layout).items() if head is not None else ():
            writer.add_head(name, raw)
        writer.finish(engine, recipe, layout)
        report = writer.report
        save_file(dict(sorted(writer.tensors.items())), partial / ADAPTER_WEIGHTS, {"format": "pt"})
        write_json(partial / ADAPTER_CONFIG, writer.config(recipe))
        write_json(partial / RECIPE, recipe.to_json())
        facts = CardFacts(
            title,
            head,
            scores=scores,
            test_scores=test_scores or {},
            spec=spec,
            adapter_rank=rank,
            overfitted=overfitted,
        )
        card = model_card(recipe, checkpoints, facts)
        card = card.replace("library_name: transformers", "library_name: peft", 1)
        (partial / "README.md").write_text(card + _section(report), encoding="utf-8")
        engine.verify()
    progress(1.0)
    return report


def _check(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], rank: int, head: str | None) -> None:
    if head is not None and head not in checkpoints:
        raise InvalidInput(f"{head!r} is no expert of the job", field="head", remedy="name an expert")
    if rank < 1:
        raise InvalidInput(f"a rank of {rank} is no rank", field="rank", remedy="use 1 or more")
    if recipe.layers is not None:
        raise InvalidInput(
            "an adapter cannot rearrange the layers of its base",
            field="recipe.layers",
            remedy="export the merged model as a checkpoint",
        )


def _change(engine: MergeEngine, recipe: Recipe, tensor: TensorInfo) -> tuple[Tensor, Tensor]:
    """A merged parameter and its difference to the base's, computed in float64: what rounds is no change."""
    merged = engine.merged(recipe, tensor, torch.float64)
    return merged, merged - engine.source("base", tensor, _CPU).double()


@dataclass
class _Writer:
    """Collects an adapter's tensors, by the names that PEFT gives them."""

    source: Checkpoint
    base: Checkpoint
    rank: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    truncations: list[Truncation] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._class = architecture(self.source)
        with quiet(logging.CRITICAL), torch.device("meta"):
            model: PreTrainedModel = self._class._from_config(load_config(self.source))  # type: ignore[no-untyped-call]
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        in_memory = names_in_memory(self.source)
        self._names = {name: in_memory.get(raw) for name, raw in canonical_names(self.source).items()}
        self._tied = tied_output(self.source)
        self._ranks: dict[str, int] = {}
        self._biases: dict[str, Tensor] = {}
        self._saved: set[str] = set()

    def add(self, tensor: TensorInfo, merged: Tensor, delta: Tensor) -> None:
        """Add a parameter, if it changes by more than float32 rounds."""
        if torch.equal(merged.float(), (merged - delta).float()):
            return
        module, _, leaf = self._name(tensor.name).rpartition(".")
        kind = self._modules[module]
        if leaf == "weight" and _takes_factors(kind):
            self._add_factors(tensor.name, module, kind, delta)
        elif leaf == "bias" and _takes_factors(kind):
            self._biases[module] = merged.float()
            self.whole.append(tensor.name)
        else:
            self._saved.add(module)

    def add_head(self, name: str, raw: str) -> None:
        """Add a tensor of the head's."""
        if self.source.tensor(raw).is_floating_point():
            self._saved.add(self._name(name).rpartition(".")[0])

    def finish(self, engine: MergeEngine, recipe: Recipe, layout: Layout) -> None:
        """Add the modules that are saved as a whole, with everything in them, and the biases."""
        self._saved = {name for name in self._saved if not any(_inside(name, other) for other in self._saved)}
        if "" in self._saved:
            raise InvalidInput(
                "the merge changes a parameter that belongs to no module, which an adapter cannot express",
                field="recipe",
                remedy="export the merged model as a checkpoint",
            )
        shared = {tensor.name: tensor for tensor in layout.shared}
        for name, memory in self._names.items():
            owner = next((module for module in self._saved if memory and _inside(memory, module)), None)
            if owner is None or memory is None:
                continue
            if name in shared:
                value = engine.merged(recipe, shared[name], torch.float32)
            else:
                value = self.source.tensor(canonical_names(self.source)[name])
            self.tensors[PREFIX + memory] = value.contiguous().clone()
            self.whole.append(name)
        for module in [module for module in self._ranks if any(_inside(module, other) for other in self._saved)]:
            self._drop(module)
        for module, bias in self._biases.items():
            inner = ".base_layer" if module in self._ranks else ""
            self.tensors.setdefault(f"{PREFIX}{module}{inner}.bias", bias)

    @property
    def report(self) -> AdapterReport:
        """What was written."""
        ordered = sorted(self.truncations, key=lambda entry: entry.tensor)
        return AdapterReport(self.rank, tuple(ordered), tuple(sorted(set(self.whole))))

    def config(self, recipe: Recipe) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``."""
        ref = recipe.models["base"].ref if "base" in recipe.models else None
        own = {_pattern(module): rank for module, rank in self._ranks.items() if rank != self.rank}
        task = next((task for end, task in _TASKS.items() if self._class.__name__.endswith(end)), None)
        if task in _NEEDS_HEAD and not self._saved:
            task = None
        return {
            "peft_type": "LORA",
            "task_type": task,
            "auto_mapping": {
                "base_model_class": self._class.__name__,
                "parent_library": self._class.__module__,
            }
            if task is None
            else None,
            "base_model_name_or_path": (ref.hub or ref.path) if ref is not None else None,
            "revision": ref.revision if ref is not None else None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": own,
            "alpha_pattern": own,
            "target_modules": sorted(self._ranks),
            "modules_to_save": sorted(self._saved) or None,
            "bias": "all" if self._biases else "none",
            "ensure_weight_tying": self._tied_module in self._ranks,
            "lora_dropout": 0.0,
            "fan_in_fan_out": any(isinstance(self._modules[module], Conv1D) for module in self._ranks),
        }

    @property
    def _tied_module(self) -> str | None:
        return self._tied[0].removesuffix(".weight") if self._tied else None

    def _name(self, name: str) -> str:
        found = self._names.get(name)
        if found is None:
            raise InvalidInput(
                f"transformers computes {name!r} with others into one parameter, so no adapter can change it",
                field="recipe",
                remedy="export the merged model as a checkpoint",
            )
        return found

    def _add_factors(self, name: str, module: str, kind: nn.Module, delta: Tensor) -> None:
        shape = delta.shape
        plain = matrix(delta)
        turned = isinstance(kind, nn.Embedding | Conv1D)
        up, down = _factors(plain.T if turned else plain, self.rank)
        product = (up.double() @ down.double()).T if turned else up.double() @ down.double()
        norm = float(plain.norm())
        self.truncations.append(Truncation(name, up.shape[1], norm, float((plain - product).norm()) / norm))
        self._ranks[module] = up.shape[1]
        start = f"{PREFIX}{module}"
        if isinstance(kind, nn.Embedding):
            self.tensors |= {f"{start}.lora_embedding_A": down, f"{start}.lora_embedding_B": up}
            self._add_tied(name, up, down)
            return
        if isinstance(kind, nn.Conv2d):
            up, down = up.reshape(*up.shape, 1, 1), down.reshape(-1, *shape[1:])
        self.tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}

    def _add_tied(self, name: str, up: Tensor, down: Tensor) -> None:
        output = self._tied_module
        if self._tied is None or output is None or self._names[name] != self._tied[1]:
            return
        self._ranks[output] = up.shape[1]
        self.tensors |= {
            f"{PREFIX}{output}.lora_A.weight": up.T.contiguous(),
            f"{PREFIX}{output}.lora_B.weight": down.T.contiguous(),
        }

    def _drop(self, module: str) -> None:
        """Forget the factors of a module that is saved as a whole."""
        del self._ranks[module]
        self._biases.pop(module, None)
        self.tensors = {
            key: value for key, value in self.tensors.items() if not key.startswith(f"{PREFIX}{module}.lora_")
        }
        names = {name for name, memory in self._names.items() if memory == f"{module}.weight"}
        self.truncations = [entry for entry in self.truncations if entry.tensor not in names]


def _takes_factors(module: nn.Module) -> bool:
    """Whether PEFT puts plain LoRA on a module of this class."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _inside(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _pattern(module: str) -> str:
    """An expression that matches this module only."""
    return "^" + module.replace(".", r"\.")


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B and A in float32, the roots of the singular values in each; at least one column."""
    with one_thread():
        parts = svd(delta) if min(delta.shape) <= WHOLE_UP_TO else _leading(delta, rank)
    parts = parts.leading(min(rank, int((parts.values > _NEGLIGIBLE * parts.values[:1]).sum())))
    root = parts.values.sqrt()
    return (parts.left * root).float().contiguous(), (root[:, None] * parts.right).float().contiguous()


def _leading(delta: Tensor, rank: int) -> Svd:
    """The leading singular triplets, by subspace iteration; exact where the rank is no higher than those asked for."""
    generator = torch.Generator().manual_seed(0)
    count = min(rank + _EXTRA, *delta.shape)
    basis = torch.randn(delta.shape[1], count, generator=generator, dtype=delta.dtype)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(delta.T @ torch.linalg.qr(delta @ basis).Q).Q
    basis = torch.linalg.qr(delta @ basis).Q
    inner = svd(basis.T @ delta)
    return Svd(basis @ inner.left, inner.values, inner.right)


def _section(report: AdapterReport) -> str:
    ranks = [entry.rank for entry in report.truncations]
    lines = [
        "\n## Adapter\n",
        f"A LoRA adapter of rank {report.rank} on {len(ranks)} matrices, by singular value decomposition of the merge.",
        f"What is lost of their change to the base: {report.error:.3g} of its norm.\n",
    ]
    return "\n".join(lines)
