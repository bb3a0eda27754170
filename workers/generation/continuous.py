"""Answers through the continuous batching of transformers: an answer that ends makes room for the next at once.

Its requests are all known before it starts, and its cache has a fixed size, so that what is computed together depends on
the prompts and options alone, never on timing or on the memory that is free. What is not a number in one answer's past can
make others of its batch so too: attention over all of them multiplies it by zero.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from optimizer.errors import InvalidInput
from workers.evaluators.base import Cancelled
from workers.generation.answers import Answer, Decoding, Writer

log = logging.getLogger(__name__)

_PAGE = 64
_MAX_CACHED = 2**16
"""Most tokens whose keys and values are kept, unless one answer needs more; what decides how many are written at once."""
_MAX_READ = 512
"""Most tokens that go through the model at once: longer prompts are read in parts."""
_POLL_S = 0.2
_LOGGER = logging.getLogger("ContinuousBatchingLogger")


def suits(decoding: Decoding, config: PreTrainedConfig) -> bool:
    """Whether continuous batching can write such answers of such a model: greedy, without stop texts, plain attention."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    return not decoding.temperature and not decoding.stop and kinds <= {"full_attention"}


class ContinuousWriter:
    """See the module.

    Args:
        decoding: how.
        field: dotted path of the objective, for errors.
    """

    def __init__(self, decoding: Decoding, field: str) -> None:
        self._decoding = decoding
        self._field = field

    def __call__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], cancelled: Callable[[], bool]
    ) -> list[Answer]:
        """See `Writer`.

        Raises:
            InvalidInput: continuous batching does not know such models.
        """
        if cancelled():
            raise Cancelled("the evaluation was called off")
        manager = self._manager(model, max(map(len, prompts)))
        # The longest first, so that none is left over to the end alone.
        order = sorted(range(len(prompts)), key=lambda item: (-len(prompts[item]), item))
        for item in order:
            manager.add_request(list(prompts[item]), request_id=str(item))
        with _running(manager):
            found = self._collect(manager, len(prompts), cancelled)
        return [self._answer(found[str(item)]) for item in range(len(prompts))]

    def _manager(self, model: PreTrainedModel, longest: int) -> Any:
        try:
            return model.init_continuous_batching(self._generation(), self._batching(longest))  # type: ignore[operator]
        except Exception as error:  # what models of other kinds lack shows in many ways
            raise self._failure(error) from error

    def _collect(self, manager: Any, count: int, cancelled: Callable[[], bool]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while len(found) < count:
            if cancelled():
                raise Cancelled("the evaluation was called off")
            result = manager.get_result(timeout=_POLL_S)
            if result is not None and result.error is not None:
                raise self._failure(result.error)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            elif result is None and not manager.is_running():
                raise self._failure(manager.background_thread_status.fatal_error)
        return found

    def _failure(self, reason: object) -> InvalidInput:
        return InvalidInput(
            f"continuous batching failed: {reason}",
            field=f"{self._field}.options.batching",
            remedy="use `batching: padded` for this model",
        )

    def _answer(self, result: Any) -> Answer:
        ids = list(result.generated_tokens)
        sound = all(math.isfinite(logprob) for logprob in result.logprobs)
        return Answer(ids, bool(ids) and ids[-1] in self._decoding.end, sound)

    def _generation(self) -> GenerationConfig:
        decoding = self._decoding
        end = list(decoding.end) or [-1]
        return GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=end,
            pad_token_id=decoding.pad,
        )

    def _batching(self, longest: int) -> ContinuousBatchingConfig:
        pages = math.ceil((longest + self._decoding.max_new_tokens + 1) / _PAGE)
        size = min(self._decoding.batch_size, max(1, _MAX_CACHED // (pages * _PAGE)))
        return ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=size * pages + 1,
            max_batch_tokens=max(size, _MAX_READ),
            max_requests_per_batch=size,
            allow_block_sharing=False,
            use_async_batching=False,
            return_logprobs=True,
        )


class EitherWriter:
    """Continuous batching until a model turns out to be none of those that it knows; padded batches from then on.

    Args:
        first: is given up at its first error other than `Cancelled`, which is the same on every worker.
        second: takes its place.
    """

    def __init__(self, first: Writer, second: Writer) -> None:
        self._first: Writer | None = first
        self._second = second

    def __call__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], cancelled: Callable[[], bool]
    ) -> list[Answer]:
        """See `Writer`."""
        if self._first is not None:
            try:
                return self._first(model, prompts, cancelled)
            except Cancelled:
                raise
            except Exception as error:  # noqa: BLE001 - what models of other kinds lack shows in many ways
                log.info("answers are written in padded batches: %s", error)
                self._first = None
        return self._second(model, prompts, cancelled)


@contextmanager
def _running(manager: Any) -> Iterator[None]:
    """Run a manager's thread for the time of the block; its log is for those who ask for it."""
    level = _LOGGER.level
    _LOGGER.setLevel(logging.CRITICAL)
    try:
        manager.start()
        yield
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()
        _LOGGER.setLevel(level)
