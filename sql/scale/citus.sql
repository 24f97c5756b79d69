-- raw.orders, stg.orders_latest: in shards by order_id on the workers of a Citus 12 or 13 cluster, all else as it was.
-- For the coordinator, once, after `alembic upgrade head`, by a superuser; again after shards were moved, and after a
-- migration of these tables. One transaction, which refuses what it can't do and says why. docs/scaling.md has the
-- order of things, what changes, and how much of it was seen to work: it could not be run where it was written.
BEGIN;
SET LOCAL lock_timeout = '2s'; -- a load or a refresh is at work: try again
-- One connection to each worker, so that what one statement makes there the next one sees.
SELECT set_config('citus.multi_shard_modify_mode', 'sequential', true);
-- The only trigger is one that refuses: it touches no other table, which is what would be unsafe in a shard.
SELECT set_config('citus.enable_unsafe_triggers', 'on', true);

DO $$
DECLARE
    -- All others of raw, stg and ops stay on the coordinator: one row per load or bad record, keys that are not by
    -- order_id, and other datasets, which are small until they need what orders has, by a key of their own.
    distributed text[] := ARRAY[ -- by order_id, all in the shards of the same order_ids
        'raw.orders',
        'stg.orders_latest',
        'stg.orders_latest_live', -- comes with the table in front of it
        'stg.orders_latest_spare'
    ];
    citus_version text := (SELECT e.extversion FROM pg_extension AS e WHERE e.extname = 'citus');
    found text[];
    wrong text;
    name text;
    rows_before bigint;
    rows_after bigint;
BEGIN
    IF citus_version IS NULL THEN
        RAISE EXCEPTION 'the extension citus is not in database %', current_database()
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'On one server the warehouse needs no Citus. Else follow docs/scaling.md: CREATE EXTENSION citus '
                         'on every node, citus_set_coordinator_host, citus_add_node.';
    ELSIF split_part(citus_version, '.', 1)::integer < 12 THEN
        RAISE EXCEPTION 'Citus is %, and must be 12 or newer', citus_version
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;

    SELECT array_agg(format('%s.%s', n.nspname, c.relname)) INTO found
    FROM pg_class AS c INNER JOIN pg_namespace AS n ON c.relnamespace = n.oid
    WHERE n.nspname IN ('raw', 'stg', 'ops') AND c.relkind IN ('r', 'p');
    SELECT string_agg(t, ', ' ORDER BY t ASC) INTO wrong
    FROM unnest(distributed) AS t WHERE t != ALL (coalesce(found, '{}'));
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'there is no %', wrong
            USING ERRCODE = 'undefined_table', HINT = 'Run alembic upgrade head first.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_dist_node AS n WHERE n.groupid != 0 AND n.shouldhaveshards AND n.isactive) THEN
        RAISE EXCEPTION 'no active worker is known here'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'On the coordinator: SELECT citus_add_node(host, 5432), for each worker.';
    END IF;
    -- A shard on the coordinator would be read with the reader's own snapshot, and be empty to one that is older than
    -- a swap. In a shard on a worker each statement has a new one, whatever the reader's isolation level.
    IF EXISTS (SELECT FROM pg_dist_node AS n WHERE n.groupid = 0 AND n.shouldhaveshards) THEN
        RAISE EXCEPTION 'the coordinator holds shards'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'SELECT citus_set_node_property(nodename, nodeport, ''shouldhaveshards'', false) '
                         'FROM pg_dist_node WHERE groupid = 0; a cluster with shards there already: citus_drain_node.';
    END IF;
    FOREACH name IN ARRAY ARRAY['de_dw_pipeline', 'de_dw_reader'] LOOP
        SELECT string_agg(format('%s:%s', w.nodename, w.nodeport), ', ') INTO wrong
        FROM run_command_on_workers(format('SELECT to_regrole(%L) IS NOT NULL', name)) AS w
        WHERE NOT w.success OR w.result != 't';
        IF wrong IS NOT NULL THEN
            RAISE EXCEPTION 'role % is missing on %', name, wrong
                USING ERRCODE = 'undefined_object',
                      HINT = format('SELECT run_command_on_workers(''CREATE ROLE %I NOLOGIN''), and the logins.', name);
        END IF;
    END LOOP;
    -- A swap renames it after the INSERT. Were it known to the workers, Citus would refuse that in one transaction.
    SELECT string_agg(o.objid::regtype::text, ', ') INTO wrong
    FROM pg_dist_object AS o INNER JOIN pg_type AS t ON o.objid = t.oid
    WHERE o.classid = 'pg_type'::regclass AND t.typnamespace = 'stg'::regnamespace;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'the workers know type %, which is for the coordinator alone', wrong
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'SET citus.enable_create_type_propagation = off, then drop it and create it again, AS (), '
                         'owned by de_dw_pipeline. It does not happen when migrations run before citus_add_node.';
    END IF;

    -- TRUNCATE is refused on the coordinator, which hands it on; UPDATE and DELETE in each shard, where they run.
    DROP TRIGGER IF EXISTS append_only ON raw.orders;
    DROP TRIGGER IF EXISTS append_only_truncate ON raw.orders;
    -- Citus takes no policy with a subquery, and in a shard the function could not read stg.table_versions.
    DROP POLICY IF EXISTS snapshot_is_current ON stg.orders_latest;
    ALTER TABLE stg.orders_latest NO FORCE ROW LEVEL SECURITY;
    ALTER TABLE stg.orders_latest DISABLE ROW LEVEL SECURITY;
    -- raw.summarize_new_pages does not reach into the shards: there autovacuum does it, as soon as pages are full.
    ALTER INDEX raw.orders_load_id_brin SET (autosummarize = on);

    FOREACH name IN ARRAY distributed LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_dist_partition AS p WHERE p.logicalrelid = name::regclass);
        EXECUTE format('SELECT count(*) FROM %s', name) INTO rows_before;
        PERFORM create_distributed_table(
            name, 'order_id', colocate_with => CASE WHEN name = distributed[1] THEN 'none' ELSE distributed[1] END
        );
        -- What the coordinator had is in the shards now, and would only take up space here.
        PERFORM truncate_local_data_after_distributing_table(name);
        EXECUTE format('SELECT count(*) FROM %s', name) INTO rows_after;
        IF rows_after != rows_before THEN
            RAISE EXCEPTION '% had % rows and has % in its shards', name, rows_before, rows_after;
        END IF;
    END LOOP;

    CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON raw.orders
    FOR EACH STATEMENT EXECUTE FUNCTION raw.refuse_change();
    ALTER TABLE raw.orders ENABLE ALWAYS TRIGGER append_only;
    CREATE TRIGGER append_only_truncate BEFORE TRUNCATE ON raw.orders
    FOR EACH STATEMENT EXECUTE FUNCTION raw.refuse_change();
    ALTER TABLE raw.orders ENABLE ALWAYS TRIGGER append_only_truncate;

    -- Into a shard COPY brings the columns that the coordinator filled as well, under the name of who loads. So the
    -- whole row is granted there; and here, where everybody comes in, only what it was.
    GRANT INSERT ON raw.orders TO de_dw_pipeline;
    PERFORM set_config('citus.enable_ddl_propagation', 'off', true);
    REVOKE INSERT ON raw.orders FROM de_dw_pipeline;
    EXECUTE (
        SELECT format('GRANT INSERT (%s) ON raw.orders TO de_dw_pipeline', string_agg(quote_ident(a.attname), ', '))
        FROM pg_attribute AS a
        WHERE a.attrelid = 'raw.orders'::regclass AND a.attnum > 0 AND NOT a.attisdropped
            AND a.attname NOT IN ('row_id', 'load_id')
    );
END
$$;

-- From here on for the coordinator alone.
SELECT set_config('citus.enable_ddl_propagation', 'off', true);

-- The coordinator's own catalog says that a table in shards is empty, and a refresh is chosen by its size.
CREATE OR REPLACE FUNCTION stg.rows_in_shards(table_id oid) RETURNS double precision
LANGUAGE sql
STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT sum(greatest(s.result::double precision, 0))
    FROM run_command_on_shards(table_id, 'SELECT reltuples FROM pg_class WHERE oid = ''%s''::regclass') AS s
$$;
COMMENT ON FUNCTION stg.rows_in_shards(oid) IS
'Rows of a distributed table as last estimated by ANALYZE on the workers.';

-- Citus commits on the coordinator, where the ledger is, and then on the workers. A refresh that came in between would
-- record a load that it has not seen in full. What one statement has seen there the next one sees too.
CREATE OR REPLACE FUNCTION stg.assert_in_shards(source_table text, loads bigint[]) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    expected bigint := (SELECT coalesce(sum(l.rows), 0) FROM raw.loads AS l WHERE l.load_id = ANY (loads));
    found bigint;
BEGIN
    EXECUTE format('SELECT count(*) FROM %I.%I WHERE load_id = ANY ($1)', VARIADIC string_to_array(source_table, '.'))
        INTO found USING loads;
    IF found != expected THEN
        RAISE EXCEPTION 'the pending loads of % have % rows by the ledger, and % in its shards',
            source_table, expected, found
            USING ERRCODE = 'serialization_failure',
                  HINT = 'One is being committed on the workers: try again in a minute. If it stays so: '
                         'SELECT recover_prepared_transactions().';
    END IF;
END
$$;
COMMENT ON FUNCTION stg.assert_in_shards(text, bigint[]) IS
'Error 40001 unless all rows of these loads are to be seen on the workers.';

DO $$
DECLARE
    columns text := (
        SELECT string_agg('o.' || quote_ident(a.attname), ', ' ORDER BY a.attnum ASC)
        FROM pg_attribute AS a
        WHERE a.attrelid = 'stg.orders_latest'::regclass AND a.attnum > 0 AND NOT a.attisdropped
    );
    change record;
    definition text;
BEGIN
    -- Changed as they stand, so that whatever a migration makes of them stays. tests/sql/test_citus.py knows the words.
    FOR change IN
        SELECT
            c.name,
            c.old,
            c.new
        FROM (
            VALUES
            -- The workers look into the setting too, where a script of sql/transforms/ does, and only SET LOCAL is
            -- handed on to them. By EXECUTE, as what is handed on is the whole string that the statement stands in.
            (
                'stg.begin_refresh(text)',
                $old$    PERFORM set_config('de_dw.loads_to_apply', loads::text, true);$old$,
                $new$    PERFORM stg.assert_in_shards(source_table, loads);
    PERFORM set_config('citus.propagate_set_commands', 'local', true);
    EXECUTE format('SET LOCAL de_dw.loads_to_apply = %L', loads);
    PERFORM set_config('citus.propagate_set_commands', 'none', true);$new$
            ),
            -- What the swap from all of raw records are the loads that were looked at, not those that came since.
            (
                'stg.begin_refresh(text)',
                $old$    loads := ARRAY(SELECT stg.loads_to_apply(table_name));$old$,
                $new$    PERFORM set_config('de_dw.loads_to_apply', '', true);
    loads := ARRAY(SELECT stg.loads_to_apply(table_name));$new$
            ),
            (
                'stg.loads_to_apply(text)',
                $old$    EXECUTE format('SELECT NOT EXISTS$old$,
                $new$    IF current_setting('de_dw.loads_to_apply', true) LIKE '{%}' THEN
        RETURN QUERY SELECT unnest(current_setting('de_dw.loads_to_apply')::bigint[]);
        RETURN;
    END IF;
    EXECUTE format('SELECT NOT EXISTS$new$
            ),
            ('stg.refresh_status', 'c.reltuples', 'stg.rows_in_shards(c.oid)')
        ) AS c (name, old, new)
    LOOP
        IF change.name LIKE '%(%' THEN
            definition := pg_get_functiondef(change.name::regprocedure);
        ELSE
            definition := format('CREATE OR REPLACE VIEW %s AS %s', change.name, pg_get_viewdef(change.name::regclass));
        END IF;
        CONTINUE WHEN position(change.new IN definition) > 0;
        IF position(change.old IN definition) = 0 THEN
            RAISE EXCEPTION '% has been changed, and sql/scale/citus.sql has to follow: it looked for %',
                change.name, change.old;
        END IF;
        EXECUTE replace(definition, change.old, change.new);
    END LOOP;

    -- Citus takes no SQL function with a parameter that reads distributed tables.
    EXECUTE format(
        'CREATE OR REPLACE FUNCTION stg.orders_as_of(instant timestamptz) RETURNS SETOF stg.orders_latest
        LANGUAGE plpgsql
        STABLE
        AS $body$
        BEGIN
            RETURN QUERY
            SELECT DISTINCT ON (o.order_id) %s
            FROM raw.orders AS o
            WHERE o.updated_at <= instant
            ORDER BY o.order_id ASC, o.updated_at DESC, o.row_id DESC;
        END
        $body$',
        columns
    );
END
$$;

COMMIT;

SELECT
    p.logicalrelid AS distributed_table,
    p.colocationid AS colocation,
    count(s.shardid) AS shards
FROM pg_dist_partition AS p
LEFT JOIN pg_dist_shard AS s ON p.logicalrelid = s.logicalrelid
GROUP BY p.logicalrelid, p.colocationid
ORDER BY p.logicalrelid ASC;
