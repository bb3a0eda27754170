"""The command that offers models for merging and scoring without giving them away."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from api.commands.common import err, out, read_mapping
from api.commands.service import Home, Host, Level, PublicHosts, Roots, log_to_terminal
from api.settings import env_name, load_settings

PORT = 8757
"""Beside the service's own."""


def endpoint(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="What is offered, YAML or JSON.", show_default=False)
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models", help="Directory of an expert, or of several: checkpoints or LoRA adapters.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Directory of their common base.", show_default=False)
    ] = None,
    host: Host = None,
    port: Annotated[
        int | None, typer.Option("--port", help=f"Port to listen on. Environment: MERGEOPT_PORT, else {PORT}.")
    ] = None,
    home: Home = None,
    root: Roots = None,
    public_host: PublicHosts = None,
    check: Annotated[bool, typer.Option("--check", help="Open the models, say what is offered, and end.")] = False,
    log_level: Level = None,
) -> None:
    """Let others merge and score models that stay here: checkpoints or LoRA adapters."""
    settings = load_settings(
        host=host,
        port=PORT if port is None and env_name("port") not in os.environ else port,
        home=home,
        roots=root or None,
        public_hosts=public_host or None,
        log_level=log_level,
    )
    log_to_terminal(settings)
    data = {} if file is None else read_mapping(file)
    if models:
        data["models"] = [*data.get("models", []), *models]
    if base is not None:
        data["base"] = base
    from api.endpoint import run
    from api.endpoint.offer import parse_offer

    offer = parse_offer(data)
    if check:
        out().print(run.summary(settings, offer), markup=False)
        return
    server = run.make_endpoint(settings, offer)
    err().print(f"{offer.name} is at http://{settings.host}:{settings.port}", markup=False, soft_wrap=True)
    server.run()
