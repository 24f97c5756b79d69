-- not_empty: one row per load that is about to be taken in, when all of them together have no row.
SELECT
    load_id,
    batch_id,
    source,
    bytes
FROM raw.loads
WHERE
    load_id IN (SELECT unnest(current_setting('de_dw.loads_to_apply')::bigint[]))
    AND NOT EXISTS (
        SELECT 1
        FROM raw.loads AS filled
        WHERE filled.load_id IN (SELECT unnest(current_setting('de_dw.loads_to_apply')::bigint[])) AND filled.rows > 0
    );
