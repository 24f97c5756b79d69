-- stg.customers_latest: one row per customer_id, its newest version in raw.customers.
SELECT stg.create_latest('customers', '{customer_id}');
