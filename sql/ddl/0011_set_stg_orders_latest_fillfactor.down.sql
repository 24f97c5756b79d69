-- Undoes 0011_set_stg_orders_latest_fillfactor.up.sql.

ALTER TABLE stg.orders_latest_live RESET (fillfactor);
ALTER TABLE stg.orders_latest_spare RESET (fillfactor);
