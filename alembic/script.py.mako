"""${message}"""

from sql_pair import run

revision = "${up_revision}"
down_revision = ${f'"{down_revision}"' if isinstance(down_revision, str) else repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}

# The work is in sql/ddl/, in the two files with this file's name. Say there what the table is, one row per what;
# name constraints after their rules; comment every column; lock nothing for long. A migration that has landed is
# never edited. `alembic upgrade head --sql` prints what will run, `make lint` and `make test` check it:
# up, down and up again must give the same schema.


def upgrade() -> None:
    run(__file__, "up")


def downgrade() -> None:
    run(__file__, "down")
