MODEL (
  name mesh.orders_latest,
  kind INCREMENTAL_BY_UNIQUE_KEY (unique_key order_id),
  cron '@daily',
  start '2025-01-01',
  columns (
    order_id bigint,
    customer_name text,
    customer_email text,
    product text,
    quantity integer,
    unit_price numeric,
    currency text,
    status text,
    ordered_at timestamptz,
    updated_at timestamptz,
    row_id bigint,
    load_id bigint
  )
);

SELECT DISTINCT ON (order_id)
  order_id,
  customer_name,
  customer_email,
  product,
  quantity,
  unit_price,
  currency,
  status,
  ordered_at,
  updated_at,
  row_id,
  load_id
FROM raw.orders
WHERE updated_at BETWEEN @start_dt AND @end_dt
ORDER BY order_id ASC, updated_at DESC, row_id DESC;

@IF(@runtime_stage = 'creating', CREATE UNIQUE INDEX IF NOT EXISTS orders_latest_key ON @this_model USING btree (order_id));
