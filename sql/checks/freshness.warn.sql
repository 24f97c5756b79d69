-- freshness: one row, when the newest version about to be taken in is older than a day.
SELECT
    updated_at AS newest_updated_at,
    now() - updated_at AS age
FROM ops.pending_versions('-infinity', 1)
WHERE updated_at < now() - interval '1 day';
