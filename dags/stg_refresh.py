"""How a staging table is refreshed: in place, or by a swap; and what its tasks say of it. Takes any staging table."""

import logging
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

# From how many pending rows on a union takes less time than a merge, as a share of the table's rows. Measured: 0.3 at
# 1 million rows, 0.5 at 100 thousand (docs/performance.md). A merge also spares readers the lock of a swap.
UNION_FROM = 0.3

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
    waiting = f"{pending:,} rows of {loads:,} loads are pending, the table has about {rows:,}"
    if asked != "auto":
        refresh = Refresh(asked, f"asked for; {waiting}")
    elif not has_applied_loads:
        refresh = Refresh("swap", f"no load has been applied yet; {waiting}")
    elif pending and pending >= UNION_FROM * rows:
        refresh = Refresh("union", f"many; {waiting}")
    else:
        refresh = Refresh("merge", f"few; {waiting}")
    log.info("stg.%s: %s, because: %s", table, *refresh)
    return refresh


def rows_written(cursor: Any) -> Any:
    """Return the count of the last INSERT of a transform: rows published by a swap, inserted or updated by a merge."""
    rows = 0
    while True:
        if (cursor.statusmessage or "").startswith("INSERT"):
            rows = cursor.rowcount
        if not cursor.nextset():
            return rows


def report_refresh(context: Any, rows: int) -> None:
    """Say what a refresh did: in its log, and with the event of its asset."""
    (table,) = context["task"].outlets
    (chooser,) = context["task"].upstream_task_ids
    kind, why = context["ti"].xcom_pull(task_ids=chooser, key="refresh")
    context["task"].log.info("%s: %s, %s rows written; %s", table.name, kind, f"{rows:,}", why)
    context["outlet_events"][table].extra = {"rows": rows, "refresh": kind, "why": why}


def differences(cursor: Any) -> Any:
    """Return the counts of a verify script, by name.

    :raises AirflowFailException: one of them, but for `compared`, is not 0. To try again would not help.
    """
    from airflow.sdk.exceptions import AirflowFailException  # which reads Airflow's settings: not for every importer

    counts = dict(zip((column.name for column in cursor.description), cursor.fetchone(), strict=True))
    if any(count for name, count in counts.items() if name != "compared"):
        found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        raise AirflowFailException(
            f"the staging table is not what a full refresh would make of raw: {found}. Trigger the DAG that refreshes "
            f"it with refresh set to swap, which makes it anew, and find out who else writes to schema stg"
        )
    return counts
