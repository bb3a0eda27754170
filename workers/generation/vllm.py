"""Answers by vLLM on the worker's GPU, for those who installed the extra ``vllm``.

Each candidate's weights go to the engine by CUDA IPC handles, as vLLM documents for reinforcement learning ("Weight
Transfer", releases 0.25 to 0.28). The engine holds a copy of the model of its own, so a GPU needs room for both, and the
resident one must be there too. No test of this project runs it: they need neither a GPU nor vLLM.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimizer.errors import InvalidInput
from workers.evaluators.base import Cancelled
from workers.generation.answers import Answer, Decoding, item_seed

_SHARE = 0.4
"""Of the GPU's memory, for the engine: its weights, keys and values."""


class VllmWriter:
    """See the module.

    Args:
        decoding: how.
        model_dir: checkpoint whose config and tokenizer the engine reads; its weights are not used.
        field: dotted path of the objective, for errors.

    Raises:
        InvalidInput: vLLM is not installed.
    """

    def __init__(self, decoding: Decoding, model_dir: Path, field: str) -> None:
        try:
            self._vllm: Any = importlib.import_module("vllm")
            self._ipc: Any = importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
        except ImportError as error:
            raise InvalidInput(
                f"vLLM cannot be used here: {error}",
                field=f"{field}.options.backend",
                remedy="have the extra installed on a GPU worker (pip install 'mergeopt[vllm]'), or leave `backend` out",
            ) from error
        self._decoding = decoding
        self._model_dir = model_dir
        self._field = field
        self._engine: Any = None

    def __call__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], cancelled: Callable[[], bool]
    ) -> list[Answer]:
        """See `Writer`; batches end before ``cancelled`` is asked again. vLLM does not tell outputs that are not finite."""
        if model.device.type != "cuda":
            raise InvalidInput(
                "vLLM needs a worker with a GPU", field=f"{self._field}.options.backend", remedy="set `workers.gpus`"
            )
        self._send(model)
        out: list[Answer] = []
        for first in range(0, len(prompts), self._decoding.batch_size):
            if cancelled():
                raise Cancelled("the evaluation was called off")
            part = prompts[first : first + self._decoding.batch_size]
            asked = [{"prompt_token_ids": list(prompt)} for prompt in part]
            found = self._engine.generate(asked, [self._sampling(prompt) for prompt in part], use_tqdm=False)
            out += [self._answer(one.outputs[0]) for one in found]
        return out

    def _send(self, model: PreTrainedModel) -> None:
        """Give the engine the merged weights; starts it the first time."""
        if self._engine is None:
            config = importlib.import_module("vllm.config")
            self._engine = self._vllm.LLM(
                model=str(self._model_dir),
                load_format="dummy",
                dtype=str(model.dtype).removeprefix("torch."),
                gpu_memory_utilization=_SHARE,
                max_num_seqs=self._decoding.batch_size,
                trust_remote_code=False,
                weight_transfer_config=config.WeightTransferConfig(backend="ipc"),
            )
            self._engine.init_weight_transfer_engine({"init_info": {}})
        self._engine.start_weight_update()
        self._ipc.IPCWeightTransferEngine.trainer_send_weights(
            iterator=model.named_parameters(),
            trainer_args=self._ipc.IPCTrainerSendWeightsArgs(send_mode=self._update),
        )
        self._engine.finish_weight_update()
        self._engine.reset_prefix_cache()

    def _update(self, info: Any) -> None:
        self._engine.update_weights({"update_info": dataclasses.asdict(info)})

    def _sampling(self, prompt: Sequence[int]) -> Any:
        decoding = self._decoding
        return self._vllm.SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k or -1,
            seed=item_seed(decoding.seed, prompt),
            stop=list(decoding.stop),
            stop_token_ids=list(decoding.end),
            skip_special_tokens=False,
        )

    def _answer(self, output: Any) -> Answer:
        return Answer(list(output.token_ids), output.finish_reason == "stop")
