"""What a task file of the user's may say: nothing that runs code, reads other files, or asks other hosts.

Templates are allowed; `workers.harness.tasks` renders them in a sandbox. The rest of what would run code is refused here,
unless the server's policy allows task code: functions and classes; metrics that the ``evaluate`` library would fetch as
programs; readers of data other than plain tables; arguments of ``datasets`` and of ``generate`` that lead elsewhere.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval.api.registry import metric_registry
from lm_eval.config.task import TaskConfig

from optimizer.errors import InvalidInput
from workers.harness.files import Code, TaskFile
from workers.roots import Roots

READERS = ("json", "csv", "parquet", "arrow", "text")
"""Readers of ``datasets`` for local files that read tables and nothing else."""

DATA_ARGUMENTS = {
    "data_files", "field", "sep", "delimiter", "column_names", "names", "quotechar", "quoting", "encoding", "columns",
    "keep_linebreaks", "sample_by",
}  # fmt: skip

GENERATION_ARGUMENTS = {
    "until", "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "num_beams", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "early_stopping", "max_gen_toks", "max_new_tokens", "max_tokens",
    "max_completion_tokens",
}  # fmt: skip

UNSUPPORTED = ("doc_to_image", "doc_to_audio", "use_prompt")
_RUNS = ("class", "custom_dataset")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_STRUCTURE = {"tag", "group", "task_list", "class"}


@dataclass(frozen=True)
class Rules:
    """Checks task files for one objective.

    Attributes:
        task_code: whether the server lets task files run code.
        roots: where data may be.
        field: dotted path of the option that names the directory.
    """

    task_code: bool
    roots: Roots
    field: str

    def check(self, file: TaskFile) -> dict[str, Any]:
        """Return the config that the harness may have: functions resolved, data by absolute paths.

        Raises:
            InvalidInput: the file runs code and must not, or says what the harness, or we, do not know.
            PathNotAllowed: its data is outside the roots.
        """
        where = file.path.name
        config = self._resolved(copy.deepcopy(dict(file.config)), where, "")
        self._check_keys(config, where)
        for key in _RUNS:
            if key in config and not self.task_code:
                raise self._runs(f"{where}: `{key}`")
        self._check_data(config, file.path)
        self._check_metrics(config, where)
        check_generation(config.get("generation_kwargs"), f"{where}: `generation_kwargs`", self.field)
        return {key: value for key, value in config.items() if key not in _STRUCTURE or key == "class"}

    def _resolved(self, value: Any, where: str, key: str) -> Any:
        if isinstance(value, Code):
            if value.tag != "!function":
                raise self._error(f"{where}: `{key}` has the unknown tag {value.tag}")
            if not self.task_code:
                raise self._runs(f"{where}: `{key}` ({value.tag} {value.name})")
            return self._function(value, where)
        if isinstance(value, dict):
            return {name: self._resolved(part, where, key or str(name)) for name, part in value.items()}
        if isinstance(value, list):
            return [self._resolved(part, where, key) for part in value]
        return value

    def _function(self, code: Code, where: str) -> Callable[..., Any]:
        module, _, name = code.name.rpartition(".")
        path = code.directory / f"{module.replace('.', '/')}.py"
        try:
            found = _load(self.roots.path(str(path), self.field)) if path.is_file() else importlib.import_module(module)
            function: Callable[..., Any] = getattr(found, name)
        except InvalidInput:
            raise
        except Exception as error:  # whatever the module's own code raises
            raise self._error(f"{where}: {code.name} cannot be loaded: {type(error).__name__}: {error}") from error
        return function

    def _check_keys(self, config: Mapping[str, Any], where: str) -> None:
        known = {part.name for part in fields(TaskConfig)} | _STRUCTURE
        for key in config:
            if key in UNSUPPORTED and config[key]:
                raise self._error(f"{where}: tasks with `{key}` are not supported here")
            if key not in known:
                close = get_close_matches(key, known, 3)
                raise InvalidInput(
                    f"{where}: the harness knows no `{key}`",
                    field=self.field,
                    remedy=f"did you mean {' or '.join(close)}?" if close else "remove it",
                )

    def _check_data(self, config: dict[str, Any], path: Path) -> None:
        where = path.name
        if callable(config.get("custom_dataset")) or "class" in config:
            return
        reader = config.get("dataset_path")
        arguments = config.get("dataset_kwargs") or {}
        if not isinstance(reader, str) or not _HUB_ID.fullmatch(reader) or not isinstance(arguments, dict):
            raise InvalidInput(
                f"{where}: `dataset_path` must be one of {', '.join(READERS)}, or a data set's id on a hub",
                field=self.field,
                remedy="for local data: `dataset_path: json` and `dataset_kwargs: {data_files: {test: FILE}}`",
            )
        for key in arguments:
            if key not in DATA_ARGUMENTS and not self.task_code:
                raise self._error(f"{where}: `dataset_kwargs` may not have {key!r}")
        if "data_files" in arguments:
            if reader not in READERS:
                raise self._error(f"{where}: `data_files` goes with one of the readers {', '.join(READERS)}")
            config["dataset_kwargs"] = arguments | {"data_files": self._files(arguments["data_files"], path)}
        elif reader in READERS:
            raise self._error(f"{where}: `dataset_kwargs` names no `data_files`")

    def _files(self, value: Any, path: Path) -> Any:
        """Data files by absolute path; relative ones stand beside the task file, or below a root."""
        if isinstance(value, dict):
            return {split: self._files(part, path) for split, part in value.items()}
        if isinstance(value, list):
            return [self._files(part, path) for part in value]
        if not isinstance(value, str):
            raise self._error(f"{path.name}: `data_files` must name files")
        beside = path.parent / value
        found = self.roots.path(str(beside) if beside.is_file() else value, self.field)
        if not found.is_file():
            raise self._error(f"{path.name}: the data file {value!r} is no file")
        return str(found)

    def _check_metrics(self, config: Mapping[str, Any], where: str) -> None:
        if self.task_code:
            return
        for entry in config.get("metric_list") or []:
            metric = entry.get("metric") if isinstance(entry, dict) else None
            if metric not in metric_registry or entry.get("hf_evaluate"):
                raise InvalidInput(
                    f"{where}: the harness has no metric {metric!r} of its own, and to fetch one is to run code",
                    field=self.field,
                    remedy=f"use one of: {', '.join(sorted(metric_registry.keys()))}",
                )

    def _runs(self, what: str) -> InvalidInput:
        return InvalidInput(
            f"{what} runs code, which this server does not allow",
            field=self.field,
            remedy="use templates, or have the server's `task_code` setting turned on",
        )

    def _error(self, message: str) -> InvalidInput:
        return InvalidInput(message, field=self.field, remedy="change the task file")


def check_generation(arguments: Any, what: str, field: str) -> None:
    """Refuse arguments of ``generate`` that are not about how tokens are chosen; raises `InvalidInput`."""
    if arguments is None:
        return
    unknown = (
        [key for key in arguments if key not in GENERATION_ARGUMENTS] if isinstance(arguments, dict) else ["a text"]
    )
    if unknown:
        raise InvalidInput(
            f"{what} may not have {unknown[0]!r}", field=field, remedy=f"use: {', '.join(sorted(GENERATION_ARGUMENTS))}"
        )


def _load(path: Path) -> ModuleType:
    """Import a file beside a task file, once for each content."""
    name = f"mergeopt_task_{sha256(str(path).encode() + path.read_bytes()).hexdigest()[:32]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path.name} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
