"""Runs by itself after every refresh of stg.orders_latest, and says what came."""

from typing import Any

from airflow.sdk import Asset, dag, task

LATEST = Asset("stg.orders_latest", group="warehouse")  # as in orders.py; a run by an Asset.ref is not told the events


@dag(schedule=[LATEST])
def downstream() -> None:
    @task
    def report(triggering_asset_events: Any = None) -> list[str]:
        return [event.extra["summary"] for event in triggering_asset_events[LATEST]]

    report()


downstream()
