"""Runs programs that nobody trusts, such as answers of models, each in a process tree of its own on Linux.

What holds, always: an interpreter of its own without the worker's environment, packages, standard input or open files; hard
limits on processor time, wall-clock time, address space of each process, sizes of files, open files, processes and output;
the kernel refuses sockets of every kind, tracing, mounts, new namespaces and other calls that ordinary programs do not make;
no process outlives the run.

Where the kernel grants namespaces (to root, or to everybody, as most distributions have it; containers often do not), also:
no network at all, a process table of its own, and a file tree that has nothing but the interpreter and the system's
libraries, read only, and an empty directory in memory. Elsewhere a program can read and write what the worker's user can,
and read the environments of that user's processes, but it has no way to send anything anywhere, and cannot signal other
processes. A worker that runs as root gives each program a user of its own, with rights only to what is everybody's.

What does not hold: a program can use its share of all cores, and holes of the kernel itself are not closed. Who grades
programs of hostile origin puts the workers into virtual machines.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from optimizer.errors import RetryableError

_INSIDE = Path(__file__).with_name("inside.py")
_VERDICTS: Mapping[int, Status] = {0: "passed", 1: "failed", 2: "limit"}
_GRACE_S = 30.0

Status = Literal["passed", "failed", "limit", "output"]


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: wall-clock time of everything.
        cpu_seconds: processor time of each process.
        memory_bytes: address space of each process; an interpreter needs 30 MB.
        file_bytes: size of a file, and of all files together where files are in memory.
        open_files: at once, in each process.
        processes: processes and threads at once.
        output_bytes: standard output and error together.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 256 * 2**20
    file_bytes: int = 8 * 2**20
    open_files: int = 32
    processes: int = 16
    output_bytes: int = 64 * 2**10


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: ``passed`` when every part ran to its end; ``failed`` by an exception, an exit or a signal; ``limit`` at a
            limit on time or memory; ``output`` when it wrote too much.
        output: the beginning of standard output and error, mixed as they came.
    """

    status: Status
    output: str


class SandboxUnavailable(RetryableError):
    """No sandbox could be started on this machine now."""

    code = "sandbox_unavailable"


def run(
    parts: Sequence[str],
    limits: Limits | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    *,
    namespaces: bool = True,
) -> Outcome:
    """Run a program of several parts, which share one namespace: for example an answer, and then the tests of it.

    Args:
        parts: Python sources, run one after the other; with ``__name__ == "answer"``.
        limits: those of `Limits` by default.
        cancelled: asked several times a second; True ends the program, whose outcome is then ``limit``.
        namespaces: False does without them, as where the kernel grants none.

    Raises:
        SandboxUnavailable: no process could be started, or the kernel lacks what a sandbox needs.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="mergeopt-sandbox-") as directory, tempfile.TemporaryFile() as done:
        # The program may run as another user; the directory is its own.
        Path(directory).chmod(0o777)
        given = {
            **dataclasses.asdict(limits),
            "parts": list(parts),
            "done": done.fileno(),
            "token": token,
            "namespaces": namespaces,
        }
        process = _start(done, directory)
        try:
            output, in_time = _talk(process, json.dumps(given).encode(), limits, cancelled)
        finally:
            code = _finish(process)
        done.seek(0)
        finished = done.read(1000) == token.encode()
    if code not in _VERDICTS and in_time:
        raise SandboxUnavailable(f"no sandbox here: {output.strip()[-500:] or f'exit code {code}'}")
    if len(output) >= limits.output_bytes:
        return Outcome("output", output)
    status = _VERDICTS.get(code, "limit") if in_time else "limit"
    return Outcome("failed" if status == "passed" and not finished else status, output)


@cache
def check() -> None:
    """Make sure once that this machine can run programs at all.

    Raises:
        SandboxUnavailable: it cannot; says why.
    """
    outcome = run(["import collections, json, math, re\nassert json.loads('[1]') == [1]"], Limits(seconds=60))
    if outcome.status != "passed":
        raise SandboxUnavailable(f"a program that does nothing {outcome.status}: {outcome.output.strip()[-500:]}")


def _start(done: IO[bytes], directory: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - our own program, no shell
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_INSIDE), directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
            pass_fds=[done.fileno()],
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxUnavailable(f"no process could be started: {error}") from error


def _talk(
    process: subprocess.Popen[bytes], given: bytes, limits: Limits, cancelled: Callable[[], bool]
) -> tuple[str, bool]:
    """Hand the program over and read what it prints; returns that, and whether it ended before anybody ended it."""
    pipe_in, pipe_out = process.stdin, process.stdout
    assert pipe_in is not None  # noqa: S101 - they were asked for
    assert pipe_out is not None  # noqa: S101
    with suppress(OSError), closing(pipe_in):
        pipe_in.write(given)
    end = time.monotonic() + limits.seconds + _GRACE_S  # the keeper itself stops the program in time
    out = bytearray()
    os.set_blocking(pipe_out.fileno(), False)
    with selectors.DefaultSelector() as selector, pipe_out:
        selector.register(pipe_out, selectors.EVENT_READ)
        while len(out) < limits.output_bytes:
            if time.monotonic() > end or cancelled():
                return _text(out), False
            if selector.select(0.05):
                chunk = pipe_out.read(limits.output_bytes - len(out))
                if chunk == b"":
                    break
                out += chunk or b""
            elif process.poll() is not None:
                break
    return _text(out), len(out) < limits.output_bytes


def _finish(process: subprocess.Popen[bytes]) -> int:
    """End the keeper, and with it all that it keeps; returns its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def _text(data: bytes | bytearray) -> str:
    return bytes(data).decode("utf-8", "replace")
