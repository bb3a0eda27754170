"""Commands that run the service, or work on its store directly. Everything heavy is imported inside of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.logging import RichHandler

from api.commands.common import SpecFile, err, out, read_document
from api.commands.jobs import ended
from api.commands.live import LiveJob
from api.commands.tables import tokens_table
from api.settings import DEFAULT_HOME, LogLevel, Settings, load_settings
from optimizer.spec import parse_spec

_DAY_S = 24 * 3600


def _option(flag: str, field: str) -> Any:
    info = Settings.model_fields[field]
    return typer.Option(flag, help=f"{info.description} [env: MERGEOPT_{field.upper()}]", show_default=False)


Home = Annotated[Path | None, _option("--home", "home")]
Database = Annotated[str | None, _option("--database-url", "database_url")]
Roots = Annotated[list[Path] | None, _option("--root", "roots")]
Exports = Annotated[Path | None, _option("--exports-dir", "exports_dir")]
Host = Annotated[str | None, _option("--host", "host")]
Port = Annotated[int | None, _option("--port", "port")]
PublicHosts = Annotated[list[str] | None, _option("--public-host", "public_hosts")]
RequireToken = Annotated[Literal["auto", "always"] | None, _option("--require-token", "require_token")]
Pool = Annotated[Literal["ray", "local"] | None, _option("--pool", "pool")]
RayAddress = Annotated[str | None, _option("--ray-address", "ray_address")]
MaxJobs = Annotated[int | None, _option("--max-jobs", "max_jobs")]
Level = Annotated[LogLevel | None, _option("--log-level", "log_level")]


def serve(
    host: Host = None,
    port: Port = None,
    home: Home = None,
    database_url: Database = None,
    root: Roots = None,
    exports_dir: Exports = None,
    public_host: PublicHosts = None,
    require_token: RequireToken = None,
    pool: Pool = None,
    ray_address: RayAddress = None,
    max_jobs: MaxJobs = None,
    log_level: Level = None,
) -> None:
    """Run everything in one process: API, web UI, controller and a local Ray."""
    settings = load_settings(
        host=host,
        port=port,
        home=home,
        database_url=database_url,
        roots=root or None,
        exports_dir=exports_dir,
        public_hosts=public_host or None,
        require_token=require_token,
        pool=pool,
        ray_address=ray_address,
        max_jobs=max_jobs,
        log_level=log_level,
    )
    _log_to_terminal(settings)
    _announce(settings)
    from api import service

    service.serve(settings)


def api(
    host: Host = None,
    port: Port = None,
    home: Home = None,
    database_url: Database = None,
    root: Roots = None,
    public_host: PublicHosts = None,
    require_token: RequireToken = None,
    log_level: Level = None,
) -> None:
    """Run the API and the web UI alone; any number may share a database."""
    settings = load_settings(
        host=host,
        port=port,
        home=home,
        database_url=database_url,
        roots=root or None,
        public_hosts=public_host or None,
        require_token=require_token,
        log_level=log_level,
    )
    _log_to_terminal(settings)
    _announce(settings)
    from api import service

    service.serve_api(settings)


def controller(
    home: Home = None,
    database_url: Database = None,
    root: Roots = None,
    exports_dir: Exports = None,
    pool: Pool = None,
    ray_address: RayAddress = None,
    max_jobs: MaxJobs = None,
    log_level: Level = None,
) -> None:
    """Run a controller alone; any number may share a database."""
    settings = load_settings(
        home=home,
        database_url=database_url,
        roots=root or None,
        exports_dir=exports_dir,
        pool=pool,
        ray_address=ray_address,
        max_jobs=max_jobs,
        log_level=log_level,
    )
    _log_to_terminal(settings)
    from api import service

    service.run_controller(settings)


def run(
    file: SpecFile,
    home: Home = None,
    database_url: Database = None,
    root: Roots = None,
    pool: Pool = None,
    ray_address: RayAddress = None,
) -> None:
    """Run one job in the foreground, without a service."""
    settings = load_settings(
        home=home, database_url=database_url, roots=root or None, pool=pool, ray_address=ray_address, log_level="warning"
    )
    spec = parse_spec(read_document(file))
    _log_to_terminal(settings)
    from api import service

    store = service.open_store(settings)
    try:
        with LiveJob(out(), store.get_job) as live:
            job = service.run_job(settings, spec, live.push)
    finally:
        store.close()
    ended(job)


def demo(home: Annotated[Path, typer.Option("--home", help="Directory for everything the demo keeps.")] = Path(".demo")) -> None:
    """Search for a good merge of real models on this machine, from training them to exporting the winner."""
    from api import demo as demonstration

    raise typer.Exit(demonstration.run(home, out()))


def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(installed("mergeopt"))


def create_token(
    name: Annotated[str, typer.Argument(help="What the token is for.", show_default=False)],
    days: Annotated[
        float | None, typer.Option("--days", help="Days until it expires; never by default.", min=0, show_default=False)
    ] = None,
    home: Home = None,
    database_url: Database = None,
) -> None:
    """Make an access token and print its secret, which is shown this once."""
    with _Store(home, database_url) as store:
        _, secret = store.create_token(name, None if days is None else days * _DAY_S)
    typer.echo(secret)
    err().print("this secret is not kept: store it now; clients take it from MERGEOPT_TOKEN", style="dim")


def list_tokens(home: Home = None, database_url: Database = None) -> None:
    """List access tokens, without their secrets."""
    with _Store(home, database_url) as store:
        tokens = store.list_tokens()
    out().print(tokens_table(tokens) if tokens else "no tokens")


def revoke_token(
    token_id: Annotated[int, typer.Argument(metavar="ID", help="As `token list` shows it.", show_default=False)],
    home: Home = None,
    database_url: Database = None,
) -> None:
    """Revoke an access token."""
    with _Store(home, database_url) as store:
        store.delete_token(token_id)
    out().print(f"token {token_id} revoked")
