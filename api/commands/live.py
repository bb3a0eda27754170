"""A job as it runs: a live table on a terminal, one line for each thing that happens anywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from api.commands.tables import job_panel, number
from api.views import EventView, JobView, Progress

_LINES = 6
_REFRESH_S = 0.5


class LiveJob:
    """Shows a job while events are pushed into it.

    Args:
        console: where to.
        fetch: returns the job with the given id as it is now.
    """

    def __init__(self, console: Console, fetch: Callable[[str], JobView]) -> None:
        self._console = console
        self._fetch = fetch
        self._job: JobView | None = None
        self._fetched_at = 0.0
        self._told_at = time.monotonic()
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def push(self, event: EventView) -> None:
        """Show an event."""
        now = time.monotonic()
        # An event tells the counters; the best values come from the job, which is asked for less often.
        if self._job is None or event.type == "job.state" or now - self._fetched_at > _REFRESH_S:
            self._job, self._fetched_at = self._fetch(event.job_id), now
        elif "progress" in event.data:
            self._job.progress = Progress.model_validate(event.data["progress"])
        self._told_at = now
        line = describe(event, [objective.name for objective in self._job.objectives])
        if line is None:
            return
        self._lines.append(line)
        if not self._console.is_terminal:
            self._console.print(line, markup=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        if self._job is None:
            return Text("waiting for the first event …", style="dim")
        elapsed = self._job.progress.elapsed_s
        if self._job.state == "running":
            elapsed += time.monotonic() - self._told_at
        return Group(job_panel(self._job, elapsed), *(Text(line, style="dim") for line in self._lines))


Data = dict[str, Any]


def describe(event: EventView, objectives: list[str]) -> str | None:
    """Return an event as a line of text, or None for what is not worth one."""
    if event.type == "candidate.evaluated":
        return _candidate(event.data, objectives)
    told = _TOLD.get(event.type)
    return None if told is None else told(event.data)


def _candidate(data: Data, objectives: list[str]) -> str:
    head = f"candidate {data['index']}" + (f" ({data['label']})" if data.get("label") else "")
    values = data.get("values")
    if not isinstance(values, list):
        return f"{head} {data['state']}"
    scores = "  ".join(f"{name} {number(value)}" for name, value in zip(objectives, values, strict=True))
    how = "stopped after" if data.get("stopped") else "on"
    part = f"  {how} {data['partial']} items" if data.get("partial") else ""
    return f"{head}  {scores}{part}" + ("  on the front" if data.get("on_front") else "")


def _state(data: Data) -> str:
    return f"job {data['state']}" + (f": {data['reason']}" if data.get("reason") else "")


def _verified(data: Data) -> str:
    head = f"candidate {data['index']}"
    if data["state"] == "failed":
        return f"{head} measured anew: failed"
    # A job without test items verifies on all search items: there the values of the search were estimates.
    parts = [
        f"on {items} items  " + "  ".join(f"{name} {number(value)}" for name, value in data[split].items())
        for split, items in (("search", "all"), ("test", "test"))
        if data[split]
    ]
    if data["overfitted"]:
        parts.append(f"overfitted: {', '.join(data['overfitted'])}")
    return f"{head} {'  '.join(parts)}"


def _export(data: Data) -> str:
    where = f" → {data['path']}" if data.get("path") else ""
    return f"export of candidate {data['candidate']}: {data['state']} {data['progress']:.0%}{where}"


_TOLD: dict[str, Callable[[Data], str]] = {
    "job.state": _state,
    "job.note": lambda data: str(data["message"]),
    "job.verifying": lambda data: f"{len(data['candidates'])} candidates to measure anew",
    "candidate.verified": _verified,
    "candidate.rejected": lambda data: f"enqueued candidate {data['queued']} rejected: {data['message']}",
    "export.progress": _export,
}
