"""What evaluations cost, beside time.

Revision: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    for table in ("jobs", "candidates"):
        op.add_column(table, sa.Column("cost", sa.JSON(), nullable=True))


def downgrade() -> None:
    for table in ("candidates", "jobs"):
        op.drop_column(table, "cost")
