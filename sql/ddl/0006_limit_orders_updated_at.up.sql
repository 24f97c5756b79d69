-- raw.orders: updated_at may not lie in the future, or no later version of the order would ever be published.

-- Five minutes for clocks that differ. NOT VALID: rows that were received before this rule stay as they are, and
-- what has once passed it passes it ever after.
ALTER TABLE raw.orders
ADD CONSTRAINT updated_at_is_not_in_the_future CHECK (updated_at < now() + interval '5 minutes') NOT VALID;
