"""The FastAPI application: routes, what surrounds them, and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute

from api import middleware
from api.auth import authenticate
from api.context import Context
from api.routes import candidates, catalog, events, exports, health, jobs, ui
from api.settings import Settings
from api.store.ports import JobStore
from optimizer.problem import Problem
from optimizer.spec import JobSpec

PREFIX = "/api/v1"

_DESCRIPTION = """
Searches for the best way to merge fine-tuned models. Submit a job, follow its events, read its Pareto front, export a
candidate as a checkpoint.

Every error has the same shape (`ErrorView`): `code` for programs, `message`, `field` and `remedy` for people. Lists are
paged by an opaque `cursor`. Bodies may be JSON or YAML.
"""
_TAGS = [
    {"name": "jobs", "description": "Searches: submit, list, steer, delete."},
    {"name": "candidates", "description": "What a search proposed, how it scored, and the front."},
    {"name": "events", "description": "What happens, as server-sent events."},
    {"name": "exports", "description": "Candidates written as checkpoints."},
    {"name": "catalog", "description": "Algorithms, operators and evaluators that jobs may name, with their options."},
    {"name": "service", "description": "Health, readiness, version."},
]


def create_app(store: JobStore, settings: Settings, inspect: Callable[[JobSpec], Problem]) -> FastAPI:
    """Make the application.

    Args:
        store: where jobs are kept.
        settings: of this process; ``host`` decides from where requests need no token.
        inspect: looks at a job's checkpoints and data before the job is recorded; called in a thread.
    """
    app = FastAPI(
        title="mergeopt",
        version=version("mergeopt"),
        summary="Finds the best way to merge fine-tuned models.",
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        openapi_url=f"{PREFIX}/openapi.json",
        # The pages that FastAPI brings load their scripts from a CDN.
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
    )
    app.state.context = Context(store, settings, inspect)
    guarded = APIRouter(prefix=PREFIX, dependencies=[Depends(authenticate)])
    for module in (jobs, candidates, events, exports, catalog):
        guarded.include_router(module.router)
    app.include_router(guarded)
    app.include_router(health.router, prefix=PREFIX)
    ui.mount(app)
    middleware.install(app, settings)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def route_table(app: FastAPI) -> list[tuple[str, str, str]]:
    """Return (method, path, summary) of every documented route, in the document's order."""
    return [
        (method.upper(), path, operation["summary"])
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]
