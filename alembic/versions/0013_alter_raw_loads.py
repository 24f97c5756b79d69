"""alter raw.loads"""

from sql_pair import run

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

# The work is in sql/ddl/, in the two files with this file's name. Say there what the table is, one row per what;
# name constraints after their rules; comment every column; lock nothing for long. A migration that has landed is
# never edited. `alembic upgrade head --sql` prints what will run, `make lint` and `make test` check it:
# up, down and up again must give the same schema.


def upgrade() -> None:
    run(__file__, "up")


def downgrade() -> None:
    run(__file__, "down")
