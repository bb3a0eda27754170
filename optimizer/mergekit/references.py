"""Which models a configuration names, what their tokenizer is to be, and what of the file has no effect here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal

from optimizer.errors import InvalidInput
from optimizer.mergekit.format import Configuration, Reference, Settings
from optimizer.mergekit.methods import METHODS
from optimizer.spec import ModelRef

_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


def base_reference(configuration: Configuration) -> Reference:
    """Return the model that takes the base's place: the file's base, else what its adapters stand on, else the first."""
    if configuration.base_model is not None:
        return configuration.base_model
    first = configuration.references[0]
    return Reference(model=first.model) if first.lora is not None else first


def model_names(configuration: Configuration) -> dict[Reference, str]:
    """Return a short name for each model: ``base``, and the last part of the others' paths, each name once.

    Raises:
        InvalidInput: an adapter stands on another model than the base.
    """
    base = base_reference(configuration)
    out = {base: "base"}
    for reference in configuration.references:
        if reference in out:
            continue
        if reference.lora is not None and reference.model != base.model:
            raise InvalidInput(
                f"the adapter {reference.lora!r} stands on {reference.model!r}, which is not the base {base.model!r}",
                field="mergekit.models",
                remedy="apply the adapter to its own base first, and name the result",
            )
        text = reference.lora or reference.model
        plain = _NAME.sub("-", text.split("@")[0].rstrip("/").rsplit("/", 1)[-1]).strip("-._")[:50] or "model"
        name, count = plain, 1
        while name in out.values():
            count += 1
            name = f"{plain}-{count}"
        out[reference] = name
    return out


def model_ref(reference: Reference, exists: Callable[[str], bool]) -> ModelRef:
    """Return where a model is: a path if there is one, else a hub id. An adapter's own place, where it has one.

    Args:
        reference: from the file.
        exists: whether a path leads to something.
    """
    text = reference.lora or reference.model
    place, _, revision = text.partition("@")
    if not exists(text) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", place):
        return ModelRef(hub=place, revision=revision or "main")
    return ModelRef(path=text)


def vocabulary_rule(configuration: Configuration) -> Literal["refuse", "base", "union"]:
    """Return ``merge.vocabulary`` for the file's tokenizer.

    Raises:
        InvalidInput: it asks for what has no counterpart here.
    """
    wanted = configuration.tokenizer_source
    if configuration.tokenizer is not None:
        wanted = configuration.tokenizer.source
        if configuration.tokenizer.tokens or configuration.tokenizer.pad_to_multiple_of:
            raise InvalidInput(
                "settings of single tokens and padding are not supported",
                field="mergekit.tokenizer",
                remedy="leave out `tokens` and `pad_to_multiple_of`",
            )
    if wanted == "union":
        return "union"
    if wanted is None:
        return "refuse"
    if wanted == "base" or wanted == base_reference(configuration):
        return "base"
    raise InvalidInput(
        f"the vocabulary of {wanted} can be taken only if it is the base",
        field="mergekit.tokenizer_source",
        remedy="use `base` or `union`; the files of another model's tokenizer can be chosen on export",
    )


def notes_on(configuration: Configuration) -> list[str]:
    """Return what of the file has no effect here."""
    notes = []
    method = METHODS[configuration.merge_method]
    if method.random:
        notes.append(f"{configuration.merge_method} draws random masks: they are others than mergekit's")
    for name in ("dtype", "out_dtype"):
        if getattr(configuration, name) is not None:
            notes.append(f"{name} is ignored: sums are taken in float32 at least, and the result has the base's type")
    if configuration.chat_template is not None:
        notes.append("chat_template is ignored: the export has the template of the model chosen for its tokenizer")
    for settings in _all_settings(configuration):
        for name in settings:
            if name not in method.parameters or method.parameters[name].role == "ignored":
                notes.append(f"parameters.{name} has no effect on {configuration.merge_method}")
    return list(dict.fromkeys(notes))


def _all_settings(configuration: Configuration) -> Iterator[Settings]:
    yield configuration.parameters
    module = configuration.module
    yield module.parameters
    for entry in module.models or []:
        yield entry.parameters
    for part in module.slices or []:
        yield part.parameters
        for source in part.sources:
            yield source.parameters
