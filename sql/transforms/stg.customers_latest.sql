-- stg.customers_latest: one row per customer_id, its newest version in raw.customers.
-- A full refresh, right whatever happened before; its cost follows the history. It is one transaction, so it may be
-- killed and run again at any point: in Airflow, or with psql -f.
BEGIN;
SET LOCAL transaction_isolation = 'read committed'; -- so that each statement looks at raw after the lock, not before
SELECT stg.begin_swap('customers_latest') AS loads_to_apply; -- waits for another refresh

INSERT INTO stg.customers_latest_spare (
    customer_id,
    name,
    email,
    country,
    updated_at,
    row_id,
    load_id
)
SELECT DISTINCT ON (customer_id)
    customer_id,
    name,
    email,
    country,
    updated_at,
    row_id,
    load_id
FROM raw.customers
WHERE (SELECT stg.takes_in('customers_latest')) -- notes which loads this statement sees
ORDER BY customer_id ASC, updated_at DESC, row_id DESC;

SELECT stg.swap('customers_latest') AS row_count;
COMMIT;
-- After the commit, so that nobody waits for it.
SELECT stg.analyze_if_stale('customers_latest') AS is_analyzed;
