"""The page's routes: who may ask, what is answered, and with which headers."""

import asyncio
import logging
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from airflow.api_fastapi.core_api.security import GetUserDep, requires_access_asset
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException as StarletteHTTPException

from warehouse_page import documents, runs, warehouse, words
from warehouse_page.warehouse import Reader, Unavailable, UnknownTable

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
STATIC = {path.name: path for path in (HERE / "static").iterdir()}
STALE = timedelta(hours=24)  # how old the newest load or refresh may be before the page warns
REFRESH_SECONDS = 10
HEADERS = {
    # Everything is of this server, and no script or style stands in a page: what a file brought can't become one.
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
LAST_ID = 2**63 - 1
Id = Annotated[int | None, Query(ge=0, le=LAST_ID)]


class Refused(HTTPException):
    """What somebody is told who may use the page."""


templates = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.filters |= words.FILTERS
templates.filters["path_part"] = lambda value: quote(value, safe="")
# Nothing is shown to somebody who is not logged in, and to a user only with the right to see assets.
router = APIRouter(dependencies=[Depends(requires_access_asset(method="GET"))], include_in_schema=False)


@cache
def app() -> FastAPI:
    """The application, to be mounted in Airflow's."""
    page = FastAPI(title="Warehouse", docs_url=None, redoc_url=None, openapi_url=None)
    page.state.reader = Reader()
    page.include_router(router)
    page.add_exception_handler(StarletteHTTPException, refuse)
    page.add_exception_handler(Unavailable, say_unavailable)
    page.add_exception_handler(UnknownTable, say_unknown_table)

    @page.middleware("http")
    async def add_headers(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return page


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    here = request.scope["root_path"]
    values |= {
        "status": status,
        "here": here,
        "airflow": here.rpartition("/")[0],  # what we are mounted in
        "documents": documents.names(),
        "refresh_seconds": REFRESH_SECONDS,
    }
    return HTMLResponse(templates.get_template(template).render(values), status)


@router.get("/")
async def show_overview(
    request: Request, user: GetUserDep, table: str | None = None, before: Id = None, after: Id = None
) -> HTMLResponse:
    found = await request.app.state.reader.ask(lambda conn: warehouse.overview(conn, table, before, after))
    if found.table is None:
        return render(request, "overview.html", found=found)
    assets = {found.table["source_table"], f"stg.{found.table['table_name']}"}
    run_ids = {row["run_id"] for row in [*found.loads.rows, *found.checks, *found.pending]}
    known = await asyncio.to_thread(runs.look_up, user, assets, run_ids)
    values = {"runs": known, "points": points(found.loads.rows), "now": found.table["now"], "stale": STALE}
    return render(request, "overview.html", found=found, **values)


def points(loads: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The columns of the charts: of each load its rows, and how fast they came."""
    charts: dict[str, list[dict[str, Any]]] = {"rows": [], "speed": []} if loads else {}
    for load in reversed(loads):
        column = {"load_id": load["load_id"], "label": words.utc(load["finished_at"])[:16]}
        about = f"load {load['load_id']}, {words.utc(load['finished_at'])} UTC:"
        rows, rejects, speed = load["rows"], load["rejects"], load["mb_per_second"]
        took = f"{words.size(load['bytes'])} in {words.seconds(load['seconds'])}"
        charts["rows"].append(
            column
            | {
                "tooltip": f"{about} {rows:,} rows, {rejects:,} rejects",
                "parts": [("loaded", rows), ("rejected", rejects)],
                "total": rows + rejects,
            }
        )
        charts["speed"].append(
            column | {"tooltip": f"{about} {speed:,.1f} MB/s, {took}", "parts": [("loaded", speed)], "total": speed}
        )
    return charts


@router.get("/versions")
async def show_versions(request: Request, table: str | None = None) -> HTMLResponse:
    name, key, counted = await request.app.state.reader.ask(lambda conn: warehouse.versions(conn, table))
    return render(request, "versions.html", table=name, key=key, counted=counted)


@router.get("/rejects")
async def show_rejects(
    request: Request,
    user: GetUserDep,
    table: str | None = None,
    load: Id = None,
    after_load: Id = None,
    after_line: Id = None,
) -> HTMLResponse:
    after = (after_load, after_line) if after_load is not None and after_line is not None else None
    found = await request.app.state.reader.ask(lambda conn: warehouse.rejects(conn, table, load, after))
    known = await asyncio.to_thread(runs.look_up, user, {found.source}, ())
    if not known.may_see_records:
        raise Refused(403, "Rejected records stand in the logs of the DAG that loads them: you may not read those")
    return render(request, "rejects.html", found=found, load=load)


@router.get("/docs/{name}")
async def show_document(request: Request, name: str) -> HTMLResponse:
    try:
        title, body = documents.render(name)
    except FileNotFoundError:
        raise Refused(404, "There is no such document") from None
    return render(request, "document.html", title=title, body=body)


@router.get("/docs/img/{name}")
async def show_picture(name: str) -> FileResponse:
    try:
        return FileResponse(documents.picture(name))
    except FileNotFoundError:
        raise Refused(404, "There is no such picture") from None


@router.get("/static/{name}")
async def show_static(name: str) -> FileResponse:
    if name not in STATIC:
        raise Refused(404, "There is no such file")
    return FileResponse(STATIC[name])


def refuse(request: Request, error: Exception) -> Response:
    """People get a page, with a way to log in; programs the JSON that the API would answer."""
    assert isinstance(error, StarletteHTTPException)
    if "text/html" not in request.headers.get("accept", ""):
        return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)
    title = {401: "You are not logged in", 403: "You may not see this", 404: "Not found"}.get(
        error.status_code, "Error"
    )
    may_see = isinstance(error, Refused)  # else nobody has asked yet who it is: no file of ours, no name of one
    values = {"title": title, "text": error.detail, "retry": False, "may_see": may_see}
    return render(request, "message.html", error.status_code, **values)


def say_unavailable(request: Request, error: Exception) -> Response:
    assert isinstance(error, Unavailable)
    answer = render(request, "message.html", 503, title=error.problem, text=error.remedy, retry=True, may_see=True)
    answer.headers["Retry-After"] = str(REFRESH_SECONDS)
    return answer


def say_unknown_table(request: Request, error: Exception) -> Response:
    return render(request, "message.html", 404, title="There is no such table", text="", retry=False, may_see=True)
