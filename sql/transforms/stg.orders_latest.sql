-- stg.orders_latest: one row per order_id, its newest version in raw.orders.
-- A full refresh. It is one transaction, so it may be killed and run again at any point: in Airflow, or with psql -f.
BEGIN;
SET LOCAL transaction_isolation = 'read committed'; -- so that the INSERT looks at raw after the lock, not before
SET LOCAL lock_timeout = '10min'; -- longest wait for another refresh

-- One refresh at a time. The lock comes before the first look at raw: a slower refresh that had
-- looked earlier would otherwise publish over a newer one.
SELECT pg_advisory_xact_lock(hashtextextended('refresh stg.orders_latest', 0));

TRUNCATE stg.orders_latest_spare;

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
ORDER BY order_id ASC, updated_at DESC, row_id DESC;

ANALYZE stg.orders_latest_spare;

SELECT stg.swap('orders_latest') AS row_count;

COMMIT;

-- After the commit, so that no reader waits for it: autovacuum never analyzes a partitioned table.
ANALYZE stg.orders_latest;
