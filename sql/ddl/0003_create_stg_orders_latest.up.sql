-- stg.orders_latest: one row per order_id, its newest version in raw.orders.

-- Readers, views and grants see this table only. It has no rows of its own: they are in the one partition attached
-- to it. A full refresh fills the spare and swaps the two (stg.swap), so that this table keeps its identity for ever.
CREATE TABLE stg.orders_latest (
    order_id bigint NOT NULL,
    customer_name text,
    customer_email text,
    product text,
    quantity integer,
    unit_price numeric,
    currency text,
    status text,
    ordered_at timestamptz,
    updated_at timestamptz NOT NULL,
    row_id bigint NOT NULL,
    load_id bigint NOT NULL,
    CONSTRAINT orders_latest_pkey PRIMARY KEY (order_id)
) PARTITION BY RANGE (order_id);

COMMENT ON TABLE stg.orders_latest IS
'One row per order_id: the version with the greatest (updated_at, row_id) in raw.orders. Put views and grants on this
table, never on its partition, and no foreign key to it: they would stop the refresh.';
COMMENT ON COLUMN stg.orders_latest.order_id IS 'The order.';
COMMENT ON COLUMN stg.orders_latest.customer_name IS 'Name of the customer.';
COMMENT ON COLUMN stg.orders_latest.customer_email IS 'E-mail address of the customer.';
COMMENT ON COLUMN stg.orders_latest.product IS 'Name of the product.';
COMMENT ON COLUMN stg.orders_latest.quantity IS 'Pieces ordered.';
COMMENT ON COLUMN stg.orders_latest.unit_price IS 'Price of one piece, in units of currency, digits as received.';
COMMENT ON COLUMN stg.orders_latest.currency IS 'ISO 4217 code, such as EUR.';
COMMENT ON COLUMN stg.orders_latest.status IS
'Where the order stands: created, paid, shipped, delivered, cancelled, returned.';
COMMENT ON COLUMN stg.orders_latest.ordered_at IS 'When the order was placed.';
COMMENT ON COLUMN stg.orders_latest.updated_at IS 'When this version of the order became true.';
COMMENT ON COLUMN stg.orders_latest.row_id IS 'The version''s row in raw.orders.';
COMMENT ON COLUMN stg.orders_latest.load_id IS 'The load that brought the version: raw.loads.load_id.';

-- The two tables behind it have one shape, comments included, and change their names with every swap.
CREATE TABLE stg.orders_latest_live (LIKE stg.orders_latest INCLUDING ALL);
CREATE TABLE stg.orders_latest_spare (LIKE stg.orders_latest INCLUDING ALL);
COMMENT ON TABLE stg.orders_latest_live IS 'The rows of stg.orders_latest, or its spare: read that one instead.';
COMMENT ON TABLE stg.orders_latest_spare IS 'The rows of stg.orders_latest, or its spare: read that one instead.';

CREATE TYPE stg.orders_latest_v0 AS ();
COMMENT ON TYPE stg.orders_latest_v0 IS 'The version of stg.orders_latest, for the catalog: see stg.assert_current.';
INSERT INTO stg.table_versions (table_name) VALUES ('orders_latest');

ALTER TABLE stg.orders_latest ENABLE ROW LEVEL SECURITY;
-- The owner too: an empty result must not depend on who asks. A refresh writes to the two tables behind.
ALTER TABLE stg.orders_latest FORCE ROW LEVEL SECURITY;
CREATE POLICY snapshot_is_current ON stg.orders_latest FOR SELECT USING ((SELECT stg.assert_current('orders_latest')));
COMMENT ON POLICY snapshot_is_current ON stg.orders_latest IS
'Every row, or error 40001 for a snapshot older than the last swap. Superusers are not checked.';

GRANT SELECT ON stg.orders_latest TO de_dw_reader;
ALTER TABLE stg.orders_latest OWNER TO de_dw_pipeline;
ALTER TABLE stg.orders_latest_live OWNER TO de_dw_pipeline;
ALTER TABLE stg.orders_latest_spare OWNER TO de_dw_pipeline;
ALTER TYPE stg.orders_latest_v0 OWNER TO de_dw_pipeline;

-- Last, because sqlfluff can't read it nor what follows.
ALTER TABLE stg.orders_latest -- noqa: PRS
ATTACH PARTITION stg.orders_latest_live FOR VALUES FROM (MINVALUE) TO (MAXVALUE);
