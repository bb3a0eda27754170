"""Every error mergeopt raises on purpose, in one tree.

::

    MergeoptError
    ├── UserError                 the caller can put it right; nothing was changed
    │   ├── InvalidInput          a field of a spec, file or request is wrong         (422)
    │   │   ├── InvalidCheckpoint   a model directory cannot be used
    │   │   ├── InvalidData         a data file or its rows cannot be used
    │   │   ├── PathNotAllowed      a path leads outside the configured roots
    │   │   └── NotOffered          the owner of the models does not allow it
    │   ├── NotFound              no such job, candidate, token, …                    (404)
    │   ├── Conflict              the present state does not allow it                 (409)
    │   ├── Unauthorized          no token, or a wrong one                            (401)
    │   ├── Forbidden             the request's host or origin is refused              (403)
    │   │   └── QuotaExhausted      all that a token may spend is spent                 (403)
    │   ├── Gone                  it has expired                                      (410)
    │   ├── TooLarge              the body exceeds the limit                          (413)
    │   └── TooManyRequests       sooner than the rate limit allows                   (429)
    ├── Unavailable               the service or its database cannot be reached now       (503)
    ├── RetryableError            the same evaluation may succeed elsewhere or later
    │   ├── WorkerLost              a worker or its node died
    │   ├── EvaluationTimeout       an evaluation took longer than allowed
    │   └── ServiceUnavailable      a service that an evaluation asks does not answer now
    ├── InfeasibleCandidate       this candidate has no score; the search goes on
    ├── JobError                  the job cannot go on and fails with this reason
    │   └── InputsChanged           a checkpoint is no longer the one the job began with
    ├── JobPaused                 the job pauses with this reason, until somebody resumes it
    └── LeaseLost                 another controller holds the job now; drop everything

The class decides what happens (retry, mark infeasible, fail the job, answer with a status); the text only explains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from pydantic import ValidationError

_NAMED = re.compile(r"([a-z_]+(?:\.\w+)*): (.+)", re.DOTALL)


class MergeoptError(Exception):
    """Base of the tree.

    Attributes:
        message: what is wrong, in one sentence.
        field: dotted path of the field at fault (``objectives.0.metric``), or None.
        remedy: what the caller can do about it, or None.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.remedy = remedy

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders in Ray; keyword-only arguments need help to survive that.
        return (_rebuild, (type(self), self.message, self.field, self.remedy), self.__dict__)

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.message}" + (f" ({self.remedy})" if self.remedy else "")


def _rebuild(cls: type[MergeoptError], message: str, field: str | None, remedy: str | None) -> MergeoptError:
    return cls(message, field=field, remedy=remedy)


class UserError(MergeoptError):
    """The caller can put it right; nothing was changed."""

    code = "user_error"
    status = 400


class InvalidInput(UserError):
    """A field of a spec, file or request is wrong."""

    code = "invalid_input"
    status = 422


class InvalidCheckpoint(InvalidInput):
    """A model directory cannot be used: missing, truncated, a pickle, or of another architecture."""

    code = "invalid_checkpoint"


class InvalidData(InvalidInput):
    """A data file or its rows cannot be used."""

    code = "invalid_data"


class PathNotAllowed(InvalidInput):
    """A path leads outside the configured roots, directly, by ``..`` or through a link."""

    code = "path_not_allowed"


class NotOffered(InvalidInput):
    """The owner of the models does not allow it: an operator, a layer plan, a model by itself, a set that is too small."""

    code = "not_offered"


class NotFound(UserError):
    """No such thing."""

    code = "not_found"
    status = 404


class Conflict(UserError):
    """The present state does not allow it."""

    code = "conflict"
    status = 409


class Unauthorized(UserError):
    """No token, or a wrong one."""

    code = "unauthorized"
    status = 401


class Forbidden(UserError):
    """The request's host or origin is refused."""

    code = "forbidden"
    status = 403


class QuotaExhausted(Forbidden):
    """All that a token may spend is spent."""

    code = "quota_exhausted"


class Gone(UserError):
    """It has expired, or the server that had it was started anew."""

    code = "gone"
    status = 410


class TooLarge(UserError):
    """The body exceeds the limit."""

    code = "too_large"
    status = 413


class TooManyRequests(UserError):
    """Sooner than the rate limit allows.

    Attributes:
        retry_after_s: seconds after which the same request may succeed.
    """

    code = "too_many_requests"
    status = 429
    retry_after_s: float = 1.0


class Unavailable(MergeoptError):
    """The service or its database cannot be reached now."""

    code = "unavailable"
    status = 503


class RetryableError(MergeoptError):
    """The same evaluation may succeed elsewhere or later."""

    code = "retryable"


class WorkerLost(RetryableError):
    """A worker or its node died during an evaluation."""

    code = "worker_lost"


class EvaluationTimeout(RetryableError):
    """An evaluation took longer than allowed."""

    code = "evaluation_timeout"


class ServiceUnavailable(RetryableError):
    """A service that an evaluation asks does not answer now.

    Attributes:
        retry_after_s: seconds that it asked to wait, or None.
    """

    code = "service_unavailable"
    retry_after_s: float | None = None


class InfeasibleCandidate(MergeoptError):
    """This candidate has no score; it ranks behind every candidate that has one."""

    code = "infeasible"


class JobError(MergeoptError):
    """The job cannot go on and fails with this reason."""

    code = "job_failed"


class InputsChanged(JobError):
    """A checkpoint or data file is no longer the one the job began with."""

    code = "inputs_changed"


class JobPaused(MergeoptError):
    """The job cannot go on until somebody does something: it pauses with this reason, and nothing is lost."""

    code = "job_paused"


class LeaseLost(MergeoptError):
    """Another controller holds the job now; this one must drop everything it has."""

    code = "lease_lost"


def from_validation(error: ValidationError, prefix: str = "") -> InvalidInput:
    """Turn pydantic's error into ours: the first problem as the message, all of them in ``problems``.

    Args:
        error: what pydantic raised.
        prefix: dotted path of the validated part within the whole, without a trailing dot.
    """
    problems = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        message = item["msg"].removeprefix("Value error, ")
        loc = item["loc"]
        if not loc and (named := _NAMED.match(message)):  # a check across fields says itself which one is wrong
            loc, message = (named[1],), named[2]
        path = ".".join(str(part) for part in ((prefix,) if prefix else ()) + loc)
        problems.append((path or None, message))
    field, message = problems[0]
    out = InvalidProblems(message, field=field, remedy="see the job schema at /api/v1/schema/job")
    out.problems = problems
    return out


@contextmanager
def below(field: str) -> Iterator[None]:
    """Let an `InvalidInput` of the block name its field below the dotted path ``field``."""
    try:
        yield
    except InvalidInput as error:
        path = f"{field}.{error.field}" if error.field else field
        raise InvalidInput(error.message, field=path, remedy=error.remedy) from error


class InvalidProblems(InvalidInput):
    """Several fields are wrong at once; ``problems`` has them all as (dotted field, message)."""

    problems: list[tuple[str | None, str]]

    def __init__(self, message: str, *, field: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message, field=field, remedy=remedy)
        self.problems = [(field, message)]
