"""The login that make up gives the Warehouse page: the owner's, with the rights of de_dw_reader and no more."""

import json

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from local.__main__ import grant_reader
from local.settings import airflow_connection
from tests.warehouse import Warehouse


def reader_of(url: str) -> str:
    """As whom the page reads."""
    options = json.loads(airflow_connection(url, "de_dw_reader"))["extra"]["options"]
    with psycopg.connect(make_conninfo(url, options=options)) as conn:
        (row,) = conn.execute("SELECT current_user").fetchall()
        return str(row[0])


def owner(warehouse: Warehouse, privileges: str, grant: str) -> str:
    """The URL of a login that is no superuser."""
    warehouse.alter(f"DROP ROLE IF EXISTS test_page_owner; CREATE ROLE test_page_owner LOGIN {privileges}; {grant}")
    return make_conninfo(warehouse.url, user="test_page_owner")


def test_owner_who_made_the_role_can_be_it(warehouse: Warehouse) -> None:
    with warehouse.connect("") as conn:
        has_options = conn.info.server_version >= 160000  # of a membership; CREATE ROLE gives its maker ADMIN only
    grant = "GRANT de_dw_reader TO test_page_owner WITH ADMIN TRUE, INHERIT FALSE, SET FALSE"
    url = owner(warehouse, "CREATEROLE", grant if has_options else "")
    with pytest.raises(psycopg.OperationalError, match="permission denied to set role"):
        reader_of(url)

    for _ in range(2):
        grant_reader(url)

    assert reader_of(url) == "de_dw_reader"


def test_owner_who_may_not_grant_the_role_gets_all_but_the_page(warehouse: Warehouse) -> None:
    url = owner(warehouse, "NOCREATEROLE", "")

    grant_reader(url)

    with pytest.raises(psycopg.OperationalError, match="permission denied to set role"):
        reader_of(url)


def test_superuser_reads_as_the_reader(warehouse: Warehouse) -> None:
    grant_reader(warehouse.url)

    assert reader_of(warehouse.url) == "de_dw_reader"
