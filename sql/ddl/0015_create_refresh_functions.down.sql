-- Schemas stg and ops: each staging table is refreshed by scripts of its own again.

DROP FUNCTION ops.pending_versions(timestamptz, bigint);
DROP FUNCTION stg.rebuild_as_of(text, bigint);
DROP FUNCTION stg.forget_applied(text, bigint[]);
DROP FUNCTION stg.as_of_load(anyelement, bigint);
DROP FUNCTION stg.loads_until(text, bigint);
DROP FUNCTION stg.verify(text);
DROP FUNCTION stg.union_pending(text);
DROP FUNCTION stg.merge_pending(text);
DROP FUNCTION stg.takes_in(text);
DROP FUNCTION stg.noted_taken_in(text);
DROP FUNCTION stg.note_taken_in(text, bigint[]);
DROP FUNCTION stg.newest_of(text, bigint[]);
DROP FUNCTION stg.begin_swap(text);

CREATE OR REPLACE FUNCTION stg.loads_to_apply(table_name text) RETURNS SETOF bigint
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
CREATE TABLE stg.spare_loads (
    table_name text NOT NULL,
    load_id bigint NOT NULL,
    finished_at timestamptz NOT NULL,
    CONSTRAINT spare_loads_pkey PRIMARY KEY (table_name, load_id)
);
COMMENT ON TABLE stg.spare_loads IS
'One row per load that the spare of a staging table takes in besides those applied before: written by the statement that
fills the spare, and made applied by the swap that publishes it.';
COMMENT ON COLUMN stg.spare_loads.table_name IS 'The staging table, without its schema.';
COMMENT ON COLUMN stg.spare_loads.load_id IS 'The load: raw.loads.load_id.';
COMMENT ON COLUMN stg.spare_loads.finished_at IS 'When the load''s last row was in: raw.loads.finished_at.';
ALTER TABLE stg.spare_loads OWNER TO de_dw_pipeline;

CREATE OR REPLACE FUNCTION stg.empty_spare(table_name text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '1min' -- a dump of the database reads the spare as well
AS $$
DECLARE
    parent regclass := format('stg.%I', table_name);
    live regclass := format('stg.%I', table_name || '_live');
    spare regclass := format('stg.%I', table_name || '_spare');
    dependents text;
    name text;
BEGIN
    -- Who comes here without stg.begin_refresh, or although it failed, must not fill the spare beside a merge.
    PERFORM pg_advisory_xact_lock(hashtextextended('refresh stg.' || table_name, 0));

    -- Views, functions, policies and publications stay with the table that they were made on, which is the spare after
    -- the next swap; and no table can be detached that a foreign key looks into.
    SELECT string_agg(DISTINCT d.what, ', ') INTO dependents
    FROM (
        SELECT 'view ' || r.ev_class::regclass::text AS what
        FROM pg_depend AS p
        INNER JOIN pg_rewrite AS r ON p.objid = r.oid
        WHERE p.classid = 'pg_rewrite'::regclass AND p.refclassid = 'pg_class'::regclass
            AND p.refobjid IN (live, spare)
        UNION ALL
        SELECT pg_describe_object(p.classid, p.objid, p.objsubid)
        FROM pg_depend AS p
        WHERE p.refclassid = 'pg_class'::regclass AND p.refobjid IN (live, spare)
            AND (p.classid IN ('pg_proc'::regclass, 'pg_publication_rel'::regclass)
                OR p.classid = 'pg_policy'::regclass AND p.deptype = 'n')
        UNION ALL
        SELECT format('foreign key %I of %s', c.conname, c.conrelid::regclass)
        FROM pg_constraint AS c
        WHERE c.contype = 'f' AND c.confrelid IN (parent, live, spare) AND c.conparentid = 0
    ) AS d;
    IF dependents IS NOT NULL THEN
        RAISE EXCEPTION 'a swap exchanges the tables behind %, but on one of them there is: %', parent, dependents
            USING ERRCODE = 'dependent_objects_still_exist',
                  HINT = format('Drop it. Whatever reads belongs on %s, foreign keys to it are not possible.', parent);
    END IF;

    EXECUTE format('TRUNCATE %s', spare);
    DELETE FROM stg.spare_loads AS s WHERE s.table_name = empty_spare.table_name;
    UPDATE stg.table_versions AS v SET spare_emptied_by = pg_current_xact_id()
    WHERE v.table_name = empty_spare.table_name;
    FOR name IN
        SELECT c.conname FROM pg_constraint AS c WHERE c.conrelid = spare AND c.contype IN ('p', 'u', 'x')
    LOOP
        EXECUTE format('ALTER TABLE %s DROP CONSTRAINT %I', spare, name);
    END LOOP;
    FOR name IN
        SELECT c.relname FROM pg_index AS i INNER JOIN pg_class AS c ON i.indexrelid = c.oid WHERE i.indrelid = spare
    LOOP
        EXECUTE format('DROP INDEX stg.%I', name);
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION stg.swap(table_name text) RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET lock_timeout = '100ms' -- new readers queue behind a waiting lock, so none waits longer than this for a long reader
AS $$
DECLARE
    parent text := format('stg.%I', table_name);
    live_name text := table_name || '_live';
    spare_name text := table_name || '_spare';
    live text := format('stg.%I', live_name);
    spare text := format('stg.%I', spare_name);
    temporary_name text := format('swap %s', gen_random_uuid());
    patience interval := coalesce(nullif(current_setting('de_dw.swap_patience', true), ''), '1 minute');
    give_up_at timestamptz;
    pause float8 := 0.05; -- seconds, doubled up to 2
    live_rows bigint;
    spare_rows bigint;
    next_version bigint;
    index_name text; -- of the live table
    spare_index_name text;
    blockers text;
    only_autovacuum boolean;
BEGIN
    EXECUTE format('SELECT count(*) FROM %s', live) INTO live_rows;
    EXECUTE format('SELECT count(*) FROM %s', spare) INTO spare_rows;
    IF spare_rows < live_rows AND current_setting('de_dw.allow_fewer_rows', true) IS DISTINCT FROM 'yes' THEN
        RAISE EXCEPTION 'refusing to publish % rows in place of the % rows of %', spare_rows, live_rows, parent
            USING HINT = 'raw only grows, so a refresh never finds fewer keys than the last: look at the transform, and at '
                         'who else writes to schema stg. SET de_dw.allow_fewer_rows = ''yes'' publishes them all the same.';
    END IF;

    IF (
        SELECT v.spare_emptied_by = pg_current_xact_id() FROM stg.table_versions AS v
        WHERE v.table_name = swap.table_name
    ) IS NOT TRUE THEN
        RAISE EXCEPTION 'the spare of % was not emptied and filled in this transaction', parent
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'What is in it is older than what is published. Run a script of sql/transforms/ as a whole.';
    END IF;
    PERFORM stg.index_spare(table_name);
    EXECUTE format('ANALYZE %s', spare);

    give_up_at := clock_timestamp() + patience;
    LOOP
        BEGIN
            -- The only lock that a reader can feel, after all the work. The live table is locked with its parent.
            EXECUTE format('LOCK TABLE %s, %s IN ACCESS EXCLUSIVE MODE', parent, spare);
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            SELECT
                string_agg(DISTINCT format('pid %s (%s)', a.pid, concat_ws(', ', a.usename, a.application_name)), ', '),
                bool_and(a.usesysid IS NULL)
            INTO blockers, only_autovacuum
            FROM pg_locks AS l
            INNER JOIN pg_stat_activity AS a ON l.pid = a.pid
            WHERE l.granted
                AND l.pid <> pg_backend_pid()
                AND l.relation IN (parent::regclass, live::regclass, spare::regclass);
            -- Autovacuum makes way for those who wait longer than deadlock_timeout, a second; it belongs to no user.
            PERFORM set_config('lock_timeout', CASE WHEN only_autovacuum THEN '2s' ELSE '100ms' END, true);
            IF clock_timestamp() > give_up_at THEN
                RAISE EXCEPTION '% has been in use for %, by %',
                    parent, patience, coalesce(blockers, 'readers that came and went')
                    USING ERRCODE = 'lock_not_available',
                          HINT = 'It is as it was, stale but correct. Wait for these transactions, or end them with '
                                 'pg_terminate_backend(pid), then run the refresh again.';
            END IF;
            RAISE NOTICE '% is in use by %: trying again', parent, coalesce(blockers, 'a reader that has just gone');
            PERFORM pg_sleep(pause);
            pause := least(pause * 2, 2);
        END;
    END LOOP;

    EXECUTE format('ALTER TABLE %s DETACH PARTITION %s', parent, live);
    EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (MINVALUE) TO (MAXVALUE)', parent, spare);

    -- The names change sides too: _live is always what readers see, and an index is named after the table it is on.
    FOR index_name IN
        SELECT c.relname
        FROM pg_index AS i
        INNER JOIN pg_class AS c ON i.indexrelid = c.oid
        WHERE i.indrelid = live::regclass AND i.indisvalid
    LOOP
        spare_index_name := stg.spare_index_name(table_name, index_name);
        EXECUTE format('ALTER INDEX stg.%I RENAME TO %I', index_name, temporary_name);
        EXECUTE format('ALTER INDEX stg.%I RENAME TO %I', spare_index_name, index_name);
        EXECUTE format('ALTER INDEX stg.%I RENAME TO %I', temporary_name, spare_index_name);
    END LOOP;
    EXECUTE format('ALTER TABLE stg.%I RENAME TO %I', live_name, temporary_name);
    EXECUTE format('ALTER TABLE stg.%I RENAME TO %I', spare_name, live_name);
    EXECUTE format('ALTER TABLE stg.%I RENAME TO %I', temporary_name, spare_name);

    UPDATE stg.table_versions AS v
    SET version = v.version + 1, published_at = clock_timestamp(), spare_emptied_by = NULL
    WHERE v.table_name = swap.table_name
    RETURNING v.version INTO STRICT next_version;
    INSERT INTO stg.applied_loads (table_name, load_id, finished_at)
    SELECT s.table_name, s.load_id, s.finished_at FROM stg.spare_loads AS s
    WHERE s.table_name = swap.table_name
    ON CONFLICT DO NOTHING;
    EXECUTE format(
        'ALTER TYPE stg.%I RENAME TO %I', table_name || '_v' || (next_version - 1), table_name || '_v' || next_version
    );

    RETURN spare_rows;
END
$$;
COMMENT ON FUNCTION stg.swap(text) IS
'Publishes the spare of a staging table in place of its live table, and returns the number of rows. Takes the table''s
name without schema, in the transaction that emptied the spare (stg.empty_spare) and filled it; error 55P03 names who
had it in use for a minute, or for what the setting de_dw.swap_patience says.';

DROP FUNCTION stg.shape_of(text);
