"""stg.empty_spare, stg.index_spare and stg.swap: what is made on a staging table, and what a swap makes of it."""

import pytest
from psycopg import errors

from tests.conftest import MERGE, SWAP, UNION, by_every_swap
from tests.warehouse import Warehouse

LONG = "a_name_as_long_as_postgresql_takes_which_is_sixty_three_bytes__"
INDEXES = {
    "on all": "CREATE INDEX ON stg.orders_latest (status)",
    "on live": "CREATE INDEX ON stg.orders_latest_live (status)",
    "named": "CREATE INDEX by_status ON stg.orders_latest (status)",
    "named, on live": "CREATE INDEX by_status ON stg.orders_latest_live (status)",
    "unique": "CREATE UNIQUE INDEX ON stg.orders_latest (order_id, status)",
    "unique, on live": "CREATE UNIQUE INDEX once ON stg.orders_latest_live (row_id) NULLS NOT DISTINCT",
    "constraint": 'ALTER TABLE stg.orders_latest ADD CONSTRAINT "Once Each" UNIQUE (order_id, row_id)',
    "constraint, on live": 'ALTER TABLE stg.orders_latest_live ADD CONSTRAINT "Once Each" UNIQUE (row_id)',
    "all that an index can have": (
        "CREATE INDEX ON stg.orders_latest (lower(status) DESC NULLS LAST, product text_pattern_ops)"
        " INCLUDE (quantity) WITH (fillfactor = 70) WHERE quantity > 1"
    ),
    "other methods": (
        "CREATE INDEX ON stg.orders_latest USING hash (status); CREATE INDEX ON stg.orders_latest USING brin (order_id)"
    ),
    "several": "; ".join(f"CREATE INDEX ON stg.orders_latest ({column})" for column in ("status", "product", "status")),
    "capitals and spaces": 'CREATE INDEX "By Status" ON stg.orders_latest (status)',
    "capitals and spaces, on live": """CREATE INDEX "By 'Status' ""%s""" + '" ON stg.orders_latest_live (status)',
    "USING in its name, on live": 'CREATE INDEX "made USING care" ON stg.orders_latest_live (status)',
    "63 bytes": f"CREATE INDEX {LONG} ON stg.orders_latest (status)",
    "57 bytes, on live": f"CREATE INDEX {LONG[:57]} ON stg.orders_latest_live (status)",
    "60 bytes, on live": f"CREATE INDEX {LONG[:60]} ON stg.orders_latest_live (status)",
    "63 bytes, on live": f"CREATE INDEX {LONG} ON stg.orders_latest_live (status)",
    "63 bytes of two each, on live": f"CREATE INDEX {'ä' * 31} ON stg.orders_latest_live (status)",
    "two of 60 bytes, on live": "; ".join(
        f"CREATE INDEX {LONG[:59]}{end} ON stg.orders_latest_live ({column})"
        for end, column in (("a", "status"), ("b", "product"))
    ),
    "63 bytes with the table's name, on live": (
        f"CREATE INDEX {f'orders_latest_live_{LONG}'[:63]} ON stg.orders_latest_live (status)"
    ),
    "two that differ in the 63rd byte only, on live": "; ".join(
        f"CREATE INDEX {f'orders_latest_live_{LONG}'[:62]}{end} ON stg.orders_latest_live ({column})"
        for end, column in (("a", "status"), ("b", "product"))
    ),
    "one is named like the spare of the other, on live": (
        "CREATE INDEX by_status ON stg.orders_latest_live (status);"
        "CREATE INDEX by_status_spare ON stg.orders_latest_live (product)"
    ),
}
# name, what it is, and whether its parent's index has it too
DEFINITIONS = """
SELECT
    c.relname, regexp_replace(pg_get_indexdef(c.oid), ' INDEX .* ON .*? USING ', ' '), k.contype::text, c.relispartition
FROM pg_index AS i
INNER JOIN pg_class AS c ON i.indexrelid = c.oid
LEFT JOIN pg_constraint AS k ON i.indexrelid = k.conindid
WHERE i.indrelid = 'stg.orders_latest_{}'::regclass AND i.indisvalid
ORDER BY 2, 1
"""


@pytest.mark.parametrize("name", INDEXES)
def test_index_survives_swaps_and_spare_has_it_too(warehouse: Warehouse, name: str) -> None:
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | paid | 2026-01-01\n2 | paid | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.alter(INDEXES[name])
    indexes = warehouse.rows(DEFINITIONS.format("live"))
    on_parent = "SELECT indexrelid FROM pg_index WHERE indrelid = 'stg.orders_latest'::regclass ORDER BY 1"
    parents = warehouse.rows(on_parent)

    for refresh in (SWAP, UNION, MERGE, SWAP):
        warehouse.given("raw.orders", "order_id | status | updated_at\n1 | sent | 2026-01-02")
        warehouse.run(refresh)

        assert warehouse.rows(DEFINITIONS.format("live")) == indexes
        spares = [definition[1:3] for definition in warehouse.rows(DEFINITIONS.format("spare"))]
        assert spares == [definition[1:3] for definition in indexes]
        assert warehouse.rows("SELECT status FROM stg.orders_latest ORDER BY order_id") == [("sent",), ("paid",)]
    assert warehouse.rows(on_parent) == parents


def test_index_that_was_dropped_is_on_the_spare_no_longer(warehouse: Warehouse) -> None:
    warehouse.alter("CREATE INDEX by_status ON stg.orders_latest (status)")
    warehouse.run(SWAP)
    warehouse.alter("DROP INDEX stg.by_status")

    for refresh in (UNION, SWAP):
        warehouse.run(refresh)

        for table in ("live", "spare"):
            (index,) = warehouse.rows(DEFINITIONS.format(table))
            assert index[0] == f"orders_latest_{table}_pkey"


@by_every_swap
def test_swap_makes_no_index_while_readers_wait(warehouse: Warehouse, refresh: str) -> None:
    warehouse.alter("CREATE INDEX by_status ON stg.orders_latest (status)")
    notices: list[str] = []

    warehouse.run(refresh, notices=notices, settings="SET client_min_messages = debug1")

    # in the lock ATTACH would make what is missing, and say so after it has looked at the rows
    built = [number for number, notice in enumerate(notices) if notice.startswith('building index "orders_latest_')]
    (attached,) = [number for number, notice in enumerate(notices) if notice.startswith("partition constraint for")]
    assert len(built) >= 2
    assert max(built) < attached


@by_every_swap
@pytest.mark.parametrize("table", ["live", "spare"])
@pytest.mark.parametrize(
    ("made", "named"),
    [
        ("CREATE VIEW public.paid AS SELECT order_id FROM {}", "view public.paid"),
        ('CREATE VIEW public."Paid Ones" AS SELECT order_id FROM {}', 'view public."Paid Ones"'),
        ("CREATE MATERIALIZED VIEW public.paid AS SELECT order_id, status FROM {}", "view public.paid"),
        (
            "CREATE TABLE public.notes (order_id bigint CONSTRAINT of_order REFERENCES {})",
            "foreign key of_order of public.notes",
        ),
        (
            "CREATE VIEW public.b AS SELECT order_id FROM {0}; CREATE VIEW public.a AS SELECT 1 FROM {0}",
            "view public.a, view public.b",
        ),
        (
            "CREATE FUNCTION public.one() RETURNS bigint BEGIN ATOMIC SELECT order_id FROM {}; END",
            "function public.one()",
        ),
        ("CREATE PUBLICATION changes FOR TABLE {}", "publication of table {} in publication changes"),
        (
            "CREATE TABLE public.a (b bigint); CREATE POLICY c ON public.a USING (b IN (SELECT order_id FROM {}))",
            "policy c on table public.a",
        ),
    ],
)
def test_what_is_made_on_one_of_the_two_tables_stops_a_swap_before_any_work(
    warehouse: Warehouse, table: str, made: str, named: str, refresh: str
) -> None:
    published = publish_then_load(warehouse)
    named = named.format(f"stg.orders_latest_{table}")
    warehouse.alter(made.format(f"stg.orders_latest_{table}"))
    spare = warehouse.rows("SELECT * FROM stg.orders_latest_spare", "")

    with pytest.raises(errors.DependentObjectsStillExist) as refusal:
        warehouse.run(refresh)

    assert refusal.value.diag.message_primary == (
        f"a swap exchanges the tables behind stg.orders_latest, but on one of them there is: {named}"
    )
    assert "Whatever reads belongs on stg.orders_latest" in (refusal.value.diag.message_hint or "")
    assert "empty_spare" in (refusal.value.diag.context or ""), "not only when the rows are in"
    assert warehouse.rows("SELECT * FROM stg.orders_latest") == published
    assert warehouse.rows("SELECT * FROM stg.orders_latest_spare", "") == spare
    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == [(2,)]


@by_every_swap
def test_foreign_key_to_the_table_in_front_stops_a_swap(warehouse: Warehouse, refresh: str) -> None:
    published = publish_then_load(warehouse)
    warehouse.alter(
        "CREATE TABLE public.notes (order_id bigint REFERENCES stg.orders_latest); INSERT INTO public.notes VALUES (1)",
    )

    with pytest.raises(errors.DependentObjectsStillExist, match=r"foreign key notes_order_id_fkey of public\.notes"):
        warehouse.run(refresh)

    assert warehouse.rows("SELECT * FROM stg.orders_latest") == published
    assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == [(2,)]


def test_merge_needs_no_spare_so_views_and_foreign_keys_do_not_stop_it(warehouse: Warehouse) -> None:
    publish_then_load(warehouse)
    warehouse.alter(
        """
        CREATE TABLE public.notes (order_id bigint REFERENCES stg.orders_latest);
        INSERT INTO public.notes VALUES (1);
        CREATE VIEW public.paid AS SELECT order_id FROM stg.orders_latest_live;
        """,
    )

    assert warehouse.run(MERGE) == 2


@by_every_swap
def test_view_and_foreign_key_elsewhere_do_not_stop_a_swap(warehouse: Warehouse, refresh: str) -> None:
    publish_then_load(warehouse)
    warehouse.alter(
        """
        CREATE VIEW public.paid AS SELECT order_id FROM stg.orders_latest;
        CREATE TABLE public.products (product text PRIMARY KEY);
        ALTER TABLE stg.orders_latest ADD FOREIGN KEY (product) REFERENCES public.products;
        GRANT SELECT ON public.products TO de_dw_pipeline;
        """,
    )

    for _ in range(3):
        assert warehouse.run(refresh) == 2

    with pytest.raises(errors.ForeignKeyViolation):
        warehouse.alter("UPDATE stg.orders_latest SET product = 'none'")


def test_row_that_a_unique_index_refuses_stops_every_refresh(warehouse: Warehouse) -> None:
    published = publish_then_load(warehouse)
    warehouse.alter("CREATE UNIQUE INDEX ON stg.orders_latest_live (status)")

    for refresh in (SWAP, UNION, MERGE):
        with pytest.raises(errors.UniqueViolation):
            warehouse.run(refresh)

        assert warehouse.rows("SELECT * FROM stg.orders_latest") == published
        assert warehouse.rows("SELECT load_id FROM stg.pending_loads") == [(2,)]


def publish_then_load(warehouse: Warehouse) -> list[tuple[object, ...]]:
    """One row that is published, returned, and two that are pending."""
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | paid | 2026-01-01")
    warehouse.run(SWAP)
    warehouse.given("raw.orders", "order_id | status | updated_at\n1 | sent | 2026-01-02\n2 | sent | 2026-01-02")
    return warehouse.rows("SELECT * FROM stg.orders_latest")
