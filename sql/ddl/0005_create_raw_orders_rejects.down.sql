-- raw.orders_rejects, unless it has rows: they cannot be made again.

LOCK TABLE raw.orders_rejects IN ACCESS EXCLUSIVE MODE;
DO $$
BEGIN
    IF EXISTS (SELECT 1 FROM raw.orders_rejects)
        AND current_setting('de_dw.allow_data_loss', true) IS DISTINCT FROM 'yes'
    THEN
        RAISE EXCEPTION 'refusing to drop raw.orders_rejects: it has rows'
            USING HINT = 'Take a backup, then say alembic -x allow-data-loss=yes downgrade ... '
                         '(in psql: SET de_dw.allow_data_loss = ''yes'').';
    END IF;
END
$$;

DROP TABLE raw.orders_rejects;
