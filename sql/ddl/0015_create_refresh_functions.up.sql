-- Schemas stg and ops: functions that refresh, verify and rebuild any staging table.

-- What the refreshes know of a table, from the catalog: so a column or a table more needs nothing new of them.
CREATE FUNCTION stg.shape_of(
    table_name text,
    OUT source text,
    OUT key_list text,
    OUT column_list text,
    OUT same_key text,
    OUT assignments text,
    OUT tombstone text
)
LANGUAGE plpgsql
STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    parent regclass := to_regclass(format('stg.%I', table_name));
BEGIN
    -- The name is without quotes, so only the catalog knows which of its dots ends the schema.
    SELECT
        format('%I.%I', n.nspname, c.relname),
        CASE
            WHEN v.tombstone_column IS NOT NULL
                THEN format('(%I = %L) IS TRUE', v.tombstone_column, v.tombstone_value)
        END
    INTO source, tombstone
    FROM stg.table_versions AS v
    INNER JOIN pg_namespace AS n ON starts_with(v.source_table, n.nspname || '.')
    INNER JOIN pg_class AS c ON n.oid = c.relnamespace AND c.relname = substr(v.source_table, length(n.nspname) + 2)
    WHERE v.table_name = shape_of.table_name;
    IF source IS NULL OR parent IS NULL THEN
        RAISE EXCEPTION 'stg.table_versions does not say what stg.% is made from', table_name
            USING HINT = 'SELECT table_name FROM stg.table_versions; names the staging tables.';
    END IF;
    SELECT
        string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FILTER (WHERE i.is_key),
        string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum),
        string_agg(format('a.%1$I = b.%1$I', a.attname), ' AND ' ORDER BY a.attnum) FILTER (WHERE i.is_key),
        string_agg(format('%1$I = excluded.%1$I', a.attname), ', ' ORDER BY a.attnum) FILTER (WHERE NOT i.is_key)
    INTO key_list, column_list, same_key, assignments
    FROM pg_attribute AS a
    CROSS JOIN LATERAL (
        SELECT EXISTS (
            SELECT 1 FROM pg_index AS p
            WHERE p.indrelid = parent AND p.indisprimary AND a.attnum = ANY (p.indkey)
        ) AS is_key
    ) AS i
    WHERE a.attrelid = parent AND a.attnum > 0 AND NOT a.attisdropped;
END
$$;
COMMENT ON FUNCTION stg.shape_of(text) IS
'A staging table as pieces of SQL: its source, its key and columns as lists, same_key of a and b, the assignments of an
upsert, and the condition of its tombstones, NULL without. Takes the name without schema.';

CREATE OR REPLACE FUNCTION stg.loads_to_apply(table_name text) RETURNS SETOF bigint
LANGUAGE plpgsql
STABLE -- so that it sees just what the statement sees that applies them
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    deleted regclass := to_regclass(format('stg.%I', table_name || '_deleted'));
    shape record;
    is_empty boolean;
BEGIN
    -- Somebody truncated it, or a superuser's pg_dump met a swap: whatever was recorded, it is not there.
    EXECUTE format('SELECT NOT EXISTS (SELECT 1 FROM stg.%I)', table_name || '_live') INTO is_empty;
    IF is_empty AND deleted IS NOT NULL THEN -- unless each of its keys is remembered as deleted
        SELECT * INTO shape FROM stg.shape_of(table_name);
        EXECUTE format(
            'SELECT EXISTS (
                SELECT 1 FROM %s AS a
                WHERE a.load_id IN (SELECT p.load_id FROM stg.applied_loads AS p WHERE p.table_name = %L)
                    AND NOT EXISTS (SELECT 1 FROM %s AS b WHERE %s)
            )', shape.source, table_name, deleted, shape.same_key
        ) INTO is_empty;
    END IF;
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

CREATE FUNCTION stg.begin_swap(table_name text) RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    loads_to_apply bigint := stg.begin_refresh(table_name);
BEGIN
    PERFORM stg.empty_spare(table_name);
    PERFORM set_config('work_mem', '64MB', true); -- for the sort; with more it takes longer, with the default of 4 MB too
    RETURN loads_to_apply;
END
$$;
COMMENT ON FUNCTION stg.begin_swap(text) IS
'The first step of a refresh by a swap, in its transaction: stg.begin_refresh and stg.empty_spare. Returns the number of
loads to apply. Takes the table''s name without schema.';

-- The loads as a constant: the planner looks into it, and knows nothing of what a subquery will find.
CREATE FUNCTION stg.newest_of(table_name text, loads bigint[]) RETURNS text
LANGUAGE sql
STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT format(
        'SELECT DISTINCT ON (%1$s) %2$s FROM %3$s WHERE load_id = ANY (%4$L::bigint[])
        ORDER BY %1$s, updated_at DESC, row_id DESC', s.key_list, s.column_list, s.source, loads
    )
    FROM stg.shape_of(table_name) AS s
$$;
COMMENT ON FUNCTION stg.newest_of(text, bigint[]) IS
'The query of the newest version of each key that some loads brought, tombstones among them. Takes the staging table''s
name without schema.';

-- What the spare of a table takes in, from the statement that fills it to the swap: as a setting, which ends with the
-- transaction or is undone with a savepoint as the rows are.
CREATE FUNCTION stg.note_taken_in(table_name text, loads bigint[]) RETURNS void
LANGUAGE sql
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT set_config('de_dw.taken_in', format('%s %s', table_name, loads), true)
$$;
COMMENT ON FUNCTION stg.note_taken_in(text, bigint[]) IS
'Notes for stg.swap which loads the spare of a staging table takes in; NULL: none that could be published.';

CREATE FUNCTION stg.noted_taken_in(table_name text) RETURNS bigint[]
LANGUAGE sql
STABLE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT nullif(substr(noted, length(table_name) + 2), '')::bigint[]
    FROM current_setting('de_dw.taken_in', true) AS noted
    WHERE starts_with(noted, table_name || ' ')
$$;
COMMENT ON FUNCTION stg.noted_taken_in(text) IS
'The loads that stg.note_taken_in has noted of a staging table, or NULL.';

CREATE FUNCTION stg.takes_in(table_name text) RETURNS boolean
LANGUAGE plpgsql
STABLE -- so that it sees just what the statement sees that calls it
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    loads bigint[] := ARRAY(SELECT stg.loads_to_apply(table_name));
    before bigint[] := stg.noted_taken_in(table_name);
BEGIN
    IF before IS NOT NULL THEN -- by a statement before: a load is in if all of them saw it
        loads := ARRAY(SELECT unnest(loads) INTERSECT SELECT unnest(before));
    END IF;
    PERFORM stg.note_taken_in(table_name, loads);
    RETURN true;
END
$$;
COMMENT ON FUNCTION stg.takes_in(text) IS
'True. In the WHERE of each statement that fills the spare, as (SELECT stg.takes_in(...)): notes for stg.swap the loads
that it takes in, which are applied when it is published. Takes the table''s name without schema.';

CREATE FUNCTION stg.merge_pending(table_name text, OUT loads_to_apply bigint, OUT rows bigint)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET work_mem = '64MB' -- for the sort; with more it takes longer, with the default of 4 MB too
SET enable_seqscan = off -- the index on load_id, also while raw has no statistics
AS $$
DECLARE
    shape record;
    live text := format('stg.%I', table_name || '_live');
    deleted text := format('stg.%I', table_name || '_deleted');
    loads bigint[];
    newest text;
BEGIN
    loads_to_apply := stg.begin_refresh(table_name); -- waits for another refresh
    PERFORM stg.note_taken_in(table_name, NULL); -- a spare that was filled before is older than what comes now
    loads := current_setting('de_dw.loads_to_apply')::bigint[];
    SELECT * INTO shape FROM stg.shape_of(table_name);
    newest := stg.newest_of(table_name, loads);
    IF shape.tombstone IS NULL THEN
        EXECUTE format(
            'INSERT INTO %1$s AS previous (%2$s) %3$s
            ON CONFLICT (%4$s) DO UPDATE SET %5$s
            WHERE (previous.updated_at, previous.row_id) < (excluded.updated_at, excluded.row_id)',
            live, shape.column_list, newest, shape.key_list, shape.assignments
        );
    ELSE
        -- What is newer than what is known of its key, be it a row or a tombstone; each key is in one of the two.
        EXECUTE format(
            'WITH newest AS MATERIALIZED (%3$s),
            newer AS MATERIALIZED (
                SELECT a.*, %6$s AS "de_dw is tombstone" FROM newest AS a
                WHERE NOT EXISTS (
                    SELECT 1 FROM %1$s AS b WHERE %7$s AND (b.updated_at, b.row_id) >= (a.updated_at, a.row_id)
                ) AND NOT EXISTS (
                    SELECT 1 FROM %8$s AS b WHERE %7$s AND (b.updated_at, b.row_id) >= (a.updated_at, a.row_id)
                )
            ),
            is_back AS (DELETE FROM %8$s AS a USING newer AS b WHERE %7$s AND NOT b."de_dw is tombstone"),
            is_gone AS (DELETE FROM %1$s AS a USING newer AS b WHERE %7$s AND b."de_dw is tombstone"),
            remembered AS (
                INSERT INTO %8$s (%2$s) SELECT %2$s FROM newer WHERE "de_dw is tombstone"
                ON CONFLICT (%4$s) DO UPDATE SET %5$s
            )
            INSERT INTO %1$s (%2$s) SELECT %2$s FROM newer WHERE NOT "de_dw is tombstone"
            ON CONFLICT (%4$s) DO UPDATE SET %5$s',
            live, shape.column_list, newest, shape.key_list, shape.assignments, shape.tombstone, shape.same_key, deleted
        );
    END IF;
    GET DIAGNOSTICS rows = ROW_COUNT;
    INSERT INTO stg.applied_loads (table_name, load_id, finished_at)
    SELECT merge_pending.table_name, l.load_id, l.finished_at FROM raw.loads AS l
    WHERE l.load_id = ANY (loads)
    ON CONFLICT DO NOTHING;
END
$$;
COMMENT ON FUNCTION stg.merge_pending(text) IS
'Refreshes a staging table in place: the newest version of each key among its rows and the loads not yet applied. Costs
what the new batch costs, and no reader waits or gets an error. Returns the loads that it took in and the rows written.
Takes the name without schema; stg.analyze_if_stale belongs after the commit.';

CREATE FUNCTION stg.union_pending(table_name text, OUT loads_to_apply bigint, OUT rows bigint)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    shape record;
    loads bigint[];
BEGIN
    loads_to_apply := stg.begin_swap(table_name); -- waits for another refresh
    loads := current_setting('de_dw.loads_to_apply')::bigint[];
    SELECT * INTO shape FROM stg.shape_of(table_name);
    -- Every row of an applied load is in the table, or in its tombstones, or was older than the one that is.
    EXECUTE format(
        'INSERT INTO %1$s (%4$s)
        SELECT DISTINCT ON (%3$s) %4$s
        FROM (
            SELECT %4$s FROM %2$s
            %6$s
            UNION ALL
            SELECT %4$s FROM %5$s WHERE load_id = ANY (%7$L::bigint[])
        ) AS version
        ORDER BY %3$s, updated_at DESC, row_id DESC',
        format('stg.%I', table_name || '_spare'),
        format('stg.%I', table_name || '_live'),
        shape.key_list,
        shape.column_list,
        shape.source,
        CASE
            WHEN shape.tombstone IS NOT NULL
                THEN format('UNION ALL SELECT %s FROM stg.%I', shape.column_list, table_name || '_deleted')
        END,
        loads
    );
    PERFORM stg.note_taken_in(table_name, loads);
    rows := stg.swap(table_name);
END
$$;
COMMENT ON FUNCTION stg.union_pending(text) IS
'Refreshes a staging table by a swap: the newest version of each key among its rows and the loads not yet applied. Costs
what the table costs, not the history. Returns the loads that it took in and the rows published. Takes the name without
schema; stg.analyze_if_stale belongs after the commit.';

CREATE FUNCTION stg.verify(
    table_name text, OUT missing bigint, OUT extra bigint, OUT different bigint, OUT compared bigint
)
LANGUAGE plpgsql
STABLE
SET search_path = pg_catalog, pg_temp
SET work_mem = '64MB'
AS $$
DECLARE
    shape record;
    parent text := format('stg.%I', table_name);
BEGIN
    SELECT * INTO shape FROM stg.shape_of(table_name);
    -- Names that no column has, or it would be meant. One statement, so that all of it is of one moment. Byte by byte: to the operator = 9.9 and 9.90 are the same.
    EXECUTE format(
        'WITH "de_dw expected" AS (
            SELECT DISTINCT ON (%1$s) %2$s FROM %3$s
            WHERE load_id != ALL (ARRAY(SELECT p.load_id FROM stg.pending_loads AS p WHERE p.table_name = %5$L))
            ORDER BY %1$s, updated_at DESC, row_id DESC
        ),
        a AS (
            SELECT "de_dw expected" AS "de_dw version", %4$s AS "de_dw is tombstone", %1$s FROM "de_dw expected"
        ),
        "de_dw published" AS (SELECT %2$s FROM %6$s),
        b AS (
            SELECT "de_dw published" AS "de_dw version", false AS "de_dw is tombstone", %1$s FROM "de_dw published" %7$s
        )
        SELECT
            count(*) FILTER (WHERE b."de_dw is tombstone" IS NULL),
            count(*) FILTER (WHERE a."de_dw is tombstone" IS NULL),
            count(*) FILTER (
                WHERE record_image_ne(a."de_dw version", b."de_dw version") OR a."de_dw is tombstone" != b."de_dw is tombstone"
            ),
            count(*) FILTER (WHERE a."de_dw is tombstone" IS NOT NULL AND b."de_dw is tombstone" IS NOT NULL)
        FROM a FULL JOIN b ON %8$s',
        shape.key_list,
        shape.column_list,
        shape.source,
        coalesce(shape.tombstone, 'false'),
        table_name,
        parent,
        CASE
            WHEN shape.tombstone IS NOT NULL
                THEN format(
                    'UNION ALL SELECT "de_dw deleted", true, %1$s FROM (SELECT %2$s FROM stg.%3$I) AS "de_dw deleted"',
                    shape.key_list, shape.column_list, table_name || '_deleted'
                )
        END,
        shape.same_key
    ) INTO missing, extra, different, compared;
END
$$;
COMMENT ON FUNCTION stg.verify(text) IS
'Compares a staging table with a DISTINCT ON over all of its source: one row of counts, of which missing, extra and
different are 0 when it has just the newest versions. Its tombstones are compared too; a load that no refresh has applied
is left out. Takes the name without schema.';

-- The table as it stood when a load had been applied, and all that were finished before it.
CREATE FUNCTION stg.as_of_load(staging_table anyelement, load_id bigint) RETURNS SETOF anyelement
LANGUAGE plpgsql
STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    shape record;
    table_name text := (
        SELECT c.relname FROM pg_type AS t INNER JOIN pg_class AS c ON t.typrelid = c.oid
        WHERE t.oid = pg_typeof(staging_table)
    );
BEGIN
    SELECT * INTO shape FROM stg.shape_of(table_name);
    RETURN QUERY EXECUTE format(
'SELECT %s FROM (%s) AS version WHERE NOT (%s)',
        shape.column_list,
        stg.newest_of(table_name, ARRAY(SELECT stg.loads_until(table_name, as_of_load.load_id))),
        coalesce(shape.tombstone, 'false')
    );
END
$$;
COMMENT ON FUNCTION stg.as_of_load(anyelement, bigint) IS
'The rows of a staging table as they stood after a load: SELECT * FROM stg.as_of_load(NULL::stg.orders_latest, 17). Made
from raw when it is asked.';

CREATE FUNCTION stg.loads_until(table_name text, load_id bigint) RETURNS SETOF bigint
LANGUAGE plpgsql
STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    last record;
BEGIN
    SELECT l.table_name, l.finished_at, l.load_id INTO last
    FROM raw.loads AS l
    INNER JOIN stg.table_versions AS v ON l.table_name = v.source_table
    WHERE v.table_name = loads_until.table_name AND l.load_id = loads_until.load_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'load % is none of what stg.% is made from', load_id, table_name
            USING HINT = 'SELECT * FROM ops.loads ORDER BY load_id; lists the loads.';
    END IF;
    RETURN QUERY
    SELECT l.load_id FROM raw.loads AS l
    WHERE l.table_name = last.table_name AND (l.finished_at, l.load_id) <= (last.finished_at, last.load_id);
END
$$;
COMMENT ON FUNCTION stg.loads_until(text, bigint) IS
'The load_id of a load and of each load of the same table that was finished before it.';

CREATE FUNCTION stg.rebuild_as_of(table_name text, load_id bigint) RETURNS bigint
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    shape record;
    loads bigint[] := ARRAY(SELECT stg.loads_until(table_name, rebuild_as_of.load_id));
    published bigint;
BEGIN
    PERFORM stg.begin_swap(table_name); -- waits for another refresh
    SELECT * INTO shape FROM stg.shape_of(table_name);
    EXECUTE format(
        'INSERT INTO stg.%I (%s) %s', table_name || '_spare', shape.column_list, stg.newest_of(table_name, loads)
    );
    PERFORM stg.note_taken_in(table_name, loads);
    PERFORM set_config('de_dw.allow_fewer_rows', 'yes', true); -- there were fewer then
    published := stg.swap(table_name);
    PERFORM set_config('de_dw.allow_fewer_rows', '', true);
    PERFORM stg.forget_applied(table_name, loads);
    RETURN published;
END
$$;
COMMENT ON FUNCTION stg.rebuild_as_of(text, bigint) IS
'Publishes a staging table as it stood after a load, and returns the number of rows. The loads after it are pending
then: the next refresh takes them in again. Takes the name without schema.';

CREATE FUNCTION stg.forget_applied(table_name text, but_for bigint[]) RETURNS void
LANGUAGE sql
SECURITY DEFINER -- the pipeline may add to what was applied, and not take away but here
SET search_path = pg_catalog, pg_temp
AS $$
    DELETE FROM stg.applied_loads AS a
    WHERE a.table_name = forget_applied.table_name AND a.load_id != ALL (but_for)
$$;
COMMENT ON FUNCTION stg.forget_applied(text, bigint[]) IS
'Makes loads pending again that a staging table has applied: to apply them twice changes nothing.';

REVOKE EXECUTE ON FUNCTION
stg.shape_of(text),
stg.begin_swap(text),
stg.newest_of(text, bigint[]),
stg.note_taken_in(text, bigint[]),
stg.noted_taken_in(text),
stg.takes_in(text),
stg.merge_pending(text),
stg.union_pending(text),
stg.verify(text),
stg.as_of_load(anyelement, bigint),
stg.loads_until(text, bigint),
stg.rebuild_as_of(text, bigint),
stg.forget_applied(text, bigint[])
FROM public;
GRANT EXECUTE ON FUNCTION
stg.shape_of(text),
stg.newest_of(text, bigint[]),
stg.verify(text),
stg.as_of_load(anyelement, bigint),
stg.loads_until(text, bigint)
TO de_dw_pipeline, de_dw_reader;
GRANT EXECUTE ON FUNCTION
stg.begin_swap(text),
stg.note_taken_in(text, bigint[]),
stg.noted_taken_in(text),
stg.takes_in(text),
stg.merge_pending(text),
stg.union_pending(text),
stg.rebuild_as_of(text, bigint),
stg.forget_applied(text, bigint[])
TO de_dw_pipeline;

-- For checks, which are asked of any table: what is about to be taken in, without its columns.
CREATE FUNCTION ops.pending_versions(newer_than timestamptz, at_most bigint)
RETURNS TABLE (key json, updated_at timestamptz, load_id bigint, row_id bigint)
LANGUAGE plpgsql
STABLE
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off
AS $$
DECLARE
    shape record;
BEGIN
    SELECT * INTO shape FROM stg.shape_of(current_setting('de_dw.table'));
    RETURN QUERY EXECUTE format(
        'SELECT row_to_json("de_dw key"), v.updated_at, v.load_id, v.row_id
        FROM %s AS v CROSS JOIN LATERAL (SELECT %s) AS "de_dw key"
        WHERE v.load_id = ANY (%L::bigint[]) AND v.updated_at > %L
        ORDER BY v.updated_at DESC
        LIMIT %s',
        shape.source,
        shape.key_list,
        current_setting('de_dw.loads_to_apply'),
        newer_than,
        at_most
    );
END
$$;
COMMENT ON FUNCTION ops.pending_versions(timestamptz, bigint) IS
'The newest versions that the loads bring which the setting de_dw.loads_to_apply names, of the staging table that
de_dw.table names: of those newer than an instant so many, the newest first. For checks, which have both settings.';
REVOKE EXECUTE ON FUNCTION ops.pending_versions(timestamptz, bigint) FROM public;
GRANT EXECUTE ON FUNCTION ops.pending_versions(timestamptz, bigint) TO de_dw_pipeline, de_dw_reader;

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
    deleted text := format('stg.%I', table_name || '_deleted');
    deleted_rows bigint := 0; -- tombstones as they were, and
    spare_deleted_rows bigint := 0; -- as they will be
    shape record;
    loads bigint[] := stg.noted_taken_in(table_name);
    next_version bigint;
    index_name text; -- of the live table
    spare_index_name text;
    blockers text;
    only_autovacuum boolean;
BEGIN
    IF (
        SELECT v.spare_emptied_by = pg_current_xact_id() FROM stg.table_versions AS v
        WHERE v.table_name = swap.table_name
    ) IS NOT TRUE THEN
        RAISE EXCEPTION 'the spare of % was not emptied and filled in this transaction', parent
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'What is in it is older than what is published. Run a script of sql/transforms/ as a whole.';
    END IF;
    IF loads IS NULL THEN
        RAISE EXCEPTION 'the statement that filled the spare of % does not say which loads it took in', parent
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = format('Its condition is: WHERE (SELECT stg.takes_in(%L))', table_name);
    END IF;
    -- Loads that were committed since stg.begin_refresh are among them.
    PERFORM ops.assert_checked(table_name, loads);

    SELECT * INTO shape FROM stg.shape_of(table_name);
    IF shape.tombstone IS NOT NULL THEN
        -- A key whose latest version is a tombstone is not published, but remembered.
        EXECUTE format('DELETE FROM %s', deleted);
        GET DIAGNOSTICS deleted_rows = ROW_COUNT;
        EXECUTE format(
            'WITH gone AS (DELETE FROM %1$s WHERE %3$s RETURNING %4$s) INSERT INTO %2$s (%4$s) SELECT %4$s FROM gone',
            spare, deleted, shape.tombstone, shape.column_list
        );
        GET DIAGNOSTICS spare_deleted_rows = ROW_COUNT;
    END IF;
    EXECUTE format('SELECT count(*) FROM %s', live) INTO live_rows;
    EXECUTE format('SELECT count(*) FROM %s', spare) INTO spare_rows;
    IF spare_rows + spare_deleted_rows < live_rows + deleted_rows
        AND current_setting('de_dw.allow_fewer_rows', true) IS DISTINCT FROM 'yes'
    THEN
        RAISE EXCEPTION 'refusing to publish % rows in place of the % rows of %',
            spare_rows + spare_deleted_rows, live_rows + deleted_rows, parent
            USING HINT = 'raw only grows, so a refresh never finds fewer keys than the last: look at the transform, and at '
                         'who else writes to schema stg. SET de_dw.allow_fewer_rows = ''yes'' publishes them all the same.';
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
    SELECT swap.table_name, l.load_id, l.finished_at FROM raw.loads AS l
    WHERE l.load_id = ANY (loads)
    ON CONFLICT DO NOTHING;
    PERFORM stg.note_taken_in(table_name, NULL);
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
    PERFORM stg.note_taken_in(table_name, NULL);
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

-- What a swap takes in is in a setting of its transaction now. Nobody else could read it.
-- squawk-ignore ban-drop-table
DROP TABLE stg.spare_loads;
