"""Commands that run the service, or work on its store directly. Everything heavy is imported inside of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.logging import RichHandler

from api.commands.common import SpecFile, err, out, read_document
from api.commands.jobs import ended
from api.commands.live import LiveJob
from api.commands.tables import tokens_table
from api.settings import LogLevel, Settings, env_name, load_settings
from optimizer.errors import Unavailable, UserError
from optimizer.spec import parse_spec

if TYPE_CHECKING:
    from api.store.sql import SqlStore
    from api.store.tokens import Tokens

_DAY_S = 24 * 3600


def _option(flag: str, field: str) -> Any:
    info = Settings.model_fields[field]
    return typer.Option(flag, help=f"{info.description} Environment: {env_name(field)}.", show_default=False)


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
OfEndpoint = Annotated[
    bool, typer.Option("--endpoint", help="For the merge-and-score endpoint, which has tokens of its own.")
]


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
    log_to_terminal(settings)
    _announce(settings)
    from api import service

    with _database_errors():
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
    log_to_terminal(settings)
    _announce(settings)
    from api import service

    with _database_errors():
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
    log_to_terminal(settings)
    from api import service

    with _database_errors():
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
        home=home,
        database_url=database_url,
        roots=root or None,
        pool=pool,
        ray_address=ray_address,
        log_level="warning",
    )
    spec = parse_spec(read_document(file))
    log_to_terminal(settings)
    from api import service

    with _open_store(settings) as store, LiveJob(out(), store.get_job) as live:
        job = service.run_job(settings, spec, live.push)
    ended(job)


def demo(
    home: Annotated[Path, typer.Option("--home", help="Directory for everything the demo keeps.")] = Path(".demo"),
) -> None:
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
    endpoint: OfEndpoint = False,
    home: Home = None,
    database_url: Database = None,
) -> None:
    """Make an access token and print its secret, which is shown this once."""
    with _open_tokens(load_settings(home=home, database_url=database_url), endpoint) as store:
        _, secret = store.create_token(name, None if days is None else days * _DAY_S)
    typer.echo(secret)
    err().print("this secret is not kept: store it now; clients take it from MERGEOPT_TOKEN", style="dim")


def list_tokens(endpoint: OfEndpoint = False, home: Home = None, database_url: Database = None) -> None:
    """List access tokens, without their secrets."""
    with _open_tokens(load_settings(home=home, database_url=database_url), endpoint) as store:
        tokens = store.list_tokens()
    out().print(tokens_table(tokens) if tokens else "no tokens")


def revoke_token(
    token_id: Annotated[int, typer.Argument(metavar="ID", help="As `token list` shows it.", show_default=False)],
    endpoint: OfEndpoint = False,
    home: Home = None,
    database_url: Database = None,
) -> None:
    """Revoke an access token."""
    with _open_tokens(load_settings(home=home, database_url=database_url), endpoint) as store:
        store.delete_token(token_id)
    out().print(f"token {token_id} revoked")


def upgrade_database(
    revision: Annotated[str, typer.Argument(help="Where to.")] = "head",
    home: Home = None,
    database_url: Database = None,
) -> None:
    """Bring the database to the newest migration."""
    settings = load_settings(home=home, database_url=database_url)
    settings.home.mkdir(parents=True, exist_ok=True)
    with _database_errors():
        import migrations

        migrations.upgrade(settings.database_url, revision)
        out().print(f"the database is at {migrations.current(settings.database_url)}")


def downgrade_database(
    revision: Annotated[str, typer.Argument(help="Where to; `base` empties the database.", show_default=False)],
    home: Home = None,
    database_url: Database = None,
) -> None:
    """Take the database back to an older migration. What later ones keep is lost."""
    settings = load_settings(home=home, database_url=database_url)
    with _database_errors():
        import migrations

        migrations.downgrade(settings.database_url, revision)
        out().print(f"the database is at {migrations.current(settings.database_url) or 'base'}")


def current_revision(home: Home = None, database_url: Database = None) -> None:
    """Print the migration that the database is at."""
    settings = load_settings(home=home, database_url=database_url)
    with _database_errors():
        import migrations

        typer.echo(migrations.current(settings.database_url) or "none")


@contextmanager
def _open_store(settings: Settings) -> Iterator[SqlStore]:
    from api import service

    with _database_errors():
        store = service.open_store(settings)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _open_tokens(settings: Settings, endpoint: bool) -> Iterator[Tokens]:
    if not endpoint:
        with _open_store(settings) as service_store:
            yield service_store
        return
    from api.endpoint.store import EndpointStore, endpoint_home

    with _database_errors():
        store = EndpointStore(endpoint_home(settings))
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _database_errors() -> Iterator[None]:
    """Turn what the database driver and Alembic raise into our errors: one clear line instead of a traceback."""
    from alembic.util import CommandError
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except CommandError as error:
        raise UserError(str(error), remedy="see `mergeopt db current`") from error
    except OperationalError as error:
        reason = " ".join(str(error.orig).split())
        raise Unavailable(f"the database cannot be used: {reason}", field="MERGEOPT_DATABASE_URL") from error


def log_to_terminal(settings: Settings) -> None:
    """Show the log where the command was given."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(message)s",
        handlers=[RichHandler(console=err(), show_path=False, markup=False)],
    )


def _announce(settings: Settings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    err().print(f"mergeopt is at http://{host}:{settings.port}/ui/", markup=False, soft_wrap=True)
