"""Check what is pending before a staging table takes it in: SQL files that return offending rows. Imports no Airflow.

    sql/checks/NAME.SEVERITY.sql                asked of every staging table
    sql/checks/stg.TABLE.NAME.SEVERITY.sql      asked of this one

A check is one SELECT: no row is good. It sees all of the warehouse as the pipeline role; the loads that are about to
be taken in are a bigint[] in the setting de_dw.loads_to_apply, and de_dw.table names the staging table. Severity `fail`
stops the refresh, `warn` does not. What a constraint of the raw table can say needs no check: it stops a record at the
door.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from psycopg import Connection, Cursor, Error
from psycopg.rows import tuple_row

log = logging.getLogger(__name__)

SEVERITIES = ("fail", "warn")
# Of the offending rows, so many are kept and shown, and of each so many characters.
EXAMPLES = 20
EXAMPLE_CHARACTERS = 2_000

ASK = """
WITH offending AS MATERIALIZED (
{}
)

SELECT
    (SELECT count(*) FROM offending) AS offending,
    left(row_to_json(offending.*)::text, {}) AS example
FROM offending
LIMIT {}
"""
KEEP = """
INSERT INTO ops.check_results (table_name, check_name, severity, batch_id, load_ids, offending, examples, is_accepted)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""


class Check(NamedTuple):
    """:param name: unique among the checks of a table.
    :param severity: fail or warn.
    :param path: the file with the SELECT.
    """

    name: str
    severity: str
    path: Path


@dataclass(frozen=True)
class Result:
    """How a check came out.

    :param name: of the check.
    :param severity: fail or warn.
    :param offending: rows that it found.
    :param examples: up to EXAMPLES of these rows, as JSON objects.
    :param is_accepted: the run was told to go on in spite of it.
    """

    name: str
    severity: str
    offending: int
    examples: list[str]
    is_accepted: bool

    @property
    def outcome(self) -> str:
        """passed, warned, accepted or failed, as in ops.last_checks."""
        if not self.offending:
            return "passed"
        if self.severity == "warn":
            return "warned"
        return "accepted" if self.is_accepted else "failed"


def find_checks(folder: Path, table: str) -> list[Check]:
    """The checks of a staging table, by name.

    :param folder: sql/checks. Names that begin with a dot are nobody's.
    :param table: the staging table, without its schema.
    :raises ValueError: there is no such folder, something in it is not called like a check, or two checks have one
        name. A check that nobody asks would look like one that finds nothing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder, so nothing would be checked")
    checks: dict[str, Check] = {}
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        parts = path.name.split(".")
        if len(parts) not in (3, 5) or parts[-1] != "sql" or parts[-2] not in SEVERITIES or not path.is_file():
            raise ValueError(
                f"{path}: a check is called NAME.SEVERITY.sql, or stg.TABLE.NAME.SEVERITY.sql for one table; "
                f"severities are {', '.join(SEVERITIES)}"
            )
        *target, name, severity, _ = parts
        if target and not (folder.parent / "transforms" / f"{'.'.join(target)}.sql").exists():
            raise ValueError(f"{path}: sql/transforms/ makes no table {'.'.join(target)}")
        if target and target != ["stg", table]:
            continue
        if name in checks:
            raise ValueError(f"{path}: there is a check of this name already, {checks[name].path.name}")
        checks[name] = Check(name, severity, path)
    return sorted(checks.values())


def check_pending(
    conn: Connection[Any],
    *,
    table: str,
    checks: Collection[Check],
    batch_id: str | None = None,
    accept: Collection[str] = (),
) -> tuple[list[int], list[Result]]:
    """Make the checks, and keep how they came out in ops.check_results, in the caller's transaction.

    :param conn: in a READ COMMITTED transaction, or about to begin one. The caller commits, whatever the results are.
    :param table: the staging table, without its schema.
    :param batch_id: whose run it is, for ops.check_results.
    :param accept: names of checks of severity fail that may find rows.
    :return: the load_id of each load that was looked at, and the results. When nothing is pending, both are empty.
    :raises ValueError: accept names a check that there is not.
    :raises psycopg.Error: a check is no SELECT that runs; or another refresh of the table is at work for 10 minutes.
    """
    if unknown := sorted(set(accept) - {check.name for check in checks if check.severity == "fail"}):
        known = ", ".join(check.name for check in checks if check.severity == "fail")
        raise ValueError(f"no check of severity fail is called {', '.join(unknown)}: there are {known or 'none'}")
    with Cursor(conn, row_factory=tuple_row) as cur:
        cur.execute("SET LOCAL TimeZone = 'UTC'")
        # What a refresh would find now, in the same words; and no refresh comes in between.
        cur.execute("SELECT stg.begin_refresh(%s)", (table,))
        cur.execute("SELECT current_setting('de_dw.loads_to_apply')::bigint[]")
        (loads,) = cur.fetchone() or ([],)
        results = [_ask(cur, table, check, loads, accept) for check in checks] if loads else []
        for result in results:
            examples = f"[{', '.join(result.examples)}]"
            kept = (batch_id, loads, result.offending, examples, result.is_accepted)
            cur.execute(KEEP, (table, result.name, result.severity, *kept))
    return loads, results


def _ask(cur: Cursor[Any], table: str, check: Check, loads: list[int], accept: Collection[str]) -> Result:
    try:
        query = check.path.read_text(encoding="utf-8-sig").rstrip().removesuffix(";")
        with cur.connection.transaction():
            # Each on its own: it can't write, nor change what the next one sees.
            cur.execute("SELECT set_config('de_dw.loads_to_apply', %s::bigint[]::text, true)", (loads,))
            cur.execute("SELECT set_config('de_dw.table', %s, true)", (table,))
            cur.execute("SET LOCAL transaction_read_only = on")
            cur.execute(ASK.format(query, EXAMPLE_CHARACTERS + 1, EXAMPLES).encode())
            found = cur.fetchall()
    except (Error, UnicodeError) as error:
        error.add_note(f"in {check.path}, whose first line is line 3 of the statement")
        raise
    examples = [
        text if len(text) <= EXAMPLE_CHARACTERS else json.dumps({"cut off": text[:EXAMPLE_CHARACTERS]})
        for _, text in found
    ]
    is_accepted = bool(found) and check.severity == "fail" and check.name in accept
    result = Result(check.name, check.severity, found[0][0] if found else 0, examples, is_accepted)
    level = {"passed": logging.INFO, "failed": logging.ERROR}.get(result.outcome, logging.WARNING)
    log.log(level, "check %s (%s) %s%s", result.name, result.severity, result.outcome, _shown(result))
    return result


def _shown(result: Result) -> str:
    if not result.offending:
        return ""
    rows = "\n".join(f"    {example}" for example in result.examples)
    more = result.offending - len(result.examples)
    return f": {result.offending:,} offending\n{rows}" + (f"\n    ... and {more:,} more" if more else "")
