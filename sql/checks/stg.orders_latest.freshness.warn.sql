-- freshness of stg.orders_latest: one row, when the newest version about to be taken in is older than a day.
SELECT
    max(updated_at) AS newest_updated_at,
    now() - max(updated_at) AS age
FROM raw.orders
WHERE load_id IN (SELECT unnest(current_setting('de_dw.loads_to_apply')::bigint[]))
HAVING max(updated_at) < now() - interval '1 day';
