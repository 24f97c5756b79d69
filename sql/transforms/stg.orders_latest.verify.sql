-- stg.orders_latest, verified: one row of counts, which are 0 when it has just the newest versions in raw.orders.
-- A load that no refresh has applied yet is left out. All columns are compared, in their order, byte by byte: to the
-- operator = 9.9 and 9.90 are the same.
WITH pending AS (
    SELECT load_id
    FROM stg.pending_loads
    WHERE table_name = 'orders_latest'
),

expected AS (
    SELECT DISTINCT ON (order_id) *
    FROM raw.orders
    WHERE load_id != all(array(SELECT pending.load_id FROM pending))
    ORDER BY order_id ASC, updated_at DESC, row_id DESC
),

published AS (
    SELECT *
    FROM stg.orders_latest
)

SELECT
    count(*) FILTER (WHERE published.order_id IS NULL) AS missing,
    count(*) FILTER (WHERE expected.order_id IS NULL) AS extra,
    count(*) FILTER (
        WHERE expected.order_id = published.order_id AND record_image_ne(expected, published)
    ) AS different,
    count(*) FILTER (WHERE expected.order_id = published.order_id) AS compared
FROM expected
FULL JOIN published ON expected.order_id = published.order_id;
