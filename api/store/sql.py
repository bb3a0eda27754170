"""The run store on SQLite or PostgreSQL: `optimizer.ports.RunStore` and `api.store.ports.JobStore` in one object."""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

import migrations
from api.store.candidates import Candidates
from api.store.exports import Exports
from api.store.jobs import Jobs
from api.store.runs import Runs
from api.store.tokens import Tokens
from optimizer.errors import Unavailable


class SqlStore(Runs, Jobs, Candidates, Exports, Tokens):
    """The run store. Safe to share between threads; each process makes its own, also after a fork.

    Args:
        url: ``sqlite:///file`` or ``postgresql://…``; the database is migrated, see `migrations.upgrade`.
        on_commit: called with ``"before:<operation>"`` and ``"after:<operation>"`` around each commit of a controller's
            operation; for crash tests.

    Raises:
        InvalidInput: the URL cannot be used.
    """

    def ping(self) -> None:
        """Raise `Unavailable` if the database cannot be reached or is not at the newest migration."""
        try:
            with self.engine.connect() as connection:
                revision = migrations.revision_of(connection)
        except SQLAlchemyError as error:
            # Only the driver's own words: the statement and the URL are nobody's business.
            cause = getattr(error, "orig", None) or type(error).__name__
            raise Unavailable(f"the database cannot be reached: {cause}", remedy="is it running?") from error
        if revision != migrations.head():
            raise Unavailable(
                f"the database is at revision {revision or 'none'}, this program needs {migrations.head()}",
                remedy="run `mergeopt db upgrade`",
            )
