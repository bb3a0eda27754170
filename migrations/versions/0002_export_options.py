"""Exports remember how they are to be written.

Revision: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    op.add_column("exports", sa.Column("options", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("exports", "options")
