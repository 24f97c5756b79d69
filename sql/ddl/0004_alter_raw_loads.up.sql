-- raw.loads: one row per committed load, now with the file's header and the way to load the same bytes again.

ALTER TABLE raw.loads
ADD COLUMN header text,
ADD COLUMN repeat_of bigint;

COMMENT ON COLUMN raw.loads.header IS 'The file''s first line as received: what its rejects are exported under.';
COMMENT ON COLUMN raw.loads.repeat_of IS
'The first load of the same bytes, when this batch brought them again because it was told to (load_again).';

-- The ledger has a row per file, so this takes no time; a new index could not be built beside it in a transaction.
-- squawk-ignore require-concurrent-index-deletion
DROP INDEX raw.file_is_loaded_once;
-- squawk-ignore require-concurrent-index-creation
CREATE UNIQUE INDEX file_is_loaded_once ON raw.loads (table_name, sha256)
WHERE rows + rejects > 0 AND repeat_of IS NULL;

GRANT INSERT (header, repeat_of) ON raw.loads TO de_dw_pipeline;
