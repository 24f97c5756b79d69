-- raw.loads without how the files were written, unless it says that of some: it cannot be found out again.

LOCK TABLE raw.loads IN ACCESS EXCLUSIVE MODE;
DO $$
BEGIN
    IF EXISTS (SELECT 1 FROM raw.loads WHERE format IS NOT NULL)
        AND current_setting('de_dw.allow_data_loss', true) IS DISTINCT FROM 'yes'
    THEN
        RAISE EXCEPTION 'refusing to drop columns of raw.loads: it says how files were written'
            USING HINT = 'Take a backup, then say alembic -x allow-data-loss=yes downgrade ... '
                         '(in psql: SET de_dw.allow_data_loss = ''yes'').';
    END IF;
END
$$;

ALTER TABLE raw.loads
DROP COLUMN format,
DROP COLUMN source_version;
