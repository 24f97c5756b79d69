-- raw.orders_rejects: one row per record of a loaded file that raw.orders did not take, as it was received.

-- The loader finds it by its name, that of the table with _rejects behind it.
CREATE TABLE raw.orders_rejects (
    load_id bigint NOT NULL DEFAULT current_setting('de_dw.load_id')::bigint,
    line_number bigint NOT NULL,
    line text NOT NULL,
    line_bytes bytea,
    column_name text,
    reason text NOT NULL,
    CONSTRAINT orders_rejects_pkey PRIMARY KEY (load_id, line_number)
);

COMMENT ON TABLE raw.orders_rejects IS
'The quarantine of raw.orders: one row per rejected record of a file whose other rows were loaded. Append-only.';
COMMENT ON COLUMN raw.orders_rejects.load_id IS 'The load that left the record out: raw.loads.load_id.';
COMMENT ON COLUMN raw.orders_rejects.line_number IS 'The line of the file on which the record begins; the header is 1.';
COMMENT ON COLUMN raw.orders_rejects.line IS
'The record as received, without its line end; a byte that is no UTF-8 text stands as \xff, and see line_bytes.';
COMMENT ON COLUMN raw.orders_rejects.line_bytes IS 'The record''s bytes, where line is not exact; else NULL.';
COMMENT ON COLUMN raw.orders_rejects.column_name IS 'The column at fault, where one is.';
COMMENT ON COLUMN raw.orders_rejects.reason IS 'Why PostgreSQL does not take it, or why the loader does not.';

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON raw.orders_rejects
FOR EACH STATEMENT EXECUTE FUNCTION raw.refuse_change();
ALTER TABLE raw.orders_rejects ENABLE ALWAYS TRIGGER append_only;

GRANT SELECT ON raw.orders_rejects TO de_dw_pipeline;
-- Not load_id: its default is the load that runs.
GRANT INSERT (line_number, line, line_bytes, column_name, reason) ON raw.orders_rejects TO de_dw_pipeline;
GRANT SELECT ON raw.orders_rejects TO de_dw_reader;
