-- Undoes 0007_create_stg_applied_loads.up.sql. What was applied is forgotten: the next refresh applies it again.

DROP FUNCTION stg.analyze_if_stale(text);
DROP FUNCTION stg.loads_to_apply(text);
DROP FUNCTION stg.begin_refresh(text);
DROP FUNCTION raw.summarize_new_pages(text);
DROP VIEW stg.refresh_status;
DROP VIEW stg.pending_loads;
ALTER TABLE stg.table_versions DROP COLUMN source_table;
REVOKE SELECT ON stg.table_versions FROM current_user;
DROP TABLE stg.applied_loads;
