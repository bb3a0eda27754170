"""Health, readiness and version: open to all, for load balancers and people."""

from __future__ import annotations

import logging
from importlib.metadata import version

from fastapi import APIRouter

from api.routes.common import Store, open_answers
from api.views import StatusView, VersionView
from optimizer.errors import Forbidden, MergeoptError, Unavailable

router = APIRouter(tags=["service"])
log = logging.getLogger(__name__)


@router.get(
    "/health",
    summary="Is the process alive?",
    response_description="It is.",
    responses=open_answers(Forbidden, example=StatusView()),
)
async def get_health() -> StatusView:
    """Answer, without looking at anything."""
    return StatusView()


@router.get(
    "/ready",
    summary="Can the service do its work?",
    response_description="The database can be reached and is at the newest migration.",
    responses=open_answers(Forbidden, Unavailable, example=StatusView()),
)
def get_ready(store: Store) -> StatusView:
    """Look whether the database can be reached and is at the newest migration."""
    try:
        store.ping()
    except MergeoptError as error:
        raise Unavailable(error.message, field=error.field, remedy=error.remedy) from error
    except Exception as error:
        log.warning("not ready: %s", error)
        raise Unavailable("the database cannot be reached", remedy="see the service's log") from error
    return StatusView()


@router.get(
    "/version",
    summary="Which version is this?",
    response_description="The versions of the service and its API.",
    responses=open_answers(Forbidden, example=VersionView(version="0.1.0")),
)
async def get_version() -> VersionView:
    """Return the versions of the service and its API."""
    return VersionView(version=version("mergeopt"))
