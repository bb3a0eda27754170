"""The composition root: the only place that knows which store, pool and processes the service is made of."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

import migrations
from api import warm_starts
from api.app import create_app
from api.auth import check_bind
from api.exporter import Exporter
from api.server import make_server
from api.settings import Settings
from api.store.sql import SqlStore
from api.views import EventView, JobView
from optimizer.controller import Controller, ControllerConfig
from optimizer.errors import Conflict, JobPaused, ServiceUnavailable, Unavailable
from optimizer.ports import PoolFactory
from optimizer.problem import Problem
from optimizer.spec import JobSpec

if TYPE_CHECKING:  # the workers' packages load torch
    from workers.policy import Policy

log = logging.getLogger(__name__)


def open_store(settings: Settings, migrate: bool = True) -> SqlStore:
    """Open the run store, brought to the newest migration first if asked."""
    if migrate:
        if settings.database_url.startswith("sqlite"):
            settings.home.mkdir(parents=True, exist_ok=True)
        migrations.upgrade(settings.database_url)
    return SqlStore(settings.database_url)


def inspect(settings: Settings, spec: JobSpec) -> Problem:
    """Look at a job's inputs; raises `InvalidInput` where they do not fit together.

    Weights are read only to find the digests for a job that begins where others ended: it must merge the same models.
    `Unavailable` is raised where a service that the job names cannot be asked now.
    """
    from workers.prepare import prepare, quick_digest
    from workers.roots import Roots

    roots = Roots(settings.roots, make_policy(settings))
    try:
        return prepare(spec, roots) if spec.warm_starts.jobs else prepare(spec, roots, digest=quick_digest)
    except (JobPaused, ServiceUnavailable) as error:
        raise Unavailable(error.message, field=error.field, remedy=error.remedy) from error


def make_policy(settings: Settings) -> Policy:
    """Return what the settings allow jobs to do."""
    from workers.policy import Policy

    return Policy.model_validate(settings.model_dump(include=set(Policy.model_fields)))


def make_pools(settings: Settings) -> PoolFactory:
    """Return where candidates are evaluated, as the settings say."""
    from workers.merging.cache import Cache
    from workers.pool import LocalPoolFactory, RayPoolFactory

    cache = Cache(settings.cache_dir, disk_bytes=settings.cache_bytes)
    if settings.pool == "local":
        return LocalPoolFactory(settings.roots, cache, make_policy(settings))
    return RayPoolFactory(settings.roots, settings.ray_address, cache=cache, policy=make_policy(settings))


def serve(settings: Settings) -> None:
    """Run API, controller and exports in this process until it is told to stop."""
    store = open_store(settings)
    check_bind(settings, store)
    with _Background(store, settings):
        make_server(create_app(store, settings, partial(inspect, settings)), settings).run()


def serve_api(settings: Settings) -> None:
    """Run the API alone; any number may run against one database."""
    store = open_store(settings, migrate=False)
    check_bind(settings, store)
    make_server(create_app(store, settings, partial(inspect, settings)), settings).run()


def run_controller(settings: Settings) -> None:
    """Run a controller alone until SIGTERM or SIGINT; any number may run, leases decide who has which job."""
    store = open_store(settings, migrate=False)
    store.ping()
    stopped = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with _Background(store, settings):
        stopped.wait()


def run_job(settings: Settings, spec: JobSpec, on_event: Callable[[EventView], None]) -> JobView:
    """Run one job in this process to its end, calling ``on_event`` for everything that happens.

    An interrupt (Ctrl-C) leaves the job in the store, from where any controller can resume it.
    """
    store = open_store(settings)
    spec = warm_starts.resolve(spec, inspect(settings, spec), store)
    job, _ = store.create_job(spec)
    pools = make_pools(settings)
    controller = _controller(store, pools, settings, 0)
    outcome: list[BaseException] = []
    thread = threading.Thread(target=_run_to_end, args=(outcome, controller, store, job.id), name="job", daemon=True)
    thread.start()
    try:
        after = 0
        while True:
            running = thread.is_alive()
            for event in store.events(job.id, after):
                on_event(event)
                after = event.id
            if not running:
                break
            thread.join(settings.poll_s)
    finally:
        controller.stop()
        thread.join()
        pools.close()
        view = store.get_job(job.id)
        store.close()
    if outcome:
        raise outcome[0]
    return view


def _run_to_end(outcome: list[BaseException], controller: Controller, store: SqlStore, job_id: str) -> None:
    """Run a job until it needs no controller any more; again where its workers could not be had."""
    try:
        while not controller.stopped and store.get_job(job_id).state in ("queued", "running"):
            if not controller.run_next(job_id):
                raise Conflict("another controller took the job", remedy="watch it with `mergeopt watch`")
    except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
        outcome.append(error)


def _controller(store: SqlStore, pools: PoolFactory, settings: Settings, number: int) -> Controller:
    owner = f"{socket.gethostname()}:{os.getpid()}:{number}"
    return Controller(store, pools, ControllerConfig(owner, settings.lease_ttl_s, settings.poll_s))


class _Background:
    """Controllers and the exporter, each in a thread, while the block runs; all are told to stop at its end."""

    def __init__(self, store: SqlStore, settings: Settings) -> None:
        self._store = store
        self._pools = make_pools(settings)
        self._controllers = [_controller(store, self._pools, settings, n) for n in range(settings.max_jobs)]
        self._exporter = Exporter(store, settings)
        runs = [controller.run_forever for controller in self._controllers] + [self._exporter.run_forever]
        self._threads = [threading.Thread(target=run, name=f"background-{n}") for n, run in enumerate(runs)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        for controller in self._controllers:
            controller.stop()
        self._exporter.stop()
        for thread in self._threads:
            thread.join()
        self._pools.close()
        self._store.close()
