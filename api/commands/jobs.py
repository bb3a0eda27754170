"""Commands that talk to the service."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
import yaml
from rich.progress import Progress

from api.client import Client
from api.commands.common import (
    INTERRUPTED,
    OTHER_ERROR,
    AsAdapter,
    JobId,
    Json,
    Overwrite,
    SpecFile,
    Token,
    TokenizerFrom,
    Url,
    connect,
    err,
    fail,
    out,
    print_json,
    read_mapping,
)
from api.commands.live import LiveJob
from api.commands.tables import (
    candidates_table,
    catalog_table,
    findings_table,
    job_panel,
    jobs_table,
    phases_table,
    validation_panel,
)
from api.documents import parse_document
from api.views import ExportView, JobView
from optimizer.errors import InvalidInput, MergeoptError
from optimizer.ports import JobState

_TOP = 20

CandidateIndex = Annotated[
    int, typer.Argument(metavar="CANDIDATE", help="The candidate's number in the job.", min=0, show_default=False)
]
Kind = Literal["algorithms", "spaces", "operators", "evaluators", "graders"]
State = Annotated[JobState | None, typer.Option("--state", help="Only jobs in this state.", show_default=False)]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow the job until it ends.")]


def submit(file: SpecFile, watch: Watch = False, json: Json = False, url: Url = None, token: Token = None) -> None:
    """Submit a job."""
    with connect(url, token) as client:
        _submitted(client, client.submit(read_mapping(file)), watch, json)


def validate(file: SpecFile, json: Json = False, url: Url = None, token: Token = None) -> None:
    """Check a job spec, its checkpoints and its data, without submitting it."""
    with connect(url, token) as client:
        validation = client.validate(read_mapping(file))
    if json:
        print_json(validation)
    else:
        out().print(validation_panel(validation))


def list_jobs(
    state: State = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Only jobs whose name contains this.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Most jobs to list.", min=1)] = 50,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List jobs, newest first."""
    with connect(url, token) as client:
        listed = client.jobs(state=state, name=name, limit=min(limit, 1000))
        jobs = [job for _, job in zip(range(limit), listed, strict=False)]
    if json:
        print_json(jobs)
    else:
        out().print(jobs_table(jobs) if jobs else "no jobs")


def show(
    job: JobId,
    candidate: Annotated[
        int | None, typer.Option("--candidate", "-c", help="Show this candidate, whole.", min=0, show_default=False)
    ] = None,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show a job and its front, or one of its candidates."""
    with connect(url, token) as client:
        if candidate is not None:
            _show_candidate(client, job, candidate, json)
            return
        view = client.get_job(job)
        if json:
            print_json(view)
            return
        console = out()
        console.print(job_panel(view))
        if view.phases:
            console.print(phases_table(view.phases))
        if view.findings:
            console.print(findings_table(view.findings))
        front = client.list_candidates(job, on_front=True, limit=_TOP)
        if front.items:
            console.print(candidates_table(front.items, [objective.name for objective in view.objectives]))
        if front.next_cursor:
            console.print(f"… {view.progress.front} on the front in all", style="dim")


def catalog(
    kind: Annotated[
        Kind,
        typer.Argument(
            metavar="KIND", help="algorithms, spaces, operators, evaluators or graders.", show_default=False
        ),
    ],
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List what jobs may name: algorithms, search spaces, operators, evaluators or graders."""
    with connect(url, token) as client:
        found = _entries(client, kind)
    if json:
        print_json(found)
    else:
        out().print(catalog_table(found))


def watch(job: JobId, url: Url = None, token: Token = None) -> None:
    """Follow a job until it ends. Leaving (Ctrl-C) does not stop the job."""
    with connect(url, token) as client:
        _watch(client, job)


def pause(job: JobId, url: Url = None, token: Token = None) -> None:
    """Pause a job; evaluations under way are finished."""
    with connect(url, token) as client:
        _requested(client.pause(job))


def resume(
    job: JobId,
    requests: Annotated[float | None, typer.Option(help="Most requests in all from now on.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Most tokens in all from now on.")] = None,
    money: Annotated[float | None, typer.Option(help="Most money in all from now on.")] = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Resume a paused job where it stopped; one that spent its budget, with another one."""
    budget = {"requests": requests, "tokens": tokens, "money": money}
    with connect(url, token) as client:
        _requested(client.resume(job, {name: value for name, value in budget.items() if value is not None}))


def cancel(job: JobId, url: Url = None, token: Token = None) -> None:
    """End a job for good; what it found stays."""
    with connect(url, token) as client:
        _requested(client.cancel(job))


def delete(job: JobId, url: Url = None, token: Token = None) -> None:
    """Delete a job that is not running, with all that belongs to it."""
    with connect(url, token) as client:
        client.delete_job(job)
    out().print(f"{job} deleted")


def clone(
    job: JobId,
    file: Annotated[
        str | None, typer.Option("--changes", help="File with changes, YAML or JSON; - is stdin.", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="A change, e.g. budget.evaluations=500; may be repeated.", show_default=False),
    ] = None,
    watch: Watch = False,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Submit a job like another one, with changes."""
    changes = read_mapping(file) if file else {}
    for assignment in assignments or []:
        _assign(changes, assignment)
    with connect(url, token) as client:
        _submitted(client, client.clone(job, changes), watch, json)


def export(
    job: JobId,
    candidate: CandidateIndex,
    head: Annotated[
        str | None, typer.Option("--head", help="Expert whose head the checkpoint gets.", show_default=False)
    ] = None,
    tokenizer_from: TokenizerFrom = None,
    as_adapter: AsAdapter = None,
    overwrite: Overwrite = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is written.")] = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Write a candidate as a Hugging Face checkpoint, or as an adapter."""
    with connect(url, token) as client:
        view = client.export(
            job, candidate, head=head, tokenizer_from=tokenizer_from, as_adapter=as_adapter, overwrite=overwrite
        )
        if not wait:
            out().print(f"{view.id} {view.state}")
            return
        view = _wait_export(client, view)
    if view.state == "failed":
        message = (view.error or {}).get("message", "the export failed")
        fail(MergeoptError(message))
    typer.echo(view.path)


def _entries(client: Client, kind: Kind) -> list[Any]:
    match kind:
        case "algorithms":
            return client.algorithms()
        case "spaces":
            return client.spaces()
        case "operators":
            return client.operators()
        case "evaluators":
            return client.evaluators()
        case "graders":
            return client.graders()


def _submitted(client: Client, job: JobView, watch: bool, json: bool) -> None:
    if json:
        print_json(job)
    else:
        out().print(f"{job.id} {job.state}", soft_wrap=True)
        err().print(f"{client.url}/ui/#/jobs/{job.id}", style="dim", soft_wrap=True)
    if watch:
        _watch(client, job.id)


def _requested(job: JobView) -> None:
    out().print(f"{job.id} {job.state}" + (f", will {job.requested}" if _is_pending(job) else ""))


def _is_pending(job: JobView) -> bool:
    done = {"pause": ("paused",), "cancel": ("cancelled",), "run": ("running", "queued")}
    return job.state not in done[job.requested]


def _watch(client: Client, job_id: str) -> None:
    client.get_job(job_id)  # an unknown job is an error before anything is shown
    try:
        with LiveJob(out(), client.get_job) as live:
            for event in client.watch(job_id):
                live.push(event)
    except KeyboardInterrupt:
        err().print(f"the job goes on; `mergeopt watch {job_id}` shows it again", style="dim")
        raise typer.Exit(INTERRUPTED) from None
    ended(client.get_job(job_id))


def ended(job: JobView) -> None:
    """Exit as a job that has ended asks for: 0 when it completed, 1 otherwise."""
    if job.state != "completed":
        raise typer.Exit(OTHER_ERROR)


def _show_candidate(client: Client, job_id: str, index: int, json: bool) -> None:
    view = client.get_candidate(job_id, index)
    if json:
        print_json(view)
        return
    objectives = [objective.name for objective in client.get_job(job_id).objectives]
    console = out()
    console.print(candidates_table([view], objectives))
    if view.failure:
        console.print(f"{view.failure['code']}: {view.failure['message']}", style="red", markup=False)
    console.print(yaml.safe_dump(view.recipe, sort_keys=False), markup=False, soft_wrap=True)


def _wait_export(client: Client, view: ExportView) -> ExportView:
    with Progress(console=err(), transient=True) as progress:
        task = progress.add_task("exporting", total=1.0)
        for latest in client.watch_export(view.id):
            progress.update(task, completed=latest.progress)
            view = latest
    return view


def _assign(changes: dict[str, Any], assignment: str) -> None:
    """Put ``a.b=value`` into ``changes``; the value is YAML."""
    path, equals, value = assignment.partition("=")
    if not equals or not all(path.split(".")):
        raise InvalidInput(f"{assignment!r} is no change", field="--set", remedy="write it as path.to.field=value")
    *parents, last = path.split(".")
    for name in parents:
        child = changes.setdefault(name, {})
        if not isinstance(child, dict):
            raise InvalidInput(f"{name} is set twice", field="--set")
        changes = child
    changes[last] = parse_document(value, "yaml", field="--set")
