-- Schema ops, unless it has results of checks, or the ledger says which runs loaded: these can't be made again.

LOCK TABLE ops.check_results, raw.loads IN ACCESS EXCLUSIVE MODE;
DO $$
BEGIN
    IF (EXISTS (SELECT 1 FROM ops.check_results) OR EXISTS (SELECT 1 FROM raw.loads WHERE run_id IS NOT NULL))
        AND current_setting('de_dw.allow_data_loss', true) IS DISTINCT FROM 'yes'
    THEN
        RAISE EXCEPTION 'refusing to drop ops.check_results and the run_id of loads: there are some'
            USING HINT = 'Take a backup, then say alembic -x allow-data-loss=yes downgrade ... '
                         '(in psql: SET de_dw.allow_data_loss = ''yes'').';
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION stg.begin_refresh(table_name text) RETURNS bigint
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

REVOKE SELECT, UPDATE (version, published_at, spare_emptied_by) ON stg.table_versions FROM de_dw_pipeline;
ALTER TABLE stg.table_versions OWNER TO de_dw_pipeline;
GRANT SELECT ON stg.table_versions TO current_user;

DROP FUNCTION ops.assert_checked(text, bigint[]);
DROP FUNCTION ops.versions_per_key(text);
DROP VIEW ops.tables;
DROP VIEW ops.loads;
DROP VIEW ops.last_checks;
DROP TABLE ops.check_results;
ALTER TABLE raw.loads DROP COLUMN run_id;
DROP INDEX raw.loads_table_name_load_id; -- squawk-ignore require-concurrent-index-deletion
-- Not CASCADE: what somebody else keeps in it stops the downgrade.
DROP SCHEMA ops;
