-- Schemas raw and stg: functions that make a dataset of a table of raw, for migrations.

ALTER TABLE stg.table_versions
ADD COLUMN tombstone_column text,
ADD COLUMN tombstone_value text;
-- The table has a row per staging table: this takes no time.
ALTER TABLE stg.table_versions
-- squawk-ignore constraint-missing-not-valid
ADD CONSTRAINT tombstone_is_a_column_and_a_value CHECK ((tombstone_column IS NULL) = (tombstone_value IS NULL));
COMMENT ON COLUMN stg.table_versions.tombstone_column IS
'The column that says whether a version is a tombstone: a key whose latest version is one is not in the table.';
COMMENT ON COLUMN stg.table_versions.tombstone_value IS 'The value of that column which makes a version a tombstone.';

-- For migrations: CREATE TABLE raw.customers (its columns and rules), then SELECT raw.create_dataset('customers').
CREATE FUNCTION raw.create_dataset(name text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    source text := format('raw.%I', name);
    quarantine text := format('raw.%I', name || '_rejects');
    described record;
    received text; -- its columns as they are, before those that tell where a row came from
BEGIN
    IF octet_length(name) > 40 THEN
        RAISE EXCEPTION 'the name % is too long: at most 40 bytes, for what hangs on the table is named after it', name;
    END IF;
    SELECT string_agg(quote_ident(a.attname), ', ') INTO received
    FROM pg_attribute AS a
    WHERE a.attrelid = source::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '';
    IF NOT EXISTS (
        SELECT 1 FROM pg_attribute AS a
        WHERE a.attrelid = source::regclass AND a.attname = 'updated_at' AND a.attnotnull
            AND a.atttypid = 'timestamptz'::regtype
    ) THEN
        RAISE EXCEPTION '% has no column updated_at timestamptz NOT NULL', source
            USING HINT = 'It says which version of a key is the latest. A feed without one: give the column a DEFAULT.';
    END IF;

    EXECUTE format(
        -- CACHE: a sequence that is asked once in 1000 rows made COPY 1-6% slower, one asked for each row 13-15%.
        'ALTER TABLE %s
        ADD COLUMN row_id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1000),
        ADD COLUMN load_id bigint NOT NULL,
        ALTER COLUMN load_id SET DEFAULT current_setting(''de_dw.load_id'')::bigint,
        ADD CONSTRAINT updated_at_is_finite CHECK (isfinite(updated_at)),
        ADD CONSTRAINT updated_at_is_not_in_the_future CHECK (updated_at < now() + interval ''5 minutes'')',
        source
    );
    EXECUTE format(
        'COMMENT ON COLUMN %s.row_id IS %L',
        source, 'Order of arrival, with gaps. On a tie of updated_at what arrived last wins.'
    );
    EXECUTE format(
        'COMMENT ON COLUMN %s.load_id IS %L', source, 'The load that brought the row: raw.loads.load_id.'
    );
    -- A load's rows lie together, so the least and the greatest load_id of each 128 pages are enough.
    EXECUTE format('CREATE INDEX %I ON %s USING brin (load_id)', name || '_load_id_brin', source);

    EXECUTE format(
        'CREATE TABLE %s (
            load_id bigint NOT NULL DEFAULT current_setting(''de_dw.load_id'')::bigint,
            line_number bigint NOT NULL,
            line text NOT NULL,
            line_bytes bytea,
            column_name text,
            reason text NOT NULL,
            CONSTRAINT %I PRIMARY KEY (load_id, line_number)
        )', quarantine, name || '_rejects_pkey'
    );
    FOR described IN
        SELECT v.name AS column_name, v.words
        FROM (VALUES
            ('load_id', 'The load that left the record out: raw.loads.load_id.'),
            ('line_number', 'The line of the file on which the record begins; the header is 1.'),
            ('line', 'The record as received, without its line end; a byte that is no UTF-8 text stands as \xff, and see '
                'line_bytes.'),
            ('line_bytes', 'The record''s bytes, where line is not exact; else NULL.'),
            ('column_name', 'The column at fault, where one is.'),
            ('reason', 'Why PostgreSQL does not take it, or why the loader does not.')
        ) AS v (name, words)
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', quarantine, described.column_name, described.words);
    END LOOP;
    EXECUTE format(
        'COMMENT ON TABLE %s IS %L',
        quarantine,
        format(
            'The quarantine of %s: one row per rejected record of a file whose other rows were loaded. Append-only.',
            source
        )
    );

    EXECUTE format(
        'CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %s
        FOR EACH STATEMENT EXECUTE FUNCTION raw.refuse_change()', source
    );
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER append_only', source);
    EXECUTE format(
        'CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %s
        FOR EACH STATEMENT EXECUTE FUNCTION raw.refuse_change()', quarantine
    );
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER append_only', quarantine);

    EXECUTE format('GRANT SELECT ON %s, %s TO de_dw_pipeline, de_dw_reader', source, quarantine);
    -- Not row_id and load_id: their defaults say when a row arrived and with which load.
    EXECUTE format('GRANT INSERT (%s) ON %s TO de_dw_pipeline', received, source);
    EXECUTE format(
        'GRANT INSERT (line_number, line, line_bytes, column_name, reason) ON %s TO de_dw_pipeline', quarantine
    );
END
$$;
COMMENT ON FUNCTION raw.create_dataset(text) IS
'Makes a table of raw one that loads go to: row_id, load_id and their index, the rules of updated_at, the quarantine
<name>_rejects, append-only triggers, grants. Takes the name without schema, of a table with its own columns only.';

CREATE FUNCTION raw.drop_dataset(name text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    dropped text;
    has_rows boolean;
BEGIN
    FOREACH dropped IN ARRAY ARRAY[name, name || '_rejects'] LOOP
        -- Locked first: nobody may load between the look and the DROP.
        EXECUTE format('LOCK TABLE raw.%I IN ACCESS EXCLUSIVE MODE', dropped);
        EXECUTE format('SELECT EXISTS (SELECT 1 FROM raw.%I)', dropped) INTO has_rows;
        IF has_rows AND current_setting('de_dw.allow_data_loss', true) IS DISTINCT FROM 'yes' THEN
            RAISE EXCEPTION 'refusing to drop raw.%: it has rows', dropped
                USING HINT = 'Take a backup, then say alembic -x allow-data-loss=yes downgrade ... '
                             '(in psql: SET de_dw.allow_data_loss = ''yes'').';
        END IF;
        EXECUTE format('DROP TABLE raw.%I', dropped);
    END LOOP;
    -- Their files can be loaded again, into a table of that name that is made anew: the ledger must not know them.
    IF EXISTS (SELECT 1 FROM raw.loads AS l WHERE l.table_name = 'raw.' || name) THEN
        ALTER TABLE raw.loads DISABLE TRIGGER append_only;
        DELETE FROM raw.loads AS l WHERE l.table_name = 'raw.' || name;
        ALTER TABLE raw.loads ENABLE ALWAYS TRIGGER append_only;
    END IF;
END
$$;
COMMENT ON FUNCTION raw.drop_dataset(text) IS
'Drops a table of raw, its quarantine and its lines in the ledger, unless the tables have rows: these cannot be made
again.';

-- For migrations: the staging table of a table of raw, with everything that a refresh needs and a reader sees.
CREATE FUNCTION stg.create_latest(
    name text, key_columns text[], tombstone_column text DEFAULT NULL, tombstone_value text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    source text := format('raw.%I', name);
    table_name text := name || '_latest';
    parent text := format('stg.%I', table_name);
    live text := format('stg.%I', table_name || '_live');
    spare text := format('stg.%I', table_name || '_spare');
    deleted text := format('stg.%I', table_name || '_deleted');
    version_type text := format('stg.%I', table_name || '_v0');
    history text := format('stg.%I', name || '_history');
    key_list text;
    column_list text;
    nullable text;
BEGIN
    -- A row without a key would be landed, and then every refresh would fail: raw can't be corrected.
    SELECT string_agg(k, ', ') INTO nullable
    FROM unnest(key_columns) AS k
    WHERE NOT EXISTS (
        SELECT 1 FROM pg_attribute AS a WHERE a.attrelid = source::regclass AND a.attname = k AND a.attnotnull
    );
    IF nullable IS NOT NULL THEN
        RAISE EXCEPTION 'the key of % has no column NOT NULL of the name %', parent, nullable
            USING HINT = format('It must be one of %s, and NOT NULL there, so that a file without it is refused.', source);
    END IF;
    IF tombstone_column IS NOT NULL THEN -- a value that its type does not read is refused here, not by each refresh
        EXECUTE format('SELECT FROM %s WHERE (%I = %L) IS TRUE LIMIT 0', source, tombstone_column, tombstone_value);
    END IF;

    SELECT string_agg(quote_ident(k), ', ') INTO key_list FROM unnest(key_columns) AS k;
    SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) INTO column_list
    FROM pg_attribute AS a
    WHERE a.attrelid = source::regclass AND a.attnum > 0 AND NOT a.attisdropped;

    EXECUTE format(
        'CREATE TABLE %s (LIKE %s INCLUDING COMMENTS, CONSTRAINT %I PRIMARY KEY (%s)) PARTITION BY RANGE (%I)',
        parent, source, table_name || '_pkey', key_list, key_columns[1]
    );
    EXECUTE format(
        'COMMENT ON TABLE %s IS %L',
        parent,
        format(
            'One row per %s: the version with the greatest (updated_at, row_id) in %s. Put views and grants on this '
            'table, never on its partition, and no foreign key to it: they would stop the refresh.', key_list, source
        )
    );
    EXECUTE format('COMMENT ON COLUMN %s.row_id IS %L', parent, format('The version''s row in %s.', source));
    EXECUTE format(
        'COMMENT ON COLUMN %s.load_id IS %L', parent, 'The load that brought the version: raw.loads.load_id.'
    );

    -- The two tables behind it have one shape, comments included, and change their names with every swap. A fifth of
    -- each page is left free, so that a merge finds room beside the version that it replaces.
    EXECUTE format('CREATE TABLE %s (LIKE %s INCLUDING ALL) WITH (fillfactor = 80)', live, parent);
    EXECUTE format('CREATE TABLE %s (LIKE %s INCLUDING ALL) WITH (fillfactor = 80)', spare, parent);
    EXECUTE format(
        'COMMENT ON TABLE %s IS %L', live, format('The rows of %s, or its spare: read that one instead.', parent)
    );
    EXECUTE format(
        'COMMENT ON TABLE %s IS %L', spare, format('The rows of %s, or its spare: read that one instead.', parent)
    );
    EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s FOR VALUES FROM (MINVALUE) TO (MAXVALUE)', parent, live);
    EXECUTE format('CREATE TYPE %s AS ()', version_type);
    EXECUTE format(
        'COMMENT ON TYPE %s IS %L',
        version_type, format('The version of %s, for the catalog: see stg.assert_current.', parent)
    );
    INSERT INTO stg.table_versions (table_name, source_table, tombstone_column, tombstone_value)
    VALUES (table_name, 'raw.' || name, tombstone_column, tombstone_value);

    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', parent);
    -- The owner too: an empty result must not depend on who asks. A refresh writes to the two tables behind.
    EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', parent);
    EXECUTE format(
        'CREATE POLICY snapshot_is_current ON %s FOR SELECT USING ((SELECT stg.assert_current(%L)))', parent, table_name
    );
    EXECUTE format(
        'COMMENT ON POLICY snapshot_is_current ON %s IS %L',
        parent, 'Every row, or error 40001 for a snapshot older than the last swap. Superusers are not checked.'
    );
    EXECUTE format('GRANT SELECT ON %s TO de_dw_reader', parent);

    IF tombstone_column IS NOT NULL THEN
        EXECUTE format('CREATE TABLE %s (LIKE %s INCLUDING ALL)', deleted, parent);
        EXECUTE format(
            'COMMENT ON TABLE %s IS %L',
            deleted,
            format(
                'One row per %s whose latest version is a tombstone: no row of %s, but what an older version that '
                'comes late loses against.', key_list, parent
            )
        );
        EXECUTE format('GRANT SELECT ON %s TO de_dw_reader', deleted);
        EXECUTE format('ALTER TABLE %s OWNER TO de_dw_pipeline', deleted);
    END IF;
    EXECUTE format('ALTER TABLE %s OWNER TO de_dw_pipeline', parent);
    EXECUTE format('ALTER TABLE %s OWNER TO de_dw_pipeline', live);
    EXECUTE format('ALTER TABLE %s OWNER TO de_dw_pipeline', spare);
    EXECUTE format('ALTER TYPE %s OWNER TO de_dw_pipeline', version_type);

    -- Two rows of one key and one updated_at are one version: the one that arrived last.
    EXECUTE format(
        'CREATE VIEW %1$s AS
        SELECT v.*, v.updated_at AS valid_from,
            lead(v.updated_at) OVER (PARTITION BY %3$s ORDER BY v.updated_at ASC) AS valid_to
        FROM (
            SELECT DISTINCT ON (%3$s, updated_at) %4$s FROM %2$s
            ORDER BY %3$s, updated_at ASC, row_id DESC
        ) AS v',
        history, source, key_list, column_list
    );
    EXECUTE format(
        'COMMENT ON VIEW %s IS %L',
        history,
        format('One row per version of %s, true from valid_from until before valid_to. Made from %s when it is asked.',
            key_list, source)
    );
    PERFORM stg.comment_columns_like(history, parent);
    EXECUTE format('COMMENT ON COLUMN %s.valid_from IS %L', history, 'When the version became true: its updated_at.');
    EXECUTE format(
        'COMMENT ON COLUMN %s.valid_to IS %L',
        history, 'When the next version became true, exclusive; NULL for the latest.'
    );
    EXECUTE format('GRANT SELECT ON %s TO de_dw_pipeline, de_dw_reader', history);
END
$$;
COMMENT ON FUNCTION stg.create_latest(text, text[], text, text) IS
'Makes stg.<name>_latest, the newest version of each key in raw.<name>, with the two tables behind it, its row policy,
grants and the view stg.<name>_history. With a tombstone (a column and its value as text) a key whose newest version has
it is not in the table, and remembered in stg.<name>_latest_deleted. Takes the name of the table of raw without schema.';

CREATE FUNCTION stg.comment_columns_like(target text, model text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    named record;
BEGIN
    FOR named IN
        SELECT a.attname, col_description(a.attrelid, a.attnum) AS words
        FROM pg_attribute AS a
        WHERE a.attrelid = model::regclass AND a.attnum > 0 AND NOT a.attisdropped
    LOOP
        EXECUTE format('COMMENT ON COLUMN %s.%I IS %L', target, named.attname, named.words);
    END LOOP;
END
$$;
COMMENT ON FUNCTION stg.comment_columns_like(text, text) IS 'Gives the columns of a relation the comments of another.';

CREATE FUNCTION stg.drop_latest(name text) RETURNS void
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    current_version bigint;
BEGIN
    EXECUTE format('DROP VIEW stg.%I', name || '_history');
    EXECUTE format('DROP TABLE IF EXISTS stg.%I', name || '_latest_deleted');
    EXECUTE format('DROP TABLE stg.%I', name || '_latest_spare');
    EXECUTE format('DROP TABLE stg.%I', name || '_latest');
    DELETE FROM stg.table_versions AS v WHERE v.table_name = drop_latest.name || '_latest'
    RETURNING v.version INTO STRICT current_version;
    -- What was applied to it is not, to a table of that name that is made anew.
    DELETE FROM stg.applied_loads AS a WHERE a.table_name = drop_latest.name || '_latest';
    EXECUTE format('DROP TYPE stg.%I', name || '_latest_v' || current_version);
END
$$;
COMMENT ON FUNCTION stg.drop_latest(text) IS
'Drops what stg.create_latest has made. It can be made again from raw.<name> at any time.';

REVOKE EXECUTE ON FUNCTION
raw.create_dataset(text),
raw.drop_dataset(text),
stg.create_latest(text, text[], text, text),
stg.comment_columns_like(text, text),
stg.drop_latest(text)
FROM public;
