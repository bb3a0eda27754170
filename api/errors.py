"""From exceptions to the one JSON error shape, and back: what the server answers is what the client raises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from api.views import ErrorBody, ErrorView
from optimizer.errors import InvalidInput, InvalidProblems, MergeoptError, Unavailable, UserError


def error_view(error: MergeoptError) -> ErrorView:
    """Return the JSON error of an exception."""
    problems = error.problems if isinstance(error, InvalidProblems) else []
    return ErrorView(
        error=ErrorBody(
            code=error.code,
            message=error.message,
            field=error.field,
            remedy=error.remedy,
            problems=[{"field": field, "message": message} for field, message in problems],
        )
    )


def rebuild(body: ErrorBody, status: int) -> MergeoptError:
    """Return the exception that a JSON error stands for; an unknown code becomes the class that fits the status."""
    cls = _classes().get(body.code) or _by_status(status)
    error = cls(body.message, field=body.field, remedy=body.remedy)
    if cls is InvalidInput and body.problems:
        error = InvalidProblems(body.message, field=body.field, remedy=body.remedy)
        error.problems = [(problem.get("field"), problem.get("message") or "") for problem in body.problems]
    return error


def invalid_request(errors: Iterable[Mapping[str, Any]], remedy: str) -> InvalidProblems:
    """Return all that a validation found wrong with a request.

    Args:
        errors: pydantic's, each with a ``loc`` whose first part says where in the request (body, query, …) it is.
        remedy: what the caller can do.
    """
    problems: list[tuple[str | None, str]] = []
    for item in errors:
        where = item["loc"][1:] or item["loc"]
        problems.append((".".join(str(part) for part in where), str(item["msg"]).removeprefix("Value error, ")))
    field, message = problems[0]
    error = InvalidProblems(message, field=field, remedy=remedy)
    error.problems = problems
    return error


def _classes() -> dict[str, type[MergeoptError]]:
    """Map each code to the class that introduced it (a subclass without a code of its own shares its parent's)."""
    out: dict[str, type[MergeoptError]] = {}
    for cls in _tree(MergeoptError):
        out.setdefault(cls.code, cls)
    return out


def _tree(cls: type[MergeoptError]) -> Iterator[type[MergeoptError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


def _by_status(status: int) -> type[MergeoptError]:
    for cls in _tree(UserError):
        if cls.status == status:
            return cls
    if status < 500:
        return UserError
    return Unavailable if status in (502, 503, 504) else MergeoptError
