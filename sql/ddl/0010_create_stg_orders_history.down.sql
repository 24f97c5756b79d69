-- Undoes 0010_create_stg_orders_history.up.sql. Both only show what is in raw.orders.

DROP FUNCTION stg.orders_as_of(timestamptz);
DROP VIEW stg.orders_history;
