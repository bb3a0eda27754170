"""The audit log: who asked for what and when, one JSON object a line, only ever appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from optimizer.errors import Unavailable


class Audit:
    """An append-only file of what clients did: names, fingerprints and costs, never content or secrets.

    Each entry is written with one call to the system, so that lines of several processes do not mix. An action that
    cannot be recorded is refused: `Unavailable`.

    Args:
        path: of the file; it is made readable for its owner only.
        clock: what time it is.
    """

    def __init__(self, path: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path = path
        self._clock = clock
        self._lock = Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, action: str, **entry: Any) -> None:
        """Append an entry; what is None is left out.

        Args:
            action: ``session.open``, ``evaluation.done``, …
            entry: plain data.
        """
        known = {name: value for name, value in entry.items() if value is not None}
        line = json.dumps({"at": self._clock().isoformat(timespec="milliseconds"), "action": action} | known)
        try:
            with self._lock:
                file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    os.write(file, line.encode() + b"\n")
                finally:
                    os.close(file)
        except OSError as error:
            raise Unavailable(
                "the audit log cannot be written, so nothing is done", remedy="the owner finds the cause in its log"
            ) from error
