"""A revision and its two SQL files: alembic/versions/0002_x.py runs sql/ddl/0002_x.up.sql and 0002_x.down.sql.

Run as a program with the path of a new revision it writes the two files; alembic.ini calls it after
`alembic revision`.
"""

import sys
from pathlib import Path
from typing import Literal

DDL = Path(__file__).resolve().parents[1] / "sql" / "ddl"

ADVICE = """\
-- TABLE: one row per GRAIN, from SOURCE.  <- what this migration makes or changes, then delete these lines.
--
-- Runs in a transaction of its own, with a lock_timeout: no BEGIN, no COMMIT, no CREATE INDEX CONCURRENTLY.
-- Name every constraint after its rule (quantity_is_positive) and comment every table and column.
-- A column of stg.x_latest is added to stg.x_latest, which takes its partition _live along, and to the _spare; its
-- comment is put on all three, because comments are not taken along. docs/adding-a-dataset.md has the rest.
-- Once this file has landed it is never edited: the next change is the next migration.
"""
ADVICE_DOWN = """\
-- Undoes {up}, in reverse order.  <- say what is lost, then delete these lines.
--
-- What cannot be made again (anything in raw) is dropped only when it is empty or when
-- current_setting('de_dw.allow_data_loss', true) = 'yes': see 0002_create_raw_orders.down.sql.
"""


def run(revision_file: str, direction: Literal["up", "down"]) -> None:
    """Run the SQL file of a revision as it stands, or print it when Alembic was told --sql.

    :param revision_file: the revision's `__file__`; its stem is the stem of the SQL file.
    :param direction: which of the two files.
    :raises FileNotFoundError: the pair is not complete.
    :raises psycopg.Error: as the server said it; the migration's transaction is rolled back.
    """
    from alembic import op  # only within a migration, not when this file is the hook

    sql = (DDL / f"{Path(revision_file).stem}.{direction}.sql").read_text(encoding="utf-8")
    context = op.get_context()
    if context.as_sql:
        context.impl.static_output(sql.rstrip())
        return
    # Straight to the driver: op.execute would take ":word" for a parameter and double every "%".
    op.get_bind().connection.cursor().execute(sql)


def create(revision_file: Path) -> tuple[Path, Path]:
    """Write the empty SQL pair of a new revision and return the two paths.

    :raises FileExistsError: one of them is there already; nothing is overwritten.
    """
    up = DDL / f"{revision_file.stem}.up.sql"
    down = DDL / f"{revision_file.stem}.down.sql"
    with up.open("x", encoding="utf-8") as file:
        file.write(ADVICE)
    with down.open("x", encoding="utf-8") as file:
        file.write(ADVICE_DOWN.format(up=up.name))
    return up, down


if __name__ == "__main__":
    for path in create(Path(sys.argv[1])):
        sys.stdout.write(f"  Generating {path} ...  done\n")
