"""The uvicorn server, set up so that event streams end when it shuts down."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from api.settings import Settings

GRACE_S = 10


class Server(uvicorn.Server):
    """A uvicorn server that tells the application first that it is about to stop."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the event streams, then wait for the open requests."""
        self.config.app.state.context.stopping.set()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def make_server(app: FastAPI, settings: Settings) -> Server:
    """Return a server for ``app`` on the settings' address; ``run()`` blocks, ``should_exit = True`` ends it.

    Proxy headers are not trusted: who asks decides whether a token is needed.
    """
    return Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            log_level=settings.log_level,
            access_log=settings.log_level == "debug",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
