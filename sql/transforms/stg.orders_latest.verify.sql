-- stg.orders_latest, verified: one row of counts, which are 0 when it has just the newest versions in raw.orders.
-- A load that no refresh has applied yet is left out.
WITH pending AS (
    SELECT load_id
    FROM stg.pending_loads
    WHERE table_name = 'orders_latest'
),

expected AS (
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
    WHERE load_id != all(array(SELECT pending.load_id FROM pending))
    ORDER BY order_id ASC, updated_at DESC, row_id DESC
),

published AS (
    SELECT
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
    FROM stg.orders_latest
)

SELECT
    count(*) FILTER (WHERE published.order_id IS NULL) AS missing,
    count(*) FILTER (WHERE expected.order_id IS NULL) AS extra,
    -- byte by byte: to = 9.9 and 9.90 are the same
    count(*) FILTER (
        WHERE expected.order_id = published.order_id AND record_image_ne(expected, published)
    ) AS different,
    count(*) FILTER (WHERE expected.order_id = published.order_id) AS compared
FROM expected
FULL JOIN published ON expected.order_id = published.order_id;
