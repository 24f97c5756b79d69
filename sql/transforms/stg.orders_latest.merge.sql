-- stg.orders_latest: one row per order_id, its newest version among its rows and the loads not yet applied.
-- A refresh in place, whose cost follows the new batch: not the history, not the table. No reader waits for it or gets
-- an error, not even under REPEATABLE READ. The same rows come of it as of stg.orders_latest.sql.
BEGIN;
SET LOCAL transaction_isolation = 'read committed'; -- so that each statement looks at raw after the lock, not before
SET LOCAL work_mem = '64MB'; -- for the sort; with more it takes longer, with the default of 4 MB too
SET LOCAL enable_seqscan = off; -- the index on load_id, also while raw has no statistics
SELECT stg.begin_refresh('orders_latest') AS loads_to_apply; -- waits for another refresh

-- One statement, so that it applies just the loads that it says it does. Into the live table, because the row policy of
-- the one in front of it is for readers.
WITH applied AS (
    INSERT INTO stg.applied_loads (table_name, load_id, finished_at)
    SELECT
        'orders_latest' AS table_name,
        load_id,
        finished_at
    FROM raw.loads
    WHERE load_id = any(current_setting('de_dw.loads_to_apply')::bigint[])
    ON CONFLICT DO NOTHING
)

INSERT INTO stg.orders_latest_live AS previous (
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
WHERE load_id = any(current_setting('de_dw.loads_to_apply')::bigint[])
ORDER BY order_id ASC, updated_at DESC, row_id DESC
ON CONFLICT (order_id) DO UPDATE SET
    customer_name = excluded.customer_name,
    customer_email = excluded.customer_email,
    product = excluded.product,
    quantity = excluded.quantity,
    unit_price = excluded.unit_price,
    currency = excluded.currency,
    status = excluded.status,
    ordered_at = excluded.ordered_at,
    updated_at = excluded.updated_at,
    row_id = excluded.row_id,
    load_id = excluded.load_id
WHERE (previous.updated_at, previous.row_id) < (excluded.updated_at, excluded.row_id);

COMMIT;

-- After the commit, so that nobody waits for it.
SELECT stg.analyze_if_stale('orders_latest') AS is_analyzed;
