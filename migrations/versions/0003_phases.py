"""Phases, partial evaluations, slopes, and the order in which outcomes were recorded.

Revision: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

_BASELINES = "origin != 'algorithm'"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("grams", sa.JSON(), nullable=True))
    for column in (
        sa.Column("phase", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("items", sa.Integer(), nullable=True),
        sa.Column("slopes", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("recorded", sa.Integer(), nullable=True),
    ):
        op.add_column("candidates", column)
    _index("baselines", f"{_BASELINES} OR label IS NOT NULL", replace=True)
    _index("partial", "items IS NOT NULL")
    op.create_table(
        "slopes",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("shape", sa.JSON(), nullable=False),
        sa.Column("values", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_slopes_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "index", name="pk_slopes"),
    )


def downgrade() -> None:
    op.drop_table("slopes")
    op.drop_index("ix_candidates_partial", "candidates")
    _index("baselines", _BASELINES, replace=True)
    for column in ("recorded", "slopes", "items", "phase"):
        op.drop_column("candidates", column)
    op.drop_column("jobs", "grams")


def _index(name: str, where: str, *, replace: bool = False) -> None:
    """Make an index of the job's candidates of one kind."""
    if replace:
        op.drop_index(f"ix_candidates_{name}", "candidates")
    condition = sa.text(where)
    op.create_index(
        f"ix_candidates_{name}",
        "candidates",
        ["job_id", "index"],
        sqlite_where=condition,
        postgresql_where=condition,
    )
