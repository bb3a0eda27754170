"""Task files of lm-evaluation-harness in a directory of the user's, read as data: nothing in them runs.

The harness's own loader imports every function that a file names. Here such a name is only noted; `workers.harness.rules`
then refuses it, or resolves it where the server's policy says so. Tasks, groups, tags, includes and the overrides of a
group's members mean what they mean to the harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from optimizer.errors import InvalidInput, PathNotAllowed
from workers.roots import Roots

MOST_BYTES = 2**18
MOST_FILES = 2000
MOST_NODES = 20_000
DEEPEST = 32
MOST_BRACKETS = 200
GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
"""What in a group's file concerns the group; all else is an override of its members."""


@dataclass(frozen=True)
class Code:
    """Code that a file names: ``!function utils.process_docs``.

    Attributes:
        tag: as written, with its exclamation mark.
        name: dotted name of the function or class.
        directory: of the file, where ``utils.py`` may be.
    """

    tag: str
    name: str
    directory: Path


@dataclass(frozen=True)
class TaskFile:
    """A task of the directory, its includes and overrides applied, not yet checked.

    Attributes:
        config: as the file has it; functions are `Code`.
        path: the file.
    """

    config: Mapping[str, Any]
    path: Path


@dataclass(frozen=True)
class BuiltIn:
    """A task or group that the directory does not have, so that it must be one of the harness's own.

    Attributes:
        name: of the task, group or tag.
        overrides: what the group that names it changes.
        path: file of that group; None where the job names it.
    """

    name: str
    overrides: Mapping[str, Any]
    path: Path | None = None


class TaskFiles:
    """The task files below a directory.

    Args:
        directory: resolved and allowed.
        roots: where files that they include may be.
        field: dotted path of the option that names the directory.

    Attributes:
        names: of its tasks, groups and tags.
        unreadable: by file, what is wrong with those that could not be read.

    Raises:
        InvalidInput: no directory, or more files than anybody has.
    """

    def __init__(self, directory: Path, roots: Roots, field: str) -> None:
        if not directory.is_dir():
            raise InvalidInput(
                f"{directory.name!r} is no directory", field=field, remedy="name the directory of the task files"
            )
        self.unreadable: dict[str, str] = {}
        self._roots = roots
        self._field = field
        self._entries: dict[str, TaskFile] = {}
        self._tags: dict[str, list[str]] = {}
        files = sorted(path for path in directory.rglob("*.yaml") if path.is_file())
        if len(files) > MOST_FILES:
            raise InvalidInput(
                f"{directory.name!r} has more than {MOST_FILES} task files",
                field=field,
                remedy="name a smaller directory",
            )
        for path in files:
            self._add(path)

    @property
    def names(self) -> list[str]:
        """See the class."""
        return sorted({*self._entries, *self._tags})

    def find(self, name: str) -> Iterator[TaskFile | BuiltIn]:
        """Yield the tasks that a name stands for: one, or a group's or a tag's.

        Raises:
            InvalidInput: a group has no members, or is its own.
        """
        return self._expand(name, {}, ())

    def _expand(self, name: str, overrides: Mapping[str, Any], trail: tuple[str, ...]) -> Iterator[TaskFile | BuiltIn]:
        if name in trail or len(trail) > DEEPEST:
            raise self._error(f"the group {name!r} is a member of itself")
        if name in self._tags:
            for task in self._tags[name]:
                yield from self._expand(task, overrides, (*trail, name))
        elif name not in self._entries:
            yield BuiltIn(
                name, overrides, self._entries[trail[-1]].path if trail and trail[-1] in self._entries else None
            )
        elif "group" in self._entries[name].config:
            entry = self._entries[name]
            yield from self._members(entry.config, overrides, entry.path, (*trail, name))
        else:
            entry = self._entries[name]
            yield TaskFile({**entry.config, **overrides, "task": name}, entry.path)

    def _members(
        self, group: Mapping[str, Any], overrides: Mapping[str, Any], path: Path, trail: tuple[str, ...]
    ) -> Iterator[TaskFile | BuiltIn]:
        inherited = {**{key: value for key, value in group.items() if key not in GROUP_KEYS}, **overrides}
        members = group.get("task")
        members = [members] if isinstance(members, str) else members
        if not isinstance(members, list) or not members:
            raise self._error(f"{path.name}: the group {trail[-1]!r} has no list of tasks")
        for member in members:
            if isinstance(member, str):
                yield from self._expand(member, inherited, trail)
            elif isinstance(member, dict) and isinstance(member.get("group"), str):
                yield from self._subgroup(member, inherited, path, trail)
            elif isinstance(member, dict) and isinstance(member.get("task"), str):
                yield from self._member(member, inherited, path, trail)
            else:
                raise self._error(f"{path.name}: a member of {trail[-1]!r} names neither a task nor a group")

    def _subgroup(
        self, member: Mapping[str, Any], inherited: Mapping[str, Any], path: Path, trail: tuple[str, ...]
    ) -> Iterator[TaskFile | BuiltIn]:
        name = member["group"]
        if name in self._entries:
            changes = {key: value for key, value in member.items() if key not in GROUP_KEYS}
            yield from self._expand(name, {**inherited, **changes}, trail)
        else:
            yield from self._members(member, inherited, path, (*trail, name))

    def _member(
        self, member: Mapping[str, Any], inherited: Mapping[str, Any], path: Path, trail: tuple[str, ...]
    ) -> Iterator[TaskFile | BuiltIn]:
        name = member["task"]
        changes = {**inherited, **{key: value for key, value in member.items() if key != "task"}}
        if name not in self._entries and "dataset_path" in member:  # a task that only this group has
            yield TaskFile({**changes, "task": f"{trail[-1]}::{name}"}, path)
        else:
            yield from self._expand(name, changes, trail)

    def _add(self, path: Path) -> None:
        try:
            config = read_yaml(path, self._roots, self._field)
        except InvalidInput as error:
            self.unreadable[path.name] = error.message
            return
        name = config.get("group", config.get("task"))
        if not isinstance(name, str):
            return  # a part that others include
        if name in self._entries:
            raise self._error(f"two files define {name!r}: {self._entries[name].path.name} and {path.name}")
        self._entries[name] = TaskFile(config, path)
        tags = config.get("tag") or []
        for tag in [tags] if isinstance(tags, str) else tags:
            self._tags.setdefault(str(tag), []).append(name)

    def _error(self, message: str) -> InvalidInput:
        return InvalidInput(message, field=self._field, remedy="change the task files")


def read_yaml(path: Path, roots: Roots, field: str, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return what a task file says, what it includes merged in; functions are `Code`.

    Raises:
        InvalidInput: it is malformed, too large, or includes itself.
        PathNotAllowed: it, or what it includes, is outside the roots.
    """
    where = path.name
    if path in seen:
        raise InvalidInput(f"{where} includes itself", field=field, remedy="change the task files")
    real = roots.path(str(path), field)
    try:
        if real.stat().st_size > MOST_BYTES:
            raise InvalidInput(f"{where} is larger than {MOST_BYTES} bytes", field=field)
        text = real.read_text(encoding="utf-8")
        _check_brackets(text)
        config = yaml.load(text, Loader=_loader(real.parent))  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidInput(
            f"{where} cannot be read: {_first(error)}", field=field, remedy="correct the file"
        ) from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise InvalidInput(f"{where} holds no mapping from names to values", field=field, remedy="correct the file")
    _check_size(config, where, field)
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        if not isinstance(name, str):
            raise InvalidInput(f"{where}: `include` must name files", field=field, remedy="correct the file")
        try:
            other = read_yaml(real.parent / name, roots, field, (*seen, path))
        except PathNotAllowed as error:
            raise PathNotAllowed(
                f"{where} includes {name!r}, which is outside the server's directories", field=field
            ) from error
        merged |= {key: value for key, value in other.items() if key != "task_list"}
    return merged | config


def _loader(directory: Path) -> type[yaml.SafeLoader]:
    """Return a loader of plain data to which every tag of the file's own is only a name."""

    class Loader(yaml.SafeLoader):
        pass

    def note(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Code:
        name = str(loader.construct_scalar(node)) if isinstance(node, yaml.ScalarNode) else ""
        return Code(f"!{suffix}", name, directory)

    Loader.add_multi_constructor("!", note)
    return Loader


def _check_brackets(text: str) -> None:
    """Raise ValueError for brackets in brackets without end, on which the parser would spend hours."""
    open_ones = accumulate((character in "[{") - (character in "]}") for character in text)
    if max(open_ones, default=0) > MOST_BRACKETS:
        raise ValueError(f"more than {MOST_BRACKETS} brackets are open")


def _check_size(config: dict[str, Any], where: str, field: str) -> None:
    """Refuse what is small in a file and endless as data: anchors that are used again and again, or within themselves."""
    waiting: list[tuple[Any, int]] = [(config, 0)]
    nodes = 0
    while waiting:
        value, depth = waiting.pop()
        nodes += 1
        if nodes > MOST_NODES or depth > DEEPEST:
            raise InvalidInput(f"{where} holds too much", field=field, remedy="keep documents in a data file")
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += [(part, depth + 1) for part in value]


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
