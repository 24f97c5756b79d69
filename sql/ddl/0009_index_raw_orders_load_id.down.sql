-- Undoes 0009_index_raw_orders_load_id.up.sql.

-- squawk-ignore require-concurrent-index-deletion
DROP INDEX raw.orders_load_id_brin;
