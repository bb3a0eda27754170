"""The endpoint's FastAPI application: the protocol's routes, and what surrounds them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from api import middleware
from api.endpoint import examples
from api.endpoint.desk import Caller, Desk
from api.endpoint.evaluations import Evaluation
from api.routes.common import answers, open_answers
from api.settings import Settings
from optimizer.errors import (
    Conflict,
    Forbidden,
    Gone,
    InvalidInput,
    NotFound,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from optimizer.geometry import Cuts
from optimizer.problem import Grams
from workers.endpoint.protocol import (
    LONGEST_WAIT_S,
    PREFIX,
    CandidateUpload,
    CandidateView,
    EvaluationRequest,
    EvaluationView,
    RepositoryView,
    SessionView,
    SetUpload,
    SetView,
)

_DESCRIPTION = """
Models that stay with their owner: a client describes merges of them as recipes, the server merges and scores.

Read the repository, open a session, upload a query set where the owner allows it (or use one of the owner's), materialise
candidates and evaluate them. Evaluations are asked for with `POST` and, while they are under way, again with `GET`; both
wait for a while. All requests may be repeated: the same recipe, set and evaluation have the same id, are computed once and
paid for once. Every error has the same shape (`ErrorView`); `too_many_requests` says in `Retry-After` when to come again.
"""
_TAGS = [
    {"name": "repository", "description": "What the owner offers."},
    {"name": "sessions", "description": "Query sets and candidates of one client, kept for a while."},
    {"name": "evaluations", "description": "Candidates, scored."},
    {"name": "service", "description": "Health."},
]
_REMEDY = "ask the owner for a token, and send it as `Authorization: Bearer TOKEN`"

bearer = HTTPBearer(
    auto_error=False, description="A token that the owner made with `mergeopt token create --endpoint`."
)
router = APIRouter(prefix=PREFIX)
SessionId = Annotated[
    str, Path(description="The session's id.", pattern=r"^[\w-]{1,64}$", examples=["pX3c9a52e1b04d68fQ0uZ1yT2vR7wK4b"])
]
EvaluationId = Annotated[str, Path(description="The evaluation's id.", pattern=r"^[0-9a-f]{64}$", examples=["4f" * 32])]
Wait = Annotated[
    float, Query(ge=0, le=LONGEST_WAIT_S, description="Seconds to wait for the evaluation to be over, if it is not.")
]


@dataclass(frozen=True)
class EndpointContext:
    """What the application works with.

    Attributes:
        desk: serves clients.
        stopping: set when the server is about to stop.
    """

    desk: Desk
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def create_endpoint_app(desk: Desk | None, settings: Settings) -> FastAPI:
    """Make the application.

    Args:
        desk: serves clients; None where only the OpenAPI document is wanted.
        settings: of this process: where it listens, and the hosts it answers for.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if desk is not None:
            await run_in_threadpool(desk.close)

    app = FastAPI(
        title="mergeopt endpoint",
        version=version("mergeopt"),
        summary="Merges and scores models that stay with their owner.",
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
    )
    app.include_router(router)
    if desk is not None:
        app.state.context = EndpointContext(desk)
        settings = settings.model_copy(update={"max_body_bytes": desk.limits.body_bytes})
    middleware.install(app, settings, remedy="send fewer or shorter items; the owner sets the limit")
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _context(request: Request) -> EndpointContext:
    context: EndpointContext = request.app.state.context
    return context


def _desk(request: Request) -> Desk:
    return _context(request).desk


def _authenticate(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]
) -> Caller:
    """Return who asks, whose request is counted; raises `Unauthorized`, `TooManyRequests`."""
    desk = _desk(request)
    token = None if credentials is None else desk.store.check_token(credentials.credentials)
    if token is None:
        wrong = "authorization" in request.headers
        raise Unauthorized("the token is wrong or has expired" if wrong else "a token is needed", remedy=_REMEDY)
    desk.rate.take(token.id)
    return Caller(token.id, token.name)


Served = Annotated[Desk, Depends(_desk)]
Asking = Annotated[Caller, Depends(_authenticate)]


@router.get(
    "/repository",
    tags=["repository"],
    summary="What the owner offers",
    response_description="Models, layout, operators, sets, rules and limits.",
    responses=answers(TooManyRequests, Unavailable, example=examples.REPOSITORY),
)
def get_repository(desk: Served, caller: Asking) -> RepositoryView:
    """Return the models by name, what may vary, the operators, the owner's sets, the rules, and what the token may do."""
    return desk.describe(caller)


@router.get(
    "/repository/grams",
    tags=["repository"],
    summary="Inner products of the models",
    response_description="Inner products of the models' weights over ranges of the flat vector of all parameters.",
    responses=answers(InvalidInput, TooManyRequests, Unavailable, example=examples.GRAMS),
)
def get_grams(
    desk: Served,
    caller: Asking,
    cuts: Annotated[Cuts, Query(description="Where ranges end.")] = "layers",
) -> Grams:
    """Return the inner products that searches take angles from, where the owner gives them out."""
    return desk.grams(caller, cuts)


@router.post(
    "/sessions",
    status_code=201,
    tags=["sessions"],
    summary="Open a session",
    response_description="The session.",
    responses=answers(TooLarge, TooManyRequests, Unavailable, example=examples.SESSION, status=201),
)
def open_session(desk: Served, caller: Asking) -> SessionView:
    """Open a session. One that was unused for longest makes room where the token has too many."""
    return desk.open_session(caller)


@router.get(
    "/sessions/{session}",
    tags=["sessions"],
    summary="Show a session",
    response_description="The session.",
    responses=answers(Gone, InvalidInput, NotFound, TooManyRequests, Unavailable, example=examples.SESSION),
)
def get_session(desk: Served, caller: Asking, session: SessionId) -> SessionView:
    """Return a session, which counts as using it."""
    return desk.session(caller, session)


@router.delete(
    "/sessions/{session}",
    status_code=204,
    tags=["sessions"],
    summary="Close a session",
    response_description="It is closed.",
    responses=answers(Gone, InvalidInput, NotFound, TooManyRequests, Unavailable),
)
def close_session(desk: Served, caller: Asking, session: SessionId) -> None:
    """Close a session and call off what is under way in it."""
    desk.close_session(caller, session)


@router.post(
    "/sessions/{session}/sets",
    status_code=201,
    tags=["sessions"],
    summary="Upload a query set",
    response_description="The set, called by its digest.",
    responses=answers(
        Gone, InvalidInput, NotFound, TooLarge, TooManyRequests, Unavailable, example=examples.SET, status=201
    ),
)
def upload_set(desk: Served, caller: Asking, session: SessionId, upload: SetUpload) -> SetView:
    """Upload labelled items. They are kept in memory, for the session; the same items always have the same digest."""
    return desk.upload(caller, session, upload)


@router.post(
    "/sessions/{session}/candidates",
    status_code=201,
    tags=["evaluations"],
    summary="Materialise a candidate",
    response_description="Its fingerprint, by which evaluations name it.",
    responses=answers(
        Conflict,
        Gone,
        InvalidInput,
        NotFound,
        TooLarge,
        TooManyRequests,
        Unavailable,
        example=examples.CANDIDATE,
        status=201,
    ),
)
def materialise(desk: Served, caller: Asking, session: SessionId, upload: CandidateUpload) -> CandidateView:
    """Check a recipe over the repository's models and keep it; it is merged when it is evaluated."""
    return desk.materialise(caller, session, upload)


@router.post(
    "/sessions/{session}/evaluations",
    tags=["evaluations"],
    summary="Evaluate a candidate",
    response_description="The scores.",
    responses=answers(Gone, InvalidInput, NotFound, TooLarge, TooManyRequests, Unavailable, example=examples.EVALUATION)
    | {202: {"model": EvaluationView, "description": "It is under way: ask for it by its id."}},
)
async def evaluate(
    request: Request,
    response: Response,
    desk: Served,
    caller: Asking,
    session: SessionId,
    wanted: EvaluationRequest,
    wait_s: Wait = 0.0,
) -> EvaluationView:
    """Evaluate a candidate on sets, or on some of their items. What was computed before is answered at once."""
    found = await run_in_threadpool(desk.evaluate, caller, session, wanted)
    return await _answer(request, response, found, wait_s)


@router.get(
    "/sessions/{session}/evaluations/{evaluation}",
    tags=["evaluations"],
    summary="Show an evaluation",
    response_description="The scores.",
    responses=answers(Gone, InvalidInput, NotFound, TooManyRequests, Unavailable, example=examples.EVALUATION)
    | {202: {"model": EvaluationView, "description": "It is still under way."}},
)
async def get_evaluation(
    request: Request,
    response: Response,
    desk: Served,
    caller: Asking,
    session: SessionId,
    evaluation: EvaluationId,
    wait_s: Wait = 0.0,
) -> EvaluationView:
    """Return an evaluation, as soon as it is over or `wait_s` seconds have passed."""
    found = await run_in_threadpool(desk.evaluation, caller, session, evaluation)
    return await _answer(request, response, found, wait_s)


@router.delete(
    "/sessions/{session}/evaluations/{evaluation}",
    status_code=204,
    tags=["evaluations"],
    summary="Call an evaluation off",
    response_description="It is called off.",
    responses=answers(Gone, InvalidInput, NotFound, TooManyRequests, Unavailable),
)
def cancel_evaluation(desk: Served, caller: Asking, session: SessionId, evaluation: EvaluationId) -> None:
    """Call an evaluation off. What others wait for as well goes on."""
    desk.cancel(caller, session, evaluation)


@router.get(
    "/health",
    tags=["service"],
    summary="Is the process alive?",
    response_description="It is.",
    responses=open_answers(Forbidden, example={"status": "ok"}),
)
def get_health() -> dict[str, str]:
    """Answer, without a token."""
    return {"status": "ok"}


async def _answer(request: Request, response: Response, found: Evaluation, wait_s: float) -> EvaluationView:
    context = _context(request)
    if wait_s and not found.over:
        await _wait(found.futures, context.stopping, wait_s)
    view = context.desk.view(found)
    if not view.over:
        response.status_code = 202
        response.headers["Location"] = f"{PREFIX}/sessions/{request.path_params['session']}/evaluations/{found.id}"
    return view


async def _wait(futures: list[Future[Any]], stopping: asyncio.Event, wait_s: float) -> None:
    """Wait until all are done, the server stops, or the time is over."""
    done = asyncio.gather(*(asyncio.shield(asyncio.wrap_future(future)) for future in futures))
    done.add_done_callback(_seen)
    stop = asyncio.ensure_future(stopping.wait())
    either: set[asyncio.Future[Any]] = {done, stop}
    try:
        await asyncio.wait(either, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
        done.cancel()


def _seen(future: asyncio.Future[Any]) -> None:
    """Take note of how a wait ended: asyncio reports what nobody looks at."""
    if not future.cancelled():
        future.exception()
