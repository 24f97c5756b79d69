-- rejected_share: one row per load that is about to be taken in and left out more than 1% of its records.
SELECT
    load_id,
    batch_id,
    rows,
    rejects,
    round(100.0 * rejects / (rows + rejects), 2) AS percent
FROM raw.loads
WHERE
    load_id IN (SELECT unnest(current_setting('de_dw.loads_to_apply')::bigint[]))
    AND rejects > 0.01 * (rows + rejects);
