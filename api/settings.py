"""The one settings table: name, default, help. Every setting comes from the environment or from a command's option."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from optimizer.errors import InvalidInput

PREFIX = "MERGEOPT_"
DEFAULT_HOME = Path(".mergeopt")

Paths = Annotated[list[Path], NoDecode]
Names = Annotated[list[str], NoDecode]
LogLevel = Literal["debug", "info", "warning", "error"]


def _database(values: dict[str, Any]) -> str:
    return f"sqlite:///{values.get('home', DEFAULT_HOME)}/mergeopt.db"


def _exports(values: dict[str, Any]) -> Path:
    return Path(values.get("home", DEFAULT_HOME)) / "exports"


def _cache(values: dict[str, Any]) -> Path:
    return Path(values.get("home", DEFAULT_HOME)) / "cache"


class Settings(BaseSettings):
    """What a process of the service needs to know; immutable once made.

    Paths become absolute when the settings are made, because workers run in other directories.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True, extra="forbid")

    home: Path = Field(default=DEFAULT_HOME, description="Directory for everything the service keeps.")
    database_url: str = Field(
        default_factory=_database,
        repr=False,  # may hold a password
        description="SQLAlchemy URL of the run store: SQLite, or `postgresql+psycopg://…`.",
    )
    roots: Paths = Field(
        default=[Path()],
        min_length=1,
        description=(
            "Directories that checkpoints and data may be read from, separated by commas or the system's path separator."
        ),
    )
    exports_dir: Path = Field(default_factory=_exports, description="Where exported checkpoints are written.")
    cache_dir: Path = Field(
        default_factory=_cache,
        description=(
            "Where the workers of a machine keep what operators prepare, such as trim masks or SVDs; may be removed "
            "at any time. On a Ray cluster the same path on every node; local disks are best."
        ),
    )
    cache_gb: float = Field(
        default=100.0, gt=0, le=1e6, description="Largest size of `cache_dir` in GiB; the oldest answers go first."
    )
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; any other than a loopback address needs a token."
    )
    port: int = Field(default=8756, ge=0, le=65535, description="Port to listen on.")
    public_hosts: Names = Field(
        default=[],
        description="Host names under which a reverse proxy on this machine serves the service, separated by commas.",
    )
    require_token: Literal["auto", "always"] = Field(
        default="auto", description="`auto` lets requests from this machine in without a token; `always` does not."
    )
    max_body_bytes: int = Field(default=1024 * 1024, ge=1024, description="Largest request body in bytes.")
    pool: Literal["ray", "local"] = Field(
        default="ray", description="Where candidates are evaluated: on Ray, or in the controller's own process."
    )
    ray_address: str | None = Field(
        default=None, description="Address of an existing Ray cluster; none starts one on this machine."
    )
    entry_points: Names = Field(
        default=[], description="Functions that objectives may call, as `package.module:function`, separated by commas."
    )
    task_code: bool = Field(
        default=False, description="Whether evaluation harness task files may run code of their own."
    )
    code_execution: bool = Field(
        default=False, description="Whether generated programs may be run, in a sandbox, to grade them."
    )
    hosts: Names = Field(
        default=[],
        description="Services that jobs may ask, as `host` or `host:port`, separated by commas; none by default.",
    )
    private_hosts: bool = Field(
        default=False, description="Whether these services may have loopback, private or link-local addresses."
    )
    secrets_dir: Path | None = Field(
        default=None,
        description="Directory with a file for each secret that jobs name; MERGEOPT_SECRET_name variables come first.",
    )
    max_jobs: int = Field(default=1, ge=1, le=1000, description="Jobs that one controller runs at once.")
    lease_ttl_s: float = Field(
        default=30.0, gt=0, description="Seconds after which another controller may take over a job from a dead one."
    )
    poll_s: float = Field(default=0.2, gt=0, le=60, description="Seconds between looks into the store for news.")
    log_level: LogLevel = Field(default="info", description="Least severity that is logged.")
    url: str = Field(default="http://127.0.0.1:8756", description="Where commands and the client find the service.")
    token: SecretStr | None = Field(default=None, description="Access token that commands and the client send.")

    @property
    def cache_bytes(self) -> int:
        """Largest size of ``cache_dir``."""
        return int(self.cache_gb * 2**30)

    @property
    def always_require_token(self) -> bool:
        """Whether even requests from this machine need a token."""
        return self.require_token == "always"  # noqa: S105 - no secret

    @field_validator("roots", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        return _split(value, f"[,{re.escape(os.pathsep)}]")

    @field_validator("public_hosts", "hosts", "entry_points", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return _split(value, ",")

    @field_validator("home", "exports_dir", "cache_dir", "secrets_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("roots")
    @classmethod
    def _all_absolute(cls, value: list[Path]) -> list[Path]:
        return [path.expanduser().absolute() for path in value]


def _split(value: Any, separator: str) -> Any:
    return [part.strip() for part in re.split(separator, value) if part.strip()] if isinstance(value, str) else value


def load_settings(**overrides: Any) -> Settings:
    """Make the settings from the environment and ``overrides``, of which None means not given.

    Raises:
        InvalidInput: a value is wrong; the field is the environment variable's name.
    """
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise InvalidInput(first["msg"], field=env_name(name), remedy="see the table of settings") from error


def env_name(name: str) -> str:
    """Return the environment variable that sets ``name``."""
    return f"{PREFIX}{name}".upper()


def settings_table() -> list[tuple[str, str, str]]:
    """Return (environment variable, default, help) of every setting, in order."""
    return [(env_name(name), _shown(info), info.description or "") for name, info in Settings.model_fields.items()]


def _shown(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, list):
        return ",".join(str(part) for part in value)
    return "" if value is None else str(value)
