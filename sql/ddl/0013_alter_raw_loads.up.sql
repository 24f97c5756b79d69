-- raw.loads: one row per committed load, now with how the file is written, and what tells it from another of its name.

ALTER TABLE raw.loads
ADD COLUMN format jsonb,
ADD COLUMN source_version text;

COMMENT ON COLUMN raw.loads.format IS
'What its dataset declares of its files that is not the default: delimiter, encoding, names of columns ...; else NULL.';
COMMENT ON COLUMN raw.loads.source_version IS
'When the file was last changed, in ns since 1970, or what the store says of an object, such as its ETag: with the same
batch_id, bytes and version it need not be read to know that it was loaded.';

GRANT INSERT (format, source_version) ON raw.loads TO de_dw_pipeline;
