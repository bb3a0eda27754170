"""The web UI: static files of `api/ui`, and plotly from its Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

UI = Path(__file__).parent.parent / "ui"
PLOTLY = "plotly.min.js"


class CachedFiles(StaticFiles):
    """Static files with a Cache-Control header.

    Args:
        directory: of the files.
        cache: the header's value.
    """

    def __init__(self, directory: Path, cache: str) -> None:
        super().__init__(directory=directory, html=True, check_dir=False)
        self.cache = cache

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return the file, or that it has not changed."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = self.cache
        return response


def mount(app: FastAPI) -> None:
    """Serve the UI at /ui/; / leads there."""
    files = CachedFiles(UI, "no-cache")  # asks each time, so that an upgrade shows at once
    vendor = CachedFiles(_plotly_directory(), "public, max-age=86400")

    async def get_root() -> RedirectResponse:
        return RedirectResponse("/ui/")

    async def get_plotly(request: Request) -> Response:
        return await vendor.get_response(PLOTLY, request.scope)

    app.add_api_route("/", get_root, include_in_schema=False)
    app.add_api_route(f"/ui/vendor/{PLOTLY}", get_plotly, include_in_schema=False)
    app.mount("/ui", files, name="ui")


def _plotly_directory() -> Path:
    spec = importlib.util.find_spec("plotly")  # importing it would take a second
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0], "package_data") if places else UI / "vendor"
