"""JSON validity: whether an answer is JSON, and what a schema asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import jsonschema
import regex
from jsonschema import Draft202012Validator
from pydantic import Field
from referencing import Registry
from referencing.exceptions import Unresolvable

from optimizer.errors import InvalidInput
from workers.graders.base import Answers, Grader, GraderInputs, grader
from workers.graders.patterns import compiled, search

_FENCED = regex.compile(r"```(?:json)?[ \t]*\n(.*?)```", regex.DOTALL | regex.IGNORECASE)
_MAX_CHARACTERS = 1_000_000


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """The keyword of that name with searches that end: the library's own would run a bad pattern for ever."""
    del schema
    if validator.is_type(instance, "string") and not search(compiled(pattern, "pattern"), instance):
        yield jsonschema.ValidationError(f"{instance[:100]!r} does not match {pattern!r}")


_extend: Any = jsonschema.validators.extend
_Validator: Any = _extend(Draft202012Validator, {"pattern": _pattern})


@grader("json")
class JsonValidity(Grader):
    """1 if the answer is one JSON value (and fits the schema), else 0. A fenced code block in it counts as the answer."""

    summary: ClassVar[str] = "Whether the answer is valid JSON, and fits a JSON schema where one is given."
    columns: ClassVar[dict[str, str]] = {"schema": "A JSON schema, as an object or as text (optional)."}

    class Options(Grader.Options):
        """Options of JSON validity."""

        schema_: dict[str, Any] | None = Field(
            default=None,
            alias="schema",
            description="JSON schema (draft 2020-12) for all items; references within itself only. Rows may have their own.",
        )
        fenced: bool = Field(default=True, description="Take what stands in a fenced code block, where there is one.")

    options: Options

    def __init__(self, options: Options, inputs: GraderInputs) -> None:
        super().__init__(options, inputs)
        rows = inputs.rows
        if options.schema_ is not None:
            self._validators = [_validator(options.schema_, f"{inputs.field}.options.schema")] * len(rows)
        elif rows.has("schema"):
            self._validators = [self._of_row(value, row) for row, value in enumerate(rows.values("schema"))]
        else:
            self._validators = [None] * len(rows)

    def grade(self, answers: Answers) -> Sequence[float]:
        """See `Grader.grade`."""
        return [float(self._valid(text, one)) for text, one in zip(answers.texts, self._validators, strict=True)]

    def _of_row(self, value: Any, row: int) -> Any:
        rows = self.inputs.rows
        try:
            return _validator(_parse(value) if isinstance(value, str) else value, "schema")
        except (ValueError, RecursionError) as error:
            raise rows.error("schema", row, f"not JSON: {error}") from error
        except InvalidInput as error:
            raise rows.error("schema", row, error.message, error.remedy) from error

    def _valid(self, text: str, validator: Any) -> bool:
        fenced = _FENCED.search(text) if self.options.fenced else None
        text = fenced[1] if fenced else text
        if len(text) > _MAX_CHARACTERS:
            return False
        try:
            value = _parse(text)
            return validator is None or bool(validator.is_valid(value))
        except (ValueError, RecursionError, Unresolvable, ArithmeticError):
            return False


def _parse(text: str) -> Any:
    return json.loads(text.strip(), parse_constant=_no_json)


def _no_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _validator(schema: Any, field: str) -> Any:
    """A validator that looks nothing up outside its schema, and whose patterns cannot hang."""
    if not isinstance(schema, Mapping | bool):
        raise InvalidInput("a JSON schema is an object", field=field)
    _check(schema, field)
    try:
        Draft202012Validator.check_schema(schema)
    except (jsonschema.SchemaError, RecursionError) as error:
        raise InvalidInput(f"no JSON schema: {getattr(error, 'message', 'nested too deeply')}", field=field) from error
    return _Validator(schema, registry=Registry())


def _check(part: Any, field: str) -> None:
    stack = [part]
    while stack:
        part = stack.pop()
        if isinstance(part, Mapping):
            if "patternProperties" in part:
                raise InvalidInput("`patternProperties` is not supported", field=field, remedy="name the properties")
            for key in ("$ref", "$dynamicRef"):
                if isinstance(part.get(key), str) and not part[key].startswith("#"):
                    raise InvalidInput(
                        f"the schema refers to {part[key][:100]!r}, which is not looked up",
                        field=field,
                        remedy="put it into the schema itself, under `$defs`",
                    )
            if isinstance(part.get("pattern"), str):
                compiled(part["pattern"], field)
            stack += part.values()
        elif isinstance(part, list):
            stack += part
