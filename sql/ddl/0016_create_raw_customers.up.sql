-- raw.customers: one row per line of every batch that was loaded, as it was received.
CREATE TABLE raw.customers (
    customer_id bigint NOT NULL,
    name text,
    email text,
    country text,
    updated_at timestamptz NOT NULL
);
COMMENT ON TABLE raw.customers IS 'One row per line of every batch, unchanged. Append-only.';
COMMENT ON COLUMN raw.customers.customer_id IS 'The customer. One row for each version received.';
COMMENT ON COLUMN raw.customers.name IS 'Name of the customer.';
COMMENT ON COLUMN raw.customers.email IS 'E-mail address of the customer.';
COMMENT ON COLUMN raw.customers.country IS 'ISO 3166 code, such as DE.';
COMMENT ON COLUMN raw.customers.updated_at IS 'When this version became true. The newest one is published.';
SELECT raw.create_dataset('customers');
