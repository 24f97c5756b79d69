-- Schema ops, unless it has results of checks: they say why a batch was not published, and can't be made again.

LOCK TABLE ops.check_results IN ACCESS EXCLUSIVE MODE;
DO $$
BEGIN
    IF EXISTS (SELECT 1 FROM ops.check_results)
        AND current_setting('de_dw.allow_data_loss', true) IS DISTINCT FROM 'yes'
    THEN
        RAISE EXCEPTION 'refusing to drop ops.check_results: it has rows'
            USING HINT = 'Take a backup, then say alembic -x allow-data-loss=yes downgrade ... '
                         '(in psql: SET de_dw.allow_data_loss = ''yes'').';
    END IF;
END
$$;

DROP FUNCTION ops.versions_per_key(text);
DROP VIEW ops.tables;
DROP VIEW ops.loads;
DROP VIEW ops.last_checks;
DROP TABLE ops.check_results;
DROP INDEX raw.loads_table_name_load_id; -- squawk-ignore require-concurrent-index-deletion
-- Not CASCADE: what somebody else keeps in it stops the downgrade.
DROP SCHEMA ops;
