-- raw.orders, unless it has rows: they cannot be made again.

-- Locked first: nobody may load between the look and the DROP.
LOCK TABLE raw.orders IN ACCESS EXCLUSIVE MODE;
DO $$
BEGIN
    IF EXISTS (SELECT 1 FROM raw.orders) AND current_setting('de_dw.allow_data_loss', true) IS DISTINCT FROM 'yes' THEN
        RAISE EXCEPTION 'refusing to drop raw.orders: it has rows'
            USING HINT = 'Take a backup, then say alembic -x allow-data-loss=yes downgrade ... '
                         '(in psql: SET de_dw.allow_data_loss = ''yes'').';
    END IF;
END
$$;

DROP TABLE raw.orders;
