"""Scores of items that are kept across candidates and jobs; verifications on test items; races.

Revision: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.create_table(
        "item_lists",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("items", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_item_lists_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "digest", name="pk_item_lists"),
    )
    op.create_table(
        "remembered_scores",
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("measure", sa.String(length=64), nullable=False),
        sa.Column("item_list", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("values", sa.LargeBinary(), nullable=False),
        sa.Column("weights", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_remembered_scores_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("fingerprint", "measure", "item_list", name="pk_remembered_scores"),
    )
    op.create_index("ix_remembered_scores_job_id", "remembered_scores", ["job_id"])
    for name in ("to_verify", "verified"):
        op.add_column("jobs", sa.Column(name, sa.Integer(), server_default=sa.text("0"), nullable=False))
    for column in (
        sa.Column("rivals", sa.JSON(), nullable=True),
        sa.Column("stopped", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("errors", sa.JSON(), nullable=True),
        sa.Column("estimated", sa.Boolean(), server_default=sa.false(), nullable=False),
    ):
        op.add_column("candidates", column)
    op.add_column("jobs", sa.Column("anchors", sa.JSON(), nullable=True))
    op.create_table(
        "verifications",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("search", sa.JSON(), nullable=False),
        sa.Column("test", sa.JSON(), nullable=False),
        sa.Column("overfitted", sa.JSON(), nullable=False),
        sa.Column("failure", sa.JSON(), nullable=True),
        sa.Column("seconds", sa.JSON(), nullable=False),
        sa.Column("cost", sa.JSON(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('waiting', 'completed', 'failed')", name=op.f("ck_verifications_state")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_verifications_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "index", name="pk_verifications"),
    )
    op.create_table(
        "test_scores",
        sa.Column("job_id", sa.String(length=32), nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("objective", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("values", sa.LargeBinary(), nullable=False),
        sa.Column("weights", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_test_scores_job_id_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "index", "objective", name="pk_test_scores"),
    )


def downgrade() -> None:
    op.drop_table("test_scores")
    op.drop_table("verifications")
    op.drop_column("jobs", "anchors")
    for name in ("estimated", "errors", "stopped", "rivals"):
        op.drop_column("candidates", name)
    for name in ("verified", "to_verify"):
        op.drop_column("jobs", name)
    op.drop_table("remembered_scores")
    op.drop_table("item_lists")
