"""The command `mergeopt`. Heavy libraries are imported by the commands that need them, not by their help."""

from __future__ import annotations

import typer

from api.commands import endpoint, files, jobs, service
from api.commands.common import ErrorGroup

app = typer.Typer(
    name="mergeopt",
    help="Finds the best way to merge fine-tuned models.",
    cls=ErrorGroup,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
token = typer.Typer(help="Access tokens of the service, or of the endpoint, on this machine.", no_args_is_help=True)
db = typer.Typer(help="The run store's database.", no_args_is_help=True)

_SERVICE, _JOBS, _FILES = "The service", "Jobs", "Recipes and files"

app.command(rich_help_panel=_SERVICE)(service.serve)
app.command(rich_help_panel=_SERVICE)(service.api)
app.command(rich_help_panel=_SERVICE)(service.controller)
app.command(rich_help_panel=_SERVICE)(service.run)
app.command(rich_help_panel=_SERVICE)(endpoint.endpoint)
app.command(rich_help_panel=_SERVICE)(service.demo)
app.command(rich_help_panel=_SERVICE)(service.version)
app.add_typer(token, name="token", rich_help_panel=_SERVICE)
app.add_typer(db, name="db", rich_help_panel=_SERVICE)

app.command(rich_help_panel=_JOBS)(jobs.submit)
app.command(rich_help_panel=_JOBS)(jobs.validate)
app.command("list", rich_help_panel=_JOBS)(jobs.list_jobs)
app.command(rich_help_panel=_JOBS)(jobs.show)
app.command(rich_help_panel=_JOBS)(jobs.catalog)
app.command(rich_help_panel=_JOBS)(jobs.watch)
app.command(rich_help_panel=_JOBS)(jobs.pause)
app.command(rich_help_panel=_JOBS)(jobs.resume)
app.command(rich_help_panel=_JOBS)(jobs.cancel)
app.command(rich_help_panel=_JOBS)(jobs.delete)
app.command(rich_help_panel=_JOBS)(jobs.clone)
app.command(rich_help_panel=_JOBS)(jobs.export)

app.command(rich_help_panel=_FILES)(files.merge)
app.command("import", rich_help_panel=_FILES)(files.import_file)

token.command("create")(service.create_token)
token.command("list")(service.list_tokens)
token.command("revoke")(service.revoke_token)
db.command("upgrade")(service.upgrade_database)
db.command("downgrade")(service.downgrade_database)
db.command("current")(service.current_revision)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
