"""Writes queued exports to disk, one at a time, with progress and a claim that another process can take over."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from api.settings import Settings
from api.store.ports import ExportTask, JobStore
from optimizer.errors import InputsChanged, LeaseLost, MergeoptError
from optimizer.fitness.intervals import Interval
from optimizer.ports import Split
from optimizer.recipe import Recipe

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.5


class Exporter:
    """Claims exports and writes them below the settings' exports directory.

    Args:
        store: where exports are queued.
        settings: of the service.
    """

    def __init__(self, store: JobStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._stop = threading.Event()
        self._owner = f"{socket.gethostname()}:{os.getpid()}:export"

    def stop(self) -> None:
        """Make `run_forever` return after the export under way."""
        self._stop.set()

    def run_forever(self) -> None:
        """Claim and write exports until stopped."""
        while not self._stop.is_set():
            try:
                busy = self.run_next()
            except Exception:
                log.exception("the exporter could not go on; it tries again")
                busy = False
            if not busy:
                self._stop.wait(max(0.5, self._settings.poll_s))

    def run_next(self) -> bool:
        """Claim one export and write it; False if there was none."""
        task = self._store.claim_export(self._owner, self._settings.lease_ttl_s)
        if task is None:
            return False
        try:
            self._finish(task, *self._outcome(task))
        except LeaseLost:
            log.warning("export %s was taken over by another worker", task.id)
        return True

    def target(self, task: ExportTask) -> Path:
        """Return the directory that an export is written to."""
        parts = [f"candidate-{task.candidate}", *([task.head] if task.head else [])]
        if task.options.tokenizer_from is not None:
            parts.append(f"tokenizer-{task.options.tokenizer_from}")
        if task.options.as_adapter is not None:
            parts.append(f"rank-{task.options.as_adapter}")
        return self._settings.exports_dir / task.job_id / "-".join(parts)

    def _outcome(self, task: ExportTask) -> tuple[Path | None, dict[str, str] | None]:
        """Write the checkpoint; return where it is, or the error."""
        try:
            with _Reporter(self._store, task, self._settings.lease_ttl_s) as reporter:
                return self._write(task, reporter.progress), None
        except LeaseLost:
            raise
        except MergeoptError as error:
            return None, {"code": error.code, "message": str(error)}
        except Exception as error:
            log.exception("export %s failed", task.id)
            return None, {"code": "internal_error", "message": f"{type(error).__name__}: {error}"}

    def _finish(self, task: ExportTask, path: Path | None, error: dict[str, str] | None) -> None:
        self._store.update_export(
            task,
            state="completed" if path else "failed",
            progress=1.0 if path else 0.0,
            ttl_s=self._settings.lease_ttl_s,
            path=str(path) if path else None,
            error=error,
        )

    def _write(self, task: ExportTask, progress: Callable[[float], None]) -> Path:
        # torch is imported only where there is something to export: an API process stays small.
        from workers.alignment import align, vocabulary_of
        from workers.checkpoints import open_checkpoints
        from workers.compatibility import inspect
        from workers.merging.cache import Cache
        from workers.merging.calibration import load_measurements
        from workers.rebuild import Opened, write_model
        from workers.roots import Roots

        recipe = Recipe.parse(task.recipe)
        roots = Roots(self._settings.roots)
        checkpoints = align(open_checkpoints(task.spec, roots), task.spec.merge.vocabulary)
        for name, model in recipe.models.items():
            if checkpoints[name].digest != model.digest:
                raise InputsChanged(f"the checkpoint {name!r} changed since the job ran", remedy="restore it")
            if vocabulary_of(checkpoints[name]) != model.vocabulary:
                raise InputsChanged(f"the tokenizer of {name!r} changed since the job ran", remedy="restore it")
        out = self.target(task)
        if not task.options.overwrite and _is_export_of(out, recipe):
            return out  # finished by a worker that died before it could say so
        base, *experts = checkpoints.values()
        layout, _ = inspect(base, experts, task.spec.merge.heads)
        cache = Cache(self._settings.cache_dir, disk_bytes=self._settings.cache_bytes)
        measurements = load_measurements(recipe, checkpoints, layout, roots, cache=cache)
        write_model(
            Opened(recipe, checkpoints, layout, measurements, cache),
            out,
            title=f"{task.spec.name}: candidate {task.candidate}",
            head=task.head,
            tokenizer_from=task.options.tokenizer_from,
            adapter_rank=task.options.as_adapter,
            overwrite=task.options.overwrite,
            scores={**task.scores, **_intervals(task, "search")},
            test_scores=_intervals(task, "test"),
            overfitted=() if task.verification is None else task.verification.overfitted,
            spec=task.spec,
            progress=progress,
        )
        return out


def _intervals(task: ExportTask, split: Split) -> dict[str, Interval]:
    """What a verified candidate came to, by objective."""
    found = {} if task.verification is None else getattr(task.verification, split)
    return {name: Interval(**interval.model_dump()) for name, interval in found.items()}


def _is_export_of(path: Path, recipe: Recipe) -> bool:
    written = path / "recipe.json"
    return written.is_file() and Recipe.parse(json.loads(written.read_bytes())).fingerprint == recipe.fingerprint


class _Reporter:
    """Reports the latest progress from a thread of its own, which also keeps the claim alive."""

    def __init__(self, store: JobStore, task: ExportTask, ttl_s: float) -> None:
        self._store, self._task, self._ttl_s = store, task, ttl_s
        self._progress = 0.0
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._report, name=f"export-{task.id}", daemon=True)

    def progress(self, fraction: float) -> None:
        """Take note of the progress; raises `LeaseLost` once another worker has the export."""
        if self._lost:
            raise LeaseLost(f"export {self._task.id} belongs to another worker now")
        self._progress = fraction

    def __enter__(self) -> _Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _report(self) -> None:
        while not self._done.wait(min(REPORT_EVERY_S, self._ttl_s / 3)):
            try:
                self._store.update_export(self._task, state="running", progress=self._progress, ttl_s=self._ttl_s)
            except LeaseLost:
                self._lost = True
                return
            except Exception:
                log.warning("could not report on export %s", self._task.id, exc_info=True)
