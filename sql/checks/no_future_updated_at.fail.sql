-- no_future_updated_at: one row per version about to be taken in that is of a time to come; the worst thousand of them.
-- The constraint updated_at_is_not_in_the_future refuses such records at the door; these came before there was one.
SELECT
    key,
    updated_at,
    load_id,
    row_id
FROM ops.pending_versions(now() + interval '5 minutes', 1000);
