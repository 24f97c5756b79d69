-- stg.orders_latest with both tables behind it. They can be made again from raw.orders at any time.

DROP TABLE stg.orders_latest_spare;
DROP TABLE stg.orders_latest;
DO $$
DECLARE
    current_version bigint;
BEGIN
    DELETE FROM stg.table_versions WHERE table_name = 'orders_latest' RETURNING version INTO STRICT current_version;
    EXECUTE format('DROP TYPE stg.%I', 'orders_latest_v' || current_version);
END
$$;
