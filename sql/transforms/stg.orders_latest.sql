-- stg.orders_latest: one row per order_id, its newest version in raw.orders.
-- A full refresh, right whatever happened before; its cost follows the history. It is one transaction, so it may be
-- killed and run again at any point: in Airflow, or with psql -f.
BEGIN;
SET LOCAL transaction_isolation = 'read committed'; -- so that each statement looks at raw after the lock, not before
SELECT stg.begin_swap('orders_latest') AS loads_to_apply; -- waits for another refresh

INSERT INTO stg.orders_latest_spare (
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
)
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
WHERE (SELECT stg.takes_in('orders_latest')) -- notes which loads this statement sees
ORDER BY order_id ASC, updated_at DESC, row_id DESC;

SELECT stg.swap('orders_latest') AS row_count;
COMMIT;
-- After the commit, so that nobody waits for it.
SELECT stg.analyze_if_stale('orders_latest') AS is_analyzed;
