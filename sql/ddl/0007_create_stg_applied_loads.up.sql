-- stg.applied_loads: one row per load that a staging table has taken in, from raw.loads. What is not there is pending.

-- Not a watermark: loads commit in another order than they begin, and a late one would be below the mark for ever.
-- Not the number alone: after raw was restored from a backup, numbers are used a second time, for other loads.
CREATE TABLE stg.applied_loads (
    table_name text NOT NULL,
    load_id bigint NOT NULL,
    finished_at timestamptz NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT applied_loads_pkey PRIMARY KEY (table_name, load_id, finished_at)
);
COMMENT ON TABLE stg.applied_loads IS
'One row per load that a staging table has taken in. Insert-only: written by the statement that publishes its rows.';
COMMENT ON COLUMN stg.applied_loads.table_name IS 'The staging table, without its schema.';
COMMENT ON COLUMN stg.applied_loads.load_id IS 'The load: raw.loads.load_id.';
COMMENT ON COLUMN stg.applied_loads.finished_at IS 'When the load''s last row was in: raw.loads.finished_at.';
COMMENT ON COLUMN stg.applied_loads.applied_at IS 'When the refresh took it in.';
GRANT SELECT ON stg.applied_loads TO de_dw_pipeline, de_dw_reader;
GRANT INSERT (table_name, load_id, finished_at) ON stg.applied_loads TO de_dw_pipeline;
-- The views below look into it with their owner's rights, and who that is need not stay a member of de_dw_pipeline.
GRANT SELECT ON stg.table_versions TO current_user;

ALTER TABLE stg.table_versions ADD COLUMN source_table text;
COMMENT ON COLUMN stg.table_versions.source_table IS 'The table it is made from, with its schema: raw.orders.';
UPDATE stg.table_versions SET source_table = 'raw.orders'
WHERE table_name = 'orders_latest';

CREATE VIEW stg.pending_loads AS
SELECT
    v.table_name,
    l.load_id,
    l.batch_id,
    l.rows,
    l.finished_at
FROM stg.table_versions AS v
INNER JOIN raw.loads AS l ON v.source_table = l.table_name
WHERE NOT EXISTS (
    SELECT 1 FROM stg.applied_loads AS a
    WHERE a.table_name = v.table_name AND a.load_id = l.load_id AND a.finished_at = l.finished_at
);
COMMENT ON VIEW stg.pending_loads IS
'One row per committed load that a staging table has not taken in: what its next refresh will apply.';
COMMENT ON COLUMN stg.pending_loads.table_name IS 'The staging table, without its schema.';
COMMENT ON COLUMN stg.pending_loads.load_id IS 'The load: raw.loads.load_id.';
COMMENT ON COLUMN stg.pending_loads.batch_id IS 'The batch that it brought.';
COMMENT ON COLUMN stg.pending_loads.rows IS 'Rows that the load brought to raw.';
COMMENT ON COLUMN stg.pending_loads.finished_at IS 'When the load''s last row was in.';
GRANT SELECT ON stg.pending_loads TO de_dw_pipeline, de_dw_reader;

CREATE VIEW stg.refresh_status AS
WITH pending AS (
    SELECT
        table_name,
        count(*) AS loads,
        sum(rows)::bigint AS rows
    FROM stg.pending_loads
    GROUP BY table_name
),

applied AS (
    SELECT DISTINCT table_name
    FROM stg.applied_loads
)

SELECT
    v.table_name,
    applied.table_name IS NOT NULL AS has_applied_loads,
    coalesce(pending.loads, 0) AS pending_loads,
    coalesce(pending.rows, 0) AS pending_rows,
    greatest(c.reltuples, 0)::bigint AS table_rows
FROM stg.table_versions AS v
INNER JOIN pg_class AS c ON c.oid = to_regclass(format('stg.%I', v.table_name || '_live'))
LEFT JOIN pending ON v.table_name = pending.table_name
LEFT JOIN applied ON v.table_name = applied.table_name;
COMMENT ON VIEW stg.refresh_status IS
'One row per staging table: how much its next refresh has to do. A refresh decides by it how.';
COMMENT ON COLUMN stg.refresh_status.table_name IS 'The staging table, without its schema.';
COMMENT ON COLUMN stg.refresh_status.has_applied_loads IS 'False as long as no refresh has recorded what it took in.';
COMMENT ON COLUMN stg.refresh_status.pending_loads IS 'Committed loads that it has not taken in.';
COMMENT ON COLUMN stg.refresh_status.pending_rows IS 'Rows that those loads brought to raw.';
COMMENT ON COLUMN stg.refresh_status.table_rows IS 'Rows of the staging table as last estimated by ANALYZE.';
GRANT SELECT ON stg.refresh_status TO de_dw_pipeline, de_dw_reader;

-- A BRIN index knows nothing of new pages until they are summarized, and every search reads all that are not. Vacuum
-- does it, but comes the later the larger the table is. Only the index's owner may ask for it.
CREATE FUNCTION raw.summarize_new_pages(table_name text) RETURNS void
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms' -- after a second, deadlock_timeout, autovacuum would make way, and never get through
AS $$
DECLARE
    index_id oid;
BEGIN
    FOR index_id IN
        SELECT i.indexrelid
        FROM pg_index AS i
        INNER JOIN pg_class AS c ON i.indexrelid = c.oid
        INNER JOIN pg_am AS m ON c.relam = m.oid
        INNER JOIN pg_class AS t ON i.indrelid = t.oid
        INNER JOIN pg_attribute AS a ON t.oid = a.attrelid AND i.indkey[0] = a.attnum
        WHERE a.attname = 'load_id' AND m.amname = 'brin' AND t.relnamespace = 'raw'::regnamespace AND 'raw.' || t.relname = table_name
    LOOP
        BEGIN
            PERFORM brin_summarize_new_values(index_id);
        EXCEPTION WHEN lock_not_available THEN
            RAISE NOTICE '% is being vacuumed: its new pages are read whole', table_name;
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION raw.summarize_new_pages(text) IS
'Brings the BRIN index on load_id of a table of schema raw up to date; costs what is new. Takes the name as the ledger
has it.';
REVOKE EXECUTE ON FUNCTION raw.summarize_new_pages(text) FROM public;
GRANT EXECUTE ON FUNCTION raw.summarize_new_pages(text) TO de_dw_pipeline;

CREATE FUNCTION stg.loads_to_apply(table_name text) RETURNS SETOF bigint
LANGUAGE plpgsql
STABLE -- so that it sees just what the statement sees that applies them
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    is_empty boolean;
BEGIN
    -- Somebody truncated it, or a superuser's pg_dump met a swap: whatever was recorded, it is not there.
    EXECUTE format('SELECT NOT EXISTS (SELECT 1 FROM stg.%I)', table_name || '_live') INTO is_empty;
    RETURN QUERY
    SELECT l.load_id
    FROM raw.loads AS l
    INNER JOIN stg.table_versions AS v ON l.table_name = v.source_table
    WHERE v.table_name = loads_to_apply.table_name AND is_empty
    UNION ALL
    SELECT p.load_id
    FROM stg.pending_loads AS p
    WHERE p.table_name = loads_to_apply.table_name AND NOT is_empty;
END
$$;
COMMENT ON FUNCTION stg.loads_to_apply(text) IS
'The load_id of each load that a refresh has to apply: the pending ones, and all of them when the live table is empty.
Takes the table''s name without schema.';

CREATE FUNCTION stg.begin_refresh(table_name text) RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '10min' -- longest wait for another refresh
AS $$
DECLARE
    source_table text := (SELECT v.source_table FROM stg.table_versions AS v
        WHERE v.table_name = begin_refresh.table_name);
    loads bigint[];
BEGIN
    IF NOT EXISTS (
        SELECT 1 FROM pg_class AS c INNER JOIN pg_namespace AS n ON c.relnamespace = n.oid
        WHERE format('%s.%s', n.nspname, c.relname) = source_table -- without quotes, as the ledger has it
    ) THEN
        RAISE EXCEPTION 'stg.table_versions does not say what stg.% is made from', table_name
            USING HINT = 'Its migration inserts the row (table_name, source_table), such as (orders_latest, raw.orders).';
    END IF;
    -- Under REPEATABLE READ the snapshot is older than the lock, and would miss what was loaded while it waited.
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'a refresh needs READ COMMITTED, not %', upper(current_setting('transaction_isolation'))
            USING HINT = 'SET LOCAL transaction_isolation = ''read committed'' right after BEGIN.';
    END IF;
    -- One refresh at a time. The lock comes before the first look at raw: a slower refresh that had
    -- looked earlier would otherwise publish over a newer one.
    PERFORM pg_advisory_xact_lock(hashtextextended('refresh stg.' || table_name, 0));
    PERFORM raw.summarize_new_pages(source_table);
    -- As a setting, because the planner looks into it: it does not know what a subquery will find, and would read all
    -- of raw where there are few loads.
    loads := ARRAY(SELECT stg.loads_to_apply(table_name));
    PERFORM set_config('de_dw.loads_to_apply', loads::text, true);
    RETURN cardinality(loads);
END
$$;
COMMENT ON FUNCTION stg.begin_refresh(text) IS
'The first step of a refresh, in its transaction: waits until no other one of the table is at work, brings the indexes
that find the rows of a load up to date, and puts the loads to apply, as bigint[], into the setting
de_dw.loads_to_apply. Returns their number. Takes the table''s name without schema.';
REVOKE EXECUTE ON FUNCTION stg.begin_refresh(text) FROM public;
GRANT EXECUTE ON FUNCTION stg.begin_refresh(text) TO de_dw_pipeline;
REVOKE EXECUTE ON FUNCTION stg.loads_to_apply(text) FROM public;
GRANT EXECUTE ON FUNCTION stg.loads_to_apply(text) TO de_dw_pipeline;

CREATE FUNCTION stg.analyze_if_stale(table_name text) RETURNS boolean
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    parent regclass := format('stg.%I', table_name);
    live regclass := format('stg.%I', table_name || '_live');
    is_stale boolean;
BEGIN
    -- Autovacuum analyzes the live table when a tenth of it has changed, a swap the spare; but nobody the partitioned
    -- table in front, whose statistics joins and groupings are estimated by. It takes as long as the refresh of a
    -- small table, so only when they are off.
    SELECT
        p.last_analyze IS NULL
        OR p.last_analyze < greatest(l.last_autoanalyze, now() - interval '1 day')
        OR abs(pc.reltuples - lc.reltuples) > lc.reltuples / 10
    INTO is_stale
    FROM pg_stat_all_tables AS p, pg_class AS pc, pg_stat_all_tables AS l, pg_class AS lc
    WHERE p.relid = parent AND pc.oid = parent AND l.relid = live AND lc.oid = live;

    IF is_stale THEN
        EXECUTE format('ANALYZE %s', parent);
    END IF;
    RETURN is_stale;
END
$$;
COMMENT ON FUNCTION stg.analyze_if_stale(text) IS
'Analyzes a staging table if a tenth of it has changed or a day has passed since: returns whether it did.';
REVOKE EXECUTE ON FUNCTION stg.analyze_if_stale(text) FROM public;
GRANT EXECUTE ON FUNCTION stg.analyze_if_stale(text) TO de_dw_pipeline;
