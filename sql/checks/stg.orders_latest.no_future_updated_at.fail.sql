-- no_future_updated_at of stg.orders_latest: one row per version about to be taken in that is of a time to come.
-- The constraint updated_at_is_not_in_the_future refuses such records at the door; these came before there was one.
SELECT
    order_id,
    updated_at,
    load_id,
    row_id
FROM raw.orders
WHERE
    load_id IN (SELECT unnest(current_setting('de_dw.loads_to_apply')::bigint[]))
    AND updated_at >= now() + interval '5 minutes'
ORDER BY updated_at DESC;
