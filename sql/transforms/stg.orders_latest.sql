-- stg.orders_latest: one row per order_id, its newest version in raw.orders.
-- A full refresh, right whatever happened before; its cost follows the history. It is one transaction, so it may be
-- killed and run again at any point: in Airflow, or with psql -f.
BEGIN;
SET LOCAL transaction_isolation = 'read committed'; -- so that each statement looks at raw after the lock, not before
SET LOCAL work_mem = '64MB'; -- for the sort; with more it takes longer, with the default of 4 MB too

SELECT stg.begin_refresh('orders_latest') AS loads_to_apply; -- waits for another refresh

SELECT stg.empty_spare('orders_latest');

-- One statement, so that it takes in just the loads that it says it does.
WITH taken_in AS (
    INSERT INTO stg.spare_loads (table_name, load_id, finished_at)
    SELECT
        'orders_latest' AS table_name,
        load_id,
        finished_at
    FROM raw.loads
    WHERE load_id IN (SELECT load_id FROM stg.loads_to_apply('orders_latest') AS load_id)
    ON CONFLICT DO NOTHING
)

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

-- Loads that were committed since begin_refresh are in raw, and so in here.
SELECT ops.assert_checked('orders_latest', array(
    SELECT load_id FROM stg.spare_loads
    WHERE table_name = 'orders_latest'
));

SELECT stg.swap('orders_latest') AS row_count;

COMMIT;

-- After the commit, so that nobody waits for it.
SELECT stg.analyze_if_stale('orders_latest') AS is_analyzed;
