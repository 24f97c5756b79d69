-- stg.orders_history: one row per version of an order, from raw.orders; and stg.orders_as_of, the latest at an instant.

-- Two rows of one order and one updated_at are one version: the one that arrived last.
CREATE VIEW stg.orders_history AS
SELECT
    v.order_id,
    v.customer_name,
    v.customer_email,
    v.product,
    v.quantity,
    v.unit_price,
    v.currency,
    v.status,
    v.ordered_at,
    v.updated_at,
    v.row_id,
    v.load_id,
    v.updated_at AS valid_from,
    lead(v.updated_at) OVER (PARTITION BY v.order_id ORDER BY v.updated_at ASC) AS valid_to
FROM (
    SELECT DISTINCT ON (order_id, updated_at)
        order_id,
        customer_name,
        customer_email,
        product,
        quantity,
        unit_price,
        currency,
        status,
        ordered_at,
        updated_at,
        row_id,
        load_id
    FROM raw.orders
    ORDER BY order_id ASC, updated_at ASC, row_id DESC
) AS v;
COMMENT ON VIEW stg.orders_history IS
'One row per version of an order, true from valid_from until before valid_to. Made from raw.orders when it is asked.';
COMMENT ON COLUMN stg.orders_history.order_id IS 'The order.';
COMMENT ON COLUMN stg.orders_history.customer_name IS 'Name of the customer.';
COMMENT ON COLUMN stg.orders_history.customer_email IS 'E-mail address of the customer.';
COMMENT ON COLUMN stg.orders_history.product IS 'Name of the product.';
COMMENT ON COLUMN stg.orders_history.quantity IS 'Pieces ordered.';
COMMENT ON COLUMN stg.orders_history.unit_price IS 'Price of one piece, in units of currency, digits as received.';
COMMENT ON COLUMN stg.orders_history.currency IS 'ISO 4217 code, such as EUR.';
COMMENT ON COLUMN stg.orders_history.status IS
'Where the order stood: created, paid, shipped, delivered, cancelled, returned.';
COMMENT ON COLUMN stg.orders_history.ordered_at IS 'When the order was placed.';
COMMENT ON COLUMN stg.orders_history.updated_at IS 'When the version became true.';
COMMENT ON COLUMN stg.orders_history.row_id IS 'The version''s row in raw.orders.';
COMMENT ON COLUMN stg.orders_history.load_id IS 'The load that brought the version: raw.loads.load_id.';
COMMENT ON COLUMN stg.orders_history.valid_from IS 'When the version became true: its updated_at.';
COMMENT ON COLUMN stg.orders_history.valid_to IS 'When the next version became true, exclusive; NULL for the latest.';
GRANT SELECT ON stg.orders_history TO de_dw_pipeline, de_dw_reader;

-- Not from the view: that would work out when each version ended, only to look at when it began.
CREATE FUNCTION stg.orders_as_of(instant timestamptz) RETURNS SETOF stg.orders_latest
LANGUAGE sql
STABLE
PARALLEL SAFE
BEGIN ATOMIC
    SELECT DISTINCT ON (order_id)
        order_id,
        customer_name,
        customer_email,
        product,
        quantity,
        unit_price,
        currency,
        status,
        ordered_at,
        updated_at,
        row_id,
        load_id
    FROM raw.orders
    WHERE updated_at <= instant
    ORDER BY order_id ASC, updated_at DESC, row_id DESC;
END;
COMMENT ON FUNCTION stg.orders_as_of(timestamptz) IS
'One row per order_id: the newest version in raw.orders that was true at that instant, by all that is known today.';
