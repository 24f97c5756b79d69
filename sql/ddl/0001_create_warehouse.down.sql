-- The ledger, the shared functions, both schemas and, if no other database of this server uses them, the roles.

LOCK TABLE raw.loads IN ACCESS EXCLUSIVE MODE;
DO $$
BEGIN
    IF EXISTS (SELECT 1 FROM raw.loads) AND current_setting('de_dw.allow_data_loss', true) IS DISTINCT FROM 'yes' THEN
        RAISE EXCEPTION 'refusing to drop raw.loads: it has rows'
            USING HINT = 'Take a backup, then say alembic -x allow-data-loss=yes downgrade ... '
                         '(in psql: SET de_dw.allow_data_loss = ''yes'').';
    END IF;
END
$$;

DROP FUNCTION stg.swap(text);
DROP FUNCTION stg.assert_current(text);
DROP TABLE stg.table_versions;
DROP TABLE raw.loads;
DROP FUNCTION raw.refuse_change();
-- Not CASCADE: what somebody else keeps in these schemas stops the downgrade.
DROP SCHEMA stg;
DROP SCHEMA raw;

DO $$
DECLARE
    role_name text;
BEGIN
    FOREACH role_name IN ARRAY ARRAY['de_dw_pipeline', 'de_dw_reader'] LOOP
        BEGIN
            EXECUTE format('DROP ROLE %I', role_name);
        EXCEPTION
            WHEN dependent_objects_still_exist OR insufficient_privilege THEN
                RAISE NOTICE 'role % stays: something else on this server uses it', role_name;
        END;
    END LOOP;
END
$$;
