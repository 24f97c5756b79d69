-- Schema ops: what people ask of the warehouse (its loads, its tables, its checks), as views for psql and for the UI.

-- A schema of its own, because whoever runs the pipeline may create in stg, and these are read by all.
CREATE SCHEMA ops;
COMMENT ON SCHEMA ops IS
'What was loaded, published and checked, to look at: nothing in raw or stg depends on it.';
GRANT USAGE ON SCHEMA ops TO de_dw_pipeline, de_dw_reader;

-- The loads of one table from the newest on, a page at a time. The ledger has a row per file: this takes no time.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX loads_table_name_load_id ON raw.loads (table_name, load_id);

-- A batch of a file is named after the file, so the run that loaded it is noted beside it.
ALTER TABLE raw.loads ADD COLUMN run_id text;
COMMENT ON COLUMN raw.loads.run_id IS 'The run of Airflow that loaded the batch; NULL for what was loaded without it.';
GRANT INSERT (run_id) ON raw.loads TO de_dw_pipeline;

CREATE TABLE ops.check_results (
    result_id bigint GENERATED ALWAYS AS IDENTITY,
    table_name text NOT NULL,
    check_name text NOT NULL,
    severity text NOT NULL,
    batch_id text,
    load_ids bigint[] NOT NULL,
    offending bigint NOT NULL,
    examples json NOT NULL DEFAULT '[]',
    is_accepted boolean NOT NULL DEFAULT false,
    checked_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT check_results_pkey PRIMARY KEY (result_id),
    CONSTRAINT severity_is_known CHECK (severity IN ('fail', 'warn')),
    CONSTRAINT offending_is_not_negative CHECK (offending >= 0),
    CONSTRAINT examples_are_a_short_list CHECK (
        json_typeof(examples) = 'array' AND octet_length(examples::text) <= 1000000
    )
);
COMMENT ON TABLE ops.check_results IS
'One row per check and time that it was made, before a staging table takes in what is pending. Append-only.';
COMMENT ON COLUMN ops.check_results.result_id IS 'Which result, in the order of their making, with gaps.';
COMMENT ON COLUMN ops.check_results.table_name IS 'The staging table that was to be refreshed, without its schema.';
COMMENT ON COLUMN ops.check_results.check_name IS 'The check: its file in sql/checks/ begins so.';
COMMENT ON COLUMN ops.check_results.severity IS
'fail: offending rows stop the refresh. warn: they are shown, and it goes on.';
COMMENT ON COLUMN ops.check_results.batch_id IS 'The batch whose run asked: of a DAG run its run_id.';
COMMENT ON COLUMN ops.check_results.load_ids IS 'The loads that were looked at: those pending at that moment.';
COMMENT ON COLUMN ops.check_results.offending IS 'Rows that the check found; 0 is good.';
COMMENT ON COLUMN ops.check_results.examples IS 'Some of these rows, as a JSON array of objects.';
COMMENT ON COLUMN ops.check_results.is_accepted IS 'True when the run was told to go on in spite of this check.';
COMMENT ON COLUMN ops.check_results.checked_at IS 'When: the same for all checks that were made together.';
-- The newest, by its number: who checks waits for the others first, but its transaction may be older than theirs.
CREATE INDEX check_results_table_name_result_id ON ops.check_results (table_name, result_id);
CREATE INDEX check_results_table_name_checked_at ON ops.check_results (table_name, checked_at);

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ops.check_results
FOR EACH STATEMENT EXECUTE FUNCTION raw.refuse_change();
ALTER TABLE ops.check_results ENABLE ALWAYS TRIGGER append_only;
GRANT SELECT ON ops.check_results TO de_dw_pipeline, de_dw_reader;
-- Not checked_at: it is the server's.
GRANT INSERT (table_name, check_name, severity, batch_id, load_ids, offending, examples, is_accepted)
ON ops.check_results TO de_dw_pipeline;

-- Of each table by itself, so that the index says which are the newest, however many there are.
CREATE VIEW ops.last_checks AS
SELECT
    r.table_name,
    r.check_name,
    r.severity,
    r.offending,
    r.examples,
    r.batch_id,
    r.load_ids,
    r.checked_at,
    CASE
        WHEN r.offending = 0 THEN 'passed'
        WHEN r.severity = 'warn' THEN 'warned'
        WHEN r.is_accepted THEN 'accepted'
        ELSE 'failed'
    END AS outcome
FROM stg.table_versions AS v
INNER JOIN LATERAL (
    SELECT c.checked_at
    FROM ops.check_results AS c
    WHERE c.table_name = v.table_name
    ORDER BY c.result_id DESC
    LIMIT 1
) AS newest ON true
INNER JOIN ops.check_results AS r ON v.table_name = r.table_name AND newest.checked_at = r.checked_at;
COMMENT ON VIEW ops.last_checks IS 'One row per check of a staging table, as it came out the last time.';
COMMENT ON COLUMN ops.last_checks.table_name IS 'The staging table, without its schema.';
COMMENT ON COLUMN ops.last_checks.check_name IS 'The check.';
COMMENT ON COLUMN ops.last_checks.severity IS 'fail or warn.';
COMMENT ON COLUMN ops.last_checks.outcome IS
'passed; warned; failed: the refresh did not begin; accepted: it would have failed, but the run was told to go on.';
COMMENT ON COLUMN ops.last_checks.offending IS 'Rows that it found.';
COMMENT ON COLUMN ops.last_checks.examples IS 'Some of these rows, as a JSON array of objects.';
COMMENT ON COLUMN ops.last_checks.batch_id IS 'The batch whose run asked.';
COMMENT ON COLUMN ops.last_checks.load_ids IS 'The loads that it looked at.';
COMMENT ON COLUMN ops.last_checks.checked_at IS 'When.';
GRANT SELECT ON ops.last_checks TO de_dw_pipeline, de_dw_reader;

CREATE VIEW ops.loads AS
SELECT
    l.table_name,
    l.load_id,
    l.batch_id,
    l.run_id,
    l.source,
    l.sha256,
    l.bytes,
    l.rows,
    l.rejects,
    m.seconds,
    l.batch_updated_at,
    l.repeat_of,
    l.started_at,
    l.finished_at,
    waiting.staging_tables AS waits_for,
    l.bytes / 1e6 / greatest(m.seconds, 0.001) AS mb_per_second
FROM raw.loads AS l
CROSS JOIN LATERAL (SELECT extract(EPOCH FROM l.finished_at - l.started_at)::float8 AS seconds) AS m -- noqa: ST05
CROSS JOIN LATERAL (
    SELECT array_agg(p.table_name ORDER BY p.table_name ASC) AS staging_tables
    FROM stg.pending_loads AS p
    WHERE p.load_id = l.load_id
) AS waiting;
COMMENT ON VIEW ops.loads IS 'One row per committed load, with its time, its speed, and who has still to take it in.';
COMMENT ON COLUMN ops.loads.table_name IS 'The table that was loaded, with its schema.';
COMMENT ON COLUMN ops.loads.load_id IS 'Which load; the rows it brought carry it.';
COMMENT ON COLUMN ops.loads.batch_id IS 'The batch''s name: the run that made it, or the path of a file.';
COMMENT ON COLUMN ops.loads.run_id IS 'The run of Airflow that loaded it, if one did.';
COMMENT ON COLUMN ops.loads.source IS 'Where the bytes came from: the path of the file.';
COMMENT ON COLUMN ops.loads.sha256 IS 'SHA-256 of the file''s bytes, in hexadecimal.';
COMMENT ON COLUMN ops.loads.bytes IS 'Size of the file in bytes, header included.';
COMMENT ON COLUMN ops.loads.rows IS 'Rows that the load brought.';
COMMENT ON COLUMN ops.loads.rejects IS 'Records that it left out: see the table of that name with _rejects behind it.';
COMMENT ON COLUMN ops.loads.seconds IS 'From the beginning of its transaction until the last row was in.';
COMMENT ON COLUMN ops.loads.mb_per_second IS 'Bytes of the file by these seconds, in millions.';
COMMENT ON COLUMN ops.loads.batch_updated_at IS 'The updated_at that all rows of the batch share, if they do.';
COMMENT ON COLUMN ops.loads.repeat_of IS 'The first load of the same bytes, when this one was told to load them again.';
COMMENT ON COLUMN ops.loads.started_at IS 'When its transaction began.';
COMMENT ON COLUMN ops.loads.finished_at IS 'When the last row was in, just before COMMIT.';
COMMENT ON COLUMN ops.loads.waits_for IS
'Staging tables that have not taken it in yet, without their schema; NULL when there is none.';
GRANT SELECT ON ops.loads TO de_dw_pipeline, de_dw_reader;

CREATE VIEW ops.tables AS
SELECT
    v.table_name,
    v.source_table,
    status.table_rows,
    status.pending_loads,
    status.pending_rows,
    loads.last_loaded_at,
    loads.last_batch_updated_at,
    applied.last_applied_at,
    coalesce(loads.loads, 0) AS loads,
    coalesce(loads.rows, 0) AS source_rows,
    coalesce(loads.rejects, 0) AS rejects,
    pg_total_relation_size(to_regclass(format('stg.%I', v.table_name || '_live'))) AS table_bytes,
    -- The name is without quotes, so only the catalog knows which of its dots ends the schema.
    (
        SELECT pg_total_relation_size(c.oid)
        FROM pg_namespace AS n
        INNER JOIN pg_class AS c ON n.oid = c.relnamespace
        WHERE
            starts_with(v.source_table, n.nspname || '.')
            AND c.relname = substr(v.source_table, length(n.nspname) + 2)
    ) AS source_bytes
FROM stg.table_versions AS v
INNER JOIN stg.refresh_status AS status ON v.table_name = status.table_name
LEFT JOIN LATERAL (
    SELECT
        count(*) AS loads,
        sum(l.rows)::bigint AS rows,
        sum(l.rejects)::bigint AS rejects,
        max(l.finished_at) AS last_loaded_at,
        max(l.batch_updated_at) FILTER (WHERE isfinite(l.batch_updated_at)) AS last_batch_updated_at
    FROM raw.loads AS l
    WHERE l.table_name = v.source_table
) AS loads ON true
LEFT JOIN LATERAL (
    SELECT max(a.applied_at) AS last_applied_at
    FROM stg.applied_loads AS a
    WHERE a.table_name = v.table_name
) AS applied ON true;
COMMENT ON VIEW ops.tables IS 'One row per staging table: how large and how fresh it is, and what it is made from.';
COMMENT ON COLUMN ops.tables.table_name IS 'The staging table, without its schema.';
COMMENT ON COLUMN ops.tables.source_table IS 'The table it is made from, with its schema.';
COMMENT ON COLUMN ops.tables.table_rows IS 'Its rows, one per key, as last estimated by ANALYZE.';
COMMENT ON COLUMN ops.tables.table_bytes IS 'Its size on disk in bytes, indexes included, without the spare.';
COMMENT ON COLUMN ops.tables.source_rows IS 'Rows that the loads brought to the source: all versions of all keys.';
COMMENT ON COLUMN ops.tables.source_bytes IS 'Size of the source on disk in bytes, indexes included.';
COMMENT ON COLUMN ops.tables.loads IS 'Committed loads of the source.';
COMMENT ON COLUMN ops.tables.rejects IS 'Records that these loads left out.';
COMMENT ON COLUMN ops.tables.last_loaded_at IS 'When the last row of the newest load was in.';
COMMENT ON COLUMN ops.tables.last_batch_updated_at IS
'The newest moment that a batch stands for, where the ledger says it.';
COMMENT ON COLUMN ops.tables.last_applied_at IS 'When a refresh last took in a load.';
COMMENT ON COLUMN ops.tables.pending_loads IS 'Committed loads that it has not taken in.';
COMMENT ON COLUMN ops.tables.pending_rows IS 'Rows that those loads brought to the source.';
GRANT SELECT ON ops.tables TO de_dw_pipeline, de_dw_reader;

-- It reads all of the source, as nothing else does that is shown: a function, so that nobody asks by mistake.
CREATE FUNCTION ops.versions_per_key(table_name text) RETURNS TABLE (versions bigint, keys bigint)
LANGUAGE plpgsql
STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    source text;
    key_columns text;
BEGIN
    SELECT format('%I.%I', n.nspname, c.relname) INTO source
    FROM stg.table_versions AS v
    INNER JOIN pg_namespace AS n ON starts_with(v.source_table, n.nspname || '.')
    INNER JOIN pg_class AS c ON n.oid = c.relnamespace AND v.source_table = n.nspname || '.' || c.relname
    -- Whoever asks reads it with their own rights: so nothing that the pipeline could have put code into.
    WHERE v.table_name = versions_per_key.table_name AND c.relkind IN ('r', 'p')
        AND NOT pg_has_role('de_dw_pipeline', c.relowner, 'MEMBER');
    SELECT string_agg(quote_ident(a.attname), ', ') INTO key_columns
    FROM pg_index AS i
    INNER JOIN pg_attribute AS a ON i.indrelid = a.attrelid AND a.attnum = ANY (i.indkey[0:i.indnkeyatts - 1])
    WHERE i.indrelid = to_regclass(format('stg.%I', versions_per_key.table_name)) AND i.indisprimary;
    IF source IS NULL OR key_columns IS NULL THEN
        RAISE EXCEPTION 'stg.table_versions does not say what stg.% is made from', table_name
            USING HINT = 'SELECT table_name FROM stg.table_versions; names the staging tables.';
    END IF;
    RETURN QUERY EXECUTE format(
        'SELECT k.versions, count(*) AS keys
        FROM (SELECT count(*) AS versions FROM %s GROUP BY %s) AS k
        GROUP BY k.versions ORDER BY k.versions ASC',
        source, key_columns
    );
END
$$;
COMMENT ON FUNCTION ops.versions_per_key(text) IS
'How many keys of a staging table have how many rows in its source: one row per number of versions. Reads all of the
source. Takes the staging table''s name without schema.';
REVOKE EXECUTE ON FUNCTION ops.versions_per_key(text) FROM public;
GRANT EXECUTE ON FUNCTION ops.versions_per_key(text) TO de_dw_pipeline, de_dw_reader;

-- What is published is what was checked: a load may be committed after the checks, and a refresh may be run again
-- without them. The DAG asks for it by a setting, since psql's user knows what they do.
CREATE FUNCTION ops.assert_checked(table_name text, loads bigint[]) RETURNS void
LANGUAGE plpgsql
STABLE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    failed text;
    unchecked text;
BEGIN
    IF current_setting('de_dw.refresh_only', true) IS DISTINCT FROM 'checked' OR cardinality(loads) = 0 THEN
        RETURN;
    END IF;
    SELECT string_agg(c.check_name, ', ') INTO failed
    FROM ops.last_checks AS c
    WHERE c.table_name = assert_checked.table_name AND c.outcome = 'failed';
    SELECT string_agg(l.load_id::text, ', ') INTO unchecked
    FROM (
        SELECT unnest(loads) AS load_id
        EXCEPT
        SELECT unnest(c.load_ids) FROM ops.last_checks AS c WHERE c.table_name = assert_checked.table_name
    ) AS l;
    IF failed IS NOT NULL OR unchecked IS NOT NULL THEN
        RAISE EXCEPTION 'stg.% takes in no load that was not checked: %', table_name,
            concat_ws('; ', 'failed the last time: ' || failed, 'never checked: load ' || left(unchecked, 200))
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Clear check_batch with what comes after it, or run the DAG again.';
    END IF;
END
$$;
COMMENT ON FUNCTION ops.assert_checked(text, bigint[]) IS
'Error 55000 when the setting de_dw.refresh_only is checked, and a load was not looked at by the last checks of the
staging table, or one of these failed and was not accepted. Takes the table''s name without schema.';
REVOKE EXECUTE ON FUNCTION ops.assert_checked(text, bigint[]) FROM public;
GRANT EXECUTE ON FUNCTION ops.assert_checked(text, bigint[]) TO de_dw_pipeline;

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
    PERFORM ops.assert_checked(table_name, loads);
    RETURN cardinality(loads);
END
$$;

-- Views of ops look into it with their owner's rights: so it belongs to the owner, and nobody else can put a policy or
-- a trigger on it. A swap changes what it has to.
ALTER TABLE stg.table_versions OWNER TO current_user;
GRANT SELECT, UPDATE (version, published_at, spare_emptied_by) ON stg.table_versions TO de_dw_pipeline;
