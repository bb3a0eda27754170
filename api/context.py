"""What the routes work with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request

from api.settings import Settings
from api.store.ports import JobStore
from optimizer.problem import Problem
from optimizer.spec import JobSpec


@dataclass(frozen=True)
class Context:
    """What an application was made with.

    Attributes:
        store: jobs and all that belongs to them.
        settings: of this process.
        inspect: looks at a job's checkpoints and data; raises `InvalidInput` where they do not fit together.
        stopping: set when the server is about to stop.
    """

    store: JobStore
    settings: Settings
    inspect: Callable[[JobSpec], Problem]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def get_context(request: Request) -> Context:
    """Return the context of the application that got ``request``."""
    context: Context = request.app.state.context
    return context


def get_store(request: Request) -> JobStore:
    """Return the store of the application that got ``request``."""
    return get_context(request).store
