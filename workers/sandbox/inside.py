"""Runs a program that nobody trusts. Started by `workers.sandbox` in an interpreter of its own; imports nothing else.

The first process here, the keeper, only waits: it forks the process that locks itself in and runs the program, and ends
whatever that one leaves behind. The argument is an empty directory; a JSON object comes by standard input, see
`workers.sandbox.run`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

FAILED, LIMIT, BROKEN = 1, 2, 3
"""Exit codes of the keeper: the program failed, it was stopped at a limit, the sandbox could not be built."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_SEPARATE = {
    "mounts": 0x0002_0000,
    "names": 0x0400_0000,
    "ipc": 0x0800_0000,
    "pids": 0x2000_0000,
    "network": 0x4000_0000,
}
_USER_NAMESPACE = 0x1000_0000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DEATH_SIGNAL, _DUMPABLE, _SECCOMP, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 22, 36, 38
_DETACH = 2
_FIRST_USER = 0x7000_0000
"""Users that no system gives to anyone; one for each sandbox, so that the limit on processes counts only its own."""

_SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# Numbers of the system calls that a program may not make, on x86-64 and on 64-bit ARM.
_DENIED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "accept": (43, 202),
    "bind": (49, 200),
    "listen": (50, 201),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "mq_open": (240, 180),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
}
# Without a process table of its own, a program could signal the worker's other processes.
_SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
}
_CLONE, _CLONE3 = (56, 220), 435
_ALL_NAMESPACES = 0x7E02_0000
_ARCHITECTURES = {"x86_64": (0, 0xC000_003E), "aarch64": (1, 0xC000_00B7)}


def main() -> int:
    """Keep a program until it ends or must end; returns the exit code of the keeper."""
    given: dict[str, Any] = json.loads(sys.stdin.buffer.read())
    end = time.monotonic() + float(given["seconds"])
    signal.signal(signal.SIGTERM, _stop)
    try:
        apart = bool(given["namespaces"]) and _separate()
        if not apart:
            _call(_LIBC.prctl, _SUBREAPER, 1, 0, 0, 0)
    except OSError as error:
        return _broken(error)
    begun, begin = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(begun)
        _child(given, apart, begin)
    os.close(begin)
    try:
        code = _wait(child, end)
    finally:
        _end_all(child, apart)
    return code if os.read(begun, 1) or code == LIMIT else BROKEN


def _broken(error: BaseException) -> int:
    print(f"the sandbox cannot be built: {error!r}", file=sys.stderr)
    return BROKEN


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _wait(child: int, end: float) -> int:
    """Wait for the program's first process; returns the keeper's exit code."""
    try:
        while time.monotonic() < end:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return _verdict(status)
            time.sleep(0.005)
    except KeyboardInterrupt:
        pass
    return LIMIT


def _verdict(status: int) -> int:
    if os.WIFSIGNALED(status):
        return LIMIT if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else FAILED
    code = os.waitstatus_to_exitcode(status)
    return code if code in (0, LIMIT) else FAILED


def _end_all(child: int, apart: bool) -> None:
    """Kill every process that the program left.

    With the first process of a table of its own, the kernel ends all others of it. Elsewhere those whose parents died are
    children of the keeper; all are stopped before any is killed, so that they cannot fork faster than they die.
    """
    for _ in range(1000):
        for process in [child] if apart else _stopped():
            _signal(process, signal.SIGKILL)
        if _reap():
            return


def _reap() -> bool:
    """Wait a little for children that ended; returns whether none is left."""
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        try:
            found, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if not found:
            time.sleep(0.002)
    return False


def _stopped() -> set[int]:
    """Stop all descendants of this process, those that they fork meanwhile too; returns them."""
    stopped: set[int] = set()
    while found := _descendants() - stopped:
        for process in found:
            _signal(process, signal.SIGSTOP)
        stopped |= found
    return stopped


def _descendants() -> set[int]:
    """The children of this process and their descendants, from the process table."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(name))
    out: set[int] = set()
    stack = [os.getpid()]
    while stack:
        found = children.get(stack.pop(), [])
        stack += [process for process in found if process not in out]
        out.update(found)
    return out


def _signal(process: int, number: int) -> None:
    with suppress(OSError):
        os.kill(process, number)


def _separate() -> bool:
    """Ask for a network, process table, file tree and so on of its own; returns whether the kernel gave them."""
    flags = sum(_SEPARATE.values())
    user, group = os.geteuid(), os.getegid()
    if user == 0 and _call(_LIBC.unshare, flags, check=False):
        return True
    if not _call(_LIBC.unshare, flags | _USER_NAMESPACE, check=False):
        return False
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{user} {user} 1")
    _write("/proc/self/gid_map", f"{group} {group} 1")
    return True


def _child(given: Mapping[str, Any], apart: bool, begin: int) -> None:
    """Lock this process in and run the program; never returns."""
    code = BROKEN
    try:
        work = sys.argv[1]
        if apart:
            work = _new_root(work, int(given["file_bytes"]))
        os.chdir(work)
        _limit(given, apart)
        _drop_rights(apart)
        _deny_calls(apart)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.write(begin, b".")
        os.close(begin)
        code = _execute(given)
    except BaseException as error:  # noqa: BLE001 - nothing may leave this function
        _broken(error)
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _execute(given: Mapping[str, Any]) -> int:
    """Run the parts of a program one after the other in one namespace; the token is written when the last one ended."""
    done, token = int(given["done"]), str(given["token"]).encode()
    namespace: dict[str, Any] = {"__name__": "answer", "__builtins__": __builtins__}
    parts = list(given["parts"])
    del given
    try:
        for number, part in enumerate(parts):
            exec(compile(part, f"<part {number}>", "exec"), namespace)  # noqa: S102 - this is what the sandbox is for
    except MemoryError:
        return LIMIT
    except BaseException as error:  # noqa: BLE001 - SystemExit is a failure too: nothing was checked after it
        with suppress(BaseException):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    os.write(done, token)
    return 0


def _new_root(work: str, size: int) -> str:
    """Enter a file tree that has the interpreter and the system's libraries, read only, and an empty directory in memory.

    Args:
        work: an empty directory that the tree is built in.
        size: bytes that files may take together.

    Returns:
        The working directory in the new tree.
    """
    _call(_LIBC.mount, b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)
    options = f"size={size + 1024 * 1024},nr_inodes=2000,mode=755".encode()
    _call(_LIBC.mount, b"tmpfs", work.encode(), b"tmpfs", ctypes.c_ulong(_NO_SUID | _NO_DEVICES), options)
    for path in _visible():
        _show(path, work)
    for path in _DEVICES:
        _show(path, work, read_only=False)
    os.mkdir(f"{work}/work")
    os.chmod(f"{work}/work", 0o777)
    os.mkdir(f"{work}/.old")
    os.symlink("/work", f"{work}/tmp")
    os.chdir(work)
    _call(_LIBC.syscall, ctypes.c_long((155, 41)[_architecture()[0]]), b".", b".old")  # pivot_root
    os.chdir("/")
    _call(_LIBC.umount2, b"/.old", _DETACH)
    os.rmdir("/.old")
    return "/work"


def _visible() -> list[str]:
    """Directories that the interpreter needs, none inside another."""
    wanted = {*_SYSTEM, sys.base_prefix, sys.base_exec_prefix, *(path for path in sys.path if os.path.isdir(path))}
    wanted.discard(os.path.dirname(os.path.abspath(__file__)))
    found = sorted(path for path in wanted if os.path.isdir(path))
    return [path for path in found if not any(path.startswith(f"{other}/") for other in found)]


def _show(path: str, root: str, *, read_only: bool = True) -> None:
    """Make a file or directory visible under a new root."""
    target = root + path
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    elif os.path.exists(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb"):
            pass
    else:
        return
    _call(_LIBC.mount, path.encode(), target.encode(), None, ctypes.c_ulong(_BIND | _RECURSIVE), None)
    if read_only:
        flags = _REMOUNT | _BIND | _READ_ONLY | _NO_SUID | _NO_DEVICES
        if not _call(_LIBC.mount, b"none", target.encode(), None, ctypes.c_ulong(flags), None, check=False):
            # Flags that the original mount has may not be taken away from it by an ordinary user.
            flags |= _kept(path)
            _call(_LIBC.mount, b"none", target.encode(), None, ctypes.c_ulong(flags), None)


def _kept(path: str) -> int:
    return os.statvfs(path).f_flag & (_NO_SUID | _NO_DEVICES | 8 | 1024 | 2048 | (1 << 21))


def _limit(given: Mapping[str, Any], apart: bool) -> None:
    limits = {
        resource.RLIMIT_CPU: int(given["cpu_seconds"]),
        resource.RLIMIT_AS: int(given["memory_bytes"]),
        resource.RLIMIT_FSIZE: int(given["file_bytes"]),
        resource.RLIMIT_NOFILE: int(given["open_files"]),
        # Where the user stays the worker's, all of that user's processes count.
        resource.RLIMIT_NPROC: int(given["processes"]) + (0 if apart or os.geteuid() == 0 else _threads_of_user()),
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: 16 * 1024 * 1024,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, limit in limits.items():
        _, hard = resource.getrlimit(kind)
        allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (allowed, allowed))


def _threads_of_user() -> int:
    count = 0
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdecimal() and os.stat(f"/proc/{name}").st_uid == os.geteuid():
                count += len(os.listdir(f"/proc/{name}/task"))
    return count


def _drop_rights(apart: bool) -> None:
    """Become a user who owns nothing where this process may, and give up every capability."""
    if os.geteuid() == 0:
        _become_nobody()
    _call(_LIBC.capset, struct.pack("Ii", 0x2008_0522, 0), bytes(24))
    _call(_LIBC.prctl, _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call(_LIBC.prctl, _DUMPABLE, 0, 0, 0, 0)
    if apart:  # should the keeper be killed, the program goes too
        _call(_LIBC.prctl, _DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)


def _become_nobody() -> None:
    own = _FIRST_USER + (time.monotonic_ns() // 1000 + os.getpid()) % 0x0FFF_FFFF
    for user in (own, 65534):
        with suppress(OSError):  # the container has no such user, or this root may not change users
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return


def _deny_calls(apart: bool) -> None:
    """Let the kernel refuse system calls: sockets, other processes' memory, mounts, and what is known for its holes."""
    column, number = _architecture()
    denied = {**_DENIED, **({} if apart else _SIGNALS)}
    program = _filter([calls[column] for calls in denied.values()], _CLONE[column], number, x32=column == 0)
    buffer = ctypes.create_string_buffer(b"".join(program))
    pointer = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    _call(_LIBC.prctl, _SECCOMP, 2, pointer, 0, 0)


def _filter(denied: Iterable[int], clone: int, architecture: int, *, x32: bool) -> list[bytes]:
    """A classic BPF program over struct seccomp_data: the call's number at 0, the architecture at 4, arguments from 16."""
    refuse, missing = _instruction(0x06, 0x0005_0001), _instruction(0x06, 0x0005_0026)  # EPERM, ENOSYS
    allow = _instruction(0x06, 0x7FFF_0000)
    load_number = _instruction(0x20, 0)
    program = [_instruction(0x20, 4), _instruction(0x15, architecture, 1, 0), refuse, load_number]
    if x32:
        program += [_instruction(0x35, 0x4000_0000, 0, 1), refuse]
    for number in denied:
        program += [_instruction(0x15, number, 0, 1), refuse]
    # clone3 hides its flags from filters; without it the C library uses clone.
    program += [_instruction(0x15, _CLONE3, 0, 1), missing]
    program += [
        _instruction(0x15, clone, 0, 3),
        _instruction(0x20, 16),
        _instruction(0x45, _ALL_NAMESPACES, 0, 1),
        refuse,
    ]
    return [*program, allow]


def _instruction(code: int, value: int, matches: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, matches, otherwise, value)


def _architecture() -> tuple[int, int]:
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(f"there is no list of system calls for {machine}")
    return _ARCHITECTURES[machine]


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _call(function: Callable[..., int], *arguments: Any, check: bool = True) -> bool:
    """Call a function of the C library; returns whether it succeeded."""
    if function(*arguments) == 0:
        return True
    if check:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")
    return False


if __name__ == "__main__":
    sys.exit(main())
