"""What a server's operator allows jobs to do beyond reading files below the roots: run code, ask services, use secrets."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from optimizer.errors import InvalidInput
from optimizer.spec import Strict

SECRET_PREFIX = "MERGEOPT_SECRET_"  # noqa: S105 - a name, no secret


class Policy(Strict):
    """What jobs may do; plain data that travels to every worker. By default nothing."""

    entry_points: tuple[str, ...] = Field(
        default=(), description="Functions that objectives may call, as `package.module:function`."
    )
    task_code: bool = Field(default=False, description="Whether task files of a harness may run code of their own.")
    code_execution: bool = Field(
        default=False, description="Whether answers that are programs may be run, in a sandbox, to grade them."
    )
    hosts: tuple[str, ...] = Field(
        default=(), description="Services that objectives may ask, as `host` (its usual port) or `host:port`."
    )
    private_hosts: bool = Field(
        default=False, description="Whether an allowed host may have a loopback, private or link-local address."
    )
    secrets_dir: Path | None = Field(default=None, description="Directory with a file for each secret, named like it.")

    def secret(self, name: str, field: str) -> str:
        """Return a secret by its name: the environment variable MERGEOPT_SECRET_name, or the file of ``secrets_dir``.

        It is looked up where it is used, and must go nowhere else: not into specs, logs, results or errors.

        Args:
            name: letters, digits, ``_`` and ``-``.
            field: dotted path of the field that names it.

        Raises:
            InvalidInput: there is no such secret.
        """
        found = os.environ.get(SECRET_PREFIX + name.replace("-", "_").upper())
        if found is None and self.secrets_dir is not None and name.replace("_", "").replace("-", "").isalnum():
            file = self.secrets_dir / name
            found = file.read_text().strip() if file.is_file() else None
        if not found:
            raise InvalidInput(
                f"the server has no secret {name!r}",
                field=field,
                remedy=f"set the environment variable {SECRET_PREFIX}{name.replace('-', '_').upper()} of its workers",
            )
        return found
