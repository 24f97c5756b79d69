"""How a staging table is refreshed: in place, or by a swap. Takes any staging table."""

from typing import Any, NamedTuple

# From how many pending rows on a union takes less time than a merge, as a share of the table's rows. Measured: 0.3 at
# 1 million rows, 0.5 at 100 thousand (docs/performance.md). A merge also spares readers the lock of a swap.
UNION_FROM = 0.3

# Kind: when it is chosen, for the graph.
REFRESHES = {"swap": "none applied yet", "union": "many rows pending", "merge": "few rows pending"}
# And what it does, where no script of the table's own says so.
UNION = """The newest version of each key among the table's rows and the loads not yet applied, swapped in: the function
stg.union_pending. Its cost follows the table, not the history."""
MERGE = """The newest version of each key among the loads not yet applied, where it is newer, in place: the function
stg.merge_pending. Its cost follows the new batch. No reader waits for it or gets an error."""
# As sql/transforms/stg.TABLE.sql, for the kinds that a function makes of any table.
SCRIPT = """BEGIN;
SET LOCAL transaction_isolation = 'read committed'; -- so that each statement looks at raw after the lock, not before
SELECT loads_to_apply, rows FROM stg.{kind}_pending('{table}');
COMMIT;
-- After the commit, so that nobody waits for it.
SELECT stg.analyze_if_stale('{table}') AS is_analyzed;
"""
STATUS = """
SELECT has_applied_loads, pending_loads, pending_rows, table_rows
FROM stg.refresh_status
WHERE table_name = %s
"""


class Refresh(NamedTuple):
    """:param kind: swap (from all of raw), union (swap of the previous rows and the pending loads), or merge.
    :param why: one phrase for people.
    """

    kind: str
    why: str


def refresh_script(kind: str, table: str) -> str:
    """The SQL of a refresh, for SQLExecuteQueryOperator.

    :param kind: one of REFRESHES.
    :param table: the staging table, without its schema.
    """
    return f"{{% include 'stg.{table}.sql' %}}" if kind == "swap" else SCRIPT.format(kind=kind, table=table)


def cheapest_refresh(hook: Any, table: str, asked: str) -> Refresh:
    """Choose the cheapest refresh that is right.

    :param hook: of the warehouse, with `get_first`.
    :param table: the staging table, without its schema.
    :param asked: the DAG's param `refresh`: a kind, or "auto".
    :raises ValueError: stg.table_versions does not know the table.
    """
    status = hook.get_first(STATUS, parameters=(table,))
    if status is None:
        raise ValueError(f"stg.table_versions has no row for {table}")
    has_applied_loads, loads, pending, rows = status
    waiting = f"{counted(pending, 'row')} of {counted(loads, 'load')} pending, the table has about {rows:,}"
    if asked != "auto":
        refresh = Refresh(asked, f"asked for; {waiting}")
    elif not has_applied_loads:
        refresh = Refresh("swap", f"no load has been applied yet; {waiting}")
    elif pending and pending >= UNION_FROM * rows:
        refresh = Refresh("union", f"many; {waiting}")
    else:
        refresh = Refresh("merge", f"few; {waiting}")
    return refresh


def counted(number: int, thing: str) -> str:
    """Such as "1 row" or "2,000 rows"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def refresh_counts(cursor: Any) -> Any:
    """What a transform did, from the results of its statements.

    :return: `loads` that it took in; `rows` published by a swap, inserted or updated by a merge.
    """
    counts = {"loads": 0, "rows": 0}
    while True:
        if (cursor.statusmessage or "").startswith("INSERT"):
            counts["rows"] = cursor.rowcount
        names = [column.name for column in cursor.description or ()]
        if names[:1] == ["loads_to_apply"]:
            counts["loads"], *rows = cursor.fetchone()
            counts["rows"] = rows[0] if rows else 0
        if not cursor.nextset():
            return counts
