-- Schemas raw and stg: without the functions that make a dataset of a table.

DROP FUNCTION stg.drop_latest(text);
DROP FUNCTION stg.create_latest(text, text[], text, text);
DROP FUNCTION stg.comment_columns_like(text, text);
DROP FUNCTION raw.drop_dataset(text);
DROP FUNCTION raw.create_dataset(text);

-- A table with tombstones would have them published by the refreshes before: it was dropped by the migration that made
-- it, which comes after this one.
ALTER TABLE stg.table_versions
DROP COLUMN tombstone_column,
DROP COLUMN tombstone_value;
