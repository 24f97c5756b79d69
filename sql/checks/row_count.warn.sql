-- row_count: one row per load that is about to be taken in with less than half or more than twice the usual rows.
-- Usual is the median of up to 20 loads of the same table before it; with fewer than 3 nothing is.
SELECT
    l.load_id,
    l.batch_id,
    l.rows,
    usual.rows AS usual_rows
FROM raw.loads AS l
CROSS JOIN
    LATERAL ( -- noqa: ST05
        SELECT
            count(*) AS loads,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY earlier.rows ASC) AS rows
        FROM (
            SELECT e.rows
            FROM raw.loads AS e
            WHERE e.table_name = l.table_name AND e.load_id < l.load_id
            ORDER BY e.load_id DESC
            LIMIT 20
        ) AS earlier
    ) AS usual
WHERE
    l.load_id IN (SELECT unnest(current_setting('de_dw.loads_to_apply')::bigint[]))
    AND usual.loads >= 3
    AND (l.rows < usual.rows / 2 OR l.rows > usual.rows * 2);
