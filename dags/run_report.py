"""What the tasks of a run tell people: a sentence each, in the log, in XCom as `summary`, with their asset's event."""

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batch_check import Result
from stg_refresh import counted

log = logging.getLogger(__name__)


def say(ti: Any, summary: str) -> None:
    """Put the sentence into the log and into XCom."""
    log.info(summary)
    ti.xcom_push("summary", summary)


def task_states(ti: Any, *task_ids: str) -> dict[str, str | None]:
    """How far tasks of the run are: state by task_id, of a mapped one by task_id, _ and number.

    What they have pushed does not say it: of a run that was cleared it stays until a task begins anew, and of instances
    that are no longer there for good.
    """
    found: dict[str, dict[str, str | None]] = ti.get_task_states(
        dag_id=ti.dag_id, task_ids=list(task_ids), run_ids=[ti.run_id]
    )
    return found[ti.run_id]


def report_found(ti: Any, source: str, new: Sequence[Any], known: Sequence[Any], limit: int) -> None:
    """Say which files a run has before it.

    :param new: to load, of batch_source.new_files; of these one run takes as many as the limit.
    :param known: that the ledger has.
    """
    summary = f"{source}: {counted(len(new), 'file')} to load, {len(known):,} loaded before"
    if not new and not known:
        summary = f"{source}: no file is there, new or loaded before. Is the path right?"
    if len(new) > limit:
        summary += f". This run takes the first {limit:,}: run it again for the others"
    ti.xcom_push("known", [file.name for file in known])
    say(ti, summary)


def report_landed(ti: Any, table: str, files: Sequence[Any] | None, finder: str, loader: str) -> dict[str, Any]:
    """Say what became of each file of a run.

    :param files: that were to be loaded, each with its `name`.
    :param finder: the task that found them, with XCom `known`.
    :param loader: the mapped task that loaded them: its results, each with its `file`, and of those that failed XCom
        `refused`.
    :return: the summary, and how many files were loaded and loaded before.
    :raises AirflowFailException: not all of them are in.
    """
    from airflow.sdk.exceptions import AirflowFailException

    states = task_states(ti, finder, loader)
    if files is None or states.get(finder) != "success":
        raise AirflowFailException(f"{finder} did not come to its end: see there, or the task before it")
    done = [index for index in range(len(files)) if states.get(f"{loader}_{index}") == "success"]
    returned = zip(done, ti.xcom_pull(task_ids=[loader], map_indexes=done), strict=True)
    reports = [report for index, report in returned if report and report["file"] == files[index]["name"]]
    others = sorted({*range(len(files))} - {*done})
    refused = [message for message in ti.xcom_pull(task_ids=[loader], map_indexes=others, key="refused") if message]
    known = ti.xcom_pull(task_ids=finder, key="known") or []
    new = [report for report in reports if report["is_new"]]
    before = len(known) + len(reports) - len(new)
    lost = len(files) - len(reports) - len(refused)
    rejects = sum(report["rejects"] for report in new)
    brought = counted(sum(report["rows"] for report in new), "row") + (f", {rejects:,} rejected" if rejects else "")
    parts = [f"{len(new):,} loaded ({brought})"]
    parts += [f"{before:,} loaded before"] if before else []
    parts += [f"{len(refused):,} refused"] if refused else []
    parts += [f"{lost:,} not loaded, see load_raw"] if lost else []
    summary = f"{table}: {counted(len(files) + len(known), 'file')}: {', '.join(parts)}"
    say(ti, summary)
    for message in refused:
        log.error("refused: %s", message)
    if refused or lost:
        raise AirflowFailException(
            f"{summary}. What was loaded is published all the same. Why others were not is above"
        )
    return {"summary": summary, "loaded": len(new), "loaded_before": before}


def report_checks(ti: Any, table: str, loads: list[int], results: list[Result]) -> dict[str, Any]:
    """Say how the checks of a staging table came out.

    :param results: of `batch_check.check_pending`.
    :return: the summary; and as warnings a phrase for each check that warned or was accepted.
    :raises AirflowFailException: one failed. To try again would not help.
    """
    from airflow.sdk.exceptions import AirflowFailException  # which reads Airflow's settings: not for every importer

    found = {
        outcome: [f"{r.name} ({counted(r.offending, 'offending row')})" for r in results if r.outcome == outcome]
        for outcome in ("failed", "accepted", "warned")
    }
    passed = sum(result.outcome == "passed" for result in results)
    parts = [f"{passed} passed", *(f"{outcome}: {', '.join(names)}" for outcome, names in found.items() if names)]
    summary = (
        f"stg.{table}: {counted(len(results), 'check')} of {counted(len(loads), 'pending load')}: {'; '.join(parts)}"
    )
    if not loads:
        summary = f"stg.{table}: no load is pending, so there is nothing to check"
    warnings = found["warned"] + [f"{name}, accepted" for name in found["accepted"]]
    ti.xcom_push("outcomes", {result.name: result.outcome for result in results})
    say(ti, summary)
    if found["failed"]:
        # The UI folds what a failure callback logs, and does not wrap the exception: here it is seen.
        log.error("What to do: docs/operations.md, %s", ui_url("warehouse/docs/operations.md#a-check-is-red"))
        raise AirflowFailException(
            f"stg.{table} stays as it is, and what is pending waits: {', '.join(found['failed'])}. The rows are above "
            f"and in ops.check_results. Load a batch that corrects them, if one can; then run the DAG with the check "
            f"named in its param accept"
        )
    return {"summary": summary, "warnings": warnings}


def report_refresh(context: Any, counts: dict[str, int], *, table: Any, chooser: str, checker: str) -> None:
    """Say what a refresh did: its kind and why, how much, and what the checks before it warned of.

    :param table: the asset of the staging table.
    :param chooser: the task that chose the refresh, with XCom `refresh`: kind and why.
    :param checker: the task that made the checks, whose result is that of report_checks.
    """
    ti = context["ti"]
    # It is done by now. Who has marked the tasks before it as successful by hand must not make it red.
    kind, why = ti.xcom_pull(task_ids=chooser, key="refresh") or (ti.task_id.partition("_")[0], "chosen by hand")
    warnings = (ti.xcom_pull(task_ids=checker) or {"warnings": []})["warnings"]
    seconds = round((datetime.now(UTC) - ti.start_date).total_seconds(), 2)
    summary = (
        f"{table.name}: {kind} of {counted(counts['loads'], 'load')}, {counted(counts['rows'], 'row')} written in "
        f"{seconds:.1f} s; {why}"
    )
    say(ti, summary + (f"; warned: {', '.join(warnings)}" if warnings else ""))
    facts = {"refresh": kind, "why": why, "seconds": seconds, "warnings": warnings}
    context["outlet_events"][table].extra = {"summary": summary} | counts | facts


def differences(table: str, cursor: Any) -> Any:
    """Return the counts of a verify script, by name.

    :param table: the staging table, with its schema.
    :raises AirflowFailException: one of them, but for `compared`, is not 0. To try again would not help.
    """
    from airflow.sdk.exceptions import AirflowFailException

    counts = dict(zip((column.name for column in cursor.description), cursor.fetchone(), strict=True))
    if any(count for name, count in counts.items() if name != "compared"):
        found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        raise AirflowFailException(
            f"{table} is not what a full refresh would make of raw: {found}. Trigger the DAG that refreshes it with "
            f"refresh set to swap, which makes it anew, and find out who else writes to schema stg"
        )
    return counts


def report_verification(context: Any, counts: dict[str, int], *, table: str) -> None:
    """Say what was compared."""
    found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    say(context["ti"], f"{table} is what raw says: {found}")


def help_at(section: str) -> Callable[[Any], None]:
    """A failure callback that says where the task's messages are explained.

    :param section: the anchor of a heading of docs/operations.md.
    """

    def point_to_docs(context: Any) -> None:
        log.error(
            "What this means, and what to do: docs/operations.md, %s", ui_url(f"warehouse/docs/operations.md#{section}")
        )

    return point_to_docs


def ui_url(path: str) -> str:
    """The address of a page of Airflow's UI."""
    from airflow.sdk.configuration import conf

    return f"{conf.get('api', 'base_url', fallback='http://localhost:8080').rstrip('/')}/{path}"


def no_fresh_batch(table: str, context: Any) -> None:
    """The callback of a missed deadline: say it in a log of its own, which is in the folder executor_callbacks/ of
    Airflow's logs. Put a notifier of yours in its place.
    """
    run = context["dag_run"]
    log.error(
        "%s: run %s of %s has not published its batch in time: %s",
        table,
        run["dag_run_id"],
        run["dag_id"],
        ui_url("plugin/warehouse"),
    )


def without_deadline_in_tests(dag: Any) -> None:
    """Let `dag.test()`, and so `airflow dags test`, run a DAG that has a deadline.

    Airflow 3.3.2 looks for the alert's row in its database, which only the DAG processor writes, and fails when all is
    done. Nobody waits for an alert there.
    """
    test = dag.test

    def test_without_deadline(*args: Any, **kwargs: Any) -> Any:
        dag.deadline = None
        return test(*args, **kwargs)

    dag.test = test_without_deadline


def first_comment(script: Path) -> str:
    """The comment that a script begins with: what the table is, and when the script is the right one."""
    lines = script.read_text().splitlines()
    return " ".join(line[3:] for line in lines[: next(n for n, line in enumerate(lines) if line[:3] != "-- ")])
