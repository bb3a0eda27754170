"""What several routes share: dependencies, parameters, documented errors, examples."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Path, Query
from fastapi.encoders import jsonable_encoder

from api.context import Context, get_context, get_store
from api.errors import error_view
from api.store.ports import JobStore
from api.views import ErrorBody, ErrorView
from optimizer.errors import (
    Conflict,
    Forbidden,
    Gone,
    InvalidInput,
    MergeoptError,
    NotFound,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)

Store = Annotated[JobStore, Depends(get_store)]
Deps = Annotated[Context, Depends(get_context)]

JobId = Annotated[str, Path(description="The job's id.", pattern=r"^[\w-]{1,64}$", examples=["7f3c9a52e1b04d68"])]
ExportId = Annotated[str, Path(description="The export's id.", pattern=r"^[\w-]{1,64}$", examples=["b81f6d0e2c9a4375"])]
Index = Annotated[int, Path(description="The candidate's number in the job.", ge=0, lt=2**31, examples=[17])]
Cursor = Annotated[
    str | None,
    Query(description="`next_cursor` of the page before.", max_length=500, pattern=r"^[\w=+/.:,-]*$"),
]
Limit = Annotated[int, Query(description="Most items on a page.", ge=1, le=1000)]

_EXAMPLES: dict[type[MergeoptError], MergeoptError] = {
    InvalidInput: InvalidInput(
        "`low` must be below `high`, not 1.0 and 0.0: swap them?", field="merge.bounds", remedy="see the job schema"
    ),
    NotFound: NotFound("there is no job '7f3c9a52e1b04d68'", field="job_id"),
    Conflict: Conflict("the job has ended", remedy="clone it to go on"),
    Unauthorized: Unauthorized("a token is needed", remedy="make a token with `mergeopt token create NAME`"),
    Forbidden: Forbidden("requests from other sites are refused", field="Origin"),
    Gone: Gone("the session has ended, or there never was one", field="session", remedy="open another one"),
    TooManyRequests: TooManyRequests("more than 600 requests a minute", remedy="wait as long as Retry-After says"),
    TooLarge: TooLarge("the body is larger than 1048576 bytes", field="body"),
    Unavailable: Unavailable("the database cannot be reached", remedy="see the service's log"),
}
_INTERNAL = ErrorView(error=ErrorBody(code="internal", message="something went wrong in the service"))


def answers(*errors: type[MergeoptError], example: object = None, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """Return the documented answers of a route that may need a token: every error, and an example of success.

    Args:
        errors: beside those that every such route may give.
        example: a view, or a list of them.
        status: of the success.
    """
    return open_answers(Unauthorized, Forbidden, *errors, example=example, status=status)


def open_answers(
    *errors: type[MergeoptError], example: object = None, status: int = 200
) -> dict[int | str, dict[str, Any]]:
    """Return the documented answers of a route that never needs a token."""
    out: dict[int | str, dict[str, Any]] = {
        error.status: _documented((error.__doc__ or "").splitlines()[0], error_view(_EXAMPLES[error]))
        for error in errors
    }
    out[500] = _documented("Something went wrong in the service; its log has the details.", _INTERNAL)
    if example is not None:
        out[status] = {"content": {"application/json": {"example": jsonable_encoder(example)}}}
    return out


def _documented(description: str, view: ErrorView) -> dict[str, Any]:
    return {
        "model": ErrorView,
        "description": description,
        "content": {"application/json": {"example": view.model_dump()}},
    }
