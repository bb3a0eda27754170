"""From the names in an objective to tasks of lm-evaluation-harness, with their data loaded."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as harness_environment

from optimizer.errors import InvalidInput
from workers.harness.contained import silent
from workers.harness.files import BuiltIn, TaskFile, TaskFiles
from workers.harness.rules import Rules
from workers.policy import Policy
from workers.roots import Roots

logging.getLogger("lm_eval").setLevel(logging.ERROR)

_OWN = Path(lm_eval.tasks.__file__).parent
_NAMED = re.compile(rb"^\s*(?:-\s+)?[\"']?(?:task|group|tag)[\"']?\s*:(.+)$", re.MULTILINE)
_LISTED = re.compile(rb"^[\"']?(?:tag)[\"']?\s*:\s*\n((?:\s*-\s+.+\n)+)", re.MULTILINE)
_WORD = re.compile(rb"[\w.:+/()-]+")
_UNREACHABLE = ("ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "HfHubHTTPError", "TransportError")

_TEMPLATES = SandboxedEnvironment(undefined=harness_environment.undefined, keep_trailing_newline=True)
_TEMPLATES.filters["regex_replace"] = harness_environment.filters["regex_replace"]


def render(template: str, doc: Mapping[str, Any]) -> str:
    """Render a task's template as the harness does, except that it can reach nothing but the document.

    Raises:
        jinja2.exceptions.SecurityError: it tries to.
        jinja2.exceptions.TemplateError: it is malformed, or names a column that the document does not have.
    """
    return _TEMPLATES.from_string(template).render(**doc)


class SandboxedTask(ConfigurableTask):  # type: ignore[misc]
    """A task from a file of the user's. The harness is handed its templates' results in place of the templates."""

    @staticmethod
    def resolve_field(doc: Mapping[str, Any], field: str | None = None) -> str | None:
        """See the harness."""
        if not field:
            return None
        return str(doc[field]) if field in doc else render(field, doc)

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        """See the harness."""
        return super().doc_to_text(*self._rendered(doc, doc_to_text, self.config.doc_to_text))

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        """See the harness."""
        return super().doc_to_target(*self._rendered(doc, doc_to_target, self.config.doc_to_target))

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        """See the harness."""
        return super().doc_to_choice(*self._rendered(doc, doc_to_choice, self.config.doc_to_choice))

    def doc_to_prefix(self, doc: Any) -> Any:
        """See the harness."""
        return self.resolve_field(doc, self.config.gen_prefix)

    def _rendered(self, doc: Any, given: Any, default: Any) -> tuple[Any, Any]:
        template = default if given is None else given
        if not isinstance(template, str) or template in self.features:
            return doc, given
        return {"rendered": render(template, doc)}, "{{ rendered }}"


def load_tasks(
    names: Sequence[str], directory: Path | None, policy: Policy, roots: Roots, field: str
) -> dict[str, Task]:
    """Return the tasks that names stand for: those of a directory first, then the harness's own.

    Args:
        names: of tasks, groups or tags; a group stands for all the tasks in it.
        directory: of task files; resolved and allowed.
        policy: what the server allows.
        roots: where files may be.
        field: dotted path of the options: ``objectives.0.options``.

    Returns:
        The tasks by name, their documents loaded, in the order of ``names``.

    Raises:
        InvalidInput: no such task, or it cannot be loaded, or must not be; names ``tasks`` or ``include_path``.
    """
    files = None if directory is None else TaskFiles(directory, roots, f"{field}.include_path")
    rules = Rules(policy.task_code, roots, f"{field}.include_path")
    tasks: dict[str, Task] = {}
    for number, name in enumerate(names):
        where = f"{field}.tasks.{number}"
        for wanted in [BuiltIn(name, {})] if files is None else files.find(name):
            if isinstance(wanted, TaskFile):
                found = {str(wanted.config["task"]): _make(rules.check(wanted), where)}
            else:
                found = _built_in(wanted, files, where)
            for label, task in found.items():
                if label in tasks:
                    raise InvalidInput(f"the task {label!r} is there twice", field=where, remedy="leave one out")
                tasks[label] = _checked(task, label, policy, where)
    return tasks


def _make(config: dict[str, Any], where: str) -> Task:
    name = config["task"]
    cls = config.pop("class", SandboxedTask)
    with _loading(name, where):
        return cls(config=copy.deepcopy(config))


def _checked(task: Task, name: str, policy: Policy, where: str) -> Task:
    if getattr(task, "UNSAFE_CODE", False) and not policy.code_execution:
        raise InvalidInput(
            f"the task {name!r} runs what the model writes, which this server does not allow",
            field=where,
            remedy="use another task, or have the server's `code_execution` setting turned on",
        )
    if getattr(task, "MULTIMODAL", False):
        raise InvalidInput(f"the task {name!r} needs more than texts", field=where, remedy="use a task of texts")
    return task


# --- the harness's own -------------------------------------------------------------------------------------------------


def _built_in(wanted: BuiltIn, files: TaskFiles | None, where: str) -> dict[str, Task]:
    others = set(wanted.overrides) - {"num_fewshot", "metadata", "task_alias"}
    if others:
        raise InvalidInput(
            f"{wanted.path.name if wanted.path else wanted.name}: {sorted(others)[0]!r} cannot be changed in the harness's "
            f"own task {wanted.name!r}",
            field=where,
            remedy="copy the task's file into the directory and change it there",
        )
    manager = _manager(wanted.name)
    if manager is None:
        raise _unknown(wanted.name, files, where)
    with _loading(wanted.name, where):
        loaded: dict[str, Task] = dict(manager.load([wanted.name])["tasks"])
    if "num_fewshot" in wanted.overrides:
        for task in loaded.values():
            task.set_config("num_fewshot", wanted.overrides["num_fewshot"])
    return loaded


def _unknown(name: str, files: TaskFiles | None, where: str) -> InvalidInput:
    known = [*(files.names if files else ()), *_own_names()]
    close = get_close_matches(name, known, 5)
    hint = f"did you mean {', '.join(close)}?" if close else "see the harness's list of tasks"
    if files and files.unreadable:
        file, problem = next(iter(files.unreadable.items()))
        hint += f" ({file} could not be read: {problem})" if file not in problem else f" ({problem})"
    return InvalidInput(f"there is no task {name!r}", field=where, remedy=hint)


@lru_cache(maxsize=1)
def _own_names() -> dict[str, list[Path]]:
    """Names of the harness's tasks, groups and tags with the files that say them: quickly, by looking at the text.

    The harness itself parses its thousands of files to know what there is, which takes many times longer. Those that others
    include have any name.
    """
    found: dict[str, list[Path]] = {}
    for path in (path for path in _OWN.rglob("*") if path.suffix in ("", ".yaml", ".yml") and path.is_file()):
        text = path.read_bytes()
        said = b" ".join(_NAMED.findall(text) + _LISTED.findall(text))
        names = {word.strip(b"-") for word in _WORD.findall(said)}
        for name in names:
            found.setdefault(name.decode(), []).append(path)
    return found


def _manager(name: str) -> TaskManager | None:
    """The harness's index of as few directories as have all that a name stands for; None where it knows no such name."""
    near = sorted({_OWN / path.relative_to(_OWN).parts[0] for path in _own_names().get(name, ())})
    if near and all(path.is_dir() for path in near):
        manager = _index(tuple(near))
        if _complete(manager, name, ()):
            return manager
    if not near:
        return None
    everything = _index(())
    return everything if name in everything.task_index else None


@lru_cache(maxsize=16)
def _index(directories: tuple[Path, ...]) -> TaskManager:
    with silent():
        return TaskManager(include_defaults=not directories, include_path=list(directories))


def _complete(manager: TaskManager, name: str, trail: tuple[str, ...]) -> bool:
    entry = manager.task_index.get(name)
    if entry is None or name in trail:
        return False
    members: Iterator[Any] = iter(entry.tags if entry.kind.name == "TAG" else ())
    config = entry.cfg or {}
    if entry.kind.name == "GROUP" and isinstance(config.get("task"), list):
        members = iter(config["task"])
    return all(_complete(manager, member, (*trail, name)) if isinstance(member, str) else False for member in members)


# --- what can go wrong -------------------------------------------------------------------------------------------------


class _loading:  # noqa: N801 - reads as a statement
    """Loads a task quietly, and says which one it was if that fails."""

    def __init__(self, name: str, where: str) -> None:
        self._name, self._where = name, where
        self._silent = silent()

    def __enter__(self) -> None:
        self._silent.__enter__()
        self._bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._bars:
            datasets.enable_progress_bars()
        self._silent.__exit__(kind, error, trace)
        if isinstance(error, Exception) and not isinstance(error, InvalidInput):
            raise _failed(self._name, error, self._where) from error


def _failed(name: str, error: Exception, where: str) -> InvalidInput:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if any(cls.__name__ in _UNREACHABLE for cause in _causes(error) for cls in type(cause).__mro__):
        return InvalidInput(
            f"the data of the task {name!r} cannot be had: {said}",
            field=where,
            remedy="let the workers reach the hub, put the data into their cache, or use a task file with local data",
        )
    return InvalidInput(f"the task {name!r} cannot be loaded: {said}", field=where, remedy="correct the task")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
