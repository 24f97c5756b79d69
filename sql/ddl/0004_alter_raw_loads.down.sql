-- Undoes 0004_alter_raw_loads.up.sql: the headers and the marks of repeated loads are lost.

LOCK TABLE raw.loads IN ACCESS EXCLUSIVE MODE;
DO $$
BEGIN
    IF EXISTS (SELECT 1 FROM raw.loads) AND current_setting('de_dw.allow_data_loss', true) IS DISTINCT FROM 'yes' THEN
        RAISE EXCEPTION 'refusing to drop columns of raw.loads: it has rows'
            USING HINT = 'Take a backup, then say alembic -x allow-data-loss=yes downgrade ... '
                         '(in psql: SET de_dw.allow_data_loss = ''yes'').';
    END IF;
    DROP INDEX raw.file_is_loaded_once;
    IF EXISTS (SELECT 1 FROM raw.loads WHERE rows > 0 AND repeat_of IS NOT NULL) THEN
        RAISE WARNING 'raw.loads has files that were loaded again on purpose: index file_is_loaded_once is not made';
    ELSE
        CREATE UNIQUE INDEX file_is_loaded_once ON raw.loads (table_name, sha256) WHERE rows > 0;
    END IF;
END
$$;

ALTER TABLE raw.loads
DROP COLUMN repeat_of,
DROP COLUMN header;
