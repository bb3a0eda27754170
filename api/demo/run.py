"""The demo, step by step: data, experts, service, search over REST, final table on test data, export, verification."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from api.client import Client
from api.commands.live import LiveJob
from api.demo.job import SEARCH_ITEMS, TEST_ITEMS, job_spec
from api.demo.report import Row, best_of, front_sample, print_table, verdict
from api.demo.scoring import Scorer, baselines, choose
from api.demo.verify import plain_accuracy
from api.views import FrontView, JobView
from optimizer.errors import JobError
from optimizer.recipe import Recipe
from optimizer.spec import JobSpec
from workers.demo.experts import TRAININGS, cached, copy_base, train_all
from workers.demo.tasks import Task, make_tasks, write_split

FRONT_ROWS = 8
START_TIMEOUT_S = 120


def run(home: Path, console: Console, evaluations: int | None = None) -> int:
    """Run the demo in ``home`` and write ``result.json`` there.

    Args:
        home: where data, models, the store and the exports go; trained experts in it are used again.
        console: what to print to.
        evaluations: budget of the search, for quick tests; the demo's own by default.

    Returns:
        The exit code: 0 if the search beats every baseline and every export scores as it did before.
    """
    began = time.monotonic()
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    with _progress(console) as progress:
        tasks = prepare_inputs(home, progress)
    spec = job_spec(tasks) if evaluations is None else job_spec(tasks, evaluations=evaluations)
    with _service(home, console) as client:
        job = _search(client, spec, console)
        front = client.front(job.id)
        recipes = _recipes(client, job, front)
        with _progress(console) as progress:
            scorer = Scorer(job_spec(tasks, split="test", metric="accuracy"), home)
            base_rows = _score_baselines(tasks, home, scorer, progress)
            rows = _score_front(recipes, scorer, progress)
        best = best_of(front, rows)
        exported = _export(client, job, best["mean"].candidate, tasks, console)
        verified = _verify(exported, best["mean"], tasks, home, console)
    experts = {task.name: score for task, score in _own_scores(tasks, base_rows)}
    names = [task.name for task in tasks]
    print_table(console, experts, base_rows, rows, best)
    won = verdict(console, base_rows, best, experts)
    seconds = time.monotonic() - began
    result = {
        "job_id": job.id,
        "baselines": {row.name: dict(zip(names, row.scores, strict=True)) for row in base_rows},
        "front": [row.as_json(names, experts) for row in rows],
        "best": {kind: row.as_json(names, experts) for kind, row in best.items()},
        "exported": {task: str(path) for task, path in exported.items()},
        "seconds": round(seconds, 1),
    }
    (home / "result.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"All figures: {home / 'result.json'}  ({seconds:.0f} s)")
    console.print(f"To look at the job again: MERGEOPT_HOME={home / 'service'} MERGEOPT_ROOTS={home} mergeopt serve")
    return 0 if won and verified else 1


def prepare_inputs(home: Path, progress: Progress) -> list[Task]:
    """Write the tasks' data and train the experts that are not there yet."""
    bar = progress.add_task("data of the three tasks", total=1)
    tasks = make_tasks(SEARCH_ITEMS, TEST_ITEMS)
    progress.advance(bar)
    for task in tasks:
        write_split(home / "data" / task.name / "search.jsonl", task.search)
        write_split(home / "data" / task.name / "test.jsonl", task.test)
    copy_base(home / "models" / "base")
    by_name = {task.name: task for task in tasks}
    bars, missing = {}, []
    for training in TRAININGS:
        task, out = by_name[training.task], home / "models" / training.name
        ready = cached(training, task, out)
        bars[training.name] = progress.add_task(
            f"expert {training.name}", total=training.steps, completed=training.steps if ready else 0
        )
        if not ready:
            missing.append((training, task, out))
    if missing:
        processes = max(1, min(len(missing), os.cpu_count() or 1))
        train_all(missing, home / "models" / "base", lambda name, n: progress.advance(bars[name], n), processes)
    return tasks


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


@contextlib.contextmanager
def _service(home: Path, console: Console) -> Iterator[Client]:
    """Run `mergeopt serve` as a user would, and yield a client for it."""
    port = _free_port()
    log = home / "service.log"
    environment = os.environ | {
        "MERGEOPT_HOME": str(home / "service"),
        "MERGEOPT_ROOTS": str(home),
        "MERGEOPT_PORT": str(port),
    }
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "api", "serve"], env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            with _progress(console) as progress:
                bar = progress.add_task("starting the service", total=1)
                _wait_until_ready(client, process, log)
                progress.advance(bar)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            client.ready()
            return
        time.sleep(0.2)
    raise JobError(f"the service did not start; its log is {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _search(client: Client, spec: JobSpec, console: Console) -> JobView:
    """Submit the job and show its progress until it has ended."""
    for earlier in client.jobs():  # of a demo that was interrupted: it would come first
        if earlier.state in ("queued", "running", "paused"):
            client.cancel(earlier.id)
    job = client.submit(spec)
    console.print(f"Watch the Pareto front grow: [link]{client.url}/ui/#/jobs/{job.id}[/link]")
    with LiveJob(console, client.get_job) as live:
        for event in client.watch(job.id):
            live.push(event)
    job = client.get_job(job.id)
    if job.state != "completed":
        raise JobError(f"the job ended as {job.state}: {job.reason}")
    console.print(f"{job.progress.completed} candidates, {job.progress.front} on the front; {job.reason}")
    return job


def _recipes(client: Client, job: JobView, front: FrontView) -> dict[int, Recipe]:
    wanted = front_sample(front, FRONT_ROWS)
    return {index: Recipe.parse(client.get_candidate(job.id, index).recipe) for index in wanted}


def _score_baselines(tasks: list[Task], home: Path, test: Scorer, progress: Progress) -> list[Row]:
    search = Scorer(job_spec(tasks, split="search", metric="accuracy"), home)
    todo = baselines(test.problem)
    bar = progress.add_task("baselines, on test data", total=len(todo))
    rows = []
    for baseline in todo:
        rows.append(Row(baseline.name, test(choose(baseline, search))))
        progress.advance(bar)
    return rows


def _score_front(recipes: dict[int, Recipe], test: Scorer, progress: Progress) -> list[Row]:
    bar = progress.add_task("the front, on test data", total=len(recipes))
    rows = []
    for index, recipe in recipes.items():
        rows.append(Row(f"#{index}", test(recipe), index))
        progress.advance(bar)
    return rows


def _own_scores(tasks: list[Task], rows: list[Row]) -> Iterator[tuple[Task, float]]:
    """Score of each task's own expert on its task."""
    by_name = {row.name: row for row in rows}
    for number, task in enumerate(tasks):
        yield task, by_name[f"expert {task.name}"].scores[number]


def _export(
    client: Client, job: JobView, candidate: int | None, tasks: list[Task], console: Console
) -> dict[str, Path]:
    if candidate is None:
        raise JobError("the best row is no candidate of the job")
    exported = {}
    with _progress(console) as progress:
        bar = progress.add_task("exports, one for each head", total=len(tasks))
        started = {task.name: client.export(job.id, candidate, head=task.name) for task in tasks}
        for name, export in started.items():
            done = client.wait_export(export.id)
            if done.path is None:
                raise JobError(f"the export failed: {done.error}")
            exported[name] = Path(done.path)
            progress.advance(bar)
    return exported


def _verify(exported: dict[str, Path], best: Row, tasks: list[Task], home: Path, console: Console) -> bool:
    """Reload each export with plain transformers and compare its test score with the search's own."""
    found_all = []
    with _progress(console) as progress:
        for task in progress.track(tasks, description="reloading with plain transformers"):
            found_all.append(plain_accuracy(exported[task.name], home / "data" / task.name / "test.jsonl"))
    same = True
    for task, expected, found in zip(tasks, best.scores, found_all, strict=True):
        same &= found == expected
        mark = "[green]=[/green]" if found == expected else "[red]≠[/red]"
        console.print(f"exported {task.name:10} {found:.4f} {mark} {expected:.4f}  {exported[task.name]}")
    return same
