"""The Warehouse page in Airflow's UI: its place in the navigation, and its part of the API server, under /warehouse.

Each process of Airflow imports this file. What it costs is in warehouse_page, which only the API server reads, when
somebody asks for the page: a mistake in there is a page that fails, not an Airflow that does not start.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin

PREFIX = "/warehouse"
# An Airflow that is served under a path of its host has it before all of its own.
HREF = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/") + PREFIX


@cache
def application() -> Any:
    """The page, read from its files the first time that it is asked for."""
    from warehouse_page.app import app

    return app()


async def page(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
    """The page as an ASGI application."""
    # In a thread: to read it takes a moment the first time, and the server answers others meanwhile.
    await (await asyncio.to_thread(application))(scope, receive, send)


class WarehousePlugin(AirflowPlugin):
    name = "warehouse"
    fastapi_apps: list[Any] = [{"app": page, "url_prefix": PREFIX, "name": "warehouse"}]  # noqa: RUF012 as Airflow has it
    external_views: list[Any] = [  # noqa: RUF012
        {
            "name": "Warehouse",
            "href": f"{HREF}/",
            "destination": "nav",
            "nav_top_level": True,
            "url_route": "warehouse",
            "icon": f"{HREF}/static/icon-light.svg",
            "icon_dark_mode": f"{HREF}/static/icon-dark.svg",
        }
    ]
