-- stg.customers_latest, which can be made again from raw.customers at any time.
SELECT stg.drop_latest('customers');
