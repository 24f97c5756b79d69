-- Undoes 0006_limit_orders_updated_at.up.sql.
ALTER TABLE raw.orders DROP CONSTRAINT updated_at_is_not_in_the_future;
